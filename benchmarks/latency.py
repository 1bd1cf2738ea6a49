# Copyright (C) 2026 The anomalib-pedenet authors
# SPDX-License-Identifier: Apache-2.0

"""How fast Pedenet is where it is deployed: by stride, runtime and precision, beside other models, in one run.

Pedenet and its peers (PatchCore, PaDiM, EfficientAd-S: anomalib's, with their defaults) take the same routes: torch,
eager and compiled, ONNX Runtime, and OpenVINO in float32, with half-precision weights, and quantised after training
(INT8); each in float32 arithmetic and, where it is another, in OpenVINO's own choice. Everything is exported by
anomalib for that very batch and image size, and holds pre- and post-processing. A time is that from images to results,
both in the host's memory. All rows of a batch size take turns, so that what else the machine does meets all alike. A
turn is a pause, in which threads that wait for work fall asleep, a call that is not timed, and one that is.

Weights decide nothing about time, so models are as initialised, banks and Gaussians are drawn, and nothing is
downloaded or trained. ``--checkpoint`` takes a trained Pedenet instead, and ``--data`` then also measures the AUROC of
every row of Pedenet that takes one image at a time.

A line for each row is appended to ``<output>.csv``:

- ``ms`` for an image: the median, and the quartiles ``ms_low`` and ``ms_high``; ``images_per_second``, by the median.
- ``peak_mib``: the most memory that a process takes which does nothing but load and run the row (see
  :mod:`runtimes`; not for torch.compile, whose compilation takes more), and ``bytes`` of the export's files.
- ``map_error``: largest difference of the anomaly maps from eager float32's, as a fraction of those maps' range. It is
  the check that a row computes what it should, not a measure of quality: drawn banks are far from normal images.
- ``of_matrix_product``, for Pedenet: its operations (two for each multiply-add) per second, as a fraction of those of
  a 4096x4096 product in the same precision on the same machine (``matrix_tflops``). Not given for INT8, which is mixed.

``<output>.md`` has them as a table, and ``<output>.png`` draws time against stride, and time against size. What cannot
be measured is left out, with a line that says why. ``--profile`` prints where OpenVINO's time goes in Pedenet.

Example:
    ``python benchmarks/latency.py --threads 2 --checkpoint model.ckpt --data configs/data/mvtec_ad.yaml``
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import runtimes
import torch
from anomalib.data import AnomalibDataModule, Folder
from anomalib.deploy import CompressionType
from anomalib.models import AnomalibModule, EfficientAd, Padim, Patchcore, Pedenet
from lightning.pytorch import seed_everything
from lightning_utilities.core.imports import module_available
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from report import markdown, set_plain_ticks
from scorers import timed
from sklearn.metrics import roc_auc_score
from step import matrix_throughput, processor_name
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms.v2.functional import InterpolationMode, resize
from train import append, make_datamodule

from anomalib_pedenet.scorers.nearest_neighbor import TILE_ROWS

PEDENET, PATCHCORE, PADIM, EFFICIENT_AD = "Pedenet", "PatchCore", "PaDiM", "EfficientAd-S"
MODELS = (PEDENET, PATCHCORE, PADIM, EFFICIENT_AD)


class Route(NamedTuple):
    """A way from a model to its results.

    Attributes:
        artefact (str): What is exported: ``"torch"``, ``"onnx"``, or for OpenVINO ``"FP32"``, ``"FP16"`` or ``"INT8"``.
        runtime (str): Of :data:`runtimes.LOADERS`.
        options (dict[str, Any]): Arguments of that loader.
    """

    artefact: str
    runtime: str
    options: dict[str, Any]


ROUTES = {
    "torch eager": Route("torch", "torch", {}),
    "torch.compile": Route("torch", "torch", {"compiled": True}),
    "ONNX Runtime": Route("onnx", "onnx", {}),
    **{
        f"OpenVINO {artefact}, {precision}": Route(artefact, "openvino", {"precision": precision})
        for artefact in ("FP32", "FP16", "INT8")
        for precision in ("f32", "default")
    },
    "torch eager, GPU": Route("torch", "torch", {"device": "cuda"}),
    "torch.compile, GPU": Route("torch", "torch", {"compiled": True, "device": "cuda"}),
}
COMPRESSIONS = {"FP32": None, "FP16": CompressionType.FP16, "INT8": CompressionType.INT8_PTQ}
COLORS = {name: f"C{index}" if index < 10 else "black" for index, name in enumerate(ROUTES)}
MARKERS = dict(zip(ROUTES, "ovsPX^<>Dd*", strict=True))

# As many as fill Pedenet's bank at 256x256 twice over.
_IMAGES = 32
_PAUSE = 0.02  # seconds; OpenMP's and ONNX Runtime's threads wait in a loop for some milliseconds


class Row(NamedTuple):
    """A model by one route.

    Attributes:
        model (str): Its name.
        stride (int | None): Pedenet's stride.
        route (str): Of :data:`ROUTES`.
        path (Path): The export's file, in a folder of its own.
        images (np.ndarray): What it is measured with, ``[B, 3, H, W]``.
        expected (np.ndarray): The eager model's anomaly maps of them, ``[B, 1, H, W]``.
        operations (float | None): Floating-point operations for them, of Pedenet.
        bank_rows (set[int]): Numbers of rows of Pedenet's banks that are searched at once.
    """

    model: str
    stride: int | None
    route: str
    path: Path
    images: np.ndarray
    expected: np.ndarray
    operations: float | None
    bank_rows: set[int]

    @property
    def label(self) -> str:
        """Name of the model, with the stride."""
        return label_of(self.model, self.stride)

    def load(self, threads: int) -> runtimes.Run:
        """Load it in its runtime."""
        route = ROUTES[self.route]
        return runtimes.LOADERS[route.runtime](self.path, threads, **route.options)


def attempt(name: str, function: Callable[[], Any]) -> Any:  # noqa: ANN401 - what the function returns
    """Return what a function does, or ``None`` if it fails, and say why."""
    try:
        return function()
    except Exception as error:  # noqa: BLE001 - exporters and runtimes raise what they like
        reason = " ".join(str(error).split())[:300]
        print(f"left out: {name} ({type(error).__name__}: {reason})", flush=True)
        return None


def choose_possible(names: Sequence[str]) -> list[str]:
    """Return those routes that this machine has, and say which it has not."""
    missing = {
        runtime: f"{runtime} is not installed"
        for runtime in ("onnx", "onnxscript", "onnxruntime", "openvino", "nncf")
        if not module_available(runtime)
    }
    reasons: dict[str, str] = {}
    for name in names:
        artefact, runtime, options = ROUTES[name]
        needed = {"onnx": ["onnx", "onnxscript", "onnxruntime"], "openvino": ["onnx", "onnxscript", "openvino"]}
        needed["openvino"] += ["nncf"] * (artefact == "INT8")
        for library in needed.get(runtime, []):
            if library in missing:
                reasons[name] = missing[library]
        if options.get("device") == "cuda" and not torch.cuda.is_available():
            reasons[name] = "there is no GPU that torch can use"
        elif options.get("compiled"):
            device = options.get("device", "cpu")
            try:
                torch.compile(lambda values: values + 1)(torch.zeros(8, device=device))
            except Exception as error:  # noqa: BLE001 - whatever the compiler or its absence raises
                reasons[name] = f"torch.compile does not work here ({type(error).__name__})"
        elif options.get("precision") == "default" and name not in reasons and default_dtype() == torch.float32:
            reasons[name] = "OpenVINO's own choice is float32 on this processor"
    for reason in dict.fromkeys(reasons.values()):
        print(f"left out, since {reason}: {'; '.join(name for name in reasons if reasons[name] == reason)}", flush=True)
    return [name for name in names if name not in reasons]


def default_dtype() -> torch.dtype:
    """Return the type in which OpenVINO computes on this processor if nothing is asked for."""
    import openvino

    name = openvino.Core().get_property("CPU", "INFERENCE_PRECISION_HINT").to_string()
    return {"bf16": torch.bfloat16, "f16": torch.float16}.get(name, torch.float32)


# ------------------------------------------------------------------------------------------------------------- models


def write_images(options: argparse.Namespace, folder: Path) -> tuple[torch.Tensor, AnomalibDataModule]:
    """Write images in the size that is measured: drawn ones, or those that the checkpoint's data module trains with.

    Returns:
        tuple[torch.Tensor, AnomalibDataModule]: The images ``[N, 3, H, W]`` in 0..1, and a data module of half of them
            to train and half to validate with, for a quantisation that is calibrated.
    """
    if options.data is None:
        generator = torch.Generator().manual_seed(1)
        images = draw_images(options.images, options.image_size, generator)
    else:
        data = make_datamodule(options)
        data.setup()
        chosen = torch.linspace(0, len(data.train_data) - 1, options.images).long().tolist()
        images = torch.stack([fit_size(data.train_data[index].image, options.image_size) for index in chosen])
    for index, image in enumerate((255 * images).round().byte()):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{index:03}.png")
    datamodule = Folder(
        name="images",
        normal_dir=folder.resolve(),
        test_split_mode="none",
        val_split_mode="from_train",
        val_split_ratio=0.5,
        num_workers=0,
        seed=0,
    )
    return images, datamodule


def choose_measured(options: argparse.Namespace, test_data: AnomalibDataModule | None) -> torch.Tensor:
    """Return the images ``[N, 3, H, W]`` to measure with: others than those in a bank, which have a distance of 0."""
    count = max(2, *options.batches)
    if test_data is None:
        return draw_images(count, options.image_size, torch.Generator().manual_seed(0))
    chosen = torch.linspace(0, len(test_data.test_data) - 1, count).long().tolist()
    return torch.stack([fit_size(test_data.test_data[index].image, options.image_size) for index in chosen])


def draw_images(count: int, size: Sequence[int], generator: torch.Generator) -> torch.Tensor:
    """Draw images ``[N, 3, H, W]`` in 0..1 of soft blots, and a little noise."""
    blots = resize(torch.rand(count, 3, *(side // 16 for side in size), generator=generator), list(size))
    return (blots + 0.05 * torch.randn(blots.shape, generator=generator)).clamp(0, 1)


def fit_size(image: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """Resize an image ``[3, H, W]`` in 0..1 as models' pre-processors do."""
    return resize(image, list(size), antialias=True).clamp(0, 1)


