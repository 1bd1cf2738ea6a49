# Copyright (C) 2026 The anomalib-pedenet authors
# SPDX-License-Identifier: Apache-2.0

"""Training images kept on the training device, so that a step may draw from all that have been decoded so far."""

import torch


class ImagePool:
    """The latest pre-processed images, in half precision, bounded in number and memory.

    A step trains on a few crops, while decoding an image costs more than a step. Each image is decoded seldom, and
    crops are drawn from the whole pool, so that the images of a step are independent, not neighbours in a batch.

    Args:
        max_images (int): Largest number of images, usually that of the training set.
        max_bytes (int): Largest memory of the images. A single batch always has place.

    Example:
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

    def add(self, images: torch.Tensor) -> None:
        """Add a batch, in the place of the oldest images if the pool is full.

        Args:
            images (torch.Tensor): Standardised images ``[B, C, H, W]``. Images of another size than those in the pool
                start a new pool.
        """
        if self._storage is None or self._storage.shape[1:] != images.shape[1:]:
            fitting = min(self.max_images, self.max_bytes // (2 * images[0].numel()))
            # Not written to yet, so memory is taken only as images arrive.
            self._storage = images.new_empty((max(len(images), fitting), *images.shape[1:]), dtype=torch.float16)
            self._num_added = 0
        capacity = len(self._storage)
        places = (self._num_added + torch.arange(len(images), device=images.device)) % capacity
        self._storage[places] = images.to(torch.float16)
        self._num_added += len(images)
