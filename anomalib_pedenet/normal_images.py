# Copyright (C) 2026 The anomalib-pedenet authors
# SPDX-License-Identifier: Apache-2.0

"""The normal training images, read in order: for statistics, the memory bank, calibration and validation."""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from anomalib.data import Batch
from anomalib.pre_processing import PreProcessor
from torch.utils.data import DataLoader, Subset

from anomalib_pedenet.input_files import check_depth, check_finite

# In units of normalised images, where a grey level of 8-bit images is 0.017.
_LEAST_CONTRAST = 0.005


def spread(count: int, limit: int) -> list[int]:
    """Return at most ``limit`` positions, evenly spread over ``count``."""
    return torch.linspace(0, count - 1, min(count, limit)).long().tolist()


def are_plain(images: torch.Tensor) -> bool:
    """Return whether every one of the images ``[B, C, H, W]`` is of one colour, which makes all patches identical."""
    return float((images.amax(dim=(2, 3)) - images.amin(dim=(2, 3))).max()) < _LEAST_CONTRAST


@dataclass(frozen=True)
class HeldBack:
    """Training images that are held back.

    Attributes:
        trained_on (list[int]): Positions in the data set of all the others.
        paths (frozenset[str]): Files of those held back.
        normal (torch.Tensor): They themselves, pre-processed, ``[N, 3, H, W]``.
    """

    trained_on: list[int]
    paths: frozenset[str]
    normal: torch.Tensor

    def trainable(self, batch: Batch) -> list[int]:
        """Return the positions in a batch of the images that are not held back."""
        return [position for position, path in enumerate(batch.image_path) if str(path) not in self.paths]


class NormalImages:
    """The pre-processed training images, one by one and in order, on a device.

    Args:
        loader (DataLoader): The training loader.
        pre_processor (PreProcessor | None): Pre-processor, whose transform is applied.
        device (torch.device): Device of the images.
        indices (Sequence[int]): Positions in the data set of the images to take.
        with_augmentations (bool): Whether the data set's augmentations are applied. Defaults to ``False``.
    """

    def __init__(
        self,
        loader: DataLoader,
        pre_processor: PreProcessor | None,
        device: torch.device,
        indices: Sequence[int],
        with_augmentations: bool = False,
    ) -> None:
        self._arguments = (loader, pre_processor, device)
        self._indices, self._with_augmentations = indices, with_augmentations
        dataset = copy.copy(loader.dataset)  # the training goes on with the loader's own
        if hasattr(dataset, "augmentations") and not with_augmentations:
            dataset.augmentations = None
        self.loader = DataLoader(
            Subset(dataset, indices),
            batch_size=1,
            collate_fn=loader.collate_fn,
            generator=torch.Generator(),  # else each pass would draw a seed from the training's generator
        )
        self.transform = getattr(pre_processor, "transform", None)
        self.device = device
        self.paths: list[str] = []
        """Files of the images that the latest iteration has yielded, as far as they are known."""

    def __len__(self) -> int:
        return len(self.loader)

    def take(self, positions: Sequence[int]) -> "NormalImages":
        """Return some of them, by their positions among these."""
        indices = [self._indices[position] for position in positions]
        return NormalImages(*self._arguments, indices, self._with_augmentations)

    def together(self) -> torch.Tensor:
        """Return all of them, ``[N, 3, H, W]``.

        Raises:
            ValueError: If they differ in size; the message names two of them.
        """
        images = list(self)
        sizes = [f"{image.shape[-2]}x{image.shape[-1]} px" for image in images]
        for position, size in enumerate(sizes):
            if size != sizes[0]:
                first, other = (self.paths[index] if self.paths else f"image {index}" for index in (0, position))
                msg = (
                    f"Training images differ in size after pre-processing ({first} is {sizes[0]}, {other} {size}): use "
                    "the default pre_processor, which resizes them to image_size, or bring them to one size."
                )
                raise ValueError(msg)
        return torch.cat(images)

    def __iter__(self) -> Iterator[torch.Tensor]:
        self.paths = []
        for batch in self.loader:
            check_depth(batch)
            check_finite(batch)
            self.paths += [str(path) for path in getattr(batch, "image_path", None) or ()]
            images = batch.image.to(self.device)
            yield images if self.transform is None else self.transform(images)
