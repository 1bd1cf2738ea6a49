# Copyright (C) 2026 The anomalib-pedenet authors
# SPDX-License-Identifier: Apache-2.0

"""Trainings and tests of methods on data sets: what they are, one of them, and many in processes of their own.

A finished run leaves ``<folder>/runs/<set>-<method>-<seed>``: a row (``.json``), a checkpoint (``.ckpt``) and some maps
(``.npz``). The row has a fingerprint of the settings, by which a run that is finished is known.
"""

import hashlib
import inspect
import json
import multiprocessing
import os
import platform
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from importlib.metadata import version
from itertools import count, filterfalse, product
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import yaml
from anomalib import models
from anomalib.data import AnomalibDataModule, Batch, get_datamodule
from anomalib.engine import Engine
from anomalib.metrics import AUPRO, AUROC, Evaluator, F1Max
from anomalib.models import AnomalibModule, Pedenet
from common import hardware, read_data, run_name, timed
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.trainer.states import TrainerFn
from peers import DistancePostProcessor, imagenet_pre_processor, load_imagenet_weights, without_weights
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms.v2.functional import resize

from anomalib_pedenet.argument_checks import resolve
from anomalib_pedenet.post_processor import PedenetPostProcessor

METHODS = Path(__file__).with_name("methods.yaml")
_OF_METHODS = ("model", "table", "weights_of", "imagenet", "cost_only", "trainer", "image_size", "note")
_LATENCY_RUNS = 20
_KEPT_MAPS = 6
_PIXELS, _IMAGES = ("anomaly_map", "gt_mask"), ("pred_score", "gt_label")


def read_sets(path: Path) -> dict[str, dict[str, Any]]:
    """Read a YAML file of data sets: ``data``, ``image_size`` and ``kind`` by name, roots relative to the file."""
    sets: dict[str, dict[str, Any]] = yaml.safe_load(path.read_text(encoding="utf-8"))
    for name, entry in sets.items():
        missing = {"data", "image_size"} - set(entry)
        if missing:
            msg = f"The set {name} of {path} has no {' and no '.join(sorted(missing))}."
            raise SystemExit(msg)
        arguments = entry["data"]["init_args"]
        arguments["root"] = str((path.parent / arguments["root"]).resolve())
    return sets


def sets_of(
    path: Path, root: str | None, categories: Sequence[str | None] | None, image_size: Sequence[int]
) -> dict[str, dict[str, Any]]:
    """Return the categories of a data module's configuration, or that which it has, as :func:`read_sets` does."""
    configs = [read_data(path, root, category) for category in (categories or [None])]
    names = [config["init_args"].get("category") or config["init_args"]["name"] for config in configs]
    return {name: {"data": data, "image_size": list(image_size)} for name, data in zip(names, configs, strict=True)}


def read_methods(path: Path) -> dict[str, dict[str, Any]]:
    """Read a YAML file of methods, whose entries ``methods.yaml`` explains, and fill in what they leave out."""
    methods: dict[str, dict[str, Any]] = {}
    for name, given in yaml.safe_load(path.read_text(encoding="utf-8")).items():
        arguments = {key: value for key, value in (given or {}).items() if key not in _OF_METHODS}
        entry = {key: value for key, value in (given or {}).items() if key in _OF_METHODS}
        if "model" in entry and arguments:
            msg = f"The method {name} of {path} has {', '.join(arguments)} beside its model: put that into init_args."
            raise SystemExit(msg)
        methods[name] = {"table": "methods", "model": {"class_path": "Pedenet", "init_args": arguments}, **entry}
    return methods


def choose(what: str, known: Mapping[str, Any], names: Sequence[str] | None, path: Path) -> dict[str, Any]:
    """Return what is named, in that order, or all; leave the program if a name is unknown."""
    unknown = [name for name in names or () if name not in known]
    if unknown:
        msg = f"Unknown {what} {', '.join(unknown)}: {path} has {', '.join(known)}."
        raise SystemExit(msg)
    return {name: known[name] for name in names or known}


