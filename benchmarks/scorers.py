# Copyright (C) 2026 The anomalib-pedenet authors
# SPDX-License-Identifier: Apache-2.0

"""Nearest-neighbour searches side by side: our scorers, and what else there is, on the same embeddings in one run.

For every size of the bank and number of queries (2,401 and 9,409: what an image of 256x256 asks at strides 4 and 2), a
line is appended to ``<output>.csv``:

- ``build_seconds``, once for each bank, and ``bytes`` of the state: a scorer's buffers, a peer's bank.
- ``ms`` to search: the median, and the quartiles ``ms_low`` and ``ms_high``, of ``repetitions`` after a warm-up. All
  searches take turns, so that what else the machine does meets all alike. There are ``--rounds`` of them, but a search
  that has spent ``--seconds`` takes no further part.
- ``of_matrix_product``, for searches that compare all pairs: their 2NMZ operations per second, as a fraction of those
  of a 4096x4096 product in float32 on the same machine (``matrix_tflops``).
- ``recall``@1 against a search in float64: the part of the queries for which the distance that is returned is at most
  0.1 % + 0.001 above the least. It goes by distances, since that is all a scorer returns. Those of a product quantiser
  are estimates: it may find the nearest row and misjudge its distance. ``relative_error`` (mean) says by how much.
- ``largest_error`` of a distance, absolute.
- ``extra_mib``, the memory that a search takes at its peak beyond what is in use before it, in a call of its own. On
  a CPU it is the process's, as the kernel counts it (Linux), after what earlier calls have freed was given back;
  buffers that a library keeps from call to call are not in it. On a GPU it is what torch allocates, without faiss's.

``<output>.png`` draws time against recall for the largest number of queries. Searches that cannot be made are left out,
with a line that says why. On a GPU scikit-learn has no part, and faiss searches its graph (``faiss_hnsw``) on the CPU.

Embeddings are tanh of points around 500 centres on a 12-dimensional surface in 64 dimensions, and a little noise; one
query in 20 is shifted off the surface. ``--embeddings`` takes others: a file of
``torch.save({"bank": [M, Z], "queries": [N, Z]})``, of which random rows are taken.

Example:
    ``python benchmarks/scorers.py --rows 1000 10000 100000 1000000 --output runs/scorers``
"""

import argparse
import ctypes
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pandas as pd
import threadpoolctl  # type: ignore[import-untyped]
import torch
from anomalib.models.image.patchcore.torch_model import DEFAULT_CHUNK_SIZE, PatchcoreModel
from matplotlib.figure import Figure
from report import set_plain_ticks
from runtimes import process_kib
from sklearn.neighbors import NearestNeighbors
from step import matrix_throughput, processor_name
from train import append

from anomalib_pedenet.scorers import SCORERS, make_scorer

Search = Callable[[torch.Tensor], torch.Tensor]

FAISS = ("faiss_flat", "faiss_ivf", "faiss_hnsw", "faiss_pq")
PEERS = ("torch.cdist", "anomalib PatchCore", "scikit-learn brute")
ALL = ("exact", *FAISS, *PEERS)
ALL_PAIRS = {"exact", "faiss_flat", *PEERS}
SHOWN = ["search", "rows", "queries", "build_seconds", "bytes", "ms", "ms_low", "ms_high", "of_matrix_product"]
SHOWN += ["recall", "relative_error", "largest_error", "extra_mib"]

_DIM, _SURFACE, _CENTERS = 64, 12, 500


def draw(count: int, seed: int) -> torch.Tensor:
    """Draw normal embeddings ``[count, 64]``; seeds differ in the embeddings, not in the centres and the surface."""
    fixed = torch.Generator().manual_seed(0)
    surface = torch.randn(_SURFACE, _DIM, generator=fixed) / 2
    centers = torch.randn(_CENTERS, _SURFACE, generator=fixed)
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randint(_CENTERS, (count,), generator=generator)
    places = centers[chosen] + 0.15 * torch.randn(count, _SURFACE, generator=generator)
    return (places @ surface / _SURFACE**0.5 + 0.02 * torch.randn(count, _DIM, generator=generator)).tanh()


def draw_queries(count: int, seed: int) -> torch.Tensor:
    """Draw queries ``[count, 64]``, one in twenty of them abnormal."""
    queries = draw(count, seed)
    shift = 0.3 * torch.randn(queries[::20].shape, generator=torch.Generator().manual_seed(seed))
    queries[::20] = (queries[::20].atanh() + shift).tanh()
    return queries


