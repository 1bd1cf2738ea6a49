# Copyright (C) 2026 The anomalib-pedenet authors
# SPDX-License-Identifier: Apache-2.0

"""Probabilistic principal component analysis of each place: how patches vary there, in a few directions.

Where parts are aligned, each place of the image has patches of its own. PaDiM describes them by a Gaussian with a full
covariance, which takes many images, and 16 kB for each place of 64 dimensions. But at a place patches vary in few
ways: an edge lies a little to the left, a face is a little darker. So each place has its mean, the few directions in
which it varies most, and one variance for all others, in a thirteenth of the bytes.

Reference:
    M. Tipping, C. Bishop, "Probabilistic principal component analysis", Journal of the Royal Statistical Society B 61
    (3), 1999, section 3.2. T. Defard et al., "PaDiM", ICPR Workshops 2021, https://arxiv.org/abs/2011.08785, Eq. 2.
"""

import math

import torch
from torch.nn.functional import pad

from anomalib_pedenet.scorers.base import PlaceScorer
from anomalib_pedenet.scorers.density import whiten
from anomalib_pedenet.scorers.gaussian_mixture import neighbor_groups
from anomalib_pedenet.scorers.nearest_neighbor import append_norms, append_ones, to_distances

# Directions that each place has.
_DIRECTIONS = 4
# Covariances are estimated for about so many blocks of neighbouring places at most: 34 MB for 64 dimensions.
_MOST_BLOCKS = 1_024
# Part of the mean covariance of all places in that of each: where nothing varied, noise would look abnormal. It is
# larger if there are few images, and one of two if there are so many.
_SHRINKAGE, _HALF_SHRUNK = 0.3, 12
# Blocks that vary by less than this fraction of the most varied one do not count in the mean covariance.
_NO_VARIANCE = 1e-6
# Least variance, as a fraction of the mean one, and as a number.
_LEAST_VARIANCE, _TINY_VARIANCE = 1e-3, 1e-6

_TAUGHT = 128  # rows that a teaching adds at most
_LESSONS = 16  # so many taught images count as much as all that were fitted
_CHUNK = 4_096  # rows whose products with themselves are in memory: 67 MB


