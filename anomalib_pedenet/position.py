# Copyright (C) 2026 The anomalib-pedenet authors
# SPDX-License-Identifier: Apache-2.0

"""Where a patch lies, as two more features of its embedding.

Where parts are aligned, a patch should be compared with normal patches of its own place: the rim of a bottle is normal
at the rim only. With the patch's row and column, times a weight, appended to its embedding, the squared distance to a
normal patch becomes ``|z - z'|^2 + (weight * shift)^2``: a neighbour far away must be that much more alike. A weight of
0 compares with patches from anywhere, as the paper does; a large one with those of the same place only. It needs no
second kind of memory bank and no fixed image size.
"""

from collections.abc import Sequence

import torch
from torch import nn

WEIGHTS = (0.0, 4.0, 8.0, 16.0, 32.0)
"""Weights to choose from. At 32, a shift by 1 % of the image counts as much as 0.32 between embeddings, about the
distance between neighbouring normal patches."""

TOLERANCE = 0.1
"""A weight is right for a data set if it makes normal patches look at most this much less alike, as a fraction."""

_NUM_QUERIES = 1_024


class PositionEncoding(nn.Module):
    """Appends each patch's weighted position to its embedding.

    Attributes:
        weight (torch.Tensor): Weight of the position, scalar; a buffer, so that it is saved and exported.

    Example:
        >>> encoding = PositionEncoding(weight=8.0)
        >>> encoded = encoding(torch.zeros(1, 64, 2, 3), (64, 96), stride=16)
        >>> encoded[0, 64:, 1, 2].tolist()  # 16 and 32 of 96 px, times 8
        [1.3333333730697632, 2.6666667461395264]
    """

    weight: torch.Tensor

    def __init__(self, weight: float = 0.0) -> None:
        super().__init__()
        self.register_buffer("weight", torch.tensor(weight))

    def forward(self, grid: torch.Tensor, image_size: tuple[int, int], stride: int) -> torch.Tensor:
        """Append positions to a grid of embeddings.

        Args:
            grid (torch.Tensor): Embeddings ``[B, Z, h, w]`` at ``stride``.
            image_size (tuple[int, int]): Height and width of the images in pixels.
            stride (int): Distance between neighbouring embeddings of the grid in pixels.

        Returns:
            torch.Tensor: ``[B, Z + 2, h, w]``: then the patch's row and column, as fractions of the longer side of the
                image, times the weight.
        """
        height, width = grid.shape[-2:]
        positions = encode_positions(height, width, max(image_size), stride, grid) * self.weight.to(grid.dtype)
        return torch.cat([grid, positions.expand(grid.shape[0], -1, -1, -1)], dim=1)


def encode_positions(height: int, width: int, side: int, stride: int, like: torch.Tensor) -> torch.Tensor:
    """Return rows and columns ``[2, height, width]`` of a grid, as fractions of ``side``, in the type of ``like``."""
    rows = torch.arange(height, device=like.device, dtype=like.dtype)[:, None].expand(height, width)
    columns = torch.arange(width, device=like.device, dtype=like.dtype)[None, :].expand(height, width)
    return torch.stack([rows, columns]) * (stride / side)


@torch.no_grad()
def choose_weight(
    grids: torch.Tensor,
    image_size: tuple[int, int],
    stride: int,
    weights: Sequence[float] = WEIGHTS,
    tolerance: float = TOLERANCE,
) -> float:
    """Choose the weight of the position from normal images alone.

    For patches drawn from all images, their nearest neighbours in the *other* images are sought under each weight. If
    the parts are aligned, the neighbours found at the same place are nearly as much alike as those found anywhere; if
    they are not, they are much less so. The largest weight is taken whose neighbours are, by the distance of their
    embeddings alone, at most ``tolerance`` farther on average than those of weight 0.

    Args:
        grids (torch.Tensor): Embeddings ``[N, Z, h, w]`` of N normal images.
        image_size (tuple[int, int]): Height and width of the images in pixels.
        stride (int): Distance between neighbouring embeddings of the grid in pixels.
        weights (Sequence[float]): Weights to choose from, ascending, the first 0. Defaults to :data:`WEIGHTS`.
        tolerance (float): Largest relative increase of the distance. Defaults to :data:`TOLERANCE`.

    Returns:
        float: The chosen weight; 0 for a single image.
    """
    num_images, _, height, width = grids.shape
    if num_images < 2:
        return weights[0]
    rows = grids.permute(0, 2, 3, 1).flatten(0, 2).float()  # [N * h * w, Z]
    positions = encode_positions(height, width, max(image_size), stride, rows).flatten(1).T.repeat(num_images, 1)
    images = torch.arange(num_images, device=rows.device).repeat_interleave(height * width)
    chosen = torch.linspace(0, len(rows) - 1, min(len(rows), _NUM_QUERIES), device=rows.device).long()

    distances = []
    for weight in weights:
        bank = torch.cat([rows, weight * positions], dim=1)
        half_norms = bank.square().sum(dim=1) / 2
        total = torch.zeros((), device=rows.device)
        for queries in chosen.split(64):
            similarity = bank[queries] @ bank.T - half_norms  # [64, N * h * w]
            similarity.masked_fill_(images[queries, None] == images, -torch.inf)
            total += (rows[queries] - rows[similarity.argmax(dim=1)]).norm(dim=1).sum()
        distances.append(total.item() / len(chosen))
    limit = (1 + tolerance) * distances[0]
    return max(weight for weight, distance in zip(weights, distances, strict=True) if distance <= limit)