@torch.no_grad()
def make_models(
    options: argparse.Namespace, images: torch.Tensor, others: torch.Tensor
) -> Iterator[tuple[str, int | None, AnomalibModule]]:
    """Make one model after the other, each ready to score and to be exported.

    Args:
        options (argparse.Namespace): Options of the command line.
        images (torch.Tensor): Images ``[N, 3, H, W]`` in 0..1, for Pedenet's bank.
        others (torch.Tensor): Others ``[M, 3, H, W]``, whose scores set the thresholds of models that have none.

    Yields:
        tuple[str, int | None, AnomalibModule]: Its name, the stride (of Pedenet), and the model.
    """
    for name in options.models:
        seed_everything(0, verbose=False)
        if name == PEDENET:
            pedenet = make_pedenet(options, images, others)
            for stride in options.strides:
                pedenet.model.stride = stride
                yield name, stride, pedenet
        else:
            yield name, None, make_peer(name, options, others)


def make_pedenet(options: argparse.Namespace, images: torch.Tensor, others: torch.Tensor) -> Pedenet:
    """Load the checkpoint, or make a model as initialised, both scales at weight 1, with a bank of the images."""
    if options.checkpoint is not None:
        return Pedenet.load_from_checkpoint(options.checkpoint, map_location="cpu").eval()
    model = Pedenet(image_size=options.image_size, evaluator=False, visualizer=False).eval()
    batches = model.pre_processor(images).split(8)
    stride = model.hparams.bank_stride
    model.model.fit_standardization(torch.cat(batches))
    model.model.calibrate(torch.cat(batches), stride)
    model.model.fit(batches, stride)
    set_thresholds(model, others)
    return model


