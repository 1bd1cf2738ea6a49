# Copyright (C) 2026 The anomalib-pedenet authors
# SPDX-License-Identifier: Apache-2.0

"""Train and test every method on every category with every seed, and write tables and figures beside published ones.

Each run that is finished leaves a file ``<output>/runs/<run>.json``, and some of its maps. A run whose file is there
with the same settings is not repeated, so that no more than one run is lost when the command is killed. At the end
``results.csv`` has a row for each run, and :mod:`report` renders the rest.

anomalib's runners schedule the runs: one after the other on a CPU, one for each GPU with ``--accelerator cuda``.

Example:
    ``python benchmarks/reproduce.py --categories bottle --seeds 0,1,2 --root datasets/MVTecAD``
"""

import argparse
import hashlib
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Generator, Sequence
from importlib.metadata import version
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pandas as pd
import torch
import yaml
from anomalib import models
from anomalib.data import AnomalibDataModule, get_datamodule
from anomalib.engine import Engine
from anomalib.metrics import AUPRO, AUROC, Evaluator, F1Max
from anomalib.models import AnomalibModule
from anomalib.pipelines.components import Job, JobGenerator
from anomalib.pipelines.components.runners import ParallelRunner, SerialRunner
from lightning.pytorch import seed_everything
from report import render, run_name
from step import processor_name
from torch.utils.flop_counter import FlopCounterMode
from train import read_data_config

from anomalib_pedenet.post_processor import PedenetPostProcessor

METHODS = Path(__file__).with_name("methods.yaml")
_LATENCY_RUNS = 20
_KEPT_MAPS = 6


def hardware() -> str:
    """Return the processor, and the GPU if there is one."""
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{processor_name()}, {torch.get_num_threads()} threads of {os.cpu_count()} cores{gpu}"


def measure_cost(model: AnomalibModule, image_size: Sequence[int]) -> dict[str, float]:
    """Measure what a trained torch model costs for one pre-processed image, after one run to warm up.

    Args:
        model (AnomalibModule): Trained model.
        image_size (Sequence[int]): Height and width of the image in pixels.

    Returns:
        dict[str, float]: Parameters (trained or not), bytes of the state (memory bank and statistics included),
            multiply-adds, and the median latency in milliseconds.
    """
    network = model.model.eval()
    device = next(network.parameters()).device
    image = torch.randn(1, 3, *image_size, device=device)
    seconds = []
    with torch.no_grad():
        with FlopCounterMode(display=False) as counter:
            network(image)
        for _ in range(_LATENCY_RUNS):
            start = time.perf_counter()
            network(image)
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
    tensors = [value for value in network.state_dict().values() if isinstance(value, torch.Tensor)]
    return {
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
        "bytes": sum(tensor.numel() * tensor.element_size() for tensor in tensors),
        "multiply_adds": counter.get_total_flops() // 2,
        "latency_ms": round(1000 * median(seconds), 2),
    }


def keep_maps(engine: Engine, model: AnomalibModule, datamodule: AnomalibDataModule, path: Path) -> None:
    """Keep the maps of a good image and of one image of each kind of defect, for the figures."""
    samples = datamodule.test_data.samples
    kinds = samples.assign(kind=samples["image_path"].map(lambda name: Path(name).parent.name))
    chosen = kinds.groupby("kind", sort=False).head(1).index[:_KEPT_MAPS].tolist()
    subset = torch.utils.data.Subset(datamodule.test_data, chosen)
    loader = torch.utils.data.DataLoader(subset, batch_size=1, collate_fn=datamodule.test_data.collate_fn)
    kept: dict[str, Any] = {}
    for index, batch in enumerate(engine.predict(model, dataloaders=loader, return_predictions=True) or []):
        maps = batch.anomaly_map.reshape(batch.anomaly_map.shape[-2:])
        shape = tuple(maps.shape)
        image = torch.nn.functional.interpolate(subset[index].image[None], shape, mode="bilinear", antialias=True)
        mask = subset[index].gt_mask
        mask = torch.zeros(shape) if mask is None else mask.float()
        mask = torch.nn.functional.interpolate(mask.reshape(1, 1, *mask.shape[-2:]), shape, mode="nearest")
        kept[f"image_{index}"] = (255 * image[0].permute(1, 2, 0)).byte().numpy()
        kept[f"mask_{index}"] = mask[0, 0].bool().numpy()
        kept[f"map_{index}"] = maps.float().numpy()
        kept[f"outline_{index}"] = batch.pred_mask.reshape(shape).bool().numpy()
    np.savez_compressed(path, **kept)


