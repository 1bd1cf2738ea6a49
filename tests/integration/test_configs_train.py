# Copyright (C) 2026 The anomalib-pedenet authors
# SPDX-License-Identifier: Apache-2.0

"""Every configuration is trained for two steps by anomalib's own command line, on a tiny data set."""

import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
import yaml
from anomalib.cli import AnomalibCLI

from tests.integration.conftest import model_options

CONFIGS = Path(__file__).parents[2] / "configs"
TINY: dict[str, Any] = {
    "image_size": [144, 160],
    "max_steps": 2,
    "steps_per_image": 1,
    "crops_per_step": 1,
    "crop_size": 112,
    "patches_per_step": 16,
    "pairs_per_step": 16,
    "bank_size": 300,
}
LOADING = {"train_batch_size": 2, "num_workers": 0}


def names(folder: str) -> list[str]:
    return sorted(path.name for path in (CONFIGS / folder).glob("*.yaml"))


def options(prefix: str, values: dict[str, Any]) -> list[str]:
    return [word for name, value in values.items() for word in (f"--{prefix}.{name}", str(value))]


def train(arguments: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Train from the command line, and look at what is left."""
    monkeypatch.chdir(folder)
    AnomalibCLI(["train", *arguments, *model_options(TINY), *options("data", LOADING)])
    (path,) = folder.rglob("*.ckpt")
    checkpoint = torch.load(path, weights_only=True)
    assert checkpoint["global_step"] == 2
    state = checkpoint["state_dict"]
    fitted = [value for name, value in state.items() if name.endswith((".rows", ".whitening"))]
    # Scales on which location prediction has learned nothing may be left out, and have nothing then.
    assert 0 < max(map(len, fitted)) <= TINY["bank_size"]


@pytest.mark.parametrize("name", names("model"))
def test_model_configurations_train(
    name: str, dataset_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = ["--data", "MVTecAD", "--data.root", str(dataset_root), "--data.category", "stripes"]
    train(["--model", str(CONFIGS / "model" / name), *data], tmp_path, monkeypatch)


@pytest.mark.parametrize("name", names("data"))
def test_data_configurations_train(
    name: str, dataset_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = yaml.safe_load((CONFIGS / "data" / name).read_text(encoding="utf-8"))
    category = config["init_args"].get("category", "stripes")
    # Each data module finds the images where its own documentation wants them.
    below = {"anomalib.data.Visa": "visa_pytorch"}.get(config["class_path"], "")
    place = tmp_path / "data" / below / category
    shutil.copytree(dataset_root / "stripes", place)
    root = tmp_path / "data"
    if config["class_path"] == "anomalib.data.Folder":
        root = place
        for kind in ("test", "ground_truth"):
            (place / kind / "square").rename(place / kind / "defect")
    train(
        ["--model", "Pedenet", "--data", str(CONFIGS / "data" / name), "--data.root", str(root)], tmp_path, monkeypatch
    )


@pytest.mark.parametrize("name", names("."))
def test_whole_configurations_train(
    name: str, dataset_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few_images = ["--data.test_split_ratio", "0.2", "--model.holdout", "0.25"]
    data = ["--data.root", str(dataset_root / "stripes"), *few_images]
    train(["--config", str(CONFIGS / name), *data], tmp_path, monkeypatch)


@pytest.mark.parametrize("name", names("benchmark"))
def test_benchmark_configurations_train(
    name: str, dataset_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a grid over models Pedenet, and of one over categories the tiny one."""
    config = yaml.safe_load((CONFIGS / "benchmark" / name).read_text(encoding="utf-8"))
    benchmark = config["benchmark"]
    models = benchmark["model"]["class_path"]
    assert "Pedenet" in (models["grid"] if isinstance(models, dict) else [models])
    benchmark["model"] = {"class_path": "Pedenet", "init_args": benchmark["model"].get("init_args", {}) | TINY}
    benchmark["data"]["init_args"] |= {"root": str(dataset_root), "category": "stripes", **LOADING}
    monkeypatch.chdir(tmp_path)
    Path("benchmark.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    AnomalibCLI(["benchmark", "--config", "benchmark.yaml"])
    (path,) = tmp_path.glob("runs/benchmark/*/results.csv")
    results = pd.read_csv(path)
    seeds = benchmark["seed"]["grid"] if isinstance(benchmark["seed"], dict) else [benchmark["seed"]]
    assert list(results["seed"]) == seeds
    assert results["pixel_AUROC"].between(0, 1).all()