def make_peer(name: str, options: argparse.Namespace, others: torch.Tensor) -> AnomalibModule:
    """Make one of anomalib's models with its defaults, without weights, its state drawn at random."""
    height, width = options.image_size
    if name == PATCHCORE:
        model = Patchcore(pre_trained=False, pre_processor=Patchcore.configure_pre_processor(options.image_size))
        features = model.model.feature_extractor(torch.zeros(1, 3, height, width))
        channels = sum(features[layer].shape[1] for layer in model.model.layers)
        num_patches = options.bank_images * features[model.model.layers[0]][0, 0].numel()
        # anomalib's KCenterGreedy rounds down, too.
        model.model.memory_bank = torch.randn(int(num_patches * model.coreset_sampling_ratio), channels)
    elif name == PADIM:
        model = Padim(pre_trained=False, pre_processor=Padim.configure_pre_processor(options.image_size))
        features = model.model.feature_extractor(torch.zeros(1, 3, height, width))
        num_patches, channels = features[model.model.layers[0]][0, 0].numel(), model.model.n_features
        model.model.gaussian.mean = torch.randn(channels, num_patches)
        model.model.gaussian.inv_covariance = torch.eye(channels) + 0.01 * torch.rand(num_patches, channels, channels)
    else:
        model = EfficientAd(pre_processor=EfficientAd.configure_pre_processor(options.image_size))
        model.model.mean_std["std"].fill_(1)  # 0 says that they were not measured
        for quantile in ("qb_st", "qb_ae"):
            model.model.quantiles[quantile].fill_(1)
    for module in model.modules():
        # timm starts the last normalisation of a block with 0, which a compiler might take for no block at all.
        if isinstance(module, torch.nn.BatchNorm2d) and not module.weight.any():
            module.weight.fill_(0.25)
    set_thresholds(model.eval(), others)
    return model


