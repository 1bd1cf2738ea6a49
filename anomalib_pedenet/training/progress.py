# Copyright (C) 2026 The anomalib-pedenet authors
# SPDX-License-Identifier: Apache-2.0

"""What the log says of a training as it goes on: a batch makes hundreds of steps, and can take minutes."""

import logging
import time
from collections.abc import Mapping, Sequence

import torch

logger = logging.getLogger(__name__)

COLLAPSE_SPREAD = 0.02
"""Embeddings (each dimension in -1..1) whose mean standard deviation falls below this have collapsed."""

MAX_SKIPPED_IN_ROW = 10
"""A training is ended after as many skipped steps in a row."""

# How often the log says how far the training is.
_NUM_REPORTS = 20


class Progress:
    """Counts the steps of a training, says how far it is, and watches for what goes wrong.

    Args:
        first_step (int): Step at which the training starts, or goes on.
        skipped_in_row (int): Steps that were skipped just before it. Defaults to ``0``.

    Attributes:
        skipped_in_row (int): The latest steps in a row that were skipped.
    """

    def __init__(self, first_step: int, skipped_in_row: int = 0) -> None:
        self.skipped_in_row = skipped_in_row
        self._first_step, self._start = first_step, time.monotonic()
        self._has_warned_of_collapse = False

    def report(self, step: int, total_steps: int, loss: torch.Tensor) -> None:
        """Say now and then how far the training is.

        Args:
            step (int): Steps made.
            total_steps (int): Steps that will be made.
            loss (torch.Tensor): Loss of the latest one, scalar.
        """
        if step % max(1, total_steps // _NUM_REPORTS):
            return
        rate = (step - self._first_step) / (time.monotonic() - self._start)
        left = (total_steps - step) / rate
        logger.info(
            "Step %d of %d, %.1f steps/s, about %.0f s left, loss %.3f.", step, total_steps, rate, left, loss.item()
        )

    def watch_spread(self, step: int, spread: torch.Tensor) -> None:
        """Warn once if the embeddings have collapsed.

        Args:
            step (int): Steps made.
            spread (torch.Tensor): Mean standard deviation of the embeddings' dimensions, scalar.
        """
        if self._has_warned_of_collapse or not spread < COLLAPSE_SPREAD:  # NaN is no collapse
            return
        self._has_warned_of_collapse = True
        logger.warning(
            "The embeddings have collapsed (spread %.3f after %d steps, below %.2f): patches can hardly be told "
            "apart and the anomaly map will be poor. Raise lambda_var or min_std, or lower lambda_den if it is not 0.",
            spread,
            step,
            COLLAPSE_SPREAD,
        )

    def watch_skipped(
        self, step: int, are_skipped: Sequence[bool], history: Sequence[Mapping[str, torch.Tensor]]
    ) -> None:
        """Say how many steps of a batch were skipped.

        Args:
            step (int): Steps made.
            are_skipped (Sequence[bool]): Of each step of the batch, whether it was skipped.
            history (Sequence[Mapping[str, torch.Tensor]]): Its losses.

        Raises:
            ValueError: If :data:`MAX_SKIPPED_IN_ROW` in a row were.
        """
        for terms, is_skipped in zip(history, are_skipped, strict=True):
            self.skipped_in_row = self.skipped_in_row + 1 if is_skipped else 0
            if self.skipped_in_row == MAX_SKIPPED_IN_ROW:
                values = ", ".join(f"{name} {value:.3g}" for name, value in terms.items())
                msg = (
                    f"The training loss or its gradients are not finite after {step} steps, "
                    f"{MAX_SKIPPED_IN_ROW} in a row of which were skipped ({values}): lower learning_rate, or "
                    "lambda_den if it is not 0. Earlier checkpoints are untouched."
                )
                raise ValueError(msg)
        if any(are_skipped):
            logger.warning(
                "%d of the last %d steps were skipped, since the loss or its gradients were not finite.",
                sum(are_skipped),
                len(are_skipped),
            )
