# Copyright (C) 2026 The anomalib-pedenet authors
# SPDX-License-Identifier: Apache-2.0

"""Exact nearest-neighbour scorer (Eq. 12): the distance of an embedding to the nearest one in a memory bank."""

from collections.abc import Iterable
from functools import partial, reduce
from typing import ClassVar

import torch
from torch.nn.functional import conv2d, pad

from anomalib_pedenet.scorers.base import Scorer
from anomalib_pedenet.scorers.coreset import BankBuilder, Coreset, farthest_rows, make_bank_builder

# On a CPU and in an exported graph, products of so many queries (there all of them) and rows, which stay in the cache.
TILE_QUERIES, TILE_ROWS = 2_048, 1_000
# torch leaves convolutions of at least this many images to oneDNN, whatever the number of threads.
_CONVOLVED_IMAGES = 16
# Elsewhere the product of a chunk of queries and the whole bank takes at most this many float32 elements (64 MiB).
_CHUNK_ELEMENTS = 2**24
# What is taught takes at most this part of the bank: a tenth.
_TAUGHT_PART = 10
# The typical score is estimated on at most this many rows of the bank.
_TYPICAL_ROWS = 1_024


class MemoryBankScorer(Scorer):
    """A scorer with a memory bank, whose rows are chosen by a :class:`BankBuilder`.

    A subclass defines ``_set_bank``, ``is_fitted`` and ``forward``.

    Args:
        embedding_dim (int): Dimension Z of the embeddings that arrive. Defaults to ``64``.
        bank_size (float): Largest number of rows of the bank; below 1, as a fraction of all embeddings.
            Defaults to ``5_000``.
        coreset (Coreset): How they are chosen: ``"uniform"``, ``"k_center"``, ``"k_means"`` or ``"auto"``, see
            :func:`anomalib_pedenet.scorers.coreset.make_bank_builder`. Defaults to ``"auto"``.
        seed (int): Seed of that choice. Defaults to ``0``.
        num_neighbors (int): Number k of nearest rows whose mean distance is the score; all rows if the bank has fewer.
            Defaults to ``1``.

    Raises:
        ValueError: If ``bank_size`` or ``num_neighbors`` is outside its range, or ``coreset`` is unknown.
    """

    encodes_position: ClassVar[bool] = True

    def __init__(
        self,
        embedding_dim: int = 64,
        bank_size: float = 5_000,
        coreset: Coreset = "auto",
        seed: int = 0,
        num_neighbors: int = 1,
    ) -> None:
        super().__init__(embedding_dim, seed)
        check_bank_size(bank_size)
        if num_neighbors < 1:
            msg = f"num_neighbors must be at least 1, got {num_neighbors}."
            raise ValueError(msg)
        make_bank_builder(coreset, 1)  # an unknown name should be refused now
        self.bank_size = bank_size
        self.coreset: Coreset = coreset
        self.num_neighbors = num_neighbors
        self._builder: BankBuilder | None = None  # of a fit under way

    def _reset(self) -> None:
        size = self.bank_size
        if size < 1:
            if self._num_expected is None:
                msg = f"bank_size {size:g} is a fraction, but the number of embeddings is not known: give it in rows."
                raise ValueError(msg)
            size = max(1, round(size * self._num_expected))
        self._builder = make_bank_builder(self.coreset, int(size), self.seed)

    def _update(self, embeddings: torch.Tensor) -> None:
        if self._builder is not None:
            self._builder.update(embeddings)

    def _finalize(self) -> torch.Tensor:
        device = self.typical_score.device
        rows = self._builder.build() if self._builder is not None else torch.zeros(0, self.embedding_dim)
        others = self._builder.others if self._builder is not None else None
        self._builder = None
        typical = self._set_bank(rows.to(device))
        # Rows that were chosen to lie far apart say nothing of what is typical.
        return typical if others is None else self(others.to(device)).mean()

    def _set_bank(self, rows: torch.Tensor) -> torch.Tensor:
        """Put rows ``[M, Z]`` to use as the bank and return the mean score of one of them against the others."""
        raise NotImplementedError


def check_bank_size(bank_size: float) -> None:
    """Check the size of a memory bank.

    Raises:
        ValueError: If it is neither a number of rows nor a fraction of all embeddings.
    """
    is_fraction = 0 < bank_size < 1
    is_number = bank_size >= 1 and float(bank_size).is_integer()
    if not (is_fraction or is_number):
        msg = (
            f"bank_size must be a number of rows, at least 1, or a fraction of all embeddings below 1, got {bank_size}."
        )
        raise ValueError(msg)


