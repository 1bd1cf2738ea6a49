# Copyright (C) 2026 The anomalib-pedenet authors
# SPDX-License-Identifier: Apache-2.0

"""Good images that a model flags, taught to a checkpoint as good."""

import copy
import hashlib
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from anomalib_pedenet.aftercare.edits import EDITS, edit_checkpoint, read_checkpoint, thresholds_state
from anomalib_pedenet.aftercare.images import ImageSource, PreparedImages
from anomalib_pedenet.aftercare.inspection import THRESHOLD, Truth
from anomalib_pedenet.aftercare.inspector import Inspector
from anomalib_pedenet.false_alarms import choose_threshold
from anomalib_pedenet.post_processor import Thresholds, change_unit, just_below, raw_thresholds
from anomalib_pedenet.region import image_size_of
from anomalib_pedenet.torch_model import PedenetModel

logger = logging.getLogger(__name__)

# Of images like the taught ones so many may be flagged, as far as known defects allow it.
_STILL_FLAGGED = 1 / 3

# So far the threshold may fall, in distance, to keep a known defect: then other good images are hardly flagged by it.
_LEAST_FALL = 0.9

# A round takes in a few patches of each image. What is still flagged then is taught again, at most so often.
_ROUNDS = 4


class Lesson(NamedTuple):
    """An image's score before and after a teaching; what is above 0.5 is flagged.

    Attributes:
        path (Path): Its file.
        role (str): ``"taught"``, or what it is known to be: ``"good"`` or ``"defective"``.
        before (float): Its score before.
        after (float): Its score afterwards.
    """

    path: Path
    role: str
    before: float
    after: float

    @property
    def is_lost(self) -> bool:
        """Whether it is a known defect that was flagged before and no more."""
        return self.role == "defective" and self.before > THRESHOLD >= self.after


class LostDefectError(ValueError):
    """Known defects would no longer be flagged.

    Args:
        lessons (Sequence[Lesson]): All scores before and after.
    """

    def __init__(self, lessons: Sequence[Lesson]) -> None:
        self.lessons = list(lessons)
        lost = [lesson for lesson in lessons if lesson.is_lost]
        first = lost[0]
        super().__init__(
            f"{len(lost)} known defect(s) would no longer be flagged, {first.path} for instance ({first.before:.3f} "
            f"before, {first.after:.3f} after): nothing was changed. Teach other images, or force it."
        )


