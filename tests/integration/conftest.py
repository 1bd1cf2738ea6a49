# Copyright (C) 2026 The anomalib-pedenet authors
# SPDX-License-Identifier: Apache-2.0

"""A small data set and a short training that the integration tests share."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from anomalib.data import MVTecAD
from PIL import Image

from anomalib_pedenet import Recipe


def write_dataset(root: Path, num_train: int = 6, size: tuple[int, int] = (144, 160)) -> Path:
    """Write striped images in MVTec AD's layout; the defective ones have a bright square with its mask."""
    generator = np.random.default_rng(0)
    stripes = 127 + 60 * np.sin(np.arange(size[1]) / 5)[None, :, None] * np.array([1.0, 0.8, 0.6])

    def write(path: Path, array: np.ndarray) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(array.clip(0, 255).astype(np.uint8)).save(path)

    def image() -> np.ndarray:
        return np.roll(stripes, generator.integers(30), axis=1) + generator.normal(0, 8, (*size, 3))

    for index in range(num_train):
        write(root / f"stripes/train/good/{index:03}.png", image())
    for index in range(3):
        write(root / f"stripes/test/good/{index:03}.png", image())
        defective, mask = image(), np.zeros(size)
        defective[40:80, 50:90] = 240
        mask[40:80, 50:90] = 255
        write(root / f"stripes/test/square/{index:03}.png", defective)
        write(root / f"stripes/ground_truth/square/{index:03}_mask.png", mask)
    return root


def model_options(arguments: dict[str, Any]) -> list[str]:
    """Return arguments of Pedenet as options of anomalib's command line."""
    names = {name: f"recipe.{name}" if name in asdict(Recipe()) else name for name in arguments}
    values = arguments.items()
    return [part for name, value in values for part in (f"--model.{names[name]}", json.dumps(value).strip('"'))]


@pytest.fixture(scope="session")
def dataset_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data"))


@pytest.fixture
def datamodule(dataset_root: Path) -> MVTecAD:
    return MVTecAD(
        root=dataset_root,
        category="stripes",
        train_batch_size=3,
        eval_batch_size=2,
        num_workers=0,
    )
