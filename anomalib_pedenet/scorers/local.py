# Copyright (C) 2026 The anomalib-pedenet authors
# SPDX-License-Identifier: Apache-2.0

"""Nearest neighbour among the normal patches of a patch's own place."""

from collections.abc import Iterator
from typing import ClassVar

import torch

from anomalib_pedenet.scorers.base import Scorer
from anomalib_pedenet.scorers.coreset import UniformSubset


class LocalNearestNeighborScorer(Scorer):
    """Distance to the nearest normal embedding from the same place of the image or within a radius of it.

    For aligned parts, whose patches have only the few rivals of their own place: the search is one small product for
    each place. It needs no subset of the patches, but one of the images where there are very many.

    Args:
        embedding_dim (int): Dimension Z of the embeddings. Defaults to ``64``.
        seed (int): Seed of the subset of images. Defaults to ``0``.
        radius (int): How far a normal patch may lie from the place, in patches of the grid (of ``stride`` px), in
            each direction; 0 for the same place only. Search time grows with ``(2 radius + 1)^2``. Defaults to ``0``.
        max_images (int): Largest number of normal images that are kept; beyond it, a uniform subset.
            Defaults to ``256``.

    Raises:
        ValueError: If an argument is outside its range.
    """

    by_place: ClassVar[bool] = True
    bank: torch.Tensor
    half_norms: torch.Tensor
    mean: torch.Tensor

    def __init__(self, embedding_dim: int = 64, seed: int = 0, radius: int = 0, max_images: int = 256) -> None:
        super().__init__(embedding_dim, seed)
        if radius < 0:
            msg = f"radius must be at least 0 patches, got {radius}."
            raise ValueError(msg)
        if max_images < 1:
            msg = f"max_images must be at least 1, got {max_images}."
            raise ValueError(msg)
        self.radius = radius
        self.max_images = max_images
        self.register_buffer("bank", torch.zeros(0, 0, 0, embedding_dim))  # [h, w, N, Z], relative to `mean`
        self.register_buffer("half_norms", torch.zeros(0, 0, 0))  # |b|^2 / 2, [h, w, N]
        self.register_buffer("mean", torch.zeros(embedding_dim))  # [Z]
        self._images = UniformSubset(max_images, seed)
        self._grid: tuple[int, int] | None = None  # of the fit under way

    @property
    def is_fitted(self) -> bool:
        """Whether there are normal images to compare with."""
        return self.bank.shape[0] > 0

    def _reset(self, num_embeddings: int | None = None) -> None:
        del num_embeddings
        self._images = UniformSubset(self.max_images, self.seed)
        self._grid = None

    def _update(self, embeddings: torch.Tensor) -> None:
        grid = (embeddings.shape[1], embeddings.shape[2])
        if self._grid not in (None, grid):
            msg = f"Images of different sizes: grids of {self._grid} and {grid} patches cannot be compared by place."
            raise ValueError(msg)
        self._grid = grid
        self._images.update(embeddings.flatten(1))

    def _finalize(self) -> torch.Tensor:
        grids = self._images.build().to(self.mean).reshape(-1, *(self._grid or (0, 0)), self.embedding_dim)
        self._images = UniformSubset(self.max_images, self.seed)
        self.mean = grids.mean(dim=(0, 1, 2))
        self.bank = (grids - self.mean).permute(1, 2, 0, 3).contiguous()
        self.half_norms = self.bank.square().sum(dim=-1) / 2
        return self._typical_score()

    def forward(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Return each embedding's distance to the nearest normal one of its place.

        Args:
            embeddings (torch.Tensor): Grids ``[B, h, w, Z]``, of the size of those fitted.

        Returns:
            torch.Tensor: Distances ``[B, h, w]`` in embedding units, float32.

        Raises:
            ValueError: If the grid has another size.
        """
        self._check_shape(embeddings)
        check_grid((embeddings.shape[1], embeddings.shape[2]), (self.bank.shape[0], self.bank.shape[1]))
        with torch.autocast(embeddings.device.type, enabled=False):
            queries = (embeddings.to(self.bank.dtype) - self.mean).permute(1, 2, 0, 3)  # [h, w, B, Z]
            similarity = self._similarity(queries)
            squared = queries.square().sum(dim=-1) - 2 * similarity
            return squared.clamp(min=0).sqrt().permute(2, 0, 1)

    def _similarity(self, queries: torch.Tensor, left_out: int | None = None) -> torch.Tensor:
        """Return ``max_b (q.b - |b|^2 / 2)``, ``[h, w, B]``, over the normal patches near each place.

        Args:
            queries (torch.Tensor): Centred queries ``[h, w, B, Z]``.
            left_out (int | None): Normal image that is left out.
        """
        bank, half_norms = self.bank, self.half_norms
        if left_out is not None:
            others = torch.arange(bank.shape[2], device=bank.device) != left_out
            bank, half_norms = bank[:, :, others], half_norms[:, :, others]
        best = torch.matmul(queries, bank.transpose(-1, -2)).sub(half_norms[:, :, None]).amax(dim=-1)
        height, width = bank.shape[:2]
        for row, column in self._shifts():
            # Places whose neighbour at this shift lies in the image, and those neighbours.
            rows, columns = _overlap(height, row), _overlap(width, column)
            theirs = _moved(rows, row), _moved(columns, column)
            similarity = torch.matmul(queries[rows, columns], bank[theirs].transpose(-1, -2))
            similarity = similarity.sub(half_norms[theirs][:, :, None]).amax(dim=-1)
            padding = (0, 0, columns.start, width - columns.stop, rows.start, height - rows.stop)
            best = torch.maximum(best, torch.nn.functional.pad(similarity, padding, value=-torch.inf))
        return best

    def _shifts(self) -> Iterator[tuple[int, int]]:
        """Yield every shift but (0, 0) within the radius and the image."""
        height, width = self.bank.shape[:2]
        down, right = min(self.radius, height - 1), min(self.radius, width - 1)
        for row in range(-down, down + 1):
            for column in range(-right, right + 1):
                if (row, column) != (0, 0):
                    yield row, column

    def _typical_score(self) -> torch.Tensor:
        """Return the mean distance from a normal image's patches to those of the others (not finite for one image)."""
        if self.bank.shape[2] < 2:
            return torch.tensor(torch.nan)
        count = min(self.bank.shape[2], 8)
        total = torch.zeros((), device=self.bank.device)
        for image in torch.linspace(0, self.bank.shape[2] - 1, count).long().tolist():
            queries = self.bank[:, :, image : image + 1]
            squared = queries.square().sum(dim=-1) - 2 * self._similarity(queries, image)
            total += squared.clamp(min=0).sqrt().mean()
        return total / count


def check_grid(grid: tuple[int, int], fitted: tuple[int, int]) -> None:
    """Check that a grid has the size of those that a scorer was fitted on.

    Raises:
        ValueError: If it has not.
    """
    if torch.jit.is_tracing() or torch.compiler.is_compiling() or grid == fitted:
        return
    msg = (
        f"The scorer knows {fitted[0]}x{fitted[1]} places, but the image has {grid[0]}x{grid[1]}: it compares patches "
        "of the same place, so keep the image_size and the stride of the training, or use the scorer 'exact'."
    )
    raise ValueError(msg)


def _overlap(length: int, shift: int) -> slice:
    """Return the positions whose neighbour at ``shift`` lies within ``length`` positions."""
    return slice(max(0, -shift), length - max(0, shift))


def _moved(positions: slice, shift: int) -> slice:
    """Return positions moved by ``shift``."""
    return slice(positions.start + shift, positions.stop + shift)
