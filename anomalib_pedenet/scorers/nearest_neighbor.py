# Copyright (C) 2026 The anomalib-pedenet authors
# SPDX-License-Identifier: Apache-2.0

"""Exact nearest-neighbour scorer (Eq. 12): the distance of an embedding to the nearest one in a memory bank."""

from functools import reduce
from typing import ClassVar

import numpy as np
import torch

from anomalib_pedenet.scorers.base import Scorer

# Products of this many queries and rows stay in a core's cache; measured fastest among tiles of 128 to 1,024 x 2,500.
_CPU_QUERIES, _CPU_ROWS = 256, 2_048
# Elsewhere the product of a chunk of queries and the whole bank takes at most this many float32 elements (64 MiB).
_CHUNK_ELEMENTS = 2**24
# The typical score is estimated on at most this many rows of the bank.
_TYPICAL_ROWS = 1_024


class UniformSubset:
    """A uniform random subset, without replacement, of rows that stream in.

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
        self.size = size
        self.keys = np.zeros(0)
        self.rows = torch.zeros(0)
        self._generator = np.random.default_rng(seed)

    def update(self, rows: torch.Tensor) -> None:
        """Take in more rows.

        Args:
            rows (torch.Tensor): ``[N, Z]`` rows, on any device.
        """
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


class NearestNeighborScorer(Scorer):
    """Euclidean distance to the nearest normal embedding, exactly.

    The bank is a :class:`UniformSubset` of the normal embeddings.

    The search is chunked matrix arithmetic: ``min_b |q - b|^2 = |q|^2 - 2 max_b (q.b - |b|^2 / 2)``. Bank and queries
    are taken relative to the bank's mean, which keeps the cancellation in that expression small. What remains of it
    shows where a distance is nearly 0: that of a row to itself reads up to 0.005 for 64 dimensions in (-1, 1), where
    normal patches score some tenths.

    Args:
        embedding_dim (int): Dimension Z of the embeddings. Defaults to ``64``.
        bank_size (int): Largest number of rows of the bank. Defaults to ``50_000``.
        seed (int): Seed of the subset. Defaults to ``0``.

    Raises:
        ValueError: If ``bank_size`` is not positive.

    Example:
        >>> scorer = NearestNeighborScorer(embedding_dim=2)
        >>> scorer.fit([torch.tensor([[0.0, 0.0], [4.0, 0.0]])])
        >>> scorer(torch.tensor([[0.0, 3.0], [4.0, 0.0]]))
        tensor([3., 0.])
    """

    exportable: ClassVar[bool] = True
    bank: torch.Tensor
    half_norms: torch.Tensor
    mean: torch.Tensor

    def __init__(self, embedding_dim: int = 64, bank_size: int = 50_000, seed: int = 0) -> None:
        super().__init__()
        if bank_size < 1:
            msg = f"bank_size must be at least 1 row, got {bank_size}."
            raise ValueError(msg)
        self.bank_size = bank_size
        self.seed = seed
        self.register_buffer("bank", torch.zeros(0, embedding_dim))  # [M, Z], relative to `mean`
        self.register_buffer("half_norms", torch.zeros(0))  # |b|^2 / 2, [M]
        self.register_buffer("mean", torch.zeros(embedding_dim))  # [Z]
        self._subset: UniformSubset | None = None  # of a fit under way

    @property
    def is_fitted(self) -> bool:
        """Whether the bank has rows."""
        return len(self.bank) > 0

    def reset(self) -> None:
        """Start a new fit; the present bank stays in use until :meth:`finalize`."""
        self._subset = UniformSubset(self.bank_size, self.seed)

    def update(self, embeddings: torch.Tensor) -> None:
        """Take in a batch of normal embeddings and keep a uniform subset of all so far.

        Args:
            embeddings (torch.Tensor): ``[N, Z]`` embeddings.

        Raises:
            ValueError: If the shape is wrong or a value is not finite.
            RuntimeError: If no fit was started.
        """
        if embeddings.ndim != 2 or embeddings.shape[1] != self.bank.shape[1]:
            msg = f"Embeddings must be [N, {self.bank.shape[1]}], got {tuple(embeddings.shape)}."
            raise ValueError(msg)
        if not bool(torch.isfinite(embeddings).all()):
            msg = "Embeddings of normal images are NaN or infinite; the training diverged: lower the learning_rate."
            raise ValueError(msg)
        if self._subset is None:
            msg = "Call reset() before update(), to start a fit."
            raise RuntimeError(msg)
        self._subset.update(embeddings.detach().to(self.bank.dtype))

    def finalize(self) -> None:
        """Put the subset to use as the bank.

        Raises:
            ValueError: If no embeddings came in since :meth:`reset`.
        """
        if self._subset is None or not len(self._subset.keys):
            msg = "The memory bank needs at least one normal embedding, got none: is the training set empty?"
            raise ValueError(msg)
        rows = self._subset.rows.to(self.mean)
        self.mean = rows.mean(dim=0)
        self.bank = rows - self.mean
        self.half_norms = self.bank.square().sum(dim=1) / 2
        self.typical_score = self._typical_score().to(self.typical_score)
        self._subset = None

    def forward(self, queries: torch.Tensor) -> torch.Tensor:
        """Return each query's distance to the nearest row of the bank.

        Args:
            queries (torch.Tensor): Embeddings ``[..., P, Z]``.

        Returns:
            torch.Tensor: Distances ``[..., P]`` in embedding units, float32.
        """
        with torch.autocast(queries.device.type, enabled=False):
            queries = queries.to(self.bank.dtype) - self.mean
            chunks = [self._nearest(chunk) for chunk in queries.split(self._queries_per_chunk(queries), dim=-2)]
            return torch.cat(chunks, dim=-1)

    def _queries_per_chunk(self, queries: torch.Tensor) -> int:
        if self._tile_rows(queries) < len(self.bank):
            return _CPU_QUERIES
        return max(1, _CHUNK_ELEMENTS // max(1, len(self.bank)))

    def _tile_rows(self, queries: torch.Tensor) -> int:
        """Return how many rows of the bank to multiply at once: tiles in eager mode on a CPU, else the whole bank.

        In an exported graph tiles would only be more nodes: the runtime's compiler chooses its own.
        """
        is_exporting = torch.jit.is_tracing() or torch.compiler.is_compiling()
        return _CPU_ROWS if queries.device.type == "cpu" and not is_exporting else max(1, len(self.bank))

    def _nearest(self, queries: torch.Tensor) -> torch.Tensor:
        """Return the distances ``[..., P]`` of one chunk of centred queries ``[..., P, Z]``."""
        tile_rows = self._tile_rows(queries)
        tiles = zip(self.bank.split(tile_rows), self.half_norms.split(tile_rows), strict=True)
        # max_b (q.b - |b|^2 / 2), [..., P]
        similarity = reduce(
            torch.maximum,
            ((queries @ rows.T - half_norms).amax(dim=-1) for rows, half_norms in tiles),
        )
        return (queries.square().sum(dim=-1) - 2 * similarity).clamp(min=0).sqrt()

    def _typical_score(self) -> torch.Tensor:
        """Return the mean distance from a row of the bank to the nearest other row (1 where that is undefined)."""
        count = min(len(self.bank), _TYPICAL_ROWS)
        chosen = torch.linspace(0, len(self.bank) - 1, count).long().to(self.bank.device)
        queries = self.bank[chosen]
        similarity = queries @ self.bank.T - self.half_norms  # [count, M]
        similarity[torch.arange(count, device=self.bank.device), chosen] = -torch.inf
        squared = queries.square().sum(dim=1) - 2 * similarity.amax(dim=1)
        typical = squared.clamp(min=0).sqrt().mean()
        is_usable = torch.isfinite(typical) & (typical > torch.finfo(typical.dtype).eps)
        return torch.where(is_usable, typical, torch.ones_like(typical))
