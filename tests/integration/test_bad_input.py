# Copyright (C) 2026 The anomalib-pedenet authors
# SPDX-License-Identifier: Apache-2.0

"""Bad input through anomalib's Engine: one clear sentence, and nothing that was saved is touched."""

from pathlib import Path

import pytest
import torch
from anomalib.data import ImageBatch, MVTecAD
from anomalib.engine import Engine

from anomalib_pedenet import Pedenet
from tests.integration.conftest import write_dataset


def make_engine(root: Path) -> Engine:
    return Engine(default_root_dir=root, enable_progress_bar=False)


def test_one_training_image(tmp_path: Path) -> None:
    root = write_dataset(tmp_path / "data", num_train=1)
    datamodule = MVTecAD(root=root, category="stripes", num_workers=0)
    with pytest.raises(ValueError, match=r"has 1 normal image\(s\), but Pedenet needs at least 2.*add images"):
        make_engine(tmp_path).fit(Pedenet(), datamodule=datamodule)


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