def get_embeddings(options: argparse.Namespace) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the largest bank ``[M, Z]`` and all queries ``[N, Z]``, drawn, or those of the file in random order."""
    if options.embeddings is None:
        bank = draw(max(options.rows), 2 * options.seed)
        return bank, draw_queries(max(options.queries), 2 * options.seed + 1)
    given = torch.load(options.embeddings, map_location="cpu", weights_only=True)
    generator = torch.Generator().manual_seed(options.seed)
    bank, queries = (
        rows[torch.randperm(len(rows), generator=generator)].float() for rows in (given["bank"], given["queries"])
    )
    return bank, queries


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


def import_faiss() -> ModuleType | None:
    """Return faiss, if it is installed."""
    try:
        import faiss
    except ImportError:
        return None
    return faiss


def choose_possible(names: Sequence[str], device: torch.device) -> list[str]:
    """Return those searches that can be made on a device, and say which cannot."""
    faiss = import_faiss()
    reasons: dict[str, str] = {}
    if faiss is None:
        reasons = dict.fromkeys(FAISS, "faiss is not installed")
    elif device.type == "cuda" and not hasattr(faiss, "StandardGpuResources"):
        reasons = dict.fromkeys(set(FAISS) - {"faiss_hnsw"}, "the installed faiss has no GPU support")
    if device.type == "cuda":
        reasons["scikit-learn brute"] = "it has no GPU support"
    for reason in dict.fromkeys(reasons.values()):
        left_out = [name for name in names if reasons.get(name) == reason]
        if left_out:
            print(f"left out, since {reason}: {', '.join(left_out)}", flush=True)
    return [name for name in names if name not in reasons]


def build(name: str, bank: torch.Tensor, seed: int) -> tuple[Search, int]:
    """Build a search and return it with the bytes of its state."""
    bank_bytes = bank.numel() * bank.element_size()
    if name in SCORERS:
        scorer = make_scorer(name, embedding_dim=bank.shape[1], bank_size=len(bank), seed=seed).to(bank.device)
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


def matrix_gib(name: str, num_queries: int, num_rows: int) -> float:
    """Return the GiB of the largest matrix of distances that a peer makes."""
    at_once = {"torch.cdist": num_queries, "anomalib PatchCore": min(num_queries, DEFAULT_CHUNK_SIZE)}.get(name, 0)
    return 4 * at_once * num_rows / 2**30


def timed(call: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    """Return the seconds of a call, to its end on the device, and its result."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    result = call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start, result


