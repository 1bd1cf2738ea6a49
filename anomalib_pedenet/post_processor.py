# Copyright (C) 2026 The anomalib-pedenet authors
# SPDX-License-Identifier: Apache-2.0

"""anomalib's post-processor, with a normalisation that keeps the order of all scores, and thresholds between scores.

anomalib normalises a score ``s`` to ``(s - threshold) / (max - min) + 0.5`` and clips it to 0..1, where ``min`` and
``max`` are those of the validation scores. What is clipped is no longer told apart: where validation has normal images
only, nearly all defects become 1.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from anomalib.data import InferenceBatch
from anomalib.metrics import F1AdaptiveThreshold
from anomalib.post_processing import PostProcessor
from torch import nn
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from anomalib_pedenet.false_alarms import FalseAlarmThreshold

LIMITS = ("_image_threshold", "_pixel_threshold")
"""Thresholds of anomalib's post-processor, its buffers."""

THRESHOLDS = (*LIMITS, "image_min", "image_max", "pixel_min", "pixel_max")
"""Thresholds and ranges of anomalib's post-processor, its buffers."""


class F1ThresholdBetweenScores(F1AdaptiveThreshold):
    """anomalib's threshold of the best F1 score, put in the middle between the two scores that it separates.

    anomalib's is the lowest score to be called defective, but only what is above a threshold is called so.
    """

    preds: Any
    target: Any

    def compute(self) -> torch.Tensor:
        """Return the threshold of the best F1 score; the highest score, where no sample is defective."""
        # Gathered from several processes, labels are one tensor instead of a list of batches, and anomalib 2.7.0 would
        # look at the pixels one by one: half a minute and 5.6 GB for the 83 images of bottle.
        if isinstance(self.target, torch.Tensor):
            self.preds, self.target = [self.preds], [self.target]
        threshold = super().compute()
        if not self._has_anomalous_samples():
            return threshold
        scores = dim_zero_cat(self.preds)
        below = scores[scores < threshold]
        lower = below.max() if len(below) else torch.zeros_like(threshold)
        middle = (lower + threshold) / 2
        return torch.where(middle < threshold, middle, lower)  # between neighbouring numbers there is no other


