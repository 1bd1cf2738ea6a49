# Copyright (C) 2026 The anomalib-pedenet authors
# SPDX-License-Identifier: Apache-2.0

"""Mid-level embeddings, made comparable by Euclidean distance.

The features of a convolution in the middle of the encoder have many correlated channels of very different strength. A
linear map, fitted on normal patches, takes their principal components, evens out half of the differences in strength,
and gives the result the scale of the trained embeddings, for which a patch's position is weighed.
"""

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from anomalib_pedenet.scorers.position import neighbor_distance

NEIGHBOR_DISTANCE = 0.3
"""Mean distance, after the projection, between a normal patch and its nearest neighbour in other normal images. That
of the trained embeddings is 0.28 on an object and 0.39 on a surface."""

_SHRINKAGE = 0.1  # of the variances towards their mean, so that what hardly varies is not blown up


class PrincipalProjection(nn.Module):
    """Principal components of mid-level embeddings, each divided by the root of its standard deviation.

    Full whitening would weigh noise as much as structure, and none leaves the few strongest components to decide alone.

    Args:
        channels (int): Dimension of the mid-level embeddings.
        embedding_dim (int): Number of components, at most ``channels``.

    Attributes:
        center (torch.Tensor): Mean of normal patches, ``[channels]``.
        components (torch.Tensor): Scaled components, ``[embedding_dim, channels]``; both are buffers.

    Raises:
        ValueError: If there are more components than channels.
    """

    center: torch.Tensor
    components: torch.Tensor

    def __init__(self, channels: int, embedding_dim: int) -> None:
        super().__init__()
        if embedding_dim > channels:
            msg = f"A projection from {channels} channels has at most so many components, got {embedding_dim}."
            raise ValueError(msg)
        self.register_buffer("center", torch.zeros(channels))
        self.register_buffer("components", torch.eye(embedding_dim, channels))

    @torch.no_grad()
    def fit(self, grids: torch.Tensor) -> None:
        """Fit on normal patches.

        Args:
            grids (torch.Tensor): Mid-level embeddings ``[N, channels, h, w]`` of N normal images.
        """
        rows = grids.permute(0, 2, 3, 1).flatten(0, 2).double()  # [N * h * w, channels]
        center = rows.mean(dim=0)
        rows = rows - center
        covariance = rows.T @ rows / len(rows)
        variances, directions = torch.linalg.eigh(covariance)  # ascending
        variances = variances.clamp(min=0)
        variances = variances + _SHRINKAGE * variances.mean() + torch.finfo(torch.float32).eps
        kept = slice(len(variances) - len(self.components), None)
        components = (directions * variances.pow(-0.25))[:, kept].T.flip(0)
        self.center = center.to(self.center)
        self.components = components.to(self.components)
        distance = neighbor_distance(self(grids))
        if distance > 0:
            self.components = self.components * (NEIGHBOR_DISTANCE / distance)

    def forward(self, grids: torch.Tensor) -> torch.Tensor:
        """Project mid-level embeddings.

        Args:
            grids (torch.Tensor): Mid-level embeddings ``[B, channels, h, w]``.

        Returns:
            torch.Tensor: ``[B, embedding_dim, h, w]``.
        """
        return F.conv2d(grids - self.center[:, None, None], self.components[:, :, None, None])
