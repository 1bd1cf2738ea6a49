# Copyright (C) 2026 The anomalib-pedenet authors
# SPDX-License-Identifier: Apache-2.0

"""Small memory banks: which rows, or which centroids, stand for all normal embeddings.

Rows stream in; what is held in memory is bounded by the bank's size, whatever the size of the training set. Greedy
k-center and k-means need to see many rows at once: they choose from a uniform subset of 80 and 10 times the bank's
size.
"""

import logging
import math
import time
import warnings
from abc import ABC, abstractmethod
from typing import ClassVar, Literal, get_args

import numpy as np
import torch

logger = logging.getLogger(__name__)

Coreset = Literal["auto", "uniform", "k_center", "k_means"]

MAX_CENTERS = 5_000
"""``"auto"`` is greedy k-center up to this many rows: beyond, it takes long, and much memory to choose from."""

# Lloyd's iterations; more of them bring rows less than 0.2 % nearer to their centroids.
_KMEANS_ITERATIONS = 3

# Rows among which greedy k-center looks for the next ones, and how many are compared with those together: their
# products stay in a core's cache.
_NOMINEES = 256
_TOGETHER = 1024

_ROUNDING = 1e-5  # of squared distances, relative to the squared norm, in float32
_OTHERS = 4_000  # rows that are not in the bank of which to tell, and up to twice as many


