# Copyright (C) 2026 The anomalib-pedenet authors
# SPDX-License-Identifier: Apache-2.0

"""The normal training images, read in order: for statistics, the memory bank, calibration and validation."""

import copy
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from anomalib.pre_processing import PreProcessor
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader, Subset

from anomalib_pedenet.data.input_files import check_depth, check_finite
from anomalib_pedenet.region import image_size_of

MIN_TRAINING_IMAGES = 2
"""A training needs one image; what varies between good parts can be seen from two, and learned from more."""

# Of large images fewer are read together, so that neither they nor what is computed of them fill the memory.
_SAMPLE_BYTES = 2**28

# In units of normalised images, where a grey level of 8-bit images is 0.017.
_LEAST_CONTRAST = 0.005


def spread(count: int, limit: int) -> list[int]:
    """Return at most ``limit`` positions, evenly spread over ``count``."""
    return torch.linspace(0, count - 1, min(count, limit)).long().tolist()


def are_plain(images: torch.Tensor) -> bool:
    """Return whether every one of the images ``[B, C, H, W]`` is of one colour, which makes all patches identical."""
    return float((images.amax(dim=(2, 3)) - images.amin(dim=(2, 3))).max()) < _LEAST_CONTRAST


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


class TrainingSet:
    """The training images of a Trainer, in its training and outside of it.

    Args:
        trainer (Trainer): Trainer with a data module or a training loader.
        pre_processor (PreProcessor | None): Pre-processor, whose transform is applied.
        device (torch.device): Device of the images.
        needed_for (Sequence[str]): Arguments for which a loaded model's memory bank has to be built anew, for the error
            if there are no images. Defaults to none.

    Raises:
        RuntimeError: If there are none.
    """

    def __init__(
        self,
        trainer: Trainer,
        pre_processor: PreProcessor | None,
        device: torch.device,
        needed_for: Sequence[str] = (),
    ) -> None:
        loader = trainer.train_dataloader
        datamodule = getattr(trainer, "datamodule", None)
        if loader is None and datamodule is not None and getattr(datamodule, "train_data", None) is not None:
            loader = datamodule.train_dataloader()
        if loader is None:
            names = ", ".join(needed_for) or "weights"
            msg = (
                f"The memory bank has to be built, since the checkpoint has another {names}, but there are no training "
                f"images: pass the data module of the training, or keep the checkpoint's {names}."
            )
            raise RuntimeError(msg)
        self._loader: DataLoader = loader
        self._pre_processor, self._device = pre_processor, device

    def __len__(self) -> int:
        return len(self._loader.dataset)

    @property
    def paths(self) -> list[str]:
        """Their files in order, as far as the data set tells them; else none."""
        samples: Any = getattr(self._loader.dataset, "samples", None)
        return [] if samples is None else [str(path) for path in samples["image_path"]]

    def positions(self, paths: Sequence[str | None]) -> list[int] | None:
        """Return where files stand in the training set, or ``None`` if that is not known."""
        known = {path: position for position, path in enumerate(self.paths)}
        positions = [known.get(path or "", -1) for path in paths]
        return None if -1 in positions else positions

    def size_of_first(self) -> tuple[int, int]:
        """Return height and width of the first image: of its file, or as the data set delivers it."""
        paths = self.paths
        if paths:
            return image_size_of(Path(paths[0]))
        (batch,) = self.images([0]).loader
        return batch.image.shape[-2], batch.image.shape[-1]

    def images(self, indices: Sequence[int], with_augmentations: bool = False) -> NormalImages:
        """Return pre-processed images, to be read one by one; see :class:`NormalImages`."""
        return NormalImages(self._loader, self._pre_processor, self._device, indices, with_augmentations)

    def sample(self, indices: Sequence[int], limit: int) -> torch.Tensor:
        """Return at most ``limit`` pre-processed images ``[N, 3, H, W]`` from all over those at ``indices``."""
        chosen = spread(len(indices), self.num_together(limit))
        return self.images([indices[position] for position in chosen]).together()

    def num_together(self, limit: int) -> int:
        """Return how many images, at most ``limit``, may be in memory together; at least two, or all."""
        (image,) = self.images([0])
        return max(MIN_TRAINING_IMAGES, min(limit, _SAMPLE_BYTES // image.nbytes))
