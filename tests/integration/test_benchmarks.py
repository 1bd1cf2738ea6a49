# Copyright (C) 2026 The anomalib-pedenet authors
# SPDX-License-Identifier: Apache-2.0

"""The benchmarks of training run from the command line, and write what they say."""

import importlib
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
import yaml
from sklearn.metrics import roc_auc_score

from anomalib_pedenet import Pedenet
from anomalib_pedenet.argument_checks import changes, check_changes

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
BASE = "{max_steps: 4, image_size: [144, 160], crops_per_step: 1, bank_size: 300}"


@pytest.fixture
def data(dataset_root: Path, tmp_path: Path) -> list[str]:
    config = {
        "class_path": "anomalib.data.MVTecAD",
        "init_args": {"root": str(dataset_root), "category": "stripes", "train_batch_size": 3, "num_workers": 0},
    }
    path = tmp_path / "stripes.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return ["--data", str(path)]


def run(script: str, *arguments: str) -> str:
    command = [sys.executable, str(BENCHMARKS / script), *arguments]
    environment = {**os.environ, "PYTHONWARNINGS": "ignore"}
    return subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout


METHODS = {BENCHMARKS / "methods.yaml", BENCHMARKS / "ways.yaml"}
SETTINGS = sorted(set(BENCHMARKS.glob("*.yaml")) - METHODS)


@pytest.mark.parametrize("path", SETTINGS, ids=lambda path: path.stem)
def test_settings_are_arguments_of_the_model(path: Path) -> None:
    for name, arguments in yaml.safe_load(path.read_text(encoding="utf-8")).items():
        assert Pedenet(**arguments).hparams.items() >= arguments.items(), name


def test_ways_of_scoring_are_arguments_beside_trained_weights() -> None:
    """What cannot be changed for a checkpoint is no way of scoring it."""
    first, *ways = yaml.safe_load((BENCHMARKS / "ways.yaml").read_text(encoding="utf-8")).items()
    assert first[0] == "Pedenet"
    defaults = Pedenet().hparams
    for name, way in ways:
        assert way["weights_of"] == "Pedenet"
        hparams = Pedenet(**way["model"]["init_args"]).hparams
        asked = changes(hparams, defaults)
        assert asked, name
        check_changes(asked, hparams, defaults, "evaluate")


def test_batches_of_a_validation_compare_whatever_their_range(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    metric = importlib.import_module("train").ValidationAUROC("val_", ["pred_score", "gt_label"])
    scores = torch.tensor([0.2, 0.9, 0.8, 1.5, 40.0, 30.0, -0.5, 0.7])
    labels = torch.tensor([0, 1, 0, 1, 1, 1, 0, 1])
    for part, truth in zip(scores.split(2), labels.split(2), strict=True):
        metric.update(SimpleNamespace(pred_score=part, gt_label=truth))
    metric.update(SimpleNamespace(pred_score=None, gt_label=truth))
    assert metric.name == "val_AUROC"
    assert metric.compute() == pytest.approx(roc_auc_score(labels, scores))


@pytest.mark.slow
def test_settings_are_ranked_by_drawn_defects_and_a_benchmark_goes_on(data: list[str], tmp_path: Path) -> None:
    output = tmp_path / "runs" / "settings"
    arguments = ["train.py", *data, "--base", BASE, "--holdout", "0.34", "--curve", "--output", str(output)]
    assert "rank correlation" in run(*arguments, "--set", "{}", "--set", "{lambda_syn: 0.0}")
    run(*arguments, "--set", "{}", "--set", "{lambda_syn: 0.0}", "--set", "{lambda_den: 0.0}")
    rows = pd.read_csv(f"{output}.csv")
    assert list(rows["settings"]) == ["{}", "{'lambda_syn': 0.0}", "{'lambda_den': 0.0}"]
    assert rows[["pixel_AUROC", "image_AUROC", "drawn_pixel_AUROC"]].stack().between(0, 1).all()
    assert (rows["steps"] == 4).all()
    curves = pd.read_csv(f"{output}_curve.csv")
    assert (curves.groupby("settings")["seconds"].diff().dropna() > 0).all()


@pytest.mark.slow
def test_builders_of_small_banks_are_compared(tmp_path: Path) -> None:
    output = tmp_path / "coresets"
    run("coresets.py", "--embeddings", "4000", "--size", "50", "--limit", "0.001", "--output", str(output))
    rows = pd.read_csv(f"{output}.csv").set_index("builder")
    assert set(rows.index) == {"uniform", "k_center", "k_means", "anomalib KCenterGreedy"}
    assert (rows["rows"] == 50).all()
    assert (rows["mean_distance"] > 0).all()


@pytest.mark.slow
def test_a_step_is_profiled(data: list[str]) -> None:
    table = run("step.py", *data, "--set", "{image_size: [144, 160], crops_per_step: 1}", "--steps", "3")
    figures = dict(line.rsplit(maxsplit=1) for line in table.splitlines() if line.startswith(("GFLOP", "steps per")))
    assert float(figures["steps per second"]) > 0
    # The small encoder alone takes 0.4 GMAC for a crop, forwards; backwards twice as much; three views.
    assert 7.2 < float(figures["GFLOP per step"]) < 10
