# Copyright (C) 2026 The anomalib-pedenet authors
# SPDX-License-Identifier: Apache-2.0

"""Inspect images with an exported model and OpenVINO alone: neither torch nor anomalib is needed where this runs.

    pip install numpy pillow openvino        # and opencv-python-headless for --camera
    python openvino_folder.py model.xml path/to/images --output overlays

Export the model where it was trained (`anomalib export --model Pedenet --ckpt_path model.ckpt --export_type openvino`)
and copy `model.xml` and `model.bin`. They hold everything from resizing to threshold and mask.

For each image a line says its score (0 to 1; above 0.5 it is anomalous), its label, and the milliseconds that the model
took. `--output` takes overlays: a heat map of the anomaly map over the image, and the outline of the predicted mask in
white. An image that cannot be read is reported, and the next one is taken; the exit status is then 1.

The model gets what it was trained with: anomalib reads pixels as they are stored and pays no heed to the orientation
that cameras note beside them (EXIF), nor does this.
"""

import argparse
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import openvino
from PIL import Image

SUFFIXES = {".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
OUTPUTS = {"pred_score", "pred_label", "anomaly_map", "pred_mask"}
HEAT = 0.5  # how much of an overlay is heat map


class Prediction(NamedTuple):
    """What the model says of an image.

    Attributes:
        score: 0 to 1, threshold 0.5.
        is_anomalous: Whether the score is above it.
        anomaly_map: The same for each pixel, `[h, w]`, in the size to which the model resizes.
        mask: Pixels above the threshold, `[h, w]`, bool.
        milliseconds: How long the model took.
    """

    score: float
    is_anomalous: bool
    anomaly_map: np.ndarray
    mask: np.ndarray
    milliseconds: float


class Inspector:
    """An exported model, ready to run.

    Args:
        path: `model.xml`, with `model.bin` beside it, or `model.onnx`.
        precision: `"f32"`, or `"default"` for OpenVINO's own choice.
        threads: Number of threads; 0 for OpenVINO's own choice.

    Raises:
        RuntimeError: If the file cannot be read.
        ValueError: If it is not such a model.
    """

    def __init__(self, path: Path, precision: str = "f32", threads: int = 0) -> None:
        core = openvino.Core()
        model = core.read_model(path)
        names = {name for output in model.outputs for name in output.get_names()}
        if not names >= OUTPUTS:
            msg = f"it has no output {', '.join(sorted(OUTPUTS - names))}; export a model trained with anomalib"
            raise ValueError(msg)
        shape = model.input(0).partial_shape
        model.reshape([1, *list(shape)[1:]])
        is_static = shape[2].is_static and shape[3].is_static
        self.size = (shape[3].get_length(), shape[2].get_length()) if is_static else None  # width, height
        config: dict[str, str | int] = {"PERFORMANCE_HINT": "LATENCY"}
        if precision != "default":
            config["INFERENCE_PRECISION_HINT"] = precision
        if threads:
            config["INFERENCE_NUM_THREADS"] = threads
        self.compiled = core.compile_model(model, "CPU", config)

    def inspect(self, image: Image.Image) -> Prediction:
        """Score an RGB image of any size."""
        pixels = np.asarray(image, dtype=np.float32).transpose(2, 0, 1) / 255  # [3, H, W], RGB in 0..1
        if self.size is not None and image.size != self.size:
            pixels = resize(pixels, self.size)
        start = time.perf_counter()
        results = self.compiled(np.ascontiguousarray(pixels[None]))
        milliseconds = 1000 * (time.perf_counter() - start)
        return Prediction(
            score=results["pred_score"].item(),
            is_anomalous=bool(results["pred_label"].item()),
            anomaly_map=results["anomaly_map"].reshape(results["anomaly_map"].shape[-2:]),
            mask=results["pred_mask"].reshape(results["pred_mask"].shape[-2:]).astype(bool),
            milliseconds=milliseconds,
        )


def resize(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize `[3, H, W]` to a width and a height as in training: antialiased, and not rounded to whole grey levels."""
    channels = [Image.fromarray(channel).resize(size, Image.Resampling.BILINEAR) for channel in pixels]
    return np.stack([np.asarray(channel) for channel in channels])


def draw_overlay(image: Image.Image, prediction: Prediction) -> Image.Image:
    """Blend the anomaly map as colours with the image, in the image's size, and outline the predicted mask."""
    anomaly_map = Image.fromarray(prediction.anomaly_map.astype(np.float32))
    values = np.asarray(anomaly_map.resize(image.size, Image.Resampling.BILINEAR)).clip(0, 1)[..., None]
    # Blue, green, red: each channel is a tent around its own value.
    colors = 255 * (1.5 - np.abs(4 * values - np.array([3.0, 2.0, 1.0]))).clip(0, 1)
    pixels = (1 - HEAT) * np.asarray(image, dtype=np.float32) + HEAT * colors
    mask = np.asarray(Image.fromarray(prediction.mask).resize(image.size, Image.Resampling.NEAREST))
    pixels[outline(mask, width=max(1, round(max(image.size) / 400)))] = 255
    return Image.fromarray(pixels.astype(np.uint8))


def outline(mask: np.ndarray, width: int) -> np.ndarray:
    """Return the pixels `[H, W]` of a mask that are within `width` of its border, to the sides or above and below."""
    inside = mask.copy()
    for _ in range(width):
        padded = np.pad(inside, 1, mode="edge")
        inside = inside & padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return mask & ~inside


def find_images(inputs: list[Path]) -> dict[Path, Path]:
    """Find image files.

    Args:
        inputs: Files, and folders that are searched with their subfolders.

    Returns:
        The files in order, each with the name of its overlay: its path below the folder that was given.
    """
    found = {}
    for path in inputs:
        if path.is_dir():
            files = sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())
            found |= {file: file.relative_to(path) for file in files}
        else:
            found[path] = Path(path.name)
    return found


def read_frames(source: str) -> Iterator[tuple[str, Image.Image]]:
    """Read images from a camera until it ends or Ctrl+C is pressed.

    Args:
        source: Number of the camera, or a video file or stream.

    Yields:
        Name and image of each frame.

    Raises:
        OSError: If it cannot be opened.
    """
    import cv2

    capture = cv2.VideoCapture(int(source) if source.isdigit() else source)
    if not capture.isOpened():
        msg = f"camera {source} cannot be opened"
        raise OSError(msg)
    try:
        index = 0
        while True:
            is_read, frame = capture.read()
            if not is_read:
                return
            yield f"frame_{index:06}.png", Image.fromarray(cv2.cvtColor(frame, cv2.COLOR_BGR2RGB))
            index += 1
    finally:
        capture.release()


def inspect_one(inspector: Inspector, image: Image.Image, name: str, overlay: Path | None) -> float:
    """Inspect an image, print its line, write its overlay if there is a path for it, and return the milliseconds."""
    prediction = inspector.inspect(image)
    label = "anomalous" if prediction.is_anomalous else "normal"
    print(f"{name}: score {prediction.score:.4f}, {label}, {prediction.milliseconds:.1f} ms", flush=True)
    if overlay is not None:
        overlay.parent.mkdir(parents=True, exist_ok=True)
        draw_overlay(image, prediction).save(overlay)
    return prediction.milliseconds


def parse_arguments() -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="exported model: model.xml (with model.bin beside it) or model.onnx")
    parser.add_argument("images", type=Path, nargs="*", help="image files, and folders, which are searched for images")
    parser.add_argument("--camera", help="camera, by its number, or a video file or stream: instead of images")
    parser.add_argument("--output", type=Path, help="folder for overlays, which have the names of their images")
    parser.add_argument(
        "--precision",
        choices=("f32", "default"),
        default="f32",
        help="arithmetic: float32, or OpenVINO's own choice, which is bfloat16 on processors that have it: faster, and "
        "the smallest distances lose digits (default: %(default)s)",
    )
    parser.add_argument("--threads", type=int, default=0, help="number of threads (default: OpenVINO's own choice)")
    options = parser.parse_args()
    if bool(options.images) == (options.camera is not None):
        parser.error("give either images or a --camera")
    if not options.model.is_file():
        parser.error(f"{options.model} cannot be used: there is no such file")
    if options.output is not None:
        output = options.output.resolve()
        for path in options.images:
            folder = path.resolve() if path.is_dir() else path.resolve().parent
            if output == folder or (path.is_dir() and output.is_relative_to(folder)):
                parser.error(f"--output {options.output} lies in the images' own folder {folder}: choose another one")
    return options