def set_thresholds(model: AnomalibModule, images: torch.Tensor) -> None:
    """Give the post-processor the range of some scores and the middle of it, as a validation would."""
    results = model.model(model.pre_processor(images))
    state = model.post_processor.state_dict()
    for kind, scores in (("image", results.pred_score), ("pixel", results.anomaly_map)):
        state |= {f"{kind}_min": scores.min(), f"{kind}_max": scores.max(), f"_{kind}_threshold": scores.median()}
    model.post_processor.load_state_dict(state)


# ------------------------------------------------------------------------------------------------------------ exports


def export(
    model: AnomalibModule, artefact: str, folder: Path, shape: Sequence[int], datamodule: AnomalibDataModule
) -> Path:
    """Export a model for images of one shape ``[B, 3, H, W]`` and return the file."""
    size = (shape[2], shape[3])
    if artefact == "torch":
        return model.to_torch(folder)
    # Static shapes: with a dynamic batch, anomalib's PatchCore is exported for a batch of 2.
    onnx_arguments = {"dynamic_shapes": ({0: shape[0]},), "verbose": False}
    if artefact == "onnx":
        return model.to_onnx(folder, input_size=size, **onnx_arguments)
    datamodule.train_batch_size = datamodule.eval_batch_size = shape[0]
    return model.to_openvino(
        folder,
        input_size=size,
        compression_type=COMPRESSIONS[artefact],
        datamodule=datamodule,
        onnx_kwargs=onnx_arguments,
    )


def make_rows(
    options: argparse.Namespace,
    routes: Sequence[str],
    images: torch.Tensor,
    measured: torch.Tensor,
    datamodule: AnomalibDataModule,
    folder: Path,
    batch: int,
) -> Iterator[Row]:
    """Make every model with images ``[N, 3, H, W]`` and export it for a batch of others ``[M, 3, H, W]``."""
    models = make_models(options, images, measured)
    measured = measured[:batch]
    for name, stride, model in models:
        label = label_of(name, stride)
        with FlopCounterMode(display=False) as counter, torch.inference_mode():
            expected = model(measured).anomaly_map.numpy()
        operations = float(counter.get_total_flops()) if name == PEDENET else None
        banks = [value for key, value in model.named_buffers() if key.endswith(".rows")]
        bank_rows = {len(rows) for bank in banks for rows in bank.split(TILE_ROWS)}
        paths: dict[str, Path | None] = {}
        for route in routes:
            artefact = ROUTES[route].artefact
            if artefact not in paths:
                root = folder / f"{label}, {artefact}"
                root.mkdir()
                make = partial(export, model, artefact, root, measured.shape, datamodule)
                paths[artefact] = attempt(f"{label}, batch {len(measured)}, {artefact}", make)
            path = paths[artefact]
            if path is not None:
                yield Row(name, stride, route, path, measured.numpy(), expected, operations, bank_rows)


# ----------------------------------------------------------------------------------------------------------- measures


def load_and_check(row: Row, threads: int) -> tuple[runtimes.Run, float]:
    """Return a row's loaded model, and its ``map_error``."""
    run = row.load(threads)
    result = run(row.images)["anomaly_map"].reshape(row.expected.shape)
    return run, float(np.abs(result - row.expected).max() / (np.ptp(row.expected) or 1.0))