@torch.no_grad()
def teach_checkpoint(
    ckpt_path: str | Path,
    good_images: ImageSource,
    known_defects: ImageSource = (),
    known_good: ImageSource = (),
    region: str | Path | None = None,
    force: bool = False,
    output: str | Path | None = None,
    device: str = "cpu",
) -> tuple[list[Lesson], Path]:
    """Teach a checkpoint that images which it flags are good.

    What is flagged on them is normal from now on, without training. With known defects the threshold is moved too, see
    :func:`move_threshold`: up, until two thirds of the images like the taught ones pass, or down, to keep a known
    defect. It goes by what taught images score when others of them are taught.

    Args:
        ckpt_path (str | Path): Checkpoint.
        good_images (ImageSource): Good images, or folders of them, of which at least one is flagged.
        known_defects (ImageSource): Defective images that must be flagged as before.
        known_good (ImageSource): Other good images, whose scores are looked at.
        region (str | Path | None): Image file, white where the good images are good: what else is flagged on them is
            not taught. They must be of one size. Defaults to ``None``, everywhere.
        force (bool): Whether to change the checkpoint even if known defects are no longer flagged.
            Defaults to ``False``.
        output (str | Path | None): Where to save the changed checkpoint. Defaults to the place of the old one.
        device (str): Where to compute. Defaults to ``"cpu"``.

    Returns:
        tuple[list[Lesson], Path]: Scores of all images before and after, and the file that was written.

    Raises:
        LostDefectError: If known defects would no longer be flagged, and it is not forced.
        ValueError: If none of the good images is flagged, one was taught before, or the region cannot be used.
        NotImplementedError: If the model's scorer cannot be taught.
    """
    inspector = Inspector(ckpt_path, device)
    model, thresholds = inspector.model.model, raw_thresholds(inspector.model.post_processor)
    threshold = thresholds.image
    sources: list[tuple[str, PreparedImages]] = [("taught", inspector.prepared(good_images))]
    roles: list[tuple[Truth, ImageSource]] = [("defective", known_defects), ("good", known_good)]
    sources += [(role, inspector.prepared(source)) for role, source in roles if source]
    to_teach = sources[0][1]
    digests = [hashlib.sha256(file.read_bytes()).hexdigest() for file in to_teach.files]
    _check_are_new(ckpt_path, to_teach.files, digests)

    within = None
    if region is not None:
        _check_one_size(to_teach.files)
        within = inspector.read_region(region, to_teach)
    before = [[_score(model, image) for image in images] for _, images in sources]
    flagged = _flagged(to_teach.files, before[0], threshold)
    teacher = _Teacher(model, to_teach, thresholds, within)
    held_out = teacher.scores_of_others(flagged) if known_defects else []
    teacher.teach(flagged)
    after = [[_score(model, image) for image in images] for _, images in sources]
    scores = {role: list(zip(*both, strict=True)) for (role, _), *both in zip(sources, before, after, strict=True)}
    good = [*scores["taught"], *scores.get("good", ())]
    new_threshold = move_threshold(threshold, held_out, scores.get("defective", ()), good)
    lessons = [
        Lesson(file, role, _normalized(old, threshold), _normalized(new, new_threshold))
        for role, images in sources
        for file, (old, new) in zip(images.files, scores[role], strict=True)
    ]
    if any(lesson.is_lost for lesson in lessons) and not force:
        raise LostDefectError(lessons)
    tensors = {f"model.scorers.{name}": value for name, value in model.scorers.state_dict().items()}
    if new_threshold != threshold:
        tensors |= thresholds_state(_moved(thresholds, new_threshold))
    details = {
        "files": [str(to_teach.files[index]) for index in flagged],
        "digests": [digests[index] for index in flagged],
        "threshold": new_threshold,
    }
    return lessons, edit_checkpoint(ckpt_path, output, "teach", details, tensors)


def _flagged(files: Sequence[Path], scores: Sequence[float], threshold: float) -> list[int]:
    """Return the indices of the images above the threshold.

    Raises:
        ValueError: If there is none.
    """
    flagged = [index for index, score in enumerate(scores) if score > threshold]
    if not flagged:
        msg = f"None of the {len(files)} good image(s) is flagged, {files[0]} for instance: nothing to teach."
        raise ValueError(msg)
    return flagged


class _Teacher:
    """Teaches good images to a model.

    Args:
        model (PedenetModel): The model.
        images (PreparedImages): Good images.
        thresholds (Thresholds): Scores, as the model gives them, above which images and pixels are flagged.
        within (torch.Tensor | None): Where the images are good, bool ``[H, W]``; ``None`` for everywhere.
    """

    def __init__(
        self, model: PedenetModel, images: PreparedImages, thresholds: Thresholds, within: torch.Tensor | None
    ) -> None:
        self._model, self._images = model, images
        self._thresholds, self._within = thresholds, within

    def teach(self, positions: Sequence[int]) -> None:
        """Teach some of the images, again as long as they are flagged."""
        rest = list(positions)
        for _ in range(_ROUNDS):
            taken = self._model.teach(self._images.take(rest), self._thresholds.pixel, self._within)
            logger.info(
                "Taken for normal: %s.", ", ".join(f"{count} patches of {size} px" for size, count in taken.items())
            )
            rest = [index for index in rest if _score(self._model, self._images[index]) > self._thresholds.image]
            if not rest:
                break

    def scores_of_others(self, positions: Sequence[int]) -> list[float]:
        """Return what some of the images score if others of them are taught; the model stays as it is.

        Each half is scored after the other one was taught. A single image has no others.
        """
        halves = [positions[0::2], positions[1::2]]
        if not halves[1]:
            return []
        scorers, scores = self._model.scorers, []
        for half, others in (halves, halves[::-1]):
            self._model.scorers = copy.deepcopy(scorers)
            self.teach(others)
            scores += [_score(self._model, self._images[index]) for index in half]
        self._model.scorers = scorers
        return scores