class ProbabilisticPcaScorer(PlaceScorer):
    """Mahalanobis distance to the normal embeddings of the same place, whose covariance has few directions.

    In units of the mean covariance of all places, that of a place is ``V diag(lambda) V^T + noise (1 - V V^T)``. Means
    and covariances are gathered as sums, in float64, so that memory does not grow with the number of images. In large
    images a block of neighbouring places shares a covariance.

    Args:
        embedding_dim (int): Dimension Z of the embeddings. Defaults to ``64``.
        seed (int): Unused by the fit, where nothing is random; of the groups that a teaching makes. Defaults to ``0``.
    """

    unit: torch.Tensor
    means: torch.Tensor
    directions: torch.Tensor
    scales: torch.Tensor
    noise_scales: torch.Tensor
    blocks: torch.Tensor
    taught: torch.Tensor
    num_images: torch.Tensor

    def __init__(self, embedding_dim: int = 64, seed: int = 0) -> None:
        super().__init__(embedding_dim, seed)
        count = min(_DIRECTIONS, embedding_dim)
        self.register_buffer("unit", torch.eye(embedding_dim))  # U: makes the mean covariance of all places 1, [Z, Z]
        self.register_buffer("means", torch.zeros(0, 0, embedding_dim))  # [h, w, Z]
        # Of each block: V^T, [G, r, Z]; the standard deviations along it, inverted, [G, r]; and that of the rest, [G].
        self.register_buffer("directions", torch.zeros(0, count, embedding_dim))
        self.register_buffer("scales", torch.zeros(0, count))
        self.register_buffer("noise_scales", torch.zeros(0))
        self.register_buffer("blocks", torch.zeros(0, 0, dtype=torch.long))  # of each place, [h, w]
        self.register_buffer("taught", torch.zeros(0, embedding_dim))  # U z of what is normal anywhere, [T, Z]
        self.register_buffer("num_images", torch.zeros((), dtype=torch.long))  # 0 where that is not known
        self._moments: _BlockMoments | None = None  # of the fit under way

    @property
    def _fitted(self) -> torch.Tensor:
        return self.means

    def _reset(self) -> None:
        self._moments = None

    def _update(self, embeddings: torch.Tensor) -> None:
        if self._moments is None:
            self._moments = _BlockMoments(embeddings)
        self._moments.update(embeddings)

    def _finalize(self) -> torch.Tensor:
        if self._moments is None:
            msg = "There is nothing to be fitted on."
            raise RuntimeError(msg)
        means, covariances, sizes = self._moments.estimate()
        blocks, count = self._moments.blocks, self._moments.count
        self._moments = None
        traces = covariances.diagonal(dim1=1, dim2=2).sum(dim=1)
        sizes = sizes * (traces > _NO_VARIANCE * traces.max())  # what is hidden does not vary
        shares = sizes / sizes.sum().clamp(min=1)
        pooled = torch.einsum("g,gyz->yz", shares, covariances)
        (unit,) = whiten(pooled[None], _LEAST_VARIANCE * float(pooled.diagonal().mean()) + _TINY_VARIANCE)
        found, vectors = torch.linalg.eigh(unit @ covariances @ unit.T)  # ascending
        shrinkage = _shrinkage(count)
        variances = (1 - shrinkage) * found + shrinkage
        kept = self.directions.shape[1]
        self.unit, self.means = unit.to(self.unit), means.to(self.unit)
        parts = (part.to(self.unit) for part in self._describe(variances, vectors))
        self.directions, self.scales, self.noise_scales = parts
        self.blocks, self.num_images = blocks, torch.tensor(count).to(blocks)
        self.taught = self.unit.new_zeros(0, self.embedding_dim)
        squared = (found[:, -kept:] / variances[:, -kept:]).sum(dim=1) + found[:, :-kept].sum(dim=1) / self._noise(
            variances
        )
        return (shares * squared).sum().clamp(min=0).sqrt()

    def _describe(
        self, variances: torch.Tensor, vectors: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return ``directions``, ``scales`` and ``noise_scales`` of blocks.

        Args:
            variances (torch.Tensor): In all directions, ascending, ``[G, Z]``.
            vectors (torch.Tensor): Those directions, ``[G, Z, Z]``, one a column.
        """
        kept = self.directions.shape[1]
        directions = vectors[..., -kept:].transpose(1, 2).contiguous()
        return directions, variances[:, -kept:].rsqrt(), self._noise(variances).rsqrt()

    def _noise(self, variances: torch.Tensor) -> torch.Tensor:
        """Return the variance beyond the directions ``[G]`` of blocks with variances ``[G, Z]``, ascending."""
        kept = self.directions.shape[1]
        return variances[:, :-kept].mean(dim=1) if kept < self.embedding_dim else variances[:, 0]

    def _distances(self, embeddings: torch.Tensor) -> torch.Tensor:
        centered = (embeddings - self.means) @ self.unit.T
        rest, parts = centered, []
        for direction, scale in zip(self.directions.unbind(dim=1), self.scales.unbind(dim=1), strict=True):
            direction_here = _of_places(direction, self.blocks)  # [h, w, Z]
            along = (centered * direction_here).sum(dim=-1)  # [B, h, w]
            rest = rest - along[..., None] * direction_here
            parts.append(along * _of_places(scale, self.blocks))
        rest = rest * _of_places(self.noise_scales, self.blocks)[..., None]
        squared = torch.stack(parts).square().sum(dim=0) + rest.square().sum(dim=-1)
        if len(self.taught):
            squared = torch.minimum(squared, self._from_taught(embeddings @ self.unit.T))
        return squared.sqrt()

    def _from_taught(self, units: torch.Tensor) -> torch.Tensor:
        """Return squared distances ``[B, h, w]`` of embeddings, in units, to what was taught, none below typical."""
        products = append_ones(units) @ append_norms(self.taught).T  # [B, h, w, T]
        return to_distances(units, products.amax(dim=-1)).square() + self.typical_score.square()

    def teach(
        self, embeddings: torch.Tensor, places: torch.Tensor | None = None, flagged: torch.Tensor | None = None
    ) -> None:
        """Take further embeddings for normal: at their places, and what is flagged wherever in the image it lies.

        A place learns from them as if they had been fitted, though each counts as a sixteenth of the fitted images, so
        that one makes a difference beside hundreds. What looks like something flagged has the distance to the nearest
        of 128 rows at most, the centers of all that is flagged, by the mean covariance of all places, if that is less:
        at a row it is as that of a typical normal patch.

        Args:
            embeddings (torch.Tensor): Embeddings ``[N, Z]``, one or more.
            places (torch.Tensor | None): See :meth:`Scorer.teach`. Defaults to ``None``: no place learns from them.
            flagged (torch.Tensor | None): Likewise. Defaults to ``None``, all.
        """
        embeddings = embeddings.to(self.unit)
        anywhere = embeddings if flagged is None else embeddings[flagged]
        if len(anywhere):
            groups = neighbor_groups(anywhere @ self.unit.T, _TAUGHT, self.seed)
            self.taught = torch.cat([self.taught, *[members.mean(dim=0, keepdim=True) for members in groups]])
        if places is not None and self.num_images > 0:
            self._learn_at_places(embeddings, places)

    def _learn_at_places(self, embeddings: torch.Tensor, places: torch.Tensor) -> None:
        """Update the means of places, and the covariances of their blocks, by embeddings ``[N, Z]``."""
        images = int(self.num_images)
        weight, shrinkage = max(1.0, images / _LESSONS), _shrinkage(images)
        place = places[:, 0] * self.blocks.shape[1] + places[:, 1]
        chosen, position, counts = place.unique(return_inverse=True, return_counts=True)  # [P], [N], [P]
        means = self.means.flatten(0, 1)
        deviations = embeddings - means[place]
        total = images + weight * counts[:, None]
        shifts = torch.zeros_like(means[chosen]).index_add_(0, position, weight * deviations) / total
        blocks, block = self.blocks.flatten()[chosen].unique(return_inverse=True)  # [G], [P]
        # The scatter of each block about the new means: of what was fitted, and of what is taught.
        fitted = max(1, images - 1) * torch.bincount(self.blocks.flatten())[blocks].to(means)
        added = torch.zeros_like(fitted).index_add_(0, block, weight * counts.to(means))
        scatters = fitted[:, None, None] * self._covariances(blocks, shrinkage)
        for rows, owners in zip((deviations @ self.unit.T).split(_CHUNK), block[position].split(_CHUNK), strict=True):
            scatters.index_add_(0, owners, weight * rows[:, :, None] * rows[:, None])
        units = shifts @ self.unit.T
        scatters.index_add_(0, block, -total[:, :, None] * units[:, :, None] * units[:, None])
        found, vectors = torch.linalg.eigh(scatters / (fitted + added)[:, None, None])
        variances = (1 - shrinkage) * found.clamp(min=0) + shrinkage
        self.means = means.index_add(0, chosen, shifts).unflatten(0, self.blocks.shape)
        parts = self._describe(variances, vectors)
        self.directions[blocks], self.scales[blocks], self.noise_scales[blocks] = parts

    def _covariances(self, blocks: torch.Tensor, shrinkage: float) -> torch.Tensor:
        """Return the covariances of some blocks, in units, as far as their directions hold them, ``[G, Z, Z]``."""
        found, rest = (
            (scales[blocks].square().reciprocal() - shrinkage) / (1 - shrinkage)
            for scales in (self.scales, self.noise_scales)
        )
        directions = self.directions[blocks]
        along = directions.transpose(1, 2) @ ((found - rest[:, None])[..., None] * directions)
        return along + rest[:, None, None] * torch.eye(self.embedding_dim).to(along)


def _shrinkage(num_images: int) -> float:
    """Return the part of the mean covariance of all places in that of each."""
    return max(_SHRINKAGE, _HALF_SHRUNK / (_HALF_SHRUNK + num_images))


def _of_places(values: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
    """Return what each place has of the blocks' values ``[G, ...]``, ``[h, w, ...]``."""
    if len(values) != blocks.numel():  # else each place is a block, in their order
        values = values[blocks.flatten()]
    return values.unflatten(0, blocks.shape)


class _BlockMoments:
    """The mean of each place, and the covariance about it of each block of neighbouring places, in float64.

    The sums are taken relative to the first batch's mean, so that nothing cancels where embeddings lie far from 0.

    Args:
        embeddings (torch.Tensor): First batch ``[B, h, w, Z]``, for its size and its mean.
    """

    def __init__(self, embeddings: torch.Tensor) -> None:
        _, height, width, dimension = embeddings.shape
        self._side = math.ceil(math.sqrt(height * width / _MOST_BLOCKS))
        self._across = math.ceil(width / self._side)
        rows, columns = (torch.arange(length).to(embeddings.device) // self._side for length in (height, width))
        self.blocks = rows[:, None] * self._across + columns
        """Block of each place, ``[h, w]``."""
        self._shift = embeddings.double().mean(dim=(0, 1, 2))
        self.count = 0
        self._firsts = self._shift.new_zeros(height, width, dimension)
        self._seconds = self._shift.new_zeros(int(self.blocks.max()) + 1, dimension, dimension)

    def update(self, embeddings: torch.Tensor) -> None:
        """Take in embeddings ``[B, h, w, Z]``."""
        embeddings = embeddings.double() - self._shift
        self.count += len(embeddings)
        self._firsts += embeddings.sum(dim=0)
        self._seconds += self._products(embeddings)

    def _products(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Return the sum over each block of the embeddings' products with themselves, ``[G, Z, Z]``."""
        padding = (0, 0, 0, self._across * self._side - embeddings.shape[2])
        parts = []
        for row in pad(embeddings, padding).split(self._side, dim=1):  # [B, side, across * side, Z]
            together = row.unflatten(2, (self._across, self._side)).permute(2, 0, 1, 3, 4).flatten(1, 3)
            parts.append(together.transpose(1, 2) @ together)  # [across, Z, Z]
        return torch.cat(parts)

    def estimate(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return means ``[h, w, Z]``, unbiased covariances ``[G, Z, Z]``, and the number of places in each, ``[G]``."""
        means = self._firsts / self.count
        sizes = torch.bincount(self.blocks.flatten()).to(means)
        if self.count == 1:  # it says nothing of how places vary; they differ from each other more than images do
            rows = means.flatten(0, 1)
            covariance = torch.cov(rows.T, correction=0)
            return means + self._shift, covariance.expand(len(sizes), -1, -1), sizes
        scatters = self._seconds - self.count * self._products(means[None])
        covariances = scatters / (sizes * (self.count - 1))[:, None, None]
        return means + self._shift, covariances, sizes
