# Copyright (C) 2026 The anomalib-pedenet authors
# SPDX-License-Identifier: Apache-2.0

"""The command ``anomalib-pedenet``: what comes after the training. Training, testing and export are anomalib's own."""

import sys
from collections.abc import Sequence
from pathlib import Path

import jsonargparse
import numpy as np

from anomalib_pedenet.aftercare.calibration import calibrate_checkpoint
from anomalib_pedenet.aftercare.drift import draw_drift, find_drift
from anomalib_pedenet.aftercare.edits import undo_edit
from anomalib_pedenet.aftercare.exported import set_export_thresholds
from anomalib_pedenet.aftercare.inspection import THRESHOLD
from anomalib_pedenet.aftercare.inspector import Inspector
from anomalib_pedenet.aftercare.masking import mask_checkpoint
from anomalib_pedenet.aftercare.report import write_report
from anomalib_pedenet.aftercare.teaching import Lesson, LostDefectError, teach_checkpoint
from anomalib_pedenet.false_alarms import FalseAlarmThreshold

_NUM_NAMED = 10


def calibrate(
    ckpt_path: str,
    false_alarm_rate: float = 0.01,
    training_images: str | list[str] | None = None,
    good_images: str | list[str] | None = None,
    known_defects: str | list[str] | None = None,
    output: str | None = None,
    device: str = "cpu",
) -> None:
    """Set the thresholds such that at most a given fraction of good images is flagged.

    No defective image is needed. The more good images there are, the lower a rate can be kept: 99 for 1 in 100, 199 for
    1 in 200.

    Args:
        ckpt_path: Checkpoint of a training.
        false_alarm_rate: Largest fraction of good images to be flagged: 0.01 for 1 in 100.
        training_images: Folders with the images that the model was trained on. Each is scored by what is fitted on the
            others, which takes some minutes.
        good_images: Folders with other good images.
        known_defects: Folders with defective images that must be flagged, even if more good images are flagged then.
        output: Where to save the changed checkpoint; by default in the place of the old one.
        device: cpu or cuda.
    """
    done = calibrate_checkpoint(
        ckpt_path, false_alarm_rate, training_images or (), good_images or (), known_defects or (), output, device
    )
    chosen = done.chosen
    print(f"Of {chosen.num_images} good images {done.flagged_before} were flagged before, {done.flagged_now} are now.")
    if done.thresholds.image < chosen.threshold:
        print(
            "All known defects are flagged, for which the threshold had to be LOWER than for that rate of false "
            f"alarms: about {done.flagged_now / chosen.num_images:.1%} of good images will be flagged."
        )
    else:
        print(_expectation(chosen))
    print(f"Saved in {done.ckpt_path}. Exports made before keep their old threshold: export again, or move theirs.")


def _expectation(chosen: FalseAlarmThreshold) -> str:
    """Return in a sentence what may be expected of a threshold."""
    return (
        f"Of other good images like these at most {chosen.rate:.2%} will be flagged on average: with a threshold by "
        f"these {chosen.num_images}, {chosen.low:.2%} to {chosen.high:.2%} (95 % certain)."
    )


def mask(
    ckpt_path: str,
    roi: str,
    training_images: str | list[str],
    picture: str = "region.png",
    output: str | None = None,
    device: str = "cpu",
) -> None:
    """Have a model look at a region of the images alone: what lies outside changes no score any more.

    The networks stay as they are. What is normal in the region, and the thresholds, are learned anew from the training
    images, which takes a minute or so. `undo` takes it back. To train with a region: anomalib train --model.roi.

    Args:
        ckpt_path: Checkpoint of a training.
        roi: Image file, as large as the images, white where they are looked at and black elsewhere; or auto to leave
            out a background of one colour.
        training_images: Folders with the images that the model was trained on.
        picture: Image file to write: one of them, dark where it is not looked at.
        output: Where to save the changed checkpoint; by default in the place of the old one.
        device: cpu or cuda.
    """
    done = mask_checkpoint(ckpt_path, roi, training_images, picture, output, device)
    print(f"{done.visible:.0%} of the images are looked at, see {Path(picture).resolve()}.")
    print(_expectation(done.chosen))
    print(f"Saved in {done.ckpt_path}. Exports made before do not know of it: export again.")


