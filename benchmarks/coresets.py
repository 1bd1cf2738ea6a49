# Copyright (C) 2026 The anomalib-pedenet authors
# SPDX-License-Identifier: Apache-2.0

"""Build small memory banks from many embeddings: wall time, memory, and how well the bank stands for the rest.

Embeddings stream in, image by image, and are never held all at once. Each builder runs in a process of its own, whose
peak memory beyond what its libraries take is noted. anomalib's ``KCenterGreedy`` needs all embeddings at once: it is
given ever more of them, until a run takes longer than ``--limit`` seconds or dies for want of memory. The bank is
judged by the distance of new normal embeddings to it: the mean, and the largest (the radius that k-center makes small).

Example:
    ``python benchmarks/coresets.py --embeddings 2000000 --size 10000 --output runs/coresets``
"""

import argparse
import multiprocessing
import os
import resource
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, cast, get_args

import pandas as pd
import torch
from anomalib.models.components import KCenterGreedy
from train import append

from anomalib_pedenet.scorers import Coreset, NearestNeighborScorer
from anomalib_pedenet.scorers.coreset import make_bank_builder

PER_IMAGE = 841  # patches of an image of 256x256 at stride 8
_DIM, _CENTERS = 66, 2_000
_NEW = 20  # images by which a bank is judged


def images(count: int, seed: int) -> Iterator[torch.Tensor]:
    """Yield the embeddings ``[841, 66]`` of ``count`` images: around 2,000 centres of very unequal shares."""
    centers = torch.randn(_CENTERS, _DIM, generator=torch.Generator().manual_seed(0))
    frequencies = 1 / torch.arange(1, _CENTERS + 1)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        chosen = torch.multinomial(frequencies, PER_IMAGE, replacement=True, generator=generator)
        yield (centers[chosen] + 0.3 * torch.randn(PER_IMAGE, _DIM, generator=generator)).tanh()


def peak_mib() -> float:
    """Return the largest memory this process has had, in MiB (Linux)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def build(builder: str, count: int, size: int, threads: int) -> dict[str, Any]:
    """Build a bank in this process and measure it.

    Args:
        builder (str): A coreset, or ``"anomalib KCenterGreedy"``.
        count (int): Number of embeddings.
        size (int): Rows of the bank.
        threads (int): Threads of torch.

    Returns:
        dict[str, Any]: The measurements.
    """
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    next(images(1, 1))
    before = peak_mib()
    generating, start = 0.0, time.monotonic()

    def stream() -> Iterator[torch.Tensor]:
        nonlocal generating
        source = images(-(-count // PER_IMAGE), 1)
        while True:
            begin = time.monotonic()
            rows = next(source, None)
            generating += time.monotonic() - begin
            if rows is None:
                return
            yield rows

    if builder in get_args(Coreset):
        streaming = make_bank_builder(cast("Coreset", builder), size)
        for rows in stream():
            streaming.update(rows)
        bank = streaming.build()
    else:
        everything = torch.cat(list(stream()))
        bank = KCenterGreedy(everything, size / len(everything)).sample_coreset()
    seconds = time.monotonic() - start - generating
    peak = peak_mib() - before
    scorer = NearestNeighborScorer(_DIM, bank_size=len(bank))
    scorer.fit([bank])
    distances = torch.cat([scorer(rows) for rows in images(_NEW, 2)])
    return {
        "builder": builder,
        "embeddings": count,
        "rows": len(bank),
        "threads": threads,
        "seconds": round(seconds, 1),
        "peak_mib": round(peak),
        "mean_distance": round(distances.mean().item(), 4),
        "largest_distance": round(distances.max().item(), 4),
    }


def main() -> None:
    """Measure every builder."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n", maxsplit=1)[0])
    parser.add_argument("--embeddings", type=int, default=2_000_000, help="how many (default: %(default)s)")
    parser.add_argument("--size", type=int, default=10_000, help="rows of the bank (default: %(default)s)")
    builders = [name for name in get_args(Coreset) if name != "auto"]  # which is one of the others
    parser.add_argument("--builders", nargs="+", default=builders, choices=builders, help="default: all")
    parser.add_argument(
        "--limit",
        type=float,
        default=300.0,
        help="end anomalib's KCenterGreedy after a run of so many seconds (default: %(default)s); 0 leaves it out",
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: %(default)s")
    parser.add_argument("--output", default="runs/coresets", help="path of the CSV file, without ending")
    options = parser.parse_args()

    context = multiprocessing.get_context("spawn")

    def measure(builder: str, count: int) -> dict[str, Any]:
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            row = pool.submit(build, builder, count, options.size, options.threads).result()
        append(Path(f"{options.output}.csv"), [row])
        print(row, flush=True)
        return row

    for builder in options.builders:
        measure(builder, options.embeddings)
    # glibc's threshold for large blocks, at its default but fixed: where it adapts, KCenterGreedy's freed distances
    # leave holes that are never filled again, and its process reaches 24 GiB with 20,000 embeddings.
    os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", "131072")
    count = 2 * options.size
    while options.limit > 0 and count <= options.embeddings:
        try:
            seconds = measure("anomalib KCenterGreedy", count)["seconds"]
        except BrokenProcessPool:
            print(f"anomalib KCenterGreedy of {count} embeddings was killed, as if for want of memory", file=sys.stderr)
            break
        if seconds > options.limit:
            break
        count *= 2
    print(pd.read_csv(f"{options.output}.csv").to_string(index=False))


if __name__ == "__main__":
    main()
