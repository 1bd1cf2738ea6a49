# Copyright (C) 2026 The anomalib-pedenet authors
# SPDX-License-Identifier: Apache-2.0

"""Training images kept on the training device, so that a step may draw from all that have been decoded so far."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch


class ImagePool:
    """The latest pre-processed images, in half precision, bounded in number and memory.

    A step trains on a few crops, while decoding an image costs more than a step. Each image is decoded seldom, and
    crops are drawn from the whole pool, so that the images of a step are independent, not neighbours in a batch.

    Args:
        max_images (int): Largest number of images, usually that of the training set.
        max_bytes (int): Largest memory of the images. A single batch always has place.

    Examples:
        >>> pool = ImagePool(max_images=3, max_bytes=2**20)
        >>> pool.add(torch.zeros(2, 3, 64, 64))
        >>> pool.add(torch.ones(2, 3, 64, 64))  # the oldest makes room
        >>> pool.images.shape, int(pool.images.mean(dim=(1, 2, 3)).sum())
        (torch.Size([3, 3, 64, 64]), 2)
    """

    def __init__(self, max_images: int, max_bytes: int) -> None:
        self.max_images = max_images
        self.max_bytes = max_bytes
        self._storage: torch.Tensor | None = None
        self._num_added = 0
        self._sources: list[str | None] = []

    @property
    def images(self) -> torch.Tensor:
        """Images in the pool, float16 ``[N, C, H, W]``.

        Raises:
            RuntimeError: If none has been added.
        """
        if self._storage is None:
            msg = "The pool holds no images yet: add a batch first."
            raise RuntimeError(msg)
        return self._storage[: self._num_added]

    @property
    def sources(self) -> list[str | None]:
        """Where each of :attr:`images` comes from."""
        return list(self._sources)

    def add(self, images: torch.Tensor, sources: Sequence[str] | None = None) -> None:
        """Add a batch, in the place of the oldest images if the pool is full.

        Args:
            images (torch.Tensor): Standardised images ``[B, C, H, W]``. Images of another size than those in the pool
                start a new pool.
            sources (Sequence[str] | None): Where each comes from, to find them again by; ``None`` if unknown.
        """
        storage = self._storage
        if storage is None or storage.shape[1:] != images.shape[1:]:
            fitting = min(self.max_images, self.max_bytes // (2 * images[0].numel()))
            storage = self._start(images, max(len(images), fitting))
        places = [(self._num_added + position) % len(storage) for position in range(len(images))]
        storage[torch.tensor(places, device=images.device)] = images.to(torch.float16)
        self._num_added += len(images)
        known: Sequence[str | None] = sources or [None] * len(images)
        for place, source in zip(places, known, strict=True):
            self._sources[place : place + 1] = [source]  # appends at the end

    def state_dict(self) -> dict[str, Any]:
        """Return what the pool is like but for the pixels and :attr:`sources`, as plain data."""
        capacity = 0 if self._storage is None else len(self._storage)
        return {"limits": [self.max_images, self.max_bytes], "capacity": capacity, "num_added": self._num_added}

    def load_state_dict(self, state: dict[str, Any], images: Iterable[torch.Tensor], sources: Sequence[str]) -> None:
        """Make the pool what it was.

        Args:
            state (dict[str, Any]): What :meth:`state_dict` returned.
            images (Iterable[torch.Tensor]): Standardised images ``[1, C, H, W]`` in the order of :attr:`sources`.
            sources (Sequence[str]): What :attr:`sources` returned.

        Raises:
            ValueError: If the pool had other limits.
        """
        if list(state["limits"]) != [self.max_images, self.max_bytes]:
            msg = f"The pool was bounded to {state['limits']} images and bytes: set the same cache_gib to go on."
            raise ValueError(msg)
        storage: torch.Tensor | None = None
        for place, image in enumerate(images):
            if storage is None:
                storage = self._start(image, state["capacity"])
            storage[place] = image[0].to(torch.float16)
        self._num_added = state["num_added"]
        self._sources = list(sources)

    def _start(self, images: torch.Tensor, capacity: int) -> torch.Tensor:
        """Make an empty pool for images like these, and return its storage."""
        # Not written to yet, so memory is taken only as images arrive.
        self._storage = images.new_empty((capacity, *images.shape[1:]), dtype=torch.float16)
        self._num_added = 0
        self._sources = []
        return self._storage
