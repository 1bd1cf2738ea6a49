# Copyright (C) 2026 The anomalib-pedenet authors
# SPDX-License-Identifier: Apache-2.0

"""Measure what the start-up files cost a Python that never imports anomalib.

Starts ``python -c pass`` many times in temporary environments: without the start-up files, with them, and with them
but without bytecode, as some installers leave them until the first start. The three take turns, so that a change of
the machine's load meets all of them.

Run it by ``python benchmarks/startup.py``; it needs nothing but the checkout.
"""

import argparse
import compileall
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Sequence
from pathlib import Path

STARTUP = Path(__file__).parents[1] / "startup"
VARIANTS = ("without", "with", "with, not compiled")
# Keeps the third variant as it is, and the first two comparable to it.
ENVIRONMENT = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
COUNT_FINDERS = "import sys; print(sum(hasattr(f, 'anomalib_pedenet') for f in sys.meta_path))"


def create(folder: Path, variant: str) -> str:
    """Create a virtual environment and check that the hook is active there, or is not.

    Args:
        folder: Where to create it.
        variant: One of :data:`VARIANTS`.

    Returns:
        The environment's interpreter.

    Raises:
        RuntimeError: If the environment does not do what it is measured for.
    """
    builder = venv.EnvBuilder(symlinks=sys.platform != "win32")
    builder.create(folder)
    python: str = builder.ensure_directories(folder).env_exe
    site_packages = Path(run(python, "import sysconfig; print(sysconfig.get_paths()['purelib'])"))
    if variant != "without":
        for source in STARTUP.glob("*anomalib_pedenet*.*"):
            shutil.copy(source, site_packages)
    if variant == "with":
        compileall.compile_dir(site_packages, quiet=1)
    expected = int(variant != "without")
    found = int(run(python, COUNT_FINDERS))
    if found != expected:
        msg = f"Expected {expected} finder of anomalib-pedenet in {folder}, found {found}."
        raise RuntimeError(msg)
    return python


def run(python: str, code: str) -> str:
    """Run code in an interpreter and return what it prints."""
    command = [python, "-c", code]
    return subprocess.run(command, check=True, capture_output=True, text=True, env=ENVIRONMENT).stdout.strip()


def start_time(python: str) -> float:
    """Return how many milliseconds one start and end of an interpreter takes."""
    before = time.perf_counter()
    subprocess.run([python, "-c", "pass"], check=True, env=ENVIRONMENT)
    return 1e3 * (time.perf_counter() - before)


def measure(runs: int) -> dict[str, list[float]]:
    """Time the interpreter's start in every variant.

    Args:
        runs: How many starts to time per variant.

    Returns:
        The times of each variant in milliseconds.
    """
    times: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
    with tempfile.TemporaryDirectory() as folder:
        pythons = {variant: create(Path(folder, variant), variant) for variant in VARIANTS}
        for python in pythons.values():
            for _ in range(5):
                start_time(python)
        for _ in range(runs):
            for variant, python in pythons.items():
                times[variant].append(start_time(python))
    return times


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and print a table.

    Args:
        arguments: Command line arguments; those of the process if ``None``.
    """
    parser = argparse.ArgumentParser(description="Measure what the start-up files cost at every interpreter start.")
    parser.add_argument("--runs", type=int, default=300, help="starts per variant (default: %(default)s)")
    parser.add_argument("--output", type=Path, help="file to write all times and their conditions to, as JSON")
    options = parser.parse_args(arguments)

    times = measure(options.runs)
    conditions = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "runs": options.runs,
        "unit": "ms",
    }
    print(", ".join(f"{key} {value}" for key, value in conditions.items()))
    print(f"{'start-up files':<25}{'median':>10}{'quartiles':>18}{'difference':>12}{'ratio':>8}")
    base = statistics.median(times["without"])
    for variant, values in times.items():
        low, median, high = statistics.quantiles(values, n=4)
        spread = f"{low:.2f} to {high:.2f}"
        print(f"{variant:<25}{median:>10.2f}{spread:>18}{median - base:>+12.2f}{median / base:>8.3f}")
    if options.output is not None:
        options.output.write_text(json.dumps({**conditions, "times": times}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
