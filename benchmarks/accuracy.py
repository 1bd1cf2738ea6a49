# Copyright (C) 2026 The anomalib-pedenet authors
# SPDX-License-Identifier: Apache-2.0

"""Train and test methods on many data sets, several at a time, and compare them in one table.

No change should be judged by one category. Sets are described in a YAML file: by name, ``data`` (a data module, its
``root`` relative to the file), ``image_size`` (height and width) and ``kind``, which is printed. Methods are those of
``methods.yaml``, or of a file like it. Each finished run leaves a row, a checkpoint and some maps in
``<output>/runs``, as with :mod:`reproduce`, and is not repeated: a command that was stopped goes on where it was.

A method with ``weights_of`` is not trained: it loads the checkpoints of the named method with other arguments, whose
memory bank is built anew, so that many ways of scoring cost little.

Example:
    ``python benchmarks/accuracy.py --sets data/sets.yaml --methods "Pedenet;PaDiM, ImageNet" --output runs/accuracy``
"""

import argparse
import hashlib
import json
import multiprocessing
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import yaml
from report import METRICS, markdown, run_name
from reproduce import METHODS, ReproduceJob, arguments_of, method_names, names, numbers, read_methods

COMPARED = ("Pedenet", "PaDiM, ImageNet", "PatchCore, ImageNet, 1 % coreset")
"""What is compared where nothing is said: of the file of methods that is here."""


def read_sets(path: Path, names: list[str] | None) -> dict[str, dict[str, Any]]:
    """Read the descriptions of data sets, with roots that are relative to the file made absolute.

    Args:
        path (Path): YAML file.
        names (list[str] | None): Sets to take; ``None`` for all.

    Returns:
        dict[str, dict[str, Any]]: ``data``, ``image_size`` and ``kind`` by name.

    Raises:
        SystemExit: If a name is unknown.
    """
    sets: dict[str, dict[str, Any]] = yaml.safe_load(path.read_text(encoding="utf-8"))
    unknown = set(names or ()) - set(sets)
    if unknown:
        msg = f"Unknown sets {', '.join(sorted(unknown))}: {path} has {', '.join(sets)}."
        raise SystemExit(msg)
    for entry in sets.values():
        arguments = entry["data"]["init_args"]
        arguments["root"] = str((path.parent / arguments["root"]).resolve())
        # anomalib's eight workers take half a gigabyte each, and several runs at once then all of the memory.
        arguments.setdefault("num_workers", 0)
    return {name: sets[name] for name in names or sets}


def plan(options: argparse.Namespace, sets: dict[str, dict[str, Any]]) -> list[ReproduceJob]:
    """Return the runs that are not finished.

    Raises:
        SystemExit: If a method is unknown.
    """
    chosen = options.methods or (COMPARED if options.methods_file == METHODS else None)
    methods = read_methods(options.methods_file, chosen)
    jobs = []
    for seed, (name, entry), method in product(options.seeds, sets.items(), chosen or methods):
        jobs += _job(options, {"category": name, "method": method, "seed": seed}, entry, methods[method])
    return jobs


def _job(
    options: argparse.Namespace, key: dict[str, Any], data_set: dict[str, Any], method: dict[str, Any]
) -> list[ReproduceJob]:
    """Return the run of a method on a set, or none if it is finished with the same settings."""
    what = [arguments_of(method["model"]), method.get("weights_of"), data_set["data"]["class_path"]]
    what += [data_set["image_size"], method.get("trainer")]
    settings = hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:12]
    key = {**key, "table": method["table"], "settings": settings}
    file = options.output / "runs" / f"{run_name(key)}.json"
    if file.exists() and json.loads(file.read_text(encoding="utf-8"))["settings"] == settings:
        print(f"{key['category']}, {key['method']}, seed {key['seed']}: finished before", flush=True)
        return []
    job_options = {
        "method": method,
        "data": data_set["data"],
        "data_file": options.sets.name,
        "image_size": method.get("image_size", data_set["image_size"]),
        "accelerator": options.accelerator,
        "curve": False,
        "checkpoints": True,
        "output": str(options.output),
    }
    return [ReproduceJob(key, job_options)]


