# Copyright (C) 2026 The anomalib-pedenet authors
# SPDX-License-Identifier: Apache-2.0

"""What is fitted on the normal images once the networks are trained: calibration, memory bank, thresholds."""

import logging
from collections.abc import Mapping, Sequence

import torch
from tqdm import tqdm

from anomalib_pedenet.data.normal_images import MIN_TRAINING_IMAGES, TrainingSet, spread
from anomalib_pedenet.false_alarms import default_threshold
from anomalib_pedenet.kinds import LOOSE
from anomalib_pedenet.post_processor import Thresholds, choose_thresholds, highest_scores
from anomalib_pedenet.torch_model import PedenetModel
from anomalib_pedenet.training.out_of_fold import ImageSet, score_out_of_fold

logger = logging.getLogger(__name__)

CALIBRATION_IMAGES = 32
"""Enough to tell aligned parts from others, and for principal components: 27,000 patches of 256x256 images."""

# One image in so many is scored by a bank of the others, to measure what normal images score.
_PROBED_PART = 4

# Training images that set the thresholds where there was no validation: enough for 1 false alarm in 100, in a minute.
_THRESHOLD_IMAGES = 400


def build_memory_bank(
    model: PedenetModel,
    images: TrainingSet,
    trained_on: Sequence[int],
    stride: int,
    learned: Mapping[int, float] | None,
    unseen: torch.Tensor | None = None,
    quiet: bool = False,
) -> None:
    """Calibrate a model and build its memory bank, with its present weights.

    Args:
        model (PedenetModel): Model with trained networks.
        images (TrainingSet): The training images.
        trained_on (Sequence[int]): Positions of those that the bank is built from.
        stride (int): Distance between their patches in pixels.
        learned (Mapping[int, float] | None): What location prediction has learned, see
            :meth:`PedenetModel.weigh_scales`; ``None`` for what the model knows from before.
        unseen (torch.Tensor | None): Normal images ``[N, 3, H, W]`` that are not in the bank, as those that will be
            scored, to measure what normal images score. Defaults to ``None``: some of ``trained_on``.
        quiet (bool): Whether no progress is shown. Defaults to ``False``.

    Raises:
        ValueError: If an image cannot be used.
    """
    sample = images.sample(trained_on, CALIBRATION_IMAGES)
    weights = model.calibrate(sample, stride, learned)
    unseen = None if unseen is None else unseen.to(sample.device)
    fit_scorers(model, images.images(trained_on), sample, stride, unseen, quiet)
    shares = model.scale_shares
    logger.info(
        "%s Scored by %s: patches of %s.",
        "The images show " + model.kind.name + "." if model.kind else "",
        model.scorer_in_use,
        ", ".join(f"{size} px, weight {shares[size]:.2f}, of the position {weights[size]:g}" for size in weights),
    )


def fit_scorers(
    model: PedenetModel,
    images: ImageSet,
    sample: torch.Tensor,
    stride: int | None = None,
    unseen: torch.Tensor | None = None,
    quiet: bool = False,
) -> None:
    """Fit a calibrated model's scorers, and measure what normal images score.

    Those that a memory bank holds lie too near to it. So where loose parts are compared with its rows, and no others
    are at hand, a bank of three quarters of the images is built first, and the scales are measured on the rest.

    Args:
        model (PedenetModel): A calibrated model.
        images (ImageSet): The images to fit it on.
        sample (torch.Tensor): Some of them ``[N, 3, H, W]``, to measure others than loose parts by.
        stride (int | None): Distance between patches in pixels. Defaults to the model's.
        unseen (torch.Tensor | None): Normal images ``[N, 3, H, W]`` that are not among them, to measure by instead.
            Defaults to ``None``.
        quiet (bool): Whether no progress is shown. Defaults to ``False``.
    """
    probes = spread(len(images), min(CALIBRATION_IMAGES, max(1, len(images) // _PROBED_PART)))
    others = sorted(set(range(len(images))) - set(probes))
    measures_first = unseen is None and model.kind == LOOSE and len(others) > 0
    if measures_first:
        read = images.take(others)
        model.fit(tqdm(read, "Measuring normal images", len(read), disable=quiet), stride=stride)
        model.fit_normal_limit(torch.cat(list(images.take(probes))))
    model.fit(tqdm(images, "Building the memory bank", len(images), disable=quiet), stride=stride)
    if not measures_first:
        model.fit_normal_limit(sample if unseen is None else unseen)


def thresholds_of_training(
    model: PedenetModel, images: TrainingSet, trained_on: Sequence[int], stride: int, quiet: bool = False
) -> Thresholds | None:
    """Choose thresholds by the training images, each scored by what is fitted on others.

    Args:
        model (PedenetModel): A fitted model.
        images (TrainingSet): The training images.
        trained_on (Sequence[int]): Positions of those that it was fitted on.
        stride (int): Distance between their patches in pixels.
        quiet (bool): Whether no progress is shown. Defaults to ``False``.

    Returns:
        Thresholds | None: The thresholds; ``None`` of a single image.
    """
    if len(trained_on) < MIN_TRAINING_IMAGES:
        return None
    chosen = images.images([trained_on[position] for position in spread(len(trained_on), _THRESHOLD_IMAGES)])
    good = [highest_scores(predictions) for _, predictions in score_out_of_fold(model, chosen, stride, quiet)]
    thresholds, of_images = choose_thresholds(good, default_threshold)
    logger.info(
        "No validation has set thresholds: they are set by %d training images, each scored by what is fitted on "
        "others. Of other good images like these %.1f %% will be called defective on average (%.1f to %.1f %%).",
        of_images.num_images,
        100 * of_images.rate,
        100 * of_images.low,
        100 * of_images.high,
    )
    return thresholds
