# Copyright (C) 2026 The anomalib-pedenet authors
# SPDX-License-Identifier: Apache-2.0

"""Thresholds for a wished rate of false alarms, put into a checkpoint."""

from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from anomalib.post_processing import PostProcessor
from tqdm import tqdm

from anomalib_pedenet.aftercare.edits import edit_checkpoint, thresholds_state
from anomalib_pedenet.aftercare.images import ImageSource
from anomalib_pedenet.aftercare.inspector import Inspector
from anomalib_pedenet.false_alarms import FalseAlarmThreshold, choose_threshold
from anomalib_pedenet.post_processor import (
    Thresholds,
    choose_thresholds,
    highest_scores,
    just_below,
    raw_thresholds,
)
from anomalib_pedenet.training.out_of_fold import score_out_of_fold


class Calibration(NamedTuple):
    """What a calibration came to.

    Attributes:
        chosen (FalseAlarmThreshold): The threshold of images for the rate, and what may be expected of it.
        thresholds (Thresholds): Those that were set: for the rate, or lower ones that flag all known defects.
        flagged_before (int): How many of the good images the earlier threshold flagged.
        flagged_now (int): How many the new one flags.
        ckpt_path (Path): The checkpoint that was written.
    """

    chosen: FalseAlarmThreshold
    thresholds: Thresholds
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

    At most as large a fraction has a pixel that is flagged, by a threshold of the pixels' own.

    Args:
        ckpt_path (str | Path): Checkpoint.
        false_alarm_rate (float): Largest fraction, above 0 and below 1.
        training_images (ImageSource): Images that the model was trained on, or folders of them: each is scored
            by what is fitted on the others.
        good_images (ImageSource): Other good images, or folders of them.
        known_defects (ImageSource): Defective images, or folders of them, that must be flagged, each with a pixel at
            least: the thresholds are below the lowest of their scores, whatever the rate.
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
    good: list[Thresholds] = []
    if others:
        good += [highest_scores(model(image)) for image in tqdm(others, "Scoring good images", disable=None)]
    if known:
        held_out = score_out_of_fold(model, known, inspector.model.hparams.bank_stride)
        good += [highest_scores(predictions) for _, predictions in held_out]
    thresholds, chosen = choose_thresholds(good, partial(choose_threshold, rate=false_alarm_rate))
    if known_defects:
        defects = tqdm(inspector.prepared(known_defects), "Scoring known defects", disable=None)
        lowest = map(min, zip(*(highest_scores(model(image)) for image in defects), strict=True))
        thresholds = Thresholds(*(min(pair) for pair in zip(thresholds, map(just_below, lowest), strict=True)))
    details = {"false_alarm_rate": false_alarm_rate, "num_images": chosen.num_images, "threshold": thresholds.image}
    written = edit_checkpoint(ckpt_path, output, "calibrate", details, thresholds_state(thresholds))
    limits = (raw_thresholds(processor).image, thresholds.image)
    flagged_before, flagged_now = (sum(scores.image > limit for scores in good) for limit in limits)
    return Calibration(chosen, thresholds, flagged_before, flagged_now, written)