def report(
    ckpt_path: str,
    images: str | list[str] | None = None,
    good_images: str | list[str] | None = None,
    defective_images: str | list[str] | None = None,
    training_images: str | list[str] | None = None,
    output: str = "report.html",
    device: str = "cpu",
) -> None:
    """Inspect folders of images, and write a page to look at: scores, maps, outlines and thresholds.

    The page is one file, which opens in any browser without a network.

    Args:
        ckpt_path: Checkpoint of a training.
        images: Folders with images of which nothing is known.
        good_images: Folders with images that are known to be good: what is flagged of them is a false alarm.
        defective_images: Folders with images that are known to be defective: what is not flagged of them is a miss.
        training_images: Folders with the images that the model was trained on, to show the nearest normal patch beside
            each defect.
        output: The page to write.
        device: cpu or cuda.
    """
    inspector = Inspector(ckpt_path, device)
    sources = [(images, None), (good_images, "good"), (defective_images, "defective")]
    if not any(source for source, _ in sources):
        msg = "There is nothing to inspect: give folders with --images, --good_images or --defective_images."
        raise ValueError(msg)
    patches = inspector.normal_patches(training_images) if training_images else None
    found = (
        inspection for source, truth in sources if source for inspection in inspector.inspect(source, truth, patches)
    )
    written = write_report(found, Path(output), title=f"Inspection by {Path(ckpt_path).name}")
    print(f"Open this page in a browser: {written.resolve()}")


def explain(
    ckpt_path: str,
    training_images: str | list[str],
    output: str = "training_images.html",
    device: str = "cpu",
) -> None:
    """Show the training images that look least like the others: mislabelled or dirty ones are among them.

    Each is scored by what is fitted on the others, which takes some minutes. The first ten are named, and the page
    shows all, with the nearest patch of another image beside what is unusual.

    Args:
        ckpt_path: Checkpoint of a training.
        training_images: Folders with the images that the model was trained on.
        output: The page to write.
        device: cpu or cuda.
    """
    inspector = Inspector(ckpt_path, device)
    patches = inspector.normal_patches(training_images)
    found = sorted(inspector.inspect_training_images(training_images, patches), key=lambda one: one.score, reverse=True)
    print("Training images that look least like the others:")
    for inspection in found[:_NUM_NAMED]:
        print(f"  {inspection.score:.3f}  {inspection.path}")
    written = write_report(found, Path(output), title="Training images, scored by the others")
    print(f"Open this page in a browser: {written.resolve()}")


def drift(
    ckpt_path: str,
    training_images: str | list[str],
    images: str | list[str],
    output: str = "drift.png",
    device: str = "cpu",
) -> None:
    """Say whether images are still of the kind that the model was trained on: scores, light, colours, place, patches.

    Some defects among the images do not matter. The command ends with status 1 if the images have changed.

    Args:
        ckpt_path: Checkpoint of a training.
        training_images: Folders with the images that the model was trained on.
        images: Folders with the images to look at, five or more; from twenty on small changes are seen as well.
        output: Picture of the evidence to write.
        device: cpu or cuda.
    """
    inspector = Inspector(ckpt_path, device)
    known, new = inspector.prepared(training_images), inspector.prepared(images)
    found = find_drift(inspector, known, new)
    draw_drift(found, Path(output))
    moved = [one for one in found if one.has_moved]
    for one in moved:
        before, now = (float(np.median(values)) for values in (one.before, one.now))
        print(f"  {one.name}: {before:.3f} in training, {now:.3f} now")
    print(f"Evidence: {Path(output).resolve()}")
    if moved:
        print(f"The images have CHANGED: {len(moved)} of {len(found)} measures moved by more than chance explains.")
        sys.exit(1)
    print(f"No change was found in {len(new)} images.")


