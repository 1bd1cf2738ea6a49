# Copyright (C) 2026 The anomalib-pedenet authors
# SPDX-License-Identifier: Apache-2.0

"""A trained model on folders of images, outside anomalib's Engine."""

import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from anomalib.data import InferenceBatch
from tqdm import tqdm

from anomalib_pedenet.aftercare.edits import check_exists
from anomalib_pedenet.aftercare.explanation import NormalPatches
from anomalib_pedenet.aftercare.images import ImageSource, PreparedImages, as_seen, image_files
from anomalib_pedenet.aftercare.inspection import Inspection, Truth
from anomalib_pedenet.lightning_model import Pedenet
from anomalib_pedenet.region import image_size_of, read_roi
from anomalib_pedenet.training.out_of_fold import score_out_of_fold

logger = logging.getLogger(__name__)


class Inspector:
    """Inspects images by a trained model.

    Args:
        ckpt_path (str | Path): Checkpoint of a training.
        device (str): Where to compute. Defaults to ``"cpu"``.

    Raises:
        ValueError: If the file is not a whole checkpoint of this model.
        RuntimeError: If it has nothing to score with yet.

    Examples:
        >>> inspector = Inspector("model.ckpt")  # doctest: +SKIP
        >>> [found.path.name for found in inspector.inspect("images") if found.is_flagged]  # doctest: +SKIP
    """

    def __init__(self, ckpt_path: str | Path, device: str = "cpu") -> None:
        check_exists(ckpt_path)
        self.model = Pedenet.load_from_checkpoint(ckpt_path, map_location=device).to(device).eval()
        self.model.model.check_is_fitted()

    def prepared(self, source: ImageSource) -> PreparedImages:
        """Return images as the networks see them."""
        return PreparedImages(self.model, image_files(source))

    def normal_patches(self, source: ImageSource) -> NormalPatches | None:
        """Return the patches of normal images, to explain others by; ``None`` if the model scores tiles."""
        if self.model.model.tiler is not None:
            logger.warning("The model scores tiles, which have no place in the image: no patches are compared.")
            return None
        return NormalPatches(self.model.model, self.prepared(source))

    def read_region(self, file: str | Path, images: PreparedImages) -> torch.Tensor:
        """Return a region that was painted on images of one size, as the networks see them: bool ``[H, W]``.

        Raises:
            ValueError: If it cannot be used; the message names the file.
        """
        transform = getattr(self.model.pre_processor, "transform", None) or torch.nn.Identity()
        return read_roi(file, image_size_of(images.files[0]), transform).to(self.model.device)

    def normalize(self, predictions: InferenceBatch) -> InferenceBatch:
        """Return predictions of :class:`PedenetModel` as they are given out, with the threshold at 0.5."""
        processor = self.model.post_processor
        return predictions if processor is None else processor(predictions)

    @torch.no_grad()
    def inspect(
        self,
        source: ImageSource,
        truth: Truth | None = None,
        normal_patches: NormalPatches | None = None,
    ) -> Iterator[Inspection]:
        """Inspect images one by one.

        Args:
            source (ImageSource): Images.
            truth (Truth | None): What is known of all of them. Defaults to ``None``, nothing.
            normal_patches (NormalPatches | None): Normal patches to explain flagged images by. Defaults to ``None``, no
                explanations.

        Yields:
            Inspection: What was found on each image, in the order of the files.

        Raises:
            ValueError: If there is no image, or one cannot be read or scored; the message names it.
        """
        images = self.prepared(source)
        for index in tqdm(range(len(images)), "Inspecting", disable=None):
            yield self._inspection(images, index, self.model.model(images[index]), truth, normal_patches)

    @torch.no_grad()
    def inspect_training_images(
        self, source: ImageSource, normal_patches: NormalPatches | None = None
    ) -> Iterator[Inspection]:
        """Inspect the images that the model was trained on, each scored by what is fitted on others.

        Those that look least like the others have the highest scores: mislabelled or dirty ones are among them.

        Args:
            source (ImageSource): Training images, two or more.
            normal_patches (NormalPatches | None): Their patches, to explain flagged ones by the others. Defaults to
                ``None``, no explanations.

        Yields:
            Inspection: What was found on each image, not in the order of the files.

        Raises:
            ValueError: As :meth:`inspect`.
        """
        images = self.prepared(source)
        for index, predictions in score_out_of_fold(self.model.model, images, self.model.hparams.bank_stride):
            yield self._inspection(images, index, predictions, "good", normal_patches)

    def _inspection(
        self,
        images: PreparedImages,
        index: int,
        predictions: InferenceBatch,
        truth: Truth | None,
        normal_patches: NormalPatches | None,
    ) -> Inspection:
        """Return what was found on an image, by the scores that the model gives it before normalisation."""
        predictions = self.normalize(predictions)
        file = images.files[index]
        anomaly_map = predictions.anomaly_map[0, 0].float().cpu().numpy()
        found = Inspection(
            path=file,
            image=as_seen(file, anomaly_map.shape),
            anomaly_map=anomaly_map,
            score=float(predictions.pred_score),
            truth=truth,
        )
        if normal_patches is None or not found.is_flagged:
            return found
        return replace(found, explanation=normal_patches.explain(images[index], file))
