# Copyright (C) 2026 The anomalib-pedenet authors
# SPDX-License-Identifier: Apache-2.0

"""The random generators as plain data."""

import random
from pathlib import Path

import numpy as np
import torch

from anomalib_pedenet.training.resuming import random_state, set_random_state


def draw() -> list[float]:
    legacy = np.random.standard_normal(3)  # noqa: NPY002 - an odd number leaves one cached
    return [*torch.rand(3).tolist(), *legacy.tolist(), random.random(), random.gauss(0, 1)]


def test_generators_go_on_from_a_file_without_code(tmp_path: Path) -> None:
    device = torch.device("cpu")
    draw()
    torch.save(random_state(device), tmp_path / "state.pt")
    expected = [draw(), draw()]
    set_random_state(torch.load(tmp_path / "state.pt", weights_only=True), device)
    assert [draw(), draw()] == expected
