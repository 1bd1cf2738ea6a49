# Copyright (C) 2026 The anomalib-pedenet authors
# SPDX-License-Identifier: Apache-2.0

"""The reproduction runs from the command line, goes on where it was killed, and writes what it measured."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from anomalib.models import get_model

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
ALL_METHODS = yaml.safe_load((BENCHMARKS / "methods.yaml").read_text(encoding="utf-8"))
TINY = {"max_steps": 2, "crops_per_step": 1, "bank_size": 300}
METHODS = {
    "Pedenet": {"table": "methods", "model": {"class_path": "Pedenet", "init_args": TINY}},
    "PaDiM, random weights": {
        "table": "methods",
        "model": {"class_path": "Padim", "init_args": {"pre_trained": False, "n_features": 10}},
    },
    "L_LPN alone": {
        "table": "losses",
        "model": {"class_path": "Pedenet", "init_args": {**TINY, "lambda_syn": 0.0, "lambda_den": 0.0}},
    },
}
METRICS = ["pixel_AUROC", "image_AUROC", "pixel_AUPRO", "pixel_F1Max"]


def command(dataset_root: Path, folder: Path, methods: dict[str, object], *options: str) -> list[str]:
    data = {
        "class_path": "anomalib.data.MVTecAD",
        "init_args": {"root": str(dataset_root), "category": "stripes", "train_batch_size": 3, "num_workers": 0},
    }
    (folder / "data.yaml").write_text(yaml.safe_dump(data), encoding="utf-8")
    (folder / "methods.yaml").write_text(yaml.safe_dump(methods, sort_keys=False), encoding="utf-8")
    files = ["--data", str(folder / "data.yaml"), "--methods_file", str(folder / "methods.yaml")]
    script = str(BENCHMARKS / "reproduce.py")
    return [sys.executable, script, *files, "--image_size", "144,160", "--output", str(folder / "out"), *options]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONWARNINGS": "ignore"}


def test_tables_and_figures_of_all_methods(dataset_root: Path, tmp_path: Path) -> None:
    arguments = command(dataset_root, tmp_path, METHODS)
    subprocess.run(arguments, check=True, capture_output=True, env=environment())
    rows = pd.read_csv(tmp_path / "out" / "results.csv").set_index("method")
    assert list(rows.index) == list(METHODS)
    assert rows[METRICS].stack().between(0, 1).all()
    assert (rows[["train_seconds", "latency_ms", "bytes", "multiply_adds"]] > 0).all(axis=None)
    assert rows.loc["Pedenet", "parameters"] == 530_214
    report = (tmp_path / "out" / "results.md").read_text(encoding="utf-8")
    assert f"| stripes | {rows.loc['Pedenet', 'pixel_AUROC']:.3f} |" in report
    for picture in [line.split("(")[1].rstrip(")") for line in report.splitlines() if line.startswith("![")]:
        assert (tmp_path / "out" / picture).stat().st_size > 5000


def test_a_killed_reproduction_goes_on_and_repeats_nothing(dataset_root: Path, tmp_path: Path) -> None:
    arguments = command(dataset_root, tmp_path, {"Pedenet": METHODS["Pedenet"]}, "--seeds", "0,1,2")
    runs = tmp_path / "out" / "runs"
    with subprocess.Popen(
        arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment()
    ) as process:
        while not (runs / "stripes-Pedenet-0.json").exists():
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
    before = {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in runs.glob("*.json")}
    assert 0 < len(before) < 3

    said = subprocess.run(arguments, check=True, capture_output=True, text=True, env=environment()).stdout
    assert said.count("finished before") == len(before)
    for name, (modified, content) in before.items():
        assert (runs / name).stat().st_mtime_ns == modified
        assert (runs / name).read_bytes() == content
    assert list(pd.read_csv(tmp_path / "out" / "results.csv")["seed"]) == [0, 1, 2]

    smaller = {"table": "methods", "model": {"class_path": "Pedenet", "init_args": {**TINY, "bank_size": 200}}}
    changed = command(dataset_root, tmp_path, {"Pedenet": smaller}, "--seeds", "0")
    said = subprocess.run(changed, check=True, capture_output=True, text=True, env=environment()).stdout
    assert "finished before" not in said


def test_an_unknown_method_is_named(dataset_root: Path, tmp_path: Path) -> None:
    arguments = command(dataset_root, tmp_path, METHODS, "--methods", "Pedenet;PaDiN")
    said = subprocess.run(arguments, check=False, capture_output=True, text=True, env=environment())
    assert said.returncode != 0
    assert "Unknown methods PaDiN" in said.stderr


@pytest.mark.parametrize("name", ALL_METHODS)
def test_every_method_is_a_model(name: str) -> None:
    method = ALL_METHODS[name]
    assert method["table"] in {"methods", "losses"}
    assert type(get_model(method["model"])).__name__ == method["model"]["class_path"]


def test_published_figures_have_the_papers_averages() -> None:
    """The paper's Table 1: 0.959 over all, 0.970 over objects and 0.936 over textures."""
    figures = pd.read_csv(BENCHMARKS / "published.csv")
    paper = figures[figures["method"] == "PEDENet"].set_index("category")["pixel_AUROC"]
    is_texture = paper.index.isin(["carpet", "grid", "leather", "tile", "wood"])
    averages = [paper.mean(), paper[~is_texture].mean(), paper[is_texture].mean()]
    assert len(paper) == 15
    np.testing.assert_allclose(averages, [0.959, 0.970, 0.936], atol=0.001)
