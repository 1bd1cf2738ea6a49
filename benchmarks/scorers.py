# Copyright (C) 2026 The anomalib-pedenet authors
# SPDX-License-Identifier: Apache-2.0

"""Nearest-neighbour searches side by side: our scorers, and what else there is, on the same embeddings in one run.

For every size of the bank and number of queries (2,401 and 9,409: what an image of 256x256 asks at strides 4 and 2), a
line is appended to ``<output>.csv``: ``build_seconds`` and ``bytes`` of the state; ``ms`` to search, the median with
quartiles, all searches in turns; and ``of_matrix_product``, for those that compare all pairs, their 2NMZ operations per
second as a fraction of those of a 4096x4096 product in float32 (``matrix_tflops``).

``recall`` is against a search in float64: the part of the queries for which the distance that is returned is at most
0.1 % + 0.001 above the least. It goes by distances, since that is all a scorer returns. Those of a product quantiser
are estimates: it may find the nearest row and misjudge its distance, as ``relative_error`` says.

Embeddings are tanh of points around 500 centres on a 12-dimensional surface in 64 dimensions, and a little noise; one
query in 20 is shifted off the surface.

Example:
    ``python benchmarks/scorers.py --rows 1000 10000 100000 1000000 --output runs/scorers``
"""

import argparse
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import threadpoolctl  # type: ignore[import-untyped]
import torch
from anomalib.models.image.patchcore.torch_model import PatchcoreModel
from common import append, leaving_out, matrix_throughput, processor_name, quartiles, time_in_turns, timed
from sklearn.neighbors import NearestNeighbors

from anomalib_pedenet.scorers import SCORERS, make_scorer

Search = Callable[[torch.Tensor], torch.Tensor]

PEERS = ("torch.cdist", "anomalib PatchCore", "scikit-learn brute")
ALL = ("exact", "faiss_flat", "faiss_ivf", "faiss_hnsw", "faiss_pq", *PEERS)
ALL_PAIRS = {"exact", "faiss_flat", *PEERS}
_DIM, _SURFACE, _CENTERS = 64, 12, 500


def draw(count: int, seed: int, is_query: bool) -> torch.Tensor:
    """Draw embeddings ``[count, 64]``; seeds differ in the embeddings, not in the centres and the surface."""
    fixed, generator = torch.Generator().manual_seed(0), torch.Generator().manual_seed(seed)
    surface = torch.randn(_SURFACE, _DIM, generator=fixed) / 2
    centers = torch.randn(_CENTERS, _SURFACE, generator=fixed)
    chosen = torch.randint(_CENTERS, (count,), generator=generator)
    places = centers[chosen] + 0.15 * torch.randn(count, _SURFACE, generator=generator)
    points = places @ surface / _SURFACE**0.5 + 0.02 * torch.randn(count, _DIM, generator=generator)
    if is_query:  # one in twenty is abnormal
        points[::20] += 0.3 * torch.randn(points[::20].shape, generator=generator)
    return points.tanh()


def least_distances(queries: torch.Tensor, bank: torch.Tensor) -> torch.Tensor:
    """Return the true distances to the nearest row, in float64, by ``|q|^2 - 2 q.b + |b|^2`` about the bank's mean."""
    mean = bank.double().mean(dim=0)
    queries = queries.double() - mean
    nearest = torch.full((len(queries),), -torch.inf, dtype=torch.float64, device=bank.device)  # q.b - |b|^2 / 2
    for rows in bank.split(4_096):
        centered = rows.double() - mean
        products = torch.addmm(-centered.square().sum(dim=1) / 2, queries, centered.T)
        nearest = torch.maximum(nearest, products.amax(dim=1))
    return (queries.square().sum(dim=1) - 2 * nearest).clamp(min=0).sqrt()


def build(name: str, bank: torch.Tensor) -> tuple[Search, int]:
    """Build a search and return it with the bytes of its state."""
    bank_bytes = bank.numel() * bank.element_size()
    if name in SCORERS:
        scorer = make_scorer(name, embedding_dim=bank.shape[1], bank_size=len(bank), seed=0).to(bank.device)
        scorer.fit([bank])
        return scorer, sum(buffer.numel() * buffer.element_size() for buffer in scorer.buffers())
    if name == "torch.cdist":
        return lambda queries: torch.cdist(queries, bank).min(dim=1).values, bank_bytes
    if name == "anomalib PatchCore":
        # All that the search needs of the model; the model itself would make a backbone.
        model = SimpleNamespace(memory_bank=bank, euclidean_dist=PatchcoreModel.euclidean_dist)
        return lambda queries: PatchcoreModel.nearest_neighbors(model, queries, n_neighbors=1)[0], bank_bytes
    neighbors = NearestNeighbors(n_neighbors=1, algorithm="brute").fit(bank.numpy())
    return lambda queries: torch.from_numpy(neighbors.kneighbors(queries.numpy())[0][:, 0]), bank_bytes


