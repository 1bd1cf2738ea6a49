# Copyright (C) 2026 The anomalib-pedenet authors
# SPDX-License-Identifier: Apache-2.0

"""Exports through anomalib's Engine and both inferencers give what the checkpoint gives."""

from pathlib import Path

import numpy as np
import openvino
import pytest
import torch
from anomalib.data import MVTecAD
from anomalib.deploy import CompressionType, ExportType, OpenVINOInferencer, TorchInferencer
from anomalib.engine import Engine
from anomalib.metrics import AUPRO, Evaluator
from torchvision.io import read_image

from anomalib_pedenet import Pedenet


@pytest.fixture(scope="module")
def trained(dataset_root: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Engine, Path]:
    root = tmp_path_factory.mktemp("results")
    datamodule = MVTecAD(root=dataset_root, category="stripes", train_batch_size=3, num_workers=0)
    # With a weight of the position, squares in the memory bank are hundreds: the hard case of low precision.
    model = Pedenet(image_size=(144, 160), max_steps=6, steps_per_image=1, crops_per_step=1, position_weight=32.0)
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


def test_a_checkpoint_is_measured_by_other_metrics(
    trained: tuple[Engine, Path], datamodule: MVTecAD, tmp_path: Path
) -> None:
    """AUPRO has its limit in the state."""
    metrics = [AUPRO(fields=["anomaly_map", "gt_mask"], prefix="pixel_", fpr_limit=limit) for limit in (0.3, 0.1)]
    engine = Engine(default_root_dir=tmp_path, enable_progress_bar=False)
    results = []
    for metric in metrics:
        model = Pedenet(image_size=(144, 160), evaluator=Evaluator(test_metrics=[metric]))
        (result,) = engine.test(model, datamodule=datamodule, ckpt_path=trained[1])
        results.append(result["pixel_AUPRO"])
        engine.trainer.save_checkpoint(tmp_path / "kept.ckpt")
        assert Pedenet.load_from_checkpoint(tmp_path / "kept.ckpt").model.is_fitted
    assert results[0] != results[1]


@pytest.fixture(scope="module")
def openvino_predictions(
    trained: tuple[Engine, Path], dataset_root: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[openvino.Model, list[dict[str, np.ndarray]]]]:
    """Models by their compression, and what they say of a good and a defective image."""
    engine, checkpoint = trained
    images = [
        read_image(str(dataset_root / f"stripes/test/{name}.png"))[None].numpy() / np.float32(255)
        for name in ("good/000", "square/001")
    ]
    exported = {}
    for name in ("none", *CompressionType):
        path = engine.export(
            Pedenet(),
            "openvino",
            export_root=tmp_path_factory.mktemp(name),
            ckpt_path=checkpoint,
            input_size=(144, 160),
            compression_type=None if name == "none" else name,
            datamodule=MVTecAD(root=dataset_root, category="stripes", num_workers=0),
        )
        model = openvino.Core().read_model(path)
        compiled = openvino.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        outputs = [compiled(image) for image in images]
        exported[name] = model, [{key.any_name: output[key] for key in output} for output in outputs]
    return exported


@pytest.mark.parametrize("name", list(CompressionType))
def test_compressed_models_rank_as_the_whole_one(
    openvino_predictions: dict[str, tuple[openvino.Model, list[dict[str, np.ndarray]]]], name: str
) -> None:
    """Order and maps: after six steps all scores lie so near to the threshold that rounding moves them across it."""
    (good, defective), outputs = openvino_predictions["none"][1], openvino_predictions[name][1]
    for expected, output in zip((good, defective), outputs, strict=True):
        assert np.corrcoef(output["anomaly_map"].ravel(), expected["anomaly_map"].ravel())[0, 1] ** 2 > 0.9
    assert good["pred_score"] < defective["pred_score"]
    assert outputs[0]["pred_score"] < outputs[1]["pred_score"]


def test_half_precision_keeps_the_map(
    openvino_predictions: dict[str, tuple[openvino.Model, list[dict[str, np.ndarray]]]],
) -> None:
    for whole, half in zip(openvino_predictions["none"][1], openvino_predictions["fp16"][1], strict=True):
        expected = whole["anomaly_map"]
        np.testing.assert_allclose(half["anomaly_map"], expected, rtol=0, atol=0.02 * np.ptp(expected))


def test_an_export_in_half_precision_leaves_the_model_as_it_was(trained: tuple[Engine, Path], tmp_path: Path) -> None:
    model = Pedenet.load_from_checkpoint(trained[1])
    before = {name: value.clone() for name, value in model.model.scorers.state_dict().items()}
    model.to_openvino(tmp_path, input_size=(144, 160), compression_type=CompressionType.FP16)
    for name, value in model.model.scorers.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)


def test_only_the_inner_convolutions_are_quantized(
    openvino_predictions: dict[str, tuple[openvino.Model, list[dict[str, np.ndarray]]]],
) -> None:
    def quantized(name: str) -> list[tuple[str, list[int]]]:
        """Operations whose input is rounded, with the channels and the side of a convolution's kernel."""
        operations = openvino_predictions[name][0].get_ordered_ops()
        return [
            (operation.get_type_name(), list(operation.input(1).get_shape())[1:3])
            for operation in operations
            if operation.get_input_size() > 1 and operation.input_value(0).get_node().get_type_name() == "FakeQuantize"
        ]

    # Five convolutions make 24-px patches.
    inner = [("Convolution", [channels, 3]) for channels in (32, 64, 128, 128)]
    assert quantized("int8_ptq") == inner
    assert quantized("none") == quantized("int8") == []


@pytest.mark.parametrize("name", [CompressionType.INT8_PTQ, CompressionType.INT8_ACQ])
def test_a_model_for_a_fixed_batch_is_quantized(
    trained: tuple[Engine, Path], dataset_root: Path, tmp_path: Path, name: CompressionType
) -> None:
    model = Pedenet.load_from_checkpoint(trained[1])
    path = model.to_openvino(
        tmp_path,
        input_size=(144, 160),
        compression_type=name,
        datamodule=MVTecAD(root=dataset_root, category="stripes", num_workers=0),
        onnx_kwargs={"dynamic_shapes": ({0: 3},), "verbose": False},
    )
    exported = openvino.Core().read_model(path)
    assert list(exported.input(0).shape) == [3, 3, 144, 160]
    if name == CompressionType.INT8_PTQ:  # accuracy control may leave nothing in eight bits
        assert any(operation.get_type_name() == "FakeQuantize" for operation in exported.get_ordered_ops())


def test_quantization_needs_images(trained: tuple[Engine, Path], tmp_path: Path) -> None:
    engine, checkpoint = trained
    with pytest.raises(ValueError, match="INT8_PTQ needs images to calibrate on: pass the data module"):
        engine.export(
            Pedenet(), "openvino", export_root=tmp_path, ckpt_path=checkpoint, compression_type=CompressionType.INT8_PTQ
        )
