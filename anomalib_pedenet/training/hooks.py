# Copyright (C) 2026 The anomalib-pedenet authors
# SPDX-License-Identifier: Apache-2.0

"""What Lightning calls in a training, in the order in which it calls it; each hook leaves the work to a module here."""

import logging
import os
from collections.abc import Mapping
from typing import Any

import torch
from anomalib.data import AnomalibDataModule, Batch
from anomalib.data.utils.tiler import Tiler
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig

from anomalib_pedenet.data.image_pool import ImagePool
from anomalib_pedenet.data.input_files import check_finite, naming_files
from anomalib_pedenet.data.normal_images import MIN_TRAINING_IMAGES
from anomalib_pedenet.host.checkpoint import ORIGIN, SHORTENED, TRAINING
from anomalib_pedenet.host.fit_loop import (
    begin_anew,
    can_stop_early,
    images_per_epoch,
    is_last_batch,
    is_told_to_stop,
    save_again,
    validate_now,
)
from anomalib_pedenet.loss import PedenetLoss
from anomalib_pedenet.post_processor import forget_scores, lacks_thresholds
from anomalib_pedenet.tiling import TILES, describe_tiler, make_tiler
from anomalib_pedenet.training.bank_hooks import PedenetBankMixin
from anomalib_pedenet.training.held_back import HeldBack, hold_back
from anomalib_pedenet.training.pace import Pace, precisions_to_try, ways
from anomalib_pedenet.training.preparation import measure
from anomalib_pedenet.training.progress import Progress
from anomalib_pedenet.training.resuming import Resuming, origin
from anomalib_pedenet.training.schedule import Schedule, take_back
from anomalib_pedenet.training.step import TrainingStep
from anomalib_pedenet.training.step_guard import StepGuard

logger = logging.getLogger(__name__)

_RECOMMENDED_TRAINING_IMAGES = 20


