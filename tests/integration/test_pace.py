# Copyright (C) 2026 The anomalib-pedenet authors
# SPDX-License-Identifier: Apache-2.0

"""How the steps of a training through anomalib's Engine are computed: threads and precision, tried and kept."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from anomalib.data import MVTecAD
from anomalib.engine import Engine

from anomalib_pedenet import Pedenet
from anomalib_pedenet.host.checkpoint import TRAINING
from anomalib_pedenet.training import pace
from anomalib_pedenet.training.step import TrainingStep
from tests.integration.trainings import SMALL

FIRST = 2 * pace.TURNS


class Noting(Pedenet):
    """Notes the threads and the precision of each step."""

    def __init__(self, **options: Any) -> None:  # noqa: ANN401
        super().__init__(**options)
        self.threads: list[int] = []
        self.precisions: list[str] = []

    def _joint_loss(self, step: TrainingStep, images: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        self.threads.append(torch.get_num_threads())
        handle = self.model.embedding_network.small_encoder[0].register_forward_hook(
            lambda _module, _inputs, output: self.precisions.append(str(output.dtype).removeprefix("torch."))
        )
        try:
            return super()._joint_loss(step, images)
        finally:
            handle.remove()


@pytest.fixture(autouse=True)
def two_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def train(
    datamodule: MVTecAD,
    root: Path,
    checkpoint: Path | None = None,
    **options: Any,  # noqa: ANN401
) -> tuple[Noting, Path]:
    model = Noting(**SMALL | {"train_precision": "auto", "visualizer": False} | options)
    engine = Engine(default_root_dir=root, enable_progress_bar=False, limit_val_batches=0)
    engine.fit(model, datamodule=datamodule, ckpt_path=checkpoint)
    return model, Path(engine.best_model_path)


def test_numbers_of_threads_are_tried_in_turn_and_given_back(datamodule: MVTecAD, tmp_path: Path) -> None:
    model, _ = train(datamodule, tmp_path, train_precision="float32", max_steps=FIRST + 3)
    assert model.threads[:FIRST] == [2, 1] * pace.TURNS
    assert len(set(model.threads[FIRST:])) == 1
    assert torch.get_num_threads() == 2


def test_a_seed_keeps_the_number_of_threads(datamodule: MVTecAD, tmp_path: Path) -> None:
    model, _ = train(datamodule, tmp_path, train_precision="float32", max_steps=FIRST + 3, seed=0)
    assert set(model.threads) == {2}


def test_precisions_are_tried_in_turn_and_a_resumed_training_keeps_the_one_that_was_chosen(
    datamodule: MVTecAD, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    model, checkpoint = train(datamodule, tmp_path / "first", max_steps=FIRST + 3, seed=0)
    assert model.precisions[:FIRST] == ["float32", "bfloat16"] * pace.TURNS
    (chosen,) = set(model.precisions[FIRST:])
    (state,) = torch.load(checkpoint, weights_only=True)[TRAINING]
    assert state["precision"] == chosen

    resumed, _ = train(datamodule, tmp_path / "second", checkpoint, max_steps=FIRST + 9, seed=0)
    assert set(resumed.precisions) == {chosen}
