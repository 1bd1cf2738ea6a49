# Copyright (C) 2026 The anomalib-pedenet authors
# SPDX-License-Identifier: Apache-2.0

"""One-class scorers: a boundary around the normal embeddings, by a hyperplane (SVM) or a ball (SVDD)."""

import torch

from anomalib_pedenet.scorers.base import Scorer
from anomalib_pedenet.scorers.coreset import UniformSubset

# Kernels below exp of this count as that much.
_LEAST_EXPONENT = -60.0

# The kernel's width is chosen on at most this many rows.
_GAMMA_ROWS = 2_048

# Steps towards the centre of a ball; each is one pass over the rows.
_SVDD_STEPS = 300


class _OneClassScorer(Scorer):
    """A scorer that learns from a uniform subset of the normal embeddings.

    Args:
        embedding_dim (int): Dimension Z of the embeddings. Defaults to ``64``.
        seed (int): Seed of the subset. Defaults to ``0``.
        nu (float): Part of the normal embeddings that may lie outside the boundary, in (0, 1). Defaults to ``0.01``.
        max_rows (int): Largest number of embeddings to learn from. Defaults to ``50_000``.

    Raises:
        ValueError: If an argument is outside its range.
    """

    def __init__(self, embedding_dim: int = 64, seed: int = 0, nu: float = 0.01, max_rows: int = 50_000) -> None:
        super().__init__(embedding_dim, seed)
        if not 0 < nu < 1:
            msg = f"nu must lie between 0 and 1, got {nu}."
            raise ValueError(msg)
        if max_rows < 1:
            msg = f"max_rows must be at least 1, got {max_rows}."
            raise ValueError(msg)
        self.nu = nu
        self.max_rows = max_rows
        self._rows = UniformSubset(max_rows, seed)  # of a fit under way

    def _reset(self) -> None:
        self._rows = UniformSubset(self.max_rows, self.seed)

    def _update(self, embeddings: torch.Tensor) -> None:
        self._rows.update(embeddings)

    def _finalize(self) -> torch.Tensor:
        rows = self._rows.build()
        self._reset()
        self._learn(rows)
        return self(rows.to(self.typical_score)).mean()

    def _learn(self, rows: torch.Tensor) -> None:
        """Learn the boundary around rows ``[M, Z]``."""
        raise NotImplementedError


