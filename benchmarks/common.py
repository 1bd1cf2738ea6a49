# Copyright (C) 2026 The anomalib-pedenet authors
# SPDX-License-Identifier: Apache-2.0

"""What several benchmarks need: names, data modules, timing, CSV files and tables."""

import argparse
import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import yaml
from anomalib.data import AnomalibDataModule, get_datamodule

from anomalib_pedenet.scorers.nearest_neighbor import multiply_by_onednn


def run_name(row: Mapping[Any, Any]) -> str:
    """Return the name of a run's files, from its category, method and seed."""
    method = "".join(letter if letter.isalnum() else "_" for letter in row["method"])
    return f"{row['category']}-{method}-{row['seed']}"


def add_data_options(parser: argparse.ArgumentParser, required: bool = False) -> None:
    """Add the options that name a data module: those that :func:`make_datamodule` takes."""
    parser.add_argument("--data", type=Path, required=required, help="configuration of a data module, see configs/data")
    parser.add_argument("--root", help="root of the data set (default: the configuration's)")
    parser.add_argument("--category", help="category (default: the configuration's)")


def read_data(path: Path, root: str | None, category: str | None) -> dict[str, Any]:
    """Read the configuration of a data module, with another root or category if one is given."""
    config: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    given = {"root": root, "category": category}
    config["init_args"] |= {name: value for name, value in given.items() if value is not None}
    return config


def make_datamodule(options: argparse.Namespace) -> AnomalibDataModule:
    """Make the data module that the options name."""
    return get_datamodule(read_data(options.data, options.root, options.category))


def processor_name() -> str:
    """Return the processor's name, as far as the system says it."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def hardware() -> str:
    """Return the processor, and the GPU if there is one."""
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{processor_name()}, {torch.get_num_threads()} of {os.cpu_count()} cores{gpu}"


def timed(call: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    """Return the seconds of a call, to its end on the device, and its result."""
    wait = partial(torch.cuda.synchronize, device) if device.type == "cuda" else (lambda: None)
    wait()
    start = time.perf_counter()
    result = call()
    wait()
    return time.perf_counter() - start, result


def time_in_turns(
    calls: Sequence[Callable[[], Any]], rounds: int, limit: float, device: torch.device, pause: float = 0.0
) -> list[pd.Series]:
    """Return the seconds of each call, made in turns, so that what else the machine does meets all alike.

    A call that has spent ``limit`` seconds takes no further part. With a pause, which comes before each turn, a turn
    begins with a call that is not timed.
    """
    seconds: list[list[float]] = [[] for _ in calls]
    for _ in range(rounds):
        for call, spent in zip(calls, seconds, strict=True):
            if sum(spent) < limit:
                if pause:
                    time.sleep(pause)
                    call()
                spent.append(timed(call, device)[0])
    return [pd.Series(spent, dtype=float) for spent in seconds]


def quartiles(seconds: pd.Series) -> dict[str, float]:
    """Return the median and the quartiles of times in milliseconds, and how many they are."""
    low, median, high = (1e3 * seconds.quantile([0.25, 0.5, 0.75])).round(3)
    return {"ms": median, "ms_low": low, "ms_high": high, "repetitions": len(seconds)}


def matrix_throughput(dtype: torch.dtype, device: torch.device, side: int = 4096, repeats: int = 10) -> float:
    """Return the floating-point operations per second of a large matrix product: the best of some repeats.

    On a CPU also as a convolution of 1x1: torch multiplies float32 by MKL and convolves by oneDNN, which is twice as
    fast on some processors.
    """
    left, right = torch.randn(2, side, side, device=device).to(dtype)
    products: list[Callable[[], torch.Tensor]] = [lambda: left @ right]
    if device.type == "cpu":
        products.append(lambda: multiply_by_onednn(left, right))
    return 2 * side**3 / min(timed(product, device)[0] for product in products for _ in range(repeats))


@contextmanager
def leaving_out(name: str) -> Iterator[None]:
    """Say what fails, and why, and go on without it."""
    try:
        yield
    except Exception as error:  # noqa: BLE001 - exporters, runtimes and libraries raise what they like
        reason = " ".join(str(error).split())[:300]
        print(f"left out: {name} ({type(error).__name__}: {reason})", flush=True)


def append(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Append lines to a CSV file, with a header if it is new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(rows).to_csv(path, mode="a", header=not path.exists(), index=False)


def markdown(table: pd.DataFrame) -> str:
    """Return a table of strings as Markdown; its index is the first column."""
    lines = ["| " + " | ".join([str(table.index.name or ""), *map(str, table.columns)]) + " |"]
    lines.append("|---" * (1 + len(table.columns)) + "|")
    lines += ["| " + " | ".join(map(str, row)) + " |" for row in table.itertuples()]
    return "\n".join(lines)
