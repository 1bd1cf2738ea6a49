# Copyright (C) 2026 The anomalib-pedenet authors
# SPDX-License-Identifier: Apache-2.0

"""Are these still images of the same kind as in training?

A few numbers are taken of each image: its score, its light, colours and sharpness, where its content lies, and how its
patches spread over kinds of patches. One half of the training images says what is normal, where content usually lies
and which kinds there are. Each number is then compared between the other half and the new images; light, colours and
sharpness, which have to be learned from none, between all training images and the new ones. The Kolmogorov-Smirnov test
compares whole distributions: some defects among many images hardly matter, a change of all of them does.

Reference:
    F. J. Massey, "The Kolmogorov-Smirnov test for goodness of fit", J. Am. Stat. Assoc. 46, 1951; S. Rabanser,
    S. Guennemann, Z. C. Lipton, "Failing loudly", NeurIPS 2019, https://arxiv.org/abs/1810.11953: univariate tests on
    learned representations, with Bonferroni's correction.
"""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from scipy.stats import ks_2samp
from skimage.registration import phase_cross_correlation
from sklearn.cluster import MiniBatchKMeans
from tqdm import tqdm

from anomalib_pedenet.aftercare.images import PreparedImages, as_seen
from anomalib_pedenet.aftercare.inspector import Inspector
from anomalib_pedenet.torch_model import PedenetModel

# How often images of the same kind may be said to have changed: once in a thousand times.
_FALSE_VERDICTS = 1e-3

_LEAST_IMAGES = 5
_KINDS = 16  # of patches
_ROWS_AN_IMAGE = 256  # patches that the kinds are learned from
_MOST_SHOWN = 9
_SUBPIXELS = 10
_OF_PLACE = ("place, down (px)", "place, right (px)")

Vectors = dict[str, NDArray[np.float64]]
"""A value for each image, by the name of what was measured."""


class Moved(NamedTuple):
    """Something that was measured on training images and on new ones.

    Attributes:
        name (str): What was measured.
        before (NDArray[np.float64]): On each training image that is compared.
        now (NDArray[np.float64]): On each new image.
        p_value (float): Probability of so large a difference between images of the same kind, over all that was
            measured; 1 at most.
    """

    name: str
    before: NDArray[np.float64]
    now: NDArray[np.float64]
    p_value: float

    @property
    def has_moved(self) -> bool:
        """Whether it differs by more than chance explains."""
        return self.p_value < _FALSE_VERDICTS


@torch.no_grad()
def find_drift(inspector: Inspector, training_images: PreparedImages, new_images: PreparedImages) -> list[Moved]:
    """Compare new images with those that a model was trained on.

    Args:
        inspector (Inspector): The model, without a tiler. It stays as it is.
        training_images (PreparedImages): Images that it was trained on, ten or more.
        new_images (PreparedImages): New images, five or more.

    Returns:
        list[Moved]: All that was measured, what differs most first.

    Raises:
        ValueError: If there are too few images, or the model scores tiles.
    """
    for images, what, least in ((training_images, "training", 2 * _LEAST_IMAGES), (new_images, "new", _LEAST_IMAGES)):
        if len(images) < least:
            msg = f"To see whether images have changed takes {least} {what} images or more, got {len(images)}."
            raise ValueError(msg)
    model = inspector.model.model
    if model.tiler is not None:
        msg = "Images are compared as a whole, but the model scores tiles: train one without tiles."
        raise ValueError(msg)
    # What is measured against must not have been learned from what is measured.
    reference, compared = (training_images.take(range(half, len(training_images), 2)) for half in (0, 1))
    height, width = training_images[0].shape[-2:]
    visible = model.region.pixels((height, width)).cpu().numpy()
    mean_image, kinds = _mean_image(reference, visible), _learn_kinds(model, reference)
    probe = copy.deepcopy(model)
    probe.fit(tqdm(reference, "Learning what is normal", disable=None), inspector.model.hparams.bank_stride)
    before, now = (
        _measure_scores(inspector, probe, images) | _measure_patches(model, images, kinds)
        for images in (compared, new_images)
    )
    now |= _measure_pixels(new_images, mean_image, visible)
    for name, values in _measure_pixels(training_images, mean_image, visible).items():
        before[name] = values[1::2] if name in _OF_PLACE else values  # the same half as `compared`
    found = []
    for name, values in before.items():
        # Bonferroni: as many chances of a false verdict as there are comparisons.
        p_value = min(1.0, len(before) * float(ks_2samp(values, now[name]).pvalue))
        found.append(Moved(name, values, now[name], p_value))
    return sorted(found, key=lambda moved: moved.p_value)


