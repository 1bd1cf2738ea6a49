# Copyright (C) 2026 The anomalib-pedenet authors
# SPDX-License-Identifier: Apache-2.0

"""What a model takes from the normal images before the first step: the region of interest, and their statistics."""

import logging
from collections.abc import Callable, Sequence

import torch

from anomalib_pedenet.data.normal_images import TrainingSet, are_plain
from anomalib_pedenet.region import AUTO_ROI, RegionOfInterest, find_roi, read_roi
from anomalib_pedenet.torch_model import PedenetModel
from anomalib_pedenet.training.bank_building import CALIBRATION_IMAGES

logger = logging.getLogger(__name__)

# Their statistics are those of the training set to a percent or so, and take a second to read.
_STANDARDIZATION_IMAGES = 64


def set_region(
    region: RegionOfInterest,
    roi: str | None,
    images: TrainingSet,
    trained_on: Sequence[int],
    transform: Callable[[torch.Tensor], torch.Tensor] | None,
) -> None:
    """Take the region of interest that was asked for.

    Args:
        region (RegionOfInterest): The model's, which is changed.
        roi (str | None): Image file, :data:`AUTO_ROI`, or ``None`` for all of the images.
        images (TrainingSet): The training images.
        trained_on (Sequence[int]): Positions of those that are looked at to find it.
        transform (Callable[[torch.Tensor], torch.Tensor] | None): What the pre-processor does to images.

    Raises:
        ValueError: If it cannot be used; the message names the file.
    """
    region.reset()
    if roi == AUTO_ROI:
        region.set(find_roi(images.sample(trained_on, CALIBRATION_IMAGES)))
    elif roi is not None:
        size = images.size_of_first()
        region.set(read_roi(roi, size, transform or torch.nn.Identity()).to(region.visible.device))
    if not region.is_everywhere:
        logger.info("The region of interest is %.0f %% of the images.", 100 * region.visible.mean())
    elif roi is not None:
        logger.warning("The region of interest %s is all of the images.", roi)


def measure(model: PedenetModel, images: TrainingSet, trained_on: Sequence[int]) -> bool:
    """Take the statistics of the training images, and say whether they show anything.

    Args:
        model (PedenetModel): Model to be trained, which takes them.
        images (TrainingSet): The training images.
        trained_on (Sequence[int]): Positions of those that are trained on.

    Returns:
        bool: Whether there is something to learn: ``False`` if each of the images is of one colour.
    """
    sample = images.sample(trained_on, _STANDARDIZATION_IMAGES)
    model.fit_standardization(sample)
    if not are_plain(model.standardize(sample)):
        return True
    is_all = len(sample) == len(trained_on)
    logger.warning(
        "Each of the %d training images that were examined is of one colour, so that there is nothing to learn%s. "
        "Look into the folder of normal training images, and check the transforms.",
        len(sample),
        ", and the training ends after its first step" if is_all else "",
    )
    return not is_all
