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

MIN_ALIGNMENT = 0.8
"""Alignment (see :func:`measure_alignment`) from which a weight is right for a data set."""

_NUM_QUERIES = 1_024


class PositionEncoding(nn.Module):
    """Appends each patch's weighted position to its embedding.

    Attributes:
        weight (torch.Tensor): Weight of the position, scalar; a buffer, so that it is saved and exported.

    Examples:
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
def measure_alignment(
    grids: torch.Tensor,
    image_size: tuple[int, int],
    stride: int,
    weights: Sequence[float] = WEIGHTS[1:],
    chosen: torch.Tensor | None = None,
) -> list[float]:
    """Measure, on normal images alone, how far patches look alike at the same place.

    For patches drawn from all images, their nearest neighbours in the *other* images are sought under each weight: with
    the true positions, and with positions shuffled among the patches of each image. A weight leaves fewer patches to
    choose from, so that both lie farther away, by their embeddings alone, than the nearest neighbour found anywhere.
    Where parts are aligned, only the shuffled ones do; where they are not, both do alike. The alignment is the share of
    the shuffled ones' loss that the true ones do not have: about 1 for aligned parts, about 0 for surfaces and
    unaligned parts, whatever the dimension and the spread of the embeddings.

    Args:
        grids (torch.Tensor): Embeddings ``[N, Z, h, w]`` of N normal images.
        image_size (tuple[int, int]): Height and width of the images in pixels.
        stride (int): Distance between neighbouring embeddings of the grid in pixels.
        weights (Sequence[float]): Weights of the position, above 0. Defaults to those of :data:`WEIGHTS`.
        chosen (torch.Tensor | None): Patches to look at, bool ``[h, w]``. Defaults to ``None``, all.

    Returns:
        list[float]: The alignment at each weight; 0 where a weight is too small to matter, all
            patches look alike, or there is one image only.
    """
    num_images, _, height, width = grids.shape
    places = encode_positions(height, width, max(image_size), stride, grids.float())
    if chosen is not None:
        grids, places = grids[:, :, None, chosen], places[:, chosen]
    places = places.flatten(1).T  # [P, 2]
    generator = torch.Generator().manual_seed(0)
    orders = [torch.randperm(len(places), generator=generator) for _ in range(num_images)]
    true, shuffled = places.repeat(num_images, 1), places[torch.cat(orders).to(places.device)]

    anywhere = neighbor_distance(grids)
    alignments = []
    for weight in weights:
        lost = neighbor_distance(grids, weight * true, weight * shuffled) - anywhere
        gained = neighbor_distance(grids, weight * true, weight * true) - anywhere
        alignments.append(1 - gained / lost if lost > 0 else 0.0)
    return alignments


@torch.no_grad()
def neighbor_distance(
    grids: torch.Tensor, places: torch.Tensor | None = None, neighbor_places: torch.Tensor | None = None
) -> float:
    """Measure the mean distance of normal patches to their nearest neighbours in *other* images.

    Args:
        grids (torch.Tensor): Embeddings ``[N, Z, h, w]`` of N normal images; a sample of the patches is measured.
        places (torch.Tensor | None): Weighted positions ``[N * h * w, 2]`` of the patches, that count in the search but
            not in the distance that is measured. ``None`` to search by the embeddings alone.
        neighbor_places (torch.Tensor | None): Those they have as neighbours, if ``places`` are given.

    Returns:
        float: The mean distance, in units of the embeddings; 0 for a single image.
    """
    if len(grids) < 2:
        return 0.0
    rows = grids.permute(0, 2, 3, 1).flatten(0, 2).float()  # [N * h * w, Z]
    images = torch.arange(len(grids), device=rows.device).repeat_interleave(grids[0, 0].numel())
    sample = torch.linspace(0, len(rows) - 1, min(len(rows), _NUM_QUERIES), device=rows.device).long()
    bank = rows if neighbor_places is None else torch.cat([rows, neighbor_places], dim=1)
    queries = rows if places is None else torch.cat([rows, places], dim=1)
    half_norms = bank.square().sum(dim=1) / 2
    total = torch.zeros((), device=rows.device)
    for chosen in sample.split(64):
        similarity = queries[chosen] @ bank.T - half_norms  # [64, N * h * w]
        similarity.masked_fill_(images[chosen, None] == images, -torch.inf)
        total += (rows[chosen] - rows[similarity.argmax(dim=1)]).norm(dim=1).sum()
    return total.item() / len(sample)


def choose_weight(
    alignments: Sequence[float], weights: Sequence[float] = WEIGHTS, min_alignment: float = MIN_ALIGNMENT
) -> float:
    """Choose the weight of the position.

    Args:
        alignments (Sequence[float]): Alignment at each weight but the first, see :func:`measure_alignment`.
        weights (Sequence[float]): Weights to choose from, ascending, the first 0. Defaults to :data:`WEIGHTS`.
        min_alignment (float): Alignment from which a weight is taken. Defaults to :data:`MIN_ALIGNMENT`.

    Returns:
        float: The largest weight at which the alignment is high enough; the first one if there is none.
    """
    fitting = [weight for weight, value in zip(weights[1:], alignments, strict=True) if value >= min_alignment]
    return max(fitting, default=weights[0])
