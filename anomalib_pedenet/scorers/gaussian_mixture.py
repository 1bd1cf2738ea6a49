# Copyright (C) 2026 The anomalib-pedenet authors
# SPDX-License-Identifier: Apache-2.0

"""A mixture of many Gaussians, fitted on normal embeddings by expectation maximisation.

Between a memory bank and a single Gaussian: a bank holds that each normal patch is as good as any other, so that a rare
one far from its rows is called abnormal; a single Gaussian tells rare from frequent, but takes whatever lies between
two kinds of patches for normal. A component for each kind of patch, with its own covariance, does neither.

Reference:
    C. M. Bishop, "Pattern Recognition and Machine Learning", 2006, section 9.2.
"""

import torch
from torch.nn.functional import one_hot

from anomalib_pedenet.scorers.coreset import UniformSubset, make_bank_builder
from anomalib_pedenet.scorers.density import GaussiansScorer, squared_distances, whiten

_ROWS = 30_000  # that the mixture is fitted on
_STEPS = 6  # of expectation maximisation; more change the density little
_ASSIGNMENTS = 8  # steps of k-means before them
_CHUNK = 512  # rows whose responsibilities are computed together, which stay in a CPU's cache

_TAUGHT = 8  # components that a teaching adds at most

# Of the variances towards their mean, before the mixture: what hardly varies must not be blown up.
_SHRINKAGE = 0.01
# Rows' worth of the mean covariance in that of each component, so that one of few rows is not singular.
_PRIOR_ROWS = 128
# Least variance of a component, as a fraction of that of all rows.
_LEAST_VARIANCE = 1e-3
# A row that belongs to a component by less does not change its covariance.
_LEAST_RESPONSIBILITY = 1e-3


class GaussianMixtureScorer(GaussiansScorer):
    """Negative log density under a mixture of Gaussians of the normal embeddings.

    It is fitted on a uniform subset of them: k-means, then expectation maximisation with full covariances, each drawn
    towards the mean of all.

    Args:
        embedding_dim (int): Dimension Z of the embeddings. Defaults to ``64``.
        seed (int): Seed of the subset and of the first centers. Defaults to ``0``.
        num_gaussians (int): Largest number K of components. Defaults to ``48``.

    Raises:
        ValueError: If ``num_gaussians`` is below 1.
    """

    def __init__(self, embedding_dim: int = 64, seed: int = 0, num_gaussians: int = 48) -> None:
        super().__init__(embedding_dim, seed)
        if num_gaussians < 1:
            msg = f"num_gaussians must be at least 1, got {num_gaussians}."
            raise ValueError(msg)
        self.num_gaussians = num_gaussians
        self._sample = UniformSubset(_ROWS, seed)

    def _reset(self) -> None:
        self._sample = UniformSubset(_ROWS, self.seed)

    def _update(self, embeddings: torch.Tensor) -> None:
        self._sample.update(embeddings)

    def _finalize(self) -> torch.Tensor:
        rows = self._sample.build().to(self.typical_score)
        self._reset()
        center, unwhitening = _fit_whitening(rows)
        whitened = torch.linalg.solve(unwhitening, (rows.double() - center).T).T.to(rows)
        weights, means, covariances = fit_mixture(whitened, self.num_gaussians, self.seed)
        means = means.double() @ unwhitening.T + center
        covariances = unwhitening @ covariances.double() @ unwhitening.T
        self._set_mixture(weights, means, whiten(covariances, 0.0))
        return torch.cat([self(part) for part in rows.split(_CHUNK)]).mean()

    def teach(
        self, embeddings: torch.Tensor, places: torch.Tensor | None = None, flagged: torch.Tensor | None = None
    ) -> None:
        """Add a few Gaussians for further normal embeddings.

        Each has the covariance of the Gaussian nearest to it and of what it was made from, and such a weight that its
        mean has the score t of a typical normal patch. Scores elsewhere rise by ``log(1 + n exp(-t))`` for n added
        Gaussians: by nothing that counts, since t is some tens of nats for 64 dimensions.

        Args:
            embeddings (torch.Tensor): Embeddings ``[N, Z]``, one or more.
            places (torch.Tensor | None): Unused.
            flagged (torch.Tensor | None): Unused.
        """
        del places, flagged
        heights = self.log_weights + self.log_norms
        eye = torch.eye(self.embedding_dim).to(self.whitening)
        for members in neighbor_groups(embeddings.to(self.shifts), _TAUGHT, self.seed):
            mean = members.mean(dim=0)
            nearest = int(squared_distances(mean, self.whitening, self.shifts).argmin())
            unwhitening = torch.linalg.solve_triangular(self.whitening[nearest], eye, upper=False)
            scatter = (members - mean).T @ (members - mean) / len(members)
            whitening = whiten((unwhitening @ unwhitening.T + scatter)[None], 0.0)
            log_norm = whitening.diagonal(dim1=1, dim2=2).log().sum(dim=1)
            height = torch.logsumexp(heights, dim=0) - self.typical_score
            self.log_weights = torch.cat([self.log_weights, height - log_norm])
            self.log_norms = torch.cat([self.log_norms, log_norm])
            self.shifts = torch.cat([self.shifts, (whitening[0] @ mean)[None]])
            self.whitening = torch.cat([self.whitening, whitening])


