# Copyright (C) 2026 The anomalib-pedenet authors
# SPDX-License-Identifier: Apache-2.0

"""What is refused of the images that anomalib's data modules deliver, by the names of their files.

Reading is anomalib's: Pillow opens a file and converts it to 8-bit RGB. Here is only what that loses or leaves unsaid.
"""

import contextlib
import logging
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from anomalib.data import Batch
from anomalib.data.utils import read_image, read_mask
from lightning.pytorch import Callback, LightningModule, Trainer
from PIL import Image
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader
from torchvision.transforms.v2.functional import resize

logger = logging.getLogger(__name__)

_NUM_NAMED = 5


# Interpolation may leave 0..1 by a little; 0..255, and images that have been normalised already, by far.
_LEAST_VALUE, _GREATEST_VALUE = -0.5, 1.5


def check_images(images: torch.Tensor) -> None:
    """Check that a model is called on images as it expects them.

    Args:
        images (torch.Tensor): What it is called on.

    Raises:
        ValueError: If they are not ``[B, 3, H, W]``, floating point, from 0 to 1; the message says what to do.
    """
    shape = tuple(images.shape)
    wanted = f"Pedenet scores RGB images [B, 3, H, W], floating point, from 0 to 1, but got {images.dtype} {shape}"
    if images.ndim == 3:
        msg = f"{wanted}: give a single image as image[None]."
    elif images.ndim != 4:
        msg = f"{wanted}: give a batch of images."
    elif images.shape[1] == 1:
        msg = f"{wanted}: give a grey image three times, as image.expand(-1, 3, -1, -1)."
    elif images.shape[1] == 4:
        msg = f"{wanted}: leave the alpha channel out, as image[:, :3]."
    elif images.shape[1] != 3:
        msg = f"{wanted}: the second dimension must be the three colours."
    elif not images.is_floating_point():
        msg = f"{wanted}: convert them, as image / 255 for 8 bits."
    elif images.numel() and not (images.amin() >= _LEAST_VALUE and images.amax() <= _GREATEST_VALUE):
        values = f"{float(images.amin()):.3g} to {float(images.amax()):.3g}"
        msg = f"{wanted} with values from {values}: give them as read, divided by 255 for 8 bits, and not normalised."
    else:
        return
    raise ValueError(msg)


def check_finite(batch: Batch) -> None:
    """Check that a batch's images are finite.

    Args:
        batch (Batch): Batch of images.

    Raises:
        ValueError: If an image holds NaN or infinite values; the message names the files.
    """
    is_finite = torch.isfinite(batch.image).flatten(1).all(dim=1)
    if bool(is_finite.all()):
        return
    positions = torch.nonzero(~is_finite).flatten().tolist()
    msg = (
        f"NaN or infinite pixel values in {_names(batch, positions)}: Pedenet needs finite images. Repair or remove "
        "them, and check the transforms that produce them."
    )
    raise ValueError(msg)


def check_depth(batch: Batch) -> None:
    """Check that reading has not cut off the values of images of one deep channel (16 or 32 bits, or floating point).

    Pillow's conversion to RGB turns all that is above 255 into white, so that a 16-bit image becomes a white one. Files
    whose values fit, and data sets with a reader of their own, are not refused.

    Args:
        batch (Batch): Batch of images as the data set delivers them, in 0..1; resized they may be.

    Raises:
        ValueError: If an image was cut off; the message names the file.
    """
    for image, path in zip(batch.image, getattr(batch, "image_path", None) or (), strict=False):
        try:
            with Image.open(path) as file:
                if not file.mode.startswith(("I", "F")):
                    continue
                values = np.asarray(file)
                is_whole = np.array_equal(values, np.asarray(file.convert("L")))
        except OSError:  # not a file, or of a format that only the data set can read
            continue
        # Data modules resize what they have read; a data set with a reader of its own delivers other values.
        if not is_whole and torch.allclose(
            image.cpu(), resize(read_image(path, as_tensor=True), list(image.shape[-2:])), atol=1e-2
        ):
            msg = (
                f"{path} has values from {values.min()} to {values.max()}, which anomalib reads as 8 bits: all above "
                "255 become white, all below 1 black. Save it with 8 bits, scaled like all other images."
            )
            raise ValueError(msg)


