# Copyright (C) 2026 The anomalib-pedenet authors
# SPDX-License-Identifier: Apache-2.0

"""Density estimation that cannot win by shrinking: the mixture of whitened embeddings, and its loss.

The paper's L_DEN (Eq. 9) falls without limit as all embeddings draw together, and with them those of defects. The
entropy of a Gaussian is that of its covariance; once that is fixed by whitening, what lowers the loss is the shape of
the distribution alone. So here embeddings are asked to gather in clusters, and not to be small.
"""

from typing import NamedTuple

import torch
from torch import nn

from anomalib_pedenet.mixture import GaussianMixture, Moments, log_density
from anomalib_pedenet.networks import DensityEstimationNetwork

# How much a batch counts in the moving averages: a mixture is that of about ten batches.
_BATCH_SHARE = 0.1

# Added to the diagonals of the components' covariances, of which those of all embeddings together are 1.
_JITTER = 0.02


class WhitenedMixture(NamedTuple):
    """Embeddings after whitening, and the mixture that they are to be dense in.

    Attributes:
        embeddings (torch.Tensor): Whitened projections of embeddings, ``[N, P]``.
        responsibilities (torch.Tensor): Of the DE network for them, ``[N, K]``.
        mixture (GaussianMixture): Mixture of these and of earlier ones.
    """

    embeddings: torch.Tensor
    responsibilities: torch.Tensor
    mixture: GaussianMixture


class WhitenedDensityEstimationNetwork(nn.Module):
    """Density estimation network that sees embeddings after whitening, so that shrinking them makes nothing denser.

    Embeddings are projected on a few learned directions and whitened: their mean over the batch is 0 and their
    covariance is 1. What can still become denser is their shape: they gather in clusters. The batch's mixture is
    averaged with those of earlier batches, because a thousand embeddings are few for K full covariances.

    Args:
        num_components (int): Number K of mixture components. Defaults to ``10``.
        embedding_dim (int): Dimension Z of the embeddings. Defaults to ``64``.
        projected_dim (int): Number P of directions, at most Z of them. Defaults to ``8``.

    Examples:
        >>> network = WhitenedDensityEstimationNetwork(num_components=4)
        >>> whitened, responsibilities, mixture = network.estimate(0.1 * torch.randn(500, 64))
        >>> bool(torch.allclose(torch.cov(whitened.T, correction=0), torch.eye(8), atol=0.01))
        True
        >>> mixture.covariances.shape, network(torch.randn(7, 64)).shape
        (torch.Size([4, 8, 8]), torch.Size([7, 4]))
    """

    num_batches: torch.Tensor
    mean: torch.Tensor
    covariance: torch.Tensor
    weights: torch.Tensor
    firsts: torch.Tensor
    seconds: torch.Tensor

    def __init__(self, num_components: int = 10, embedding_dim: int = 64, projected_dim: int = 8) -> None:
        super().__init__()
        dims = min(projected_dim, embedding_dim)
        self.projection = nn.Linear(embedding_dim, dims, bias=False)
        nn.init.orthogonal_(self.projection.weight)
        self.layers = DensityEstimationNetwork(num_components, dims)
        # Moving averages over batches: of the projections' mean and covariance, and of the mixture's moments.
        self.register_buffer("num_batches", torch.zeros(()))
        self.register_buffer("mean", torch.zeros(dims))
        self.register_buffer("covariance", torch.eye(dims))
        self.register_buffer("weights", torch.zeros(num_components))
        self.register_buffer("firsts", torch.zeros(num_components, dims))
        self.register_buffer("seconds", torch.zeros(num_components, dims, dims))

    def forward(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Return responsibilities by the averages of earlier batches.

        Args:
            embeddings (torch.Tensor): Embeddings ``[N, Z]``.

        Returns:
            torch.Tensor: Responsibilities ``[N, K]``.
        """
        with torch.autocast(embeddings.device.type, enabled=False):
            centered = self.projection(embeddings.float()) - self.mean
            return self.layers(_whiten(centered, self.covariance))

    def estimate(self, embeddings: torch.Tensor) -> WhitenedMixture:
        """Estimate the mixture of a batch and earlier ones, in training, and remember it.

        Args:
            embeddings (torch.Tensor): Embeddings of a batch, ``[N, Z]``.

        Returns:
            WhitenedMixture: Whitened by the batch's own covariance; differentiable but for what earlier batches gave.
        """
        with torch.autocast(embeddings.device.type, enabled=False):
            projected = self.projection(embeddings.float())
            mean = projected.mean(dim=0)
            centered = projected - mean
            covariance = centered.T @ centered / len(centered)
            whitened = _whiten(centered, covariance)
            responsibilities = self.layers(whitened)
            moments = self._remember(mean, covariance, Moments.of(whitened, responsibilities))
            return WhitenedMixture(whitened, responsibilities, moments.mixture(_JITTER))

    def _remember(self, mean: torch.Tensor, covariance: torch.Tensor, moments: Moments) -> Moments:
        """Average what a batch has with what earlier ones had, and return the moments' averages, differentiable."""
        is_first = (self.num_batches == 0).to(mean)
        share = _BATCH_SHARE + (1 - _BATCH_SHARE) * is_first  # the first counts alone
        buffers = (self.mean, self.covariance, self.weights, self.firsts, self.seconds)
        batch = (mean.detach(), covariance.detach(), *moments)
        averages = [old.lerp(new, share) for old, new in zip(buffers, batch, strict=True)]
        with torch.no_grad():
            for buffer, average in zip(buffers, averages, strict=True):
                buffer.copy_(average)
            self.num_batches.add_(1)
        return Moments(*averages[2:])


def _whiten(centered: torch.Tensor, covariance: torch.Tensor) -> torch.Tensor:
    """Whiten vectors ``[N, P]`` of mean 0 by a covariance ``[P, P]``; differentiable in both."""
    eye = torch.eye(len(covariance), dtype=covariance.dtype, device=covariance.device)
    floor = 1e-3 * covariance.diagonal().mean() + 1e-8  # embeddings that are all equal have no covariance
    factor, _ = torch.linalg.cholesky_ex(covariance + floor * eye)
    return torch.linalg.solve_triangular(factor, centered.T, upper=False).T


def whitened_density_loss(whitened: WhitenedMixture) -> torch.Tensor:
    """Density estimation loss L_DEN of whitened embeddings.

    The mean negative log likelihood, less the entropy of how much each component is used, which keeps all of them in
    use.

    Args:
        whitened (WhitenedMixture): A batch, of :meth:`WhitenedDensityEstimationNetwork.estimate`.

    Returns:
        torch.Tensor: Scalar loss in nats.
    """
    shares = whitened.responsibilities.mean(dim=0)
    entropy = -(shares * shares.clamp(min=1e-9).log()).sum()
    return -log_density(whitened.embeddings, whitened.mixture).mean() - entropy
