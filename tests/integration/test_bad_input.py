# Copyright (C) 2026 The anomalib-pedenet authors
# SPDX-License-Identifier: Apache-2.0

"""Bad input through anomalib's Engine: one clear sentence, and nothing that was saved is touched."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from anomalib.data import ImageBatch, MVTecAD
from anomalib.engine import Engine

from anomalib_pedenet import Pedenet


def make_engine(root: Path) -> Engine:
    return Engine(default_root_dir=root, enable_progress_bar=False)


@pytest.mark.parametrize(
    ("change", "remedy"),
    [
        (lambda image: image * 255, r"with values from 0 to 255: give them as read, divided by 255"),
        (lambda image: (image - 0.45) / 0.22, r"with values from -2.05 to 2.5: .* and not normalised"),
        (lambda image: (image * 255).byte(), r"torch.uint8 .*convert them, as image / 255"),
        (lambda image: image[0], r"\(3, 112, 128\): give a single image as image\[None\]"),
        (lambda image: image[0, 0], "give a batch of images"),
        (lambda image: image[:, :1], r"give a grey image three times, as image.expand\(-1, 3, -1, -1\)"),
        (lambda image: torch.cat([image, image[:, :1]], dim=1), r"leave the alpha channel out, as image\[:, :3\]"),
        (lambda image: image[:, :2], "the second dimension must be the three colours"),
    ],
)
def test_a_model_called_on_something_else_says_what_to_do(
    change: Callable[[torch.Tensor], torch.Tensor], remedy: str
) -> None:
    image = torch.linspace(0, 1, 3 * 112 * 128).reshape(1, 3, 112, 128)
    with pytest.raises(ValueError, match=remedy):
        Pedenet()(change(image))


def test_an_argument_that_there_is_not_is_refused_at_loading(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="Pedenet has no argument strid"):
        Pedenet.load_from_checkpoint(tmp_path / "model.ckpt", strid=4)


def test_testing_without_training(datamodule: MVTecAD, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="no memory bank yet"):
        make_engine(tmp_path).test(Pedenet(), datamodule=datamodule)


def test_a_checkpoint_cut_in_half(datamodule: MVTecAD, tmp_path: Path) -> None:
    path = tmp_path / "half.ckpt"
    torch.save(Pedenet().state_dict(), path)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"half\.ckpt .* is cut short or not a checkpoint"):
        make_engine(tmp_path).test(Pedenet(), datamodule=datamodule, ckpt_path=path)
    assert path.read_bytes() == content[: len(content) // 2]


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_images_that_are_not_finite_are_named(value: float) -> None:
    images = torch.zeros(2, 3, 128, 128)
    images[1, 0, 5, 5] = value
    batch = ImageBatch(image=images, image_path=["a.png", "b.png"])
    model = Pedenet()
    for step in (model.training_step, model.test_step, model.predict_step):
        with pytest.raises(ValueError, match=r"NaN or infinite pixel values in b\.png"):
            step(batch, 0)
    with pytest.raises(ValueError, match=r"b\.png"):
        model.validation_step(batch)
