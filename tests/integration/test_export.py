# Copyright (C) 2026 The anomalib-pedenet authors
# SPDX-License-Identifier: Apache-2.0

"""Exports through anomalib's Engine and both inferencers give what the checkpoint gives."""

from pathlib import Path

import numpy as np
import pytest
import torch
from anomalib.data import MVTecAD
from anomalib.deploy import ExportType, OpenVINOInferencer, TorchInferencer
from anomalib.engine import Engine
from torchvision.io import read_image

from anomalib_pedenet import Pedenet


@pytest.fixture(scope="module")
def trained(dataset_root: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Engine, Path]:
    root = tmp_path_factory.mktemp("results")
    datamodule = MVTecAD(root=dataset_root, category="stripes", train_batch_size=3, num_workers=0)
    model = Pedenet(image_size=(144, 160), max_steps=6, steps_per_image=1, crops_per_step=1)
    engine = Engine(default_root_dir=root, enable_progress_bar=False)
    engine.fit(model, datamodule=datamodule)
    return engine, Path(engine.best_model_path)


@pytest.mark.parametrize("export_type", [ExportType.TORCH, ExportType.ONNX, ExportType.OPENVINO])
def test_inferencers_equal_the_checkpoint(
    trained: tuple[Engine, Path],
    dataset_root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    export_type: ExportType,
) -> None:
    monkeypatch.setenv("TRUST_REMOTE_CODE", "1")
    engine, checkpoint = trained
    path = engine.export(Pedenet(), export_type, export_root=tmp_path, ckpt_path=checkpoint)
    model = Pedenet.load_from_checkpoint(checkpoint).eval()
    inferencer = (
        TorchInferencer(path, device="cpu")
        if export_type == ExportType.TORCH
        # Without it OpenVINO takes bfloat16 on processors that have it.
        else OpenVINOInferencer(path, config={"INFERENCE_PRECISION_HINT": "f32"})
    )
    for name in ("good/000", "square/001"):
        image = dataset_root / f"stripes/test/{name}.png"
        expected = model(read_image(str(image))[None] / 255)
        prediction = inferencer.predict(image)
        np.testing.assert_allclose(
            np.asarray(prediction.anomaly_map).squeeze(),
            expected.anomaly_map.squeeze().numpy(),
            atol=1e-3,
        )
        assert float(np.asarray(prediction.pred_score).squeeze()) == pytest.approx(expected.pred_score.item(), abs=1e-3)


def test_test_from_the_checkpoint_equals_the_fitted_model(trained: tuple[Engine, Path], datamodule: MVTecAD) -> None:
    engine, checkpoint = trained
    (fitted,) = engine.test(engine.model, datamodule=datamodule)
    fresh = Engine(default_root_dir=checkpoint.parent, enable_progress_bar=False)
    (loaded,) = fresh.test(Pedenet(image_size=(144, 160)), datamodule=datamodule, ckpt_path=checkpoint)
    assert loaded == pytest.approx(fitted)
    assert {"image_AUROC", "pixel_AUROC"} <= set(loaded)


def test_checkpoint_is_plain_data(trained: tuple[Engine, Path]) -> None:
    checkpoint = torch.load(trained[1], weights_only=True)
    assert checkpoint["hyper_parameters"]["max_steps"] == 6
