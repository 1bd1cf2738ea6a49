# Copyright (C) 2026 The anomalib-pedenet authors
# SPDX-License-Identifier: Apache-2.0

"""Nearest neighbour among the normal patches of a patch's own place."""

from functools import reduce
from itertools import product

import torch
from torch.nn.functional import pad

from anomalib_pedenet.scorers.base import PlaceScorer
from anomalib_pedenet.scorers.coreset import UniformSubset
from anomalib_pedenet.scorers.nearest_neighbor import append_norms, append_ones, round_bank, to_distances


class LocalNearestNeighborScorer(PlaceScorer):
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

    rows: torch.Tensor
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
        self.register_buffer("rows", torch.zeros(0, 0, 0, embedding_dim + 1))  # b, relative to `mean`, and -|b|^2 / 2
        self.register_buffer("mean", torch.zeros(embedding_dim))  # [Z]
        self._images = UniformSubset(max_images, seed)  # of the fit under way

    @property
    def _fitted(self) -> torch.Tensor:
        return self.rows

    @property
    def bank(self) -> torch.Tensor:
        """The normal embeddings by place, ``[h, w, N, Z]``, relative to their mean."""
        return self.rows[..., : self.embedding_dim]

    def _reset(self) -> None:
        self._images = UniformSubset(self.max_images, self.seed)

    def _update(self, embeddings: torch.Tensor) -> None:
        self._images.update(embeddings.flatten(1))

    def _finalize(self) -> torch.Tensor:
        grids = self._images.build().to(self.mean).reshape(-1, *(self._grid or (0, 0)), self.embedding_dim)
        self._reset()
        self.mean = grids.mean(dim=(0, 1, 2))
        self.rows = append_norms((grids - self.mean).permute(1, 2, 0, 3).contiguous())
        return self._typical_score()

    def round_to_half(self) -> None:
        """Round the embeddings to half precision, so that float16 keeps them, and their distances, as they are."""
        self.mean, self.rows = round_bank(self.bank, self.mean)

    def _distances(self, embeddings: torch.Tensor) -> torch.Tensor:
        queries = (embeddings - self.mean).permute(1, 2, 0, 3)  # [h, w, B, Z]
        return to_distances(queries, self._nearest(queries, self.rows)).permute(2, 0, 1)

    def _nearest(self, queries: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Return ``max_b (q.b - |b|^2 / 2)``, ``[h, w, B]``, over the normal patches near each place.

        Args:
            queries (torch.Tensor): Queries ``[h, w, B, Z]``, relative to the mean.
            rows (torch.Tensor): Rows ``[h, w, N, Z + 1]`` to compare with.
        """
        queries = append_ones(queries, rows.shape[-1] - self.embedding_dim)
        height, width = rows.shape[:2]
        down, right = min(self.radius, height - 1), min(self.radius, width - 1)
        if (down, right) == (0, 0):
            return (queries @ rows.transpose(-1, -2)).amax(dim=-1)
        # The rows of a place are read once, for all the queries around it: reading them takes longest. One line of the
        # grid at a time, because products with many images are large.
        queries = pad(queries, (0, 0, 0, 0, right, right, down, down))
        lines = []
        for line in range(height):
            window = queries[line : line + 2 * down + 1]
            around = torch.stack([window[:, column : column + width] for column in range(2 * right + 1)])
            products = around.permute(2, 0, 1, 3, 4).flatten(1, 3) @ rows[line].transpose(-1, -2)
            lines.append(products.amax(dim=-1).unflatten(1, (2 * right + 1, 2 * down + 1, -1)))
        # [columns, rows, B, h, w]: of the query that lies so many columns and rows from the upper left of a window.
        nearest = pad(torch.stack(lines).permute(2, 3, 4, 0, 1), (right, right, down, down), value=-torch.inf)
        shifts = product(range(2 * right + 1), range(2 * down + 1))
        of_queries = (
            nearest[column, row, :, 2 * down - row :, 2 * right - column :][:, :height, :width]
            for column, row in shifts
        )
        return reduce(torch.maximum, of_queries).permute(1, 2, 0)

    def _typical_score(self) -> torch.Tensor:
        """Return the mean distance from a normal image's patches to those of the others (not finite for one image)."""
        num_images = self.rows.shape[2]
        if num_images < 2:
            return torch.tensor(torch.nan)
        scores = []
        for image in torch.linspace(0, num_images - 1, min(num_images, 8)).long().tolist():
            others = torch.arange(num_images, device=self.rows.device) != image
            queries = self.bank[:, :, image : image + 1]
            scores.append(to_distances(queries, self._nearest(queries, self.rows[:, :, others])).mean())
        return torch.stack(scores).mean()
