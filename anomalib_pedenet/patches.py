# Copyright (C) 2026 The anomalib-pedenet authors
# SPDX-License-Identifier: Apache-2.0

"""Geometry of patches: the regular grid of patches in an image, and the random crops, patches and pairs of training.

All sizes are ``(height, width)`` in pixels of the network's input. A patch's position is its top left corner. Random
choices are made on the tensors' own device and never read back, so a training step does not wait for them.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch

PATCH_SIZE = 64
"""Side of a patch, in pixels (the paper's)."""

SUB_PATCH_SIZE = 32
"""Side of a sub-patch, which the small encoder embeds, in pixels."""

MID_LEVEL_SIZES = (12, 16, 20, 24, 28)
"""Sides of the patches that the small encoder has seen on its way to a sub-patch, in pixels."""

BASE_STRIDE = 2
"""Finest distance between neighbouring patches that dense evaluation yields: the stride of the first convolution."""

_SMALLER_SCALE_REMEDY = {PATCH_SIZE: f", or use the smaller scale only (patch_sizes=[{SUB_PATCH_SIZE}])"}

NEIGHBOR_DIRECTIONS = ((-1, -1), (-1, 0), (-1, 1), (0, -1), (0, 1), (1, -1), (1, 0), (1, 1))
"""``(row, column)`` directions of the eight neighbours; the index is the class that location prediction predicts."""


def grid_size(image_size: tuple[int, int], patch_size: int, stride: int) -> tuple[int, int]:
    """Return how many patches fit into an image, along its height and its width.

    Args:
        image_size (tuple[int, int]): Height and width of the image in pixels.
        patch_size (int): Side of a patch in pixels.
        stride (int): Distance between neighbouring patches in pixels.

    Returns:
        tuple[int, int]: Rows and columns of the grid of patches.

    Raises:
        ValueError: If the image is smaller than a patch.

    Examples:
        >>> grid_size((256, 256), patch_size=64, stride=2)
        (97, 97)
    """
    height, width = image_size
    if height < patch_size or width < patch_size:
        msg = (
            f"The image is {height}x{width} px, smaller than a patch of {patch_size}x{patch_size} px: enlarge it "
            f"(image_size) to at least {patch_size} px a side{_SMALLER_SCALE_REMEDY.get(patch_size, '')}."
        )
        raise ValueError(msg)
    return (height - patch_size) // stride + 1, (width - patch_size) // stride + 1


def minimum_training_size(patch_size: int) -> int:
    """Return the smallest image side in pixels that holds a patch and one of its neighbours.

    Args:
        patch_size (int): Side of a patch in pixels.

    Returns:
        int: A patch, plus the smallest offset of a neighbour, three quarters of a patch.
    """
    return patch_size + 3 * patch_size // 4


class NeighborPairs(NamedTuple):
    """Random pairs of neighbouring patches, for location prediction.

    Attributes:
        positions (torch.Tensor): ``(row, column)`` of the centre patches, int64 ``[..., 2]``.
        neighbor_positions (torch.Tensor): ``(row, column)`` of their neighbours, int64 ``[..., 2]``.
        directions (torch.Tensor): Index into :data:`NEIGHBOR_DIRECTIONS`, int64 ``[...]``.
    """

    positions: torch.Tensor
    neighbor_positions: torch.Tensor
    directions: torch.Tensor


def sample_neighbor_pairs(
    num_pairs: int | tuple[int, ...],
    image_size: tuple[int, int],
    patch_size: int,
    step: int = 1,
    device: torch.device | None = None,
) -> NeighborPairs:
    """Draw pairs of neighbouring patches for location prediction.

    The neighbour lies in one of eight directions, 3/4 of a patch plus a random jitter below 1/4 of a patch away along
    each axis of that direction (Patch-SVDD, section 3.2). Directions are uniform; the centre patch is uniform over the
    positions from which the neighbour stays inside the image.

    Args:
        num_pairs (int | tuple[int, ...]): Number of pairs, or a shape of them.
        image_size (tuple[int, int]): Height and width of the image or crop in pixels.
        patch_size (int): Side of a patch in pixels.
        step (int): Positions are multiples of this many pixels. Defaults to ``1``.
        device (torch.device | None): Device of the result. Defaults to the current one.

    Returns:
        NeighborPairs: Positions in pixels.

    Raises:
        ValueError: If no pair fits into the image.
    """
    smallest = minimum_training_size(patch_size)
    if min(image_size) < smallest:
        msg = (
            f"The image or crop is {image_size[0]}x{image_size[1]} px, but a pair of neighbouring {patch_size}-px "
            f"patches needs at least {smallest}x{smallest} px: use larger images (image_size) or crops "
            f"(crop_size){_SMALLER_SCALE_REMEDY.get(patch_size, '')}."
        )
        raise ValueError(msg)
    shape = (num_pairs,) if isinstance(num_pairs, int) else tuple(num_pairs)
    # Largest position along each axis and largest offset that fits, both in steps.
    limits = _vector([(side - patch_size) // step for side in image_size], device)  # [2]
    nearest = -(-(3 * patch_size // 4) // step)
    farthest = torch.clamp(limits, max=(patch_size - 1) // step)  # [2]

    directions = torch.randint(len(NEIGHBOR_DIRECTIONS), shape, device=device)
    cells = directions + (directions >= len(NEIGHBOR_DIRECTIONS) // 2)  # of the 3x3 around a patch, without its own
    signs = torch.stack([cells // 3, cells % 3], dim=-1) - 1  # [..., 2]
    jitter = (torch.rand(*shape, 2, device=device) * (farthest - nearest + 1)).long()
    offsets = signs * (nearest + jitter)  # [..., 2]
    positions = _sample_pair_positions(offsets, limits)
    return NeighborPairs(positions * step, (positions + offsets) * step, directions)


def sample_jittered_pairs(
    num_pairs: int | tuple[int, ...],
    image_size: tuple[int, int],
    patch_size: int,
    step: int = 1,
    device: torch.device | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw pairs of nearly the same patch, for Patch-SVDD's compactness loss.

    The second patch lies up to 1/32 of a patch (at least one step) away along each axis, and not at the same place:
    2 px at 64 px and 1 px at 32 px, as in Patch-SVDD's published code. Offsets are uniform; the first patch is uniform
    over the positions from which the second stays inside the image.

    Args:
        num_pairs (int | tuple[int, ...]): Number of pairs, or a shape of them.
        image_size (tuple[int, int]): Height and width of the image or crop in pixels, at least a patch and a jitter.
        patch_size (int): Side of a patch in pixels.
        step (int): Positions are multiples of this many pixels. Defaults to ``1``.
        device (torch.device | None): Device of the result. Defaults to the current one.

    Returns:
        tuple[torch.Tensor, torch.Tensor]: ``(row, column)`` in pixels of the first and of the second patches, int64
            ``[..., 2]`` each.
    """
    shape = (num_pairs,) if isinstance(num_pairs, int) else tuple(num_pairs)
    limits = _vector([(side - patch_size) // step for side in image_size], device)  # [2]
    reach = max(1, patch_size // 32 // step)
    side = 2 * reach + 1
    center = side * side // 2  # the one offset of a square of them that is none
    drawn = torch.randint(side * side - 1, shape, device=device)
    drawn = drawn + (drawn >= center)
    offsets = torch.stack([drawn // side, drawn % side], dim=-1) - reach  # [..., 2]
    positions = _sample_pair_positions(offsets, limits)
    return positions * step, (positions + offsets) * step


def _vector(values: Sequence[int], device: torch.device | None) -> torch.Tensor:
    """Return whole numbers as a vector, filled on the device: a copy from the host would wait for all work before."""
    return torch.stack([torch.full((), value, device=device) for value in values])


def _sample_pair_positions(offsets: torch.Tensor, limits: torch.Tensor) -> torch.Tensor:
    """Draw uniform positions of patches whose partners, at given offsets, stay inside the image, all in steps.

    Args:
        offsets (torch.Tensor): ``(row, column)`` from each patch to its partner, int64 ``[..., 2]``.
        limits (torch.Tensor): Largest position along each axis, int64 ``[2]``.

    Returns:
        torch.Tensor: Positions of the patches, int64 ``[..., 2]``.
    """
    lowest = (-offsets).clamp(min=0)
    highest = limits - offsets.clamp(min=0)
    return lowest + (torch.rand(*offsets.shape, device=offsets.device) * (highest - lowest + 1)).long()


def sample_positions(
    num_positions: int,
    image_size: tuple[int, int],
    window_size: tuple[int, int],
    device: torch.device | None = None,
) -> torch.Tensor:
    """Draw uniform positions of a window (a patch or a crop) inside an image.

    Args:
        num_positions (int): Number of positions N.
        image_size (tuple[int, int]): Height and width of the image in pixels.
        window_size (tuple[int, int]): Height and width of the window in pixels, not larger than the image's.
        device (torch.device | None): Device of the result. Defaults to the current one.

    Returns:
        torch.Tensor: ``(row, column)`` in pixels, int64 ``[N, 2]``.
    """
    limits = _vector([side - window + 1 for side, window in zip(image_size, window_size, strict=True)], device)
    return (torch.rand(num_positions, 2, device=device) * limits).long()


def extract_patches(
    images: torch.Tensor,
    indices: torch.Tensor,
    positions: torch.Tensor,
    window_size: tuple[int, int],
) -> torch.Tensor:
    """Cut windows (patches or crops) out of a batch of images, all at once.

    Args:
        images (torch.Tensor): ``[B, C, H, W]`` images.
        indices (torch.Tensor): Image of each window, int64 ``[N]`` in ``0..B-1``.
        positions (torch.Tensor): ``(row, column)`` of each window's top left corner in pixels, int64 ``[N, 2]``.
        window_size (tuple[int, int]): Height h and width w of the windows in pixels.

    Returns:
        torch.Tensor: Windows ``[N, C, h, w]``.
    """
    height, width = window_size
    rows = (positions[:, 0, None] + torch.arange(height, device=images.device))[:, None, :, None]  # [N, 1, h, 1]
    columns = (positions[:, 1, None] + torch.arange(width, device=images.device))[:, None, None, :]  # [N, 1, 1, w]
    channels = torch.arange(images.shape[1], device=images.device)[None, :, None, None]
    return images[indices[:, None, None, None], channels, rows, columns]


def gather_embeddings(grid: torch.Tensor, positions: torch.Tensor, stride: int) -> torch.Tensor:
    """Read embeddings out of a dense grid.

    Args:
        grid (torch.Tensor): Embeddings ``[B, Z, h, w]`` at ``stride``.
        positions (torch.Tensor): ``(row, column)`` in pixels, multiples of ``stride``, int64 ``[B, P, 2]``.
        stride (int): Distance between neighbouring embeddings of the grid in pixels.

    Returns:
        torch.Tensor: Embeddings ``[B, P, Z]``.
    """
    num_grids, channels, height, width = grid.shape
    rows = grid.permute(0, 2, 3, 1).reshape(-1, channels)  # a view where the grid is channels-last
    first = torch.arange(num_grids, device=grid.device)[:, None] * (height * width)  # row of each grid's first entry
    indices = first + (positions[..., 0] // stride) * width + positions[..., 1] // stride  # [B, P]
    # `index_select`, since its gradient is several times cheaper than that of indexing or `gather`.
    return rows.index_select(0, indices.flatten()).unflatten(0, indices.shape)


def disturb(images: torch.Tensor, color_shift: float = 0.1, noise: float = 0.1) -> torch.Tensor:
    """Give each image its own colour shift and its own noise.

    Without it, location prediction learns from what a camera adds to a whole image instead of from its content: the
    two patches of a pair must not share a disturbance.

    Args:
        images (torch.Tensor): ``[N, C, H, W]`` images or patches, normalised to about unit variance.
        color_shift (float): Standard deviation of the shift of each image and channel, in units of the images'
            standard deviation. Defaults to ``0.1``.
        noise (float): Standard deviation of the noise of each pixel and channel, likewise. Defaults to ``0.1``.

    Returns:
        torch.Tensor: Disturbed images, as the input in shape and type.
    """
    if color_shift > 0:
        images = images + color_shift * torch.randn_like(images[..., :1, :1])
    if noise > 0:
        images = images + noise * torch.randn_like(images)
    return images