def measure(options: argparse.Namespace, rows: Sequence[Row]) -> Iterator[tuple[Row, runtimes.Run, dict[str, Any]]]:
    """Time rows in turns, those of one route after those of another: all at once would not fit into memory.

    Yields:
        tuple[Row, runtimes.Run, dict[str, Any]]: A row that could be run, its loaded model, and its figures.
    """
    for route in dict.fromkeys(row.route for row in rows):
        runs: list[tuple[Row, runtimes.Run, float]] = []
        for row in rows:
            if row.route == route:
                load = partial(load_and_check, row, options.threads)
                loaded = attempt(f"{row.label}, batch {len(row.images)}, {route}", load)
                if loaded is not None:
                    runs.append((row, *loaded))
        seconds = time_in_turns(options, [partial(run, row.images) for row, run, _ in runs])
        for (row, run, error), spent in zip(runs, seconds, strict=True):
            milliseconds = 1e3 * pd.Series(spent) / len(row.images)
            low, median, high = milliseconds.quantile([0.25, 0.5, 0.75])
            figures = {
                "ms": round(median, 3),
                "ms_low": round(low, 3),
                "ms_high": round(high, 3),
                "images_per_second": round(1e3 / median, 2),
                "repetitions": len(spent),
                "map_error": round(error, 6),
            }
            yield row, run, figures


def time_in_turns(options: argparse.Namespace, functions: Sequence[Callable[[], Any]]) -> list[list[float]]:
    """Return the seconds of each call of some functions, called in turns."""
    seconds: list[list[float]] = [[] for _ in functions]
    for _ in range(options.rounds):
        for function, spent in zip(functions, seconds, strict=True):
            if sum(spent) < options.seconds:
                time.sleep(_PAUSE)
                function()
                spent.append(timed(function, torch.device("cpu"))[0])
    return seconds


def peak_mib(row: Row, threads: int) -> float | None:
    """Return the MiB that a fresh process takes to load and run a row.

    ``None`` where nothing tells (not Linux), and where a model is compiled as it is loaded: that takes more memory than
    running it, and minutes.
    """
    route = ROUTES[row.route]
    if not Path("/proc/self/status").exists() or route.options.get("compiled"):
        return None
    command = [sys.executable, runtimes.__file__, str(row.path), "--runtime", route.runtime]
    command += ["--options", json.dumps(route.options), "--threads", str(threads)]
    command += ["--shape", *map(str, row.images.shape)]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return round(int(printed.split()[-1]) / 2**20, 1)


def measure_auroc(run: runtimes.Run, datamodule: AnomalibDataModule, size: Sequence[int]) -> dict[str, float]:
    """Return pixel and image AUROC of all test images, whose masks are resized to the maps' size."""
    maps, masks, scores, labels = [], [], [], []
    for item in datamodule.test_data:
        results = run(fit_size(item.image, size)[None].numpy())
        maps.append(results["anomaly_map"].reshape(-1))
        scores.append(results["pred_score"].item())
        labels.append(bool(item.gt_label))
        mask = torch.zeros(1, *size) if item.gt_mask is None else item.gt_mask.reshape(1, *item.gt_mask.shape[-2:])
        masks.append(resize(mask.float(), list(size), InterpolationMode.NEAREST).numpy().reshape(-1) > 0)
    return {
        "pixel_AUROC": round(roc_auc_score(np.concatenate(masks), np.concatenate(maps)), 4),
        "image_AUROC": round(roc_auc_score(labels, scores), 4),
    }


class Machine:
    """What is true of the machine, and how fast it multiplies matrices."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self._throughput: dict[tuple[str, torch.dtype], float] = {}

    def describe(self, route: str) -> dict[str, Any]:
        """Return the hardware of a route, and the versions of what it uses."""
        on_gpu = ROUTES[route].options.get("device") == "cuda"
        runtime = {"onnx": "onnxruntime"}.get(ROUTES[route].runtime, ROUTES[route].runtime)
        hardware = torch.cuda.get_device_name() if on_gpu else processor_name()
        version = sys.modules[runtime].__version__.split("-")[0]
        return {"hardware": hardware, "threads": self.threads, "runtime": f"{runtime} {version}"}

    def matrix_tflops(self, route: str) -> float | None:
        """Return the throughput of a matrix product in a route's precision; ``None`` for INT8, which is mixed."""
        artefact, _, options = ROUTES[route]
        if artefact == "INT8":
            return None
        dtype = default_dtype() if options.get("precision") == "default" else torch.float32
        device = options.get("device", "cpu")
        if (device, dtype) not in self._throughput:
            self._throughput[device, dtype] = matrix_throughput(dtype, torch.device(device)) / 1e12
        return round(self._throughput[device, dtype], 4)


