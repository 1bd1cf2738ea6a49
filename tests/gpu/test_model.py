# Copyright (C) 2026 The anomalib-pedenet authors
# SPDX-License-Identifier: Apache-2.0

"""A model on a CUDA device trains, and does what it does on a CPU."""

from pathlib import Path
from typing import Any

import pytest
import torch
from anomalib.data import MVTecAD
from anomalib.deploy import ExportType, TorchInferencer
from anomalib.engine import Engine
from torchvision.io import read_image

from anomalib_pedenet import Pedenet

DEVICE = "cuda"
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

SMALL: dict[str, Any] = {"image_size": (144, 160), "max_steps": 6, "steps_per_image": 1, "crops_per_step": 1}


_AVERAGED = "embedding_network."
"""The network that keeps running averages."""


@pytest.fixture(autouse=True)
def _without_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Convolve in float32, as a CPU does: by default cuDNN rounds their inputs to 10 bits."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def load(checkpoint: Path, **arguments: Any) -> Pedenet:  # noqa: ANN401
    """Load a model onto the CPU: by default it lies where it was saved from."""
    return Pedenet.load_from_checkpoint(checkpoint, map_location="cpu", **arguments).eval()


def datamodule(root: Path) -> MVTecAD:
    return MVTecAD(root=root, category="stripes", train_batch_size=3, eval_batch_size=2, num_workers=0)


def engine(folder: Path, accelerator: str) -> Engine:
    return Engine(default_root_dir=folder, accelerator=accelerator, devices=1, enable_progress_bar=False)


@pytest.fixture(scope="module")
def checkpoint(dataset_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a training on the GPU."""
    folder = tmp_path_factory.mktemp("trained")
    trained = engine(folder, DEVICE)
    trained.fit(Pedenet(**SMALL), datamodule=datamodule(dataset_root))
    return Path(trained.best_model_path)


@pytest.mark.parametrize("lambda_den", [0.0, 1e-4])
def test_a_recorded_step_is_that_of_single_launches(
    lambda_den: float, dataset_root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The same crops, losses and running averages, so that recording itself leaves no trace."""
    options = SMALL | {"seed": 0, "train_precision": "float32", "density_warmup": 0.0, "max_steps": 2}
    options |= {"lambda_den": lambda_den}
    losses, averages = [], []
    for cuda_graph in (True, False):
        with caplog.at_level("INFO", "anomalib_pedenet"):
            trained = engine(tmp_path / str(cuda_graph), DEVICE)
            trained.fit(Pedenet(**options, cuda_graph=cuda_graph), datamodule=datamodule(dataset_root))
        assert ("recorded as a CUDA graph" in caplog.text) == cuda_graph
        caplog.clear()
        metrics = trained.trainer.callback_metrics
        losses.append({name: value.item() for name, value in metrics.items() if name.startswith(("loss_", "train_"))})
        averages.append({n: b.float() for n, b in trained.model.model.named_buffers() if n.startswith(_AVERAGED)})
    assert losses[0] == pytest.approx(losses[1], rel=2e-3, abs=1e-5)
    for name, average in averages[0].items():
        torch.testing.assert_close(average, averages[1][name], rtol=2e-3, atol=1e-3)


def test_steps_that_cannot_be_recorded_are_launched_one_by_one(
    dataset_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_args: object, **_kwargs: object) -> None:
        msg = "operation not permitted when stream is capturing"
        raise RuntimeError(msg)

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", fail)
    trained = engine(tmp_path, DEVICE)
    with caplog.at_level("WARNING", "anomalib_pedenet"):
        trained.fit(Pedenet(**SMALL), datamodule=datamodule(dataset_root))
    assert "could not be recorded" in caplog.text
    assert trained.trainer.global_step == SMALL["max_steps"]


def test_a_training_ends_with_a_bank_and_finite_scores(checkpoint: Path, dataset_root: Path) -> None:
    model = load(checkpoint)
    assert model.model.is_fitted
    prediction = model(read_image(str(dataset_root / "stripes/test/square/000.png"))[None] / 255)
    assert prediction.anomaly_map.isfinite().all()
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_metrics_are_those_of_a_cpu(checkpoint: Path, dataset_root: Path, tmp_path: Path) -> None:
    metrics = {}
    for accelerator in (DEVICE, "cpu"):
        (metrics[accelerator],) = engine(tmp_path / accelerator, accelerator).test(
            Pedenet(**SMALL), datamodule=datamodule(dataset_root), ckpt_path=checkpoint, verbose=False
        )
    # The threshold is the score of an image, which rounding can carry to its other side, and F1 with it.
    for name in ("pixel_AUROC", "image_AUROC"):
        assert metrics[DEVICE][name] == pytest.approx(metrics["cpu"][name], abs=2e-3)


def test_a_bank_is_that_of_a_cpu(checkpoint: Path, dataset_root: Path) -> None:
    """Of the same network, in float32: the same rows are chosen, and they are alike."""
    paths = sorted(dataset_root.glob("stripes/train/good/*.png"))
    images = torch.stack([read_image(str(path)) for path in paths]) / 255
    banks = []
    for device in (DEVICE, "cpu"):
        model = load(checkpoint, bank_size=200, coreset="uniform")
        network = model.model.to(device).float()
        with torch.no_grad():
            prepared = model.pre_processor.transform(images).to(device)
            grid = network.embedding_network.embed_dense(network.standardize(prepared), 8, [32])[32]
        scorer = network.scorers["32"]
        scorer.fit([network.position_encodings["32"](grid, images.shape[-2:], 8).permute(0, 2, 3, 1)])
        banks.append(scorer.rows.cpu() + torch.nn.functional.pad(scorer.mean.cpu(), (0, 1)))
    torch.testing.assert_close(*banks, rtol=1e-3, atol=1e-3)


def test_an_export_of_the_gpu_gives_on_it_what_the_checkpoint_gives(
    checkpoint: Path, dataset_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRUST_REMOTE_CODE", "1")
    path = engine(tmp_path, DEVICE).export(Pedenet(), ExportType.TORCH, export_root=tmp_path, ckpt_path=checkpoint)
    image = dataset_root / "stripes/test/square/001.png"
    prediction = TorchInferencer(path, device=DEVICE).predict(image)
    expected = load(checkpoint)(read_image(str(image))[None] / 255)
    assert prediction.pred_score.item() == pytest.approx(expected.pred_score.item(), abs=2e-3)
    torch.testing.assert_close(
        prediction.anomaly_map.squeeze().cpu(), expected.anomaly_map.squeeze().cpu(), rtol=0, atol=2e-2
    )