def append_norms(rows: torch.Tensor) -> torch.Tensor:
    """Return rows b ``[..., Z]`` as ``[b, -|b|^2 / 2]``, whose product with ``[q, 1]`` is ``q.b - |b|^2 / 2``."""
    return torch.cat([rows, -rows.square().sum(dim=-1, keepdim=True) / 2], dim=-1)


def round_bank(bank: torch.Tensor, mean: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Round a bank to half precision, and keep the norms of its rows in two numbers.

    float16 keeps all of it as it is but the lower number, and that to a relative 5e-4: the norm has 22 bits then, where
    half precision has 11 and rounds one of 300 by an eighth, which is as much as normal patches' distances.

    Args:
        bank (torch.Tensor): Rows ``[..., Z]`` relative to their mean.
        mean (torch.Tensor): Their mean, ``[Z]``.

    Returns:
        tuple[torch.Tensor, torch.Tensor]: The rounded mean; and relative to it the rounded rows b as
            ``[b, high, low]``, ``[..., Z + 2]``, with ``high + low = -|b|^2 / 2``.
    """
    rounded_mean = mean.half().to(mean.dtype)
    rows = (bank + mean - rounded_mean).half().to(bank.dtype)
    norms = -rows.square().sum(dim=-1, keepdim=True) / 2
    high = norms.clamp(min=torch.finfo(torch.float16).min).half().to(rows.dtype)
    return rounded_mean, torch.cat([rows, high, norms - high], dim=-1)


def append_ones(queries: torch.Tensor, count: int = 1) -> torch.Tensor:
    """Return queries q ``[..., Z]`` as ``[q, 1]``, see :func:`append_norms`, or with more ones."""
    return torch.cat([queries, *[torch.ones_like(queries[..., :1])] * count], dim=-1)


def to_distances(queries: torch.Tensor, products: torch.Tensor) -> torch.Tensor:
    """Return the distances ``|q - b|`` of queries q whose products ``q.b - |b|^2 / 2`` are given.

    Args:
        queries (torch.Tensor): ``[..., Z]``.
        products (torch.Tensor): ``[...]``.

    Returns:
        torch.Tensor: Distances ``[...]``.
    """
    return (queries.square().sum(dim=-1) - 2 * products).clamp(min=0).sqrt()


def multiply_by_onednn(queries: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Return the products ``[N, m]`` of queries ``[N, Z]`` and rows ``[m, Z]``, as a convolution of 1x1.

    torch computes it by oneDNN, and a matrix product by MKL, which leaves AVX-512 to Intel's processors: on others
    oneDNN is up to twice as fast.

    Args:
        queries (torch.Tensor): As many as a multiple of 16.
        rows (torch.Tensor): Rows.
    """
    images = queries.reshape(_CONVOLVED_IMAGES, len(queries) // _CONVOLVED_IMAGES, 1, queries.shape[1])
    products = conv2d(images.permute(0, 3, 1, 2), rows[:, :, None, None])
    return products.permute(0, 2, 3, 1).reshape(len(queries), len(rows))


def _largest(products: torch.Tensor, count: int) -> torch.Tensor:
    """Return the largest products ``[..., k]`` of ``[..., m]``, all where there are no more."""
    return products.topk(min(count, products.shape[-1]), dim=-1).values


def _least_redundant(rows: torch.Tensor, count: int) -> torch.Tensor:
    """Return the positions, in order, of ``count`` rows: those without which others are farthest from the next one.

    Of two rows that are nearest to each other one is kept.
    """
    distances, nearest = [], []
    for start, part in zip(range(0, len(rows), _TYPICAL_ROWS), rows.split(_TYPICAL_ROWS), strict=True):
        between = torch.cdist(part, rows)
        between[torch.arange(len(part)), torch.arange(start, start + len(part))] = torch.inf
        least, place = between.min(dim=1)
        distances.append(least)
        nearest.append(place)
    removed: set[int] = set()
    other = torch.cat(nearest).tolist()
    for position in torch.cat(distances).argsort().tolist():
        if len(removed) == len(rows) - count:
            break
        if other[position] not in removed:
            removed.add(position)
    return torch.tensor([position for position in range(len(rows)) if position not in removed], device=rows.device)


class NearestNeighborScorer(MemoryBankScorer):
    """Euclidean distance to the nearest normal embedding, or the mean distance to the k nearest, exactly.

    The search is chunked matrix arithmetic: ``min_b |q - b|^2 = |q|^2 - 2 max_b (q.b - |b|^2 / 2)``, where the maximum
    is that of one product, of ``[q, 1]`` and ``[b, -|b|^2 / 2]``. Bank and queries are taken relative to the bank's
    mean, which keeps the cancellation in that expression small. What remains of it shows where a distance is nearly 0:
    that of a row to itself reads up to 0.005 for 64 dimensions in (-1, 1), where normal patches score some tenths.

    Args:
        embedding_dim (int): Dimension Z of the embeddings. Defaults to ``64``.
        bank_size (float): Largest number of rows of the bank, or below 1 a fraction. Defaults to ``5_000``.
        coreset (Coreset): How they are chosen, see :class:`MemoryBankScorer`. Defaults to ``"auto"``.
        seed (int): Seed of that choice. Defaults to ``0``.
        num_neighbors (int): Number k of nearest rows whose mean distance is the score; all rows if the bank has fewer.
            Defaults to ``1``.
        reweight_neighbors (int): PatchCore's re-weighting of an image's score, with that many neighbours of the row
            that its most abnormal patch is nearest to (PatchCore: 9); 0 for none. Defaults to ``0``.

    Raises:
        ValueError: If an argument is outside its range.

    Examples:
        >>> scorer = NearestNeighborScorer(embedding_dim=2)
        >>> scorer.fit([torch.tensor([[0.0, 0.0], [4.0, 0.0]])])
        >>> scorer(torch.tensor([[0.0, 3.0], [4.0, 0.0]]))
        tensor([3., 0.])
    """

    rows: torch.Tensor
    mean: torch.Tensor

    def __init__(
        self,
        embedding_dim: int = 64,
        bank_size: float = 5_000,
        coreset: Coreset = "auto",
        seed: int = 0,
        num_neighbors: int = 1,
        reweight_neighbors: int = 0,
    ) -> None:
        super().__init__(embedding_dim, bank_size, coreset, seed, num_neighbors)
        if reweight_neighbors < 0:
            msg = f"reweight_neighbors must be at least 0, got {reweight_neighbors}."
            raise ValueError(msg)
        self.reweight_neighbors = reweight_neighbors
        self.register_buffer("rows", torch.zeros(0, embedding_dim + 1))  # b, relative to `mean`, and -|b|^2 / 2
        self.register_buffer("mean", torch.zeros(embedding_dim))  # [Z]

    @property
    def bank(self) -> torch.Tensor:
        """The memory bank ``[M, Z]``, relative to its mean."""
        return self.rows[:, : self.embedding_dim]

    @property
    def is_fitted(self) -> bool:
        """Whether the bank has rows."""
        return len(self.rows) > 0

    def _set_bank(self, rows: torch.Tensor) -> torch.Tensor:
        self.mean = rows.mean(dim=0)
        self.rows = append_norms(rows - self.mean)
        return self._typical_score()

    def teach(
        self, embeddings: torch.Tensor, places: torch.Tensor | None = None, flagged: torch.Tensor | None = None
    ) -> None:
        """Put further embeddings into the bank.

        The bank does not grow beyond ``bank_size``: what is added is a tenth of it at most, and takes the place of the
        rows that others are nearest to. Each time it is the embedding that is farthest from the bank and from all that
        was added before, until none is farther than a normal one typically is.

        Args:
            embeddings (torch.Tensor): Embeddings ``[N, Z]``, one or more.
            places (torch.Tensor | None): Unused.
            flagged (torch.Tensor | None): Unused.
        """
        del places, flagged
        limit = max(1, len(self.rows) // _TAUGHT_PART)
        rows = embeddings.to(self.rows) - self.mean
        taught = rows[farthest_rows(rows, limit, self.bank, float(self.typical_score))]
        room = int(self.bank_size) - len(self.rows) if self.bank_size >= 1 else 0
        kept = self.bank[_least_redundant(self.bank, len(self.rows) - max(0, len(taught) - max(0, room)))]
        self.rows = append_norms(torch.cat([kept, taught]))

    def round_to_half(self) -> None:
        """Round the bank to half precision, so that float16 keeps it, and its distances, as they are."""
        self.mean, self.rows = round_bank(self.bank, self.mean)

    def forward(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Return each embedding's distance to the nearest row of the bank (the mean distance to the k nearest).

        Args:
            embeddings (torch.Tensor): Embeddings ``[..., Z]``.

        Returns:
            torch.Tensor: Distances ``[...]`` in embedding units, float32.
        """
        with torch.autocast(embeddings.device.type, enabled=False):
            queries = self._prepare(embeddings)
            is_exporting = torch.jit.is_tracing() or torch.compiler.is_compiling()
            if queries.device.type == "cpu" and not is_exporting:
                return self._score_in_tiles(queries.flatten(0, -2)).reshape(embeddings.shape[:-1])
            # The batch, which is dynamic in an exported graph, is not to be cut into chunks.
            flat = queries.flatten(1, -2) if queries.ndim > 3 else queries
            size = max(1, _CHUNK_ELEMENTS // max(1, len(self.rows)))
            banks = self.rows.split(TILE_ROWS) if is_exporting else (self.rows,)
            chunks = [self._score((chunk @ rows.T for rows in banks), chunk) for chunk in flat.split(size, dim=-2)]
            return torch.cat(chunks, dim=-1).reshape(embeddings.shape[:-1])

    def image_weights(self, embeddings: torch.Tensor, scores: torch.Tensor) -> torch.Tensor | None:
        """Return PatchCore's weights of the images' scores, if ``reweight_neighbors`` asks for them.

        The weight is ``1 - exp(d) / sum_b exp(d_b)``: d the distance from the image's most abnormal patch to the row
        of the bank nearest to it, and d_b its distances to that row's nearest rows (itself included).

        Args:
            embeddings (torch.Tensor): Embeddings ``[B, h, w, Z]``.
            scores (torch.Tensor): Their scores ``[B, h, w]``.

        Returns:
            torch.Tensor | None: Weights ``[B]`` in 0..1, or ``None``.

        Reference:
            PatchCore (Roth et al., CVPR 2022), Eqs. 6 and 7.
        """
        if self.reweight_neighbors == 0:
            return None
        queries = self._prepare(embeddings).flatten(1, 2)  # [B, P, Z + 1]
        worst = scores.flatten(1).argmax(dim=1)  # [B]
        query = queries.gather(1, worst[:, None, None].expand(-1, 1, queries.shape[2]))[:, 0]  # [B, Z + 1]
        nearest = self.bank[(query @ self.rows.T).argmax(dim=1)] + self.mean  # [B, Z]
        count = min(self.reweight_neighbors, len(self.rows))
        support = (self._prepare(nearest) @ self.rows.T).topk(count, dim=1).indices  # [B, count], itself first
        distances = (query[:, None, : self.embedding_dim] - self.bank[support]).norm(dim=2)
        return 1 - torch.softmax(distances, dim=1)[:, 0]

    def _prepare(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Return embeddings ``[..., Z]`` as queries ``[..., Z + 1]``: relative to the mean, and what norms need."""
        return append_ones(embeddings.detach().to(self.rows.dtype) - self.mean, self.rows.shape[1] - self.embedding_dim)

    def _score_in_tiles(self, queries: torch.Tensor) -> torch.Tensor:
        """Return the scores ``[N]`` of prepared queries ``[N, Z + 1]``, by products that stay in a core's cache."""
        count = len(queries)
        queries = pad(queries, (0, 0, 0, _CONVOLVED_IMAGES - count % _CONVOLVED_IMAGES))
        banks = self.rows.split(TILE_ROWS)
        scores = [
            self._score((multiply_by_onednn(chunk, rows) for rows in banks), chunk)
            for chunk in queries.split(TILE_QUERIES)
        ]
        return torch.cat(scores)[:count]

    def _score(self, products: Iterable[torch.Tensor], queries: torch.Tensor) -> torch.Tensor:
        """Return the scores ``[..., P]`` of prepared queries ``[..., P, Z + 1]`` from their products with all rows.

        Args:
            products (Iterable[torch.Tensor]): ``q.b - |b|^2 / 2``, ``[..., P, m]`` for m rows after the other.
            queries (torch.Tensor): The queries.
        """
        queries = queries[..., : self.embedding_dim]
        count = min(self.num_neighbors, len(self.rows))
        # map() lets go of a product before the next one is made, which then takes its place in the cache.
        if count == 1:
            return to_distances(queries, reduce(torch.maximum, map(partial(torch.amax, dim=-1), products)))
        best = torch.cat(list(map(partial(_largest, count=count), products)), dim=-1)
        best = best.topk(count, dim=-1).values  # [..., P, k]
        return to_distances(queries[..., None, :], best).mean(dim=-1)

    def _typical_score(self) -> torch.Tensor:
        """Return the mean score of rows of the bank against the others (not finite where that is undefined)."""
        count = min(len(self.rows), _TYPICAL_ROWS)
        chosen = torch.linspace(0, len(self.rows) - 1, count).long().to(self.rows.device)
        queries = self._prepare(self.bank[chosen] + self.mean)
        similarity = queries @ self.rows.T  # [count, M]
        similarity[torch.arange(count, device=self.rows.device), chosen] = -torch.inf
        neighbors = max(1, min(self.num_neighbors, len(self.rows) - 1))
        queries = queries[:, None, : self.embedding_dim]
        return to_distances(queries, similarity.topk(neighbors, dim=1).values).mean()
