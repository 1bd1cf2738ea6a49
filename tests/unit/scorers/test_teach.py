# Copyright (C) 2026 The anomalib-pedenet authors
# SPDX-License-Identifier: Apache-2.0

"""Scorers that are taught after their fit: what is taught is normal, what was normal stays so, and no bank grows."""

import pytest
import torch

from anomalib_pedenet.scorers import SCORERS, GaussianMixtureScorer, NearestNeighborScorer, make_scorer
from anomalib_pedenet.scorers.nearest_neighbor import _least_redundant

TEACHABLE = {"exact", "gaussian_mixture"}  # and ppca, which takes grids: tests/unit/scorers/test_ppca.py


def clusters(count: int, seed: int = 0) -> torch.Tensor:
    """Draw embeddings around three centers."""
    generator = torch.Generator().manual_seed(seed)
    centers = torch.tensor([[0.0] * 8, [4.0] * 8, [-4.0, 4.0] * 4])
    chosen = torch.randint(3, (count,), generator=generator)
    return centers[chosen] + 0.3 * torch.randn(count, 8, generator=generator)


def strange(count: int = 5) -> torch.Tensor:
    """Draw embeddings far from all of them."""
    return torch.tensor([9.0, -9.0] * 4) + 0.1 * torch.randn(count, 8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", sorted(TEACHABLE))
def test_what_is_taught_scores_as_normal(name: str) -> None:
    scorer = make_scorer(name, embedding_dim=8, bank_size=200)
    scorer.fit([clusters(2_000)])
    normal, other = clusters(300, seed=2), torch.full((1, 8), -9.0)
    before, before_other = scorer(normal), scorer(other)
    assert scorer(strange()).min() > 5 * scorer.typical_score
    scorer.teach(strange())
    assert scorer(strange()).max() < 1.5 * scorer.typical_score
    # Of the same kind, but not seen.
    unseen = torch.tensor([9.0, -9.0] * 4) + 0.1 * torch.randn(20, 8, generator=torch.Generator().manual_seed(3))
    assert scorer(unseen).median() < 2 * scorer.typical_score
    assert (scorer(normal) - before).abs().median() < 0.03 * scorer.typical_score
    assert scorer(other) > 0.9 * before_other


def test_a_bank_does_not_grow_beyond_its_size() -> None:
    scorer = NearestNeighborScorer(embedding_dim=8, bank_size=50)
    scorer.fit([clusters(2_000)])
    scorer.teach(20 * clusters(200))  # far apart
    assert len(scorer.rows) == 50
    assert (scorer.bank.norm(dim=1) > 20).sum() == 5  # a tenth of it


def test_a_bank_with_room_keeps_all_its_rows() -> None:
    scorer = NearestNeighborScorer(embedding_dim=8, bank_size=50)
    scorer.fit([clusters(20)])
    rows = scorer.bank.clone()
    scorer.teach(strange(1))
    torch.testing.assert_close(scorer.bank[:20], rows)
    assert len(scorer.bank) == 21


def test_the_rows_that_go_have_a_near_neighbour_that_stays() -> None:
    rows = torch.tensor([[0.0], [0.1], [5.0], [5.4], [9.0], [20.0]])
    assert _least_redundant(rows, 6).tolist() == [0, 1, 2, 3, 4, 5]
    assert len({0, 1} & set(_least_redundant(rows, 5).tolist())) == 1
    kept = set(_least_redundant(rows, 4).tolist())
    assert {4, 5} < kept
    assert len({0, 1} & kept) == len({2, 3} & kept) == 1


def test_gaussians_elsewhere_are_as_before() -> None:
    scorer = GaussianMixtureScorer(embedding_dim=8, num_gaussians=6)
    scorer.fit([clusters(2_000)])
    normal = clusters(300, seed=2)
    before, typical = scorer(normal), scorer.typical_score
    scorer.teach(strange(3))
    torch.testing.assert_close(scorer(normal), before + torch.log(1 + 3 * torch.exp(-typical)), atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", sorted(set(SCORERS) - TEACHABLE - {"ppca"}))
def test_others_are_refused(name: str) -> None:
    with pytest.raises(NotImplementedError, match="'exact', 'gaussian_mixture' or 'ppca'"):
        make_scorer(name, embedding_dim=8).teach(strange())
