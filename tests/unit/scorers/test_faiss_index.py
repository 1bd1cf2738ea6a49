# Copyright (C) 2026 The anomalib-pedenet authors
# SPDX-License-Identifier: Apache-2.0

"""Scorers with faiss against the exact search."""

import subprocess
import sys
from typing import Any

import pytest
import torch

from anomalib_pedenet.scorers import FaissScorer, NearestNeighborScorer
from anomalib_pedenet.scorers.faiss_index import stays_on_cpu

DIM = 16


def clustered(count: int, seed: int = 0) -> torch.Tensor:
    """Embeddings around 50 centres: what an inverted file and a graph are made for."""
    generator = torch.Generator().manual_seed(seed)
    centers = torch.randn(50, DIM, generator=torch.Generator().manual_seed(9))
    chosen = torch.randint(50, (count,), generator=generator)
    return centers[chosen] + 0.3 * torch.randn(count, DIM, generator=generator)


def fitted(rows: torch.Tensor, **options: Any) -> FaissScorer:  # noqa: ANN401
    scorer = FaissScorer(DIM, bank_size=100_000, **options)
    scorer.fit(rows.split(1000))
    return scorer


def exact(rows: torch.Tensor, **options: int) -> NearestNeighborScorer:
    scorer = NearestNeighborScorer(DIM, bank_size=100_000, **options)
    scorer.fit([rows])
    return scorer


