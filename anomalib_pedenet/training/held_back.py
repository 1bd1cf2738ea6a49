# Copyright (C) 2026 The anomalib-pedenet authors
# SPDX-License-Identifier: Apache-2.0

"""Training images that are held back from a training, to measure it by."""

import logging
from dataclasses import dataclass

import torch
from anomalib.data import Batch

from anomalib_pedenet.data.normal_images import MIN_TRAINING_IMAGES, TrainingSet
from anomalib_pedenet.torch_model import PedenetModel
from anomalib_pedenet.training.label_free import draw_test_defects, drawn_defect_auroc

logger = logging.getLogger(__name__)

_MAX_HELD_BACK = 32


@dataclass(frozen=True)
class HeldBack:
    """Training images that are held back.

    Attributes:
        trained_on (list[int]): Positions in the data set of all the others.
        paths (frozenset[str]): Files of those held back.
        normal (torch.Tensor): They themselves, pre-processed, ``[N, 3, H, W]``.
    """

    trained_on: list[int]
    paths: frozenset[str]
    normal: torch.Tensor

    def trainable(self, batch: Batch) -> list[int]:
        """Return the positions in a batch of the images that are not held back."""
        return [position for position, path in enumerate(batch.image_path) if str(path) not in self.paths]

    def measure(self, model: PedenetModel, step: int) -> dict[str, float]:
        """Draw a defect on each image, and measure how well those are found.

        Args:
            model (PedenetModel): A fitted model.
            step (int): Steps made, for the log.

        Returns:
            dict[str, float]: ``drawn_pixel_AUROC`` and ``drawn_image_AUROC``.
        """
        normal = self.normal.to(model.input_mean.device)
        drawn = draw_test_defects(normal, model.region.pixels((normal.shape[-2], normal.shape[-1])))
        pixel, image = drawn_defect_auroc(model, normal, drawn)
        logger.info(
            "AUROC on defects drawn on %d images held back, after %d steps: pixels %.4f, images %.4f.",
            len(normal),
            step,
            pixel,
            image,
        )
        return {"drawn_pixel_AUROC": pixel, "drawn_image_AUROC": image}


def hold_back(images: TrainingSet, fraction: float) -> HeldBack | None:
    """Choose the images to hold back, evenly spread over the training set, and read them.

    Args:
        images (TrainingSet): The training images.
        fraction (float): Fraction of them, from 0 to 0.5. At most 32 are taken, and 256 MiB.

    Returns:
        HeldBack | None: The images; ``None`` for a fraction of 0.

    Raises:
        ValueError: If there are too few training images, or their batches do not say which images they hold.
    """
    if fraction == 0:
        return None
    num_images = len(images)
    count = min(images.num_together(_MAX_HELD_BACK), max(1, round(fraction * num_images)))
    if num_images - count < MIN_TRAINING_IMAGES:
        msg = (
            f"The training set has {num_images} normal image(s), too few to hold {count} back (holdout "
            f"{fraction:g}) and train on {MIN_TRAINING_IMAGES}: set holdout to 0, or add images."
        )
        raise ValueError(msg)
    indices = torch.linspace(0, num_images - 1, count + 2)[1:-1].round().long().tolist()
    chosen = images.images(indices)
    normal = chosen.together()
    if len(chosen.paths) != count:
        msg = "holdout needs a data module whose batches have image_path, to know the images that are held back."
        raise ValueError(msg)
    others = sorted(set(range(num_images)) - set(indices))
    return HeldBack(trained_on=others, paths=frozenset(chosen.paths), normal=normal)