def class_of(model: Mapping[str, Any]) -> type[AnomalibModule]:
    """Return the class of a model."""
    return getattr(models, model["class_path"].split(".")[-1])


def arguments_of(model: Mapping[str, Any]) -> dict[str, str]:
    """Return a model's class and all its arguments as they print, defaults included: what a run is measured with."""
    values = {name: parameter.default for name, parameter in inspect.signature(class_of(model)).parameters.items()}
    values.pop("of_recipe", None)
    values = asdict(values.pop("recipe")) | values if "recipe" in values else values
    values |= model.get("init_args", {})
    if "stride" in values:  # what `None` stands for is a default, too
        values = resolve(values)
    return {"class_path": model["class_path"], **{name: repr(value) for name, value in values.items()}}


@dataclass(frozen=True)
class Run:
    """One training and test."""

    key: dict[str, Any]  # category, method, seed, table and fingerprint of the settings
    method: dict[str, Any]
    data_set: dict[str, Any]
    source: str  # name of the file that describes the data set
    folder: Path  # its files go into `runs` there
    accelerator: str  # as of the trainer
    curve: bool  # whether to validate after each epoch

    @property
    def name(self) -> str:
        """Name for people."""
        return f"{self.key['category']}, {self.key['method']}, seed {self.key['seed']}"

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width."""
        return tuple(self.method.get("image_size", self.data_set["image_size"]))

    def path(self, ending: str, method: str | None = None) -> Path:
        """Return one of the run's files, or that of another method's run on the same data."""
        return self.folder / "runs" / f"{run_name({**self.key, 'method': method or self.key['method']})}.{ending}"

    def is_finished(self) -> bool:
        """Return whether there is a row of the same settings, with a curve if one is wanted."""
        if not self.path("json").exists():
            return False
        row = json.loads(self.path("json").read_text(encoding="utf-8"))
        is_trained = not self.method.get("cost_only") and "weights_of" not in self.method
        return row["settings"] == self.key["settings"] and bool(row.get("curve") or not (self.curve and is_trained))


def plan(
    sets: Mapping[str, dict[str, Any]],
    methods: Mapping[str, dict[str, Any]],
    seeds: Sequence[int],
    source: str,
    folder: Path,
    accelerator: str = "cpu",
    curve: bool = False,
) -> list[Run]:
    """Return the runs of all methods on all data sets, seed by seed; see :class:`Run`."""
    runs = []
    for seed, (category, data_set), (name, method) in product(seeds, sets.items(), methods.items()):
        what = [arguments_of(method["model"]), method.get("weights_of"), data_set["data"]["class_path"]]
        what += [data_set["image_size"], method.get("trainer")]
        what += [method["image_size"]] if "image_size" in method else []
        settings = hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:12]
        key = {"category": category, "method": name, "seed": seed, "table": method["table"], "settings": settings}
        runs.append(Run(key, method, data_set, source, folder, accelerator, curve))
    return runs


class ValidationAUROC(AUROC):
    """AUROC of scores of any range: in a validation they are not normalised yet.

    torchmetrics takes the scores of a batch for logits if one is beyond 0..1, and for probabilities if none is, so that
    the batches of a model whose scores lie on both sides of 1 do not compare. Here all are brought into 0..1 in their
    order.
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


def make_evaluator(curve: bool) -> Evaluator:
    """Make an evaluator of the test images, and of validations where a curve is wanted."""
    validation = [ValidationAUROC("val_pixel_", _PIXELS), ValidationAUROC("val_image_", _IMAGES)]
    pixels = [metric(fields=_PIXELS, prefix="pixel_", strict=False) for metric in (AUROC, AUPRO, F1Max)]
    return Evaluator(validation if curve else [], [*pixels, AUROC(fields=_IMAGES, prefix="image_")])


