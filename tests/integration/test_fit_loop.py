# Copyright (C) 2026 The anomalib-pedenet authors
# SPDX-License-Identifier: Apache-2.0

"""How trainings end, and begin after another one."""

import io
import logging
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from anomalib.callbacks import ModelCheckpoint
from anomalib.data import MVTecAD
from anomalib.engine import Engine
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, Timer
from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException

from anomalib_pedenet import Pedenet
from tests.integration import trainings
from tests.integration.conftest import write_dataset

SMALL: dict[str, Any] = trainings.SMALL | {"steps_per_image": None, "seed": 0}


class StopAt(Callback):
    """Stops a training after some optimizer steps, in the midst of a batch."""

    def __init__(self, step: int, how: str) -> None:
        self.step = step
        self.how = how

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        del pl_module, optimizer
        if trainer.global_step != self.step:
            return
        if self.how == "signal":
            trainer._signal_connector.received_sigterm = True  # as Lightning's handler of SIGTERM does
        else:
            trainer.should_stop = True


def engine_in(root: Path, *callbacks: Callback, **trainer: Any) -> Engine:  # noqa: ANN401
    return Engine(default_root_dir=root, callbacks=list(callbacks), enable_progress_bar=False, **trainer)


def assert_the_last_state_is_saved(engine: Engine, model: Pedenet) -> None:
    saved = torch.load(engine.best_model_path, weights_only=True)
    assert saved["global_step"] == engine.trainer.global_step
    name = "post_processor._image_threshold"
    assert torch.isfinite(saved["state_dict"][name])
    assert saved["state_dict"][name].equal(model.post_processor.image_threshold)


# ------------------------------------------------------------------------------------------------------------------ end


def test_should_stop_is_noticed_after_a_step(datamodule: MVTecAD, tmp_path: Path) -> None:
    engine = engine_in(tmp_path, StopAt(7, "should_stop"))
    model = Pedenet(**SMALL, max_steps=400)
    engine.fit(model, datamodule=datamodule)
    assert engine.trainer.global_step == 8
    assert_the_last_state_is_saved(engine, model)


@pytest.mark.parametrize("options", [{"min_steps": 20}, {"min_epochs": 2}])
def test_should_stop_waits_for_the_trainers_minimum(
    datamodule: MVTecAD, tmp_path: Path, options: dict[str, int]
) -> None:
    engine = engine_in(tmp_path, StopAt(7, "should_stop"), **options)
    model = Pedenet(**SMALL, max_steps=60)
    engine.fit(model, datamodule=datamodule)
    assert engine.trainer.global_step >= 20
    assert_the_last_state_is_saved(engine, model)


