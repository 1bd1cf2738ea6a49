# Copyright (C) 2026 The anomalib-pedenet authors
# SPDX-License-Identifier: Apache-2.0

"""Interrupted trainings: killed at any moment and continued, they end bit by bit as if nothing had happened."""

import random
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.integration.conftest import write_dataset
from tests.integration.trainings import last_checkpoint, start, train


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data"), num_train=7, size=(112, 128))


def run(root: Path, data: Path, checkpoint: Path | None = None, **options: Any) -> float:  # noqa: ANN401
    """Train to the end in a process, and return its seconds."""
    begin = time.monotonic()
    process = start(train, root, data, checkpoint, **options)
    process.join()
    assert process.exitcode == 0, root.with_suffix(".log").read_text()[-3000:]
    return time.monotonic() - begin


def assert_same(left: Any, right: Any, where: str) -> None:  # noqa: ANN401
    """Check that two nested values are equal, tensors bit by bit."""
    assert type(left) is type(right), where
    if isinstance(left, torch.Tensor):
        assert left.dtype == right.dtype, where
        assert left.shape == right.shape, where
        assert left.numpy().tobytes() == right.numpy().tobytes(), where  # NaN of one equals NaN of the other
    elif isinstance(left, dict):
        assert left.keys() == right.keys(), where
        for name in left:
            assert_same(left[name], right[name], f"{where}.{name}")
    elif isinstance(left, list | tuple):
        assert len(left) == len(right), where
        for position, (first, second) in enumerate(zip(left, right, strict=True)):
            assert_same(first, second, f"{where}.{position}")
    else:
        assert left == right, where


def assert_same_result(left: Path, right: Path) -> None:
    """Check that two trainings ended with the same networks, bank, thresholds, optimizer and test metrics."""
    first, second = (torch.load(last_checkpoint(root), weights_only=True) for root in (left, right))
    assert first["global_step"] == second["global_step"]
    for entry in ("state_dict", "optimizer_states", "lr_schedulers", "pedenet_origin", "hyper_parameters"):
        assert_same(first[entry], second[entry], entry)
    metrics = [max(root.rglob("metrics.pt"), key=lambda path: path.stat().st_mtime_ns) for root in (left, right)]
    assert_same(torch.load(metrics[0]), torch.load(metrics[1]), "metrics")


def test_a_training_killed_after_an_epoch_goes_on_exactly(data: Path, tmp_path: Path) -> None:
    run(tmp_path / "whole", data)
    root = tmp_path / "killed"
    root.mkdir()
    process = start(train, root / "0", data)
    while last_checkpoint(root) is None and process.is_alive():
        time.sleep(0.01)
    process.kill()
    process.join()
    saved = torch.load(last_checkpoint(root), weights_only=True)
    assert 0 < saved["global_step"] < 36
    run(root / "1", data, last_checkpoint(root))
    assert_same_result(tmp_path / "whole", root)


VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "a seed of the model": {"model": {"seed": 4}},
    "worker processes": {"loader": {"num_workers": 2}},
    "validated every second epoch": {"trainer": {"check_val_every_n_epoch": 2}},
    "a pool that forgets, images held back": {
        "model": {"cache_gib": 3 * 112 * 128 * 3 * 2 / 2**30, "holdout": 0.2, "lr_schedule": "constant"}
    },
    "patch by patch, with a density": {
        "model": {"training_mode": "patchwise", "lambda_syn": 0.0, "lambda_den": 1e-4, "patches_per_step": 16}
    },
}


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("seed", range(2))
def test_a_training_killed_at_random_moments_goes_on_exactly(
    data: Path, tmp_path: Path, seed: int, variant: str
) -> None:
    generator = random.Random(f"{seed} {variant}")
    options = VARIANTS[variant] | {"seed": seed}
    seconds = run(tmp_path / "whole", data, **options)
    root = tmp_path / "killed"
    root.mkdir()
    for kill in range(4):
        process = start(train, root / str(kill), data, last_checkpoint(root), **options)
        process.join(generator.uniform(0.2, 1) * seconds)  # the libraries alone take a fifth
        process.kill()
        process.join()
    run(root / "end", data, last_checkpoint(root), **options)
    assert_same_result(tmp_path / "whole", root)
