# Copyright (C) 2026 The anomalib-pedenet authors
# SPDX-License-Identifier: Apache-2.0

"""A region of interest for a checkpoint that was trained without one, or with another."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from anomalib.post_processing import PostProcessor
from PIL import Image

from anomalib_pedenet.aftercare.edits import edit_checkpoint, thresholds_state
from anomalib_pedenet.aftercare.images import ImageSource, as_seen
from anomalib_pedenet.aftercare.inspector import Inspector
from anomalib_pedenet.data.normal_images import spread
from anomalib_pedenet.false_alarms import FalseAlarmThreshold, default_threshold
from anomalib_pedenet.post_processor import choose_thresholds, highest_scores
from anomalib_pedenet.region import AUTO_ROI, find_roi
from anomalib_pedenet.training.bank_building import CALIBRATION_IMAGES, fit_scorers
from anomalib_pedenet.training.out_of_fold import score_out_of_fold

# Names, or their first parts, of what does not change with the region.
_KEPT = ("embedding_network.", "density_networks.", "location_networks.", "defect_networks.", "input_", "learned")

_DIMMED = 0.25  # of a hidden pixel's light in the picture


class Masking(NamedTuple):
    """What a region of interest came to.

    Attributes:
        visible (float): Share of the images that is looked at.
        chosen (FalseAlarmThreshold): The new threshold of images, and what may be expected of it.
        ckpt_path (Path): The checkpoint that was written.
    """

    visible: float
    chosen: FalseAlarmThreshold
    ckpt_path: Path


@torch.no_grad()
def mask_checkpoint(
    ckpt_path: str | Path,
    roi: str | Path,
    training_images: ImageSource,
    picture: str | Path | None = None,
    output: str | Path | None = None,
    device: str = "cpu",
) -> Masking:
    """Give a checkpoint a region of interest: what lies outside of it changes no score from now on.

    The networks stay. What is fitted on normal images, and the thresholds, are made anew from the training images as
    they look with the rest hidden.

    Args:
        ckpt_path (str | Path): Checkpoint.
        roi (str | Path): Image file: white where images are looked at; or ``"auto"`` to leave out a background of one
            colour.
        training_images (ImageSource): Images that the model was trained on, or folders of them, two or more.
        picture (str | Path | None): Image file to write: a training image, dark where it is hidden. Defaults to
            ``None``, none.
        output (str | Path | None): Where to save the changed checkpoint. Defaults to the place of the old one.
        device (str): Where to compute. Defaults to ``"cpu"``.

    Returns:
        Masking: What it came to, and the file that was written.

    Raises:
        ValueError: If the region cannot be used, there are too few images, or the model scores tiles; the checkpoint
            is untouched.
    """
    inspector = Inspector(ckpt_path, device)
    lightning_model = inspector.model
    model, images = lightning_model.model, inspector.prepared(training_images)
    if len(images) < 2:
        msg = f"What is normal in a region is learned from two training images or more, got {len(images)}."
        raise ValueError(msg)
    sample = torch.cat(list(images.take(spread(len(images), CALIBRATION_IMAGES))))
    if roi == AUTO_ROI:
        visible = find_roi(sample)
        if bool(visible.all()):
            msg = "No background of one colour was found: nothing was changed. Give an image file of the region."
            raise ValueError(msg)
    else:
        visible = inspector.read_region(roi, images)
    stride = lightning_model.hparams.bank_stride
    model.region.set(visible)
    model.calibrate(sample, stride)
    fit_scorers(model, images, sample, stride)
    good = [highest_scores(found) for _, found in score_out_of_fold(model, images, stride)]
    thresholds, chosen = choose_thresholds(good, default_threshold)
    tensors = {f"model.{name}": value for name, value in model.state_dict().items() if not name.startswith(_KEPT)}
    if isinstance(lightning_model.post_processor, PostProcessor):
        tensors |= thresholds_state(thresholds)
    share = float(visible.float().mean())
    details = {"roi": str(roi), "visible": share, "threshold": chosen.threshold}
    written = edit_checkpoint(ckpt_path, output, "mask", details, tensors, replaced=("model.scorers.",))
    if picture is not None:
        shown = as_seen(images.files[0], (visible.shape[0], visible.shape[1]))
        light = np.where(visible.cpu().numpy(), 1.0, _DIMMED)
        Image.fromarray((shown * light[..., None]).astype(np.uint8)).save(picture)
    return Masking(share, chosen, written)
