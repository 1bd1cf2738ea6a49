# Copyright (C) 2026 The anomalib-pedenet authors
# SPDX-License-Identifier: Apache-2.0

"""The PEDENet model: images to anomaly maps.

Data flows one way: images -> embeddings (:mod:`anomalib_pedenet.networks`) -> patch scores
(:mod:`anomalib_pedenet.scorers`) -> pixels (:mod:`anomalib_pedenet.anomaly_map`). :meth:`PedenetModel.forward` is the
very graph that is exported.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from typing import Any, Literal, NamedTuple

import torch
from anomalib.data import InferenceBatch
from anomalib.data.utils.tiler import Tiler
from torch import nn
from torch.nn.functional import max_pool2d

from anomalib_pedenet.anomaly_map import Combination, combine_maps, measure_maps, scores_to_map, soft_maximum
from anomalib_pedenet.networks import (
    DefectPredictionNetwork,
    DensityEstimationNetwork,
    LocationPredictionNetwork,
    PatchEmbeddingNetwork,
)
from anomalib_pedenet.patches import BASE_STRIDE, MID_LEVEL_SIZES, PATCH_SIZE, SUB_PATCH_SIZE, grid_size
from anomalib_pedenet.region import RegionOfInterest
from anomalib_pedenet.scorers import Coreset, Scorer, make_scorer, scorer_class
from anomalib_pedenet.scorers.position import PositionEncoding, choose_weight
from anomalib_pedenet.scorers.projection import PrincipalProjection
from anomalib_pedenet.tiling import tile, untile

MIN_SCALE_WEIGHT = 0.2
"""A scale that counts less beside another, which counts 1, is not worth its time."""

SCORED_MID_LEVEL_SIZES = (16, 24)
"""Sides in pixels of the mid-level patches that are scored by default."""

AUTO_SCORER = "auto"
"""The scorer that :meth:`PedenetModel.calibrate` replaces by one of the next two."""

SCORER_BY_PLACE, SCORER_ANYWHERE = "exact", "gaussian_mixture"
"""Scorers where parts are aligned, so that patches are compared with normal ones of their place, and where not."""

# Least spread of normal images' highest scores, as a fraction of that of all their pixels' scores.
_LEAST_SPREAD = 0.05

# A CPU embeds larger images in strips of about so many pixels, whose feature maps take some hundred MiB.
_STRIP_PIXELS = 2**20


def default_scored_sizes(patch_sizes: Sequence[int], scorer: str | Mapping[str, Any] = AUTO_SCORER) -> tuple[int, ...]:
    """Return the scales to score where none are given.

    Args:
        patch_sizes (Sequence[int]): Scales that are trained.
        scorer (str | Mapping[str, Any]): Scorer, see :class:`PedenetModel`. Defaults to ``"auto"``.

    Returns:
        tuple[int, ...]: Mid-level patches and the sub-patches, which between them find fine and coarse defects and of
            which :meth:`PedenetModel.weigh_scales` leaves some out; the paper's patches too where it may turn out that
            they count; and those alone where those alone are trained.
    """
    smallest = min(patch_sizes)
    if smallest != SUB_PATCH_SIZE:
        return (smallest,)
    return (*SCORED_MID_LEVEL_SIZES, *(sorted(patch_sizes) if scorer in (AUTO_SCORER, SCORER_ANYWHERE) else [smallest]))


class PatchScores(NamedTuple):
    """Patches of one scale.

    Attributes:
        embeddings (torch.Tensor): As their scorer takes them, ``[B, h, w, Z]``, or ``Z + 2`` with their place.
        scores (torch.Tensor): In units of a normal patch's typical score, ``[B, h, w]``.
    """

    embeddings: torch.Tensor
    scores: torch.Tensor


class PedenetModel(nn.Module):
    """PEDENet: the networks, a scorer for each scale, and the anomaly map.

    Args:
        patch_sizes (Sequence[int]): Scales that are trained: 64 for the paper's patches, 32 for the sub-patches that
            the small encoder embeds on the way, or both. Defaults to ``(32, 64)``.
        scored_sizes (Sequence[int] | None): Scales that are scored: those of them, and mid-level ones
            (:data:`anomalib_pedenet.patches.MID_LEVEL_SIZES`). Defaults to :func:`default_scored_sizes`.
        stride (int): Distance S between neighbouring patches of a scored image in pixels, a multiple of 2.
            Defaults to ``8``.
        combination (Combination): How the maps of the scales become one: see
            :func:`anomalib_pedenet.anomaly_map.combine_maps`, or ``"auto"`` for
            :func:`anomalib_pedenet.anomaly_map.soft_maximum` with ``gaussian_mixture``, else the product. Defaults to
            ``"auto"``.
        scorer (str | Mapping[str, Any]): Scorer of each scale, see :func:`anomalib_pedenet.scorers.make_scorer`; or
            ``"auto"`` for :data:`SCORER_BY_PLACE` where :meth:`calibrate` finds that parts are aligned, and
            :data:`SCORER_ANYWHERE` elsewhere. Defaults to ``"exact"``.
        bank_size (float): Largest number of rows of each scale's memory bank, for scorers that have one; below 1, as a
            fraction of all embeddings. Defaults to ``5_000``.
        coreset (Coreset): How they are chosen, see :mod:`anomalib_pedenet.scorers.coreset`. Defaults to ``"auto"``.
        embedding_dim (int): Dimension Z of the embeddings. Defaults to ``64``.
        num_components (int): Number K of mixture components of the DE network. Defaults to ``10``.
        seed (int): Seed of the scorers. Defaults to ``0``.
        position_weight (float | Literal["auto"]): Weight of a patch's position in its distance to normal ones, or
            ``"auto"`` to choose it from normal images, see :mod:`anomalib_pedenet.scorers.position`. Defaults to
            ``"auto"``.
        batch_norm (bool): Whether the small encoder has batch normalisation. Defaults to ``True``.
        defect_prediction (bool): Whether there is a network at each scale to be trained on drawn defects.
            Defaults to ``False``.

    Attributes:
        normal_limit (torch.Tensor): Highest score of normal images, in units of a normal patch's typical score, scalar;
            at least 1, and 1 before :meth:`fit_normal_limit`.
        region (RegionOfInterest): What of the images is looked at. What it hides is hidden from all that follows.
        tiler (Tiler | None): Set by anomalib's ``TilerConfigurationCallback`` to score large images tile by tile.

    Example:
        >>> model = PedenetModel(patch_sizes=(64,)).eval()
        >>> model.fit([torch.rand(4, 3, 128, 128)])
        >>> predictions = model(torch.rand(2, 3, 128, 160))
        >>> predictions.pred_score.shape, predictions.anomaly_map.shape
        (torch.Size([2]), torch.Size([2, 1, 128, 160]))
    """

    input_mean: torch.Tensor
    input_std: torch.Tensor
    normal_limit: torch.Tensor
    learned: torch.Tensor
    map_offsets: torch.Tensor
    map_spreads: torch.Tensor
    typical_score: torch.Tensor

    def __init__(
        self,
        patch_sizes: Sequence[int] = (SUB_PATCH_SIZE, PATCH_SIZE),
        scored_sizes: Sequence[int] | None = None,
        stride: int = 8,
        combination: Combination = "auto",
        scorer: str | Mapping[str, Any] = SCORER_BY_PLACE,
        bank_size: float = 5_000,
        coreset: Coreset = "auto",
        embedding_dim: int = 64,
        num_components: int = 10,
        seed: int = 0,
        position_weight: float | Literal["auto"] = "auto",
        batch_norm: bool = True,
        defect_prediction: bool = False,
    ) -> None:
        super().__init__()
        self.patch_sizes = tuple(sorted(patch_sizes))
        self.uses_default_sizes = scored_sizes is None
        self.scored_sizes = tuple(sorted(scored_sizes or default_scored_sizes(patch_sizes, scorer)))
        self.stride = stride
        self.combination = combination
        self.bank_size = bank_size
        self.coreset: Coreset = coreset
        self.seed = seed
        self.position_weight = position_weight
        self.tiler: Tiler | None = None

        # Location prediction learns only from inputs of about unit variance, which ImageNet's statistics give to
        # colourful photographs but not to, say, grey surfaces of low contrast: the training images' own do.
        self.register_buffer("input_mean", torch.zeros(3, 1, 1))
        self.register_buffer("input_std", torch.ones(()))
        self.register_buffer("normal_limit", torch.ones(()))
        # What normal images score at each scale, and together, for the soft maximum.
        self.register_buffer("map_offsets", torch.zeros(len(self.scored_sizes)))
        self.register_buffer("map_spreads", torch.ones(len(self.scored_sizes)))
        self.register_buffer("typical_score", torch.ones(()))
        # What each trained scale has learned, from 0 to 1; NaN where that is not known.
        self.register_buffer("learned", torch.full((len(self.patch_sizes),), math.nan))
        # How much each scored scale counts. Not a buffer, because it decides what is computed, in exported graphs too.
        self._scale_weights = [1.0] * len(self.scored_sizes)
        # A third faster on a CPU, and in bfloat16 twice as fast. From the start, not for training alone, because the
        # other memory format rounds differently: a loaded checkpoint must score exactly as the model that saved it.
        network = PatchEmbeddingNetwork(embedding_dim, batch_norm=batch_norm, patch_sizes=self.patch_sizes)
        self.embedding_network = network.to(memory_format=torch.channels_last)
        self.density_networks = nn.ModuleDict(
            {str(size): DensityEstimationNetwork(num_components, embedding_dim) for size in self.patch_sizes},
        )
        self.location_networks = nn.ModuleDict(
            {str(size): LocationPredictionNetwork(embedding_dim) for size in self.patch_sizes},
        )
        self.defect_networks = nn.ModuleDict(
            {str(size): DefectPredictionNetwork(embedding_dim) for size in self.patch_sizes if defect_prediction},
        )
        self.embedding_dim = embedding_dim
        channels = {size: network.mid_level_channels(size) for size in self.scored_sizes if size in MID_LEVEL_SIZES}
        self.projections = nn.ModuleDict(
            {str(size): PrincipalProjection(count, min(count, embedding_dim)) for size, count in channels.items()},
        )
        self.set_scorer(scorer)
        weight = 0.0 if position_weight == "auto" else position_weight
        self.position_encodings = nn.ModuleDict({str(size): PositionEncoding(weight) for size in self.scored_sizes})
        self.region = RegionOfInterest()

    def set_scorer(self, scorer: str | Mapping[str, Any]) -> None:
        """Take another scorer, not fitted, at every scale.

        Args:
            scorer (str | Mapping[str, Any]): See :func:`anomalib_pedenet.scorers.make_scorer`.

        Raises:
            ValueError: If the scorer is unknown, or has other arguments.
            ImportError: If it needs a library that is not installed.
        """
        self.scorer = scorer
        self._use_scorer(SCORER_ANYWHERE if scorer == AUTO_SCORER else scorer)

    def _use_scorer(self, scorer: str | Mapping[str, Any]) -> None:
        """Take a scorer, not fitted and not to be chosen any more, at every scale."""
        self.scorer_in_use = scorer
        self.scorers = nn.ModuleDict({str(size): self._make_scorer(size) for size in self.scored_sizes})

    def _make_scorer(self, size: int) -> Scorer:
        """Return a scorer, not fitted, for a scale."""
        is_trained = size in self.patch_sizes
        dimension = self.embedding_dim if is_trained else len(self.projections[str(size)].components)
        return make_scorer(
            self.scorer_in_use,
            embedding_dim=dimension + 2 * scorer_class(self.scorer_in_use).encodes_position,
            bank_size=self.bank_size,
            coreset=self.coreset,
            seed=self.seed,
            density_network=self.density_networks[str(size)] if is_trained else None,
        )

    @property
    def is_fitted(self) -> bool:
        """Whether the scorer of every scale that counts has been fitted."""
        return all(self.scorers[str(size)].is_fitted for size in self.scale_shares)

    @property
    def scale_shares(self) -> dict[int, float]:
        """The scored sizes that count, and how much each does."""
        weights = zip(self.scored_sizes, self._scale_weights, strict=True)
        return {size: weight for size, weight in weights if weight > 0}

    def get_extra_state(self) -> torch.Tensor:
        """Return the scales' weights, and 1 if an ``"auto"`` scorer compares by place, else 0, ``[S + 1]``.

        It is a tensor like all else in a checkpoint.
        """
        by_place = float(self.scorer_in_use == SCORER_BY_PLACE)
        return torch.tensor([*self._scale_weights, by_place], dtype=torch.float64)

    def set_extra_state(self, state: torch.Tensor) -> None:
        """Take the scales' weights and the scorer that was chosen from a checkpoint.

        Raises:
            ValueError: If they are those of another number of scales.
        """
        *weights, by_place = state.tolist()
        if len(weights) != len(self.scored_sizes):
            msg = f"The state holds the weights of {len(weights)} scored sizes, but the model has {self.scored_sizes}."
            raise ValueError(msg)
        self._scale_weights = weights
        if self.scorer == AUTO_SCORER:
            # Before their own state is loaded, as that of all parts of a module is after the module's.
            self._use_scorer(SCORER_BY_PLACE if by_place else SCORER_ANYWHERE)

    def reset_choices(self) -> None:
        """Forget what was chosen from the images of an earlier training."""
        self._scale_weights = [1.0] * len(self.scored_sizes)
        self.learned.fill_(math.nan)

    def weigh_scales(self, learned: Mapping[int, float]) -> None:
        """Weigh the scored scales by how much was learned, if there are mid-level ones.

        Where location prediction stays at chance, as on surfaces that look alike everywhere, the embeddings it is asked
        of have lost what they had at the start and gained nothing; what comes before them in the encoder has lost less.
        So a trained scale counts as far as it has learned; in the soft maximum, by the root of that. Mid-level ones
        count 1, but of several in a product the finest counts the less the more the smallest trained scale has learned,
        and not at all from one half on.

        Args:
            learned (Mapping[int, float]): For each trained size, from 0, nothing (location prediction at chance), to 1;
                empty if that is not known, to weigh them alike. Scales that count less than :data:`MIN_SCALE_WEIGHT`
                are left out, and take neither memory nor time.
        """
        for index, size in enumerate(self.patch_sizes):
            self.learned[index] = learned.get(size, math.nan)
        scored = self.scored_sizes
        if self.scorer == AUTO_SCORER and self.uses_default_sizes:
            scored = default_scored_sizes(self.patch_sizes, self.scorer_in_use)
        weights = dict.fromkeys(scored, 1.0)
        if self.projections and learned:
            weights = {size: learned.get(size, 1.0) ** (0.5 if self._is_soft_maximum else 1) for size in scored}
            if len(self.projections) > 1 and not self._is_soft_maximum:
                weights[scored[0]] = max(0.0, 1 - 2 * learned[min(learned)])
        weights = {size: weight if weight >= MIN_SCALE_WEIGHT else 0.0 for size, weight in weights.items()}
        self._scale_weights = [weights.get(size, 0.0) for size in self.scored_sizes]

    @property
    def _is_soft_maximum(self) -> bool:
        return self.combination == "auto" and self.scorer_in_use == SCORER_ANYWHERE

    def check_is_fitted(self) -> None:
        """Check that there is something to score with, a memory bank for instance.

        Raises:
            RuntimeError: If there is not.
        """
        if not self.is_fitted:
            msg = (
                "Pedenet has no memory bank yet, so it can neither score images nor be exported: train it first "
                "(anomalib train), or load a trained checkpoint (--ckpt_path)."
            )
            raise RuntimeError(msg)

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

    def standardize(self, images: torch.Tensor) -> torch.Tensor:
        """Scale pre-processed images to zero mean and unit variance, by the training images' statistics.

        Args:
            images (torch.Tensor): Pre-processed images ``[B, 3, H, W]``.

        Returns:
            torch.Tensor: Standardised images of the same shape, which the embedding network expects; 0 where hidden.
        """
        return (self.region.hide(images, self.input_mean) - self.input_mean) / self.input_std

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
            tiles = self._tile(images)
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
        images from all over the training set. Tiles have no position in the image, so with a tiler the weights chosen
        are 0, as with scorers that make no use of them.

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
        if not chooses and learned:
            self.weigh_scales(learned)
        tiles = self._tile(images)
        grids = self._embed(tiles, stride, self.scored_sizes if chooses else None)
        image_size = (tiles.shape[-2], tiles.shape[-1])
        calibrated = None
        if chooses:
            smallest = min(self.patch_sizes)
            reference = smallest if smallest in self.scored_sizes else max(self.scored_sizes)
            self._calibrate_scale(reference, grids[reference], image_size, stride, SCORER_BY_PLACE)
            is_aligned = float(self.position_encodings[str(reference)].weight) > 0
            chosen = SCORER_BY_PLACE if is_aligned else SCORER_ANYWHERE
            calibrated = reference if is_aligned else None  # for that scorer
            if chosen != self.scorer_in_use:  # else what was fitted before stays in use until the next fit is done
                self._use_scorer(chosen)
            self.weigh_scales(learned)
        for size in self.scale_shares:
            if size == calibrated:
                continue
            self._calibrate_scale(size, grids[size], image_size, stride, self.scorer_in_use)
        weights = {size: float(self.position_encodings[str(size)].weight) for size in self.scale_shares}
        return weights if scorer_class(self.scorer_in_use).encodes_position else dict.fromkeys(weights, 0.0)

    def _calibrate_scale(
        self,
        size: int,
        grid: torch.Tensor,
        image_size: tuple[int, int],
        stride: int,
        scorer: str | Mapping[str, Any],
    ) -> None:
        """Fit the projection of a scale and choose the weight of the position for a scorer, unless it is given."""
        if str(size) in self.projections:
            visible = grid[..., self._shown_patches(image_size, size, stride)]  # [N, channels, P]
            self.projections[str(size)].fit(visible[:, :, None])
        if self.position_weight == "auto":
            weight = 0.0
            if self.tiler is None and scorer_class(scorer).encodes_position:
                # The edge of what is hidden lies in the same place of all images, whatever they show.
                whole = self.region.whole_patches(image_size, size, stride)
                weight = choose_weight(self._project(grid, size), image_size, stride, chosen=whole)
            self.position_encodings[str(size)].weight.fill_(weight)

    @torch.no_grad()
    def fit_normal_limit(self, images: torch.Tensor) -> None:
        """Take what normal images score: at each scale, for the soft maximum, and the highest, for the limit.

        Scores are to be 0.5 at the limit of what is normal. Call it after :meth:`fit`.

        Args:
            images (torch.Tensor): Pre-processed normal images ``[B, 3, H, W]``.
        """
        scored = [self._score_scales(self._tile(image)) for image in images.split(1)]
        if self._is_soft_maximum:
            self._fit_soft_maximum([maps for maps, _ in scored])
        limit = torch.cat([self._join(maps, weights, images.shape[-2:])[1] for maps, weights in scored]).max()
        # All patches of few images are in the bank, at a distance of 0 that says nothing of other images.
        self.normal_limit = limit.clamp(min=1)

    def _fit_soft_maximum(self, maps: list[list[torch.Tensor]]) -> None:
        """Take what normal images score at each scale, and together, from each one's maps of the scales that count."""
        visible = self.region.pixels((maps[0][0].shape[-2], maps[0][0].shape[-1]))
        for size, scale in zip(self.scale_shares, zip(*maps, strict=True), strict=True):
            index = self.scored_sizes.index(size)
            seen = [scores[..., visible] for scores in scale]
            pixels = torch.cat([scores.flatten() for scores in seen])
            highest = torch.stack([scores.max() for scores in seen])
            self.map_offsets[index] = pixels.mean()
            spread = highest.std() if len(highest) > 1 else pixels.std()
            # Few images may be alike in their highest score, by chance or because they are the same.
            self.map_spreads[index] = spread.clamp(min=_LEAST_SPREAD * pixels.std()).clamp(min=1e-6)
        self.typical_score.fill_(1)
        typical = torch.stack([self.combine(scales)[..., visible].mean() for scales in maps]).mean()
        self.typical_score = typical.clamp(min=1e-6)

    @torch.no_grad()
    def teach(self, images: Iterable[torch.Tensor], limit: float, within: torch.Tensor | None = None) -> dict[int, int]:
        """Take what is abnormal on good images for normal from now on.

        Args:
            images (Iterable[torch.Tensor]): Pre-processed good images ``[B, 3, H, W]``.
            limit (float): Score of a pixel, as :meth:`forward` gives it, above which the patches that cover it are
                taken, as far as they score higher than a typical one.
            within (torch.Tensor | None): Where images are good, bool ``[H, W]``. Defaults to ``None``, everywhere.

        Returns:
            dict[int, int]: Number of patches that were taken at each scale; all 0 where nothing scores so high.

        Raises:
            RuntimeError: If the model is not fitted.
            ValueError: If it scores tiles.
            NotImplementedError: If its scorer cannot be taught.
        """
        self.check_is_fitted()
        if self.tiler is not None:
            msg = "A model that scores tiles cannot be taught: turn tiling off."
            raise ValueError(msg)
        for size in self.scale_shares:
            self.scorers[str(size)].check_teachable()
        taught: dict[int, list[torch.Tensor]] = {size: [] for size in self.scale_shares}
        for batch in images:
            found = self(batch).anomaly_map > limit
            is_abnormal = (found if within is None else found & within).float()
            # In finer steps: on the next image the same thing lies otherwise in the grid of patches.
            stride = BASE_STRIDE if batch.shape[-2:].numel() <= _STRIP_PIXELS else self.stride
            for size, patches in self.patch_scores(batch, stride):
                is_covering = max_pool2d(is_abnormal, size, stride)[:, 0] > 0  # [B, h, w]
                taught[size].append(patches.embeddings[is_covering & (patches.scores > 1)])
        rows = {size: torch.cat(parts) for size, parts in taught.items()}
        for size, embeddings in rows.items():
            if len(embeddings):
                self.scorers[str(size)].teach(embeddings)
        return {size: len(embeddings) for size, embeddings in rows.items()}

    def forward(self, images: torch.Tensor) -> InferenceBatch:
        """Score images.

        Args:
            images (torch.Tensor): Pre-processed images ``[B, 3, H, W]``, at least as large as a patch.

        Returns:
            InferenceBatch: ``anomaly_map [B, 1, H, W]``, the mean score of the patches covering each pixel, and
                ``pred_score [B]``, its maximum (times a weight, if the scorer has one for images). Both are
                ``s / (s + normal_limit)``, so from 0 to below 1, and 0.5 for the highest score of normal images. They
                are detached.

        Raises:
            RuntimeError: If the memory bank is empty.
            ValueError: If the images are smaller than a patch, or the model does not go with a tiler that is set.
        """
        self.check_is_fitted()
        if not torch.compiler.is_compiling():  # values of tensors are not known then; anomalib runs the model before
            self._check_tiler()
        with torch.no_grad():
            anomaly_map, pred_score = self._score(images)
            # Within 0..1 in every batch: metrics of torchmetrics take a batch with a score outside for logits.
            return InferenceBatch(
                pred_score=pred_score / (pred_score + self.normal_limit),
                anomaly_map=anomaly_map / (anomaly_map + self.normal_limit),
            )

    def patch_scores(self, images: torch.Tensor, stride: int | None = None) -> Iterator[tuple[int, PatchScores]]:
        """Score all patches of images, scale by scale.

        Args:
            images (torch.Tensor): Pre-processed images ``[B, 3, H, W]``; tiles, where a tiler is set.
            stride (int | None): Distance between neighbouring patches in pixels. Defaults to the model's, which scorers
                that go ``by_place`` always have.

        Yields:
            tuple[int, PatchScores]: Scale, of those that count, and its patches.

        Raises:
            ValueError: If the images are smaller than a patch.
        """
        stride = stride or self.stride
        for size, grid in self._embed(images, stride).items():
            embeddings, scorer = self._arrange(grid, size, images, stride), self.scorers[str(size)]
            yield size, PatchScores(embeddings, scorer(embeddings) / scorer.typical_score)

    def contributions(self, maps: Mapping[int, torch.Tensor]) -> dict[int, torch.Tensor]:
        """Return what each scale adds to the anomaly map, comparable between scales.

        Args:
            maps (Mapping[int, torch.Tensor]): Map of each scale that counts, ``[B, 1, H, W]``.

        Returns:
            dict[int, torch.Tensor]: By scale, of the shape of its map: the exponents of the soft maximum, the
                logarithms of the factors of a product, or the terms of a sum.
        """
        shares = self.scale_shares
        if self._is_soft_maximum:
            measured = measure_maps(list(maps.values()), *self._soft_maximum_state())
            return dict(zip(maps, measured, strict=True))
        if self.combination == "mean":
            return {size: shares[size] * scores for size, scores in maps.items()}
        least = torch.finfo(torch.float32).tiny
        return {size: shares[size] * scores.clamp(min=least).log() for size, scores in maps.items()}

    def _score(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the maps ``[B, 1, H, W]`` and scores ``[B]`` of images, in units of a normal patch's typical score."""
        return self._join(*self._score_scales(self._tile(images)), images.shape[-2:])

    def _join(
        self, maps: list[torch.Tensor], weights: list[torch.Tensor | None], size: Sequence[int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the maps and scores of images of some height and width from what their tiles have at each scale."""
        anomaly_map = self._untile(self.combine(maps), size)
        pred_score = anomaly_map.amax(dim=(1, 2, 3))
        given = [weight for weight in weights if weight is not None]
        if given:
            pred_score = pred_score * torch.stack(given).mean(dim=0)
        return anomaly_map, pred_score

    def _score_scales(self, tiles: torch.Tensor) -> tuple[list[torch.Tensor], list[torch.Tensor | None]]:
        """Return the map ``[B, 1, h, w]`` of each scale that counts, and its scorer's factors for images, if any."""
        maps, weights = [], []
        for size, patches in self.patch_scores(tiles):
            maps.append(scores_to_map(patches.scores, tiles.shape[-2:], size, self.stride))
            weights.append(self.scorers[str(size)].image_weights(*patches) if self.tiler is None else None)
        return maps, weights

    def combine(self, maps: list[torch.Tensor]) -> torch.Tensor:
        """Join the maps of the scales that count.

        Args:
            maps (list[torch.Tensor]): Map of each scale that counts, ``[B, 1, H, W]``.

        Returns:
            torch.Tensor: One map of the same shape, in units of a normal patch's typical score; 0 where hidden.
        """
        if self._is_soft_maximum:
            joined = soft_maximum(maps, *self._soft_maximum_state()) / self.typical_score
        else:
            shares = list(self.scale_shares.values())
            joined = combine_maps(maps, shares, "mean" if self.combination == "mean" else "product")
        return self.region.clear(joined)

    def _soft_maximum_state(self) -> tuple[torch.Tensor, torch.Tensor, list[float]]:
        """Return offsets, spreads and weights of the scales that count."""
        shares = self.scale_shares
        used = [self.scored_sizes.index(size) for size in shares]
        return self.map_offsets[used], self.map_spreads[used], list(shares.values())

    def _shown_patches(self, size: Sequence[int], patch_size: int, stride: int) -> torch.Tensor:
        """Return which patches of images of some height and width have a part in visible pixels' scores, ``[h, w]``."""
        # A pixel's score is that of its window, which reaches half a step of the map to each side.
        return self.region.patches((size[0], size[1]), patch_size, stride, margin=self.stride // 2)

    @property
    def _goes_by_place(self) -> bool:
        return any(scorer.by_place for scorer in self.scorers.values())

    def _project(self, grid: torch.Tensor, size: int) -> torch.Tensor:
        """Project mid-level embeddings, and leave trained ones as they are."""
        return self.projections[str(size)](grid) if str(size) in self.projections else grid

    def _arrange(self, grid: torch.Tensor, size: int, images: torch.Tensor, stride: int) -> torch.Tensor:
        """Arrange the embeddings ``[B, Z, h, w]`` of images as their scorer takes them, ``[B, h, w, Z or Z + 2]``."""
        grid = self._project(grid, size)
        if self.scorers[str(size)].encodes_position:
            grid = self.position_encodings[str(size)](grid, images.shape[-2:], stride)
        return grid.permute(0, 2, 3, 1)

    def _embed(self, images: torch.Tensor, stride: int, sizes: Sequence[int] | None = None) -> dict[int, torch.Tensor]:
        """Return the embeddings ``[B, Z, h, w]`` of all patches of pre-processed images, for each size that counts."""
        images = self.standardize(images)
        sizes = sizes or list(self.scale_shares)
        if torch.jit.is_tracing() or torch.compiler.is_compiling() or images.device.type != "cpu":
            return self.embedding_network.embed_dense(images, stride, sizes)
        # One by one, the feature maps of images stay in a CPU's cache: twice as fast as a batch of 32, and less memory.
        grids = [self._embed_in_strips(image, stride, sizes) for image in images.split(1)]
        return {size: torch.cat([grid[size] for grid in grids]) for size in sizes}

    def _embed_in_strips(self, image: torch.Tensor, stride: int, sizes: Sequence[int]) -> dict[int, torch.Tensor]:
        """Embed a standardised image ``[1, 3, H, W]`` strip by strip, so that a large one takes no more memory.

        A strip is some rows of patches, with all pixels that they see. Nothing pads, so the result is that of the whole
        image.
        """
        height, width = image.shape[-2:]
        num_rows, _ = grid_size((height, width), max(sizes), stride)
        rows_per_strip = max(1, _STRIP_PIXELS // (width * stride))
        strips = []
        for first in range(0, num_rows, rows_per_strip):
            is_last = first + rows_per_strip >= num_rows
            # Of smaller patches the last strip has more rows.
            stop = height if is_last else (first + rows_per_strip - 1) * stride + max(sizes)
            grids = self.embedding_network.embed_dense(image[..., first * stride : stop, :], stride, sizes)
            strips.append({size: grid if is_last else grid[..., :rows_per_strip, :] for size, grid in grids.items()})
        return {size: torch.cat([strip[size] for strip in strips], dim=-2) for size in sizes}

    def _check_tiler(self) -> None:
        """Check that the model goes with its tiler, if one is set.

        Raises:
            ValueError: If tiles are smaller than a patch, or scores depend on a patch's place in the image, which tiles
                do not have.
        """
        if self.tiler is None:
            return
        if not self.region.is_everywhere:
            msg = "Tiles have no place in the image, by which a region of interest (roi) goes: turn tiling off."
            raise ValueError(msg)
        tile_size, largest = (self.tiler.tile_size_h, self.tiler.tile_size_w), max(self.scale_shares)
        if min(tile_size) < largest:
            msg = (
                f"Tiles of {tile_size[0]}x{tile_size[1]} px are smaller than a patch of {largest}x{largest} px: set "
                f"tile_size to at least {largest}."
            )
            raise ValueError(msg)
        if self._goes_by_place:
            msg = "Tiles have no place in the image, by which this scorer goes: turn tiling off, or use 'exact'."
            raise ValueError(msg)
        weights = {size: float(self.position_encodings[str(size)].weight) for size in self.scale_shares}
        if any(weights.values()) and any(scorer.encodes_position for scorer in self.scorers.values()):
            msg = (
                f"Tiles have no place in the image, but patches are compared by theirs (position weight "
                f"{max(weights.values()):g}): turn tiling off, or train with position_weight 0, or with tiling and "
                "'auto'."
            )
            raise ValueError(msg)

    def _tile(self, images: torch.Tensor) -> torch.Tensor:
        """Return the images' tiles if a tiler is set, else the images."""
        if self.tiler is None:
            return images
        return tile(images, self.tiler) if torch.compiler.is_compiling() else self.tiler.tile(images)

    def _untile(self, maps: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
        """Return the maps of images of some height and width from those of their tiles, if a tiler is set."""
        if self.tiler is None:
            return maps
        return untile(maps, size, self.tiler) if torch.compiler.is_compiling() else self.tiler.untile(maps)