class Curve(Callback):
    """Notes AUROC at every validation, and the seconds that were spent on everything else."""

    def __init__(self) -> None:
        self.start = time.monotonic()
        self.paused = 0.0
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
        found = {name: float(value) for name, value in trainer.callback_metrics.items()}
        metrics = {name: value for name, value in found.items() if name.startswith(("val_", "drawn_"))}
        seconds = self.validation_start - self.start - self.paused
        self.points.append({"step": trainer.global_step, "seconds": round(seconds, 1), **metrics})
        self.paused += time.monotonic() - self.validation_start


def carry_out(run: Run, device: int = 0) -> None:
    """Train, test, measure, and leave the file that says so; ``device`` is the GPU to use, where there is one."""
    seed_everything(run.key["seed"])
    measured: dict[str, Any] = {}
    if run.method.get("cost_only"):
        model = without_weights(class_of(run.method["model"]), run.method["model"].get("init_args", {}))
    else:
        model, measured = train_and_test(run, device)
    row = {
        **run.key,
        **measured,
        **measure_cost(model.cpu(), run.image_size),
        "image_size": "x".join(map(str, run.image_size)),
        "data": run.source,
        "note": run.method.get("note", ""),
        "hardware": hardware(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("anomalib", "anomalib-pedenet", "torch")},
    }
    unfinished = run.path("json.part")
    unfinished.write_text(json.dumps(row, indent=1), encoding="utf-8")
    unfinished.replace(run.path("json"))  # whole, or not there
    figures = {name: value for name, value in measured.items() if name != "curve"}
    print(f"{run.name}: {figures or 'cost only'}", flush=True)


def train_and_test(run: Run, device: int) -> tuple[AnomalibModule, dict[str, Any]]:
    """Train and test a model, keep it and some of its maps, and return it with its metrics and seconds."""
    model, curve = make_model(run), Curve()
    data = {**run.data_set["data"], "init_args": dict(run.data_set["data"]["init_args"])}
    # anomalib's eight workers take half a gigabyte each, and several runs at once then all of the memory.
    data["init_args"].setdefault("num_workers", 0)
    datamodule = get_datamodule(data)
    with tempfile.TemporaryDirectory() as results:
        trainer = {"logger": False, "enable_progress_bar": False, "accelerator": run.accelerator}
        trainer["devices"] = [device] if torch.cuda.is_available() and run.accelerator != "cpu" else 1
        # Without a curve one validation, at the end, for the thresholds.
        trainer["check_val_every_n_epoch"] = 1 if run.curve else 1_000_000
        engine = Engine(default_root_dir=results, callbacks=[curve], **trainer | run.method.get("trainer", {}))
        start = time.monotonic()
        if "weights_of" in run.method:
            model._is_bank_stale = True  # noqa: SLF001 - the way of scoring may have changed with the code
        else:
            engine.fit(model, datamodule=datamodule)
        seconds = time.monotonic() - start - curve.paused
        validated = engine.validate(model, datamodule=datamodule, verbose=False)[0]
        engine.trainer.save_checkpoint(run.path("ckpt"))
        metrics = dict(engine.test(model, datamodule=datamodule, verbose=False)[0])
        metrics |= {name: value for name, value in validated.items() if name.startswith("drawn_")}
        keep_maps(engine, model, datamodule, run.path("npz"))
    return model, {
        **{name: round(float(value), 4) for name, value in metrics.items() if value is not None},
        "train_seconds": round(seconds, 1),
        "curve": curve.points if run.curve else [],
    }


def make_model(run: Run) -> AnomalibModule:
    """Make a run's model, or load the weights that its method takes from another's run."""
    kind = class_of(run.method["model"])
    arguments = {
        **run.method["model"].get("init_args", {}),
        "evaluator": make_evaluator(run.curve),
        "post_processor": PedenetPostProcessor() if kind is Pedenet else DistancePostProcessor(),
        "visualizer": False,
    }
    if "weights_of" in run.method:
        return kind.load_from_checkpoint(run.path("ckpt", run.method["weights_of"]), **arguments)
    if run.method.get("imagenet"):
        model = kind(**arguments, pre_processor=imagenet_pre_processor(run.image_size))
        load_imagenet_weights(model)
        return model
    if "image_size" in inspect.signature(kind).parameters:  # which goes into checkpoints
        return kind(**arguments, image_size=run.image_size)
    return kind(**arguments, pre_processor=kind.configure_pre_processor(run.image_size))


