# Copyright (C) 2026 The anomalib-pedenet authors
# SPDX-License-Identifier: Apache-2.0

"""How long a training is, and what changes over its steps: the learning rate, and the weight of L_DEN."""

import logging
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR

from anomalib_pedenet.scales import MIN_SCALE_WEIGHT

logger = logging.getLogger(__name__)

# Fraction of the training over which the one-cycle schedule's rate rises.
_RISE = 0.3

# When it is decided whether location prediction is at chance, as a fraction of `max_steps_at_chance`.
_DECISION = 2 / 3

# Epochs of a training where `steps_per_image` is left to the model: each ends with a validation and a checkpoint.
_EPOCHS = 3

_STEPS_PER_IMAGE = 4  # where the number of training images is unknown


class Schedule:
    """The plan of a training.

    Args:
        hparams (Mapping[str, Any]): Hyper-parameters of :class:`anomalib_pedenet.Pedenet`.
        num_images (int | None): Training images in an epoch, ``None`` if that is not known.
        max_steps (int): The Trainer's limit of steps, ``-1`` for none. Defaults to ``-1``.
        max_epochs (int | None): The Trainer's limit of epochs, ``None`` or ``-1`` for none. Defaults to ``None``.
        shortened_to (int | None): Steps to which the training has been shortened before. Defaults to ``None``.

    Attributes:
        total_steps (int): Optimizer steps that the training makes, at least 1.
        steps_per_image (int): Steps made for each image of a batch.
        shortened_to (int | None): Steps to which the training was shortened, if it was.

    Examples:
        >>> from anomalib_pedenet import Pedenet
        >>> schedule = Schedule(Pedenet(max_steps=900).hparams, num_images=100)
        >>> schedule.total_steps, schedule.steps_per_image
        (900, 3)
    """

    def __init__(
        self,
        hparams: Mapping[str, Any],
        num_images: int | None,
        max_steps: int = -1,
        max_epochs: int | None = None,
        shortened_to: int | None = None,
    ) -> None:
        self._hparams = hparams
        self.shortened_to = shortened_to
        has_epochs = max_epochs is not None and max_epochs > 0
        if hparams["steps_per_image"] is not None:
            self.steps_per_image = int(hparams["steps_per_image"])
        elif num_images is None:
            self.steps_per_image = _STEPS_PER_IMAGE
        else:
            epochs = min(_EPOCHS, max_epochs) if max_epochs is not None and has_epochs else _EPOCHS
            self.steps_per_image = max(1, math.ceil(hparams["max_steps"] / (epochs * num_images)))
        limits = [int(hparams["max_steps"])]
        if shortened_to is not None:
            limits.append(shortened_to)
        if max_steps > 0:
            limits.append(max_steps)
        if max_epochs is not None and has_epochs and num_images is not None:
            limits.append(max_epochs * num_images * self.steps_per_image)
        self.total_steps = max(1, min(limits))

    def density_scale(self, step: int) -> float:
        """Return the factor on L_DEN and L_reg: 0 during the warm-up, then rising to 1 over the same time again.

        Args:
            step (int): Steps made.

        Returns:
            float: From 0 to 1.
        """
        warmup = self._hparams["density_warmup"] * self.total_steps
        return 1.0 if warmup == 0 else min(1.0, max(0.0, step / warmup - 1))

    def learning_rate(self, optimizer: torch.optim.Optimizer, last_step: int = -1) -> OneCycleLR | None:
        """Return the learning rate's schedule, from the start of the training or in its midst.

        Args:
            optimizer (torch.optim.Optimizer): Its optimizer.
            last_step (int): Step before the next one, ``-1`` at the start. Defaults to ``-1``.

        Returns:
            OneCycleLR | None: One cycle over all steps; ``None`` for a constant rate.
        """
        if self._hparams["lr_schedule"] == "constant":
            return None
        return OneCycleLR(
            optimizer,
            max_lr=self._hparams["learning_rate"],
            total_steps=self.total_steps,
            pct_start=_RISE,
            last_epoch=last_step,
        )

    def shorten_at_chance(self, step: int, learned: float) -> bool:
        """Shorten a long training where location prediction is still at chance, see ``max_steps_at_chance``.

        Args:
            step (int): Steps made.
            learned (float): How much location prediction has learned at the smallest scale, from 0 to 1.

        Returns:
            bool: Whether the training is shorter now. Its learning rate needs a new :meth:`learning_rate`, so that it
                falls to 0 as in any other.
        """
        length = self._hparams["max_steps_at_chance"]
        is_decided = self.shortened_to is not None or length is None or self._hparams["lambda_lpn"] == 0
        if is_decided or step < _DECISION * length:
            return False
        shortened = max(length, math.ceil(step / _DECISION))  # a batch may serve so many steps that the time has passed
        if shortened >= self.total_steps or learned >= MIN_SCALE_WEIGHT:
            return False
        logger.warning(
            "Location prediction is still near chance after %d steps: the training ends after %d instead of %d, since "
            "more would make such a surface's scores worse (max_steps_at_chance).",
            step,
            shortened,
            self.total_steps,
        )
        self.shortened_to = self.total_steps = shortened
        return True


def take_back(scheduler: LRScheduler | None, steps: int) -> None:
    """Put a one-cycle schedule back by steps that were skipped, which is known only afterwards.

    Args:
        scheduler (LRScheduler | None): What :meth:`Schedule.learning_rate` returned, or a user's own, which is left.
        steps (int): How many.
    """
    if steps and isinstance(scheduler, OneCycleLR):
        scheduler.last_epoch -= steps + 1
        scheduler.step()
