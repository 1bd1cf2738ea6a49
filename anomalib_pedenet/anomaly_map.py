# Copyright (C) 2026 The anomalib-pedenet authors
# SPDX-License-Identifier: Apache-2.0

"""From patch scores to pixel scores: the mean over all patches that cover a pixel (section 3.4 of the paper).

Patches lie on a grid, in steps of the stride. The mean over those that cover a pixel would change from one pixel to the
next at each step and be constant between, so that the map would look like a mosaic. So patches are weighed by how much
of a window around the pixel they cover, as wide as a step: then the map changes evenly. At the finest stride, the
paper's, both are the same but for a pixel or two. A map is sharper if a patch covers no more than the pixels in its
middle.

On a regular grid of square patches this is separable: ``map = A_h @ scores @ A_w.T`` with one small averaging matrix
for each axis. It takes a few million multiplications for a 256x256 image at the finest stride, and exports as two
matrix products.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch

from anomalib_pedenet.patches import grid_size

Combination = Literal["auto", "product", "mean"]
JoinWay = Literal["soft maximum", "product", "mean"]

# Least spread of normal images' highest scores, as a fraction of that of all their pixels' scores.
_LEAST_SPREAD = 0.1


def averaging_matrix(
    size: int,
    patch_size: int,
    stride: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | None = None,
    reach: float = 1.0,
) -> torch.Tensor:
    """Return the matrix that averages patch scores over the patches that cover each pixel of one axis, and its window.

    Args:
        size (int): Side H of the image along the axis, in pixels.
        patch_size (int): Side of a patch in pixels.
        stride (int): Distance between neighbouring patches in pixels.
        dtype (torch.dtype): Type of the result.
        device (torch.device | None): Device of the result.
        reach (float): Part of a patch's side, around its middle, that the patch is taken to cover, above 0. Defaults to
            ``1.0``, all of it.

    Returns:
        torch.Tensor: ``[H, h]`` for h patches along the axis, each row summing to 1: in proportion to how much of the
            pixel's window, ``stride`` wide with the pixel in its middle, a patch covers. Pixels that are not covered,
            at the edges, have the row of the nearest that is: fewer than ``stride`` where the stride does not divide
            ``size - patch_size``, and more where patches cover their middle alone.

    Raises:
        ValueError: If the image is smaller than a patch.

    Examples:
        >>> averaging_matrix(5, patch_size=2, stride=1)
        tensor([[1.0000, 0.0000, 0.0000, 0.0000],
                [0.5000, 0.5000, 0.0000, 0.0000],
                [0.0000, 0.5000, 0.5000, 0.0000],
                [0.0000, 0.0000, 0.5000, 0.5000],
                [0.0000, 0.0000, 0.0000, 1.0000]])
        >>> averaging_matrix(8, patch_size=4, stride=4)[1:7, 0]
        tensor([1.0000, 0.8750, 0.6250, 0.3750, 0.1250, 0.0000])
    """
    count = grid_size((size, size), patch_size, stride)[0]
    side = reach * patch_size
    margin = (patch_size - side) / 2
    starts = torch.arange(count, device=device) * stride + margin  # [h]
    first, last = margin + 0.5, (count - 1) * stride + margin + side - 0.5
    centers = (torch.arange(size, device=device) + 0.5).clamp(first, last)[:, None]  # [H, 1]
    stops = torch.minimum(centers + stride / 2, starts + side)
    covered = (stops - torch.maximum(centers - stride / 2, starts)).clamp(min=0).to(dtype)  # [H, h]
    return covered / covered.sum(dim=1, keepdim=True)


def scores_to_map(
    scores: torch.Tensor, image_size: tuple[int, int], patch_size: int, stride: int, reach: float = 1.0
) -> torch.Tensor:
    """Turn patch scores into pixel scores: the mean over the patches that cover each pixel, see the module.

    Args:
        scores (torch.Tensor): Patch scores ``[B, h, w]`` on the grid of :func:`anomalib_pedenet.patches.grid_size`.
        image_size (tuple[int, int]): Height and width of the images in pixels.
        patch_size (int): Side of a patch in pixels.
        stride (int): Distance between neighbouring patches in pixels.
        reach (float): See :func:`averaging_matrix`. Defaults to ``1.0``.

    Returns:
        torch.Tensor: Pixel scores ``[B, 1, H, W]`` in the unit of the patch scores.

    Raises:
        ValueError: If the image is smaller than a patch or the scores are not on its grid.
    """
    expected = grid_size(image_size, patch_size, stride)
    if tuple(scores.shape[-2:]) != expected:
        msg = f"Scores of a {image_size} image at stride {stride} must be {expected}, got {tuple(scores.shape[-2:])}."
        raise ValueError(msg)
    rows, columns = (
        averaging_matrix(int(size), patch_size, stride, scores.dtype, scores.device, reach) for size in image_size
    )
    return (rows @ scores @ columns.T)[:, None]


def combine_maps(
    maps: Sequence[torch.Tensor],
    weights: Sequence[float] | None = None,
    combination: Literal["product", "mean"] = "product",
) -> torch.Tensor:
    """Join the anomaly maps of several scales.

    Args:
        maps (Sequence[torch.Tensor]): Non-negative maps of equal shape, each divided by the typical score of normal
            patches at its scale.
        weights (Sequence[float] | None): How much each map counts, above 0. Defaults to all alike.
        combination (Combination): ``"product"`` for the geometric mean, which ranks pixels as the product does and
            keeps the unit; ``"mean"`` for the arithmetic mean. Defaults to ``"product"``.

    Returns:
        torch.Tensor: One map of the same shape.

    Raises:
        ValueError: If ``combination`` is unknown.
    """
    weights = weights or [1.0] * len(maps)
    shares = [weight / sum(weights) for weight in weights]
    if combination == "product":
        factors = [scores if share == 1 else scores.pow(share) for scores, share in zip(maps, shares, strict=True)]
        return torch.stack(factors).prod(dim=0)
    if combination == "mean":
        return torch.stack([share * scores for scores, share in zip(maps, shares, strict=True)]).sum(dim=0)
    msg = f"combination must be 'product' or 'mean', got {combination!r}."
    raise ValueError(msg)


def soft_maximum(
    maps: Sequence[torch.Tensor], offsets: torch.Tensor, spreads: torch.Tensor, weights: Sequence[float]
) -> torch.Tensor:
    """Join the anomaly maps of several scales such that what one of them alone finds stands out.

    Each map is measured by what normal images score: less its mean, in units of how far their highest scores differ. A
    scale on which good images have hot places here and there thus counts less. The result is the logarithm of the sum
    of exponentials, a smooth maximum.

    Args:
        maps (Sequence[torch.Tensor]): Maps of equal shape, at least 0.
        offsets (torch.Tensor): For each scale, the mean score of normal images' pixels, ``[S]``.
        spreads (torch.Tensor): For each scale, the standard deviation of normal images' highest scores, ``[S]``.
        weights (Sequence[float]): How much each scale counts, above 0.

    Returns:
        torch.Tensor: One map of the same shape, at least 0.
    """
    units = spreads / torch.tensor(weights).to(spreads)
    # Where all scores are 0 it is at least -min(offsets / units).
    joined = torch.logsumexp(torch.stack(measure_maps(maps, offsets, spreads, weights)), dim=0)
    return joined + (offsets / units).max()


class Join(NamedTuple):
    """How the anomaly maps of several scales become one.

    Attributes:
        way (JoinWay): ``"soft maximum"``, see :func:`soft_maximum`, or one of :func:`combine_maps`.
        weights (list[float]): How much each scale counts, above 0.
        offsets (torch.Tensor): For the soft maximum, see there, ``[S]``.
        spreads (torch.Tensor): Likewise.
    """

    way: JoinWay
    weights: list[float]
    offsets: torch.Tensor
    spreads: torch.Tensor

    def __call__(self, maps: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return the map ``[B, 1, H, W]`` of those of the scales."""
        if self.way == "soft maximum":
            return soft_maximum(maps, self.offsets, self.spreads, self.weights)
        return combine_maps(maps, self.weights, self.way)

    def parts(self, maps: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Return what each scale adds to the map, comparable between scales, each of the shape of its map.

        They are the exponents of the soft maximum, the logarithms of the factors of a product, or the terms of a sum.
        """
        if self.way == "soft maximum":
            return measure_maps(maps, self.offsets, self.spreads, self.weights)
        least = torch.finfo(torch.float32).tiny
        units = maps if self.way == "mean" else [scores.clamp(min=least).log() for scores in maps]
        return [weight * scores for weight, scores in zip(self.weights, units, strict=True)]


def image_scores(anomaly_map: torch.Tensor, has_extent: bool, visible: torch.Tensor | float = 1.0) -> torch.Tensor:
    """Score images by their maps.

    The highest score alone (section 3.4 of the paper) knows a defect by its worst pixel, and on a good image it is
    mere chance. Together with the mean, large defects that are nowhere extreme stand out, too.

    Args:
        anomaly_map (torch.Tensor): Maps ``[B, 1, H, W]``, at least 0, and 0 where hidden.
        has_extent (bool): Whether to return the geometric mean of a map's maximum and its mean, else the maximum.
        visible (torch.Tensor | float): Share of the pixels that are not hidden. Defaults to ``1.0``.

    Returns:
        torch.Tensor: Scores ``[B]`` in the unit of the maps.
    """
    highest = anomaly_map.amax(dim=(1, 2, 3))
    return (highest * anomaly_map.mean(dim=(1, 2, 3)) / visible).sqrt() if has_extent else highest


def measure_maps(
    maps: Sequence[torch.Tensor], offsets: torch.Tensor, spreads: torch.Tensor, weights: Sequence[float]
) -> list[torch.Tensor]:
    """Measure each scale's map by what normal images score; see :func:`soft_maximum`, which joins the results."""
    units = spreads / torch.tensor(weights).to(spreads)
    return [scores / unit - offset for scores, unit, offset in zip(maps, units, offsets / units, strict=True)]


def measure_normal(scale: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Measure what normal images score at a scale, for :func:`soft_maximum`.

    Args:
        scale (Sequence[torch.Tensor]): Scores of each image's pixels, of any shape.

    Returns:
        tuple[torch.Tensor, torch.Tensor]: Offset and spread, scalars.
    """
    pixels = torch.cat([scores.flatten() for scores in scale])
    highest = torch.stack([scores.max() for scores in scale])
    spread = highest.std() if len(highest) > 1 else pixels.std()
    # Images may be alike in their highest score: few of them by chance, and all where rows of a bank lie as far apart.
    return pixels.mean(), spread.clamp(min=_LEAST_SPREAD * pixels.std()).clamp(min=1e-6)
