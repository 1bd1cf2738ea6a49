# Copyright (C) 2026 The anomalib-pedenet authors
# SPDX-License-Identifier: Apache-2.0

"""Density scorers: how improbable is an embedding under Gaussians of the normal ones?"""

import math
from collections.abc import Callable

import torch

from anomalib_pedenet.mixture import CovarianceType
from anomalib_pedenet.scorers.base import PlaceScorer, Scorer
from anomalib_pedenet.scorers.coreset import UniformSubset

# The typical score is estimated on at most this many normal embeddings.
_TYPICAL_ROWS = 1_024
# Components whose distances are computed by one product.
_COMPONENTS = 8


class GaussiansScorer(Scorer):
    """Negative log density under a mixture of Gaussians, less the least value that it can have.

    A subclass fits the mixture and hands it to :meth:`_set_mixture`.

    Args:
        embedding_dim (int): Dimension Z of the embeddings. Defaults to ``64``.
        seed (int): Seed of whatever is random in the fit. Defaults to ``0``.
    """

    log_weights: torch.Tensor
    whitening: torch.Tensor
    shifts: torch.Tensor
    log_norms: torch.Tensor

    def __init__(self, embedding_dim: int = 64, seed: int = 0) -> None:
        super().__init__(embedding_dim, seed)
        self.register_buffer("log_weights", torch.zeros(0))  # log phi, [K]
        self.register_buffer("whitening", torch.zeros(0, embedding_dim, embedding_dim))  # W: W Sigma W^T = 1, [K, Z, Z]
        self.register_buffer("shifts", torch.zeros(0, embedding_dim))  # W mu, [K, Z]
        self.register_buffer("log_norms", torch.zeros(0))  # -log|Sigma| / 2, [K]

    @property
    def is_fitted(self) -> bool:
        """Whether there is a mixture."""
        return len(self.log_weights) > 0

    def _set_mixture(self, weights: torch.Tensor, means: torch.Tensor, whitening: torch.Tensor) -> None:
        """Put a mixture to use: weights ``[K]``, means ``[K, Z]``, and :func:`whiten` of the covariances."""
        self.log_weights = weights.log().to(self.typical_score)
        self.whitening = whitening.to(self.typical_score)
        self.shifts = torch.einsum("kyz,kz->ky", whitening, means).to(self.typical_score)
        self.log_norms = whitening.diagonal(dim1=1, dim2=2).log().sum(dim=1).to(self.typical_score)

    def forward(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Return how far the negative log density lies above its least value.

        Args:
            embeddings (torch.Tensor): Embeddings ``[..., Z]``.

        Returns:
            torch.Tensor: Scores ``[...]`` in nats, float32.
        """
        with torch.autocast(embeddings.device.type, enabled=False):
            embeddings = embeddings.to(self.shifts.dtype)
            # One product for some components together: W_k (z - mu_k) = W_k z - W_k mu_k. For all of them it would not
            # stay in a CPU's cache.
            groups = zip(self.whitening.split(_COMPONENTS), self.shifts.split(_COMPONENTS), strict=True)
            squared = [squared_distances(embeddings, whitening, shifts) for whitening, shifts in groups]
            heights = self.log_weights + self.log_norms  # of the components' peaks, but for the powers of 2 pi
            density = torch.logsumexp(heights - torch.cat(squared, dim=-1) / 2, dim=-1)
            return (torch.logsumexp(heights, dim=0) - density).clamp(min=0)


class MixtureDensityScorer(GaussiansScorer):
    """Negative log density under the density estimation network's mixture (Eqs. 2 to 6).

    The network gives each normal embedding its responsibilities; weights, means and covariances are those over the
    whole training set, gathered as sums, in float64. The score is ``-log P(z)``, less the least value it can have, so
    that it is never negative.

    Args:
        embedding_dim (int): Dimension Z of the embeddings. Defaults to ``64``.
        seed (int): Seed of the sample for the typical score. Defaults to ``0``.
        density_network (Callable[[torch.Tensor], torch.Tensor] | None): Embeddings ``[N, Z]`` to responsibilities
            ``[N, K]``. ``None`` for a single component.
        covariance_type (CovarianceType): ``"full"`` or ``"diag"``. Defaults to ``"full"``.
        jitter (float): Added to the covariances' diagonals, in squared embedding units. Defaults to ``1e-3``.

    Raises:
        ValueError: If an argument is outside its range.
    """

    def __init__(
        self,
        embedding_dim: int = 64,
        seed: int = 0,
        density_network: Callable[[torch.Tensor], torch.Tensor] | None = None,
        covariance_type: CovarianceType = "full",
        jitter: float = 1e-3,
    ) -> None:
        super().__init__(embedding_dim, seed)
        if covariance_type not in ("diag", "full"):
            msg = f"covariance_type must be 'diag' or 'full', got {covariance_type!r}."
            raise ValueError(msg)
        if not 0 < jitter < math.inf:
            msg = f"jitter must be above 0 and finite, got {jitter}."
            raise ValueError(msg)
        self.covariance_type = covariance_type
        self.jitter = jitter
        # In a tuple, because a network that is an attribute would become a second entry of the state.
        self._density_network = (density_network,)
        self._moments = _Moments()
        self._sample = UniformSubset(_TYPICAL_ROWS, seed)

    def _reset(self) -> None:
        self._moments = _Moments()
        self._sample = UniformSubset(_TYPICAL_ROWS, self.seed)

    def _update(self, embeddings: torch.Tensor) -> None:
        (network,) = self._density_network
        gamma = embeddings.new_ones(len(embeddings), 1) if network is None else network(embeddings).detach()
        self._moments.update(embeddings[None], gamma.T)
        self._sample.update(embeddings)

    def _finalize(self) -> torch.Tensor:
        counts, means, covariances = self._moments.estimate()
        if self.covariance_type == "diag":
            covariances = torch.diag_embed(covariances.diagonal(dim1=1, dim2=2))
        self._set_mixture(counts / counts.sum(), means, whiten(covariances, self.jitter))
        sample = self._sample.build().to(self.typical_score)
        self._reset()
        return self(sample).mean()


class MahalanobisScorer(PlaceScorer):
    """Mahalanobis distance to the normal embeddings of the same place: one Gaussian for each, as PaDiM has.

    Means and covariances are gathered as sums, in float64, so that memory does not grow with the number of images.

    Args:
        embedding_dim (int): Dimension Z of the embeddings. Defaults to ``64``.
        seed (int): Unused: nothing is random. Defaults to ``0``.
        jitter (float): Added to the covariances' diagonals, in squared embedding units. Defaults to PaDiM's ``0.01``.

    Raises:
        ValueError: If ``jitter`` is not positive and finite.

    Reference:
        PaDiM (Defard et al., ICPR 2021), Eqs. 1 and 2.
    """

    means: torch.Tensor
    whitening: torch.Tensor

    def __init__(self, embedding_dim: int = 64, seed: int = 0, jitter: float = 0.01) -> None:
        super().__init__(embedding_dim, seed)
        if not 0 < jitter < math.inf:
            msg = f"jitter must be above 0 and finite, got {jitter}."
            raise ValueError(msg)
        self.jitter = jitter
        self.register_buffer("means", torch.zeros(0, 0, embedding_dim))  # [h, w, Z]
        self.register_buffer("whitening", torch.zeros(0, 0, embedding_dim, embedding_dim))  # [h, w, Z, Z]
        self._moments = _Moments()  # of the fit under way

    @property
    def _fitted(self) -> torch.Tensor:
        return self.means

    def _reset(self) -> None:
        self._moments = _Moments()

    def _update(self, embeddings: torch.Tensor) -> None:
        places = embeddings.flatten(1, 2).transpose(0, 1)  # [h * w, B, Z]
        self._moments.update(places, places.new_ones(places.shape[:2]))

    def _finalize(self) -> torch.Tensor:
        counts, means, covariances = self._moments.estimate()
        covariances = covariances * (counts / (counts - 1).clamp(min=1))[:, None, None]  # unbiased, as PaDiM's
        whitening = whiten(covariances, self.jitter)
        # The mean square of whitened embeddings is the trace of their covariance.
        mean_square = torch.einsum("pyz,pzx,pyx->p", whitening, covariances, whitening).mean()
        grid = self._grid or (0, 0)
        self.means = means.unflatten(0, grid).to(self.typical_score)
        self.whitening = whitening.unflatten(0, grid).to(self.typical_score)
        self._reset()
        return mean_square.clamp(min=0).sqrt()

    def _distances(self, embeddings: torch.Tensor) -> torch.Tensor:
        centered = (embeddings - self.means).permute(1, 2, 3, 0)  # [h, w, Z, B]
        squared = torch.matmul(self.whitening, centered).square().sum(dim=2)  # [h, w, B]
        return squared.sqrt().permute(2, 0, 1)


class _Moments:
    """Weighted means and covariances of G groups of embeddings, from batches, in float64.

    The sums are taken relative to the first batch's mean, so that nothing cancels where embeddings lie far from 0.
    """

    def __init__(self) -> None:
        self._shift: torch.Tensor | None = None
        self._counts, self._firsts, self._seconds = torch.zeros(0), torch.zeros(0), torch.zeros(0)

    def update(self, embeddings: torch.Tensor, weights: torch.Tensor) -> None:
        """Take in embeddings ``[G, N, Z]`` (or ``[1, N, Z]``, the same for all groups) and their weights ``[G, N]``."""
        embeddings, weights = embeddings.double(), weights.double()
        is_first = self._shift is None
        if self._shift is None:
            self._shift = embeddings.mean(dim=(0, 1))
        embeddings = embeddings - self._shift
        weighted = weights[..., None] * embeddings  # [G, N, Z]
        counts, firsts, seconds = weights.sum(dim=1), weighted.sum(dim=1), weighted.transpose(1, 2) @ embeddings
        if is_first:
            self._counts, self._firsts, self._seconds = counts, firsts, seconds
        else:
            self._counts += counts
            self._firsts += firsts
            self._seconds += seconds

    def estimate(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the groups' total weights ``[G]``, means ``[G, Z]`` and (biased) covariances ``[G, Z, Z]``."""
        # A group that no embedding belongs to has mean 0 and no variance.
        counts = self._counts.clamp(min=torch.finfo(torch.float32).tiny)
        means = self._firsts / counts[:, None]
        covariances = self._seconds / counts[:, None, None] - means[:, :, None] * means[:, None, :]
        return counts, means if self._shift is None else means + self._shift, covariances


def whiten(covariances: torch.Tensor, jitter: float) -> torch.Tensor:
    """Return ``W`` with ``W (Sigma + jitter) W^T = 1``, lower triangular, for covariances ``[G, Z, Z]``."""
    eye = torch.eye(covariances.shape[-1], dtype=covariances.dtype, device=covariances.device)
    factor = torch.linalg.cholesky(covariances + jitter * eye)
    # Contiguous as a checkpoint's: of another layout products differ in the last bit on some processors.
    return torch.linalg.solve_triangular(factor, eye.expand_as(factor), upper=False).contiguous()


def squared_distances(embeddings: torch.Tensor, whitening: torch.Tensor, shifts: torch.Tensor) -> torch.Tensor:
    """Return squared Mahalanobis distances ``[..., K]`` of embeddings ``[..., Z]`` to K Gaussians."""
    whitened = embeddings @ whitening.flatten(0, 1).T  # [..., K * Z]
    return (whitened.unflatten(-1, shifts.shape) - shifts).square().sum(dim=-1)
