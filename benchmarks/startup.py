# Copyright (C) 2026 The anomalib-pedenet authors
# SPDX-License-Identifier: Apache-2.0

"""Measure what the start-up files cost a Python that never imports anomalib.

Starts ``python -c pass`` many times in a temporary environment: without the start-up files, with them, and, for
comparison, with a path file that imports the start-up module at once, which is what Python 3.15 and later do. The
three take turns, so that a change of the machine's load meets all of them.

Run it by ``python benchmarks/startup.py``; it needs nothing but the checkout.
"""

import argparse
import compileall
import json
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
VARIANTS = {
    "without": None,
    "with": (STARTUP / "anomalib_pedenet.pth").read_text(encoding="utf-8"),
    "module imported at once": "import _anomalib_pedenet_startup; _anomalib_pedenet_startup.install()\n",
}
COUNT_FINDERS = "import sys; print(sum(hasattr(f, 'anomalib_pedenet') for f in sys.meta_path))"


def create(folder: Path, path_file: str | None) -> str:
    """Create a virtual environment with a path file and check that the hook is active, or is not.

    Args:
        folder: Where to create it.
        path_file: Content of the path file; ``None`` for an environment without any start-up file.

    Returns:
        The environment's interpreter.

    Raises:
        RuntimeError: If the environment does not do what it is measured for.
    """
    builder = venv.EnvBuilder(symlinks=sys.platform != "win32")
    builder.create(folder)
    python = builder.ensure_directories(folder).env_exe
    query = [python, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])"]
    site_packages = Path(subprocess.run(query, check=True, capture_output=True, text=True).stdout.strip())
    if path_file is not None:
        (site_packages / "anomalib_pedenet.pth").write_text(path_file, encoding="utf-8")
        shutil.copy(STARTUP / "_anomalib_pedenet_startup.py", site_packages)
        compileall.compile_dir(site_packages, quiet=1)
    found = int(subprocess.run([python, "-c", COUNT_FINDERS], check=True, capture_output=True, text=True).stdout)
    if found != (path_file is not None):
        msg = f"Expected {int(path_file is not None)} finder of anomalib-pedenet in {folder}, found {found}."
        raise RuntimeError(msg)
    return python


def start_time(python: str) -> float:
    """Return how many milliseconds one start and end of an interpreter takes."""
    before = time.perf_counter()
    subprocess.run([python, "-c", "pass"], check=True)
    return 1e3 * (time.perf_counter() - before)


def measure(runs: int) -> dict[str, list[float]]:
    """Time the interpreter's start in every variant.

    Args:
        runs: How many starts to time per variant.

    Returns:
        The times of each variant in milliseconds.
    """
    times: dict[str, list[float]] = {name: [] for name in VARIANTS}
    with tempfile.TemporaryDirectory() as folder:
        pythons = {name: create(Path(folder, name), path_file) for name, path_file in VARIANTS.items()}
        for python in pythons.values():
            for _ in range(5):
                start_time(python)
        for _ in range(runs):
            for name, python in pythons.items():
                times[name].append(start_time(python))
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
    for name, values in times.items():
        low, median, high = statistics.quantiles(values, n=4)
        spread = f"{low:.2f} to {high:.2f}"
        print(f"{name:<25}{median:>10.2f}{spread:>18}{median - base:>+12.2f}{median / base:>8.3f}")
    if options.output is not None:
        options.output.write_text(json.dumps({**conditions, "times": times}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