@contextlib.contextmanager
def naming_files(batch: Batch) -> Iterator[None]:
    """Append the names of a batch's files to what is refused about its images.

    Args:
        batch (Batch): The batch that is worked on.

    Raises:
        ValueError: As the body does.
    """
    try:
        yield
    except ValueError as error:
        msg = f"{error} (Files: {_names(batch, range(len(batch.image)))}.)"
        raise ValueError(msg) from error


def _names(batch: Batch, positions: Iterable[int]) -> str:
    """Return the files of images in a batch, or their positions if the files are not known."""
    paths = getattr(batch, "image_path", None)
    return _listed([str(paths[position]) if paths else f"image {position} of the batch" for position in positions])


def _listed(names: list[str]) -> str:
    """Return names as text, the first ones only if there are many."""
    more = [f"{len(names) - _NUM_NAMED} more"] if len(names) > _NUM_NAMED else []
    return ", ".join([*names[:_NUM_NAMED], *more])


class InputFiles(Callback):
    """Names the files at fault, in training and in testing.

    Batches are checked before the pre-processor's callback has changed them. Of an image that is cut short Pillow says
    so, but not which one it is: those files are looked for when the training or test has ended, so that nothing is read
    twice where nothing is wrong.
    """

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int) -> None:
        """Check a batch as it was read; see :func:`check_depth`."""
        del trainer, pl_module, batch_idx
        check_depth(batch)

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Check a batch as it was read; see :func:`check_depth`."""
        del trainer, pl_module, batch_idx, dataloader_idx
        check_depth(batch)

    on_test_batch_start = on_validation_batch_start
    on_predict_batch_start = on_validation_batch_start

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Put the names of all unreadable files of the data at hand into the message of an exception.

        Args:
            trainer (Trainer): Trainer with the data.
            pl_module (LightningModule): Unused.
            exception (BaseException): What ended the training or test.
        """
        del pl_module
        # What the system reports (no such file, no space left) has a number, and names the file.
        is_of_reading = isinstance(exception, OSError | SyntaxError) and getattr(exception, "errno", None) is None
        if not is_of_reading and not isinstance(exception, Image.DecompressionBombError):
            return
        logger.info("An image cannot be read. Looking for all such files.")
        reasons = [f"{path} ({reason})" for path, reason in _unreadable(_datasets(trainer))]
        if reasons:
            # The exception itself is the host's to raise; its type stays.
            exception.args = (
                f"Cannot read {_listed(reasons)}: copy the files again, or remove them from the data set.",
            )


def _datasets(trainer: Trainer) -> Iterator[Any]:
    """Yield the data sets that a trainer reads from."""
    names = ("train_dataloader", "val_dataloaders", "test_dataloaders", "predict_dataloaders")
    for loader in tree_leaves([getattr(trainer, name) for name in names]):
        if isinstance(loader, DataLoader):
            yield loader.dataset


def _unreadable(datasets: Iterable[Any]) -> Iterator[tuple[str, str]]:
    """Yield the files of anomalib's data sets that cannot be read, and why."""
    readers: dict[str, Callable[..., Any]] = {}
    for dataset in datasets:
        samples = getattr(dataset, "samples", None)
        images = getattr(dataset, "image_filenames", ()) if samples is None else samples["image_path"]
        masks = () if samples is None else samples["mask_path"]
        readers |= {str(path): read_image for path in images}
        readers |= {str(path): read_mask for path in masks if isinstance(path, str) and Path(path).is_file()}
    for path, read in readers.items():
        reason = _failure(read, path)
        if reason is not None:
            yield path, reason


def _failure(read: Callable[..., Any], path: str) -> str | None:
    """Return why a file cannot be read, or ``None`` if it can."""
    try:
        read(path)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        return str(error)
    return None