def teach(
    ckpt_path: str,
    good_images: str | list[str],
    known_defects: str | list[str] | None = None,
    known_good: str | list[str] | None = None,
    region: str | None = None,
    force: bool = False,
    output: str | None = None,
    device: str = "cpu",
) -> None:
    """Teach a model that images which it flags are good: what is flagged on them is normal from then on.

    It takes seconds, no training, and `undo` takes it back.

    Args:
        ckpt_path: Checkpoint of a training.
        good_images: Good images that are flagged, or folders with them.
        known_defects: Folders with defective images: if one of them would no longer be flagged, nothing is changed.
        known_good: Folders with other good images, to see how their scores change.
        region: Image file, as large as the good images, white where they are good; elsewhere nothing is taught.
        force: Change the checkpoint even if a known defect is no longer flagged.
        output: Where to save the changed checkpoint; by default in the place of the old one.
        device: cpu or cuda.
    """
    try:
        lessons, written = teach_checkpoint(
            ckpt_path, good_images, known_defects or (), known_good or (), region, force, output, device
        )
    except LostDefectError as error:
        _print_lessons(error.lessons)
        raise
    _print_lessons(lessons)
    print(f"Saved in {written}. Exports made before do not know of it: export again.")


def _print_lessons(lessons: Sequence[Lesson]) -> None:
    """Print how the scores of images changed."""
    print("before   after            image")
    for lesson in sorted(lessons, key=lambda one: (one.role, -one.before)):
        mark = "flagged" if lesson.after > THRESHOLD else "passed"
        print(f" {lesson.before:.3f}   {lesson.after:.3f}  {mark:7}  {lesson.role:9}  {lesson.path}")
    for role in dict.fromkeys(lesson.role for lesson in lessons):
        chosen = [lesson for lesson in lessons if lesson.role == role]
        before, after = (
            sum(score > THRESHOLD for score in scores)
            for scores in zip(*[(lesson.before, lesson.after) for lesson in chosen], strict=True)
        )
        print(f"Of {len(chosen)} image(s) {role}, {before} were flagged before, {after} are now.")


def threshold(model_path: str, image: float = 0.5, pixel: float = 0.5, output: str | None = None) -> None:
    """Move the thresholds of an exported model (OpenVINO, ONNX), without exporting it again.

    What has the given score now is at 0.5 afterwards, where the threshold is. Above 0.5 less is flagged, below more.

    Args:
        model_path: model.xml or model.onnx of an export.
        image: Score above which images are to be flagged, as the model gives it now.
        pixel: The same for pixels.
        output: Where to save the changed model; by default in the place of the old one.
    """
    written = set_export_thresholds(model_path, image, pixel, output)
    print(f"What scored {image:g} (images) and {pixel:g} (pixels) is at the threshold of 0.5 now. Saved in {written}.")


def undo(ckpt_path: str, output: str | None = None) -> None:
    """Take the latest change of a checkpoint (teach, calibrate, mask) back: every number is as before.

    Args:
        ckpt_path: Checkpoint.
        output: Where to save it; by default in the same place.
    """
    edit = undo_edit(ckpt_path, output)
    print(f"Taken back: {edit['what']} of {edit['when']}. Saved in {output or ckpt_path}.")


def main() -> None:
    """Run the command."""
    try:
        jsonargparse.CLI(
            [report, explain, mask, calibrate, teach, undo, drift, threshold],
            prog="anomalib-pedenet",
            as_positional=False,
        )
    except (ImportError, NotImplementedError, OSError, RuntimeError, ValueError) as error:
        sys.exit(f"anomalib-pedenet: {error}")


if __name__ == "__main__":
    main()
