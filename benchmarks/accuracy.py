# Copyright (C) 2026 The anomalib-pedenet authors
# SPDX-License-Identifier: Apache-2.0

"""Train and test methods on data sets with seeds, several at a time, and compare them in tables and pictures.

Data sets are those of a file (``--sets``; see :func:`runs.read_sets`), or categories of a data module (``--data``).
Methods are those of ``methods.yaml``, or of a file like it. Each run leaves a row, a checkpoint and some maps in
``<output>/runs``. What is finished with the same settings is not repeated: a command that was stopped goes on where it
was. ``<output>`` then has ``results.csv``, a row for each run of the file's methods, and ``results.md``.

Example:
    ``python benchmarks/accuracy.py --sets data/sets.yaml --methods "Pedenet;PaDiM, ImageNet" --seeds 0,1,2``
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import pandas as pd
from common import add_data_options
from report import accuracy_tables, render
from runs import METHODS, choose, plan, read_methods, read_sets, run_all, sets_of

COMPARED = ["Pedenet", "PaDiM, ImageNet", "PatchCore, ImageNet, 1 % coreset"]
"""What is compared where neither methods nor a file of methods are named."""


def names(text: str) -> list[str]:
    """Split an option of names by commas or spaces."""
    return text.replace(",", " ").split()


def numbers(text: str) -> list[int]:
    """Split an option of whole numbers likewise."""
    return [int(number) for number in names(text)]


def method_names(text: str) -> list[str]:
    """Split an option of methods, whose names may have commas, by semicolons."""
    return [name.strip() for name in text.split(";") if name.strip()]


def collect(folder: Path, methods: list[str], sets: dict[str, Any]) -> pd.DataFrame:
    """Return the rows of the methods' finished runs, sorted as the files of sets and methods are."""
    files = sorted((folder / "runs").glob("*.json"))
    rows = pd.DataFrame(json.loads(file.read_text(encoding="utf-8")) for file in files)
    if rows.empty:
        return rows
    rows = rows[rows["method"].isin(methods)].drop(columns="curve", errors="ignore")
    order = list(dict.fromkeys([*sets, *rows["category"]]))
    kinds = {name: entry["kind"] for name, entry in sets.items() if "kind" in entry}
    if kinds:
        rows.insert(1, "kind", rows["category"].map(kinds))
    ranks = {"category": order.index, "method": methods.index, "seed": int}
    return rows.sort_values(list(ranks), key=lambda column: column.map(ranks[column.name]))


def main() -> None:
    """Run what is not finished, and write the report."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n", maxsplit=1)[0])
    parser.add_argument("--sets", type=Path, help="YAML file of data sets")
    parser.add_argument("--names", type=names, help="of the sets to take (default: all)")
    add_data_options(parser)
    parser.add_argument("--image_size", type=numbers, help="height,width with --data (default: 256,256)")
    parser.add_argument("--seeds", type=numbers, default=[0], help="as 0,1,2 (default: 0)")
    parser.add_argument("--methods", type=method_names, help="separated by semicolons (default: all of the file)")
    parser.add_argument("--methods_file", type=Path, help="default: some of benchmarks/methods.yaml")
    parser.add_argument("--curve", action="store_true", help="validate after each epoch, for AUROC by time")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time (default: %(default)s)")
    parser.add_argument("--accelerator", default="cpu", help="as of the trainer: cpu, cuda (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("runs/accuracy"), help="folder (default: %(default)s)")
    options = parser.parse_args()
    if (options.sets is None) == (options.data is None):
        parser.error("give --sets or --data: one of them")
    if options.sets is not None and (options.root or options.category or options.image_size):
        parser.error("--root, --category and --image_size go with --data; a file of sets has its own")
    if options.image_size is not None and len(options.image_size) != 2:
        parser.error(f"--image_size must be a height and a width, got {options.image_size}")

    if options.sets is not None:
        sets = read_sets(options.sets)
    else:
        sets = sets_of(options.data, options.root, names(options.category or ""), options.image_size or [256, 256])
    source = options.sets or options.data
    known = read_methods(options.methods_file or METHODS)
    wanted = options.methods or (COMPARED if options.methods_file is None else None)
    methods = choose("methods", known, wanted, options.methods_file or METHODS)
    chosen = choose("sets", sets, options.names, source)
    (options.output / "runs").mkdir(parents=True, exist_ok=True)
    runs = plan(chosen, methods, options.seeds, source.name, options.output, options.accelerator, options.curve)
    failed = run_all(runs, options.jobs)
    rows = collect(options.output, list(known), sets)
    if not rows.empty:
        rows.to_csv(options.output / "results.csv", index=False)
        print("\n\n".join(accuracy_tables(rows)), f"\n\nRendered {render(options.output)}")
    if failed:
        sys.exit(f"Failed: {'; '.join(failed)}. Repeat the command to try them again.")


if __name__ == "__main__":
    main()
