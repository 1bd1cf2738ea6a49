# Copyright (C) 2026 The anomalib-pedenet authors
# SPDX-License-Identifier: Apache-2.0

"""Embeddings less their mean, such that all directions vary alike.

Training leaves embeddings that vary in few directions, while a defect may show in another. Whitened, all directions
count alike. Those of least variance, which hold noise, can be left out.

On a surface two more means are taken away. Light that falls unevenly makes no place abnormal if each place has its own
mean. Light that differs from image to image makes no image abnormal if its own mean is taken away, too; but no more of
it than a normal patch differs from the mean, so that another material, or a stain all over, is seen.

Reference:
    AnomalyHop (Zhang et al. 2021, https://arxiv.org/abs/2105.03797) compares homogeneous textures with the mean and the
    covariance of the image itself. Here the mean alone is the image's.
"""

import torch
from anomalib.models.components import DynamicBufferMixin
from torch import nn
from torch.nn import functional as F  # noqa: N812

_SHRINKAGE = 0.01  # of the variances towards their mean, so that what hardly varies is not blown up
_REACH = 1.0  # standard deviations of normal patches: so much of an image's own mean may be taken away


class Whitening(DynamicBufferMixin, nn.Module):
    """Takes the mean of normal embeddings away and makes their covariance the identity, once fitted.

    Attributes:
        mean (torch.Tensor): Mean of normal embeddings, ``[Z, 1, 1]``, or of each place, ``[Z, h, w]``.
        components (torch.Tensor): Matrix that whitens, ``[K, Z]``; empty as long as embeddings are left as they are.
        image_mean (torch.Tensor): Mean of normal images' own means, hidden patches among them, ``[Z, 1, 1]``.
        image_reach (torch.Tensor): As far as an image's own mean lies from it, up to this, it is taken away,
            ``[Z, 1, 1]``; empty where it stays.
        image_share (torch.Tensor): Share of the patches that is not hidden, scalar.
    """

    mean: torch.Tensor
    components: torch.Tensor
    image_mean: torch.Tensor
    image_reach: torch.Tensor
    image_share: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(0, 1, 1))
        self.register_buffer("components", torch.zeros(0, 0))
        self.register_buffer("image_mean", torch.zeros(0, 1, 1))
        self.register_buffer("image_reach", torch.zeros(0, 1, 1))
        self.register_buffer("image_share", torch.ones(()))

    @property
    def by_place(self) -> bool:
        """Whether each place has a mean of its own."""
        return self.mean.shape[-2:] != (1, 1)

    @torch.no_grad()
    def fit(
        self,
        grids: torch.Tensor,
        by_place: bool,
        is_relative: bool = False,
        chosen: torch.Tensor | None = None,
        kept: int | None = None,
    ) -> None:
        """Fit on normal patches.

        Args:
            grids (torch.Tensor): Embeddings ``[N, Z, h, w]`` of N normal images.
            by_place (bool): Whether each place has a mean of its own.
            is_relative (bool): Whether each image's own mean is taken away. Defaults to ``False``.
            chosen (torch.Tensor | None): Patches to look at, bool ``[h, w]``. Defaults to ``None``, all.
            kept (int | None): Number K of directions to keep, those of the largest variances. Defaults to ``None``,
                all.
        """
        grids = grids.float()  # whatever the networks computed in
        chosen = grids.new_ones(grids.shape[-2:], dtype=torch.bool) if chosen is None else chosen
        self.image_reach = self.mean.new_zeros(0, 1, 1)
        if is_relative and len(grids) > 1:
            self._fit_images(grids, chosen)
            grids = self._less_image(grids)
        mean = grids[..., chosen].mean(dim=(0, 2))[:, None, None]
        if by_place and len(grids) > 1:
            mean = mean + _shrunk_differences(grids, mean, chosen)
        rows = (grids - mean)[..., chosen].transpose(0, 1).flatten(1).double()  # [Z, N * patches]
        variances, directions = torch.linalg.eigh(rows @ rows.T / rows.shape[1])
        variances = variances.clamp(min=0)
        variances = variances + _SHRINKAGE * variances.mean() + torch.finfo(torch.float32).eps
        whitening = (directions * variances.rsqrt()).T.flip(0)[:kept]  # the largest variance first
        self.mean, self.components = mean.to(self.mean), whitening.to(self.mean).contiguous()

    def _fit_images(self, grids: torch.Tensor, chosen: torch.Tensor) -> None:
        """Measure how normal images' own means differ, of embeddings ``[N, Z, h, w]``."""
        # Of all patches: hidden ones are alike in all images. So no mask is needed to score.
        means = grids.mean(dim=(2, 3))
        self.image_share = chosen.float().mean().to(self.mean)
        self.image_mean = means.mean(dim=0)[:, None, None].to(self.mean)
        self.image_reach = _REACH * grids[..., chosen].std(dim=(0, 2))[:, None, None].to(self.mean)

    def _less_image(self, grid: torch.Tensor) -> torch.Tensor:
        """Take away from embeddings ``[B, Z, h, w]`` how each image's own mean differs, as far as normal patches do."""
        difference = (grid.mean(dim=(2, 3), keepdim=True) - self.image_mean) / self.image_share
        return grid - torch.maximum(torch.minimum(difference, self.image_reach), -self.image_reach)

    def forward(self, grid: torch.Tensor) -> torch.Tensor:
        """Whiten embeddings.

        Args:
            grid (torch.Tensor): Embeddings ``[B, Z, h, w]``. Where the means of places are of another grid, those
                between them are interpolated.

        Returns:
            torch.Tensor: Embeddings ``[B, K, h, w]``.
        """
        if not len(self.components):
            return grid
        if len(self.image_reach):
            grid = self._less_image(grid)
        mean = self.mean
        if mean.shape[-2:] not in ((1, 1), grid.shape[-2:]):
            mean = F.interpolate(mean[None], size=grid.shape[-2:], mode="bilinear", align_corners=True)[0]
        return F.conv2d(grid - mean, self.components[:, :, None, None])


def _shrunk_differences(grids: torch.Tensor, mean: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """Return how the places' means differ from the mean ``[Z, 1, 1]``, without what a few images differ by chance.

    Each dimension is shrunk by the part of the differences' variance that is not expected of so many images (the
    positive part of James and Stein's estimator), so that next to nothing is left where light falls evenly.
    """
    differences = grids.mean(dim=0) - mean  # [Z, h, w]
    by_chance = grids[..., chosen].var(dim=0).mean(dim=1) / len(grids)  # [Z]
    found = differences[:, chosen].square().mean(dim=1).clamp(min=torch.finfo(torch.float32).tiny)
    return differences * (1 - by_chance / found).clamp(min=0)[:, None, None]