def measure_cost(model: AnomalibModule, image_size: Sequence[int]) -> dict[str, float]:
    """Measure what a trained torch model costs for one pre-processed image on the CPU, after one run to warm up.

    Parameters are counted whether trained or not; bytes are the state's, with memory bank and statistics.
    """
    network, image = model.model.eval(), torch.randn(1, 3, *image_size)
    with torch.no_grad():
        with FlopCounterMode(display=False) as counter:
            network(image)
        seconds = [timed(lambda: network(image), image.device)[0] for _ in range(_LATENCY_RUNS)]
    return {
        "parameters": sum(values.numel() for values in network.parameters()),
        "bytes": sum(values.nbytes for values in network.state_dict().values() if isinstance(values, torch.Tensor)),
        "multiply_adds": counter.get_total_flops() // 2,
        "latency_ms": round(1000 * median(seconds), 2),
    }


def keep_maps(engine: Engine, model: AnomalibModule, datamodule: AnomalibDataModule, path: Path) -> None:
    """Keep the maps of a good image and of one of each kind of defect, for the pictures."""
    data = datamodule.test_data
    kinds = data.samples["image_path"].map(lambda name: Path(name).parent.name)
    subset = torch.utils.data.Subset(data, kinds.drop_duplicates().index[:_KEPT_MAPS].tolist())
    loader = torch.utils.data.DataLoader(subset, batch_size=1, collate_fn=data.collate_fn)
    kept: dict[str, Any] = {}
    for index, batch in enumerate(engine.predict(model, dataloaders=loader, return_predictions=True) or []):
        if batch.anomaly_map is None:  # a model that tells images alone
            return
        shape = batch.anomaly_map.shape[-2:]
        mask = torch.zeros(shape) if batch.gt_mask is None else batch.gt_mask.reshape(shape)
        image = (255 * resize(subset[index].image, list(shape), antialias=True).permute(1, 2, 0)).byte()
        found = {"image": image, "mask": mask.bool(), "map": batch.anomaly_map.reshape(shape).float()}
        found["outline"] = batch.pred_mask.reshape(shape).bool()
        kept |= {f"{name}_{index}": values.numpy() for name, values in found.items()}
    np.savez_compressed(path, **kept)


def run_all(runs: Sequence[Run], at_once: int) -> list[str]:
    """Carry out what is not finished, in processes that share the cores and the GPUs, and return the runs that failed.

    Those that load weights start after all others. What went wrong is printed.
    """
    # Several processes of several threads each on the same cores take several times as long.
    threads = max(1, (os.cpu_count() or 1) // at_once)
    os.environ["OMP_NUM_THREADS"] = str(threads)
    # A process for each run: what a training leaves in memory goes with it.
    context = multiprocessing.get_context("spawn")

    def start(run: Run, index: int) -> str | None:
        process = context.Process(target=_in_process, args=(run, threads, index))
        process.start()
        process.join()
        return run.name if process.exitcode else None

    failed = []
    for loads in (False, True):
        part = [run for run in runs if ("weights_of" in run.method) == loads]
        for run in filter(Run.is_finished, part):
            print(f"{run.name}: finished before", flush=True)
        with ThreadPoolExecutor(at_once) as pool:
            failed += list(pool.map(start, filterfalse(Run.is_finished, part), count()))
    return [name for name in failed if name is not None]


def _in_process(run: Run, threads: int, index: int) -> None:
    torch.set_num_threads(threads)
    carry_out(run, index % max(1, torch.cuda.device_count()))