def _measure_scores(inspector: Inspector, model: PedenetModel, images: PreparedImages) -> Vectors:
    """Measure the score, by a model that was fitted anew, in the units of the checkpoint's."""
    found = (inspector.normalize(model(image)).pred_score for image in tqdm(images, "Scoring", disable=None))
    return {"score": np.array([float(score) for score in found])}


def _seen(images: PreparedImages, visible: NDArray[np.bool_], label: str) -> Iterator[NDArray[np.float64]]:
    """Yield images as the model sees them, ``[H, W, 3]``, with hidden pixels in the mean colour of the others."""
    for file in tqdm(images.files, label, disable=None):
        image = as_seen(file, (visible.shape[0], visible.shape[1])).astype(np.float64)
        image[~visible] = image[visible].mean(axis=0)
        yield image


def _mean_image(images: PreparedImages, visible: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Return the mean of grey images, ``[H, W]``."""
    total: NDArray[np.float64] = np.zeros(visible.shape)
    for image in _seen(images, visible, "Learning where things lie"):
        total += image.mean(axis=2)
    return total / len(images)


def _measure_pixels(images: PreparedImages, mean_image: NDArray[np.float64], visible: NDArray[np.bool_]) -> Vectors:
    """Measure light, colour, sharpness, and place against a mean image ``[H, W]``, where images are visible."""
    rows: dict[str, list[float]] = {}
    for image in _seen(images, visible, "Measuring pixels"):
        grey = image.mean(axis=2)
        red, green, blue = image.mean(axis=(0, 1)) + 1.0
        shift = phase_cross_correlation(mean_image, grey, upsample_factor=_SUBPIXELS, normalization=None)[0]
        edges = np.abs(np.diff(grey, axis=0)).mean() + np.abs(np.diff(grey, axis=1)).mean()
        values = {
            "brightness": grey.mean() / 255,
            "contrast": grey.std() / 255,
            "red against green": np.log(red / green),
            "blue against green": np.log(blue / green),
            "sharpness": edges / (grey.std() + 1.0),
            **dict(zip(_OF_PLACE, -shift, strict=True)),
        }
        for name, value in values.items():
            rows.setdefault(name, []).append(float(value))
    return {name: np.array(values) for name, values in rows.items()}


def _patches(model: PedenetModel, images: PreparedImages, label: str) -> Iterator[NDArray[np.float32]]:
    """Yield the embeddings ``[P, Z]`` of each image's patches, at the smallest scale and without their place."""
    for image in tqdm(images, label, disable=None):
        size, patches = next(model.patch_scores(image))
        scorer = model.scorers[str(size)]
        dimension = scorer.embedding_dim - 2 * scorer.encodes_position
        yield patches.embeddings[0].flatten(0, 1)[:, :dimension].cpu().numpy()


def _learn_kinds(model: PedenetModel, images: PreparedImages) -> MiniBatchKMeans:
    """Learn the kinds of patches that images have."""
    generator = np.random.default_rng(0)
    sample = [
        rows[generator.permutation(len(rows))[:_ROWS_AN_IMAGE]]
        for rows in _patches(model, images, "Learning kinds of patches")
    ]
    return MiniBatchKMeans(_KINDS, random_state=0, n_init=1).fit(np.concatenate(sample))


def _measure_patches(model: PedenetModel, images: PreparedImages, kinds: MiniBatchKMeans) -> Vectors:
    """Measure the share of each kind of patch."""
    shares = np.array(
        [
            np.bincount(kinds.predict(rows), minlength=_KINDS) / len(rows)
            for rows in _patches(model, images, "Measuring patches")
        ]
    )
    return {f"share of patches of kind {kind + 1}": shares[:, kind] for kind in range(_KINDS)}


def draw_drift(found: list[Moved], output: Path) -> None:
    """Draw the distributions of what differs most, on training images and new ones.

    Args:
        found (list[Moved]): See :func:`find_drift`.
        output (Path): PNG file to write.
    """
    figure = Figure(figsize=(12, 9), layout="constrained")
    axes = figure.subplots(3, 3).flatten()
    for axis, moved in zip(axes, found[:_MOST_SHOWN], strict=True):
        both = np.concatenate([moved.before, moved.now])
        edges = np.linspace(both.min(), both.max() + 1e-9, 25)
        for values, label, color in ((moved.before, "training", "#2a6fb0"), (moved.now, "new", "#c05a00")):
            axis.hist(
                values, edges, weights=np.full(len(values), 100 / len(values)), label=label, color=color, alpha=0.6
            )
        axis.set_title(f"{moved.name}: {'moved' if moved.has_moved else 'as before'}")
        axis.set_ylabel("% of images")
        axis.legend()
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=100)
