# Copyright (C) 2026 The anomalib-pedenet authors
# SPDX-License-Identifier: Apache-2.0

"""OpenVINO models in eight bits: the 3x3 convolutions but the first, calibrated on training images.

They are nearly all of the arithmetic, and withstand rounding. What follows them does not: the distance between two
embeddings is a small difference of large products, and a normal patch's is near 0. So projections, the search in the
memory bank and the anomaly map keep floating point. So does the first convolution, which costs little: an image of low
contrast would reach it in a few of the 256 levels.
"""

from collections.abc import Iterable, Iterator
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from anomalib.data import ImageBatch
from torchmetrics import Metric
from torchvision.transforms.v2.functional import InterpolationMode, resize

if TYPE_CHECKING:
    import nncf
    import openvino

IMAGE_CHANNELS = 3

MAX_CALIBRATION_IMAGES = 300
"""Images on which the ranges of activations are measured, NNCF's own default."""


def compress_weights(model: "openvino.Model") -> "openvino.Model":
    """Keep the weights of the inner convolutions in eight bits; arithmetic stays in floating point.

    Args:
        model (openvino.Model): Exported model.

    Returns:
        openvino.Model: The compressed model.
    """
    import nncf

    return nncf.compress_weights(model, ignored_scope=_kept_in_floating_point(model))


def quantize(model: "openvino.Model", images: Iterable[torch.Tensor]) -> "openvino.Model":
    """Compute the inner convolutions in eight bits.

    Args:
        model (openvino.Model): Exported model.
        images (Iterable[torch.Tensor]): Normal images ``[1, 3, H, W]`` in 0..1 for calibration.

    Returns:
        openvino.Model: The quantised model.
    """
    import nncf

    calibration = nncf.Dataset(_Inputs(images, model))
    return nncf.quantize(
        model,
        calibration,
        **_settings(model),
    )


def quantize_with_accuracy_control(
    model: "openvino.Model",
    images: Iterable[torch.Tensor],
    batches: Iterable[ImageBatch],
    metric: Metric,
    max_drop: float,
) -> "openvino.Model":
    """Compute as many of the inner convolutions in eight bits as a metric allows.

    Args:
        model (openvino.Model): Exported model.
        images (Iterable[torch.Tensor]): As for :func:`quantize`.
        batches (Iterable[ImageBatch]): Labelled images to measure the metric on, one by one.
        metric (Metric): One of anomalib's metrics, the higher the better.
        max_drop (float): Largest drop of the metric that is accepted, absolute.

    Returns:
        openvino.Model: The quantised model.
    """
    import nncf

    def measure(compiled: "openvino.CompiledModel", labelled: Iterable[ImageBatch]) -> tuple[float, None]:
        metric.reset()
        for batch in labelled:
            metric.update(_predict(compiled, batch, model))
        return float(metric.compute()), None

    return nncf.quantize_with_accuracy_control(
        model,
        nncf.Dataset(_Inputs(images, model)),
        nncf.Dataset(batches),
        measure,
        max_drop=max_drop,
        **_settings(model),
    )


def halve(model: "openvino.Model") -> "openvino.Model":
    """Keep constants, the memory banks above all, in sixteen bits; arithmetic stays as it is.

    OpenVINO leaves a model as it is that has eight-bit parts already.

    Args:
        model (openvino.Model): Exported model, whose banks have been rounded.

    Returns:
        openvino.Model: The same in half as many bytes.
    """
    import openvino

    with TemporaryDirectory() as folder:
        path = Path(folder) / "model.xml"
        openvino.save_model(model, path, compress_to_fp16=True)
        return openvino.Core().read_model(BytesIO(path.read_bytes()), BytesIO(path.with_suffix(".bin").read_bytes()))


def _settings(model: "openvino.Model") -> dict[str, Any]:
    """Return how NNCF is to quantise a model, with and without accuracy control."""
    import nncf

    return {
        "preset": nncf.QuantizationPreset.MIXED,  # activations of LeakyReLU are mostly above 0
        "subset_size": MAX_CALIBRATION_IMAGES,
        "fast_bias_correction": False,  # the fast one takes up to 0.06 of image AUROC from loose parts
        "ignored_scope": _kept_in_floating_point(model),
    }


def _kept_in_floating_point(model: "openvino.Model") -> "nncf.IgnoredScope":
    """Return all operations of a model but its inner convolutions: those of 3x3, without the first."""
    import nncf

    types, names = set(), []
    for operation in model.get_ordered_ops():
        kind = operation.get_type_name()
        if kind != "Convolution":
            types.add(kind)
            continue
        _, channels, *kernel = operation.input(1).get_shape()
        if channels == IMAGE_CHANNELS or kernel == [1, 1]:  # 1x1: the output layer and projections
            names.append(operation.get_friendly_name())
    return nncf.IgnoredScope(
        types=sorted(types - {"Constant", "Parameter", "Result", "Convert"}), names=names, validate=False
    )


def _fit_to_input(image: torch.Tensor, model: "openvino.Model") -> torch.Tensor:
    """Resize an image ``[1, 3, H, W]`` to the model's input, and repeat it to its batch, where those are fixed."""
    batch, _, height, width = list(model.input(0).get_partial_shape())
    if not (height.is_dynamic or width.is_dynamic):
        image = resize(image, [height.get_length(), width.get_length()], antialias=True)
    return image if batch.is_dynamic else image.expand(batch.get_length(), -1, -1, -1)


def _predict(compiled: "openvino.CompiledModel", batch: ImageBatch, model: "openvino.Model") -> ImageBatch:
    """Return a labelled image, a batch of one, with a compiled model's predictions."""
    images = _fit_to_input(batch.image, model)
    output = compiled(images.numpy())
    names = ("pred_score", "pred_label", "anomaly_map", "pred_mask")
    predictions = {name: torch.from_numpy(np.array(output[name]))[:1] for name in names}
    for name in ("anomaly_map", "pred_mask"):
        predictions[name] = predictions[name][:, 0]
    mask = batch.gt_mask
    if mask is not None:
        size = list(predictions["anomaly_map"].shape[-2:])
        mask = resize(mask.reshape(1, 1, *mask.shape[-2:]), size, InterpolationMode.NEAREST)[:, 0]
    return ImageBatch(image=images[:1], gt_label=batch.gt_label, gt_mask=mask, **predictions)


class _Inputs:
    """Images as a model takes them, each time anew, in NumPy."""

    def __init__(self, images: Iterable[torch.Tensor], model: "openvino.Model") -> None:
        self.images = images
        self.model = model

    def __iter__(self) -> Iterator[np.ndarray]:
        for image in self.images:
            yield _fit_to_input(image, self.model).numpy()
