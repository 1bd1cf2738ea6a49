# Copyright (C) 2026 The anomalib-pedenet authors
# SPDX-License-Identifier: Apache-2.0

"""Which scales are scored, and how much each counts."""

from collections.abc import Mapping, Sequence
from typing import Any

from anomalib_pedenet.kinds import AUTO_SCORER
from anomalib_pedenet.patches import SUB_PATCH_SIZE

MIN_SCALE_WEIGHT = 0.2
"""A scale that counts less beside another, which counts 1, is not worth its time."""

SCORED_MID_LEVEL_SIZES = (16, 24)
"""Sides in pixels of the mid-level patches that are scored by default."""

# In a product of several mid-level scales the finest counts the less the more was learned: nothing from one half on.
_FINEST_UNTIL = 0.5


def default_scored_sizes(patch_sizes: Sequence[int], scorer: str | Mapping[str, Any] = AUTO_SCORER) -> tuple[int, ...]:
    """Return the scales to score where none are given.

    Args:
        patch_sizes (Sequence[int]): Scales that are trained.
        scorer (str | Mapping[str, Any]): Scorer, see :class:`anomalib_pedenet.PedenetModel`. Defaults to ``"auto"``.

    Returns:
        tuple[int, ...]: Mid-level patches and the sub-patches, which between them find fine and coarse defects and of
            which :func:`weigh` leaves some out; the paper's patches too where they count; and those alone where those
            alone are trained.
    """
    smallest = min(patch_sizes)
    if smallest != SUB_PATCH_SIZE:
        return (smallest,)
    return (
        *SCORED_MID_LEVEL_SIZES,
        *(sorted(patch_sizes) if scorer in (AUTO_SCORER, "gaussian_mixture") else [smallest]),
    )


def weigh(
    sizes: Sequence[int], trained: Sequence[int], learned: Mapping[int, float], by_root: bool
) -> dict[int, float]:
    """Weigh the scored scales by how much was learned, if there are mid-level ones.

    Where location prediction stays at chance, as on surfaces that look alike everywhere, the embeddings it is asked
    of have lost what they had at the start and gained nothing; what comes before them in the encoder has lost less.
    So a trained scale counts as far as it has learned, or by the root of that. Mid-level ones count 1. But nearest
    neighbours, which do not go by the root, find too much on the finest one where parts are aligned: of several it
    counts the less the more the smallest trained scale has learned, and not at all from one half on.

    Args:
        sizes (Sequence[int]): Scored scales, the finest first.
        trained (Sequence[int]): Scales that are trained.
        learned (Mapping[int, float]): For each of those, from 0, nothing (location prediction at chance), to 1;
            empty if that is not known, to weigh the scales alike.
        by_root (bool): Whether a scale counts by the root of that, and the finest one whatever was learned.

    Returns:
        dict[int, float]: A weight for each scale: 0 for those that count less than :data:`MIN_SCALE_WEIGHT`, which are
            left out, and take neither memory nor time.
    """
    weights = dict.fromkeys(sizes, 1.0)
    mid_level = [size for size in sizes if size not in trained]
    if mid_level and learned:
        weights = {size: learned.get(size, 1.0) ** (0.5 if by_root else 1) for size in sizes}
        if len(mid_level) > 1 and not by_root:
            weights[sizes[0]] = max(0.0, 1 - learned[min(learned)] / _FINEST_UNTIL)
    return {size: weight if weight >= MIN_SCALE_WEIGHT else 0.0 for size, weight in weights.items()}
