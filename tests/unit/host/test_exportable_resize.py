# Copyright (C) 2026 The anomalib-pedenet authors
# SPDX-License-Identifier: Apache-2.0

"""Exported graphs resize as torchvision does in training, whose arithmetic in float64 is the reference."""

from importlib.metadata import version

import pytest
import torch
from anomalib.data.transforms import ExportableCenterCrop
from anomalib.pre_processing import PreProcessor
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn
from torchvision.transforms.v2 import CenterCrop, Compose, InterpolationMode, Normalize, Resize, Transform

from anomalib_pedenet import Pedenet
from anomalib_pedenet.host.exportable_resize import ExportableResize, resize_as_in_training, resize_rows

INTERPOLATIONS = (InterpolationMode.BILINEAR, InterpolationMode.BICUBIC)

TORCHVISION = tuple(int(part) for part in version("torchvision").split(".")[:2])

# Pillow's numbers, which torchvision takes as well; its own default is a name from 0.29 on.
SPELLINGS = (InterpolationMode.BICUBIC, "bicubic", 3)

# To one column torch resizes wrongly (2.12: otherwise in the other memory format).
SIDES = st.integers(2, 40) | st.integers(2, 700)


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
@settings(deadline=None, max_examples=60)
@given(size=st.tuples(SIDES, SIDES), new_size=st.tuples(SIDES, SIDES))
@example(size=(900, 900), new_size=(256, 256))
@example(size=(300, 300), new_size=(256, 256))
@example(size=(97, 511), new_size=(256, 256))
@example(size=(511, 97), new_size=(256, 640))
@example(size=(3000, 2), new_size=(2, 3000))
@example(size=(256, 100), new_size=(256, 256))
def test_rows_and_columns_equal_torchvision(
    interpolation: InterpolationMode, size: tuple[int, int], new_size: tuple[int, int]
) -> None:
    images = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(0))
    expected = Resize(new_size, interpolation, antialias=True)(images.double())
    rows = resize_rows(images, new_size[0], interpolation)
    resized = resize_rows(rows.mT, new_size[1], interpolation).mT
    torch.testing.assert_close(resized.double(), expected, rtol=0, atol=3e-6)


class _Module(nn.Module):
    def __init__(self, transform: Transform) -> None:
        super().__init__()
        self.transform = transform

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.transform(images)


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
def test_one_graph_resizes_images_of_all_sizes(interpolation: InterpolationMode) -> None:
    module = _Module(ExportableResize((64, 96), interpolation))
    dynamic = dict.fromkeys((0, 2, 3), torch.export.Dim.DYNAMIC)
    program = torch.export.export(module, (torch.rand(2, 3, 80, 70),), dynamic_shapes=(dynamic,))
    assert not any("upsample" in str(node.target) for node in program.run_decompositions().graph.nodes)
    for size in ((2, 3, 300, 300), (3, 3, 97, 511), (2, 3, 511, 97), (4, 3, 30, 20), (2, 3, 64, 96)):
        images = torch.rand(size)
        expected = Resize((64, 96), interpolation)(images)
        torch.testing.assert_close(module(images), expected, rtol=0, atol=0)
        torch.testing.assert_close(program.module()(images), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("interpolation", SPELLINGS)
def test_a_filter_has_several_names(interpolation: InterpolationMode | str | int) -> None:
    if isinstance(interpolation, str) and TORCHVISION < (0, 29):
        pytest.skip("this torchvision takes no names")
    images = torch.rand(1, 3, 120, 90)
    pre_processor = PreProcessor(Resize((64, 48), interpolation))
    resize_as_in_training(pre_processor)
    program = torch.export.export(_Module(pre_processor.export_transform), (images,))
    expected = Resize((64, 48), InterpolationMode.BICUBIC)(images)
    torch.testing.assert_close(program.module()(images), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", [(120, 90), (90, 120), (64, 64)])
def test_the_shorter_side_is_resized_of_images_of_a_fixed_size(size: tuple[int, int]) -> None:
    images = torch.rand(1, 3, *size)
    for arguments in ({"size": 64}, {"size": 64, "max_size": 80}):
        program = torch.export.export(_Module(ExportableResize(**arguments)), (images,))
        torch.testing.assert_close(program.module()(images), Resize(**arguments)(images), rtol=0, atol=1e-5)


def test_other_transforms_are_exported_as_anomalib_does() -> None:
    steps = [Resize((80, 90)), Compose([Resize(64, antialias=False), CenterCrop(48)]), Normalize([0.5] * 3, [0.2] * 3)]
    pre_processor = PreProcessor(Compose(steps))
    resize_as_in_training(pre_processor)
    resize, (without, crop), normalize = (
        step.transforms if isinstance(step, Compose) else step for step in pre_processor.export_transform.transforms
    )
    assert type(resize) is ExportableResize
    assert type(without) is Resize
    assert not without.antialias
    assert type(crop) is ExportableCenterCrop
    assert type(normalize) is Normalize
    assert steps[0].antialias  # the training's own transform is as it was
    assert type(steps[1].transforms[1]) is CenterCrop
    images = torch.rand(2, 3, 200, 300)
    torch.testing.assert_close(pre_processor(images), pre_processor.transform(images), rtol=0, atol=0)


def test_what_is_not_anomalibs_is_left_alone() -> None:
    class Halves(Resize):
        """Resizes in its own way."""

    other, own, empty = nn.Identity(), PreProcessor(Halves((32, 32))), PreProcessor()
    for pre_processor in (other, own, empty, None):
        resize_as_in_training(pre_processor)
    assert type(own.export_transform) is Halves
    assert empty.export_transform is None
    assert not hasattr(other, "export_transform")


@pytest.mark.parametrize("size", [(900, 900), (97, 511), (30, 40)])
def test_the_model_resizes_as_its_training_does(size: tuple[int, int]) -> None:
    saved = Pedenet(pre_processor=PreProcessor(Compose([Resize((72, 96)), Normalize([0.5] * 3, [0.2] * 3)])))
    loaded, checkpoint = Pedenet(), {"state_dict": saved.state_dict()}
    saved.on_save_checkpoint(checkpoint)
    loaded.on_load_checkpoint(checkpoint)
    images = torch.rand(1, 3, *size)
    for model in (saved, loaded):
        torch.testing.assert_close(model.pre_processor(images), saved.pre_processor.transform(images), rtol=0, atol=0)
