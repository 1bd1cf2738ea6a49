# Copyright (C) 2026 The anomalib-pedenet authors
# SPDX-License-Identifier: Apache-2.0

"""Trainings that go wrong: a step that cannot be made changes nothing, and what is wrong is said in one sentence."""

import copy
import logging
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from anomalib.data import MVTecAD
from anomalib.engine import Engine

from anomalib_pedenet import Pedenet
from anomalib_pedenet.training.step import TrainingStep
from tests.integration.trainings import SMALL


class Poisoned(Pedenet):
    """Sees images that overflow in some of its steps, and notes everything that a step may change before each."""

    def __init__(self, poisoned: set[int], **options: Any) -> None:  # noqa: ANN401
        super().__init__(**options)
        self.poisoned = poisoned
        self.num_losses = 0
        self.before: list[dict[str, Any]] = []

    def snapshot(self) -> dict[str, Any]:
        return copy.deepcopy(
            {"state": self.model.state_dict(), "optimizer": self.optimizers().optimizer.state_dict()["state"]}
        )

    def _joint_loss(self, step: TrainingStep, images: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        self.before.append(self.snapshot())
        if self.num_losses in self.poisoned:
            images = torch.full_like(images, 60_000)  # in float16; the convolutions' activations then overflow
            for parameter in self.model.embedding_network.small_encoder[0].parameters():
                parameter.data *= 1e34
        loss, metrics = super()._joint_loss(step, images)
        if self.num_losses in self.poisoned:
            for name, parameter in self.model.embedding_network.small_encoder[0].named_parameters():
                key = f"embedding_network.small_encoder.0.{name}"
                parameter.data.copy_(self.before[-1]["state"][key])
        self.num_losses += 1
        return loss, metrics


def fit(model: Pedenet, datamodule: MVTecAD, root: Path, **trainer: Any) -> Engine:  # noqa: ANN401
    engine = Engine(default_root_dir=root, enable_progress_bar=False, accelerator="cpu", **trainer)
    engine.fit(model, datamodule=datamodule)
    return engine


def equal(left: Any, right: Any) -> bool:  # noqa: ANN401
    if isinstance(left, torch.Tensor):
        return left.numpy().tobytes() == right.numpy().tobytes()
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(equal(left[name], right[name]) for name in left)
    return left == right


def test_a_step_that_is_not_finite_changes_nothing(
    datamodule: MVTecAD, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = Poisoned({2, 3, 7}, **SMALL, max_steps=12)
    with caplog.at_level(logging.WARNING, logger="anomalib_pedenet"):
        engine = fit(model, datamodule, tmp_path)
    for step, (before, after) in enumerate(pairwise(model.before)):
        assert equal(before, after) == (step in model.poisoned), step
    assert engine.trainer.logged_metrics["skipped_steps"] == 1  # in the second of the two epochs of 6 steps
    said = [record.getMessage() for record in caplog.records if "were skipped" in record.getMessage()]
    assert said == ["1 of the last 3 steps were skipped, since the loss or its gradients were not finite."] * 3
    assert all(bool(torch.isfinite(parameter).all()) for parameter in model.parameters())


def test_the_schedule_counts_the_steps_that_were_made(datamodule: MVTecAD, tmp_path: Path) -> None:
    rates = []
    for poisoned in (set(), {2, 3, 7}):
        engine = fit(Poisoned(poisoned, **SMALL, max_steps=12), datamodule, tmp_path / str(len(poisoned)))
        schedule = engine.trainer.lr_scheduler_configs[0].scheduler
        rates.append((schedule.last_epoch, schedule.optimizer.param_groups[0]["lr"]))
    assert rates[0][0] == 12
    assert rates[1][0] == 9
    reference = torch.optim.lr_scheduler.OneCycleLR(
        torch.optim.SGD([torch.zeros(1)], lr=1), max_lr=1e-3, total_steps=12, pct_start=0.3
    )
    for _ in range(9):
        reference.step()
    assert rates[1][1] == pytest.approx(reference.get_last_lr()[0])


def test_many_skipped_steps_in_a_row_end_the_training(datamodule: MVTecAD, tmp_path: Path) -> None:
    model = Poisoned(set(range(4, 14)), **SMALL, max_steps=36)
    message = r"not finite after 15 steps, 10 in a row of which were skipped \(train_loss nan.*\): lower learning_rate"
    with pytest.raises(ValueError, match=message):
        fit(model, datamodule, tmp_path)
    # The first epoch's checkpoint is what it was.
    (path,) = [path for path in tmp_path.rglob("model.ckpt") if "latest" not in path.parts]
    Pedenet.load_from_checkpoint(path)


def test_an_exploding_training_ends_with_its_remedy(datamodule: MVTecAD, tmp_path: Path) -> None:
    model = Pedenet(**SMALL | {"steps_per_image": 4}, max_steps=60, learning_rate=1e30, lr_schedule="constant")
    with pytest.raises(ValueError, match=r"not finite after \d+ steps, 10 in a row .* lower learning_rate"):
        fit(model, datamodule, tmp_path)


def test_a_singular_covariance_is_said_with_its_remedy(datamodule: MVTecAD, tmp_path: Path) -> None:
    """Fewer patches than dimensions have no covariance of full rank."""
    model = Pedenet(
        **SMALL | {"patches_per_step": 16},
        max_steps=60,
        lambda_den=1e-4,
        covariance_type="full",
        covariance_jitter=0,
        density_warmup=0.0,
    )
    with pytest.raises(ValueError, match=r"covariances of components .* are not positive definite.*covariance_jitter"):
        fit(model, datamodule, tmp_path)
