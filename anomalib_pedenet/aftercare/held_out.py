# Copyright (C) 2026 The anomalib-pedenet authors
# SPDX-License-Identifier: Apache-2.0

"""Training images, scored as if the model had not been fitted on them."""

import copy
from collections.abc import Iterator, Sequence

import torch
from anomalib.data import InferenceBatch
from tqdm import tqdm

from anomalib_pedenet.aftercare.images import PreparedImages
from anomalib_pedenet.torch_model import PedenetModel

_PARTS = 4


@torch.no_grad()
def score_held_out(
    model: PedenetModel, images: PreparedImages, stride: int | None = None
) -> Iterator[tuple[int, InferenceBatch]]:
    """Score each of the images that a model was fitted on by what is fitted on others.

    In four rounds the scorers are fitted anew on three quarters of the images, with the same networks and calibration,
    and score the rest. The model itself stays as it is.

    Args:
        model (PedenetModel): A fitted model.
        images (PreparedImages): The images it was fitted on, two or more.
        stride (int | None): Distance between the patches that it was fitted on, in pixels. Defaults to the model's.

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
    with tqdm(total=len(parts) * count, desc="Scoring training images by the others", disable=None) as progress:
        for part in parts:
            probe = copy.deepcopy(model)
            others = [position for position in range(count) if position not in part]
            probe.fit(_Counted(images.take(others), progress), stride)
            for position in part:
                yield position, probe(images[position])
                progress.update()


class _Counted(Sequence[torch.Tensor]):
    """Images that are counted as they are read."""

    def __init__(self, images: PreparedImages, progress: tqdm) -> None:
        self._images, self._progress = images, progress

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> torch.Tensor:  # type: ignore[override]
        self._progress.update()
        return self._images[index]

    def __iter__(self) -> Iterator[torch.Tensor]:
        return (self[index] for index in range(len(self)))
