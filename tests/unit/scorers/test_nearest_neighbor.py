# Copyright (C) 2026 The anomalib-pedenet authors
# SPDX-License-Identifier: Apache-2.0

"""The exact nearest-neighbour scorer against brute force."""

import pickle

import numpy as np
import pytest
import torch
from anomalib.models.image.patchcore.torch_model import PatchcoreModel
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import cdist

from anomalib_pedenet.scorers import NearestNeighborScorer


def fitted(bank: torch.Tensor, **kwargs: float) -> NearestNeighborScorer:
    scorer = NearestNeighborScorer(bank.shape[1], **{"bank_size": 100_000, **kwargs})
    scorer.fit([bank])
    return scorer


def brute_force(queries: torch.Tensor, bank: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(cdist(queries.double().numpy(), bank.double().numpy()).min(axis=1)).float()


@settings(max_examples=30, deadline=None)
@given(
    num_queries=st.integers(1, 2500),
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


def test_a_fitted_scorer_pickles_small() -> None:
    scorer = fitted(torch.randn(5000, 8), bank_size=100)
    assert len(pickle.dumps(scorer)) < 20_000


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bank_size": 0}, "bank_size must be a number of rows, at least 1, or a fraction.*got 0"),
        ({"bank_size": 1.5}, "bank_size must be .* got 1.5"),
        ({"num_neighbors": 0}, "num_neighbors must be at least 1, got 0"),
        ({"reweight_neighbors": -1}, "reweight_neighbors must be at least 0, got -1"),
    ],
)
def test_arguments_outside_their_range_are_refused(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NearestNeighborScorer(**options)


@pytest.mark.parametrize("num_neighbors", [2, 5, 40, 5000])
def test_several_neighbors_equal_brute_force(num_neighbors: int) -> None:
    """In tiles and in one piece, also where there are fewer rows than neighbours."""
    bank, queries = torch.randn(4500, 8), torch.randn(300, 8)
    distances = np.sort(cdist(queries.numpy(), bank.numpy()), axis=1)[:, :num_neighbors]
    scorer = fitted(bank, num_neighbors=num_neighbors)
    expected = torch.from_numpy(distances.mean(axis=1)).float()
    torch.testing.assert_close(scorer(queries), expected, rtol=1e-4, atol=1e-4)
    exported = torch.export.export(scorer, (queries[None],)).module()
    torch.testing.assert_close(exported(queries[None])[0], expected, rtol=1e-4, atol=1e-4)


def test_a_bank_may_be_a_fraction_of_all_embeddings() -> None:
    rows = torch.randn(1000, 8)
    scorer = NearestNeighborScorer(8, bank_size=0.1)
    scorer.fit(rows.split(300))
    assert len(scorer.bank) == 100
    scorer.fit([rows[:3]])
    assert len(scorer.bank) == 1  # at least
    with pytest.raises(ValueError, match=r"bank_size 0\.1 is a fraction, but the number of embeddings is not known"):
        scorer.fit(part for part in [rows])


def test_image_weights_are_patchcores() -> None:
    torch.manual_seed(0)
    bank, embeddings = torch.randn(300, 8), torch.randn(4, 5, 6, 8)
    scorer = fitted(bank, reweight_neighbors=9)
    patchcore = PatchcoreModel(["layer1"], "resnet18", pre_trained=False, num_neighbors=9)
    patchcore.memory_bank = bank
    rows = embeddings.reshape(-1, 8)
    scores, locations = (values.reshape(4, -1) for values in patchcore.nearest_neighbors(rows, n_neighbors=1))
    expected = patchcore.compute_anomaly_score(scores, locations, rows)
    weights = scorer.image_weights(embeddings, scorer(embeddings))
    torch.testing.assert_close(weights * scorer(embeddings).amax(dim=(1, 2)), expected, rtol=1e-4, atol=1e-4)
    assert fitted(bank).image_weights(embeddings, scores) is None


@pytest.mark.parametrize("bank", [torch.zeros(1, 4), torch.zeros(50, 4)], ids=["one row", "duplicates"])
def test_degenerate_banks_have_a_usable_typical_score(bank: torch.Tensor) -> None:
    scorer = fitted(bank)
    assert scorer.typical_score == 1
    torch.testing.assert_close(scorer(torch.ones(3, 4)), torch.full((3,), 2.0))


def test_typical_score_is_the_mean_distance_to_the_nearest_other_row() -> None:
    bank = torch.randn(400, 5)
    distances = torch.from_numpy(cdist(bank.numpy(), bank.numpy())).fill_diagonal_(torch.inf)
    assert fitted(bank).typical_score.item() == pytest.approx(distances.min(dim=1).values.mean().item(), rel=1e-4)


@pytest.mark.parametrize("dim", [1, 2, 64])
def test_a_rounded_bank_is_searched_exactly(dim: int) -> None:
    """Of whatever dimension, also of fewer than the two numbers that a norm is kept in."""
    scorer, queries = fitted(torch.randn(500, dim)), torch.randn(20, dim)
    scorer.round_to_half()
    bank = scorer.bank + scorer.mean
    torch.testing.assert_close(bank.half().float(), bank, rtol=0, atol=2e-3)
    torch.testing.assert_close(scorer(queries), brute_force(queries, bank), rtol=1e-3, atol=2e-3)


def test_autocast_does_not_touch_distances() -> None:
    scorer, queries = fitted(torch.randn(500, 64)), torch.randn(20, 64)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(scorer(queries), scorer.float()(queries), rtol=0, atol=0)
