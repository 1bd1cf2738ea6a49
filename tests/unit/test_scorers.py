# Copyright (C) 2026 The anomalib-pedenet authors
# SPDX-License-Identifier: Apache-2.0

"""The nearest-neighbour scorer against brute force, and the contract of scorers."""

import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import cdist

from anomalib_pedenet.scorers import NearestNeighborScorer
from anomalib_pedenet.scorers.nearest_neighbor import UniformSubset


def fitted(bank: torch.Tensor, **kwargs: int) -> NearestNeighborScorer:
    scorer = NearestNeighborScorer(bank.shape[1], **kwargs)
    scorer.fit([bank])
    return scorer


def brute_force(queries: torch.Tensor, bank: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(cdist(queries.double().numpy(), bank.double().numpy()).min(axis=1)).float()


@settings(max_examples=30, deadline=None)
@given(
    num_queries=st.integers(1, 700),
    num_rows=st.integers(1, 5000),
    dim=st.integers(1, 64),
    offset=st.sampled_from([0.0, 100.0]),
)
def test_equals_brute_force(num_queries: int, num_rows: int, dim: int, offset: float) -> None:
    """Also far from the origin, where the expanded square cancels: the mean is taken off first."""
    generator = torch.Generator().manual_seed(num_queries * num_rows)
    bank = torch.randn(num_rows, dim, generator=generator) + offset
    queries = torch.randn(num_queries, dim, generator=generator) + offset
    # The rounding of an offset of 100 itself is 4e-6 for each coordinate.
    torch.testing.assert_close(fitted(bank)(queries), brute_force(queries, bank), rtol=1e-4, atol=2e-3)


@pytest.mark.parametrize("shape", [(7,), (1, 9), (3, 600), (2, 3, 5)])
def test_batches_of_queries(shape: tuple[int, ...]) -> None:
    bank, queries = torch.randn(3000, 8), torch.randn(*shape, 8)
    expected = brute_force(queries.flatten(0, -2), bank).reshape(shape)
    torch.testing.assert_close(fitted(bank)(queries), expected, rtol=1e-4, atol=1e-4)


def test_rows_of_the_bank_score_zero() -> None:
    """Up to the rounding of the square, of which the distance is the root: n u |b|^2 for each sum of n terms."""
    bank = torch.randn(2500, 64).tanh()
    largest_square = bank.square().sum(dim=1).max()
    assert fitted(bank)(bank).max() < (2 * 64 * torch.finfo(torch.float32).eps * largest_square).sqrt()


def test_the_eager_and_the_exported_way_agree() -> None:
    scorer = fitted(torch.randn(5000, 64).tanh())
    queries = torch.randn(2, 1300, 64).tanh()
    exported = torch.export.export(scorer, (queries,)).module()
    torch.testing.assert_close(exported(queries), scorer(queries), rtol=0, atol=1e-5)


def test_batched_fit_equals_one_shot_fit() -> None:
    rows = torch.randn(3000, 4)
    whole = fitted(rows, bank_size=500)
    batched = NearestNeighborScorer(4, bank_size=500)
    batched.fit(rows.split([1, 700, 3, 2296]))
    assert len(whole.bank) == 500
    torch.testing.assert_close(whole.bank, batched.bank, rtol=0, atol=0)


def test_the_bank_is_a_seeded_uniform_subset_without_replacement() -> None:
    rows = torch.arange(2000.0)[:, None]
    counts = np.zeros(2000)
    for seed in range(200):
        subset = UniformSubset(200, seed)
        for batch in rows.split(300):
            subset.update(batch)
        chosen = subset.rows.flatten().long().numpy()
        assert len(np.unique(chosen)) == 200
        assert (np.diff(chosen) > 0).all()  # in the order of arrival
        counts[chosen] += 1
    # Each row is in a tenth of the 200 subsets: 20 +- 4.2; the early and the late halves equally often.
    assert counts.max() < 45
    assert abs(counts[:1000].sum() - counts[1000:].sum()) / counts.sum() < 0.02


def test_state_goes_through_a_state_dict_of_another_size() -> None:
    scorer = fitted(torch.randn(300, 8))
    other = fitted(torch.randn(20, 8))
    other.load_state_dict(scorer.state_dict())
    queries = torch.randn(50, 8)
    torch.testing.assert_close(other(queries), scorer(queries), rtol=0, atol=0)
    assert other.typical_score == scorer.typical_score


def test_a_fit_that_breaks_off_loses_nothing() -> None:
    scorer = fitted(torch.randn(300, 8))
    before = scorer.bank.clone()
    with pytest.raises(ValueError, match="NaN or infinite"):
        scorer.fit([torch.randn(10, 8), torch.full((1, 8), torch.nan)])
    torch.testing.assert_close(scorer.bank, before, rtol=0, atol=0)


def test_a_fitted_scorer_pickles_small() -> None:
    scorer = fitted(torch.randn(5000, 8), bank_size=100)
    assert len(pickle.dumps(scorer)) < 20_000


def test_bad_embeddings_are_refused() -> None:
    scorer = NearestNeighborScorer(8)
    with pytest.raises(RuntimeError, match=r"reset\(\) before update"):
        scorer.update(torch.zeros(1, 8))
    scorer.reset()
    with pytest.raises(ValueError, match=r"must be \[N, 8\], got \(3, 9\)"):
        scorer.update(torch.zeros(3, 9))
    with pytest.raises(ValueError, match="at least one normal embedding"):
        scorer.finalize()
    with pytest.raises(ValueError, match="bank_size must be at least 1 row, got 0"):
        NearestNeighborScorer(bank_size=0)


@pytest.mark.parametrize("bank", [torch.zeros(1, 4), torch.zeros(50, 4)], ids=["one row", "duplicates"])
def test_degenerate_banks_have_a_usable_typical_score(bank: torch.Tensor) -> None:
    scorer = fitted(bank)
    assert scorer.typical_score == 1
    torch.testing.assert_close(scorer(torch.ones(3, 4)), torch.full((3,), 2.0))


def test_typical_score_is_the_mean_distance_to_the_nearest_other_row() -> None:
    bank = torch.randn(400, 5)
    distances = torch.from_numpy(cdist(bank.numpy(), bank.numpy())).fill_diagonal_(torch.inf)
    assert fitted(bank).typical_score.item() == pytest.approx(distances.min(dim=1).values.mean().item(), rel=1e-4)


def test_autocast_does_not_touch_distances() -> None:
    scorer, queries = fitted(torch.randn(500, 64)), torch.randn(20, 64)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(scorer(queries), scorer.float()(queries), rtol=0, atol=0)
