# Copyright (C) 2026 The anomalib-pedenet authors
# SPDX-License-Identifier: Apache-2.0

"""How fast Pedenet is where it is deployed: by stride, runtime and precision, beside other models, in one run.

Pedenet and its peers (anomalib's, with their defaults) are exported by anomalib for that very batch and image size, and
run by torch, ONNX Runtime and OpenVINO: in float32, with half-precision weights and INT8, each in float32 arithmetic
and in OpenVINO's own choice, where that is another. A time is that from images to results. Models take turns: a pause,
in which threads that wait for work fall asleep, a call that is not timed, and one that is.

Weights decide nothing about time, so models are as initialised and nothing is downloaded or trained. ``--checkpoint``
takes a trained Pedenet, and ``--data`` then measures the AUROC of its rows that take one image at a time.

``<output>.csv`` has a line for each row. ``ms`` is the median for an image, with quartiles; ``peak_mib`` what a process
takes that only loads and runs the row; ``map_error`` the largest difference of the maps from eager float32's, as a
fraction of their range. What cannot be measured is named.

Example:
    ``python benchmarks/latency.py --threads 2 --checkpoint model.ckpt --data configs/data/mvtec_ad.yaml``
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import runtimes
import torch
from anomalib.data import AnomalibDataModule, Folder
from anomalib.deploy import CompressionType
from anomalib.models import AnomalibModule, Pedenet
from common import (
    add_data_options,
    append,
    leaving_out,
    make_datamodule,
    processor_name,
    quartiles,
    time_in_turns,
)
from lightning.pytorch import seed_everything
from peers import PEERS, random_peer, set_thresholds
from PIL import Image
from sklearn.metrics import roc_auc_score
from torchvision.transforms.v2.functional import InterpolationMode, resize

MODELS = ("Pedenet", *PEERS)
CPU = torch.device("cpu")


# Ways from a model to its results: what is exported (for OpenVINO its precision), the runtime, arguments of its loader.
ROUTES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "torch eager": ("torch", "torch", {}),
    "torch.compile": ("torch", "torch", {"compiled": True}),
    "ONNX Runtime": ("onnx", "onnx", {}),
    **{
        f"OpenVINO {artefact}, {precision}": (artefact, "openvino", {"precision": precision})
        for artefact, precision in product(("FP32", "FP16", "INT8"), ("f32", "default"))
    },
    "torch eager, GPU": ("torch", "torch", {"device": "cuda"}),
    "torch.compile, GPU": ("torch", "torch", {"compiled": True, "device": "cuda"}),
}
COMPRESSIONS = {"FP32": None, "FP16": CompressionType.FP16, "INT8": CompressionType.INT8_PTQ}

_IMAGES = 32  # as many as fill Pedenet's bank at 256x256 twice over
_PAUSE = 0.02  # seconds; OpenMP's and ONNX Runtime's threads wait in a loop for some milliseconds


class Row(NamedTuple):
    """A model by one route."""

    model: str
    stride: int | None  # Pedenet's
    route: str
    path: Path  # the export's file, in a folder of its own
    images: np.ndarray  # what it is measured with, [B, 3, H, W]
    expected: np.ndarray  # the eager model's anomaly maps of them, [B, 1, H, W]

    @property
    def label(self) -> str:
        """Name of the model, its stride and the batch."""
        return f"{label_of(self.model, self.stride)}, batch {len(self.images)}"


def label_of(model: str, stride: float | None) -> str:
    """Return the name of a model, with its stride if it has one."""
    return model if pd.isna(stride) else f"{model}, stride {stride:.0f}"


def possible_routes() -> list[str]:
    """Return the routes but those of a GPU that is not there, and those that are the same in float32 arithmetic."""
    try:
        import openvino

        has_other = openvino.Core().get_property("CPU", "INFERENCE_PRECISION_HINT").to_string() != "f32"
    except ImportError:
        has_other = False
    missing = [("precision", "default")] * (not has_other) + [("device", "cuda")] * (not torch.cuda.is_available())
    return [name for name, (_, _, options) in ROUTES.items() if not any(one in options.items() for one in missing)]


def take_images(data: Any, count: int, size: Sequence[int], seed: int) -> torch.Tensor:  # noqa: ANN401 - a dataset
    """Return images ``[N, 3, H, W]`` in 0..1 from all over a data set; without one, soft blots and a little noise."""
    if data is not None:
        chosen = torch.linspace(0, len(data) - 1, count).long().tolist()
        return torch.stack([fit_size(data[index].image, size) for index in chosen])
    generator = torch.Generator().manual_seed(seed)
    blots = resize(torch.rand(count, 3, *(side // 16 for side in size), generator=generator), list(size))
    return (blots + 0.05 * torch.randn(blots.shape, generator=generator)).clamp(0, 1)


def fit_size(image: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """Resize an image ``[3, H, W]`` in 0..1 as models' pre-processors do."""
    return resize(image, list(size), antialias=True).clamp(0, 1)


