# Copyright (C) 2026 The anomalib-pedenet authors
# SPDX-License-Identifier: Apache-2.0

"""The PEDENet model: what scores images, and what it takes from normal images before.

The networks are trained by :mod:`anomalib_pedenet.training`. All else is fitted here on normal images, in this order:
standardisation, calibration, scorers, limit of what is normal. A fitted model can be taught what else is normal.
"""

import math
from collections.abc import Iterable, Mapping, Sequence, Sized

import torch
from torch.nn.functional import max_pool2d

from anomalib_pedenet.anomaly_map import measure_normal
from anomalib_pedenet.dense_embedding import STRIP_PIXELS
from anomalib_pedenet.kinds import (
    ALIGNED,
    AUTO_SCORER,
    NEARLY_ALIGNED,
    Kind,
    aligned_kind,
    share_of_place,
    unaligned_kind,
)
from anomalib_pedenet.patches import BASE_STRIDE
from anomalib_pedenet.scales import weigh
from anomalib_pedenet.scorers import scorer_class
from anomalib_pedenet.scorers.position import WEIGHTS, choose_weight, measure_alignment
from anomalib_pedenet.scoring_model import ScoringModel
from anomalib_pedenet.tiling import to_tiles

# What lies so far from what is normal, in parts of the limit's distance or of the highest one, is taught too.
_SHARE_OF_LIMIT = 0.5