def main() -> int:
    """Inspect all images and return the exit status: 1 if one of them could not be."""
    options = parse_arguments()
    try:
        inspector = Inspector(options.model, options.precision, options.threads)
    except (RuntimeError, ValueError) as error:
        sys.exit(f"error: {options.model} cannot be used: {error}")
    images = find_images(options.images)
    if options.camera is None and not images:
        sys.exit(f"error: there are no images ({', '.join(sorted(SUFFIXES))}) in {', '.join(map(str, options.images))}")
    if options.output is not None and len(set(images.values())) < len(images):
        sys.exit("error: several images have the same name, and so would their overlays: inspect them in several runs")

    milliseconds: list[float] = []
    num_failed = 0
    start = time.perf_counter()
    try:
        if options.camera is not None:
            for name, frame in read_frames(options.camera):
                overlay = None if options.output is None else options.output / name
                milliseconds.append(inspect_one(inspector, frame, name, overlay))
        for path, name in images.items():
            overlay = None if options.output is None else options.output / name
            try:
                with Image.open(path) as file:
                    image = file.convert("RGB")
                milliseconds.append(inspect_one(inspector, image, str(path), overlay))
            except Exception as error:  # noqa: BLE001 - files are broken in many ways, and none must stop a line
                num_failed += 1
                print(f"error: {path}: {error}", file=sys.stderr, flush=True)
    except KeyboardInterrupt:
        print("stopped")
    except (ImportError, OSError) as error:
        sys.exit(f"error: --camera {options.camera}: {error}")
    seconds = time.perf_counter() - start
    if milliseconds:
        print(
            f"{len(milliseconds)} images in {seconds:.2f} s, {len(milliseconds) / seconds:.1f} images/s with reading"
            f"{' and overlays' if options.output is not None else ''}; the model takes "
            f"{float(np.median(milliseconds)):.1f} ms (median)"
        )
    if num_failed:
        print(f"error: {num_failed} images could not be inspected", file=sys.stderr)
    return int(num_failed > 0)


if __name__ == "__main__":
    sys.exit(main())
