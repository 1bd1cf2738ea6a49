# Copyright (C) 2026 The anomalib-pedenet authors
# SPDX-License-Identifier: Apache-2.0

"""Train Pedenet with one or more settings and seeds, and write what each run reached and cost as lines of CSV.

Lines are appended to ``<output>.csv``, one for each run: AUROC on the test images, and the seconds of
the training, its memory bank included. Runs that the file has already are left out, so that an interrupted benchmark
goes on when repeated. With ``--curve`` the training is validated after each epoch, and ``<output>_curve.csv`` has a
line for each validation: the seconds of training so far, without the validations before, and AUROC.

With ``--holdout`` a part of the normal images is held back, and AUROC on defects drawn on them (``drawn_``) is noted as
well. At the end the rank correlation of that label-free figure with AUROC on the test images is printed, over all runs
on each data set.

Example:
    ``python benchmarks/train.py --data configs/data/mvtec_ad.yaml --seeds 0 1 2 --output bottle --set "{}"
    --set "{lambda_syn: 0.0}"``
"""

import argparse
import csv
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import torch
import yaml
from anomalib.data import AnomalibDataModule, Batch, get_datamodule
from anomalib.engine import Engine
from anomalib.metrics import AUROC, AnomalibMetric, Evaluator
from anomalib.models import Pedenet
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.trainer.states import TrainerFn
from matplotlib.figure import Figure
from report import set_plain_ticks

TEST_METRICS = ("pixel_AUROC", "image_AUROC")
DRAWN_METRICS = ("drawn_pixel_AUROC", "drawn_image_AUROC")
LOGGED = ("lp_accuracy_32", "lp_accuracy_64", "spread_32", "spread_64")


class ValidationAUROC(AUROC):
    """AUROC of scores of any range: in a validation they are not normalised yet.

    torchmetrics takes the scores of a batch for logits if one is beyond 0..1, and for probabilities if none is, so that
    the batches of a model whose scores lie on both sides of 1 do not compare. Here all are brought into 0..1 in their
    order.

    Args:
        prefix (str): Prefix of the metric's name, ``AUROC``.
        fields (Sequence[str]): Fields of a batch: the scores, and the truth. The metric is left out where one is
            missing.
    """

    def __init__(self, prefix: str, fields: Sequence[str]) -> None:
        super().__init__(fields=fields, prefix=prefix, strict=False)
        self.name = f"{prefix}AUROC"

    def update(self, batch: Batch) -> None:
        """Add a batch."""
        scores, truth = (getattr(batch, field) for field in self.fields)
        if scores is not None:
            scores = (1 + scores / (1 + scores.abs())) / 2
        super().update(SimpleNamespace(**dict(zip(self.fields, (scores, truth), strict=True))))


def make_evaluator(curve: bool, *more: AnomalibMetric) -> Evaluator:
    """Make an evaluator of pixel and image AUROC on the test images.

    Args:
        curve (bool): Whether validations measure them as well, as :class:`Curve` notes them.
        *more (AnomalibMetric): More metrics of the test images.

    Returns:
        Evaluator: The evaluator.
    """
    pixels, images = ["anomaly_map", "gt_mask"], ["pred_score", "gt_label"]
    return Evaluator(
        [ValidationAUROC("val_pixel_", pixels), ValidationAUROC("val_image_", images)] if curve else [],
        [AUROC(fields=pixels, prefix="pixel_", strict=False), AUROC(fields=images, prefix="image_"), *more],
    )