def judge(distances: torch.Tensor, true: torch.Tensor) -> dict[str, float]:
    """Compare distances with the true ones, float64."""
    errors = (distances.to(true) - true).abs()
    return {
        "recall": round((distances.to(true) <= 1.001 * true + 1e-3).double().mean().item(), 4),
        "relative_error": round((errors / true.clamp(min=1e-3)).mean().item(), 7),
        "largest_error": round(errors.max().item(), 7),
    }


def measure(
    options: argparse.Namespace, bank: torch.Tensor, queries: torch.Tensor, tflops: float
) -> list[dict[str, Any]]:
    """Return a line for every search in a bank ``[M, Z]``, by every number of the queries ``[N, Z]``."""
    true = least_distances(queries, bank)
    built: dict[str, tuple[Search, dict[str, Any]]] = {}
    for name in options.scorers:
        with leaving_out(name):
            seconds, (search, size) = timed(partial(build, name, bank), options.device)
            search(queries[:1])
            built[name] = (search, {"build_seconds": round(seconds, 3), "bytes": size})
    lines = []
    for count in sorted(set(options.queries)):
        is_large = 4 * count * len(bank) > options.largest_matrix * 2**30  # the one matrix that torch.cdist makes
        names = [name for name in built if not (is_large and name == "torch.cdist")]
        calls = [partial(built[name][0], queries[:count]) for name in names]
        judged = [judge(call(), true[:count]) for call in calls]  # also warms up
        times = time_in_turns(calls, options.rounds, options.seconds, options.device)
        for name, figures, spent in zip(names, judged, times, strict=True):
            line: dict[str, Any] = {"search": name, "rows": len(bank), "queries": count, **built[name][1]}
            line |= quartiles(spent) | figures
            fraction = round(2 * count * bank.numel() / line["ms"] / 1e9 / tflops, 4)
            lines.append(line | {"of_matrix_product": fraction if name in ALL_PAIRS else None})
    return lines


def parse_arguments() -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n", maxsplit=1)[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[1_000, 10_000, 100_000, 1_000_000], help="bank sizes")
    parser.add_argument("--queries", type=int, nargs="+", default=[2_401, 9_409], help="numbers of queries")
    parser.add_argument("--scorers", nargs="+", default=ALL, choices=ALL, metavar="NAME", help=f"of {', '.join(ALL)}")
    parser.add_argument("--rounds", type=int, default=5, help="repetitions (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=10.0, help="no more repetitions of a search after that")
    parser.add_argument("--largest_matrix", type=float, default=6.0, help="GiB; torch.cdist is left out beyond it")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: %(default)s")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", type=torch.device, default=device, help="cuda adds what faiss has on GPUs")
    parser.add_argument("--output", default="runs/scorers", help="path of the CSV file, without ending")
    return parser.parse_args()


def main() -> None:
    """Measure every search at every size."""
    options = parse_arguments()
    torch.set_num_threads(options.threads)
    faiss: Any = None
    with leaving_out("faiss"):
        faiss = import_module("faiss")  # before its threads are limited
    on_gpu = options.device.type == "cuda"
    tflops = matrix_throughput(torch.float32, options.device, repeats=1 + options.rounds) / 1e12
    machine = {
        "matrix_tflops": round(tflops, 4),
        "hardware": torch.cuda.get_device_name(options.device) if on_gpu else processor_name(),
        "threads": options.threads,
        "torch": torch.__version__,
        "faiss": getattr(faiss, "__version__", ""),
    }
    print(", ".join(f"{name} {value}" for name, value in machine.items()), flush=True)
    bank = draw(max(options.rows), 0, is_query=False).to(options.device)
    queries = draw(max(options.queries), 1, is_query=True).to(options.device)
    with threadpoolctl.threadpool_limits(options.threads):  # of faiss and scikit-learn
        for count in sorted(set(options.rows)):
            lines = [line | machine for line in measure(options, bank[:count], queries, tflops)]
            append(Path(f"{options.output}.csv"), lines)
            print(pd.DataFrame(lines).drop(columns=list(machine)).to_string(index=False), flush=True)


if __name__ == "__main__":
    main()
