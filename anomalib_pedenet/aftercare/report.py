# Copyright (C) 2026 The anomalib-pedenet authors
# SPDX-License-Identifier: Apache-2.0

"""A page on what was found on images, in one file that any browser opens without a network."""

import base64
import io
from collections.abc import Iterable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, StrictUndefined
from numpy.typing import NDArray
from PIL import Image

from anomalib_pedenet.aftercare.inspection import THRESHOLD, Box, Explanation, Inspection
from anomalib_pedenet.host.checkpoint_io import written_whole

_TEMPLATE = Path(__file__).with_name("report.html.jinja")

# Scratches of one pixel survive it; images of 256x256 px take about 9 kB.
_JPEG_QUALITY = 85


def write_report(inspections: Iterable[Inspection], output: Path, title: str = "Inspection") -> Path:
    """Write a page on inspected images: their scores, maps and explanations, and what other thresholds would do.

    Images are encoded and written as they come, so that memory holds one of them. The file appears when it is whole; on
    an error what was there before stays.

    Args:
        inspections (Iterable[Inspection]): What was found, one image or more. It is gone through once.
        output (Path): HTML file to write; its folder is made.
        title (str): Heading of the page. Defaults to ``"Inspection"``.

    Returns:
        Path: ``output``.

    Raises:
        ValueError: If there is no image, ``output`` is a folder, or a score, map or distance is not finite; the message
            names the image.

    Examples:
        >>> inspector = Inspector("model.ckpt")  # doctest: +SKIP
        >>> write_report(inspector.inspect("images"), Path("report.html"))  # doctest: +SKIP
        PosixPath('report.html')
    """
    output = Path(output)
    if output.is_dir():
        msg = f"{output} is a folder: pass the name of a file, for example {output / 'report.html'}."
        raise ValueError(msg)
    template = Environment(autoescape=True, undefined=StrictUndefined).from_string(_TEMPLATE.read_text("utf-8"))
    parts = template.generate(
        title=title,
        date=datetime.now().astimezone(),
        threshold=THRESHOLD,
        records=_records(inspections),
    )
    output.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(output) as file:
        for part in parts:
            # File names, and titles made of them, may hold bytes that are no text.
            file.write(part.encode("utf-8", "xmlcharrefreplace"))
    return output


def _records(inspections: Iterable[Inspection]) -> Iterator[dict[str, Any]]:
    """Yield what the page is told of each image.

    Raises:
        ValueError: If there is none, or a number is not finite.
    """
    is_empty = True
    for found in inspections:
        is_empty = False
        yield _record(found)
    if is_empty:
        msg = "There is nothing to report on: pass the inspections of one image or more."
        raise ValueError(msg)


def _record(found: Inspection) -> dict[str, Any]:
    """Return what the page is told of an image, as JSON can hold it.

    Raises:
        ValueError: If a number is not finite.
    """
    distance = 0.0 if found.explanation is None else found.explanation.distance
    if not np.isfinite([found.score, distance]).all() or not np.isfinite(found.anomaly_map).all():
        msg = (
            f"Score, map or distance of {found.path} is not a finite number: look for such numbers in the image, "
            "or train the model anew."
        )
        raise ValueError(msg)
    height, width = found.anomaly_map.shape
    return {
        "path": found.path.as_posix(),
        "score": float(found.score),
        "truth": found.truth,
        "height": height,
        "width": width,
        "image": _jpeg(found.image),
        "map": _grey_png(found.anomaly_map),
        "explanation": None if found.explanation is None else _explanation_record(found.explanation),
    }


def _explanation_record(explanation: Explanation) -> dict[str, Any]:
    """Return what the page is told of the nearest normal patch; it cuts both patches out by itself."""
    height, width, _ = explanation.normal_image.shape
    return {
        "box": _box_record(explanation.box),
        "distance": float(explanation.distance),
        "normal": {
            "path": explanation.normal_path.as_posix(),
            "height": height,
            "width": width,
            "image": _jpeg(explanation.normal_image),
            "box": _box_record(explanation.normal_box),
        },
    }


def _box_record(box: Box) -> dict[str, int]:
    """Return a rectangle with named sides."""
    return {side: int(value) for side, value in box._asdict().items()}


def _jpeg(image: NDArray[np.uint8]) -> str:
    """Return an RGB image ``[H, W, 3]`` as a data URL."""
    return _data_url(image, "jpeg", quality=_JPEG_QUALITY)


def _grey_png(anomaly_map: NDArray[np.float32]) -> str:
    """Return a map ``[H, W]`` from 0 to 1 as a data URL of a grey image, in steps of 1/255 and without other loss."""
    return _data_url(np.rint(255 * anomaly_map.clip(0, 1)).astype(np.uint8), "png")


def _data_url(pixels: NDArray[np.uint8], kind: str, **options: int) -> str:
    """Return pixels as a data URL of an image file."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **options)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"