def describe(row: Row, figures: dict[str, Any], machine: Machine, options: argparse.Namespace) -> dict[str, Any]:
    """Return a row's line."""
    tflops = machine.matrix_tflops(row.route)
    fraction = None
    if tflops is not None and row.operations is not None:
        fraction = round(row.operations / len(row.images) / figures["ms"] / 1e9 / tflops, 4)
    memory = attempt(f"memory of {row.label}, {row.route}", partial(peak_mib, row, options.threads))
    return {
        "model": row.model,
        "stride": row.stride,
        "route": row.route,
        "batch": len(row.images),
        "image_size": "x".join(map(str, row.images.shape[2:])),
        **figures,
        "peak_mib": memory,
        "bytes": sum(file.stat().st_size for file in row.path.parent.iterdir()),
        "of_matrix_product": fraction,
        "matrix_tflops": tflops,
        "pixel_AUROC": figures.get("pixel_AUROC"),
        "image_AUROC": figures.get("image_AUROC"),
        **machine.describe(row.route),
    }


# ------------------------------------------------------------------------------------------------------------ profile


KINDS = ("pre-processing", "convolutions", "between", "kNN product", "maximum", "map", "post-processing")
"""``between``: poolings, projections, positions, changes of layout and of type."""


def profile(row: Row, threads: int, repetitions: int = 10) -> dict[str, float]:
    """Return the milliseconds for an image that OpenVINO spends on each kind of work in a row of Pedenet.

    Nodes are told by type, by their place in execution, and the search by a side as long as part of a bank.
    """
    import openvino

    config = runtimes.openvino_config(threads, ROUTES[row.route].options["precision"]) | {"PERF_COUNT": True}
    compiled = openvino.Core().compile_model(row.path, "CPU", config)
    last_sides = {}
    for node in compiled.get_runtime_model().get_ops():
        shapes = [port.get_partial_shape() for port in (*node.inputs(), *node.outputs())]
        last_sides[node.get_friendly_name()] = {shape[-1].get_length() for shape in shapes if len(shape) > 1}
    request = compiled.create_infer_request()
    request.infer([row.images])
    kinds: dict[str, float] = dict.fromkeys(KINDS, 0.0)
    for _ in range(repetitions):
        request.infer([row.images])
        nodes = [node for node in request.get_profiling_info() if node.real_time.total_seconds() > 0]
        convolutions = [index for index, node in enumerate(nodes) if node.node_type == "Convolution"]
        products = [index for index, node in enumerate(nodes) if node.node_type in {"FullyConnected", "MatMul"}]
        for index, node in enumerate(nodes):
            is_search = bool(last_sides.get(node.node_name, set()) & row.bank_rows)
            if index in convolutions:
                kind = "convolutions"
            elif index in products:
                kind = "kNN product" if is_search else "map"
            elif is_search and node.node_type == "ReduceMax":
                kind = "maximum"
            elif index < convolutions[0]:
                kind = "pre-processing"
            else:
                kind = "post-processing" if index > products[-1] else "between"
            kinds[kind] += 1e3 * node.real_time.total_seconds() / repetitions / len(row.images)
    return {kind: round(milliseconds, 3) for kind, milliseconds in kinds.items()}


def print_profiles(rows: Sequence[Row], threads: int) -> None:
    """Print where OpenVINO's time goes in rows of Pedenet."""
    table = {f"{row.label}, {row.route}": profile(row, threads) for row in rows}
    if table:
        print(f"ms per image by kind of work, batch {len(rows[0].images)}, as OpenVINO counts them:")
        print(pd.DataFrame(table).T.to_string(float_format="{:.2f}".format), flush=True)


# ----------------------------------------------------------------------------------------------------------- pictures


