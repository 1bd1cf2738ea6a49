# Copyright (C) 2026 The anomalib-pedenet authors
# SPDX-License-Identifier: Apache-2.0

"""Nearest-neighbour searches side by side: our scorers, and what else there is, on the same embeddings in one run.

For every size of the bank and number of queries (2,401 and 9,409: what an image of 256x256 asks at strides 4 and 2), a
line of ``<output>.csv`` holds the seconds to build, the milliseconds to search, in rounds over all searches so that
what else the machine does hits all alike, the bytes of the state, the memory that a search takes beyond its inputs, and
how right it is against a search in float64: recall@1 (the true nearest distance is returned, to 1 %), the mean relative
and the largest absolute error. A product quantiser's distances are estimates, so that its recall says little. The
throughput of searches that compare all pairs is given as a fraction of a matrix product's on the same machine.
``<output>.png`` draws time against recall.

Embeddings are drawn around 2,000 centres on a surface of 12 dimensions in 64, in (-1, 1); one query in 20 lies apart.
``--embeddings`` takes others: a file of ``torch.save({"bank": [M, Z], "queries": [N, Z]})``.

Example:
    ``python benchmarks/scorers.py --rows 1000 10000 100000 1000000 --output runs/scorers``
"""

import argparse
import platform
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import psutil
import torch
from anomalib.models.image.patchcore.torch_model import PatchcoreModel
from matplotlib.figure import Figure
from sklearn.neighbors import NearestNeighbors
from train import append

from anomalib_pedenet.scorers import SCORERS, make_scorer

Search = Callable[[torch.Tensor], torch.Tensor]

OURS = ("exact", "faiss_flat", "faiss_ivf", "faiss_hnsw", "faiss_pq")
PEERS = ("torch.cdist", "anomalib PatchCore", "scikit-learn brute")
ALL_PAIRS = {"exact", "faiss_flat", *PEERS}

_DIM, _SURFACE, _CENTERS = 64, 12, 2_000
_LARGEST_MATRIX = 8 * 2**30  # bytes; torch.cdist needs one of queries x rows
_SLOW = 3.0  # seconds; slower searches are measured once


def draw(count: int, seed: int) -> torch.Tensor:
    """Draw embeddings ``[count, 64]`` as a trained network's may lie."""
    fixed = torch.Generator().manual_seed(0)
    surface = torch.randn(_SURFACE, _DIM, generator=fixed) / 2
    centers = torch.randn(_CENTERS, _SURFACE, generator=fixed)
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randint(_CENTERS, (count,), generator=generator)
    places = centers[chosen] + 0.3 * torch.randn(count, _SURFACE, generator=generator)
    return (places @ surface / _SURFACE**0.5 + 0.05 * torch.randn(count, _DIM, generator=generator)).tanh()


def draw_queries(count: int) -> torch.Tensor:
    """Draw queries ``[count, 64]``, one in twenty of them abnormal."""
    queries = draw(count, seed=2)
    queries[::20] = (
        queries[::20] + 0.3 * torch.randn(queries[::20].shape, generator=torch.Generator().manual_seed(3))
    ).tanh()
    return queries


def least_distances(queries: torch.Tensor, bank: torch.Tensor) -> torch.Tensor:
    """Return the true distances to the nearest row, in float64, by ``|q|^2 - 2 q.b + |b|^2`` about the bank's mean."""
    mean = bank.double().mean(dim=0)
    least = torch.full((len(queries),), torch.inf, dtype=torch.float64, device=bank.device)
    queries = queries.double() - mean
    for rows in bank.split(20_000):
        centered = rows.double() - mean
        half_norms = centered.square().sum(dim=1) / 2
        squared = queries.square().sum(dim=1) - 2 * (queries @ centered.T - half_norms).amax(dim=1)
        least = torch.minimum(least, squared)
    return least.clamp(min=0).sqrt()


def make_search(name: str, bank: torch.Tensor) -> tuple[Search, int]:
    """Build a search and return it with the bytes of its state."""
    bank_bytes = bank.numel() * bank.element_size()
    if name in SCORERS:
        scorer = make_scorer(name, embedding_dim=bank.shape[1], bank_size=len(bank)).to(bank.device)
        scorer.fit([bank])
        return scorer, sum(value.numel() * value.element_size() for value in scorer.state_dict().values())
    if name == "torch.cdist":
        return lambda queries: torch.cdist(queries, bank).min(dim=1).values, bank_bytes
    if name == "anomalib PatchCore":
        model = PatchcoreModel(layers=["layer1"], backbone="resnet18", pre_trained=False)
        model.memory_bank = bank
        return lambda queries: model.nearest_neighbors(queries, n_neighbors=1)[0], bank_bytes
    neighbors = NearestNeighbors(n_neighbors=1, algorithm="brute").fit(bank.cpu().numpy())
    return lambda queries: torch.from_numpy(neighbors.kneighbors(queries.cpu().numpy())[0][:, 0]), bank_bytes


def timed(call: Callable[[], torch.Tensor]) -> tuple[float, torch.Tensor]:
    """Return the seconds of a call, to its end on the device, and its result."""
    start = time.perf_counter()
    result = call()
    if result.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start, result


