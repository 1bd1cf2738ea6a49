# Copyright (C) 2026 The anomalib-pedenet authors
# SPDX-License-Identifier: Apache-2.0

"""Small memory banks: which rows, or which centroids, stand for all normal embeddings.

Rows stream in; what is held in memory is bounded by the bank's size, whatever the size of the training set. Greedy
k-center and k-means need to see many rows at once: they choose from a uniform subset of 20 and 10 times the bank's
size.
"""

import logging
import time
import warnings
from abc import ABC, abstractmethod
from typing import ClassVar, Literal

import numpy as np
import torch
from anomalib.models.components import KCenterGreedy

logger = logging.getLogger(__name__)

Coreset = Literal["uniform", "k_center", "k_means"]

# Lloyd's iterations; more of them bring rows less than 0.2 % nearer to their centroids.
_KMEANS_ITERATIONS = 3

# Greedy k-center passes over the pool once for each row it chooses, and waits for memory: so in few dimensions.
_PROJECTED_DIM = 16


class BankBuilder(ABC):
    """Builds a bank of at most ``size`` rows from rows that stream in.

    Args:
        size (int): Largest number of rows.
        seed (int): Seed of whatever is random.
    """

    def __init__(self, size: int, seed: int = 0) -> None:
        self.size = size
        self.seed = seed

    @abstractmethod
    def update(self, rows: torch.Tensor) -> None:
        """Take in more rows ``[N, Z]``, on any device."""

    @abstractmethod
    def build(self) -> torch.Tensor:
        """Return the bank ``[M, Z]``, ``M <= size``, on the CPU."""


class UniformSubset(BankBuilder):
    """A uniform random subset, without replacement.

    Each row gets a random key and those with the smallest keys stay, in the order of arrival. Memory is bounded by the
    subset and a batch, and the result depends neither on batch sizes nor on knowing the number of rows beforehand.

    Args:
        size (int): Largest number of rows.
        seed (int): Seed of the keys.

    Attributes:
        rows (torch.Tensor): The subset so far, ``[n, Z]`` on the CPU.
        keys (np.ndarray): Its rows' keys, ``[n]`` in [0, 1).
    """

    def __init__(self, size: int, seed: int = 0) -> None:
        super().__init__(size, seed)
        self.keys = np.zeros(0)
        self.rows = torch.zeros(0)
        self._generator = np.random.default_rng(seed)

    def update(self, rows: torch.Tensor) -> None:
        """Take in more rows ``[N, Z]``, on any device."""
        keys = self._generator.random(len(rows))
        if len(self.keys) == self.size:  # only rows that displace one of the subset are worth copying
            candidates = np.flatnonzero(keys < self.keys.max())
            keys, rows = keys[candidates], rows[torch.from_numpy(candidates).to(rows.device)]
        keys = np.concatenate([self.keys, keys])
        rows = torch.cat([self.rows.reshape(-1, rows.shape[1]).to(rows.dtype), rows.cpu()])
        if len(keys) > self.size:
            kept = np.sort(np.argpartition(keys, self.size)[: self.size])
            keys, rows = keys[kept], rows[torch.from_numpy(kept)]
        self.keys, self.rows = keys, rows

    def build(self) -> torch.Tensor:
        """Return the subset."""
        return self.rows


class _KCenterGreedy(KCenterGreedy):
    """anomalib's, with the same memory for every round: taken anew for each, it scatters over gigabytes."""

    min_distances: torch.Tensor | None

    def update_distances(self, cluster_center: int | torch.Tensor | None) -> None:
        """Update each row's distance to the nearest center with a new center."""
        if cluster_center is None:
            return
        if self.min_distances is None:
            self.min_distances = torch.full_like(self.features[:, :1], torch.inf)
            self._differences = torch.empty_like(self.features)
            self._distances = torch.empty_like(self.min_distances)
        torch.sub(self.features, self.features[cluster_center], out=self._differences)
        torch.linalg.vector_norm(self._differences, dim=1, keepdim=True, out=self._distances)
        torch.minimum(self.min_distances, self._distances, out=self.min_distances)


class _PoolCoreset(UniformSubset):
    """A bank chosen at the end, from a uniform subset of ``pool_factor`` times its size.

    Args:
        size (int): Number of rows.
        seed (int): Seed of the subset and of the choice.
    """

    pool_factor: ClassVar[int]

    def __init__(self, size: int, seed: int = 0) -> None:
        super().__init__(size * self.pool_factor, seed)
        self.bank_size = size

    def build(self) -> torch.Tensor:
        """Return the bank; all rows if they are no more than its size."""
        return self.rows if len(self.rows) <= self.bank_size else self._choose()

    @abstractmethod
    def _choose(self) -> torch.Tensor:
        """Return ``bank_size`` rows that stand for the pool."""


class KCenterCoreset(_PoolCoreset):
    """Greedy k-center, as PatchCore's: each next row is the one farthest from those chosen, so that none is far.

    anomalib's ``KCenterGreedy`` chooses, by distances in a random projection to 16 dimensions. Its own projection is
    left out: made for thousands of dimensions, it would raise 64 to some 300.
    """

    pool_factor = 20

    def _choose(self) -> torch.Tensor:
        with torch.random.fork_rng(devices=[]):  # KCenterGreedy draws its first row from the global generator
            torch.manual_seed(self.seed)
            projected = self.rows
            if self.rows.shape[1] > _PROJECTED_DIM:
                projected = self.rows @ (torch.randn(self.rows.shape[1], _PROJECTED_DIM) / _PROJECTED_DIM**0.5)
            # Half a row more, so that rounding down gives the size; three dimensions leave the projection out.
            sampler = _KCenterGreedy(projected[:, None], (self.bank_size + 0.5) / len(projected))
            return self.rows[sampler.select_coreset_idxs()]


class KMeansCoreset(_PoolCoreset):
    """Centroids of k-means (scikit-learn's ``KMeans``): means of similar rows instead of rows."""

    pool_factor = 10

    def _choose(self) -> torch.Tensor:
        from sklearn.cluster import KMeans
        from sklearn.exceptions import ConvergenceWarning

        start = time.monotonic()
        kmeans = KMeans(
            self.bank_size,
            # Seeding by k-means++ alone would take longer than all the rest.
            init="random",
            n_init=1,
            max_iter=_KMEANS_ITERATIONS,
            algorithm="lloyd",
            random_state=self.seed,
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # of fewer distinct rows than centroids
            kmeans.fit(self.rows.numpy())
        logger.info(
            "k-means: %d centroids of %d embeddings in %.1f s.",
            self.bank_size,
            len(self.rows),
            time.monotonic() - start,
        )
        return torch.from_numpy(kmeans.cluster_centers_).to(self.rows.dtype)


_BUILDERS: dict[str, type[BankBuilder]] = {
    "uniform": UniformSubset,
    "k_center": KCenterCoreset,
    "k_means": KMeansCoreset,
}


def make_bank_builder(coreset: Coreset, size: int, seed: int = 0) -> BankBuilder:
    """Return a builder of banks by its name.

    Args:
        coreset (Coreset): ``"uniform"``, ``"k_center"`` or ``"k_means"``.
        size (int): Largest number of rows, at least 1.
        seed (int): Seed of whatever is random. Defaults to ``0``.

    Returns:
        BankBuilder: The builder.

    Raises:
        ValueError: If the name is unknown.
    """
    if coreset not in _BUILDERS:
        msg = f"coreset must be one of {', '.join(map(repr, _BUILDERS))}, got {coreset!r}."
        raise ValueError(msg)
    return _BUILDERS[coreset](size, seed)