def extra_mib(call: Callable[[], Any], device: torch.device) -> float | None:
    """Return the MiB that a call takes at its peak beyond what is in use before it; ``None`` if nothing tells."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return round((torch.cuda.max_memory_allocated(device) - before) / 2**20, 1)

    reset = Path("/proc/self/clear_refs")
    if not reset.exists():
        return None
    ctypes.CDLL(None).malloc_trim(0)
    reset.write_text("5", encoding="utf-8")  # sets the peak, VmHWM, to what is in use now
    before = process_kib("VmRSS")
    call()
    return round((process_kib("VmHWM") - before) / 2**10, 1)


def judge(distances: torch.Tensor, true: torch.Tensor) -> dict[str, float]:
    """Compare distances with the true ones, float64."""
    distances = distances.to(true)
    errors = (distances - true).abs()
    return {
        "recall": round((distances <= 1.001 * true + 1e-3).double().mean().item(), 4),
        "relative_error": round((errors / true.clamp(min=1e-3)).mean().item(), 7),
        "largest_error": round(errors.max().item(), 7),
    }


def measure(
    options: argparse.Namespace, searches: dict[str, Search], queries: torch.Tensor, true: torch.Tensor
) -> dict[str, dict[str, Any]]:
    """Measure searches with the same queries, whose true distances are known.

    Args:
        options (argparse.Namespace): Options of the command line.
        searches (dict[str, Search]): Searches by name.
        queries (torch.Tensor): Queries ``[N, Z]``.
        true (torch.Tensor): Their least distances ``[N]``, float64.

    Returns:
        dict[str, dict[str, Any]]: The figures of each search.
    """
    calls = {name: partial(search, queries) for name, search in searches.items()}
    figures: dict[str, dict[str, Any]] = {}
    for name, call in calls.items():
        figures[name] = judge(call(), true) | {"extra_mib": extra_mib(call, queries.device)}  # the warm-up
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(options.rounds):
        for name, call in calls.items():
            if sum(times[name]) < options.seconds:
                times[name].append(timed(call, queries.device)[0])
    for name, values in times.items():
        low, median, high = pd.Series(values).quantile([0.25, 0.5, 0.75])
        milliseconds = {"ms": round(1e3 * median, 3), "ms_low": round(1e3 * low, 3), "ms_high": round(1e3 * high, 3)}
        figures[name] |= milliseconds | {"repetitions": len(values)}
    return figures


def plot(table: pd.DataFrame, path: Path) -> None:
    """Draw time against recall, a panel for each size of the bank, for the largest number of queries."""
    table = table[table["queries"] == table["queries"].max()]
    sizes = sorted(table["rows"].unique())
    figure = Figure(figsize=(4.2 * len(sizes), 4.5), layout="constrained")
    for axes, size in zip(figure.subplots(1, len(sizes), squeeze=False)[0], sizes, strict=True):
        rows = table[table["rows"] == size].sort_values("ms")
        gap = max(rows["ms"].max() / rows["ms"].min(), 10.0) ** 0.06  # from one label to the next above it
        height = 0.0
        for _, row in rows.iterrows():
            height = max(row["ms"], gap * height)
            is_left = row["recall"] < 0.5
            axes.annotate(
                row["search"] + (f", {row['relative_error']:.0%} off" if row["relative_error"] > 0.1 else ""),
                (row["recall"], row["ms"]),
                (row["recall"] + 0.06 if is_left else row["recall"] - 0.06, height),
                fontsize=8,
                ha="left" if is_left else "right",
                va="center",
                arrowprops={"arrowstyle": "-", "lw": 0.4},
            )
            axes.plot(row["recall"], row["ms"], "o", color=f"C{ALL.index(row['search'])}")
        axes.set(yscale="log", ylim=(rows["ms"].min() / gap, height * gap), xlim=(-0.05, 1.05))
        axes.set(title=f"{size:,} rows", xlabel="recall@1")
        set_plain_ticks(axes.yaxis)
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel(f"ms for {table['queries'].max():,} queries")
    figure.savefig(path, dpi=120)


def parse_arguments() -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n", maxsplit=1)[0])
    parser.add_argument(
        "--rows",
        type=int,
        nargs="+",
        default=[1_000, 10_000, 100_000, 1_000_000],
        help="bank sizes (default: 1,000 to a million)",
    )
    parser.add_argument(
        "--queries", type=int, nargs="+", default=[2_401, 9_409], help="numbers of queries (default: 2401 9409)"
    )
    parser.add_argument("--scorers", nargs="+", default=ALL, choices=ALL, metavar="NAME", help=f"of {', '.join(ALL)}")
    parser.add_argument("--embeddings", type=Path, help="file with a bank and queries, instead of drawing them")
    parser.add_argument("--rounds", type=int, default=5, help="repetitions (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=10.0, help="no more repetitions of a search after that")
    parser.add_argument("--largest_matrix", type=float, default=6.0, help="GiB; peers that need a larger are left out")
    parser.add_argument("--seed", type=int, default=0, help="of the drawn embeddings (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: %(default)s")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", type=torch.device, default=device, help="cuda adds what faiss has on GPUs")
    parser.add_argument("--output", default="runs/scorers", help="path of the CSV file and the picture, without ending")
    options = parser.parse_args()
    if options.rounds < 1 or options.seconds <= 0:
        parser.error("--rounds must be at least 1, and --seconds above 0")
    return options


def main() -> None:
    """Measure every search at every size."""
    options = parse_arguments()
    device: torch.device = options.device
    names = choose_possible(options.scorers, device)
    torch.set_num_threads(options.threads)
    threadpoolctl.threadpool_limits(options.threads)  # of faiss and scikit-learn, both loaded by now
    machine = {
        "matrix_tflops": round(matrix_throughput(torch.float32, device, repeats=1 + options.rounds) / 1e12, 4),
        "hardware": torch.cuda.get_device_name(device) if device.type == "cuda" else processor_name(),
        "threads": options.threads,
        "torch": torch.__version__,
        "faiss": getattr(import_faiss(), "__version__", ""),
        "seed": options.seed,
        "embeddings": options.embeddings.name if options.embeddings is not None else "drawn",
    }
    print(", ".join(f"{name} {value}" for name, value in machine.items()), flush=True)
    bank, queries = (embeddings.to(device) for embeddings in get_embeddings(options))

    table: list[dict[str, Any]] = []
    for num_rows in sorted({min(count, len(bank)) for count in options.rows}):
        true = least_distances(queries, bank[:num_rows])
        built: dict[str, Search] = {}
        states: dict[str, dict[str, Any]] = {}
        for name in names:
            seconds, (built[name], size) = timed(partial(build, name, bank[:num_rows], options.seed), device)
            states[name] = {"build_seconds": round(seconds, 3), "bytes": size}
        for num_queries in sorted({min(count, len(queries)) for count in options.queries}):
            gib = {name: matrix_gib(name, num_queries, num_rows) for name in names}
            for name in names:
                if gib[name] > options.largest_matrix:
                    print(f"left out, since it needs a matrix of {gib[name]:.1f} GiB: {name}", flush=True)
            searches = {name: search for name, search in built.items() if gib[name] <= options.largest_matrix}
            if not searches:
                continue
            figures = measure(options, searches, queries[:num_queries], true[:num_queries])
            rows = []
            for name, values in figures.items():
                row = {"search": name, "rows": num_rows, "queries": num_queries, **states[name], **values}
                tflops = 2 * num_queries * num_rows * bank.shape[1] / values["ms"] / 1e9
                fraction = round(tflops / machine["matrix_tflops"], 4) if name in ALL_PAIRS else None
                rows.append(row | {"of_matrix_product": fraction, **machine})
            append(Path(f"{options.output}.csv"), rows)
            print(pd.DataFrame(rows)[SHOWN].to_string(index=False), flush=True)
            table += rows
    if table:
        plot(pd.DataFrame(table), Path(f"{options.output}.png"))


if __name__ == "__main__":
    main()
