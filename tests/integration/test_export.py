# Copyright (C) 2026 The anomalib-pedenet authors
# SPDX-License-Identifier: Apache-2.0

"""Exports through anomalib's Engine and both inferencers give what the checkpoint gives."""

import logging
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import openvino
import pytest
import torch
from anomalib.data import InferenceBatch, MVTecAD, PredictDataset
from anomalib.data.utils import read_image
from anomalib.data.utils.tiler import Tiler
from anomalib.deploy import CompressionType, ExportType, OpenVINOInferencer, TorchInferencer
from anomalib.engine import Engine
from anomalib.metrics import AUPRO, Evaluator
from anomalib.pre_processing import PreProcessor
from PIL import Image
from torchvision.transforms.v2 import Resize

from anomalib_pedenet import Pedenet
from anomalib_pedenet.host.export import OPSETS
from anomalib_pedenet.kinds import SURFACE
from anomalib_pedenet.networks import SMALL_CHANNELS


@pytest.fixture(scope="module")
def trained(dataset_root: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Engine, Path]:
    root = tmp_path_factory.mktemp("results")
    datamodule = MVTecAD(root=dataset_root, category="stripes", train_batch_size=3, num_workers=0)
    # With such a weight of the position, of nearly aligned parts, squares in the memory bank are hundreds: the hard
    # case of low precision.
    model = Pedenet(image_size=(144, 160), max_steps=6, steps_per_image=1, crops_per_step=1, position_weight=31.0)
    engine = Engine(default_root_dir=root, enable_progress_bar=False)
    engine.fit(model, datamodule=datamodule)
    return engine, Path(engine.best_model_path)