class OneClassSvmScorer(_OneClassScorer):
    """One-class support vector machine with a Gaussian kernel, as matrix arithmetic.

    scikit-learn's ``Nystroem`` maps embeddings to features whose inner products are about the kernel's, and its
    ``SGDOneClassSVM`` finds the hyperplane ``w`` that the normal features lie beyond. The score is ``|w| - w.phi(z)``:
    at least 0 but for the rounding of the features, since ``|phi(z)| <= 1``.

    Args:
        embedding_dim (int): Dimension Z of the embeddings. Defaults to ``64``.
        seed (int): Seed of the subset, the features and the descent. Defaults to ``0``.
        nu (float): Part of the normal embeddings that may lie beyond the hyperplane, in (0, 1). Defaults to ``0.01``.
        max_rows (int): Largest number of embeddings to learn from. Defaults to ``50_000``.
        num_features (int): Number of features; the kernel's centres are as many normal embeddings.
            Defaults to ``500``.
        gamma (float | None): The kernel is ``exp(-gamma |z - z'|^2)``. ``None`` for the inverse of the normal
            embeddings' mean square distance to the nearest centre, so that each sees about one of them: wider kernels
            see only whether an embedding is a frequent one. Defaults to ``None``.

    Raises:
        ValueError: If an argument is outside its range.
    """

    centers: torch.Tensor
    directions: torch.Tensor
    gamma: torch.Tensor
    norm: torch.Tensor

    def __init__(
        self,
        embedding_dim: int = 64,
        seed: int = 0,
        nu: float = 0.01,
        max_rows: int = 50_000,
        num_features: int = 500,
        gamma: float | None = None,
    ) -> None:
        super().__init__(embedding_dim, seed, nu, max_rows)
        if num_features < 1:
            msg = f"num_features must be at least 1, got {num_features}."
            raise ValueError(msg)
        if gamma is not None and not gamma > 0:
            msg = f"gamma must be above 0, or None to choose it, got {gamma}."
            raise ValueError(msg)
        self.num_features = num_features
        self.given_gamma = gamma
        self.register_buffer("centers", torch.zeros(0, embedding_dim))  # of the kernels, [F, Z]
        self.register_buffer(
            "directions", torch.zeros(0)
        )  # w in terms of the kernels: w.phi(z) = k(z, centers) . it, [F]
        self.register_buffer("gamma", torch.ones(()))
        self.register_buffer("norm", torch.zeros(()))  # |w|

    @property
    def is_fitted(self) -> bool:
        """Whether there is a hyperplane."""
        return len(self.centers) > 0

    def _learn(self, rows: torch.Tensor) -> None:
        from sklearn.kernel_approximation import Nystroem
        from sklearn.linear_model import SGDOneClassSVM

        gamma = self.given_gamma or self._choose_gamma(rows)
        nystroem = Nystroem(gamma=gamma, n_components=min(self.num_features, len(rows)), random_state=self.seed)
        features = nystroem.fit_transform(rows.double().numpy())
        svm = SGDOneClassSVM(nu=self.nu, random_state=self.seed, average=True).fit(features)
        directions = torch.from_numpy(nystroem.normalization_.T @ svm.coef_)
        self.centers = torch.from_numpy(nystroem.components_).to(self.typical_score)
        self.directions = directions.to(self.typical_score)
        self.gamma = torch.tensor(gamma).to(self.typical_score)
        self.norm = torch.from_numpy(svm.coef_).norm().to(self.typical_score)

    def _choose_gamma(self, rows: torch.Tensor) -> float:
        """Return the inverse of the mean square distance of rows to the nearest of as many as there are centres."""
        count = min(self.num_features, max(1, len(rows) // 2))
        is_center = torch.zeros(len(rows), dtype=torch.bool)
        is_center[torch.linspace(0, len(rows) - 1, count).long()] = True
        others = rows[~is_center]
        chosen = others[torch.linspace(0, len(others) - 1, min(len(others), _GAMMA_ROWS)).long()]
        squared = torch.cdist(chosen, rows[is_center]).square().amin(dim=1) if len(others) else torch.zeros(1)
        mean = squared.mean().item()
        return 1 / mean if mean > torch.finfo(torch.float32).eps else 1.0

    def forward(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Return how far each embedding's features fall short of the hyperplane's direction.

        Args:
            embeddings (torch.Tensor): Embeddings ``[..., Z]``.

        Returns:
            torch.Tensor: Scores ``[...]``, float32.
        """
        with torch.autocast(embeddings.device.type, enabled=False):
            embeddings = embeddings.to(self.centers.dtype)
            squared = (
                embeddings.square().sum(dim=-1, keepdim=True)
                - 2 * embeddings @ self.centers.T
                + self.centers.square().sum(dim=-1)
            )
            # Where nothing is near, the numbers would become so small that processors slow down.
            kernels = torch.exp((-self.gamma * squared).clamp(_LEAST_EXPONENT, 0.0))  # [..., F]
            return (self.norm - kernels @ self.directions).clamp(min=0)


class SvddScorer(_OneClassScorer):
    """Support vector data description: distance to the centre of the smallest ball around the normal embeddings.

    The ball's centre c and radius R minimise ``R^2 + sum_i max(0, |z_i - c|^2 - R^2) / (nu N)``. For a given centre
    the best ``R^2`` is the ``1 - nu`` quantile of the squared distances, and the mean of the embeddings outside it is
    where the centre is drawn to; so the centre goes there in ever smaller steps.

    Args:
        embedding_dim (int): Dimension Z of the embeddings. Defaults to ``64``.
        seed (int): Seed of the subset. Defaults to ``0``.
        nu (float): Part of the normal embeddings that may lie outside the ball, in (0, 1). Defaults to ``0.01``.
        max_rows (int): Largest number of embeddings to learn from. Defaults to ``50_000``.

    Raises:
        ValueError: If an argument is outside its range.

    Reference:
        SVDD (Tax and Duin, Machine Learning 54, 2004), with a linear kernel.
    """

    center: torch.Tensor

    def __init__(self, embedding_dim: int = 64, seed: int = 0, nu: float = 0.01, max_rows: int = 50_000) -> None:
        super().__init__(embedding_dim, seed, nu, max_rows)
        self.register_buffer("center", torch.zeros(0))  # [Z]

    @property
    def is_fitted(self) -> bool:
        """Whether there is a ball."""
        return len(self.center) > 0

    def _learn(self, rows: torch.Tensor) -> None:
        rows = rows.double()
        center = rows.mean(dim=0)
        for step in range(_SVDD_STEPS):
            squared = (rows - center).square().sum(dim=1)
            outside = squared >= torch.quantile(squared, 1 - self.nu)
            center = center + 2 / (step + 2) * (rows[outside].mean(dim=0) - center)
        self.center = center.to(self.center)

    def forward(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Return each embedding's distance to the centre of the ball.

        Args:
            embeddings (torch.Tensor): Embeddings ``[..., Z]``.

        Returns:
            torch.Tensor: Distances ``[...]`` in embedding units, float32.
        """
        return (embeddings.to(self.center.dtype) - self.center).square().sum(dim=-1).sqrt()
