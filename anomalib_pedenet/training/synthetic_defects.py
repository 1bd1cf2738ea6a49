# Copyright (C) 2026 The anomalib-pedenet authors
# SPDX-License-Identifier: Apache-2.0

"""Defects drawn on normal crops, for the embeddings to learn to tell from what is normal.

Location prediction learns nothing from a surface that looks alike everywhere. Defects drawn at random do: blobs and
strokes of any size, filled with other content of the training images, with the crop's own content in another colour
or contrast, or with a flat colour. The idea is that of CutPaste and NSA.

Reference:
    C.-L. Li et al., "CutPaste", CVPR 2021, https://arxiv.org/abs/2104.04015.
    H. M. Schlueter et al., "Natural Synthetic Anomalies", ECCV 2022, https://arxiv.org/abs/2109.15222.
"""

import torch
from torch.nn import functional as F  # noqa: N812

MIN_COVERAGE = 0.002
"""A patch is defective if at least this fraction of its area is: 2 pixels of a 32-px patch, 8 of a 64-px one."""


def smooth_noise(
    num_images: int, size: tuple[int, int], cells: int, device: torch.device | None = None
) -> torch.Tensor:
    """Draw smooth random fields: normal noise on a coarse grid, interpolated.

    Args:
        num_images (int): Number of fields N.
        size (tuple[int, int]): Height and width in pixels.
        cells (int): Side of the coarse grid; larger for finer structure.
        device (torch.device | None): Device of the result.

    Returns:
        torch.Tensor: ``[N, 1, H, W]``, each of unit root mean square.
    """
    field = F.interpolate(
        torch.randn(num_images, 1, cells, cells, device=device),
        size=size,
        mode="bicubic",
        align_corners=True,
    )
    return field / field.square().mean(dim=(1, 2, 3), keepdim=True).sqrt()


def draw_masks(num_images: int, size: tuple[int, int], device: torch.device | None = None) -> torch.Tensor:
    """Draw masks of random defects: blobs (three in five) or thin strokes.

    Blobs are where a smooth field is high, strokes where it crosses zero, cut to pieces by a second field.

    Args:
        num_images (int): Number of masks N.
        size (tuple[int, int]): Height and width in pixels.
        device (torch.device | None): Device of the result.

    Returns:
        torch.Tensor: Float masks of zeros and ones, ``[N, 1, H, W]``. Some are empty.
    """

    def uniform(low: float, high: float) -> torch.Tensor:
        return low + (high - low) * torch.rand(num_images, 1, 1, 1, device=device)

    field = smooth_noise(num_images, size, int(torch.randint(3, 8, ())), device)
    pieces = smooth_noise(num_images, size, int(torch.randint(2, 6, ())), device)
    blobs = field > uniform(1.2, 2.4)
    strokes = (field.abs() < uniform(0.04, 0.16)) & (pieces > uniform(0.6, 1.4))
    return torch.where(uniform(0, 1) < 0.6, blobs, strokes).float()


def draw_defects(crops: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw defects on normal crops.

    Half of the defects show another crop (shifted, perhaps mirrored, perhaps in another colour), three in ten the crop
    itself in another colour and contrast, the rest a flat or noisy colour. They cover what is below by 40 to 100 % and
    have soft edges.

    Args:
        crops (torch.Tensor): Standardised crops ``[N, C, H, W]``.

    Returns:
        tuple[torch.Tensor, torch.Tensor]: Crops with defects, as the input in shape and type, and the masks of the
            defects ``[N, 1, H, W]``, zeros and ones.
    """
    num_crops, channels, height, width = crops.shape
    device = crops.device

    def normal(num_channels: int = channels) -> torch.Tensor:
        return torch.randn(num_crops, num_channels, 1, 1, device=device)

    def uniform() -> torch.Tensor:
        return torch.rand(num_crops, 1, 1, 1, device=device)

    shift = (int(torch.randint(height, ())), int(torch.randint(width, ())))
    other = crops[torch.randperm(num_crops, device=device)].roll(shift, dims=(2, 3))
    mirrored = [axis for axis in (2, 3) if torch.rand(()) < 0.5]
    other = other.flip(mirrored) + 0.7 * normal() * (uniform() < 0.5)
    own = crops * (1 + 0.5 * normal(1)) + 0.7 * normal()
    flat = crops.mean(dim=(2, 3), keepdim=True) + normal() + 0.2 * uniform() * torch.randn_like(crops)

    kind = uniform()
    content = torch.where(kind < 0.5, other, torch.where(kind < 0.8, own, flat))
    masks = draw_masks(num_crops, (height, width), device)
    soft = F.avg_pool2d(F.pad(masks, (1, 1, 1, 1), mode="replicate"), kernel_size=3, stride=1)
    opacity = (0.4 + 0.6 * uniform()) * soft
    return crops + opacity * (content - crops), masks


def label_patches(masks: torch.Tensor, patch_size: int, stride: int) -> torch.Tensor:
    """Tell which patches hold a defect.

    Args:
        masks (torch.Tensor): Masks ``[N, 1, H, W]``, zeros and ones.
        patch_size (int): Side of a patch in pixels.
        stride (int): Distance between neighbouring patches in pixels.

    Returns:
        torch.Tensor: Float labels of zeros and ones ``[N, h, w]``, where ``(h, w)`` is
            :func:`anomalib_pedenet.patches.grid_size`.
    """
    # Along one axis, then the other: a mean over 64 pixels instead of over 1,024.
    columns = F.avg_pool2d(masks, (patch_size, 1), (stride, 1))
    return (F.avg_pool2d(columns, (1, patch_size), (1, stride)) >= MIN_COVERAGE).float()[:, 0]