class Curve(Callback):
    """Notes AUROC at every validation, the time spent on everything else, and what the training logs at its end."""

    def __init__(self) -> None:
        self.start = time.monotonic()
        self.paused = 0.0
        self.logged: dict[str, float] = {}
        self.validation_start = 0.0
        self.points: list[dict[str, float]] = []

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock; the memory bank has been built by now."""
        del trainer, pl_module
        self.validation_start = time.monotonic()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note a point and start the clock again."""
        del pl_module
        if trainer.state.fn != TrainerFn.FITTING:
            return
        metrics = {
            name: float(value)
            for name, value in trainer.callback_metrics.items()
            if name.startswith(("val_", "drawn_"))
        }
        seconds = self.validation_start - self.start - self.paused
        self.points.append({"step": trainer.global_step, "seconds": round(seconds, 1), **metrics})
        self.paused += time.monotonic() - self.validation_start

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note what the epoch has logged."""
        del pl_module
        self.logged = {name: float(value) for name, value in trainer.callback_metrics.items() if name in LOGGED}


def read_data_config(path: Path, root: Path | None, category: str | None) -> dict[str, Any]:
    """Read the configuration of a data module, with another root or category if one is given."""
    config: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    if root is not None:
        config["init_args"]["root"] = str(root)
    if category is not None:
        config["init_args"]["category"] = category
    return config


def make_datamodule(options: argparse.Namespace) -> AnomalibDataModule:
    """Make the data module that the options name."""
    return get_datamodule(read_data_config(options.data, options.root, options.category))


def run(
    options: argparse.Namespace, settings: dict[str, Any], seed: int
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Train and test once.

    Args:
        options (argparse.Namespace): Options of the command line.
        settings (dict[str, Any]): Arguments of ``Pedenet``.
        seed (int): Seed of the run.

    Returns:
        tuple[dict[str, Any], list[dict[str, Any]]]: The run's line, and the lines of its curve.
    """
    seed_everything(seed)
    evaluator = make_evaluator(options.curve)
    model = Pedenet(**{"holdout": options.holdout} | settings, evaluator=evaluator, visualizer=False)
    curve = Curve()
    with tempfile.TemporaryDirectory() as results:
        engine = Engine(
            default_root_dir=results,
            callbacks=[curve],
            logger=False,
            enable_progress_bar=False,
            accelerator=options.accelerator,
            check_val_every_n_epoch=1 if options.curve else 1_000_000,
        )
        datamodule = make_datamodule(options)
        engine.fit(model, datamodule=datamodule)
        seconds = time.monotonic() - curve.start - curve.paused
        steps = engine.trainer.global_step
        result = dict(engine.test(model, datamodule=datamodule, verbose=False)[0])
        if options.holdout > 0:
            engine.trainer.limit_val_batches = 1  # drawn defects do not need the validation images
            result |= engine.validate(model, datamodule=datamodule, verbose=False)[0]
    line = {
        **{name: round(float(result[name]), 4) for name in (*TEST_METRICS, *DRAWN_METRICS) if name in result},
        "steps": steps,
        "seconds": round(seconds, 1),
        "threads": torch.get_num_threads(),
        "position_weight": float(model.model.position_encodings[str(model.model.scored_sizes[0])].weight),
        **{name: round(curve.logged.get(name, float("nan")), 4) for name in LOGGED},
    }
    return line, curve.points


def append(path: Path, rows: list[dict[str, Any]]) -> None:
    """Append lines to a CSV file, with a header if it is new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    is_new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        if is_new:
            writer.writeheader()
        writer.writerows(rows)


def plot(curves: pd.DataFrame, path: Path) -> None:
    """Draw pixel AUROC against seconds of training, a line for each setting, its mean and range over the seeds."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for name, rows in curves.groupby("settings", sort=False):
        points = rows.groupby("step")[["seconds", "val_pixel_AUROC"]].agg(["mean", "min", "max"])
        seconds, auroc = points["seconds"]["mean"], points["val_pixel_AUROC"]
        axes.plot(seconds, auroc["mean"], marker=".", label=name)
        axes.fill_between(seconds, auroc["min"], auroc["max"], alpha=0.2)
    axes.set(xscale="log", xlabel="seconds of training and bank building", ylabel="pixel AUROC")
    set_plain_ticks(axes.xaxis)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    """Run every combination of settings and seeds."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="configuration of a data module, see configs/data")
    parser.add_argument("--root", type=Path, help="root of the data set, instead of the configuration's")
    parser.add_argument("--category", help="category, instead of the configuration's")
    parser.add_argument("--set", type=yaml.safe_load, action="append", help="arguments of Pedenet, YAML; repeatable")
    parser.add_argument("--settings", type=Path, help="YAML file of named sets of arguments, in place of --set")
    parser.add_argument("--base", type=yaml.safe_load, default={}, help="arguments for all settings, YAML")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of the trainings (default: 0)")
    parser.add_argument("--holdout", type=float, default=0.0, help="part of the normal images to hold back")
    parser.add_argument("--accelerator", default="auto", help="as of the trainer: cpu, gpu, auto")
    parser.add_argument("--output", default="train", help="path of the CSV files, without ending")
    parser.add_argument("--curve", action="store_true", help="validate after each epoch")
    parser.add_argument("--plot", action="store_true", help="draw the curves as <output>.png (implies --curve)")
    options = parser.parse_args()
    options.curve |= options.plot

    sets = {str(arguments): arguments for arguments in options.set or [{}]}
    if options.settings is not None:
        sets = yaml.safe_load(options.settings.read_text(encoding="utf-8"))
    runs, curves = Path(f"{options.output}.csv"), Path(f"{options.output}_curve.csv")
    for name, arguments in sets.items():
        for seed in options.seeds:
            label = {"data": options.category or options.data.stem, "settings": name, "seed": seed}
            done = pd.read_csv(runs).filter(label).to_dict("records") if runs.exists() else []
            if label in done:
                continue
            line, points = run(options, options.base | arguments, seed)
            if points:
                append(curves, [{**label, **point} for point in points])
            append(runs, [{**label, **line}])
            print({**label, **line}, flush=True)
    if options.holdout > 0:
        for data, rows in pd.read_csv(runs).groupby("data"):
            correlation = rows["drawn_pixel_AUROC"].corr(rows["pixel_AUROC"], method="spearman")
            print(f"{data}: rank correlation {correlation:.3f} over {len(rows)} runs")
    if options.plot:
        plot(pd.read_csv(curves), Path(f"{options.output}.png"))


if __name__ == "__main__":
    main()
