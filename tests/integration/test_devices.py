# Copyright (C) 2026 The anomalib-pedenet authors
# SPDX-License-Identifier: Apache-2.0

"""Trainings on two devices (two processes on the CPU, by gloo): the same in both, and no hang where one fails."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.integration.conftest import write_dataset
from tests.integration.trainings import last_checkpoint

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

STRATEGIES = ["ddp", "ddp_fork", "ddp_spawn"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven training images and, with three good and three defective ones and one more, seven to test on."""
    root = write_dataset(tmp_path_factory.mktemp("data"), num_train=7, size=(112, 128))
    good = root / "stripes/test/good"
    (good / "003.png").write_bytes((root / "stripes/train/good/000.png").read_bytes())
    return root


def run(root: Path, data: Path, **options: Any) -> subprocess.CompletedProcess[str]:  # noqa: ANN401
    """Run a training as a script, whose log is ``root`` with the ending ``.log``."""
    arguments = {"root": str(root), "data_root": str(data), **options}
    return subprocess.run(
        [sys.executable, "-m", "tests.integration.trainings", json.dumps(arguments)],
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def run_well(root: Path, data: Path, **options: Any) -> None:  # noqa: ANN401
    done = run(root, data, **options)
    assert done.returncode == 0, done.stderr[-2000:] + root.with_suffix(".log").read_text()[-3000:]


def on_two(strategy: str) -> dict[str, Any]:
    return {"devices": 2, "strategy": strategy}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_processes_train_one_model(data: Path, tmp_path: Path, strategy: str) -> None:
    run_well(tmp_path / "two", data, trainer=on_two(strategy), model={"max_steps": 20})
    ranks = [torch.load(tmp_path / f"two/rank{rank}.pt") for rank in (0, 1)]
    assert ranks[0]["files"] != ranks[1]["files"]  # they have not drawn the same
    assert ranks[0]["state"].keys() == ranks[1]["state"].keys()
    for name, value in ranks[0]["state"].items():  # weights, running averages, bank, thresholds
        assert value.numpy().tobytes() == ranks[1]["state"][name].numpy().tobytes(), name

    # One process scores the same test images the same, an odd number of them.
    checkpoint = last_checkpoint(tmp_path / "two")
    run_well(tmp_path / "one", data, checkpoint=str(checkpoint), model={"max_steps": 20})
    two, one = (torch.load(tmp_path / name / "metrics.pt") for name in ("two", "one"))
    assert two[0].keys() == one[0].keys()
    for name, value in two[0].items():
        assert value == pytest.approx(one[0][name], abs=1e-6), name


def test_gradients_are_means_over_the_processes(data: Path, tmp_path: Path) -> None:
    """Each of two single processes draws what one of the two that train together does."""
    options = {"model": {"max_steps": 7, "lambda_den": 1e-4, "density_warmup": 0.0}, "test": False}
    run_well(tmp_path / "first", data, **options, watch={"draw_as": 0})
    run_well(tmp_path / "second", data, **options, watch={"draw_as": 1})
    run_well(tmp_path / "two", data, **options, trainer=on_two("ddp_fork"))
    first, second, two = (torch.load(tmp_path / name / "rank0.pt") for name in ("first", "second", "two"))
    for name in ("weights", "gradients"):
        assert len(first[name]) == len(two[name]) > 30
    for left, right, mean in zip(first["gradients"], second["gradients"], two["gradients"], strict=True):
        torch.testing.assert_close(mean, (left + right) / 2, rtol=1e-4, atol=1e-6)
    assert not torch.equal(first["gradients"][0], second["gradients"][0])


@pytest.mark.parametrize("strategy", ["ddp", "ddp_fork"])  # spawned processes are watched as forked ones are
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("how", ["raise", "kill"])
def test_a_process_that_fails_ends_the_run(data: Path, tmp_path: Path, strategy: str, rank: int, how: str) -> None:
    begin = time.monotonic()
    done = run(
        tmp_path / "run",
        data,
        trainer=on_two(strategy),
        watch={"break_rank": rank, "break_how": how},
        test=False,
    )
    log = (tmp_path / "run.log").read_text() + done.stderr
    assert done.returncode != 0
    if how == "raise":
        assert "This process fails." in log
    elif done.returncode != -signal.SIGKILL:  # unless it was the first process itself
        assert any(said in log for said in ("SIGKILL", "by peer", "exit code")), log[-2000:]
    assert time.monotonic() - begin < 600
    # No process is left that waits for the other.
    deadline = time.monotonic() + 60
    while _is_running(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.5)
    assert not _is_running(tmp_path)


def _is_running(root: Path) -> bool:
    """Return whether a process has this folder in its command line."""
    listed = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    return str(root / "run") in listed


def test_a_resumed_training_on_two_devices_goes_on_exactly(data: Path, tmp_path: Path) -> None:
    options = {"trainer": on_two("ddp_fork"), "test": False}
    run_well(tmp_path / "whole", data, **options, model={"max_steps": 20})
    run(tmp_path / "broken", data, **options, model={"max_steps": 20}, watch={"break_rank": 1})
    checkpoint = last_checkpoint(tmp_path / "broken")
    assert checkpoint is not None
    run_well(tmp_path / "continued", data, **options, model={"max_steps": 20}, checkpoint=str(checkpoint))
    whole, continued = (
        torch.load(last_checkpoint(tmp_path / name), weights_only=True)["state_dict"] for name in ("whole", "continued")
    )
    for name, value in whole.items():
        if isinstance(value, torch.Tensor):
            assert value.numpy().tobytes() == continued[name].numpy().tobytes(), name