def move_threshold(
    threshold: float,
    held_out: Sequence[float],
    defects: Sequence[tuple[float, float]],
    good: Sequence[tuple[float, float]],
) -> float:
    """Return a threshold by which most images that are like the taught ones pass, and known defects do not.

    Args:
        threshold (float): The present one.
        held_out (Sequence[float]): What taught images score if others are taught.
        defects (Sequence[tuple[float, float]]): Scores of known defects, before and after the lesson.
        good (Sequence[tuple[float, float]]): Scores of the taught and the known good images, likewise.

    Returns:
        float: Where known defects leave room for it, higher: at most half-way, in the logarithm of the distance, to the
            lowest of those that were flagged. Where the lesson has made one of them score a little too low, by a tenth
            of the distance at most, just below that one, if fewer good images are flagged than before even so. The
            present one if neither is possible.
    """
    found = [after for before, after in defects if before > threshold]
    if not found:
        return threshold
    lowest, distance = min(found), _distance(threshold)
    if lowest > threshold:
        if not held_out:
            return threshold
        between = math.sqrt(distance * _distance(lowest))
        wanted = choose_threshold(held_out, _STILL_FLAGGED).threshold
        return max(threshold, min(wanted, between / (1 + between)))
    lower = just_below(lowest)
    is_near = _distance(lower) >= _LEAST_FALL * distance
    helps = sum(after > lower for _, after in good) < sum(before > threshold for before, _ in good)
    return lower if is_near and helps else threshold


def _moved(thresholds: Thresholds, image: float) -> Thresholds:
    """Return thresholds with that of images moved, and that of pixels by as much."""
    before, after, pixel = (torch.tensor(value) for value in (thresholds.image, image, thresholds.pixel))
    return Thresholds(image, float(change_unit(pixel, to=after, at=before)))


def _distance(score: float) -> float:
    """Return the distance to what is normal of a score, in units of the highest of normal images."""
    return score / (1 - score)


def _check_one_size(images: Sequence[Path]) -> None:
    """Check that images have the same height and width.

    Raises:
        ValueError: If they have not.
    """
    sizes = {image: image_size_of(image) for image in images}
    size = sizes[images[0]]
    for image, other in sizes.items():
        if other != size:
            msg = (
                f"A region is taught on images of one size, but {images[0]} has {size[0]}x{size[1]} px and {image} "
                f"{other[0]}x{other[1]}: teach them one after the other."
            )
            raise ValueError(msg)


def _score(model: PedenetModel, image: torch.Tensor) -> float:
    """Return the score of a pre-processed image, before normalisation."""
    return float(model(image).pred_score)


def _normalized(score: float, threshold: float) -> float:
    """Return a score as it is given out, with the threshold at 0.5."""
    return float(change_unit(torch.tensor(score), torch.tensor(THRESHOLD), torch.tensor(threshold)))


def _check_are_new(ckpt_path: str | Path, files: Sequence[Path], digests: Sequence[str]) -> None:
    """Check that no image is taught twice, by its content.

    Raises:
        ValueError: If one is.
    """
    known = {
        digest: edit["when"] for edit in read_checkpoint(ckpt_path).get(EDITS, []) for digest in edit.get("digests", [])
    }
    seen: set[str] = set()
    for file, digest in zip(files, digests, strict=True):
        if digest in known:
            msg = f"{file} was taught to {ckpt_path} on {known[digest]} already: leave it out, or undo that first."
            raise ValueError(msg)
        if digest in seen:
            msg = f"{file} is given twice, under another name: leave one out."
            raise ValueError(msg)
        seen.add(digest)
