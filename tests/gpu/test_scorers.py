# Copyright (C) 2026 The anomalib-pedenet authors
# SPDX-License-Identifier: Apache-2.0

"""Scorers on a CUDA device give what they give on a CPU."""

from typing import Any

import pytest
import torch

from anomalib_pedenet.networks import DensityEstimationNetwork
from anomalib_pedenet.scorers import SCORERS, Scorer, make_scorer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

DIM = 66
NEEDS_FAISS_GPU = [name for name in SCORERS if name.startswith("faiss") and name != "faiss_hnsw"]


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def normal(num_images: int) -> torch.Tensor:
    return (torch.randn(1, 12, 12, DIM) / 3 + torch.randn(num_images, 12, 12, DIM) / 4).tanh()


def make(name: str, device: str = "cpu") -> Scorer:
    if name in NEEDS_FAISS_GPU:
        faiss = pytest.importorskip("faiss")
        if not hasattr(faiss, "StandardGpuResources"):
            pytest.skip("the installed faiss has no GPU support")
    with torch.random.fork_rng():
        torch.manual_seed(1)
        network = DensityEstimationNetwork(3, DIM).to(device)
    return make_scorer(name, embedding_dim=DIM, density_network=network).to(device)


def assert_close(actual: torch.Tensor, expected: torch.Tensor, **options: Any) -> None:  # noqa: ANN401
    torch.testing.assert_close(actual.cpu(), expected.cpu(), **options)


@pytest.mark.parametrize("name", SCORERS)
def test_a_scorer_that_moves_to_the_device_scores_the_same(name: str) -> None:
    scorer, queries = make(name), normal(4)
    scorer.fit([normal(60)])
    expected = scorer(queries)
    scores = scorer.cuda()(queries.cuda())
    assert scores.is_cuda
    # An approximate index may look into other cells there.
    is_approximate = name in ("faiss_ivf", "faiss_pq")
    assert_close(
        scores.mean() if is_approximate else scores,
        expected.mean() if is_approximate else expected,
        rtol=1e-2,
        atol=1e-2,
    )
    assert_close(scorer.cpu()(queries), expected, rtol=0, atol=0)


@pytest.mark.parametrize("name", SCORERS)
def test_a_scorer_fitted_on_the_device_is_that_fitted_on_the_cpu(name: str) -> None:
    grids, queries = normal(60), normal(4)
    ours, theirs = make(name), make(name, "cuda")
    ours.fit([grids])
    theirs.fit(grids.cuda().split(7))
    assert_close(theirs.typical_score, ours.typical_score, rtol=1e-2, atol=0)
    assert_close(theirs(queries.cuda()).mean(), ours(queries).mean(), rtol=1e-2, atol=1e-3)


def test_rows_divided_among_all_gpus_score_the_same() -> None:
    make("faiss_flat")  # skips where faiss has no GPU support
    scorer, queries = make_scorer("faiss_flat", embedding_dim=DIM, all_gpus=True), normal(4)
    scorer.fit([normal(60)])
    expected = scorer(queries)
    assert_close(scorer.cuda()(queries.cuda()), expected, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("rows", [1_000, 300_000])
def test_the_exact_search_is_exact_in_bounded_memory(rows: int) -> None:
    bank, queries = torch.rand(rows, DIM, device="cuda"), torch.rand(9_409, DIM, device="cuda")
    scorer = make_scorer("exact", embedding_dim=DIM, bank_size=rows).cuda()
    scorer.fit([bank])
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    distances = scorer(queries)
    assert torch.cuda.max_memory_allocated() - before <= 3 * 64 * 2**20  # products of 64 MiB, and what becomes of them
    expected = torch.cat([torch.cdist(part.double(), bank.double()).min(dim=1).values for part in queries.split(500)])
    assert_close(distances.double(), expected, rtol=1e-3, atol=5e-3)
