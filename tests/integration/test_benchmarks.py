# Copyright (C) 2026 The anomalib-pedenet authors
# SPDX-License-Identifier: Apache-2.0

"""The benchmarks of time run from the command line, and what they say of it can be believed."""

import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml

from anomalib_pedenet import Pedenet

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def data(dataset_root: Path, tmp_path: Path) -> list[str]:
    arguments = {"root": str(dataset_root), "category": "stripes", "train_batch_size": 3, "num_workers": 0}
    config = {"class_path": "anomalib.data.MVTecAD", "init_args": arguments}
    (tmp_path / "stripes.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    return ["--data", str(tmp_path / "stripes.yaml")]


def run(script: str, *arguments: str) -> str:
    path = os.pathsep.join([str(BENCHMARKS.parent), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONWARNINGS": "ignore", "PYTHONPATH": path}
    command = [sys.executable, str(BENCHMARKS / script), *arguments]
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


LATENCY = ["latency.py", "--rounds", "1", "--threads", "1", "--images", "4"]


@pytest.mark.slow
def test_pedenet_and_a_peer_take_the_same_routes(tmp_path: Path) -> None:
    output = tmp_path / "runs" / "latency"
    arguments = ["--image_size", "112", "128", "--strides", "16", "--batches", "2", "--output", str(output)]
    run(*LATENCY, *arguments, "--models", "Pedenet", "PaDiM", "--routes", "torch eager", "OpenVINO FP16, f32")
    table = pd.read_csv(f"{output}.csv").set_index(["model", "route"])
    assert len(table) == 4
    assert (table[["ms", "repetitions", "bytes", "threads"]] > 0).all(axis=None)
    assert (table["batch"] == 2).all()
    # Half-precision weights have 11 significant bits.
    assert (table.xs("torch eager", level="route")["map_error"] < 1e-5).all()
    assert table.xs("OpenVINO FP16, f32", level="route")["map_error"].between(1e-9, 2e-2).all()
    assert table.loc[("Pedenet", "OpenVINO FP16, f32"), "bytes"] < table.loc[("Pedenet", "torch eager"), "bytes"]
    if Path("/proc/self/status").exists():
        # OpenVINO's process holds no torch.
        memory = table["peak_mib"].unstack()
        assert (memory["OpenVINO FP16, f32"] < memory["torch eager"] / 2).all()


@pytest.mark.slow
@pytest.mark.parametrize("scorer", ["exact", "ppca"])
def test_the_auroc_of_a_checkpoint_is_measured(scorer: str, data: list[str], tmp_path: Path) -> None:
    """By place there is no bank, and no other stride."""
    model = Pedenet(image_size=(144, 160), patch_sizes=[32], scored_sizes=[32], bank_size=300, scorer=scorer)
    model.model.fit([torch.rand(4, 3, 144, 160)])
    state = {"state_dict": model.state_dict(), "hyper_parameters": dict(model.hparams)}
    torch.save({"pytorch-lightning_version": "2.6.0", **state}, tmp_path / "model.ckpt")
    arguments = ["--models", "Pedenet", "--routes", "torch eager", "--strides", "8", "16", "--batches", "1"]
    arguments += ["--checkpoint", str(tmp_path / "model.ckpt"), "--output", str(tmp_path / "latency")]
    printed = run(*LATENCY, *arguments, *data)
    table = pd.read_csv(tmp_path / "latency.csv").set_index("stride")
    assert (table["image_size"] == "144x160").all()
    assert table[["pixel_AUROC", "image_AUROC"]].stack().between(0, 1).all()
    assert list(table.index) == ([8, 16] if scorer == "exact" else [8])
    assert ("left out: Pedenet, stride 16" in printed) == (scorer == "ppca")
    assert table["pixel_AUROC"].is_unique


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batches", "1", "--data", "parts.yaml"], "needs a trained model"),
        (["--batches", "8"], "--images must be at least twice the largest batch, 16"),
    ],
)
def test_arguments_that_cannot_be_are_refused(arguments: list[str], message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        run(*LATENCY, *arguments)


@pytest.mark.slow
def test_every_search_is_measured_but_those_that_need_too_large_a_matrix(tmp_path: Path) -> None:
    output = tmp_path / "runs" / "scorers"
    # 50 x 300 distances take 5.6e-5 GiB, 20 x 300 of them 2.2e-5.
    options = ["--device", "cpu", "--rounds", "1", "--largest_matrix", "4e-5", "--output", str(output)]
    run("scorers.py", *options, "--rows", "300", "--queries", "20", "50")
    table = pd.read_csv(f"{output}.csv")
    few, many = (table[table["queries"] == count].set_index("search") for count in (20, 50))
    exact = ["exact", "faiss_flat", "torch.cdist", "anomalib PatchCore", "scikit-learn brute"]
    assert set(few.index) == {*exact, "faiss_ivf", "faiss_hnsw", "faiss_pq"}
    assert set(many.index) == set(few.index) - {"torch.cdist"}
    assert (few.loc[exact, "recall"] == 1).all()
    assert (few.loc[exact, "largest_error"] < 1e-4).all()
    assert table["recall"].between(0, 1).all()
    assert (table[["ms", "bytes", "repetitions", "matrix_tflops", "threads"]] > 0).all(axis=None)
    assert few.loc["torch.cdist", "bytes"] == 300 * 64 * 4


@pytest.mark.slow
def test_a_step_is_profiled(data: list[str]) -> None:
    table = run("step.py", *data, "--set", "{image_size: [144, 160], crops_per_step: 1}", "--steps", "3")
    figures = dict(line.rsplit(maxsplit=1) for line in table.splitlines() if line.startswith(("GFLOP", "steps per")))
    assert float(figures["steps per second"]) > 0
    # The small encoder alone takes 0.4 GMAC for a crop, forwards; backwards twice as much; three views.
    assert 7.2 < float(figures["GFLOP per step"]) < 10


@pytest.mark.slow
def test_the_start_of_python_is_timed() -> None:
    lines = run("startup.py", "--runs", "2").splitlines()
    assert [line[:25].strip() for line in lines[1:]] == ["without", "with", "with, not compiled"]
    assert all(float(line[25:].split()[0]) > 0 for line in lines[1:])