class PedenetTrainingMixin(PedenetBankMixin):
    """How ``Pedenet`` is trained.

    Attributes:
        loss (PedenetLoss): The loss of one scale.
    """

    loss: PedenetLoss
    _loaded_tiler: Tiler | None = None  # that of a checkpoint, where a callback has set none

    def _forget_training(self) -> None:
        """Put all that belongs to one training back to its start."""
        self._schedule = Schedule(self.hparams, None)
        self._progress = Progress(0)
        self._resuming = Resuming()
        self._pool: ImagePool | None = None
        self._guard: StepGuard | None = None
        self._step: TrainingStep | None = None
        self._origin: dict[str, Any] | None = None
        if self.model.tiler is self._loaded_tiler:
            self.model.tiler = self._loaded_tiler = None
        self._held_back: HeldBack | None = None
        self._last_metrics: dict[str, torch.Tensor] = {}  # means over the latest batch's steps
        self._pace: Pace | None = None
        self._validated_step = 0
        self._epochs_between_validations: int | None = None  # the Trainer's, while the last validation is seen to

    def setup(self, stage: str) -> None:
        """Have checkpoint files checked as they are read, and begin a new training as if there had been none.

        Args:
            stage (str): ``"fit"``, ``"validate"``, ``"test"`` or ``"predict"``.

        Raises:
            RuntimeError: If the Trainer's precision makes the networks' weights or the memory bank half precision, or
                its callbacks go on from another training.
        """
        from anomalib_pedenet.host.checkpoint_io import read_checked  # imports the engine, as models must not

        read_checked(self.trainer)
        if str(self.trainer.precision) in {"16-true", "bf16-true"}:
            msg = (
                f"precision={self.trainer.precision} of the Trainer (or Engine) would round weights, memory bank and "
                "scores: leave it out, and set train_precision='bfloat16' of the model to train faster."
            )
            raise RuntimeError(msg)
        if stage != "fit":
            return
        begin_anew(self.trainer)
        self._forget_training()  # a checkpoint to go on from is read later
        datamodule = getattr(self.trainer, "datamodule", None)
        if isinstance(datamodule, AnomalibDataModule) and not hasattr(datamodule, "val_data"):
            self.trainer.limit_val_batches = 0  # val_split_mode "none": anomalib's data modules fail when asked for it
        train_data = getattr(datamodule, "train_data", None)
        if train_data is not None and len(train_data) < MIN_TRAINING_IMAGES:
            logger.warning(
                "The training set %s has %d normal image(s): what varies between good parts cannot be learned from it. "
                "Add images to the folder of normal training images (%d or more are recommended).",
                getattr(train_data, "name", ""),
                len(train_data),
                _RECOMMENDED_TRAINING_IMAGES,
            )

    def configure_optimizers(self) -> torch.optim.Optimizer | OptimizerLRSchedulerConfig:
        """Configure Adam, with a one-cycle schedule over the steps that will be made, or a constant rate.

        Returns:
            torch.optim.Optimizer | OptimizerLRSchedulerConfig: Optimizer, with its schedule if there is one.
        """
        optimizer = torch.optim.Adam(
            [
                *self.model.embedding_network.parameters(),
                *self.model.density_networks.parameters(),
                *self.model.location_networks.parameters(),
                *self.model.defect_networks.parameters(),
            ],
            lr=self.hparams.learning_rate,
            fused=True,  # these alone can be told on the device to skip a step
        )
        rates = self._make_schedule().learning_rate(optimizer)
        if rates is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": rates, "interval": "step"}}

    def _make_schedule(self) -> Schedule:
        """Plan the training, under the model's and the Trainer's limits."""
        trainer, num_images = self.trainer, images_per_epoch(self.trainer)
        return Schedule(self.hparams, num_images, trainer.max_steps, trainer.max_epochs, self._schedule.shortened_to)

    def on_train_start(self) -> None:
        """Measure the training images, choose the arithmetic of the networks, and go on where a checkpoint was.

        Raises:
            ValueError: If the training images are too few to hold some back.
        """
        trainer, hparams = self.trainer, self.hparams
        self._schedule = self._make_schedule()
        images = self._training_set()
        self._held_back = hold_back(images, hparams.holdout)
        num_images = images_per_epoch(trainer) if self._held_back is None else len(self._held_back.trained_on)
        self._pool = ImagePool(num_images or 2**31, int(hparams.cache_gib * 2**30))
        self._progress = Progress(trainer.global_step)
        if trainer.global_step == 0:  # a resumed training goes on with the checkpoint's
            forget_scores(self.post_processor)
            self.model.reset_choices()
            self._set_region(images)
            if not measure(self.model, images, self._trained_on(images)):
                self._schedule.total_steps = 1
        elif "roi" in self._asked_of_bank:
            self._set_region(images)
        self._guard = StepGuard(self.optimizers().optimizer, self.model)
        # Several processes are left out: their gradients are exchanged as they come, which a graph would have to hold.
        records = hparams.cuda_graph and trainer.world_size == 1
        self._step = TrainingStep(self.model, self.loss, hparams, records)
        self._origin = self._origin or origin(trainer)
        if trainer.global_step == 0:
            self._resuming.seed(trainer, self.device, hparams.seed)
        else:
            skipped = self._resuming.go_on(trainer, self.device, self._pool, images, self.model.standardize)
            self._progress.skipped_in_row = skipped
        self._pace = self._make_pace()
        logger.info("Training Pedenet for %d steps.", self._schedule.total_steps)

    def _make_pace(self) -> Pace:
        """Plan to find the fastest way to make steps, at the start and whenever they become slow."""
        # A seed promises the same result, to which other numbers of threads add up otherwise; and processes must agree.
        is_seeded = self.hparams.seed is not None or "PL_GLOBAL_SEED" in os.environ
        may_change = not is_seeded and self.trainer.world_size == 1 and self.device.type == "cpu"
        precisions = precisions_to_try(self.device, self.hparams.train_precision, self._resuming.precision)
        return Pace(ways(precisions, torch.get_num_threads(), may_change), self.trainer.global_step, may_change)

    def on_train_epoch_start(self) -> None:
        """Have the first epoch of a seeded or resumed training draw from the generators as they are meant to be."""
        self._resuming.begin_epoch(self.trainer, self.device)

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        """Make several optimizer steps on a batch of normal images.

        A step needs a few crops only, so one batch serves ``steps_per_image`` steps for each of its images: decoding
        and resizing are then a small part of the training time, whatever the size of the images on disk. The crops come
        from all images decoded so far.

        Args:
            batch (Batch): Batch of pre-processed normal images.
            batch_idx (int): Index of the batch (unused).

        Raises:
            ValueError: If the images are not finite or too small, or the loss or its gradients are not finite in many
                steps in a row.
            RuntimeError: If called outside a training.
        """
        del batch_idx
        check_finite(batch)
        self._resuming.begin_batch()
        trainer, schedule, pool = self.trainer, self._schedule, self._pool
        if pool is None:
            msg = "There is no pool of training images: train with anomalib's Engine or a Lightning Trainer."
            raise RuntimeError(msg)
        chosen = range(len(batch.image)) if self._held_back is None else self._held_back.trainable(batch)
        images = batch.image[list(chosen)]
        if len(images):
            paths = getattr(batch, "image_path", None)
            pool.add(self.model.standardize(images), paths and [str(paths[position]) for position in chosen])
        remaining = max(0, schedule.total_steps - trainer.global_step)
        history: list[dict[str, torch.Tensor]] = []
        for _ in range(min(remaining, schedule.steps_per_image * len(images))):
            history.append(self._make_step(batch, pool))
            if is_told_to_stop(trainer):
                logger.info("The training was told to stop after %d steps.", trainer.global_step)
                # After a signal there is no time for a validation: Lightning ends at once.
                trainer.should_stop = not trainer.received_sigterm
                break
        self._look_back(history)
        if trainer.global_step >= schedule.total_steps or is_last_batch(trainer):
            # Unlike the Trainer's own limit of steps, this lets a last validation run, which sets the thresholds.
            trainer.should_stop = True
        if trainer.should_stop and can_stop_early(trainer):
            self._see_to_last_validation()

    def _make_step(self, batch: Batch, pool: ImagePool) -> dict[str, torch.Tensor]:
        """Make an optimizer step, and return what there is to report of it, and whether it was skipped."""
        guard, step, pace, optimizer = self._guard, self._step, self._pace, self.optimizers()
        assert guard is not None and step is not None and pace is not None  # noqa: PT018 - made with the pool
        self._is_bank_stale = True
        guard.begin()
        with pace.step(self.trainer.global_step):
            with naming_files(batch):
                loss, metrics = self._joint_loss(step, pool.images)
            optimizer.zero_grad()
            self.manual_backward(loss)
            # Gradients are means over the processes already, so that all of them skip a step or none.
            is_skipped = guard.check(self.trainer.strategy.reduce(loss.detach(), reduce_op="mean"))
            optimizer.step()
        scheduler = self.lr_schedulers()  # each time anew, as it may be replaced
        if scheduler is not None:
            scheduler.step()
        if self.trainer.is_global_zero:
            self._progress.report(self.trainer.global_step, self._schedule.total_steps, metrics["train_loss"])
        return metrics | {"skipped_steps": is_skipped}

    def _joint_loss(self, step: TrainingStep, images: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Return the loss of one step on standardised images, over all scales, and detached scalars to report."""
        assert self._pace is not None
        made = self.trainer.global_step
        return step(images, self._schedule.density_scale(made), self._pace.way(made).precision)

    def _look_back(self, history: list[dict[str, torch.Tensor]]) -> None:
        """Report a batch's steps, count those that were skipped, and shorten a training that learns nothing.

        Raises:
            ValueError: If many in a row were skipped.
        """
        trainer = self.trainer
        are_skipped = torch.stack([step.pop("skipped_steps") for step in history]).tolist() if history else []
        skipped = float(sum(are_skipped))
        self.log("skipped_steps", skipped, on_step=False, on_epoch=True, reduce_fx="sum", batch_size=1)
        self._progress.watch_skipped(trainer.global_step, are_skipped, history)
        take_back(self.lr_schedulers(), sum(are_skipped))
        history = [step for step, is_skipped in zip(history, are_skipped, strict=True) if not is_skipped]
        if not history:
            return
        means = torch.stack([torch.stack([step[name].float() for step in history]).mean() for name in history[0]])
        means = trainer.strategy.reduce(means, reduce_op="mean")  # every process goes on with the same
        self._report(dict(zip(history[0], means, strict=True)))
        if not self.model.projections:
            return
        step, smallest = trainer.global_step, min(self.model.patch_sizes)
        if self._schedule.shorten_at_chance(step, self._learned()[smallest]):
            for config in trainer.lr_scheduler_configs:
                config.scheduler = self._schedule.learning_rate(self.optimizers().optimizer, step - 1)

    def _report(self, metrics: dict[str, torch.Tensor]) -> None:
        """Log the means over a batch's steps, show their essence on the progress bar, and watch for collapse."""
        self._last_metrics = metrics
        self.log_dict(metrics, on_step=False, on_epoch=True, batch_size=1)
        sizes = self.model.patch_sizes
        shown = {
            label: torch.stack([metrics[f"loss_{label}_{size}"] for size in sizes]).sum()
            for label in self.loss.shown_terms
        }
        shown["lp_acc"] = torch.stack([metrics[f"lp_accuracy_{size}"] for size in sizes]).mean()
        shown["spread"] = torch.stack([metrics[f"spread_{size}"] for size in sizes]).min()
        step = self.trainer.global_step
        for label, value in (shown | {"step": float(step)}).items():
            self.log(label, value, prog_bar=True, logger=False, on_step=True, on_epoch=False)
        self._progress.watch_spread(step, shown["spread"])

    def _see_to_last_validation(self) -> None:
        """Have the epoch that ends with this batch validated, also where not every epoch is."""
        interval = self.trainer.check_val_every_n_epoch
        if interval is not None and self._epochs_between_validations is None:
            self._epochs_between_validations, self.trainer.check_val_every_n_epoch = interval, 1

    def on_train_end(self) -> None:
        """Rebuild the memory bank if training went on since it was built, validate it, and say what was learned."""
        self._refresh_bank()
        trainer = self.trainer
        if trainer.enable_validation and self._validated_step != trainer.global_step:
            validate_now(trainer)
        if self._epochs_between_validations is not None:
            trainer.check_val_every_n_epoch = self._epochs_between_validations
        if lacks_thresholds(self.post_processor) and not trainer.received_sigterm:  # a signal leaves no time for it
            self._set_thresholds()
            save_again(trainer)
        for size in self.model.patch_sizes if self._last_metrics else ():
            location = self._last_metrics[f"loss_lpn_{size}"]
            logger.info(
                "Trained %d-px patches: location prediction is right in %.0f %% of pairs (chance: 12 %%); drawn "
                "defects counted %.2f in the end (at most lambda_syn, %g); spread of the embeddings %.2f.",
                size,
                100 * self._last_metrics[f"lp_accuracy_{size}"],
                self.loss.effective_lambda_syn(location),
                self.hparams.lambda_syn,
                self._last_metrics[f"spread_{size}"],
            )
        self._warn_without_thresholds()
        # The model may be saved, and go on with other data: what this training alone needed must not go with it.
        self._pool = self._step = self._guard = None
        self._last_metrics = {}

    def __getstate__(self) -> dict[str, Any]:
        """Return what is pickled, in exports to PyTorch's format: neither images nor what was timed."""
        return super().__getstate__() | {"_held_back": None, "_pace": None}

    def _training_entries(self) -> dict[str, Any]:
        """Return a checkpoint's entries of the training at hand."""
        entries: dict[str, Any] = {ORIGIN: self._origin, SHORTENED: self._schedule.shortened_to}
        entries[TILES] = describe_tiler(self.model.tiler)
        if self._pool is not None:
            entries[TRAINING] = Resuming.state(
                self.trainer,
                self.device,
                self._pool,
                self._training_set(),
                self._progress.skipped_in_row,
                None if self._pace is None else self._pace.precision,
            )
        return entries

    def _take_training_entries(self, checkpoint: Mapping[str, Any]) -> None:
        """Take what :meth:`_training_entries` gave to a checkpoint."""
        self._resuming.loaded = checkpoint.get(TRAINING)
        self._origin = checkpoint.get(ORIGIN)
        self._schedule.shortened_to = checkpoint.get(SHORTENED)
        if self.model.tiler is self._loaded_tiler:  # else a callback has set another
            self.model.tiler = self._loaded_tiler = make_tiler(checkpoint.get(TILES))
