# Copyright (C) 2026 The anomalib-pedenet authors
# SPDX-License-Identifier: Apache-2.0

"""Training through anomalib's Engine: its length, its logs, and the memory bank in every checkpoint."""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from anomalib.callbacks import ModelCheckpoint
from anomalib.data import Folder, MVTecAD
from anomalib.engine import Engine
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.loggers import CSVLogger
from PIL import Image
from torchvision.transforms.v2 import RandomHorizontalFlip

from anomalib_pedenet import Pedenet, PedenetModel
from anomalib_pedenet.training.label_free import draw_test_defects, drawn_defect_auroc
from anomalib_pedenet.training.step import TrainingStep
from tests.integration.conftest import write_dataset

SMALL = {
    "image_size": (144, 160),
    "scored_sizes": [32, 64],
    "stride": 16,
    "bank_stride": 16,
    "scorer": "exact",
    "bank_size": 100,
    "crops_per_step": 1,
    "patches_per_step": 64,
    "pairs_per_step": 64,
    "steps_per_image": 1,
    "train_precision": "float32",
}


class PoolRecorder(Pedenet):
    """Notes how many images each step's crops are drawn from."""

    def __init__(self, **options: Any) -> None:  # noqa: ANN401
        super().__init__(**options)
        self.pool_sizes: list[int] = []

    def _joint_loss(self, step: TrainingStep, images: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        self.pool_sizes.append(len(images))
        return super()._joint_loss(step, images)


def train(datamodule: MVTecAD, root: Path, model: Pedenet, *callbacks: Callback, **trainer: Any) -> Engine:  # noqa: ANN401
    engine = Engine(default_root_dir=root, callbacks=list(callbacks), enable_progress_bar=False, **trainer)
    engine.fit(model, datamodule=datamodule)
    return engine


def rebuilt_bank(path: Path, datamodule: MVTecAD) -> dict[str, torch.Tensor]:
    """Build the bank from a checkpoint's weights and the training images, by the torch model alone."""
    state = torch.load(path, weights_only=True)["state_dict"]
    model = PedenetModel(scored_sizes=(32, 64), stride=16, bank_size=100, defect_prediction=True).eval()
    model.load_state_dict({name.removeprefix("model."): value for name, value in state.items() if "model." in name})
    transform = Pedenet.configure_pre_processor((144, 160)).transform
    model.fit([transform(item.image)[None] for item in datamodule.train_data])
    return {f"model.{name}": value for name, value in model.state_dict().items() if name.endswith((".rows", ".mean"))}


def assert_bank_is_that_of_the_weights(path: Path, datamodule: MVTecAD) -> None:
    state = torch.load(path, weights_only=True)["state_dict"]
    assert bool(state["_is_fitted"])
    for name, expected in rebuilt_bank(path, datamodule).items():
        torch.testing.assert_close(state[name], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("trigger", [{"every_n_epochs": 1}, {"every_n_train_steps": 3}], ids=["epochs", "mid-epoch"])
def test_every_checkpoints_bank_is_that_of_its_weights(
    datamodule: MVTecAD,
    tmp_path: Path,
    trigger: dict[str, int],
) -> None:
    checkpoint = ModelCheckpoint(dirpath=tmp_path, filename="{epoch}-{step}", save_top_k=-1, save_last=True, **trigger)
    train(datamodule, tmp_path, Pedenet(**SMALL, learning_rate=1e-2, max_steps=15), checkpoint)
    paths = sorted(tmp_path.glob("*.ckpt"))
    assert len(paths) >= 3
    banks = []
    for path in paths:
        assert_bank_is_that_of_the_weights(path, datamodule)
        banks.append(torch.load(path, weights_only=True)["state_dict"]["model.scorers.64.rows"])
    assert not torch.equal(banks[0], banks[1])


def test_best_checkpoint_under_early_stopping(datamodule: MVTecAD, tmp_path: Path) -> None:
    best = ModelCheckpoint(dirpath=tmp_path, filename="best", monitor="train_loss", save_on_train_epoch_end=True)
    stop = EarlyStopping(monitor="train_loss", patience=1, mode="max", check_on_train_epoch_end=True)
    engine = train(datamodule, tmp_path, Pedenet(**SMALL, max_steps=100), best, stop)
    assert engine.trainer.global_step < 100
    assert_bank_is_that_of_the_weights(tmp_path / "best.ckpt", datamodule)


def test_training_without_validation_ends_with_a_bank(datamodule: MVTecAD, tmp_path: Path) -> None:
    model = Pedenet(**SMALL, max_steps=6)
    train(datamodule, tmp_path, model, limit_val_batches=0)
    assert model.model.is_fitted


def test_a_resumed_training_goes_on(datamodule: MVTecAD, tmp_path: Path) -> None:
    engine = train(datamodule, tmp_path, Pedenet(**SMALL, max_steps=6))
    model = Pedenet(**SMALL, max_steps=12)
    resumed = Engine(default_root_dir=tmp_path, enable_progress_bar=False)
    resumed.fit(model, datamodule=datamodule, ckpt_path=engine.best_model_path)
    assert resumed.trainer.global_step == 12
    assert_bank_is_that_of_the_weights(Path(resumed.best_model_path), datamodule)


def test_a_long_training_at_chance_is_shortened_and_stays_so_when_resumed(
    datamodule: MVTecAD, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    options = SMALL | {"scored_sizes": None, "max_steps": 24, "max_steps_at_chance": 9}
    model = Pedenet(**options)
    with caplog.at_level(logging.WARNING, logger="anomalib_pedenet"):
        # The checkpoint of the first epoch, after which it has been decided, is the last that is saved.
        engine = train(datamodule, tmp_path, model, ModelCheckpoint(tmp_path / "kept", save_top_k=-1))
    assert engine.trainer.global_step == 9
    assert "near chance after 6 steps: the training ends after 9 instead of 24" in caplog.text
    schedule = engine.trainer.lr_scheduler_configs[0].scheduler
    assert schedule.last_epoch == schedule.total_steps == 9  # so the rate fell to its end
    first = min((tmp_path / "kept").iterdir(), key=lambda path: path.stat().st_mtime)
    assert "step=6" in first.name
    resumed = Engine(default_root_dir=tmp_path, enable_progress_bar=False)
    resumed.fit(Pedenet(**options), datamodule=datamodule, ckpt_path=first)
    assert resumed.trainer.global_step == 9


def test_a_long_training_that_has_learned_keeps_its_length(tmp_path: Path) -> None:
    """On ramps of colour every patch tells its place, so that location prediction is right after a few steps."""
    ramps = np.stack(np.meshgrid(np.linspace(0, 255, 112), np.linspace(0, 255, 128), indexing="ij"), axis=-1)
    (tmp_path / "good").mkdir()
    for index in range(4):
        colors = np.concatenate([ramps, np.full((112, 128, 1), 100 + 10 * index)], axis=-1)
        Image.fromarray(colors.astype(np.uint8)).save(tmp_path / "good" / f"{index}.png")
    datamodule = Folder(
        "ramps", "good", tmp_path, train_batch_size=2, num_workers=0, test_split_mode="synthetic", test_split_ratio=0.5
    )
    options = {"patch_sizes": [32], "crop_size": 64, "color_shift": 0.0, "noise": 0.0, "learning_rate": 2e-3}
    limits = {"scored_sizes": None, "max_steps": 24, "max_steps_at_chance": 12}
    model = Pedenet(**SMALL | options | limits | {"image_size": (112, 128), "lambda_syn": 0.0})
    engine = train(datamodule, tmp_path, model, limit_val_batches=0)
    assert engine.trainer.global_step == 24


@pytest.mark.parametrize("options", [{"max_steps_at_chance": None}, {"scored_sizes": [32]}, {"lambda_lpn": 0.0}])
def test_other_trainings_have_their_length(datamodule: MVTecAD, tmp_path: Path, options: dict[str, Any]) -> None:
    """Without the limit, without mid-level patches, and without location prediction."""
    model = Pedenet(**SMALL | {"scored_sizes": None, "max_steps": 12, "max_steps_at_chance": 6} | options)
    assert train(datamodule, tmp_path, model).trainer.global_step == 12


def test_augmentations_do_not_enter_the_bank(dataset_root: Path, datamodule: MVTecAD, tmp_path: Path) -> None:
    augmented = MVTecAD(
        root=dataset_root,
        category="stripes",
        train_batch_size=3,
        num_workers=0,
        train_augmentations=RandomHorizontalFlip(p=1.0),
    )
    engine = train(augmented, tmp_path, Pedenet(**SMALL, max_steps=6))
    datamodule.setup("fit")
    assert_bank_is_that_of_the_weights(Path(engine.best_model_path), datamodule)
    assert augmented.train_data.augmentations is not None


@pytest.mark.parametrize(
    ("max_steps", "trainer", "expected"),
    [(10, {}, 10), (10, {"max_epochs": 1}, 6), (10, {"max_steps": 4}, 4), (3, {"max_epochs": 5}, 3)],
)
def test_the_smaller_limit_of_steps_stands(
    datamodule: MVTecAD,
    tmp_path: Path,
    max_steps: int,
    trainer: dict[str, int],
    expected: int,
) -> None:
    model = Pedenet(**SMALL, max_steps=max_steps)
    engine = train(datamodule, tmp_path, model, **trainer)
    assert engine.trainer.global_step == expected
    # The last validation has run, whichever limit it was: without it there were no threshold.
    assert torch.isfinite(model.post_processor.image_threshold)


@pytest.mark.parametrize(
    "options",
    [
        {"training_mode": "patchwise", "lambda_syn": 0.0},
        {"training_mode": "patchwise", "lambda_syn": 0.0, "lambda_den": 0.0, "lambda_svdd": 1e-3},
        {"lambda_svdd": 1e-3},
        {"patch_sizes": [64], "scored_sizes": None},
        {"patch_sizes": [32], "scored_sizes": None},
        {"density_loss": "paper", "covariance_type": "full"},
    ],
)
def test_other_ways_to_train(datamodule: MVTecAD, tmp_path: Path, options: dict[str, Any]) -> None:
    model = Pedenet(**{**SMALL, "lambda_den": 1e-4, **options}, max_steps=6, density_warmup=0.0)
    parts = ("embedding_network.", "density_networks.")
    before = {name: value.clone() for name, value in model.model.named_parameters() if name.startswith(parts)}
    train(datamodule, tmp_path, model)
    assert model.model.is_fitted
    assert any("density" in name for name in before) == (model.hparams.lambda_den > 0)
    assert not any(torch.equal(value, model.model.get_parameter(name)) for name, value in before.items())


def test_the_density_alone_teaches_its_networks(datamodule: MVTecAD, tmp_path: Path) -> None:
    options = {"lambda_den": 1e-4, "lambda_lpn": 0.0, "lambda_syn": 0.0, "lambda_var": 0.0}
    options |= {"density_warmup": 0.0, "max_steps": 6}
    model = Pedenet(**SMALL | options)
    networks = (*model.model.density_networks.parameters(), *model.model.embedding_network.parameters())
    before = [parameter.clone() for parameter in networks]
    train(datamodule, tmp_path, model)
    assert not any(torch.equal(*pair) for pair in zip(before, networks, strict=True))


@pytest.mark.parametrize("mode", ["dense", "patchwise"])
def test_compactness_draws_neighbouring_patches_together(datamodule: MVTecAD, tmp_path: Path, mode: str) -> None:
    """With a heavy weight the distance of nearly equal patches shrinks, which without it is what it happens to be."""
    distances = []
    few = {"patches_per_step": 2, "pairs_per_step": 8} if mode == "patchwise" else {}  # each is computed on its own
    for weight in (1e-9, 100.0):
        options = {"training_mode": mode, "lambda_syn": 0.0, "lambda_svdd": weight} | few
        engine = train(datamodule, tmp_path, Pedenet(**{**SMALL, **options}, max_steps=30))
        distances.append(float(engine.trainer.callback_metrics["loss_svdd_32"]))
    assert distances[1] < 0.5 * distances[0]


@pytest.mark.parametrize(("max_epochs", "epochs"), [(-1, 3), (2, 2), (1, 1)])
def test_a_training_is_three_epochs_unless_the_trainer_says_less(
    datamodule: MVTecAD,
    tmp_path: Path,
    max_epochs: int,
    epochs: int,
) -> None:
    model = Pedenet(**{**SMALL, "steps_per_image": None}, max_steps=35)  # 6 images: not a whole number of steps each
    engine = train(datamodule, tmp_path, model, max_epochs=max_epochs)
    assert engine.trainer.global_step == 35
    assert engine.trainer.current_epoch == epochs


def test_crops_come_from_all_images_decoded_so_far(datamodule: MVTecAD, tmp_path: Path) -> None:
    """The data module delivers batches of three of its six images."""
    model = PoolRecorder(**SMALL, max_steps=12)
    train(datamodule, tmp_path, model)
    assert model.pool_sizes == [3] * 3 + [6] * 9


def test_the_log_says_how_far_the_training_is(
    datamodule: MVTecAD,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.INFO, logger="anomalib_pedenet"):
        train(datamodule, tmp_path, Pedenet(**SMALL, max_steps=40))
    reports = [record.getMessage() for record in caplog.records if " s left" in record.getMessage()]
    assert len(reports) == 20
    assert reports[-1].startswith("Step 40 of 40, ")
    learned = [record.getMessage() for record in caplog.records if record.getMessage().startswith("Trained ")]
    assert [message.split(":")[0] for message in learned] == ["Trained 32-px patches", "Trained 64-px patches"]


@pytest.mark.parametrize("lambda_den", [0.0, 1e-4])
def test_every_term_is_logged(datamodule: MVTecAD, tmp_path: Path, lambda_den: float) -> None:
    model = Pedenet(**SMALL, max_steps=6, lambda_den=lambda_den)
    engine = train(datamodule, tmp_path, model, logger=CSVLogger(tmp_path))
    logged = set(engine.trainer.logged_metrics)
    names = ("loss_den", "loss_lpn", "loss_reg", "loss_var", "loss_syn", "lp_accuracy", "spread")
    assert {"train_loss"} | {f"{name}_{size}" for name in names for size in (32, 64)} <= logged
    shown = set(engine.trainer.progress_bar_metrics)
    assert {"lpn", "syn", "lp_acc", "spread", "step"} <= shown
    assert {"den", "reg"} & shown == ({"den", "reg"} if lambda_den > 0 else set())  # a 0 would tell nothing


def test_held_back_images_are_neither_trained_on_nor_in_the_bank(datamodule: MVTecAD, tmp_path: Path) -> None:
    options = {**SMALL, "scored_sizes": [64], "bank_size": 10_000}
    banks, largest_pools = [], []
    for holdout in (0.0, 0.34):
        model = PoolRecorder(**options, max_steps=12, holdout=holdout)
        train(datamodule, tmp_path / str(holdout), model)
        banks.append(len(model.model.scorers["64"].bank))
        largest_pools.append(max(model.pool_sizes))
    assert banks[1] * 6 == banks[0] * 4  # two of six images are held back
    assert largest_pools == [6, 4]


def test_the_best_checkpoint_and_early_stopping_by_drawn_defects(
    datamodule: MVTecAD,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    best = ModelCheckpoint(dirpath=tmp_path, filename="best", monitor="drawn_pixel_AUROC", mode="max")
    stop = EarlyStopping(
        monitor="drawn_pixel_AUROC", mode="max", patience=1, min_delta=1.0
    )  # nothing is an improvement
    with caplog.at_level(logging.INFO, logger="anomalib_pedenet"):
        engine = train(datamodule, tmp_path, Pedenet(**SMALL, max_steps=100, holdout=0.34), best, stop)
    assert engine.trainer.current_epoch == 2
    assert 0 <= best.best_model_score <= 1
    said = [record.getMessage() for record in caplog.records if "held back, after" in record.getMessage()]
    assert len(said) == 2
    assert f"pixels {max(float(message.split('pixels ')[1][:6]) for message in said)}" in " ".join(said)
    assert_figures_come_back(tmp_path / "best.ckpt", datamodule, float(best.best_model_score))


def assert_figures_come_back(path: Path, datamodule: MVTecAD, expected: float) -> None:
    """Compute the label-free figure from a checkpoint and the images, without the Lightning module's hooks."""
    model = Pedenet.load_from_checkpoint(path).eval()
    transform = model.pre_processor.transform
    normal = torch.stack([transform(datamodule.train_data[index].image) for index in (2, 3)])
    drawn = draw_test_defects(model.model.standardize(normal))
    images = drawn.images * model.model.input_std + model.model.input_mean
    pixel, _ = drawn_defect_auroc(model.model, normal, drawn._replace(images=images))
    assert pixel == pytest.approx(expected, abs=1e-4)


def test_too_few_images_to_hold_some_back_are_refused(tmp_path: Path) -> None:
    datamodule = MVTecAD(root=write_dataset(tmp_path / "data", num_train=2), category="stripes", num_workers=0)
    with pytest.raises(ValueError, match=r"2 normal image.*too few to hold 1 back .*set holdout to 0"):
        train(datamodule, tmp_path, Pedenet(**SMALL, max_steps=4, holdout=0.5))


def test_collapse_is_said_once_with_its_remedy(
    datamodule: MVTecAD,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    # Planted in the weights: whether a loss collapses within a few steps depends on the processor's rounding.
    model = Pedenet(**SMALL, max_steps=8, learning_rate=1e-6)
    for encoder in (model.model.embedding_network.small_encoder, model.model.embedding_network.large_encoder):
        torch.nn.init.zeros_(encoder[-2].weight)
    with caplog.at_level(logging.WARNING, logger="anomalib_pedenet"):
        train(datamodule, tmp_path, model, limit_val_batches=0)
    (warning,) = [record.getMessage() for record in caplog.records if "collapsed" in record.getMessage()]
    assert "Raise lambda_var" in warning


def test_same_seed_same_weights(datamodule: MVTecAD, tmp_path: Path) -> None:
    models = []
    for run in range(2):
        torch.manual_seed(7)
        model = Pedenet(**SMALL, max_steps=6)
        train(datamodule, tmp_path / str(run), model)
        models.append(model.model.state_dict())
    torch.testing.assert_close(models[0], models[1], rtol=0, atol=0)
