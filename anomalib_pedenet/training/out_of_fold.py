# Copyright (C) 2026 The anomalib-pedenet authors
# SPDX-License-Identifier: Apache-2.0

"""Training images, scored as if the model had not been fitted on them."""

import copy
from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from anomalib.data import InferenceBatch
from tqdm import tqdm

from anomalib_pedenet.torch_model import PedenetModel

_PARTS = 4


class ImageSet(Protocol):
    """Pre-processed images ``[1, 3, H, W]`` that are read as they are needed, one by one."""

    def __len__(self) -> int:
        """Return how many there are."""

    def __iter__(self) -> Iterator[torch.Tensor]:
        """Read all of them in order."""

    def take(self, positions: Sequence[int]) -> "ImageSet":
        """Return some of them."""


@torch.no_grad()
def score_out_of_fold(
    model: PedenetModel, images: ImageSet, stride: int | None = None, quiet: bool = False
) -> Iterator[tuple[int, InferenceBatch]]:
    """Score each of the images that a model was fitted on by what is fitted on others.

    In four rounds the scorers are fitted anew on three quarters of the images, with the same networks and calibration,
    and score the rest. The model itself stays as it is.

    Args:
        model (PedenetModel): A fitted model.
        images (ImageSet): The images it was fitted on, two or more.
        stride (int | None): Distance between the patches that it was fitted on, in pixels. Defaults to the model's.
        quiet (bool): Whether no progress is shown. Defaults to ``False``.

    Yields:
        tuple[int, InferenceBatch]: Position of an image, not in order, and what :class:`PedenetModel` gives for it.

    Raises:
        ValueError: If there are fewer than two images.
    """
    count = len(images)
    if count < 2:
        msg = f"To score training images by the others takes two or more, got {count}."
        raise ValueError(msg)
    parts = [range(first, count, _PARTS) for first in range(min(_PARTS, count))]
    label = "Scoring training images by the others"
    with tqdm(total=len(parts) * count, desc=label, disable=True if quiet else None) as progress:
        for part in parts:
            probe = copy.deepcopy(model)
            others = [position for position in range(count) if position not in part]
            probe.fit(_Counted(images.take(others), progress), stride)
            for position, image in zip(part, images.take(part), strict=True):
                yield position, probe(image)
                progress.update()


class _Counted:
    """Images that are counted as they are read."""

    def __init__(self, images: ImageSet, progress: tqdm) -> None:
        self._images, self._progress = images, progress

    def __len__(self) -> int:
        return len(self._images)

    def __iter__(self) -> Iterator[torch.Tensor]:
        for image in self._images:
            self._progress.update()
            yield image
