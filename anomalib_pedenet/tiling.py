# Copyright (C) 2026 The anomalib-pedenet authors
# SPDX-License-Identifier: Apache-2.0

"""Images scored tile by tile, and what anomalib's ``Tiler`` does for exported graphs.

anomalib copies tiles one by one, which makes a graph of a hundred operations a tile. Here all are taken at once, and
added up row by row.
"""

from collections.abc import Mapping, Sequence
from functools import reduce
from typing import Any

import torch
from anomalib.data.utils.tiler import (
    ImageUpscaleMode,
    Tiler,
    compute_new_image_size,
    downscale_image,
    upscale_image,
)
from torch.nn import functional as F  # noqa: N812 - torch's custom

TILES = "pedenet_tiles"
"""Entry of a checkpoint: how its images are cut into tiles."""


def tile(images: torch.Tensor, tiler: Tiler) -> torch.Tensor:
    """Cut images into tiles, as ``Tiler.tile``.

    Args:
        images (torch.Tensor): Images ``[B, C, H, W]`` of a fixed size, at least as large as a tile.
        tiler (Tiler): Size and stride of the tiles, and how images are filled up to whole ones. It is not changed.

    Returns:
        torch.Tensor: Tiles ``[B * rows * columns, C, h, w]``.
    """
    (height, width), tops, lefts = _layout(images.shape[-2:], tiler)
    images = upscale_image(images, (height, width), tiler.mode)
    rows = torch.tensor(tops, device=images.device)[:, None] + torch.arange(tiler.tile_size_h, device=images.device)
    columns = torch.tensor(lefts, device=images.device)[:, None] + torch.arange(tiler.tile_size_w, device=images.device)
    tiles = images.index_select(2, rows.flatten()).index_select(3, columns.flatten())
    tiles = tiles.unflatten(3, columns.shape).unflatten(2, rows.shape)  # [B, C, rows, h, columns, w]
    return tiles.permute(0, 2, 4, 1, 3, 5).flatten(0, 2)


def untile(tiles: torch.Tensor, size: Sequence[int], tiler: Tiler) -> torch.Tensor:
    """Put tiles together, as ``Tiler.untile``: where they overlap, their mean; 0 where there is none.

    Args:
        tiles (torch.Tensor): Tiles ``[B * rows * columns, C, h, w]``.
        size (Sequence[int]): Height and width of the images from which they were cut.
        tiler (Tiler): As for :func:`tile`.

    Returns:
        torch.Tensor: Images ``[B, C, H, W]``.
    """
    (height, width), tops, lefts = _layout(size, tiler)
    border = tiler.remove_border_count

    def add_up(tiles: torch.Tensor) -> torch.Tensor:
        """Add up tiles ``[B, rows, columns, C, h, w]`` where they belong: first to strips, then these to images."""
        tiles = F.pad(tiles, (-border,) * 4)
        h, w = tiles.shape[-2:]
        places = [(left + border, width - left - border - w) for left in lefts]
        strips = reduce(torch.add, (F.pad(tiles[:, :, index], place) for index, place in enumerate(places)))
        places = [(top + border, height - top - border - h) for top in tops]
        return reduce(torch.add, (F.pad(strips[:, index], (0, 0, *place)) for index, place in enumerate(places)))

    total = add_up(tiles.unflatten(0, (-1, len(tops), len(lefts))))
    count = add_up(torch.ones(1, len(tops), len(lefts), 1, *tiles.shape[-2:], device=tiles.device))
    return downscale_image(total / count.clamp(min=1), size, tiler.mode)


def to_tiles(images: torch.Tensor, tiler: Tiler | None) -> torch.Tensor:
    """Return the tiles of images ``[B, C, H, W]``, or the images where there is no tiler; for graphs and without."""
    if tiler is None:
        return images
    return tile(images, tiler) if torch.compiler.is_compiling() else tiler.tile(images)


def from_tiles(maps: torch.Tensor, size: Sequence[int], tiler: Tiler | None) -> torch.Tensor:
    """Return the maps of images of some height and width from those of :func:`to_tiles`."""
    if tiler is None:
        return maps
    return untile(maps, size, tiler) if torch.compiler.is_compiling() else tiler.untile(maps)


def describe_tiler(tiler: Tiler | None) -> dict[str, Any] | None:
    """Return the arguments of a tiler, for a checkpoint; ``None`` where there is none."""
    if tiler is None:
        return None
    return {
        "tile_size": (tiler.tile_size_h, tiler.tile_size_w),
        "stride": (tiler.stride_h, tiler.stride_w),
        "remove_border_count": tiler.remove_border_count,
        "mode": ImageUpscaleMode(tiler.mode).value,
    }


def make_tiler(arguments: Mapping[str, Any] | None) -> Tiler | None:
    """Return the tiler that :func:`describe_tiler` was given."""
    return None if arguments is None else Tiler(**{**arguments, "mode": ImageUpscaleMode(arguments["mode"])})


def check_tiler(tiler: Tiler, patch_size: int, has_region: bool, by_place: bool, position_weight: float) -> None:
    """Check that a model goes with a tiler.

    Args:
        tiler (Tiler): The tiler.
        patch_size (int): Side in pixels of the largest patches that are scored.
        has_region (bool): Whether a part of the images is left out.
        by_place (bool): Whether patches are scored by what is normal at the same place only.
        position_weight (float): How much a patch's place counts in its distance to normal ones.

    Raises:
        ValueError: If tiles are smaller than a patch, or scores depend on a patch's place in the image, which tiles
            do not have.
    """
    if has_region:
        msg = "Tiles have no place in the image, by which a region of interest (roi) goes: turn tiling off."
        raise ValueError(msg)
    tile_size = (tiler.tile_size_h, tiler.tile_size_w)
    if min(tile_size) < patch_size:
        msg = (
            f"Tiles of {tile_size[0]}x{tile_size[1]} px are smaller than a patch of {patch_size}x{patch_size} px: set "
            f"tile_size to at least {patch_size}."
        )
        raise ValueError(msg)
    if by_place:
        msg = (
            "Tiles have no place in the image, by which the model goes: turn tiling off, or train with tiling, or with "
            "the scorer 'exact'."
        )
        raise ValueError(msg)
    if position_weight:
        msg = (
            f"Tiles have no place in the image, but patches are compared by theirs (position weight "
            f"{position_weight:g}): turn tiling off, or train with position_weight 0, or with tiling and 'auto'."
        )
        raise ValueError(msg)


def _layout(size: Sequence[int], tiler: Tiler) -> tuple[tuple[int, int], range, range]:
    """Return the size to which images are filled up, and the upper and the left edges of the tiles."""
    tile_size, stride = (tiler.tile_size_h, tiler.tile_size_w), (tiler.stride_h, tiler.stride_w)
    height, width = compute_new_image_size(tuple(size), tile_size, stride)
    tops = range(0, height - tile_size[0] + 1, stride[0])
    return (height, width), tops, range(0, width - tile_size[1] + 1, stride[1])