class BankBuilder(ABC):
    """Builds a bank of at most ``size`` rows from rows that stream in.

    Args:
        size (int): Largest number of rows.
        seed (int): Seed of whatever is random.

    Attributes:
        others (torch.Tensor | None): Once built, some rows ``[m, Z]`` that came and are not in the bank, evenly spread;
            ``None`` if it does not know of any.
    """

    others: torch.Tensor | None = None

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
    """

    def __init__(self, size: int, seed: int = 0) -> None:
        super().__init__(size, seed)
        self._num_seen = 0
        # What is kept lies in this order, and what displaces a row takes its place.
        self._keys = np.zeros(0)
        self._arrivals = np.zeros(0, dtype=np.int64)
        self._kept = torch.zeros(0)
        self._generator = np.random.default_rng(seed)

    @property
    def rows(self) -> torch.Tensor:
        """The subset so far, ``[n, Z]`` on the CPU."""
        return self._kept[: len(self._keys)][torch.from_numpy(np.argsort(self._arrivals))]

    def update(self, rows: torch.Tensor) -> None:
        """Take in more rows ``[N, Z]``, on any device."""
        keys = self._generator.random(len(rows))
        arrivals = np.arange(self._num_seen, self._num_seen + len(rows))
        self._num_seen += len(rows)
        start = len(self._keys)
        free = min(self.size - start, len(rows))
        if start + free > len(self._kept):  # twice as much room, so that rows are seldom copied
            room = torch.empty(min(self.size, 2 * (start + free)) - start, *rows.shape[1:], dtype=rows.dtype)
            self._kept = torch.cat([self._kept[:start].reshape(start, *rows.shape[1:]), room])
        self._kept[start : start + free] = rows[:free].cpu()
        self._keys = np.concatenate([self._keys, keys[:free]])
        self._arrivals = np.concatenate([self._arrivals, arrivals[:free]])
        if free < len(rows):
            self._displace(rows[free:], keys[free:], arrivals[free:])

    def _displace(self, rows: torch.Tensor, keys: np.ndarray, arrivals: np.ndarray) -> None:
        """Put rows with small keys into the places of those with the largest."""
        candidates = np.flatnonzero(keys < self._keys.max())
        both = np.concatenate([self._keys, keys[candidates]])
        stays = np.zeros(len(both), dtype=bool)
        stays[np.argpartition(both, self.size - 1)[: self.size]] = True
        places = np.flatnonzero(~stays[: self.size])
        chosen = candidates[stays[self.size :]]
        self._kept[torch.from_numpy(places)] = rows[torch.from_numpy(chosen).to(rows.device)].cpu()
        self._keys[places], self._arrivals[places] = keys[chosen], arrivals[chosen]

    def build(self) -> torch.Tensor:
        """Return the subset."""
        return self.rows


class _PoolCoreset(UniformSubset):
    """A bank chosen at the end, from a uniform subset of ``pool_factor`` times its size.

    Args:
        size (int): Number of rows.
        seed (int): Seed of the subset, and of the choice if chance is in it.
    """

    pool_factor: ClassVar[int]

    def __init__(self, size: int, seed: int = 0) -> None:
        super().__init__(size * self.pool_factor, seed)
        self.bank_size = size

    def build(self) -> torch.Tensor:
        """Return the bank; all rows if they are no more than its size."""
        pool = self.rows
        return pool if len(pool) <= self.bank_size else self._choose(pool)

    @abstractmethod
    def _choose(self, pool: torch.Tensor) -> torch.Tensor:
        """Return at most ``bank_size`` rows that stand for a larger pool ``[n, Z]``."""


class KCenterCoreset(_PoolCoreset):
    """Greedy k-center, as PatchCore's: each next row is the one farthest from those chosen, so that none is far.

    The pool is large, since rare normal patches must be in it.
    """

    pool_factor = 80

    def _choose(self, pool: torch.Tensor) -> torch.Tensor:
        start = time.monotonic()
        chosen = farthest_rows(pool, self.bank_size)
        logger.info("k-center: %d of %d embeddings in %.1f s.", len(chosen), len(pool), time.monotonic() - start)
        is_other = torch.ones(len(pool), dtype=torch.bool)
        is_other[chosen] = False
        others = is_other.nonzero()[:, 0]
        self.others = pool[others[:: max(1, len(others) // _OTHERS)]]
        return pool[chosen]


class KMeansCoreset(_PoolCoreset):
    """Centroids of k-means (scikit-learn's ``KMeans``): means of similar rows instead of rows."""

    pool_factor = 10

    def _choose(self, pool: torch.Tensor) -> torch.Tensor:
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
            kmeans.fit(pool.numpy())
        logger.info(
            "k-means: %d centroids of %d embeddings in %.1f s.",
            self.bank_size,
            len(pool),
            time.monotonic() - start,
        )
        return torch.from_numpy(kmeans.cluster_centers_).to(pool.dtype)


def farthest_rows(
    rows: torch.Tensor, count: int, known: torch.Tensor | None = None, least: float = 0.0
) -> torch.Tensor:
    """Choose rows one after the other: each time the one that is farthest from those before.

    A search of all rows for each of them would read all rows as often. But distances to what is chosen only fall. So
    some nominees, those that are farthest now, are searched alone, as long as one of them is farther than all other
    rows were. Then the distances of all rows are brought up to date, by one matrix product. The result is the same.

    Args:
        rows (torch.Tensor): Rows ``[N, Z]``, one or more.
        count (int): How many to choose at most.
        known (torch.Tensor | None): Rows ``[M, Z]`` that are there before. Defaults to ``None``: the first of ``rows``.
        least (float): Distance by which a row must be farther, but for the first. Defaults to ``0.0``.

    Returns:
        torch.Tensor: Their positions, in the order of choice, int64. Fewer than ``count`` if none is farther.
    """
    center = rows.mean(dim=0)
    rows = rows - center
    if known is None or len(known) == 0:
        chosen = torch.zeros(min(1, count), dtype=torch.long, device=rows.device)
        added = rows[chosen]
    else:
        chosen = torch.zeros(0, dtype=torch.long, device=rows.device)
        added = known - center
    squares = torch.full_like(rows[:, 0], torch.inf)  # of the distances to what is there
    while True:
        if len(added):
            for part, of_part in zip(rows.split(_TOGETHER), squares.split(_TOGETHER), strict=True):
                torch.minimum(of_part, _least_squared_distance(part, added), out=of_part)
        squares[chosen] = 0
        values, nominees = squares.topk(min(_NOMINEES + 1, len(rows)))
        others = float(values[-1]) if len(values) < len(rows) else -math.inf
        first = 1 if len(chosen) == 0 else 0
        picked = _pick_farthest(values, rows[nominees], count - len(chosen), others, least**2, first)
        if not picked:
            return chosen
        added = rows[nominees[picked]]
        chosen = torch.cat([chosen, nominees[picked]])


def _pick_farthest(
    squares: torch.Tensor, rows: torch.Tensor, count: int, others: float, least: float, first: int
) -> list[int]:
    """Return the positions of at most ``count`` rows ``[n, Z]``, each the farthest, as far as that can be told.

    Args:
        squares (torch.Tensor): Squared distances of the rows to what is there before, ``[n]``.
        rows (torch.Tensor): Rows.
        count (int): How many to pick at most.
        others (float): That of rows that are not among these is no larger.
        least (float): What is not above it is not picked.
        first (int): So many are picked in any case.
    """
    between = torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist").square()
    picked: list[int] = []
    while len(picked) < count:
        position = int(squares.argmax())
        value = float(squares[position])
        is_too_near = value <= least and len(picked) >= first
        if is_too_near or (picked and value < others):
            break
        picked.append(position)
        squares = torch.minimum(squares, between[position])
    return picked


def _least_squared_distance(rows: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """Return the squared distance of each of the rows ``[N, Z]`` to the nearest of others ``[M, Z]``.

    It is 0 where it is so small, beside the row's square, that it may be rounding alone.
    """
    products = torch.addmm(others.square().sum(dim=1), rows, others.T, alpha=-2)
    own = rows.square().sum(dim=1)
    squares = products.amin(dim=1) + own
    return torch.where(squares > _ROUNDING * own, squares, 0.0)


_BUILDERS: dict[str, type[BankBuilder]] = {
    "uniform": UniformSubset,
    "k_center": KCenterCoreset,
    "k_means": KMeansCoreset,
}


def make_bank_builder(coreset: Coreset, size: int, seed: int = 0) -> BankBuilder:
    """Return a builder of banks by its name.

    Args:
        coreset (Coreset): ``"uniform"``, ``"k_center"``, ``"k_means"``, or ``"auto"`` for k-center up to
            :data:`MAX_CENTERS` rows and a uniform subset beyond.
        size (int): Largest number of rows, at least 1.
        seed (int): Seed of whatever is random. Defaults to ``0``.

    Returns:
        BankBuilder: The builder.

    Raises:
        ValueError: If the name is unknown.
    """
    if coreset == "auto":
        coreset = "k_center" if size <= MAX_CENTERS else "uniform"
    if coreset not in _BUILDERS:
        msg = f"coreset must be one of {', '.join(map(repr, get_args(Coreset)))}, got {coreset!r}."
        raise ValueError(msg)
    return _BUILDERS[coreset](size, seed)
