# Copyright (C) 2026 The anomalib-pedenet authors
# SPDX-License-Identifier: Apache-2.0

"""Kinds of images, told apart by normal ones, and what scores each best."""

import math
from dataclasses import dataclass, replace

import torch

AUTO_SCORER = "auto"
"""The scorer that :meth:`anomalib_pedenet.PedenetModel.calibrate` replaces by that of the images' kind."""

_MOST_OF_SURFACES = 0.3  # of the variance of embeddings, explained by the place: 0.1 and less on surfaces
_LEAST_OF_ALIGNED = 0.9  # alignment at the largest weight of the place: 0.94 and more where parts do not move


@dataclass(frozen=True)
class Kind:
    """A kind of images, and how they are scored.

    Attributes:
        name (str): What they show.
        scorer (str): Name of the scorer.
        is_soft_maximum (bool): Whether the scales' maps are joined by the soft maximum, else by their product.
        is_whitened (bool): Whether embeddings are whitened before.
        has_place (bool): Whether a patch's place counts in the search of its nearest neighbour, as far as that helps.
        has_means (bool): Whether each place's mean is taken away before.
        is_relative (bool): Whether each image's own mean is taken away before that.
        kept (float): Part of the whitened directions that is scored, those in which normal embeddings vary most.
        has_extent (bool): Whether images are scored by how much of them is abnormal, too, or by the worst pixel alone.
        reach (float): Part of a patch's side, around its middle, whose pixels have the patch's score.
        fineness (float): How much more fine scales count in the map. One of patches with a side of s counts
            ``(finest / s) ** fineness`` of what it does in images' scores, in which all count alike.
    """

    name: str
    scorer: str
    is_soft_maximum: bool
    is_whitened: bool = False
    has_place: bool = False
    has_means: bool = False
    is_relative: bool = False
    kept: float = 1.0
    has_extent: bool = False
    reach: float = 1.0
    fineness: float = 0.0

    def scored_dimension(self, dimension: int) -> int:
        """Return how many directions of embeddings of a dimension are scored."""
        return math.ceil(self.kept * dimension)


# Small patches show best where a part's defect is, and if parts do not turn, the middle of all patches does. On a
# surface large patches alone may see it.
ALIGNED = Kind("aligned parts", "ppca", is_soft_maximum=False, has_extent=True, reach=0.5, fineness=1.0)
# Where parts move by a few pixels, a place has now this patch and now that, which no Gaussian describes.
NEARLY_ALIGNED = replace(ALIGNED, name="nearly aligned parts", scorer="exact", has_place=True)
LOOSE = Kind("loose parts", "exact", is_soft_maximum=True, is_whitened=True, kept=0.75, has_extent=True, fineness=0.5)
SURFACE = Kind(
    "a surface",
    "gaussian_mixture",
    is_soft_maximum=True,
    is_whitened=True,
    has_means=True,
    is_relative=True,
    kept=0.75,
    has_extent=True,
    reach=0.75,
)

_BLURRED = tuple(replace(kind, reach=1.0, fineness=0.0) for kind in (ALIGNED, LOOSE, SURFACE))
_BY_WORST_PIXEL = tuple(replace(kind, has_extent=False) for kind in _BLURRED)

KINDS = (
    Kind("no aligned parts", "gaussian_mixture", is_soft_maximum=True),
    Kind("aligned parts", "exact", is_soft_maximum=False),
    _BY_WORST_PIXEL[0],
    replace(_BY_WORST_PIXEL[1], kept=1.0),
    replace(_BY_WORST_PIXEL[2], is_relative=False, kept=1.0),
    *_BY_WORST_PIXEL[1:],
    *_BLURRED,
    ALIGNED,
    replace(LOOSE, fineness=0.25),
    SURFACE,
    LOOSE,
    NEARLY_ALIGNED,
)
"""All kinds, in the order of their numbers in checkpoints. Those that are no constant are of earlier versions."""


def kind_of_number(number: int) -> Kind:
    """Return the kind that has a number in checkpoints.

    Raises:
        ValueError: If no kind has it.
    """
    if number < len(KINDS):
        return KINDS[number]
    msg = f"The checkpoint holds a kind {number} of images, of a later version of anomalib-pedenet: install that."
    raise ValueError(msg)


def share_of_place(grids: torch.Tensor, chosen: torch.Tensor | None = None) -> float:
    """Measure how much of normal embeddings' variance is explained by their place in the image.

    Each image's embeddings are predicted by the mean of the *other* images at the same place. The share is near 0 on a
    surface, which looks alike everywhere, near 1 where parts are aligned, and between where they lie loosely before a
    background: the middle of the image differs from its border.

    Args:
        grids (torch.Tensor): Embeddings ``[N, Z, h, w]`` of N normal images.
        chosen (torch.Tensor | None): Patches to look at, bool ``[h, w]``. Defaults to ``None``, all.

    Returns:
        float: The share, 1 at most; below 0 where the mean of the others predicts nothing; 0 if nothing varies, or of
            a single image.
    """
    count = len(grids)
    if count < 2:
        return 0.0
    rows = (grids.flatten(2) if chosen is None else grids[..., chosen]).float()  # [N, Z, P]
    of_place = rows.mean(dim=0)
    of_all = of_place.mean(dim=1, keepdim=True)
    # Image by image, for there may be many patches.
    around_all = sum(float((image - of_all).square().sum()) for image in rows)
    # An image less the mean of the others is count / (count - 1) times itself less the mean of all.
    around_others = sum(float((image - of_place).square().sum()) for image in rows) * (count / (count - 1)) ** 2
    return 1 - around_others / around_all if around_all > 0 else 0.0


def aligned_kind(alignment: float) -> Kind:
    """Return the kind of images with parts that are aligned, by how well.

    Args:
        alignment (float): Alignment at the largest weight of the place, see
            :func:`anomalib_pedenet.scorers.position.measure_alignment`.
    """
    return ALIGNED if alignment >= _LEAST_OF_ALIGNED else NEARLY_ALIGNED


def unaligned_kind(share: float) -> Kind:
    """Return the kind of images without aligned parts, by :func:`share_of_place`."""
    return SURFACE if share < _MOST_OF_SURFACES else LOOSE