def write_table(table: pd.DataFrame, path: Path) -> None:
    """Write the figures as Markdown."""
    machines = table[["hardware", "threads", "runtime"]].drop_duplicates().astype(str)
    hardware = "; ".join(dict.fromkeys(f"{row.hardware}, {row.threads} threads" for row in machines.itertuples()))
    sizes = ", ".join(table["image_size"].unique())
    versions = ", ".join(machines["runtime"].unique())
    lines = [f"Images of {sizes}. {hardware}. {versions}. Written by `make bench-latency`."]
    for batch, rows in table.groupby("batch"):
        columns = {
            "route": rows["route"],
            "ms per image": [f"{row.ms:.1f} ({row.ms_low:.1f} to {row.ms_high:.1f})" for row in rows.itertuples()],
            "images/s": rows["images_per_second"].map("{:.1f}".format),
            "peak memory, MiB": rows["peak_mib"].map(partial(number, form="{:.0f}")),
            "export, MB": (rows["bytes"] / 1e6).map("{:.1f}".format),
            "of a matrix product": rows["of_matrix_product"].map(partial(number, form="{:.0%}")),
            "pixel AUROC": rows["pixel_AUROC"].map(partial(number, form="{:.4f}")),
            "image AUROC": rows["image_AUROC"].map(partial(number, form="{:.4f}")),
        }
        labels = [label_of(row.model, row.stride) for row in rows.itertuples()]
        text = pd.DataFrame(columns).set_axis(pd.Index(labels, name="model"))
        lines += [f"## Batch {batch}", "Median, and quartiles.", markdown(text.loc[:, (text != "").any()])]
    path.write_text("\n\n".join(lines) + "\n", encoding="utf-8")


def number(value: float | None, form: str) -> str:
    """Return a figure as text, nothing for none."""
    return "" if pd.isna(value) else form.format(value)


def label_of(model: str, stride: float | None) -> str:
    """Return the name of a model, with its stride if it has one."""
    return model if pd.isna(stride) else f"{model}, stride {stride:.0f}"


def plot(table: pd.DataFrame, path: Path) -> None:
    """Draw time against stride with AUROC, and time against size; a row of panels for each batch size."""
    batches = sorted(table["batch"].unique())
    figure = Figure(figsize=(16, 5.2 * len(batches)), layout="constrained")
    for (left, right), batch in zip(figure.subplots(len(batches), 2, squeeze=False), batches, strict=True):
        rows = table[table["batch"] == batch]
        pedenet = rows[rows["model"] == PEDENET]
        if len(pedenet):
            plot_strides(pedenet, left)
        plot_sizes(rows, right)
        for axes in (left, right):
            axes.set(yscale="log", ylabel=f"ms per image, batch {batch}")
            axes.grid(alpha=0.3, which="both")
            set_plain_ticks(axes.yaxis)
        set_plain_ticks(right.xaxis)
    figure.savefig(path, dpi=110)


def plot_strides(rows: pd.DataFrame, axes: Axes) -> None:
    """Draw Pedenet's time against its stride, a line for each route, and pixel AUROC where it is known."""
    accuracy = axes.twinx() if rows["pixel_AUROC"].notna().any() else None
    for route, points in rows.sort_values("stride").groupby("route", sort=False):
        style: dict[str, Any] = {"color": COLORS[route], "marker": MARKERS[route], "markersize": 5}
        axes.plot(points["stride"], points["ms"], label=route, **style)
        axes.fill_between(points["stride"], points["ms_low"], points["ms_high"], color=COLORS[route], alpha=0.15)
        if accuracy is not None:
            accuracy.plot(points["stride"], points["pixel_AUROC"], linestyle=":", fillstyle="none", lw=1, **style)
    strides = sorted(rows["stride"].unique())
    axes.set_xscale("log", base=2)
    axes.set_xticks(strides, [f"{stride:.0f}" for stride in strides])
    axes.set(title="Pedenet", xlabel="stride, pixels")
    if accuracy is not None:
        # Up to 1, with as much below the lowest as above: what differs by a thousandth looks as small as it is.
        lowest = rows["pixel_AUROC"].min()
        accuracy.set(ylabel="pixel AUROC (dotted)", ylim=(2 * lowest - 1, 1))
    axes.legend(loc="upper left", bbox_to_anchor=(1.22 if accuracy is not None else 1.02, 1), fontsize=8)


def plot_sizes(rows: pd.DataFrame, axes: Axes) -> None:
    """Draw time against the export's size: colours are models, markers routes."""
    labels = [label_of(row.model, row.stride) for row in rows.itertuples()]
    names = list(dict.fromkeys(labels))
    for row, label in zip(rows.itertuples(), labels, strict=True):
        axes.plot(row.bytes / 1e6, row.ms, MARKERS[row.route], color=f"C{names.index(label)}", markersize=7, alpha=0.8)
    axes.set(xscale="log", title="All models", xlabel="size of the export, MB")
    handles = [axes.plot([], [], "s", color=f"C{index}", label=name)[0] for index, name in enumerate(names)]
    routes = [name for name in ROUTES if name in set(rows["route"])]
    handles += [axes.plot([], [], MARKERS[name], color="grey", label=name)[0] for name in routes]
    axes.legend(handles=handles, loc="upper left", bbox_to_anchor=(1.02, 1), fontsize=8)


