# Copyright (C) 2026 The anomalib-pedenet authors
# SPDX-License-Identifier: Apache-2.0

"""Builders of small memory banks."""

from typing import get_args

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist
from sklearn.cluster import KMeans

from anomalib_pedenet.scorers.coreset import (
    Coreset,
    KCenterCoreset,
    UniformSubset,
    farthest_rows,
    make_bank_builder,
)

every = pytest.mark.parametrize("coreset", get_args(Coreset))


def build(coreset: str, rows: torch.Tensor, size: int, seed: int = 0, batch: int = 300) -> torch.Tensor:
    builder = make_bank_builder(coreset, size, seed)
    for part in rows.split(batch):
        builder.update(part)
    return builder.build()


def clusters(num: int, dim: int = 8) -> torch.Tensor:
    """Rows in ``num`` tight clusters, the first with 100 times as many as the others."""
    torch.manual_seed(0)
    counts = [1000] + [10] * (num - 1)
    centers = 10 * torch.randn(num, dim)
    return torch.cat([center + 0.01 * torch.randn(n, dim) for center, n in zip(centers, counts, strict=True)])


@every
def test_size_order_of_batches_and_seed(coreset: str) -> None:
    rows = torch.randn(5000, 20)  # more than any pool holds
    bank = build(coreset, rows, 50)
    assert bank.shape == (50, 20)
    assert bank.dtype == torch.float32
    torch.testing.assert_close(build(coreset, rows, 50, batch=77), bank, rtol=0, atol=0)
    assert not torch.equal(build(coreset, rows, 50, seed=1), bank)


@every
@pytest.mark.parametrize("count", [1, 30, 50])
def test_no_more_rows_than_the_size_stay_as_they_are(coreset: str, count: int) -> None:
    rows = torch.randn(count, 20)
    torch.testing.assert_close(build(coreset, rows, 50), rows, rtol=0, atol=0)


@every
def test_memory_is_bounded(coreset: str) -> None:
    builder = make_bank_builder(coreset, 10)
    for _ in range(20):
        builder.update(torch.randn(1000, 3))
    assert len(builder.rows) <= 10 * 80  # the pool of 'k_center', the largest


@every
def test_the_global_generator_is_left_alone(coreset: str) -> None:
    rows = torch.randn(2000, 20)
    before = torch.get_rng_state()
    build(coreset, rows, 50)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_uniform_subset_is_without_replacement_and_uniform() -> None:
    rows = torch.arange(2000.0)[:, None]
    counts = np.zeros(2000)
    for seed in range(200):
        subset = UniformSubset(200, seed)
        for batch in rows.split(300):
            subset.update(batch)
        chosen = subset.build().flatten().long().numpy()
        assert len(np.unique(chosen)) == 200
        assert (np.diff(chosen) > 0).all()  # in the order of arrival
        counts[chosen] += 1
    # Each row is in a tenth of the 200 subsets: 20 +- 4.2; the early and the late halves equally often.
    assert counts.max() < 45
    assert abs(counts[:1000].sum() - counts[1000:].sum()) / counts.sum() < 0.02


def test_k_center_takes_one_row_of_each_cluster_however_small() -> None:
    rows = clusters(30)
    bank = build("k_center", rows, 60)  # the pool holds all rows
    assert cdist(rows, bank).min(axis=1).max() < 0.1
    assert cdist(rows, build("uniform", rows, 60)).min(axis=1).max() > 1  # which a uniform subset misses
    assert (cdist(bank, rows).min(axis=1) == 0).all()  # rows, not means


def search_one_by_one(rows: torch.Tensor, count: int, known: torch.Tensor | None = None, least: float = 0) -> list[int]:
    """Return the positions of what is farthest from what is there, each searched among all rows."""
    chosen = [0] if known is None else []
    while len(chosen) < count:
        there = torch.cat([rows[:0] if known is None else known, rows[chosen]])
        distances = cdist(rows.numpy(), there.numpy()).min(axis=1)
        if chosen and distances.max() <= least:
            break
        chosen.append(int(distances.argmax()))
    return chosen


@pytest.mark.parametrize("count", [1, 12, 700])
def test_the_farthest_rows_are_those_of_a_search_one_by_one(count: int) -> None:
    """Among more rows than are nominated at a time, few of them far out."""
    generator = torch.Generator().manual_seed(0)
    rows = 7 + torch.randn(2_000, 5, generator=generator) * torch.rand(2_000, 1, generator=generator) ** 3
    assert farthest_rows(rows, count).tolist() == search_one_by_one(rows, count)
    known = rows[::400] + 1
    assert farthest_rows(rows, count, known).tolist() == search_one_by_one(rows, count, known)
    for least in (0.5, 2.0, 100.0):
        expected = search_one_by_one(rows, count, known, least)
        assert farthest_rows(rows, count, known, least).tolist() == expected
    assert len(expected) == 1  # the first in any case


def test_equal_rows_are_chosen_once() -> None:
    distinct = 5 + torch.randn(500, 48, generator=torch.Generator().manual_seed(0))
    chosen = farthest_rows(distinct.repeat(5, 1), 1_000)
    assert sorted((chosen % 500).tolist()) == list(range(500))
    assert len(farthest_rows(distinct, 0)) == 0
    assert farthest_rows(distinct, 3, known=distinct[:0]).tolist() == farthest_rows(distinct, 3).tolist()


def test_k_means_is_nearly_that_of_a_search_to_the_end() -> None:
    rows = torch.randn(1500, 6, generator=torch.Generator().manual_seed(0))  # the whole pool
    converged = KMeans(150, init="random", n_init=1, max_iter=300, random_state=0).fit(rows.numpy()).cluster_centers_

    def error(bank: np.ndarray | torch.Tensor) -> float:
        return float((cdist(rows, bank).min(axis=1) ** 2).mean())

    assert error(build("k_means", rows, 150)) < 1.1 * error(converged) < 0.8 * error(build("uniform", rows, 150))


def test_others_are_rows_of_the_pool_that_are_not_in_the_bank() -> None:
    rows = torch.randn(9_000, 3, generator=torch.Generator().manual_seed(0))
    builder = KCenterCoreset(200)
    builder.update(rows)
    bank = builder.build()
    assert builder.others is not None
    assert 4_000 <= len(builder.others) <= 9_000 - 200
    both = {tuple(row) for row in torch.cat([bank, builder.others]).tolist()}
    assert both <= {tuple(row) for row in rows.tolist()}
    assert len(both) == len(bank) + len(builder.others)


def test_auto_is_k_center_for_small_banks_and_uniform_for_large_ones() -> None:
    assert isinstance(make_bank_builder("auto", 5_000), KCenterCoreset)
    assert type(make_bank_builder("auto", 5_001)) is UniformSubset


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(ValueError, match=r"coreset must be one of 'auto', 'uniform', .*, got 'random'"):
        make_bank_builder("random", 10)