def neighbor_groups(rows: torch.Tensor, count: int, seed: int) -> list[torch.Tensor]:
    """Return rows ``[N, Z]`` in at most ``count`` groups of neighbours, by k-means."""
    builder = make_bank_builder("k_means", min(count, len(rows)), seed)
    builder.update(rows)
    centers = builder.build()
    nearest = torch.cdist(rows, centers).argmin(dim=1)
    return [rows[nearest == index] for index in nearest.unique().tolist()]


def _fit_whitening(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the mean ``[Z]`` of rows ``[N, Z]``, and a matrix ``[Z, Z]`` that gives whitened ones their covariance."""
    center = rows.double().mean(dim=0)
    centered = rows.double() - center
    variances, directions = torch.linalg.eigh(centered.T @ centered / len(rows))
    variances = variances.clamp(min=0)
    variances = variances + _SHRINKAGE * variances.mean() + torch.finfo(torch.float32).eps
    return center, directions * variances.sqrt()


def fit_mixture(rows: torch.Tensor, count: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Fit a mixture of Gaussians by expectation maximisation.

    Args:
        rows (torch.Tensor): Rows ``[N, Z]`` of about unit covariance.
        count (int): Largest number of components.
        seed (int): Seed of the first centers. Defaults to ``0``.

    Returns:
        tuple[torch.Tensor, torch.Tensor, torch.Tensor]: Weights ``[K]``, means ``[K, Z]`` and covariances
            ``[K, Z, Z]``. Components that lose all their rows are left out.
    """
    mixture = _maximize(rows, one_hot(_k_means(rows, min(count, len(rows)), seed)).to(rows))
    for _ in range(_STEPS):
        weights, means, covariances = mixture
        whitening = whiten(covariances, 0.0)
        gamma = torch.cat([_responsibilities(part, weights, means, whitening) for part in rows.split(_CHUNK)])
        mixture = _maximize(rows, gamma[:, gamma.sum(dim=0) >= 1])
    return mixture


def _k_means(rows: torch.Tensor, count: int, seed: int) -> torch.Tensor:
    """Return each row's center ``[N]``, of ``count`` that start at random rows and of which none is empty."""
    generator = torch.Generator().manual_seed(seed)
    centers = rows[torch.randperm(len(rows), generator=generator)[:count].to(rows.device)].clone()
    nearest = rows.new_zeros(len(rows), dtype=torch.long)
    for _ in range(_ASSIGNMENTS):
        nearest = (rows @ centers.T - centers.square().sum(dim=1) / 2).argmax(dim=1)
        counts = torch.bincount(nearest, minlength=len(centers))
        sums = torch.zeros_like(centers).index_add_(0, nearest, rows)
        centers = (sums / counts.clamp(min=1)[:, None])[counts > 0]
        nearest = (counts > 0).cumsum(dim=0)[nearest] - 1
    return nearest


def _maximize(rows: torch.Tensor, gamma: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return weights ``[K]``, means ``[K, Z]`` and covariances ``[K, Z, Z]`` by responsibilities ``[N, K]``."""
    counts = gamma.sum(dim=0)
    means = gamma.T @ rows / counts[:, None]
    scatters = torch.zeros(len(counts), rows.shape[1], rows.shape[1]).to(rows)
    for component, (mean, share) in enumerate(zip(means, gamma.unbind(dim=1), strict=True)):
        members = torch.nonzero(share > _LEAST_RESPONSIBILITY)[:, 0]
        centered = rows[members] - mean
        scatters[component] = (share[members, None] * centered).T @ centered
    within = scatters.sum(dim=0) / len(rows)
    covariances = (scatters + _PRIOR_ROWS * within) / (counts + _PRIOR_ROWS)[:, None, None]
    return counts / counts.sum(), means, covariances + _LEAST_VARIANCE * torch.eye(rows.shape[1]).to(rows)


def _responsibilities(
    rows: torch.Tensor, weights: torch.Tensor, means: torch.Tensor, whitening: torch.Tensor
) -> torch.Tensor:
    """Return the responsibilities ``[N, K]`` for rows ``[N, Z]`` of components of given :func:`whiten`."""
    shifts = torch.einsum("kyz,kz->ky", whitening, means)
    whitened = (rows @ whitening.flatten(0, 1).T).unflatten(-1, shifts.shape)  # [N, K, Z]
    heights = weights.log() + whitening.diagonal(dim1=1, dim2=2).log().sum(dim=1)
    return torch.softmax(heights - (whitened - shifts).square().sum(dim=-1) / 2, dim=1)