# --------------------------------------------------------------------------------------------------------------- main


def parse_arguments() -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n", maxsplit=1)[0])
    parser.add_argument("--models", nargs="+", default=MODELS, choices=MODELS, metavar="NAME", help=", ".join(MODELS))
    parser.add_argument("--routes", nargs="+", default=ROUTES, choices=ROUTES, metavar="NAME", help="; ".join(ROUTES))
    parser.add_argument("--strides", type=int, nargs="+", default=[2, 4, 8, 16], help="of Pedenet")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8], help="batch sizes")
    parser.add_argument(
        "--image_size", type=int, nargs=2, help="height and width (default: 256 256, or the checkpoint's)"
    )
    parser.add_argument("--checkpoint", type=Path, help="trained Pedenet")
    parser.add_argument("--data", type=Path, help="configuration of a data module, see configs/data, to measure AUROC")
    parser.add_argument("--root", type=Path, help="root of the data set, instead of the configuration's")
    parser.add_argument("--category", help="category, instead of the configuration's")
    parser.add_argument(
        "--bank_images", type=int, default=209, help="images of PatchCore's bank (default: bottle's 209)"
    )
    parser.add_argument(
        "--images",
        type=int,
        default=_IMAGES,
        help="for Pedenet's bank and to calibrate INT8 (default: %(default)s)",
    )
    parser.add_argument("--rounds", type=int, default=30, help="repetitions (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=30.0, help="no more repetitions of a row after that")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: %(default)s")
    parser.add_argument("--profile", action="store_true", help="say where OpenVINO's time goes in Pedenet")
    parser.add_argument("--output", default="runs/latency", help="path of the CSV, table and picture, without ending")
    options = parser.parse_args()
    if options.rounds < 1 or options.seconds <= 0:
        parser.error("--rounds must be at least 1, and --seconds above 0")
    if options.images < 2 * max(options.batches):
        parser.error(f"--images must be at least twice the largest batch, {2 * max(options.batches)}")
    if options.data is not None and options.checkpoint is None:
        parser.error("--data measures AUROC, which needs a trained model: give its --checkpoint")
    if options.checkpoint is not None:
        trained = tuple(Pedenet.load_from_checkpoint(options.checkpoint, map_location="cpu").hparams.image_size)
        if options.image_size is not None and tuple(options.image_size) != trained:
            parser.error(f"--image_size is {options.image_size}, but the checkpoint was trained with {trained}")
        options.image_size = trained
    options.image_size = tuple(options.image_size or (256, 256))
    return options


def main() -> None:
    """Measure every row."""
    options = parse_arguments()
    torch.set_num_threads(options.threads)
    machine = Machine(options.threads)
    routes = choose_possible(options.routes)
    test_data = None
    if options.data is not None:
        test_data = make_datamodule(options)
        test_data.setup()
    table: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "images").mkdir()
        images, datamodule = write_images(options, folder / "images")
        measured = choose_measured(options, test_data)
        for batch in options.batches:
            exports = folder / f"batch {batch}"
            exports.mkdir()
            rows = list(make_rows(options, routes, images, measured, datamodule, exports, batch))
            lines: dict[int, dict[str, Any]] = {}
            profiled = []
            for row, run, timings in measure(options, rows):
                figures = dict(timings)
                if test_data is not None and row.model == PEDENET and batch == 1:
                    figures |= measure_auroc(run, test_data, options.image_size)
                if row.model == PEDENET and ROUTES[row.route].runtime == "openvino":
                    profiled.append(row)
                line = describe(row, figures, machine, options)
                lines[rows.index(row)] = line
                print({name: value for name, value in line.items() if not pd.isna(value)}, flush=True)
            if options.profile:
                print_profiles(profiled, options.threads)
            if lines:
                ordered = [line for _, line in sorted(lines.items())]  # model by model, as the rows
                append(Path(f"{options.output}.csv"), ordered)
                table += ordered
                write_table(pd.DataFrame(table), Path(f"{options.output}.md"))
                plot(pd.DataFrame(table), Path(f"{options.output}.png"))
            shutil.rmtree(exports)


if __name__ == "__main__":
    main()