class PedenetModel(ScoringModel):
    """PEDENet: the networks, a scorer for each scale, and the anomaly map; how they are fitted and taught.

    How images are scored, and the arguments, are those of :class:`anomalib_pedenet.scoring_model.ScoringModel`.

    Examples:
        >>> model = PedenetModel(patch_sizes=(64,)).eval()
        >>> model.fit([torch.rand(4, 3, 128, 128)])
        >>> predictions = model(torch.rand(2, 3, 128, 160))
        >>> predictions.pred_score.shape, predictions.anomaly_map.shape
        (torch.Size([2]), torch.Size([2, 1, 128, 160]))
    """

    def reset_choices(self) -> None:
        """Forget what was chosen from the images of an earlier training."""
        self._scale_weights = [1.0] * len(self.scored_sizes)
        self.learned.fill_(math.nan)

    def weigh_scales(self, learned: Mapping[int, float]) -> None:
        """Weigh the scored scales by how much was learned, see :func:`anomalib_pedenet.scales.weigh`.

        Args:
            learned (Mapping[int, float]): For each trained size, from 0, nothing, to 1; empty if that is not known.
        """
        for index, size in enumerate(self.patch_sizes):
            self.learned[index] = learned.get(size, math.nan)
        by_root = self.scorer == AUTO_SCORER or self._is_soft_maximum
        weights = weigh(self.scored_sizes, self.patch_sizes, learned, by_root)
        self._scale_weights = [weights.get(size, 0.0) for size in self.scored_sizes]

    @torch.no_grad()
    def fit_standardization(self, images: torch.Tensor) -> None:
        """Take the mean of each channel and the standard deviation over all channels from normal images.

        Args:
            images (torch.Tensor): Pre-processed normal images ``[B, 3, H, W]``.
        """
        pixels = images[:, :, self.region.pixels((images.shape[-2], images.shape[-1]))]  # [B, 3, P]
        mean = pixels.mean(dim=(0, 2), keepdim=True)
        self.input_mean = mean.to(self.input_mean)[0, :, :, None]
        std = (pixels - mean).square().mean().sqrt()
        self.input_std = std.clamp(min=1e-3).to(self.input_std)  # constant images have none

    @torch.no_grad()
    def fit(self, batches: Iterable[torch.Tensor], stride: int | None = None) -> None:
        """Fit the scorers on normal images, in one pass.

        Args:
            batches (Iterable[torch.Tensor]): Pre-processed normal images ``[B, 3, H, W]``.
            stride (int | None): Distance between the patches taken from them, in pixels. Defaults to the model's, which
                scorers that go ``by_place`` always have.

        Raises:
            ValueError: If there are no images, an embedding is not finite, or the model does not go with a tiler that
                is set.
        """
        self._check_tiler()
        stride = self.stride if self._goes_by_place else stride or self.stride
        for size in set(self.scored_sizes) - set(self.scale_shares):
            self.scorers[str(size)] = self._make_scorer(size)  # without the bank of an earlier fit
        scorers = [self.scorers[str(size)] for size in self.scale_shares]
        for scorer in scorers:
            scorer.reset(0)
        for index, images in enumerate(batches):
            tiles = to_tiles(images, self.tiler)
            for size, grid in self._embed(tiles, stride).items():
                embeddings = self._arrange(grid, size, tiles, stride)
                if not self._goes_by_place:  # as such scorers take whole grids
                    embeddings = embeddings[:, self._shown_patches(tiles.shape[-2:], size, stride)]
                if index == 0:
                    count = len(batches) * embeddings.shape[:-1].numel() if isinstance(batches, Sized) else None
                    self.scorers[str(size)].reset(count)
                self.scorers[str(size)].update(embeddings)
        for scorer in scorers:
            scorer.finalize()

    @torch.no_grad()
    def calibrate(
        self, images: torch.Tensor, stride: int | None = None, learned: Mapping[int, float] | None = None
    ) -> dict[int, float]:
        """Choose what normal images decide: projections, weights of the position and of the scales, and the scorer.

        Weights of the position and the scorer are chosen unless they are given. Call it before :meth:`fit`, with normal
        images from all over the training set: what was fitted before does not go with what is chosen. Tiles have no
        position in the image, so with a tiler the weights chosen are 0, as with scorers that make no use of them.

        Args:
            images (torch.Tensor): Pre-processed normal images ``[B, 3, H, W]``, two or more.
            stride (int | None): Distance between the patches taken from them, in pixels. Defaults to the model's.
            learned (Mapping[int, float] | None): See :meth:`weigh_scales`. ``None`` for what is known from before; if
                nothing is, scales are not weighed.

        Returns:
            dict[int, float]: The weight of the position in use at each scored size.
        """
        stride = stride or self.stride
        chooses = self.scorer == AUTO_SCORER
        if learned is None:  # as when a trained model is fitted again
            known = dict(zip(self.patch_sizes, self.learned.tolist(), strict=True))
            learned = {size: value for size, value in known.items() if not math.isnan(value)}
        if chooses or learned:
            self.weigh_scales(learned)
        tiles = to_tiles(images, self.tiler)
        grids = self._embed(tiles, stride, self.scored_sizes if chooses else None)
        image_size = (tiles.shape[-2], tiles.shape[-1])
        if chooses:
            self._choose_kind(grids, image_size, stride)
        for size in self.scale_shares:
            self._calibrate_scale(size, grids[size], image_size, stride)
        weights = {size: float(self.position_encodings[str(size)].weight) for size in self.scale_shares}
        return weights if scorer_class(self.scorer_in_use).encodes_position else dict.fromkeys(weights, 0.0)

    def _calibrate_scale(self, size: int, grid: torch.Tensor, image_size: tuple[int, int], stride: int) -> None:
        """Fit a scale's projection and whitening, and choose the weight of the position, unless it is given."""
        self._fit_projection(size, grid, image_size, stride)
        grid = self._project(grid, size)
        if self.position_weight == "auto":
            of_scorer = scorer_class(self.scorer_in_use).encodes_position
            has_place = of_scorer if self.kind is None else self.kind.has_place
            weight = choose_weight(self._measure_alignment(grid, size, image_size, stride)) if has_place else 0.0
            self.position_encodings[str(size)].weight.fill_(weight)
        if self.kind is not None and self.kind.is_whitened:
            is_whole = self.tiler is None  # tiles have no place, and a defect may fill one
            self.whitenings[str(size)].fit(
                grid,
                by_place=self.kind.has_means and is_whole,
                is_relative=self.kind.is_relative and is_whole,
                chosen=self._shown_patches(image_size, size, stride),
                kept=self.kind.scored_dimension(grid.shape[1]),
            )

    def _fit_projection(self, size: int, grid: torch.Tensor, image_size: tuple[int, int], stride: int) -> None:
        """Fit the projection of a mid-level scale; trained ones have none."""
        if str(size) in self.projections:
            visible = self._shown_patches(image_size, size, stride)
            self.projections[str(size)].fit(grid[..., visible][:, :, None])  # [N, channels, 1, P]

    def _choose_kind(self, grids: Mapping[int, torch.Tensor], image_size: tuple[int, int], stride: int) -> None:
        """Choose the kind of the images, and with it the scorer, by embeddings ``[N, Z, h, w]`` of the scored sizes."""
        smallest = min(self.patch_sizes)
        size = smallest if smallest in grids else max(grids)
        self._fit_projection(size, grids[size], image_size, stride)
        grid = self._project(grids[size], size)
        kind = self._aligned_kind(grid, size, image_size, stride)
        if kind is None:
            # The edge of what is hidden lies in the same place of all images, whatever they show.
            kind = unaligned_kind(share_of_place(grid, self.region.whole_patches(image_size, size, stride)))
        if kind != self.kind:
            self._use_kind(kind)

    def _aligned_kind(self, grid: torch.Tensor, size: int, image_size: tuple[int, int], stride: int) -> Kind | None:
        """Return the kind of images whose parts are aligned, or nearly; ``None`` if they are not, and of tiles."""
        if self.tiler is not None or self.position_weight == 0:
            return None
        if self.position_weight != "auto":
            return ALIGNED if self.position_weight >= WEIGHTS[-1] else NEARLY_ALIGNED
        alignments = self._measure_alignment(grid, size, image_size, stride)
        return aligned_kind(alignments[-1]) if choose_weight(alignments) > 0 else None

    def _measure_alignment(
        self, grid: torch.Tensor, size: int, image_size: tuple[int, int], stride: int
    ) -> list[float]:
        """Measure the alignment under each weight of the position at a scale, by embeddings ``[N, Z, h, w]``."""
        if self.tiler is not None:
            return [0.0] * len(WEIGHTS[1:])
        # The edge of what is hidden lies in the same place of all images, whatever they show.
        whole = self.region.whole_patches(image_size, size, stride)
        return measure_alignment(grid, image_size, stride, chosen=whole)

    @torch.no_grad()
    def fit_normal_limit(self, images: torch.Tensor) -> None:
        """Take what normal images score: at each scale, for the soft maximum, and the highest, for the limits.

        Scores are to be 0.5 at the limits of what is normal. Call it after :meth:`fit`.

        Args:
            images (torch.Tensor): Pre-processed normal images ``[B, 3, H, W]``.
        """
        scored = [self._score_scales(to_tiles(image, self.tiler)) for image in images.split(1)]
        if self._is_soft_maximum:
            self._fit_soft_maximum([maps for maps, _ in scored])
        joined = (self._join(*scales, images.shape[-2:]) for scales in scored)
        highest = torch.stack([torch.stack([pixels.max(), score.max()]) for pixels, score in joined]).amax(dim=0)
        # All patches of few images are in the bank, at a distance of 0 that says nothing of other images.
        self.normal_limit, self.image_limit = highest.clamp(min=1)

    def _fit_soft_maximum(self, maps: list[list[torch.Tensor]]) -> None:
        """Take what normal images score at each scale, and together, from each one's maps of the scales that count."""
        visible = self.region.pixels((maps[0][0].shape[-2], maps[0][0].shape[-1]))
        for size, scale in zip(self.scale_shares, zip(*maps, strict=True), strict=True):
            index = self.scored_sizes.index(size)
            self.map_offsets[index], self.map_spreads[index] = measure_normal([map_[..., visible] for map_ in scale])
        self.typical_score.fill_(1)
        typical = torch.stack([self.combine(scales)[..., visible].mean() for scales in maps]).mean()
        self.typical_score = typical.clamp(min=1e-6)

    @torch.no_grad()
    def teach(self, images: Iterable[torch.Tensor], limit: float, within: torch.Tensor | None = None) -> dict[int, int]:
        """Take what is abnormal on good images for normal from now on.

        Args:
            images (Iterable[torch.Tensor]): Pre-processed good images ``[B, 3, H, W]``.
            limit (float): Score of a pixel, as :meth:`forward` gives it, above which it is flagged. Patches are taken
                that cover a pixel more than half as far from what is normal, so that others of the kind are not flagged
                either, as far as they score higher than a typical one. Where no pixel is flagged, since an image is so
                by its mean, it is half the distance of the image's highest.
            within (torch.Tensor | None): Where images are good, bool ``[H, W]``. Defaults to ``None``, everywhere.

        Returns:
            dict[int, int]: Number of patches that were taken at each scale; all 0 where none is above a typical one.

        Raises:
            RuntimeError: If the model is not fitted.
            ValueError: If it scores tiles.
            NotImplementedError: If its scorer cannot be taught.
        """
        self.check_is_fitted()
        if self.tiler is not None:
            msg = "A model that scores tiles cannot be taught: train one without tiles."
            raise ValueError(msg)
        for size in self.scale_shares:
            self.scorers[str(size)].check_teachable()
        taught: dict[int, list[tuple[torch.Tensor, ...]]] = {size: [] for size in self.scale_shares}
        for image in (one for batch in images for one in batch.split(1)):
            scores = self(image).anomaly_map
            if within is not None:
                scores = scores * within
            level = scores.max().clamp(max=limit)
            distance = level / (1 - level)
            is_abnormal = (scores > distance / (distance + 1 / _SHARE_OF_LIMIT)).float()
            # In finer steps: on the next image the same thing lies otherwise in the grid of patches.
            is_finer = image.shape[-2:].numel() <= STRIP_PIXELS and not self._goes_by_place
            stride = BASE_STRIDE if is_finer else self.stride
            for size, patches in self.patch_scores(image, stride):
                is_covering = max_pool2d(is_abnormal, size, stride)[:, 0] > 0  # [1, h, w]
                chosen = is_covering & (patches.scores > 1)
                is_flagged = patches.scores[chosen] > distance * self.normal_limit
                taught[size].append((patches.embeddings[chosen], chosen.nonzero()[:, 1:], is_flagged))
        lessons = {size: [torch.cat(parts) for parts in zip(*batches, strict=True)] for size, batches in taught.items()}
        for size, (embeddings, *where) in lessons.items():
            if len(embeddings):
                self.scorers[str(size)].teach(embeddings, *where)
        return {size: len(embeddings) for size, (embeddings, *_) in lessons.items()}

    def _shown_patches(self, size: Sequence[int], patch_size: int, stride: int) -> torch.Tensor:
        """Return which patches of images of some height and width have a part in visible pixels' scores, ``[h, w]``."""
        # A pixel's score is that of its window, which reaches half a step of the map to each side.
        return self.region.patches((size[0], size[1]), patch_size, stride, margin=self.stride // 2)