def write_images(images: torch.Tensor, folder: Path) -> AnomalibDataModule:
    """Write images and return them as a data module, half to train and half to validate, to calibrate INT8 with."""
    for index, image in enumerate((255 * images).round().byte()):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{index:03}.png")
    split: dict[str, Any] = {"test_split_mode": "none", "val_split_mode": "from_train", "val_split_ratio": 0.5}
    return Folder(name="images", normal_dir=folder.resolve(), num_workers=0, seed=0, **split)


@torch.no_grad()
def make_models(
    options: argparse.Namespace, images: torch.Tensor, others: torch.Tensor
) -> Iterator[tuple[str, int | None, AnomalibModule]]:
    """Yield name, stride (of Pedenet) and model, one after the other, each ready to score and to be exported.

    Pedenet is fitted on ``images``; the scores of ``others`` set thresholds where there are none.
    """
    for name in options.models:
        seed_everything(0, verbose=False)
        if name != "Pedenet":
            yield name, None, random_peer(name, options.image_size, others)
            continue
        if options.checkpoint is not None:
            model = Pedenet.load_from_checkpoint(options.checkpoint, map_location="cpu").eval()
        else:
            model = Pedenet(image_size=options.image_size, evaluator=False, visualizer=False).eval()
            batch = model.pre_processor(images)
            model.model.fit_standardization(batch)
            model.model.calibrate(batch)
            model.model.fit(batch.split(8))
            set_thresholds(model, others)
        for stride in options.strides:
            model.model.stride = stride
            yield name, stride, model


def export(
    model: AnomalibModule, artefact: str, folder: Path, shape: Sequence[int], datamodule: AnomalibDataModule
) -> Path:
    """Export a model for images of one shape ``[B, 3, H, W]`` and return the file."""
    folder.mkdir()
    if artefact == "torch":
        return model.to_torch(folder)
    # Static shapes: with a dynamic batch, anomalib's PatchCore is exported for a batch of 2.
    arguments = {"dynamic_shapes": ({0: shape[0]},), "verbose": False}
    size = (shape[2], shape[3])
    if artefact == "onnx":
        return model.to_onnx(folder, input_size=size, **arguments)
    datamodule.train_batch_size = datamodule.eval_batch_size = shape[0]
    more = {"compression_type": COMPRESSIONS[artefact], "datamodule": datamodule, "onnx_kwargs": arguments}
    return model.to_openvino(folder, input_size=size, **more)


def make_rows(
    models: Iterator[tuple[str, int | None, AnomalibModule]],
    routes: Sequence[str],
    images: torch.Tensor,
    datamodule: AnomalibDataModule,
    folder: Path,
) -> Iterator[Row]:
    """Export every model for a batch of images, and yield its rows."""
    for name, stride, model in models:
        paths: dict[str, Path] = {}
        expected = None
        with leaving_out(label_of(name, stride)), torch.inference_mode():  # aligned parts have one stride alone
            expected = model(images).anomaly_map.numpy()
        for artefact in dict.fromkeys(ROUTES[route][0] for route in routes if expected is not None):
            label = f"{label_of(name, stride)}, {artefact}"
            with leaving_out(label):
                paths[artefact] = export(model, artefact, folder / label, images.shape, datamodule)
        for route in routes:
            if ROUTES[route][0] in paths:
                yield Row(name, stride, route, paths[ROUTES[route][0]], images.numpy(), expected)


def load(row: Row, threads: int) -> tuple[runtimes.Run, float]:
    """Return a row's loaded model, and its ``map_error``."""
    _, runtime, arguments = ROUTES[row.route]
    run = runtimes.LOADERS[runtime](row.path, threads, **arguments)
    result = run(row.images)["anomaly_map"].reshape(row.expected.shape)
    return run, round(float(np.abs(result - row.expected).max() / (np.ptp(row.expected) or 1.0)), 6)


def measure(options: argparse.Namespace, rows: Sequence[Row], test_data: Any) -> list[dict[str, Any]]:  # noqa: ANN401
    """Return the rows' lines. Those of one route take turns, since all at once would not fit into memory."""
    lines = []
    for route in options.routes:
        loaded: list[tuple[Row, runtimes.Run, float]] = []
        for row in [row for row in rows if row.route == route]:
            with leaving_out(f"{row.label}, {route}"):
                loaded.append((row, *load(row, options.threads)))
        calls = [partial(run, row.images) for row, run, _ in loaded]
        times = time_in_turns(calls, options.rounds, options.seconds, CPU, _PAUSE)
        for (row, run, error), seconds in zip(loaded, times, strict=True):
            figures: dict[str, Any] = {**quartiles(seconds / len(row.images)), "map_error": error}
            figures |= {"pixel_AUROC": None, "image_AUROC": None, "peak_mib": None}
            with leaving_out(f"memory of {row.label}, {route}"):
                figures["peak_mib"] = peak_mib(row, options.threads)
            if test_data is not None and row.model == "Pedenet" and len(row.images) == 1:
                figures |= measure_auroc(run, test_data, options.image_size)
            lines.append(describe(row, figures, options.threads))
    return sorted(lines, key=lambda line: (options.models.index(line["model"]), line["stride"] or 0))


