# Copyright (C) 2026 The anomalib-pedenet authors
# SPDX-License-Identifier: Apache-2.0

"""Every scorer through anomalib's Engine, command line and exports."""

import logging
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from anomalib.cli import AnomalibCLI
from anomalib.data import MVTecAD, PredictDataset
from anomalib.deploy import ExportType, OpenVINOInferencer
from anomalib.engine import Engine
from torchvision.io import read_image

from anomalib_pedenet import Pedenet
from anomalib_pedenet.scorers import SCORERS, scorer_class
from tests.integration.conftest import model_options

EXPORTABLE = [name for name in SCORERS if scorer_class(name).exportable]
SMALL: dict[str, Any] = {
    "image_size": [144, 160],
    "max_steps": 6,
    "steps_per_image": 1,
    "crops_per_step": 1,
    "bank_size": 300,
    "stride": 16,
    "patch_sizes": [32],
    "scored_sizes": [32],
    "lambda_den": 1e-4,  # for the scorer of the density estimation network's mixture
}


def make_engine(root: Path, **options: Any) -> Engine:  # noqa: ANN401
    return Engine(default_root_dir=root, enable_progress_bar=False, logger=False, **options)


@pytest.fixture(scope="module")
def checkpoint(dataset_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model trained with the default scorer."""
    engine = make_engine(tmp_path_factory.mktemp("results"))
    engine.fit(Pedenet(**SMALL), datamodule=MVTecAD(dataset_root, category="stripes", num_workers=0))
    return Path(engine.best_model_path)


def with_scorer(
    scorer: str | dict[str, Any], checkpoint: Path, datamodule: MVTecAD, root: Path
) -> tuple[Pedenet, Path]:
    """The checkpoint's networks with another scorer, validated for its thresholds, and its own checkpoint."""
    model, engine = Pedenet(**SMALL, scorer=scorer), make_engine(root)
    engine.validate(model, datamodule=datamodule, ckpt_path=checkpoint)
    path = root / "other.ckpt"
    engine.trainer.save_checkpoint(path)
    return model.eval(), path


@pytest.mark.parametrize("scorer", SCORERS)
def test_another_scorer_takes_a_checkpoints_networks_and_its_own_checkpoint_scores_the_same(
    scorer: str, checkpoint: Path, datamodule: MVTecAD, dataset_root: Path, tmp_path: Path
) -> None:
    model, path = with_scorer(scorer, checkpoint, datamodule, tmp_path)
    images = torch.stack(
        [read_image(str(dataset_root / f"stripes/test/{name}.png")) for name in ("good/000", "square/001")]
    )
    expected = model(images / 255)
    assert torch.isfinite(expected.anomaly_map).all()
    saved = torch.load(path, weights_only=True)
    before = torch.load(checkpoint, weights_only=True)["state_dict"]
    assert saved["pedenet_scorer"] == scorer
    for name, value in before.items():
        if name.startswith("model.") and not name.startswith(
            (
                "model.scorers.",
                "model.position_encodings.",
                "model.whitenings.",
                "model.normal_limit",
                "model.image_limit",
                "model.map_",
                "model.typical_score",
                "model._extra_state",
            )
        ):
            torch.testing.assert_close(saved["state_dict"][name], value, rtol=0, atol=0)
    loaded = Pedenet.load_from_checkpoint(path).eval()(images / 255)
    torch.testing.assert_close(loaded.anomaly_map, expected.anomaly_map, rtol=0, atol=0)
    torch.testing.assert_close(loaded.pred_score, expected.pred_score, rtol=0, atol=0)
    # A model that asks for no scorer takes the checkpoint's.
    (tested,) = make_engine(tmp_path).test(Pedenet(), datamodule=datamodule, ckpt_path=path)
    (asked,) = make_engine(tmp_path).test(Pedenet(scorer=scorer), datamodule=datamodule, ckpt_path=path)
    assert tested == pytest.approx(asked)


def test_a_changed_scorer_is_said_and_needs_training_images(
    checkpoint: Path, datamodule: MVTecAD, dataset_root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "anomalib_pedenet"):
        make_engine(tmp_path).test(Pedenet(**SMALL, scorer="svdd"), datamodule=datamodule, ckpt_path=checkpoint)
    assert "Other than in the checkpoint: scorer=svdd (was auto). The memory bank is built anew" in caplog.text
    images = PredictDataset(dataset_root / "stripes/test/good")
    with pytest.raises(RuntimeError, match=r"no training images: pass the data module.*keep the checkpoint's scorer"):
        make_engine(tmp_path).predict(Pedenet(**SMALL, scorer="svdd"), dataset=images, ckpt_path=checkpoint)


@pytest.mark.parametrize(
    "scorer", [*EXPORTABLE, {"class_path": "local", "init_args": {"radius": 1}}], ids=[*EXPORTABLE, "local, radius 1"]
)
def test_exports_equal_torch(
    scorer: str | dict[str, Any],
    checkpoint: Path,
    datamodule: MVTecAD,
    dataset_root: Path,
    tmp_path: Path,
) -> None:
    model, path = with_scorer(scorer, checkpoint, datamodule, tmp_path)
    image = dataset_root / "stripes/test/square/001.png"
    expected = model(read_image(str(image))[None] / 255)
    exported = make_engine(tmp_path).export(
        Pedenet(), ExportType.ONNX, export_root=tmp_path, ckpt_path=path, input_size=(144, 160)
    )
    # OpenVINO's own format is made of the same file, which it reads in the same way.
    prediction = OpenVINOInferencer(exported, config={"INFERENCE_PRECISION_HINT": "f32"}).predict(image)
    anomaly_map = np.asarray(prediction.anomaly_map).squeeze()
    np.testing.assert_allclose(anomaly_map, expected.anomaly_map.squeeze().numpy(), atol=2e-3)


@pytest.mark.parametrize("export_type", [ExportType.ONNX, ExportType.OPENVINO])
def test_scorers_that_cannot_be_exported_say_so_before_any_work(
    export_type: ExportType, checkpoint: Path, datamodule: MVTecAD, tmp_path: Path
) -> None:
    _, path = with_scorer("faiss_flat", checkpoint, datamodule, tmp_path)
    with pytest.raises(ValueError, match=r"'faiss_flat' searches outside the graph and cannot be exported"):
        make_engine(tmp_path).export(Pedenet(), export_type, export_root=tmp_path / "export", ckpt_path=path)
    assert not list((tmp_path / "export").rglob("model.*"))


def test_the_command_line_takes_names_and_class_paths(
    dataset_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    data = ["--data", "MVTecAD", "--data.category", "stripes", "--data.num_workers", "0"]
    data += ["--data.root", str(dataset_root)]
    short = model_options(SMALL | {"scored_sizes": [24, 32]})
    quiet = ["--trainer.enable_progress_bar", "false"]
    model = ["--model", "Pedenet", "--model.scorer", "faiss_ivf", "--model.coreset", "k_means"]
    AnomalibCLI(["train", *model, *short, *data, *quiet])
    assert "pixel_AUROC" in capsys.readouterr().out
    (path,) = tmp_path.rglob("latest/weights/lightning/model.ckpt")
    saved = torch.load(shutil.copy(path, "first.ckpt"), weights_only=True)
    assert saved["pedenet_scorer"] == "faiss_ivf"
    AnomalibCLI(
        ["predict", "--model", "Pedenet", "--data", str(dataset_root / "stripes/test"), "--ckpt_path", "first.ckpt"]
    )

    given = "{class_path: anomalib_pedenet.scorers.NearestNeighborScorer, init_args: {num_neighbors: 3}}"
    AnomalibCLI(["train", "--model", "Pedenet", "--model.scorer", given, *short, *data, *quiet])
    (path,) = tmp_path.rglob("latest/weights/lightning/model.ckpt")
    loaded = Pedenet.load_from_checkpoint(path)
    assert loaded.model.scorers["32"].num_neighbors == 3
    assert len(loaded.model.scorers["24"].bank) == 300