def test_the_flat_index_is_exact() -> None:
    rows, queries = clustered(5000), clustered(300, seed=1)
    for neighbors in (1, 4):
        ours, theirs = fitted(rows, index="flat", num_neighbors=neighbors), exact(rows, num_neighbors=neighbors)
        torch.testing.assert_close(ours(queries), theirs(queries), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("index", ["ivf", "hnsw", "IVF32,Flat"])
@pytest.mark.parametrize("recall", [0.8, 0.99])
def test_approximate_indices_reach_the_recall_asked_for(index: str, recall: float) -> None:
    rows, queries = clustered(8000), clustered(1000, seed=1)
    distances, least = fitted(rows, index=index, recall=recall)(queries), exact(rows)(queries)
    # On other queries than those it was measured with, so a little less, by chance (three standard deviations).
    found = (distances <= least * 1.01 + 1e-3).float().mean().item()
    assert found >= recall - 3 * (recall * (1 - recall) / 512) ** 0.5
    assert (distances >= least * 0.99 - 1e-3).all()


def test_quantised_distances_are_near_and_the_bank_small() -> None:
    rows, queries = clustered(6000), clustered(1000, seed=1)
    scorer = fitted(rows, index="pq")
    errors = (scorer(queries) / exact(rows)(queries) - 1).abs()
    assert errors.mean() < 0.2
    assert len(scorer.index_bytes) < 0.4 * rows.numel() * rows.element_size()


@pytest.mark.parametrize(
    ("index", "rows", "stays"),
    [("pq", 600, True), ("pq", 5_000, False), ("pq", 9_000, True), ("pq", 17_000, False), ("hnsw", 600, True)],
)
def test_what_faiss_cannot_search_on_a_gpu_stays_on_the_cpu(index: str, rows: int, stays: bool) -> None:
    faiss = pytest.importorskip("faiss")
    # Not trained, which takes long for quantised rows and changes nothing here.
    made = faiss.index_factory(DIM, FaissScorer(DIM, index=index)._factory(rows))
    assert stays_on_cpu(faiss, made) is stays


def test_queries_whose_cells_are_empty_find_their_neighbors_elsewhere() -> None:
    torch.manual_seed(0)
    rows = torch.cat([clustered(400), 50 + torch.randn(2, DIM)])
    scorer = fitted(rows, index="IVF40,Flat", num_neighbors=30, recall=0.01)
    distances = scorer(rows[-2:])
    assert torch.isfinite(distances).all()
    assert (distances < 1e4).all()


def test_the_index_follows_a_new_state() -> None:
    first, second = fitted(clustered(500), index="flat"), fitted(clustered(700, seed=2) + 3, index="flat")
    queries = clustered(20, seed=1)
    first(queries)
    first.load_state_dict(second.state_dict())
    torch.testing.assert_close(first(queries), second(queries), rtol=0, atol=0)
    first.fit([clustered(600, seed=3)])
    torch.testing.assert_close(first(queries), exact(clustered(600, seed=3))(queries), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("damage", ["flipped", "cut", "foreign", "other dimension"])
def test_damaged_bytes_are_refused_before_faiss_reads_them(damage: str) -> None:
    from anomalib_pedenet.scorers.faiss_index import _digest

    scorer = fitted(clustered(500), index="flat")
    state = scorer.state_dict()
    data = state["index_bytes"].clone()
    if damage == "flipped":
        data[200] ^= 1
    elif damage == "cut":
        data = data[:100]
    elif damage == "foreign":
        data = torch.arange(200, dtype=torch.uint8)
        state["digest"] = _digest(data)
    else:
        other = FaissScorer(DIM + 1, index="flat")
        other.fit([torch.randn(10, DIM + 1)])
        data, state["digest"] = other.index_bytes, other.digest
    state["index_bytes"] = data
    scorer.load_state_dict(state)
    message = "holds no faiss index of dimension 16" if damage in ("foreign", "other dimension") else "is damaged"
    with pytest.raises(ValueError, match=f"{message}.*by training"):
        scorer(clustered(3))


@pytest.mark.parametrize("index", ["flat", "ivf", "hnsw", "pq"])
def test_any_flipped_bit_is_refused(index: str) -> None:
    """Of the bytes of the index and of their checksum: faiss would search in what it happens to read, or crash."""
    scorer = fitted(clustered(1500), index=index)
    state = {name: value.clone() for name, value in scorer.state_dict().items()}
    generator = torch.Generator().manual_seed(0)
    for name, count in (("index_bytes", 40), ("digest", 10)):
        for _ in range(count):
            damaged = state[name].clone()
            position = int(torch.randint(len(damaged), (), generator=generator))
            damaged[position] ^= 1 << int(torch.randint(8, (), generator=generator))
            scorer.load_state_dict(state | {name: damaged})
            with pytest.raises(ValueError, match=r"is damaged: its checksum .*by training"):
                scorer(clustered(3))
    scorer.load_state_dict(state)
    assert torch.isfinite(scorer(clustered(3))).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_neighbors": 0}, "num_neighbors must be at least 1, got 0"),
        ({"recall": 0.0}, "recall must be above 0 and at most 1, got 0"),
        ({"recall": 1.5}, "recall must be above 0 and at most 1, got 1.5"),
        ({"index": "Flatt"}, "index must be .* or a string for faiss.index_factory, got 'Flatt'"),
    ],
)
def test_arguments_outside_their_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FaissScorer(DIM, **options)


def test_without_faiss_the_message_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)  # importing it then fails
    with pytest.raises(ImportError, match=r"pip install 'anomalib-pedenet\[faiss\]'.*or use the scorer 'exact'"):
        FaissScorer(DIM)


@pytest.mark.parametrize("order", ["import faiss, torch", "import torch, faiss"])
def test_both_orders_of_import_work(order: str) -> None:
    """They may load different OpenMP libraries."""
    code = (
        f"{order}\n"
        "from anomalib_pedenet.scorers import make_scorer\n"
        "rows = torch.randn(3000, 8)\n"
        "for name in ('faiss_ivf', 'exact'):\n"
        "    scorer = make_scorer(name, embedding_dim=8)\n"
        "    scorer.fit([rows])\n"
        "    print(scorer(rows[:100]).mean() < 0.01)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)
    assert done.stdout.split() == ["tensor(True)"] * 2, done.stderr
