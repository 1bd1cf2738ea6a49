# Copyright (C) 2026 The anomalib-pedenet authors
# SPDX-License-Identifier: Apache-2.0

"""What Lightning's loop over batches does not see, since a batch makes hundreds of optimizer steps here.

Lightning looks after each batch whether it is to stop, and validates after each ``check_val_every_n_epoch`` epochs.
Here it is looked after each step, and the last weights of a training are always validated, however it ends.
"""

import math

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, Timer
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop


def is_told_to_stop(trainer: Trainer) -> bool:
    """Return whether a training is to end now: by a signal, ``max_time``, or ``should_stop``.

    Args:
        trainer (Trainer): Trainer of the training, in the midst of a batch.

    Returns:
        bool: The same for all processes: ``True`` if one of them is told so.
    """
    is_over = trainer.received_sigterm or any(
        callback._interval == "step" and (callback.time_remaining() or 0) < 0  # noqa: SLF001
        for callback in _callbacks(trainer)
        if isinstance(callback, Timer) and callback.time_remaining() is not None
    )
    is_told = is_over or (trainer.should_stop and can_stop_early(trainer))
    return bool(trainer.strategy.reduce_boolean_decision(is_told, all=False))


def images_per_epoch(trainer: Trainer) -> int | None:
    """Return the number of training images in an epoch, or ``None`` if it is not known."""
    num_batches = trainer.num_training_batches
    loader = trainer.train_dataloader
    if loader is None or not math.isfinite(num_batches):
        return None
    return min(int(num_batches) * (getattr(loader, "batch_size", None) or 1), len(loader.dataset))


def _callbacks(trainer: Trainer) -> list[Callback]:
    return trainer.callbacks  # type: ignore[attr-defined] # which a part of the Trainer gives it


def can_stop_early(trainer: Trainer) -> bool:
    """Return whether the Trainer's ``min_epochs`` and ``min_steps`` allow an end now."""
    return bool(trainer.fit_loop._can_stop_early)  # noqa: SLF001 - there is no public name


def is_last_batch(trainer: Trainer) -> bool:
    """Return whether the batch at hand is the last one of the last epoch."""
    is_last_epoch = 0 < (trainer.max_epochs or 0) <= trainer.current_epoch + 1
    return is_last_epoch and trainer.fit_loop.epoch_loop.batch_progress.is_last_batch


def validate_now(trainer: Trainer) -> None:
    """Validate at the end of a training whose last weights have not been, and save them with their thresholds.

    Args:
        trainer (Trainer): Trainer of the training, in ``on_train_end``.
    """
    trainer.validating = True  # as the loop over batches does
    trainer.fit_loop.epoch_loop.val_loop.run()
    trainer.training = True
    save_again(trainer)


def save_again(trainer: Trainer) -> None:
    """Save the last checkpoint again, with what has changed since.

    Args:
        trainer (Trainer): Trainer of the training, in ``on_train_end``.
    """
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint) and callback._last_global_step_saved == trainer.global_step:  # noqa: SLF001
            trainer.save_checkpoint(callback._last_checkpoint_saved, callback.save_weights_only)  # noqa: SLF001


def begin_anew(trainer: Trainer) -> None:
    """Have a Trainer that has trained before begin a new training from its first step, beside the files of the old one.

    Lightning would go on with its counters of epochs and steps, find all done, and train nothing.

    Args:
        trainer (Trainer): Trainer that is being set up to fit.

    Raises:
        RuntimeError: If callbacks remember the training before.
    """
    old = trainer.fit_loop
    if old.epoch_progress.total.ready == 0:
        return
    for callback in _callbacks(trainer):
        if isinstance(callback, EarlyStopping | Timer):
            msg = (
                f"This Engine (or Trainer) has trained before, and its callback {type(callback).__name__} goes on from "
                "there: make a new one for each training."
            )
            raise RuntimeError(msg)  # noqa: TRY004 - not of the wrong type, but used
        if isinstance(callback, ModelCheckpoint):  # or it would delete what it saved of the other model
            callback._last_global_step_saved = 0  # noqa: SLF001
            callback.best_model_path = callback.last_model_path = callback.kth_best_model_path = ""
            callback.best_k_models, callback.best_model_score = {}, None
    loop = type(old)(trainer, min_epochs=old.min_epochs, max_epochs=old.max_epochs)
    loop.epoch_loop = _TrainingEpochLoop(trainer, min_steps=old.min_steps, max_steps=old.max_steps)
    loop._data_source = old._data_source  # noqa: SLF001 - attached already
    loop.epoch_loop.val_loop._data_source = old.epoch_loop.val_loop._data_source  # noqa: SLF001
    trainer.fit_loop = loop
    trainer.should_stop = False