def run_all(jobs: list[ReproduceJob], at_once: int) -> list[str]:
    """Run jobs in processes of their own, which share the cores.

    Args:
        jobs (list[ReproduceJob]): Jobs, in the order to start them.
        at_once (int): How many run at once.

    Returns:
        list[str]: Names of the runs that failed; what went wrong they have printed.
    """
    # Several processes of several threads each on the same cores take several times as long.
    threads = max(1, (os.cpu_count() or 1) // at_once)
    os.environ["OMP_NUM_THREADS"] = str(threads)
    # A process for each run: what a training leaves in memory goes with it.
    context = multiprocessing.get_context("spawn")

    def run(job: ReproduceJob) -> str | None:
        process = context.Process(target=_run, args=(job, threads))
        process.start()
        process.join()
        return run_name(job.key) if process.exitcode else None

    loading = [job for job in jobs if "weights_of" in job.options["method"]]
    failed: list[str] = []
    for part in ([job for job in jobs if job not in loading], loading):
        with ThreadPoolExecutor(at_once) as pool:
            failed += [name for name in pool.map(run, part) if name is not None]
    return failed


def _run(job: ReproduceJob, threads: int) -> None:
    torch.set_num_threads(threads)
    job.run()


def tables(rows: pd.DataFrame, kinds: dict[str, str]) -> str:
    """Return a table of every metric: sets by methods, means over the seeds, then their mean and the worst.

    Args:
        rows (pd.DataFrame): A row for each run.
        kinds (dict[str, str]): Kind of each set, in the order to print them.

    Returns:
        str: Markdown.
    """
    rows = rows[rows["category"].isin(list(kinds))]
    parts = []
    for metric, title in METRICS.items():
        means = rows.pivot_table(index="category", columns="method", values=metric, sort=False)
        means = means.reindex([name for name in kinds if name in means.index])[list(dict.fromkeys(rows["method"]))]
        complete = means.dropna()
        shown = means.map("{:.3f}".format, na_action="ignore").fillna("")
        shown.insert(0, "kind", [kinds[name] for name in shown.index])
        for label, values in (("**mean**", complete.mean()), ("**worst**", complete.min())):
            shown.loc[label] = [f"{len(complete)} sets", *values.map("{:.3f}".format)]
        parts.append(f"{title[0].upper()}{title[1:]}:\n\n{markdown(shown.rename_axis('set'))}")
    return "\n\n".join(parts)


def main() -> None:
    """Run what is not finished, and print and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n", maxsplit=1)[0])
    parser.add_argument("--sets", type=Path, required=True, help="YAML file of data sets")
    parser.add_argument("--names", type=names, help="of the sets to take; by default all")
    parser.add_argument("--seeds", type=numbers, default=[0])
    parser.add_argument(
        "--methods",
        type=method_names,
        help="names in the file of methods, separated by semicolons; by default Pedenet and peers of ImageNet weights",
    )
    parser.add_argument("--methods_file", type=Path, default=METHODS, help="see benchmarks/methods.yaml")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time (default: 2)")
    parser.add_argument("--accelerator", default="cpu", help="cpu, or cuda for all runs on one GPU")
    parser.add_argument("--output", type=Path, default=Path("runs/accuracy"))
    options = parser.parse_args()

    (options.output / "runs").mkdir(parents=True, exist_ok=True)
    failed = run_all(plan(options, read_sets(options.sets, options.names)), options.jobs)
    order = list(yaml.safe_load(options.methods_file.read_text(encoding="utf-8")))
    rows = pd.DataFrame(json.loads(path.read_text()) for path in sorted((options.output / "runs").glob("*.json")))
    if rows.empty:
        sys.exit("No run is finished.")
    rows = rows[rows["method"].isin(order)].sort_values(["category", "seed"])
    rows = rows.sort_values("method", key=lambda column: column.map(order.index), kind="stable")
    rows.drop(columns="curve", errors="ignore").to_csv(options.output / "accuracy.csv", index=False)
    kinds = {name: entry["kind"] for name, entry in read_sets(options.sets, None).items()}
    text = tables(rows, kinds)
    (options.output / "accuracy.md").write_text(text + "\n", encoding="utf-8")
    print(text)
    if failed:
        sys.exit(f"Failed: {', '.join(failed)}. Repeat the command to try them again.")


if __name__ == "__main__":
    main()
