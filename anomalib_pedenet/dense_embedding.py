# Copyright (C) 2026 The anomalib-pedenet authors
# SPDX-License-Identifier: Apache-2.0

"""Embeddings of all patches of images, without more memory for larger ones."""

from collections.abc import Sequence

import torch

from anomalib_pedenet.networks import PatchEmbeddingNetwork
from anomalib_pedenet.patches import grid_size

STRIP_PIXELS = 2**20
"""A CPU embeds larger images in strips of about so many pixels, whose feature maps take some hundred MiB."""


def embed_images(
    network: PatchEmbeddingNetwork, images: torch.Tensor, stride: int, sizes: Sequence[int]
) -> dict[int, torch.Tensor]:
    """Embed all patches of images.

    Args:
        network (PatchEmbeddingNetwork): Embedding network.
        images (torch.Tensor): Standardised images ``[B, 3, H, W]``.
        stride (int): Distance between neighbouring patches in pixels.
        sizes (Sequence[int]): Sides of the patches.

    Returns:
        dict[int, torch.Tensor]: Embeddings ``[B, Z, h, w]`` by size.

    Raises:
        ValueError: If the images are smaller than a patch.
    """
    if torch.jit.is_tracing() or torch.compiler.is_compiling() or images.device.type != "cpu":
        return network.embed_dense(images, stride, sizes)
    # One by one, the feature maps of images stay in a CPU's cache: twice as fast as a batch of 32, and less memory.
    grids = [_embed_in_strips(network, image, stride, sizes) for image in images.split(1)]
    return {size: torch.cat([grid[size] for grid in grids]) for size in sizes}


def _embed_in_strips(
    network: PatchEmbeddingNetwork, image: torch.Tensor, stride: int, sizes: Sequence[int]
) -> dict[int, torch.Tensor]:
    """Embed an image ``[1, 3, H, W]`` strip by strip, so that a large one takes no more memory.

    A strip is some rows of patches, with all pixels that they see. Nothing pads, so the result is that of the whole
    image.
    """
    height, width = image.shape[-2:]
    num_rows, _ = grid_size((height, width), max(sizes), stride)
    rows_per_strip = max(1, STRIP_PIXELS // (width * stride))
    strips = []
    for first in range(0, num_rows, rows_per_strip):
        is_last = first + rows_per_strip >= num_rows
        # Of smaller patches the last strip has more rows.
        stop = height if is_last else (first + rows_per_strip - 1) * stride + max(sizes)
        grids = network.embed_dense(image[..., first * stride : stop, :], stride, sizes)
        strips.append({size: grid if is_last else grid[..., :rows_per_strip, :] for size, grid in grids.items()})
    return {size: torch.cat([strip[size] for strip in strips], dim=-2) for size in sizes}
