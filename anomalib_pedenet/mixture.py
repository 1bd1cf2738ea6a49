# Copyright (C) 2026 The anomalib-pedenet authors
# SPDX-License-Identifier: Apache-2.0

"""Gaussian mixture statistics and log density from soft assignments (Eqs. 3 to 6).

Everything stays in log space: in 64 dimensions a density under- or overflows float32. The covariance of a component
that gets fewer than Z embeddings is singular, so a jitter on its diagonal is part of the method.

References:
    PEDENet (https://arxiv.org/abs/2110.15525), Eqs. 3 to 6; the same estimates in DAGMM (Zong et al., ICLR 2018).
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch

CovarianceType = Literal["diag", "full"]


@dataclass(frozen=True)
class GaussianMixture:
    """Parameters of a Gaussian mixture with K components in Z dimensions.

    Attributes:
        weights (torch.Tensor): Mixture weights phi, ``[K]``, summing to 1.
        means (torch.Tensor): Component means mu, ``[K, Z]``.
        covariances (torch.Tensor): Covariances Sigma: variances ``[K, Z]`` (diagonal) or ``[K, Z, Z]`` (full).
    """

    weights: torch.Tensor
    means: torch.Tensor
    covariances: torch.Tensor

    @property
    def variances(self) -> torch.Tensor:
        """Diagonals of the covariances, ``[K, Z]``."""
        if self.covariances.ndim == 2:
            return self.covariances
        return self.covariances.diagonal(dim1=-2, dim2=-1)


def estimate_mixture(
    embeddings: torch.Tensor,
    responsibilities: torch.Tensor,
    covariance_type: CovarianceType = "diag",
    jitter: float = 1e-3,
) -> GaussianMixture:
    """Estimate the mixture of a batch from soft assignments (Eqs. 3 to 5).

    Args:
        embeddings (torch.Tensor): Embeddings z, ``[N, Z]``, floating point.
        responsibilities (torch.Tensor): Responsibilities gamma, ``[N, K]``, each row summing to 1.
        covariance_type (CovarianceType): ``"diag"`` for variances only or ``"full"``. Defaults to ``"diag"``.
        jitter (float): Added to the diagonal of every covariance, in squared embedding units. Defaults to ``1e-3``.

    Returns:
        GaussianMixture: Parameters phi, mu and Sigma; differentiable in both inputs.

    Raises:
        ValueError: If the shapes do not agree or ``covariance_type`` is unknown.
    """
    if embeddings.ndim != 2 or responsibilities.ndim != 2 or len(embeddings) != len(responsibilities):
        msg = (
            "embeddings must be [N, Z] and responsibilities [N, K] with the same N, "
            f"got {tuple(embeddings.shape)} and {tuple(responsibilities.shape)}."
        )
        raise ValueError(msg)
    # A component that no embedding chooses has an undefined mean; the floor gives it mean 0 and variance `jitter`.
    counts = responsibilities.sum(dim=0).clamp(min=torch.finfo(embeddings.dtype).eps)  # [K]
    weights = counts / len(embeddings)  # Eq. 3
    means = responsibilities.T @ embeddings / counts[:, None]  # Eq. 4, [K, Z]
    centered = embeddings[:, None] - means  # [N, K, Z]
    if covariance_type == "diag":
        covariances = torch.einsum("nk,nkz->kz", responsibilities, centered.square()) / counts[:, None] + jitter
    elif covariance_type == "full":
        covariances = torch.einsum("nk,nky,nkz->kyz", responsibilities, centered, centered) / counts[:, None, None]
        covariances = covariances + jitter * torch.eye(
            embeddings.shape[1],
            dtype=embeddings.dtype,
            device=embeddings.device,
        )  # Eq. 5
    else:
        msg = f"covariance_type must be 'diag' or 'full', got {covariance_type!r}."
        raise ValueError(msg)
    return GaussianMixture(weights, means, covariances)


def log_density(embeddings: torch.Tensor, mixture: GaussianMixture) -> torch.Tensor:
    """Log density of embeddings under a Gaussian mixture (logarithm of Eq. 6).

    ``log P(z) = logsumexp_k(log phi_k - (d_k(z)^2 + log|Sigma_k| + Z log 2 pi) / 2)`` with ``d_k`` the Mahalanobis
    distance. The paper's Eq. 6 has another power of 2 pi, which shifts the result by a constant.

    Args:
        embeddings (torch.Tensor): Embeddings z, ``[N, Z]``.
        mixture (GaussianMixture): Mixture of K components.

    Returns:
        torch.Tensor: log P(z) in nats, ``[N]``.

    Raises:
        ValueError: If a full covariance is not positive definite; the message names the remedy.
    """
    weights, means, covariances = mixture.weights, mixture.means, mixture.covariances
    centered = embeddings[:, None] - means  # [N, K, Z]
    if covariances.ndim == 2:
        mahalanobis = (centered.square() / covariances).sum(dim=-1)  # [N, K]
        log_determinant = covariances.log().sum(dim=-1)  # [K]
    else:
        factor, info = torch.linalg.cholesky_ex(covariances)  # Sigma = L L^T, [K, Z, Z]
        # Of embeddings that are not finite, neither are the covariances nor what is returned.
        is_singular = (info > 0) & covariances.isfinite().all(dim=-1).all(dim=-1)
        if bool(is_singular.any()):
            msg = (
                f"The covariances of components {torch.nonzero(is_singular).flatten().tolist()} are not positive "
                "definite, because those components hold too few or identical embeddings. Raise covariance_jitter, "
                "lower num_components, or use covariance_type='diag'."
            )
            raise ValueError(msg)
        whitened = torch.linalg.solve_triangular(factor, centered.permute(1, 2, 0), upper=False)  # [K, Z, N]
        mahalanobis = whitened.square().sum(dim=1).T  # [N, K]
        log_determinant = 2 * factor.diagonal(dim1=-2, dim2=-1).log().sum(dim=-1)  # [K], log|Sigma| = 2 sum log L_ii
    constant = embeddings.shape[-1] * math.log(2 * math.pi)
    component_log_density = -0.5 * (mahalanobis + log_determinant + constant)  # [N, K]
    return torch.logsumexp(weights.log() + component_log_density, dim=-1)  # [N]