class PedenetPostProcessor(PostProcessor):
    """Thresholds as anomalib's does, and normalises without loss of order: 0 to 1, with the threshold at 0.5.

    A score ``s`` of :class:`anomalib_pedenet.PedenetModel` is ``d / (d + limit)`` for a distance ``d`` to what is
    normal. Normalised it is ``d / (d + threshold)``: near 0 for what is normal, 2/3 at twice the threshold, 0.9 at nine
    times, and never 1. Where there was no validation, scores stay as they are: 0.5 is the highest one of normal
    training images.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401 - as anomalib's
        super().__init__(*args, **kwargs)
        self._image_threshold_metric = F1ThresholdBetweenScores(fields=["pred_score", "gt_label"], strict=False)
        self._pixel_threshold_metric = F1ThresholdBetweenScores(fields=["anomaly_map", "gt_mask"], strict=False)

    @property
    def normalized_image_threshold(self) -> torch.Tensor:
        """Score from which an image is defective, as the scores are given out: normalised, or not."""
        return self._given_out(super().normalized_image_threshold, self.image_threshold)

    @property
    def normalized_pixel_threshold(self) -> torch.Tensor:
        """Score from which a pixel is defective, likewise."""
        return self._given_out(super().normalized_pixel_threshold, self.pixel_threshold)

    def _given_out(self, normalized: torch.Tensor, threshold: torch.Tensor) -> torch.Tensor:
        """Return a normalised score as it is given out."""
        if self.enable_normalization:
            return normalized
        return change_unit(normalized.to(threshold.device), torch.nan_to_num(threshold, nan=0.5), torch.tensor(0.5))

    @staticmethod
    def _normalize(
        preds: torch.Tensor | None,
        norm_min: torch.Tensor,
        norm_max: torch.Tensor,
        threshold: torch.Tensor,
    ) -> torch.Tensor | None:
        """Normalise scores of any shape.

        Args:
            preds (torch.Tensor | None): Scores from 0 to 1, or ``None``.
            norm_min (torch.Tensor): Unused.
            norm_max (torch.Tensor): Unused.
            threshold (torch.Tensor): Score above which an image or a pixel is defective, scalar; NaN if there was no
                validation.

        Returns:
            torch.Tensor | None: Normalised scores in the same shape, from 0 to 1.
        """
        del norm_min, norm_max
        if preds is None:
            return None
        return change_unit(preds, torch.full_like(threshold, 0.5), torch.nan_to_num(threshold, nan=0.5))


def change_unit(scores: torch.Tensor, to: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
    """Change the unit of scores ``d / (d + unit)`` such that ``at`` becomes ``to``; 0 and 1 and the order stay.

    Args:
        scores (torch.Tensor): Scores from 0 to 1, of any shape.
        to (torch.Tensor): New value of a score, scalar.
        at (torch.Tensor): That score, scalar.

    Returns:
        torch.Tensor: Scores of the same shape, from 0 to 1.
    """
    eps = torch.finfo(scores.dtype).eps
    to, at = to.clamp(eps, 1 - eps), at.clamp(eps, 1 - eps)
    above = scores * (to * (1 - at))
    return above / (above + (1 - scores) * (at * (1 - to)))


def lacks_thresholds(processor: nn.Module | None) -> bool:
    """Return whether a post-processor is to set thresholds and has none."""
    if not isinstance(processor, PostProcessor) or not processor.enable_thresholding:
        return False
    return bool(torch.isnan(processor.image_threshold))


class Thresholds(NamedTuple):
    """Scores above which images and pixels are defective, as the model gives them, before normalisation.

    Attributes:
        image (float): Of images.
        pixel (float): Of pixels.
    """

    image: float
    pixel: float

    def state(self) -> dict[str, torch.Tensor]:
        """Return the buffers of a post-processor that has these thresholds, by name."""
        return {name: torch.tensor(value) for name, value in zip(LIMITS, self, strict=True)}


def highest_scores(predictions: InferenceBatch) -> Thresholds:
    """Return the lowest thresholds by which an image is not flagged, nor any of its pixels: its score, and theirs."""
    return Thresholds(float(predictions.pred_score), float(predictions.anomaly_map.max()))


def choose_thresholds(
    good: Sequence[Thresholds], choose: Callable[[Sequence[float]], FalseAlarmThreshold]
) -> tuple[Thresholds, FalseAlarmThreshold]:
    """Choose the thresholds of images and of pixels, each by what good images have at most.

    Args:
        good (Sequence[Thresholds]): :func:`highest_scores` of good images.
        choose (Callable): Chooses a threshold by scores.

    Returns:
        tuple[Thresholds, FalseAlarmThreshold]: Both, and what may be expected of that of images.
    """
    image, pixel = map(choose, zip(*good, strict=True))
    return Thresholds(image.threshold, pixel.threshold), image


def just_below(score: float) -> float:
    """Return the highest threshold by which a score is flagged: what is above it is, not what is at it."""
    return float(np.nextafter(np.float32(score), np.float32(0)))


def raw_thresholds(processor: nn.Module | None) -> Thresholds:
    """Return the thresholds of a post-processor: 0.5 where none was set."""
    if not isinstance(processor, PostProcessor):
        return Thresholds(0.5, 0.5)
    return Thresholds(*(float(torch.nan_to_num(getattr(processor, name), nan=0.5)) for name in LIMITS))


def set_thresholds(processor: nn.Module | None, thresholds: Thresholds) -> None:
    """Set the thresholds of images and pixels.

    Args:
        processor (nn.Module | None): Post-processor; others than anomalib's are left alone.
        thresholds (Thresholds): The thresholds.
    """
    if isinstance(processor, PostProcessor):
        for name, value in thresholds.state().items():
            getattr(processor, name).fill_(value)


def forget_scores(processor: nn.Module | None) -> None:
    """Forget all that a post-processor learned from scores: thresholds and ranges.

    Args:
        processor (nn.Module | None): Post-processor; others than anomalib's are left alone.
    """
    if isinstance(processor, PostProcessor):
        for name in THRESHOLDS:
            getattr(processor, name).fill_(math.nan)


def reset_metrics(*components: nn.Module | None) -> None:
    """Reset the metrics of evaluators and post-processors: what was interrupted leaves scores behind."""
    for component in components:
        for metric in component.modules() if component is not None else ():
            if isinstance(metric, Metric):
                metric.reset()