@pytest.fixture(scope="module")
def exported(trained: tuple[Engine, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[ExportType, Path]:
    """Exports by their type, for images of any size."""
    engine, checkpoint = trained
    root = tmp_path_factory.mktemp("exported")
    return {kind: engine.export(Pedenet(), kind, export_root=root, ckpt_path=checkpoint) for kind in ExportType}


@pytest.fixture(scope="module")
def images(dataset_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of images larger and smaller than the training's, upright and lying, normal and not, of fine detail."""
    root = tmp_path_factory.mktemp("images")
    stripes = Image.open(dataset_root / "stripes/test/square/001.png")
    generator = np.random.default_rng(0)
    for width, height in ((900, 900), (300, 300), (511, 97), (97, 511), (80, 100), (160, 144)):
        pixels = np.asarray(stripes.resize((width, height))) + generator.normal(0, 40, (height, width, 3))
        if width <= height:
            pixels[: height // 2, : width // 2] = 255 * generator.integers(0, 2, 3)
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(root / f"{width}x{height}.png")
    return root


def _say(output: Mapping[str, np.ndarray] | InferenceBatch) -> tuple[float, bool, np.ndarray]:
    """Return score, label and anomaly map of one image."""
    output = output if isinstance(output, Mapping) else output._asdict()
    values = (np.asarray(output[name]).squeeze() for name in ("pred_score", "pred_label", "anomaly_map"))
    score, label, anomaly_map = values
    return float(score), bool(label), anomaly_map


def test_exports_score_images_of_all_sizes_as_the_checkpoint(
    trained: tuple[Engine, Path], exported: dict[ExportType, Path], images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checkpoint, through the engine, resizes as the training did whose thresholds it has."""
    monkeypatch.setenv("TRUST_REMOTE_CODE", "1")
    engine, checkpoint = trained
    model = Pedenet.load_from_checkpoint(checkpoint).eval()
    pickled = TorchInferencer(exported[ExportType.TORCH], device="cpu")
    session = onnxruntime.InferenceSession(exported[ExportType.ONNX])
    # Without it OpenVINO takes bfloat16 on processors that have it.
    compiled = openvino.compile_model(exported[ExportType.OPENVINO], "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    names = [output.name for output in session.get_outputs()]
    batches = engine.predict(model, dataset=PredictDataset(images), ckpt_path=checkpoint)
    assert len(batches) == 6
    for batch in batches:
        expected = _say({name: getattr(batch, name) for name in ("pred_score", "pred_label", "anomaly_map")})
        image = read_image(batch.image_path[0], as_tensor=True)[None]
        answers = {
            "model(image)": model(image),
            "torch": pickled.model(image),
            "onnx": dict(zip(names, session.run(None, {"input": image.numpy()}), strict=True)),
            "openvino": {key.any_name: value for key, value in compiled(image.numpy()).items()},
        }
        for kind, answer in answers.items():
            score, label, anomaly_map = _say(answer)
            assert score == pytest.approx(expected[0], abs=1e-3), (kind, batch.image_path)
            assert label == expected[1], (kind, batch.image_path)
            np.testing.assert_allclose(anomaly_map, expected[2], atol=1e-3, err_msg=f"{kind}, {batch.image_path}")


def test_inferencers_equal_the_checkpoint(
    trained: tuple[Engine, Path],
    exported: dict[ExportType, Path],
    images: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TRUST_REMOTE_CODE", "1")
    monkeypatch.chdir(tmp_path)  # OpenVINO's inferencer keeps a cache there
    model = Pedenet.load_from_checkpoint(trained[1]).eval()
    config = {"INFERENCE_PRECISION_HINT": "f32"}
    inferencers = [
        TorchInferencer(exported[ExportType.TORCH], device="cpu"),
        OpenVINOInferencer(exported[ExportType.ONNX], config=config),
        OpenVINOInferencer(exported[ExportType.OPENVINO], config=config),
    ]
    for path in sorted(images.glob("*.png")):
        expected = _say(model(read_image(path, as_tensor=True)[None]))
        for inferencer in inferencers:
            prediction = inferencer.predict(path)
            score, label, anomaly_map = _say(vars(prediction))
            assert (score, label) == (pytest.approx(expected[0], abs=1e-3), expected[1])
            np.testing.assert_allclose(anomaly_map, expected[2], atol=1e-3)


def test_a_pickled_model_is_in_evaluation_mode(trained: tuple[Engine, Path], tmp_path: Path) -> None:
    model = Pedenet.load_from_checkpoint(trained[1]).train()
    path = model.to_torch(tmp_path)
    assert not torch.load(path, weights_only=False)["model"].training


def test_onnx_is_one_file_that_the_most_runtimes_read(exported: dict[ExportType, Path]) -> None:
    path = exported[ExportType.ONNX]
    assert list(path.parent.iterdir()) == [path]
    (version,) = (opset.version for opset in onnx.load(path).opset_import if opset.domain == "")
    assert version == OPSETS.start


def test_onnx_is_written_as_asked_for(
    trained: tuple[Engine, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = Pedenet.load_from_checkpoint(trained[1])
    with caplog.at_level(logging.INFO):
        path = model.to_onnx(tmp_path, opset_version=OPSETS.stop - 1, external_data=True, verbose=False)
    assert not any(record.name.startswith(("onnxscript", "onnx_ir")) for record in caplog.records)
    assert path.with_name(path.name + ".data").exists()
    image = torch.rand(1, 3, 200, 300)
    expected = model(image)
    score, *_ = onnxruntime.InferenceSession(path).run(["pred_score"], {"input": image.numpy()})
    np.testing.assert_allclose(score, expected.pred_score, atol=1e-4)
    compiled = openvino.compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    np.testing.assert_allclose(compiled(image.numpy())["pred_score"], expected.pred_score, atol=1e-4)


@pytest.mark.parametrize("opset", [14, 17, 26, 18.0, "18", True, None])
def test_other_opsets_are_refused_before_anything_is_written(
    trained: tuple[Engine, Path], tmp_path: Path, opset: object
) -> None:
    model = Pedenet.load_from_checkpoint(trained[1])
    message = re.escape(f"opset_version must be an integer from 18 to 25, got {opset!r}: leave it out for 18, ")
    with pytest.raises(ValueError, match=message):
        model.to_onnx(tmp_path, opset_version=opset)
    with pytest.raises(ValueError, match=message):
        model.to_openvino(tmp_path, onnx_kwargs={"opset_version": opset})
    assert not list(tmp_path.iterdir())


@pytest.fixture
def tiled() -> Pedenet:
    """A model that scores overlapping tiles of images that they do not fill."""
    model = Pedenet(image_size=(144, 160), position_weight=0.0, bank_size=50).eval()
    model.model.tiler = Tiler(tile_size=(96, 64), stride=(64, 56))
    normal = torch.rand(4, 3, 144, 160)
    model.model.calibrate(normal)
    model.model.fit([normal])
    return model


@pytest.fixture
def left_half() -> Pedenet:
    """A model that looks at the left half of images."""
    model = Pedenet(image_size=(144, 160), bank_size=50, scorer="exact").eval()
    visible = torch.zeros(144, 160, dtype=torch.bool)
    visible[:, :80] = True
    model.model.region.set(visible)
    model.model.fit([torch.rand(1, 3, 144, 160)])
    return model


@pytest.fixture
def left_half_of_a_surface() -> Pedenet:
    """A model that looks at the left half of images, and takes each one's own mean away."""
    model = Pedenet(image_size=(144, 160)).eval()
    visible = torch.zeros(144, 160, dtype=torch.bool)
    visible[:, :80] = True
    model.model.region.set(visible)
    normal = torch.rand(4, 3, 144, 160)
    model.model.fit_standardization(normal)
    model.model.calibrate(normal)
    model.model.fit([normal])
    assert model.model.kind is SURFACE
    return model


@pytest.mark.parametrize("kind", ["tiled", "left_half", "left_half_of_a_surface"])
def test_exports_equal_the_model(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRUST_REMOTE_CODE", "1")
    model: Pedenet = request.getfixturevalue(kind)
    images = torch.rand(2, 3, 200, 300)
    expected = model(images)
    path = model.to_onnx(tmp_path, verbose=False)
    session = onnxruntime.InferenceSession(path)
    compiled = openvino.compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    pickled = TorchInferencer(model.to_torch(tmp_path), device="cpu").model
    assert (pickled.model.tiler is not None) == (kind == "tiled")
    results = compiled(images.numpy())
    for name in ("pred_score", "anomaly_map"):
        whole = getattr(expected, name)
        np.testing.assert_allclose(session.run([name], {"input": images.numpy()})[0], whole, atol=1e-4)
        np.testing.assert_allclose(results[name], whole, atol=1e-4)
        np.testing.assert_allclose(getattr(pickled(images), name), whole)
    torch.testing.assert_close(model(images).anomaly_map, expected.anomaly_map)  # a tiler still has its own sizes


def test_tiles_of_images_of_unknown_size_are_not_exported(tiled: Pedenet, tmp_path: Path) -> None:
    message = "must know their size: pass input_size, or use a pre_processor that resizes to a height and a width"
    for pre_processor in (None, PreProcessor(Resize(144))):
        tiled.pre_processor = pre_processor
        with pytest.raises(ValueError, match=message):
            tiled.to_onnx(tmp_path)
    assert not list(tmp_path.iterdir())


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
        read_image(dataset_root / f"stripes/test/{name}.png", as_tensor=True)[None].numpy()
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


@pytest.mark.parametrize("name", list(CompressionType))
def test_no_large_constant_is_kept_in_32_bits_by_a_compressed_model(
    openvino_predictions: dict[str, tuple[openvino.Model, list[dict[str, np.ndarray]]]], name: str
) -> None:
    def largest_in_32_bits(kind: str) -> int:
        operations = openvino_predictions[kind][0].get_ordered_ops()
        constants = [operation for operation in operations if operation.get_type_name() == "Constant"]
        sizes = [constant.get_byte_size() for constant in constants if constant.get_element_type() == openvino.Type.f32]
        return max(sizes, default=0)

    assert largest_in_32_bits("none") > 10_000
    # NNCF keeps the scale of each filter, of as many layers as are scored, which differ from training to training.
    assert largest_in_32_bits(name) <= 4 * max(SMALL_CHANNELS["small"])


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
    inner = [("Convolution", [channels, 3]) for channels in (16, 32, 64, 64)]
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
    with pytest.raises(ValueError, match="Datamodule must be provided for INT8_PTQ, which needs images"):
        engine.export(
            Pedenet(), "openvino", export_root=tmp_path, ckpt_path=checkpoint, compression_type=CompressionType.INT8_PTQ
        )
