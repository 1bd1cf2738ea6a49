# Copyright (C) 2026 The anomalib-pedenet authors
# SPDX-License-Identifier: Apache-2.0

"""Good images that a model flags, taught to a checkpoint as good."""

import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from anomalib.post_processing import PostProcessor

from anomalib_pedenet.aftercare.edits import EDITS, edit_checkpoint, read_checkpoint
from anomalib_pedenet.aftercare.images import ImageSource, PreparedImages
from anomalib_pedenet.aftercare.inspection import THRESHOLD, Truth
from anomalib_pedenet.aftercare.inspector import Inspector
from anomalib_pedenet.region import image_size_of, read_roi

logger = logging.getLogger(__name__)

# Patches are taken where a pixel lies more than half as far from what is normal as the threshold, so that others of
# the kind are not flagged either.
_SHARE_OF_THRESHOLD = 0.5

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

    What is flagged on them is normal from then on, without training. The threshold stays.

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
    model, processor = inspector.model.model, inspector.model.post_processor
    threshold = torch.tensor(THRESHOLD)
    if isinstance(processor, PostProcessor):
        threshold = torch.nan_to_num(processor.image_threshold.cpu(), nan=THRESHOLD)
    sources: list[tuple[str, PreparedImages]] = [("taught", inspector.prepared(good_images))]
    roles: list[tuple[Truth, ImageSource]] = [("defective", known_defects), ("good", known_good)]
    sources += [(role, inspector.prepared(source)) for role, source in roles if source]
    to_teach = sources[0][1]
    digests = [hashlib.sha256(file.read_bytes()).hexdigest() for file in to_teach.files]
    _check_are_new(ckpt_path, to_teach.files, digests)

    within = None if region is None else _read_region(inspector, region, to_teach.files)
    before = [[_score(inspector, image) for image in images] for _, images in sources]
    distance = float(threshold / (1 - threshold)) * _SHARE_OF_THRESHOLD
    flagged = [index for index, score in enumerate(before[0]) if score > THRESHOLD]
    if not flagged:
        msg = (
            f"None of the {len(to_teach)} good image(s) is flagged, {to_teach.files[0]} for instance: nothing to teach."
        )
        raise ValueError(msg)
    old = {name: value.clone() for name, value in model.state_dict().items() if name.startswith("scorers.")}
    rest = flagged
    for _ in range(_ROUNDS):
        taken = model.teach(to_teach.take(rest), distance / (1 + distance), within)
        logger.info(
            "Taken for normal: %s.", ", ".join(f"{count} patches of {size} px" for size, count in taken.items())
        )
        rest = [index for index in rest if _score(inspector, to_teach[index]) > THRESHOLD]
        if not rest:
            break
    lessons = [
        Lesson(file, role, score, _score(inspector, image))
        for (role, images), scores in zip(sources, before, strict=True)
        for file, score, image in zip(images.files, scores, images, strict=True)
    ]
    if any(lesson.is_lost for lesson in lessons) and not force:
        raise LostDefectError(lessons)
    new = {f"model.{name}": value for name, value in model.state_dict().items() if name in old}
    details = {"files": [str(to_teach.files[index]) for index in flagged], "digests": [digests[i] for i in flagged]}
    return lessons, edit_checkpoint(ckpt_path, output, "teach", details, new)


def _read_region(inspector: Inspector, file: str | Path, images: Sequence[Path]) -> torch.Tensor:
    """Return a region of images, as it lies in pre-processed ones, bool ``[H, W]``.

    Raises:
        ValueError: If it cannot be used, or the images differ in size.
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
    transform = getattr(inspector.model.pre_processor, "transform", None) or torch.nn.Identity()
    return read_roi(file, size, transform).to(inspector.model.device)


def _score(inspector: Inspector, image: torch.Tensor) -> float:
    """Return the normalised score of a pre-processed image."""
    return float(inspector.normalize(inspector.model.model(image)).pred_score)


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
