# Copyright (C) 2026 The anomalib-pedenet authors
# SPDX-License-Identifier: Apache-2.0

"""Measure what the start-up files cost a Python that never imports anomalib.

Starts ``python -c pass`` many times, in turns, in three temporary environments: without the start-up files, with them,
and with them but without bytecode, as some installers leave them until the first start.
"""

import argparse
import compileall
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path

STARTUP = Path(__file__).parents[1] / "startup"
VARIANTS = ("without", "with", "with, not compiled")
COUNT_FINDERS = "import sys; print(sum(hasattr(f, 'anomalib_pedenet') for f in sys.meta_path))"


def run(python: str, code: str) -> tuple[float, str]:
    """Run code in an interpreter, and return the milliseconds and what it prints."""
    # Without writing bytecode the third variant stays as it is, and the first two comparable to it.
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    start = time.perf_counter()
    done = subprocess.run([python, "-c", code], check=True, capture_output=True, text=True, env=environment)
    return 1e3 * (time.perf_counter() - start), done.stdout.strip()


def create(folder: Path, variant: str) -> str:
    """Create an environment of a variant, check that the hook is active there or not, and return its interpreter."""
    builder = venv.EnvBuilder(symlinks=sys.platform != "win32")
    builder.create(folder)
    python: str = builder.ensure_directories(folder).env_exe
    site_packages = Path(run(python, "import sysconfig; print(sysconfig.get_paths()['purelib'])")[1])
    if variant != "without":
        for source in STARTUP.glob("*anomalib_pedenet*.*"):
            shutil.copy(source, site_packages)
    if variant == "with":
        compileall.compile_dir(site_packages, quiet=1)
    found = int(run(python, COUNT_FINDERS)[1])
    if found != (variant != "without"):
        msg = f"Found {found} finders of anomalib-pedenet in the environment {variant} the start-up files."
        raise RuntimeError(msg)
    return python


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n", maxsplit=1)[0])
    parser.add_argument("--runs", type=int, default=300, help="starts per variant (default: %(default)s)")
    options = parser.parse_args()
    times: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
    with tempfile.TemporaryDirectory() as folder:
        pythons = {variant: create(Path(folder, variant), variant) for variant in VARIANTS}
        for _ in range(options.runs + 5):
            for variant, python in pythons.items():
                times[variant].append(run(python, "pass")[0])
    print(f"{'start-up files':<25}{'median, ms':>10}{'quartiles':>18}{'difference':>12}")
    base = statistics.median(times["without"][5:])
    for variant, values in times.items():
        low, median, high = statistics.quantiles(values[5:], n=4)  # after some to warm up
        print(f"{variant:<25}{median:>10.2f}{f'{low:.2f} to {high:.2f}':>18}{median - base:>+12.2f}")


if __name__ == "__main__":
    main()