class ReproduceJob(Job):
    """One training and test.

    Args:
        key (dict[str, Any]): Category, method, seed, table and fingerprint of the settings: what names the run.
        options (dict[str, Any]): ``model``, ``data``, ``image_size``, ``accelerator`` and ``output``.
    """

    name = "reproduce"

    def __init__(self, key: dict[str, Any], options: dict[str, Any]) -> None:
        super().__init__()
        self.key = key
        self.options = options

    def run(self, task_id: int | None = None) -> dict[str, Any]:
        """Train, test, measure, and leave the file that says so.

        Args:
            task_id (int | None): GPU to use, where several runs go on at once.

        Returns:
            dict[str, Any]: The row of the run.
        """
        image_size = self.options["image_size"]
        seed_everything(self.key["seed"])
        kind = getattr(models, self.options["model"]["class_path"].split(".")[-1])
        model: AnomalibModule = kind(
            **self.options["model"].get("init_args", {}),
            pre_processor=kind.configure_pre_processor(tuple(image_size)),
            evaluator=Evaluator(
                [],
                [
                    AUROC(fields=["anomaly_map", "gt_mask"], prefix="pixel_", strict=False),
                    AUROC(fields=["pred_score", "gt_label"], prefix="image_"),
                    AUPRO(fields=["anomaly_map", "gt_mask"], prefix="pixel_", strict=False),
                    F1Max(fields=["anomaly_map", "gt_mask"], prefix="pixel_", strict=False),
                ],
            ),
            post_processor=PedenetPostProcessor(),  # anomalib's own clips maps, and so takes AUROC from all models
            visualizer=False,
        )
        datamodule = get_datamodule(self.options["data"])
        with tempfile.TemporaryDirectory() as results:
            engine = Engine(
                default_root_dir=results,
                logger=False,
                enable_progress_bar=False,
                accelerator=self.options["accelerator"],
                devices="auto" if task_id is None else [task_id],
                check_val_every_n_epoch=1_000_000,  # one validation, at the end, for the thresholds
            )
            start = time.monotonic()
            engine.fit(model, datamodule=datamodule)
            seconds = time.monotonic() - start
            engine.validate(model, datamodule=datamodule, verbose=False)
            metrics = dict(engine.test(model, datamodule=datamodule, verbose=False)[0])
            file = Path(self.options["output"]) / "runs" / run_name(self.key)
            keep_maps(engine, model, datamodule, file.with_name(f"{file.name}.npz"))
        row = {
            **self.key,
            **{name: round(float(value), 4) for name, value in metrics.items()},
            "train_seconds": round(seconds, 1),
            **measure_cost(model.cpu() if task_id is None else model, image_size),
            "image_size": "x".join(map(str, image_size)),
            "hardware": hardware(),
            "python": platform.python_version(),
            **{name: version(name) for name in ("anomalib", "anomalib-pedenet", "torch")},
        }
        unfinished = file.with_name(f"{file.name}.json.part")
        unfinished.write_text(json.dumps(row, indent=1), encoding="utf-8")
        unfinished.replace(file.with_name(f"{file.name}.json"))  # whole, or not there
        print(f"{row['category']}, {row['method']}, seed {row['seed']}: {metrics}", flush=True)
        return row

    @staticmethod
    def collect(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return the rows of this call's runs."""
        return results

    @staticmethod
    def save(results: list[dict[str, Any]]) -> None:
        """Do nothing: every run has saved itself."""


class ReproduceJobGenerator(JobGenerator):
    """Generates the runs that are not finished yet."""

    @property
    def job_class(self) -> type:
        """The class of the jobs."""
        return ReproduceJob

    def generate_jobs(self, args: dict, previous_stage_result: object = None) -> Generator[ReproduceJob, None, None]:
        """Yield the runs of all seeds, categories and methods without a file of the same settings.

        Args:
            args (dict): Options of the command line.
            previous_stage_result (object): Unused.

        Yields:
            ReproduceJob: A run.
        """
        del previous_stage_result
        methods = yaml.safe_load(args["methods_file"].read_text(encoding="utf-8"))
        unknown = set(args["methods"] or ()) - set(methods)
        if unknown:
            msg = f"Unknown methods {', '.join(sorted(unknown))}: {args['methods_file']} has {', '.join(methods)}."
            raise SystemExit(msg)
        (args["output"] / "runs").mkdir(parents=True, exist_ok=True)
        runs = product(args["seeds"], args["categories"] or [None], args["methods"] or methods)
        for seed, category, method in runs:
            data = read_data_config(args["data"], args["root"], category)
            options = {
                "model": methods[method]["model"],
                "data": data,
                "image_size": args["image_size"],
                "accelerator": args["accelerator"],
                "output": str(args["output"]),
            }
            settings = json.dumps([options["model"], data["class_path"], args["image_size"]], sort_keys=True)
            key = {
                "category": data["init_args"].get("category") or data["init_args"]["name"],
                "method": method,
                "seed": seed,
                "table": methods[method]["table"],
                "settings": hashlib.sha256(settings.encode()).hexdigest()[:12],
            }
            file = args["output"] / "runs" / f"{run_name(key)}.json"
            row = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
            if row.get("settings") == key["settings"]:
                print(f"{key['category']}, {method}, seed {seed}: finished before", flush=True)
                continue
            yield ReproduceJob(key, options)


def main() -> None:
    """Run what is not finished, and render the report."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n", maxsplit=1)[0])

    def names(text: str) -> list[str]:
        return text.replace(",", " ").split()

    parser.add_argument("--data", type=Path, default=Path("configs/data/mvtec_ad.yaml"), help="data module")
    parser.add_argument("--root", type=Path, help="root of the data set, instead of the configuration's")
    parser.add_argument("--categories", type=names, help="by default the configuration's")
    parser.add_argument("--seeds", type=lambda text: [int(seed) for seed in names(text)], default=[0])
    parser.add_argument(
        "--methods",
        type=lambda text: [name.strip() for name in text.split(";") if name.strip()],
        help="names in the file of methods, separated by semicolons; by default all",
    )
    parser.add_argument("--methods_file", type=Path, default=METHODS, help="see benchmarks/methods.yaml")
    parser.add_argument(
        "--image_size", type=lambda text: [int(side) for side in names(text)], default=[256, 256], help="height,width"
    )
    parser.add_argument("--accelerator", default="cpu", help="cpu, or cuda for one run on each GPU")
    parser.add_argument("--output", type=Path, default=Path("runs/reproduce"))
    options = parser.parse_args()

    generator = ReproduceJobGenerator()
    devices = torch.cuda.device_count() if options.accelerator == "cuda" else 0
    runner = ParallelRunner(generator, n_jobs=devices) if devices > 1 else SerialRunner(generator)
    runner.run(vars(options))
    rows = [json.loads(path.read_text(encoding="utf-8")) for path in (options.output / "runs").glob("*.json")]
    if not rows:
        sys.exit("No run is finished.")
    order = list(yaml.safe_load(options.methods_file.read_text(encoding="utf-8")))
    rows.sort(
        key=lambda row: (
            row["category"],
            order.index(row["method"]) if row["method"] in order else len(order),
            row["seed"],
        )
    )
    pd.DataFrame(rows).to_csv(options.output / "results.csv", index=False)
    print(f"Rendered {render(options.output)}")


if __name__ == "__main__":
    main()
