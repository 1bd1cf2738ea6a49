# Copyright (C) 2026 The anomalib-pedenet authors
# SPDX-License-Identifier: Apache-2.0

"""From a batch of training images to the embeddings that the losses see, densely or patch by patch.

*Dense* training evaluates the networks on crops, so that thousands of overlapping patches share their computation; two
independently disturbed views of each crop keep location prediction from reading the crop's own disturbance. *Patch by
patch* is the paper's way: every patch is cut, disturbed and embedded by itself.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from anomalib_pedenet.networks import PatchEmbeddingNetwork
from anomalib_pedenet.patches import (
    BASE_STRIDE,
    disturb,
    extract_patches,
    gather_embeddings,
    sample_jittered_pairs,
    sample_neighbor_pairs,
    sample_positions,
)
from anomalib_pedenet.training.synthetic_defects import draw_defects, label_patches


class EmbeddingSample(NamedTuple):
    """What one training step needs at one scale.

    Attributes:
        embeddings (torch.Tensor): Embeddings for the variance and the density loss, ``[N, Z]``.
        centers (torch.Tensor): Embeddings z of the centre patches of M pairs, ``[M, Z]``.
        neighbors (torch.Tensor): Embeddings z' of their neighbours, ``[M, Z]``.
        directions (torch.Tensor): Where the neighbours lie, int64 ``[M]`` in 0..7.
        defect_embeddings (torch.Tensor | None): Embeddings of patches with and without drawn defects, ``[D, Z]``.
        defect_labels (torch.Tensor | None): 1 for those with a defect, else 0, float ``[D]``.
        jittered (tuple[torch.Tensor, torch.Tensor] | None): Embeddings of M pairs of nearly the same patch, ``[M, Z]``
            each.
    """

    embeddings: torch.Tensor
    centers: torch.Tensor
    neighbors: torch.Tensor
    directions: torch.Tensor
    defect_embeddings: torch.Tensor | None = None
    defect_labels: torch.Tensor | None = None
    jittered: tuple[torch.Tensor, torch.Tensor] | None = None


def draw_views(
    images: torch.Tensor,
    num_crops: int = 4,
    crop_size: int = 128,
    color_shift: float = 0.1,
    noise: float = 0.1,
    with_defects: bool = False,
    positions: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw random crops, and see each in two disturbed views, and in a third with drawn defects.

    Args:
        images (torch.Tensor): Pre-processed images ``[B, C, H, W]``.
        num_crops (int): Crops, each from another image as far as there are enough.
        crop_size (int): Side of a crop in pixels; smaller images are taken whole.
        color_shift (float): See :func:`anomalib_pedenet.patches.disturb`.
        noise (float): See :func:`anomalib_pedenet.patches.disturb`.
        with_defects (bool): Whether there is a third view of each crop.
        positions (torch.Tensor | None): ``(row, column)`` of places to draw crops from, int64 ``[P, 2]``. Defaults to
            ``None``, all.

    Returns:
        tuple[torch.Tensor, torch.Tensor]: The first views of all crops, the second, and the third,
            ``[2 or 3 * num_crops, C, h, w]``; and the masks of the drawn defects, ``[num_crops, 1, h, w]``, or none,
            ``[0, 1, h, w]``.
    """
    device = images.device
    crop = (min(crop_size, images.shape[-2]), min(crop_size, images.shape[-1]))
    # A permutation, repeated as often as needed, spreads the crops evenly over the images.
    indices = torch.randperm(len(images), device=device).repeat(-(-num_crops // len(images)))[:num_crops]
    if positions is None:
        drawn = sample_positions(num_crops, images.shape[-2:], crop, device)
    else:
        drawn = positions[torch.randint(len(positions), (num_crops,), device=device)]
    crops = extract_patches(images, indices, drawn, crop)
    crops = crops.float()
    views, masks = [crops, crops], crops.new_empty(0, 1, *crop)
    if with_defects:
        defective, masks = draw_defects(crops)
        views.append(defective)
    disturbed = torch.cat([disturb(view, color_shift, noise) for view in views])
    return disturbed.contiguous(memory_format=torch.channels_last), masks


def sample_dense(
    network: PatchEmbeddingNetwork,
    views: torch.Tensor,
    masks: torch.Tensor,
    patch_sizes: Sequence[int],
    num_patches: int = 1024,
    num_pairs: int = 1024,
    with_jitter: bool = False,
) -> dict[int, EmbeddingSample]:
    """Embed views of crops densely and draw patches and pairs from the result.

    Args:
        network (PatchEmbeddingNetwork): The PE network.
        views (torch.Tensor): Two or three views of each crop, see :func:`draw_views`.
        masks (torch.Tensor): Masks of the third views' defects. If there are any, all patches of the third views and of
            the first give ``defect_embeddings``.
        patch_sizes (Sequence[int]): Scales to sample.
        num_patches (int): Patches N for the variance and the density loss, over the first two views of all crops.
        num_pairs (int): Pairs M for location prediction, over all crops (rounded up to the same number for each).
        with_jitter (bool): Whether as many pairs of nearly the same patch give ``jittered``: both of the first view, so
            that they differ by their place alone, one step of the dense grid (2 px) apart along each axis.

    Returns:
        dict[int, EmbeddingSample]: A sample for each patch size.

    Raises:
        ValueError: If the crops are too small for a pair of patches.
    """
    with_defects = len(masks) > 0
    num_crops, device = len(views) // (3 if with_defects else 2), views.device
    crop = (views.shape[-2], views.shape[-1])
    grids = network.embed_dense(views, BASE_STRIDE, patch_sizes, batch_statistics=True)

    samples: dict[int, EmbeddingSample] = {}
    for size, grid in grids.items():
        pairs = sample_neighbor_pairs((num_crops, -(-num_pairs // num_crops)), crop, size, BASE_STRIDE, device)
        normal, drawn_on = grid[: 2 * num_crops], grid[2 * num_crops :]
        first, second = normal.chunk(2)  # the two views, [num_crops, Z, h, w] each
        chosen = torch.randint(len(normal) * grid[0, 0].numel(), (num_patches,), device=device)
        defect_embeddings = defect_labels = None
        if with_defects:
            labels = label_patches(masks, size, BASE_STRIDE)
            defect_embeddings = torch.cat([first, drawn_on]).permute(0, 2, 3, 1).flatten(0, 2)
            defect_labels = torch.cat([torch.zeros_like(labels), labels]).flatten()
        jittered = None
        if with_jitter:
            shape = tuple(pairs.directions.shape)
            one, other = sample_jittered_pairs(shape, crop, size, BASE_STRIDE, device)
            jittered = (
                gather_embeddings(first, one, BASE_STRIDE).flatten(0, 1),
                gather_embeddings(first, other, BASE_STRIDE).flatten(0, 1),
            )
        samples[size] = EmbeddingSample(
            embeddings=normal.permute(0, 2, 3, 1).flatten(0, 2).index_select(0, chosen),
            centers=gather_embeddings(first, pairs.positions, BASE_STRIDE).flatten(0, 1),
            neighbors=gather_embeddings(second, pairs.neighbor_positions, BASE_STRIDE).flatten(0, 1),
            directions=pairs.directions.flatten(),
            defect_embeddings=defect_embeddings,
            defect_labels=defect_labels,
            jittered=jittered,
        )
    return samples


def sample_patches(
    network: PatchEmbeddingNetwork,
    images: torch.Tensor,
    patch_sizes: Sequence[int],
    num_patches: int = 128,
    num_pairs: int = 36,
    color_shift: float = 0.1,
    noise: float = 0.1,
    with_jitter: bool = False,
) -> dict[int, EmbeddingSample]:
    """Cut random patches and pairs of neighbouring patches and embed each by itself, as the paper does.

    Args:
        network (PatchEmbeddingNetwork): The PE network.
        images (torch.Tensor): Pre-processed images ``[B, C, H, W]``.
        patch_sizes (Sequence[int]): Scales to sample.
        num_patches (int): Patches N for the variance and the density loss. Defaults to the paper's ``128``.
        num_pairs (int): Pairs M for location prediction. Defaults to the paper's ``36``.
        color_shift (float): See :func:`anomalib_pedenet.patches.disturb`.
        noise (float): See :func:`anomalib_pedenet.patches.disturb`.
        with_jitter (bool): Whether as many pairs of nearly the same patch, undisturbed, give ``jittered``.

    Returns:
        dict[int, EmbeddingSample]: A sample for each patch size.

    Raises:
        ValueError: If the images are too small for a pair of patches.
    """
    image_size, device = tuple(images.shape[-2:]), images.device
    samples: dict[int, EmbeddingSample] = {}
    for size in patch_sizes:
        pairs = sample_neighbor_pairs(num_pairs, image_size, size, device=device)
        pair_indices = torch.randint(len(images), (num_pairs,), device=device)
        patches = extract_patches(
            images,
            torch.cat([torch.randint(len(images), (num_patches,), device=device), pair_indices, pair_indices]),
            torch.cat(
                [
                    sample_positions(num_patches, image_size, (size, size), device),
                    pairs.positions,
                    pairs.neighbor_positions,
                ]
            ),
            (size, size),
        ).float()
        patches = disturb(patches, color_shift, noise)
        if with_jitter:
            indices = torch.randint(len(images), (num_pairs,), device=device).repeat(2)
            positions = torch.cat(sample_jittered_pairs(num_pairs, image_size, size, device=device))
            patches = torch.cat([patches, extract_patches(images, indices, positions, (size, size)).float()])
        embeddings = network(patches.contiguous(memory_format=torch.channels_last), batch_statistics=True)
        density, centers, neighbors, rest = embeddings.tensor_split(
            [num_patches, num_patches + num_pairs, num_patches + 2 * num_pairs]
        )
        jittered = (rest[:num_pairs], rest[num_pairs:]) if with_jitter else None
        samples[size] = EmbeddingSample(density, centers, neighbors, pairs.directions, jittered=jittered)
    return samples
