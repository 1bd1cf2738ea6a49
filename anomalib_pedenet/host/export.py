# Copyright (C) 2026 The anomalib-pedenet authors
# SPDX-License-Identifier: Apache-2.0

"""Exports of a trained model: anomalib's, with checks before any work is done, and INT8 of the convolutions alone."""

import contextlib
import logging
from abc import abstractmethod
from collections.abc import Iterator
from copy import deepcopy
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from anomalib import TaskType
from anomalib.data import AnomalibDataModule
from anomalib.deploy import CompressionType
from anomalib.metrics import F1Score
from anomalib.models.components.base.export_mixin import ExportMixin
from lightning_utilities.core.imports import module_available
from torch import nn
from torch.utils.data import DataLoader
from torchmetrics import Metric

from anomalib_pedenet.data.normal_images import NormalImages, spread
from anomalib_pedenet.torch_model import PedenetModel

logger = logging.getLogger(__name__)

_LARGE_DROP = 0.1

OPSETS = range(18, 26)
"""Versions of ONNX's operators to which torch exports; of others it writes files that ONNX Runtime refuses."""


class PedenetExportMixin(ExportMixin):
    """What ``Pedenet`` does otherwise than anomalib's ``ExportMixin``.

    Attributes:
        model (PedenetModel): The torch model.
        pre_processor (nn.Module | None): What images go through before it.
    """

    model: PedenetModel
    pre_processor: nn.Module | None

    @abstractmethod
    def _warn_without_thresholds(self) -> None:
        """Say once that there are no thresholds, if there are none."""

    def to_torch(self, export_root: Path | str, model_file_name: str = "model") -> Path:
        """Export to PyTorch's format, in evaluation mode; see ``ExportMixin.to_torch``.

        Raises:
            RuntimeError: If there is no memory bank yet (the other formats find that out by running the model).
        """
        self.model.check_is_fitted()
        self._warn_without_thresholds()
        self.eval()
        return super().to_torch(export_root, model_file_name)

    def to_onnx(
        self,
        export_root: Path | str,
        model_file_name: str = "model",
        input_size: tuple[int, int] | None = None,
        **kwargs: Any,  # noqa: ANN401 - of the mixin
    ) -> Path:
        """Export to ONNX, on the way to OpenVINO too; see ``ExportMixin.to_onnx``.

        Unless they are given, ``opset_version`` is the smallest of :data:`OPSETS`, and ``external_data`` is ``False``:
        one file. Models near to 2 GB, the most that such a file can hold, get a second one in any case.

        Raises:
            ValueError: If the scorer cannot be part of a graph, the opset cannot be exported to, or there are tiles of
                images whose size the graph would not know.
        """
        for scorer in self.model.scorers.values():
            if not scorer.exportable:
                msg = (
                    f"The scorer {self.model.scorer!r} searches outside the graph and cannot be exported to ONNX or "
                    "OpenVINO: train with the scorer 'exact', or load the checkpoint with it and validate once."
                )
                raise ValueError(msg)
        opset = kwargs.setdefault("opset_version", OPSETS.start)
        if type(opset) is not int or opset not in OPSETS:
            msg = (
                f"opset_version must be an integer from {OPSETS.start} to {OPSETS.stop - 1}, got {opset!r}: leave it "
                f"out for {OPSETS.start}, which the most runtimes read."
            )
            raise ValueError(msg)
        if self.model.tiler is not None and input_size is None and not self._resizes_to_one_size():
            msg = (
                "The exported graph cuts images into tiles, for which it must know their size: pass input_size, or "
                "use a pre_processor that resizes to a height and a width."
            )
            raise ValueError(msg)
        self._warn_without_thresholds()
        kwargs.setdefault("external_data", False)
        with _quiet_optimizer():
            return super().to_onnx(export_root, model_file_name, input_size, **kwargs)

    def _resizes_to_one_size(self) -> bool:
        """Return whether the pre-processor makes images of all sizes equally large."""
        if self.pre_processor is None:
            return False
        wide = torch.zeros(1, 3, 300, 400, device=self.device)
        return bool(self.pre_processor(wide).shape == self.pre_processor(wide.mT).shape)

    def to_openvino(self, *args: Any, **kwargs: Any) -> Path:  # noqa: ANN401 - of the mixin
        """Export to OpenVINO; see ``ExportMixin.to_openvino``.

        However it is compressed, the memory bank is kept in 16 bits. The squares of its rows are those of the rounded
        rows, and keep more than 16 bits.
        """
        arguments = signature(super().to_openvino).bind(*args, **kwargs).arguments
        if not arguments.get("compression_type"):
            return super().to_openvino(*args, **kwargs)
        scorers = self.model.scorers
        self.model.scorers = deepcopy(scorers)
        try:
            for scorer in self.model.scorers.values():
                scorer.round_to_half()
            return super().to_openvino(*args, **kwargs)
        finally:
            self.model.scorers = scorers

    def _compress_ov_model(
        self,
        model: Any,  # noqa: ANN401 - of OpenVINO, which is optional
        compression_type: CompressionType | None = None,
        datamodule: AnomalibDataModule | None = None,
        metric: Metric | None = None,
        task: TaskType | None = None,  # noqa: ARG002 - of the one it overrides
        max_drop: float = 0.01,
    ) -> Any:  # noqa: ANN401
        """Compress the convolutions of an OpenVINO model; see ``ExportMixin``, which has the like for whole models.

        anomalib calibrates on the validation images, which are test images for most data modules: here it is on the
        training images. The metric of accuracy control is measured on the validation images.

        Raises:
            ModuleNotFoundError: If NNCF is not installed.
            ValueError: If there is no data module although images are needed, or ``max_drop`` is outside 0..1.
        """
        if not module_available("nncf"):
            msg = "Compression to INT8 needs NNCF: pip install 'anomalib-pedenet[openvino]'."
            raise ModuleNotFoundError(msg, name="nncf")
        from anomalib_pedenet.host import quantization

        model = quantization.halve(model)
        if compression_type == CompressionType.INT8:
            return quantization.compress_weights(model)
        if datamodule is None:
            msg = (
                f"Datamodule must be provided for {CompressionType(compression_type).name}, which needs images to "
                "calibrate on: pass that of the training (--data on the command line)."
            )
            raise ValueError(msg)
        if not 0 <= max_drop <= 1:
            msg = f"max_drop must be between 0 and 1, got {max_drop}."
            raise ValueError(msg)
        if compression_type == CompressionType.INT8_ACQ and max_drop > _LARGE_DROP:
            logger.warning("max_drop=%s is a large value: the metric may fall by as much (0.01 is usual).", max_drop)
        datamodule.setup("fit")
        loader = datamodule.train_dataloader()
        chosen = spread(len(loader.dataset), quantization.MAX_CALIBRATION_IMAGES)
        images = NormalImages(loader, None, torch.device("cpu"), chosen)
        if compression_type == CompressionType.INT8_PTQ:
            return quantization.quantize(model, images)
        validation = datamodule.val_data
        labelled = DataLoader(validation, batch_size=1, collate_fn=validation.collate_fn)
        metric = metric or F1Score(fields=["pred_label", "gt_label"])
        return quantization.quantize_with_accuracy_control(model, images, labelled, metric, max_drop)


@contextlib.contextmanager
def _quiet_optimizer() -> Iterator[None]:
    """Keep the optimizers of ONNX graphs from listing each constant, in a hundred kilobytes of log."""
    optimizers = [logging.getLogger(name) for name in ("onnxscript", "onnx_ir")]
    levels = [optimizer.level for optimizer in optimizers]
    for optimizer, level in zip(optimizers, levels, strict=True):
        optimizer.setLevel(max(level, logging.WARNING))
    try:
        yield
    finally:
        for optimizer, level in zip(optimizers, levels, strict=True):
            optimizer.setLevel(level)
