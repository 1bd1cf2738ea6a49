# Copyright (C) 2026 The anomalib-pedenet authors
# SPDX-License-Identifier: Apache-2.0

"""Thresholds for a wished rate of false alarms, put into a checkpoint."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from anomalib.post_processing import PostProcessor
from tqdm import tqdm

from anomalib_pedenet.aftercare.edits import both_thresholds, edit_checkpoint
from anomalib_pedenet.aftercare.images import ImageSource
from anomalib_pedenet.aftercare.inspector import Inspector
from anomalib_pedenet.false_alarms import FalseAlarmThreshold, choose_threshold
from anomalib_pedenet.post_processor import raw_image_threshold
from anomalib_pedenet.training.out_of_fold import score_out_of_fold


class Calibration(NamedTuple):
    """What a calibration came to.

    Attributes:
        chosen (FalseAlarmThreshold): The threshold for the rate, and what may be expected of it.
        threshold (float): The threshold that was set: that one, or a lower one by which all known defects are flagged.
        flagged_before (int): How many of the good images the earlier threshold flagged.
        flagged_now (int): How many the new one flags.
        ckpt_path (Path): The checkpoint that was written.
    """

    chosen: FalseAlarmThreshold
    threshold: float
    flagged_before: int
    flagged_now: int
    ckpt_path: Path


@torch.no_grad()
def calibrate_checkpoint(
    ckpt_path: str | Path,
    false_alarm_rate: float,
    training_images: ImageSource = (),
    good_images: ImageSource = (),
    known_defects: ImageSource = (),
    output: str | Path | None = None,
    device: str = "cpu",
) -> Calibration:
    """Set a checkpoint's thresholds such that at most a given fraction of good images is flagged.

    Pixels have the images' threshold, so that no good image has a defective pixel that is not itself flagged.

    Args:
        ckpt_path (str | Path): Checkpoint.
        false_alarm_rate (float): Largest fraction, above 0 and below 1.
        training_images (ImageSource): Images that the model was trained on, or folders of them: each is scored
            by what is fitted on the others.
        good_images (ImageSource): Other good images, or folders of them.
        known_defects (ImageSource): Defective images, or folders of them, that must be flagged: the threshold is below
            the lowest of their scores, whatever the rate.
        output (str | Path | None): Where to save the changed checkpoint. Defaults to the place of the old one.
        device (str): Where to compute. Defaults to ``"cpu"``.

    Returns:
        Calibration: What it came to, and the file that was written.

    Raises:
        ValueError: If there are no images, or too few for the rate; the checkpoint is untouched.
    """
    if not training_images and not good_images:
        msg = "A rate of false alarms is kept by good images: give training_images, good_images, or both."
        raise ValueError(msg)
    inspector = Inspector(ckpt_path, device)
    model, processor = inspector.model.model, inspector.model.post_processor
    if not isinstance(processor, PostProcessor):
        msg = f"{ckpt_path} was trained without a post_processor, so that it has no threshold to set: train with one."
        raise ValueError(msg)  # noqa: TRY004 - of the file, not of an argument's type
    known, others = (inspector.prepared(source) if source else None for source in (training_images, good_images))
    both = set(known.files if known else ()) & set(others.files if others else ())
    if both:
        msg = f"{len(both)} image(s) are given as training image and as another good one, {min(both)} for instance."
        raise ValueError(msg)
    choose_threshold([0.0] * (len(known or ()) + len(others or ())), false_alarm_rate)  # refused before the work
    scores: list[float] = []
    if others:
        scores += [float(model(image).pred_score) for image in tqdm(others, "Scoring good images", disable=None)]
    if known:
        held_out = score_out_of_fold(model, known, inspector.model.hparams.bank_stride)
        scores += [float(predictions.pred_score) for _, predictions in held_out]
    chosen = choose_threshold(scores, false_alarm_rate)
    threshold = chosen.threshold
    if known_defects:
        defects = inspector.prepared(known_defects)
        lowest = min(float(model(image).pred_score) for image in tqdm(defects, "Scoring known defects", disable=None))
        # What is above the threshold is flagged, not what is at it.
        threshold = min(threshold, float(np.nextafter(np.float32(lowest), np.float32(0))))
    details = {"false_alarm_rate": false_alarm_rate, "num_images": chosen.num_images, "threshold": threshold}
    written = edit_checkpoint(ckpt_path, output, "calibrate", details, both_thresholds(threshold))
    before = raw_image_threshold(processor)
    flagged_before, flagged_now = (sum(score > limit for score in scores) for limit in (before, threshold))
    return Calibration(chosen, threshold, flagged_before, flagged_now, written)
