# Copyright (C) 2026 The anomalib-pedenet authors
# SPDX-License-Identifier: Apache-2.0

"""A threshold for a wished rate of false alarms, from good images alone.

Of n good images that the model does not know and one more, each is as likely as any other to have the highest score.
So a threshold at the k-th lowest of the n scores is exceeded by a further good image with a probability of at most
``1 - k / (n + 1)``, however scores are distributed (split conformal prediction). Images that the model was trained on
count too, if each is scored by scorers that were fitted without it.

Reference:
    V. Vovk, A. Gammerman, G. Shafer, "Algorithmic Learning in a Random World", 2005, section 4.2; A. Angelopoulos,
    S. Bates, "A gentle introduction to conformal prediction", https://arxiv.org/abs/2107.07511, sections 1 and 3.2.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

from scipy.stats import beta

DEFAULT_RATE = 0.01
"""Fraction of good images that may be flagged, where nothing else is asked for and there are images enough."""


class FalseAlarmThreshold(NamedTuple):
    """A threshold, and what may be expected of it.

    Attributes:
        threshold (float): Score above which an image is called defective, as the model gives it before normalisation.
        rate (float): Largest mean rate of false alarms, over sets of good images like those it was chosen by.
        low (float): Lower end of the interval that holds the rate with this set of good images in 95 % of cases.
        high (float): Upper end of it.
        num_images (int): Good images that it was chosen by.
    """

    threshold: float
    rate: float
    low: float
    high: float
    num_images: int


def lowest_rate(num_images: int) -> float:
    """Return the lowest rate of false alarms that can be kept by a number of good images."""
    return 1 / (num_images + 1)


def choose_threshold(scores: Sequence[float], rate: float) -> FalseAlarmThreshold:
    """Choose the lowest threshold that keeps a rate of false alarms.

    Args:
        scores (Sequence[float]): Scores of good images that the model was not fitted on.
        rate (float): Largest fraction of good images that may be called defective, above 0 and below 1.

    Returns:
        FalseAlarmThreshold: The threshold.

    Raises:
        ValueError: If the rate is outside its range, a score is not finite, or there are too few images for the rate;
            the message says how many it takes.

    Examples:
        >>> found = choose_threshold([0.1, 0.4, 0.2, 0.3], rate=0.25)
        >>> found.threshold, found.rate
        (0.4, 0.2)
    """
    if not 0 < rate < 1:
        msg = f"The rate of false alarms must be above 0 and below 1, 0.01 for 1 in 100, got {rate:g}."
        raise ValueError(msg)
    if not all(map(math.isfinite, scores)):
        msg = "A score of a good image is not finite: no threshold can be chosen by it."
        raise ValueError(msg)
    count = len(scores)
    # Tolerant of rounding: a rate of 1 in 10 with 9 images is just possible.
    rank = math.ceil((1 - rate) * (count + 1) - 1e-9)
    if rank > count:
        needed = math.ceil(1 / rate - 1 - 1e-9)
        msg = (
            f"With {count} good image(s) no rate below 1 in {count + 1} ({lowest_rate(count):.2%}) can be kept, and "
            f"{rate:.2%} was asked for: give {needed} or more, or allow a higher rate."
        )
        raise ValueError(msg)
    above = count + 1 - rank
    return FalseAlarmThreshold(
        threshold=sorted(scores)[rank - 1],
        rate=above / (count + 1),
        low=float(beta.ppf(0.025, above, rank)),
        high=float(beta.ppf(0.975, above, rank)),
        num_images=count,
    )


def default_threshold(scores: Sequence[float]) -> FalseAlarmThreshold:
    """Choose the threshold for :data:`DEFAULT_RATE`, or for the lowest rate that so many images can keep.

    Args:
        scores (Sequence[float]): See :func:`choose_threshold`.

    Returns:
        FalseAlarmThreshold: The threshold.

    Raises:
        ValueError: If a score is not finite.
    """
    return choose_threshold(scores, max(DEFAULT_RATE, lowest_rate(len(scores))))
