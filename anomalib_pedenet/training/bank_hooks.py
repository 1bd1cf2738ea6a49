# Copyright (C) 2026 The anomalib-pedenet authors
# SPDX-License-Identifier: Apache-2.0

"""When the memory bank and the thresholds are made anew: before anything is scored, and at the end of a training."""

import contextlib
import logging
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from anomalib.models.components import MemoryBankMixin

from anomalib_pedenet.data.normal_images import TrainingSet
from anomalib_pedenet.loss import share_to_learn
from anomalib_pedenet.post_processor import lacks_thresholds, reset_metrics, set_thresholds
from anomalib_pedenet.torch_model import PedenetModel
from anomalib_pedenet.training.bank_building import build_memory_bank, thresholds_of_training
from anomalib_pedenet.training.held_back import HeldBack
from anomalib_pedenet.training.preparation import set_region
from anomalib_pedenet.training.step_guard import running_averages

logger = logging.getLogger(__name__)


class PedenetBankMixin(MemoryBankMixin):
    """What ``Pedenet`` is fitted to the normal images, and when.

    Training marks the bank stale; it is built anew when it is needed, and not before.

    Attributes:
        model (PedenetModel): The torch model.
    """

    model: PedenetModel
    pre_processor: Any
    post_processor: Any
    evaluator: Any
    _asked_of_bank: list[str]
    _held_back: HeldBack | None
    _is_bank_stale: bool
    _last_metrics: dict[str, torch.Tensor]
    _validated_step: int
    _has_warned_of_thresholds = False

    def fit(self) -> None:
        """Build the memory bank from all normal training images, without augmentation, with the present weights."""
        self._average_running_statistics()
        with self._as_scored():
            images = self._training_set()
            if "roi" in self._asked_of_bank:
                self._set_region(images)
            build_memory_bank(
                self.model,
                images,
                self._trained_on(images),
                self.hparams.bank_stride,
                self._learned() if self._last_metrics and self.hparams.lambda_lpn > 0 else None,
                unseen=None if self._held_back is None else self._held_back.normal,
                quiet=not self.trainer.is_global_zero,
            )
        self._is_fitted = torch.tensor([True], device=self.device)
        self._is_bank_stale = False

    @contextlib.contextmanager
    def _as_scored(self) -> Iterator[None]:
        """Compute as images will be scored, and have results that can be saved and trained on afterwards."""
        with (
            torch.inference_mode(mode=False),
            torch.no_grad(),
            self.trainer.precision_plugin.forward_context(),
        ):
            yield

    def _average_running_statistics(self) -> None:
        """Make the running averages of the networks those of all processes, so that all build the same bank."""
        if self.trainer.world_size == 1:
            return
        for buffer in running_averages(self.model):
            if buffer.is_floating_point():  # and no count of batches, which is the same everywhere
                buffer.copy_(self.trainer.strategy.reduce(buffer.clone(), reduce_op="mean"))

    def _refresh_bank(self) -> None:
        """Build the memory bank if it is not that of the present weights."""
        if self._is_bank_stale:
            self.fit()

    def _set_thresholds(self) -> None:
        """Set the thresholds by the training images, each scored by what is fitted on others."""
        images, quiet = self._training_set(), not self.trainer.is_global_zero
        with self._as_scored():
            found = thresholds_of_training(
                self.model, images, self._trained_on(images), self.hparams.bank_stride, quiet
            )
        if found is not None:
            set_thresholds(self.post_processor, found)

    def _warn_without_thresholds(self) -> None:
        """Say once that there are no thresholds, if there are none."""
        if lacks_thresholds(self.post_processor) and not self._has_warned_of_thresholds:
            self._has_warned_of_thresholds = True
            logger.warning(
                "No validation has set thresholds: what scores higher than all normal training images that were looked "
                "at is called defective. For thresholds by your own good and defective images, validate: give the data "
                "module validation images (val_split_mode, val_split_ratio), and do not set limit_val_batches to 0."
            )

    def on_validation_start(self) -> None:
        """Rebuild the memory bank if training went on since it was built, and drop what was measured in part."""
        self._refresh_bank()
        reset_metrics(self.post_processor, self.evaluator)

    def on_validation_epoch_end(self) -> None:
        """Log how well drawn defects are found on the images held back, if there are any."""
        super().on_validation_epoch_end()
        if self._held_back is not None:
            figures = self._held_back.measure(self.model, self.trainer.global_step)
            self.log_dict(figures, prog_bar=True, batch_size=1)

    def on_validation_end(self) -> None:
        """Note which weights were validated."""
        self._validated_step = self.trainer.global_step

    def on_test_start(self) -> None:
        """Build the memory bank if a checkpoint was loaded that has another one."""
        self._refresh_bank()
        reset_metrics(self.post_processor, self.evaluator)
        self._warn_without_thresholds()

    def on_predict_start(self) -> None:
        """Build the memory bank if a checkpoint was loaded that has another one."""
        self._refresh_bank()
        self._warn_without_thresholds()

    def on_train_epoch_end(self) -> None:
        """Do nothing: the mixin would build the bank here once and never again."""

    def _training_set(self) -> TrainingSet:
        """Return the training images, in a training and outside of it."""
        return TrainingSet(self.trainer, self.pre_processor, self.device, self._asked_of_bank)

    def _trained_on(self, images: TrainingSet) -> Sequence[int]:
        """Return the positions of the training images that are not held back."""
        return range(len(images)) if self._held_back is None else self._held_back.trained_on

    def _set_region(self, images: TrainingSet) -> None:
        """Take the region of interest that was asked for."""
        transform = getattr(self.pre_processor, "transform", None)
        set_region(self.model.region, self.hparams.roi, images, self._trained_on(images), transform)

    def _learned(self) -> dict[int, float]:
        """Return how much location prediction has learned at each trained size, from 0 (chance) to 1."""
        losses = {size: self._last_metrics[f"loss_lpn_{size}"] for size in self.model.patch_sizes}
        return {size: 1 - float(share_to_learn(loss)) for size, loss in losses.items()}