def describe(row: Row, figures: dict[str, Any], threads: int) -> dict[str, Any]:
    """Return a row's line."""
    _, runtime, arguments = ROUTES[row.route]
    library = {"onnx": "onnxruntime"}.get(runtime, runtime)
    return {
        "model": row.model,
        "stride": row.stride,
        "route": row.route,
        "batch": len(row.images),
        "image_size": "x".join(map(str, row.images.shape[2:])),
        **figures,
        "bytes": sum(file.stat().st_size for file in row.path.parent.iterdir()),
        "hardware": torch.cuda.get_device_name() if "device" in arguments else processor_name(),
        "threads": threads,
        "runtime": f"{library} {sys.modules[library].__version__.split('-')[0]}",
    }


def peak_mib(row: Row, threads: int) -> float | None:
    """Return the MiB that a fresh process takes to load and run a row.

    ``None`` elsewhere than on Linux, and for compiled models: to compile takes more memory than to run, and minutes.
    """
    _, runtime, arguments = ROUTES[row.route]
    if not Path("/proc/self/status").exists() or "compiled" in arguments:
        return None
    command = [sys.executable, runtimes.__file__, row.path, "--runtime", runtime, "--threads", threads]
    command += ["--options", json.dumps(arguments), "--shape", *row.images.shape]
    printed = subprocess.run([*map(str, command)], check=True, capture_output=True, text=True).stdout
    return round(int(printed.split()[-1]) / 2**20, 1)


def measure_auroc(run: runtimes.Run, data: Any, size: Sequence[int]) -> dict[str, float]:  # noqa: ANN401 - a dataset
    """Return pixel and image AUROC of all test images, whose masks are resized to the maps' size."""
    maps, masks, scores, labels = [], [], [], []
    for item in data:
        results = run(fit_size(item.image, size)[None].numpy())
        maps.append(results["anomaly_map"].reshape(-1))
        scores.append(results["pred_score"].item())
        labels.append(bool(item.gt_label))
        mask = torch.zeros(1, *size) if item.gt_mask is None else item.gt_mask.reshape(1, *item.gt_mask.shape[-2:])
        masks.append(resize(mask.float(), list(size), InterpolationMode.NEAREST).numpy().reshape(-1) > 0)
    pixels = roc_auc_score(np.concatenate(masks), np.concatenate(maps))
    return {"pixel_AUROC": round(pixels, 4), "image_AUROC": round(roc_auc_score(labels, scores), 4)}


def parse_arguments() -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n", maxsplit=1)[0])
    parser.add_argument("--models", nargs="+", default=MODELS, choices=MODELS, metavar="NAME", help=", ".join(MODELS))
    routes = possible_routes()
    parser.add_argument("--routes", nargs="+", default=routes, choices=ROUTES, metavar="NAME", help="; ".join(ROUTES))
    parser.add_argument("--strides", type=int, nargs="+", default=[2, 4, 8, 16], help="of Pedenet")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8], help="batch sizes")
    parser.add_argument("--image_size", type=int, nargs=2, help="height and width (default: 256 256)")
    parser.add_argument("--checkpoint", type=Path, help="trained Pedenet")
    add_data_options(parser)
    parser.add_argument("--images", type=int, default=_IMAGES, help="to fit and calibrate with (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=30, help="repetitions (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=30.0, help="no more repetitions of a row after that")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: %(default)s")
    parser.add_argument("--output", default="runs/latency", help="path of the CSV file, without ending")
    options = parser.parse_args()
    if options.images < 2 * max(options.batches):
        parser.error(f"--images must be at least twice the largest batch, {2 * max(options.batches)}")
    if options.data is not None and options.checkpoint is None:
        parser.error("--data measures AUROC, which needs a trained model: give its --checkpoint")
    if options.checkpoint is not None:
        if options.image_size is not None:
            parser.error("--image_size is that of the checkpoint")
        options.image_size = Pedenet.load_from_checkpoint(options.checkpoint, map_location="cpu").hparams.image_size
    options.image_size = tuple(options.image_size or (256, 256))
    return options


def main() -> None:
    """Measure every row."""
    options = parse_arguments()
    torch.set_num_threads(options.threads)
    data = None
    if options.data is not None:
        data = make_datamodule(options)
        data.setup()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "images").mkdir()
        images = take_images(data and data.train_data, options.images, options.image_size, seed=1)
        # Others than those in a bank, which have a distance of 0.
        measured = take_images(data and data.test_data, max(2, *options.batches), options.image_size, seed=0)
        datamodule = write_images(images, folder / "images")
        for batch in options.batches:
            exports = folder / f"batch {batch}"
            exports.mkdir()
            models = make_models(options, images, measured)
            rows = list(make_rows(models, options.routes, measured[:batch], datamodule, exports))
            lines = measure(options, rows, data and data.test_data)
            shutil.rmtree(exports)
            if lines:
                append(Path(f"{options.output}.csv"), lines)
                print(
                    pd.DataFrame(lines).drop(columns=["hardware", "threads", "runtime"]).to_string(index=False),
                    flush=True,
                )


if __name__ == "__main__":
    main()
