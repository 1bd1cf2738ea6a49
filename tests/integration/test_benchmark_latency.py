# Copyright (C) 2026 The anomalib-pedenet authors
# SPDX-License-Identifier: Apache-2.0

"""The comparison of deployments runs from the command line, and every route it measures computes the same map."""

import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml

from anomalib_pedenet import Pedenet

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "latency.py"
COLUMNS = ["ms", "images_per_second", "repetitions", "bytes", "matrix_tflops", "threads"]


def run(*arguments: str) -> str:
    command = [sys.executable, str(SCRIPT), "--rounds", "1", "--threads", "1", "--images", "4", *arguments]
    environment = {**os.environ, "PYTHONWARNINGS": "ignore"}
    return subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout


@pytest.mark.slow
def test_pedenet_and_a_peer_take_the_same_routes(tmp_path: Path) -> None:
    output = tmp_path / "runs" / "latency"
    arguments = ["--image_size", "112", "128", "--strides", "16", "--batches", "2", "--models", "Pedenet", "PaDiM"]
    printed = run(*arguments, "--routes", "torch eager", "OpenVINO FP16, f32", "--profile", "--output", str(output))
    table = pd.read_csv(f"{output}.csv").set_index(["model", "route"])
    assert len(table) == 4
    assert (table[COLUMNS] > 0).all().all()
    assert (table["batch"] == 2).all()
    # Half-precision weights have 11 significant bits.
    assert (table.xs("torch eager", level="route")["map_error"] < 1e-5).all()
    assert table.xs("OpenVINO FP16, f32", level="route")["map_error"].between(1e-9, 2e-2).all()
    assert table.loc["Pedenet", "of_matrix_product"].gt(0).all()
    assert table.loc[("Pedenet", "OpenVINO FP16, f32"), "bytes"] < table.loc[("Pedenet", "torch eager"), "bytes"]
    if Path("/proc/self/status").exists():
        # OpenVINO's process holds no torch.
        memory = table["peak_mib"].unstack()
        assert (memory["OpenVINO FP16, f32"] < memory["torch eager"] / 2).all()
    header = next(line for line in printed.splitlines() if "kNN product" in line)
    times = next(line for line in printed.splitlines() if line.startswith("Pedenet, stride 16, OpenVINO"))
    position = header.index("kNN product") + len("kNN product")
    assert float(times[:position].split()[-1]) > 0
    assert "| PaDiM | OpenVINO FP16, f32 |" in Path(f"{output}.md").read_text(encoding="utf-8")
    assert Path(f"{output}.png").stat().st_size > 10_000


@pytest.mark.slow
def test_the_auroc_of_a_checkpoint_is_measured(dataset_root: Path, tmp_path: Path) -> None:
    config = {"class_path": "anomalib.data.MVTecAD"}
    config["init_args"] = {"root": str(dataset_root), "category": "stripes", "num_workers": 0}
    (tmp_path / "stripes.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    model = Pedenet(image_size=(144, 160), patch_sizes=[32], bank_size=300, lambda_syn=0)
    model.model.fit([torch.rand(2, 3, 144, 160)])
    state = {"state_dict": model.state_dict(), "hyper_parameters": dict(model.hparams)}
    torch.save({"pytorch-lightning_version": "2.6.0", **state}, tmp_path / "model.ckpt")

    output = tmp_path / "latency"
    arguments = ["--models", "Pedenet", "--routes", "torch eager", "--strides", "8", "16", "--batches", "1"]
    arguments += ["--checkpoint", str(tmp_path / "model.ckpt"), "--data", str(tmp_path / "stripes.yaml")]
    run(*arguments, "--output", str(output))
    table = pd.read_csv(f"{output}.csv").set_index("stride")
    assert (table["image_size"] == "144x160").all()
    assert table[["pixel_AUROC", "image_AUROC"]].stack().between(0, 1).all()
    assert table.loc[8, "pixel_AUROC"] != table.loc[16, "pixel_AUROC"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batches", "1", "--data", "parts.yaml"], "needs a trained model"),
        (["--batches", "8"], "--images must be at least twice the largest batch, 16"),
    ],
)
def test_arguments_that_cannot_be_are_refused(arguments: list[str], message: str) -> None:
    with pytest.raises(subprocess.CalledProcessError) as error:
        run(*arguments)
    assert message in " ".join(error.value.stderr.split())