def extra_mib(call: Callable[[], torch.Tensor], device: torch.device) -> float:
    """Return the memory in MiB that a call takes at its peak beyond what is in use before it.

    On a CPU the process is watched by a thread, every millisecond.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    process, is_done = psutil.Process(), threading.Event()
    before = peak = process.memory_info().rss

    def watch() -> None:
        nonlocal peak
        while not is_done.wait(0.001):
            peak = max(peak, process.memory_info().rss)

    watcher = threading.Thread(target=watch)
    watcher.start()
    call()
    is_done.set()
    watcher.join()
    return (peak - before) / 2**20


def processor_name() -> str:
    """Return the processor's name, as far as the system says it."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def matrix_throughput(device: torch.device) -> float:
    """Return the floating-point operations per second of a float32 product of 4096x4096 matrices: the best of five."""
    left, right = torch.randn(2, 4096, 4096, device=device)
    seconds = min(timed(lambda: left @ right)[0] for _ in range(6))
    return 2 * 4096**3 / seconds


def measure(
    options: argparse.Namespace, bank: torch.Tensor, queries: torch.Tensor, throughput: float
) -> list[dict[str, Any]]:
    """Measure all searches on one bank and one set of queries."""
    searches: dict[str, Search] = {}
    rows: dict[str, dict[str, Any]] = {}
    true = least_distances(queries, bank).cpu()
    for name in options.searches:
        if name == "torch.cdist" and 4 * len(bank) * len(queries) > _LARGEST_MATRIX:
            print(f"{name}: left out, its matrix of {len(queries)} x {len(bank)} distances is too large", flush=True)
            continue
        start = time.perf_counter()
        try:
            searches[name], size = make_search(name, bank)
        except ImportError as error:
            print(f"{name}: left out. {error}", flush=True)
            continue
        rows[name] = {"search": name, "rows": len(bank), "queries": len(queries)}
        rows[name] |= {"build_seconds": round(time.perf_counter() - start, 2), "bytes": size}
    times: dict[str, list[float]] = {name: [] for name in searches}
    for name, search in searches.items():
        seconds, distances = timed(partial(search, queries))
        times[name] = [seconds] if seconds > _SLOW else []
        errors = (distances.double().cpu().flatten() - true).abs()
        rows[name] |= {
            "recall": round((errors <= 0.01 * true + 1e-3).double().mean().item(), 4),
            "relative_error": round((errors / true.clamp(min=1e-3)).mean().item(), 6),
            "largest_error": round(errors.max().item(), 6),
            "extra_mib": round(extra_mib(partial(search, queries), bank.device), 1),
        }
    for _ in range(options.rounds):
        for name, search in searches.items():
            if not times[name] or times[name][0] <= _SLOW:
                times[name].append(timed(partial(search, queries))[0])
    for name, values in times.items():
        quartiles = pd.Series(values).quantile([0.25, 0.5, 0.75]).tolist()
        operations = 2 * len(bank) * queries.numel()
        rows[name] |= {
            "ms": round(1000 * quartiles[1], 2),
            "ms_low": round(1000 * quartiles[0], 2),
            "ms_high": round(1000 * quartiles[2], 2),
            "of_matrix_product": round(operations / quartiles[1] / throughput, 3) if name in ALL_PAIRS else None,
        }
    return list(rows.values())


def plot(table: pd.DataFrame, path: Path) -> None:
    """Draw time against recall, a panel for each size of the bank, for the largest number of queries."""
    table = table[table["queries"] == table["queries"].max()]
    sizes = sorted(table["rows"].unique())
    figure = Figure(figsize=(4 * len(sizes), 4), layout="constrained")
    for axes, size in zip(figure.subplots(1, len(sizes), squeeze=False)[0], sizes, strict=True):
        for _, row in table[table["rows"] == size].iterrows():
            axes.plot(row["recall"], row["ms"], "o")
            axes.annotate(row["search"], (row["recall"], row["ms"]), fontsize=8, ha="right", va="bottom")
        axes.set(yscale="log", title=f"{size:,} rows", xlabel="recall@1", xlim=(-0.05, 1.05))
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel(f"ms for {table['queries'].max():,} queries")
    figure.savefig(path, dpi=120)


def main() -> None:
    """Measure every search at every size."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n", maxsplit=1)[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[1_000, 10_000, 100_000, 1_000_000])
    parser.add_argument("--queries", type=int, nargs="+", default=[2_401, 9_409])
    parser.add_argument("--searches", nargs="+", default=[*OURS, *PEERS], choices=[*OURS, *PEERS])
    parser.add_argument(
        "--embeddings", type=Path, help="file with a bank and queries to take the rows and queries from"
    )
    parser.add_argument("--rounds", type=int, default=9, help=f"repetitions; searches above {_SLOW:g} s are made once")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", type=torch.device, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", default="runs/scorers", help="path of the CSV file and the picture, without ending")
    options = parser.parse_args()

    torch.set_num_threads(options.threads)
    hardware = torch.cuda.get_device_name(options.device) if options.device.type == "cuda" else processor_name()
    given = torch.load(options.embeddings, weights_only=True) if options.embeddings is not None else None
    throughput = matrix_throughput(options.device)
    print(
        f"{hardware}, {options.threads} threads: {throughput / 1e12:.3f} TFLOP/s in a float32 matrix product",
        flush=True,
    )
    for count in options.rows:
        bank = (draw(count, seed=1) if given is None else given["bank"][:count]).to(options.device)
        for num_queries in options.queries:
            queries = (draw_queries(num_queries) if given is None else given["queries"][:num_queries]).to(
                options.device
            )
            table = measure(options, bank, queries, throughput)
            machine = {"threads": options.threads, "hardware": hardware, "torch": torch.__version__}
            append(Path(f"{options.output}.csv"), [row | machine for row in table])
            print(pd.DataFrame(table).to_string(index=False), flush=True)
    plot(pd.read_csv(f"{options.output}.csv"), Path(f"{options.output}.png"))


if __name__ == "__main__":
    main()