def test_max_time_is_noticed_after_a_step(datamodule: MVTecAD, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock is a count of steps, so that the test does not depend on the machine."""
    engine = engine_in(tmp_path, max_time=timedelta(seconds=10))
    monkeypatch.setattr(Timer, "time_elapsed", lambda *_: float(engine.trainer.global_step))
    model = Pedenet(**SMALL, max_steps=400)
    engine.fit(model, datamodule=datamodule)
    assert engine.trainer.global_step == 11
    assert_the_last_state_is_saved(engine, model)


def test_a_signal_is_noticed_after_a_step(datamodule: MVTecAD, tmp_path: Path) -> None:
    engine = engine_in(tmp_path, StopAt(7, "signal"))
    with pytest.raises(SIGTERMException):
        engine.fit(Pedenet(**SMALL, max_steps=400), datamodule=datamodule)
    assert engine.trainer.global_step == 8


class StopAfterEpoch(Callback):
    """Stops a training at the end of its first epoch, whether that was validated or not."""

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        del pl_module
        trainer.should_stop = True


@pytest.mark.parametrize("at_epoch_end", [None, True], ids=["saved after validation", "saved before"])
def test_a_training_that_is_stopped_between_validations_is_validated(
    datamodule: MVTecAD, tmp_path: Path, at_epoch_end: bool | None
) -> None:
    checkpoint = ModelCheckpoint(tmp_path / "kept", save_on_train_epoch_end=at_epoch_end)
    engine = engine_in(tmp_path, StopAfterEpoch(), checkpoint, check_val_every_n_epoch=3)
    model = Pedenet(**SMALL, max_steps=60)
    engine.fit(model, datamodule=datamodule)
    assert engine.trainer.global_step == 24
    assert_the_last_state_is_saved(engine, model)


# ---------------------------------------------------------------------------------------------------------------- again


def test_one_engine_for_two_trainings(datamodule: MVTecAD, tmp_path: Path) -> None:
    other = MVTecAD(
        root=write_dataset(tmp_path / "other", num_train=3), category="stripes", train_batch_size=3, num_workers=0
    )
    engine = engine_in(tmp_path)
    first, second = Pedenet(**SMALL, max_steps=6), Pedenet(**SMALL, max_steps=9)
    engine.fit(first, datamodule=datamodule)
    first_path = Path(engine.best_model_path)
    content = first_path.read_bytes()
    engine.fit(second, datamodule=other)
    assert engine.trainer.global_step == 9
    assert first_path.read_bytes() == content  # neither deleted nor overwritten
    assert engine.best_model_path != str(first_path)
    assert_the_last_state_is_saved(engine, second)
    alone = Pedenet(**SMALL, max_steps=9)
    engine_in(tmp_path).fit(alone, datamodule=other)
    for name, value in alone.state_dict().items():
        torch.testing.assert_close(second.state_dict()[name], value, rtol=0, atol=0, msg=name)


def test_an_engine_whose_callbacks_remember_a_training_is_refused(datamodule: MVTecAD, tmp_path: Path) -> None:
    engine = engine_in(tmp_path, EarlyStopping("train_loss", check_on_train_epoch_end=True))
    engine.fit(Pedenet(**SMALL, max_steps=6), datamodule=datamodule)
    with pytest.raises(RuntimeError, match=r"trained before, and its callback EarlyStopping .*make a new one for each"):
        engine.fit(Pedenet(**SMALL, max_steps=6), datamodule=datamodule)


def test_a_second_training_of_a_model_leaves_nothing_of_the_first(datamodule: MVTecAD, tmp_path: Path) -> None:
    """On other data, and without a validation: thresholds, origin, images held back and a shortened length are gone."""
    model = Pedenet(**SMALL | {"scored_sizes": [16, 32]}, max_steps=24, max_steps_at_chance=9, holdout=0.34)
    engine_in(tmp_path / "first").fit(model, datamodule=datamodule)
    assert model._schedule.shortened_to == 9
    assert model._origin["data"]["root"] == str(datamodule.root)
    first_threshold = model.post_processor.image_threshold.clone()
    assert torch.isfinite(first_threshold)
    assert torch.isfinite(model.post_processor.image_min)
    other = MVTecAD(root=write_dataset(tmp_path / "other", num_train=4), category="stripes", num_workers=0)
    model.hparams.update(max_steps_at_chance=None, holdout=0.0)
    engine = engine_in(tmp_path / "second", limit_val_batches=0)
    engine.fit(model, datamodule=other)
    assert engine.trainer.global_step == 24
    assert model._origin["data"]["root"] == str(tmp_path / "other")
    assert model._held_back is None
    assert torch.isnan(model.post_processor.image_min)  # of a validation
    assert model.post_processor.image_threshold != first_threshold  # by the other training images
    saved = torch.load(engine.best_model_path, weights_only=True)
    assert saved["pedenet_shortened_to"] is None
    assert saved["pedenet_origin"]["data"]["root"] == str(tmp_path / "other")


def test_a_trained_model_keeps_no_training_images(datamodule: MVTecAD, tmp_path: Path) -> None:
    """A pickled export holds all that the model holds: it is as large as that of the loaded checkpoint."""
    model = Pedenet(**SMALL, max_steps=6, holdout=0.34)
    assert model._held_back is None
    engine = engine_in(tmp_path)
    engine.fit(model, datamodule=datamodule)
    sizes = []
    for each in (model, Pedenet.load_from_checkpoint(engine.best_model_path)):
        buffer = io.BytesIO()
        torch.save(each, buffer)
        sizes.append(buffer.tell())
    assert abs(sizes[0] - sizes[1]) < 0.02 * sizes[1]


# ------------------------------------------------------------------------------------------------------ the host's ways


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"precision": "bf16-true"}, RuntimeError, "precision=bf16-true .* leave it out, and set train_precision"),
        ({"precision": "16-true"}, RuntimeError, "precision=16-true .* leave it out"),
        ({"gradient_clip_val": 1.0}, MisconfigurationException, r"Remove `Trainer\(gradient_clip_val=1.0\)`"),
        (
            {"accumulate_grad_batches": 2},
            MisconfigurationException,
            r"Remove `Trainer\(accumulate_grad_batches=2\)`",
        ),
    ],
)
def test_trainer_options_that_cannot_be_are_refused_by_name(
    datamodule: MVTecAD, tmp_path: Path, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        engine_in(tmp_path, **options).fit(Pedenet(**SMALL, max_steps=6), datamodule=datamodule)
    assert not list(tmp_path.rglob("*.ckpt"))


@pytest.mark.parametrize("options", [{"precision": "bf16-mixed"}, {"fast_dev_run": True}, {"barebones": True}], ids=str)
def test_trainer_options_that_can_be(datamodule: MVTecAD, tmp_path: Path, options: dict[str, Any]) -> None:
    model = Pedenet(**SMALL, max_steps=6)
    engine_in(tmp_path, logger=False, **options).fit(model, datamodule=datamodule)
    assert model.model.is_fitted


@pytest.mark.parametrize("num_train", [1, 4])
def test_images_of_one_colour_are_trained_on_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, num_train: int
) -> None:
    """What anomalib's own integration tests of models do: dummy images that show nothing, one of them all there is."""
    from PIL import Image

    root = write_dataset(tmp_path / "data", num_train=num_train)
    for path in root.rglob("train/good/*.png"):
        Image.new("RGB", (160, 144), (90, 90, 90)).save(path)
    datamodule = MVTecAD(root=root, category="stripes", num_workers=0)
    model = Pedenet(**SMALL | {"stride": 8}, max_steps=300)
    engine = engine_in(tmp_path, max_epochs=1)
    with caplog.at_level(logging.WARNING, logger="anomalib_pedenet"):
        engine.fit(model, datamodule=datamodule)
    assert "is of one colour, so that there is nothing to learn, and the training ends" in caplog.text
    assert engine.trainer.global_step == 1
    assert ("what varies between good parts cannot be learned" in caplog.text) == (num_train == 1)
    (metrics,) = engine.test(model, datamodule=datamodule, ckpt_path=engine.best_model_path, verbose=False)
    assert all(0 <= value <= 1 for value in metrics.values())
    for batch in engine.predict(model, data_path=root / "stripes/train/good"):
        assert torch.isfinite(batch.anomaly_map).all()
        assert torch.isfinite(batch.pred_score).all()
