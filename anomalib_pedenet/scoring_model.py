# Copyright (C) 2026 The anomalib-pedenet authors
# SPDX-License-Identifier: Apache-2.0

"""The graph that is exported: images to anomaly maps.

Data flows one way: images -> embeddings (:mod:`anomalib_pedenet.networks`) -> patch scores
(:mod:`anomalib_pedenet.scorers`) -> pixels (:mod:`anomalib_pedenet.anomaly_map`). :meth:`PedenetModel.forward` is the
very graph that is exported.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from anomalib.data import InferenceBatch
from anomalib.data.utils.tiler import Tiler
from torch import nn

from anomalib_pedenet.anomaly_map import Combination, Join, JoinWay, image_scores, scores_to_map
from anomalib_pedenet.dense_embedding import embed_images
from anomalib_pedenet.kinds import AUTO_SCORER, KINDS, LOOSE, Kind, kind_of_number
from anomalib_pedenet.networks import (
    SMALL_CHANNELS,
    DefectPredictionNetwork,
    DensityEstimationNetwork,
    LocationPredictionNetwork,
    ModelSize,
    PatchEmbeddingNetwork,
)
from anomalib_pedenet.patches import MID_LEVEL_SIZES, PATCH_SIZE, SUB_PATCH_SIZE
from anomalib_pedenet.region import RegionOfInterest
from anomalib_pedenet.scales import default_scored_sizes
from anomalib_pedenet.scorers import Coreset, Scorer, make_scorer, scorer_class
from anomalib_pedenet.scorers.position import PositionEncoding
from anomalib_pedenet.scorers.projection import PrincipalProjection
from anomalib_pedenet.scorers.whitening import Whitening
from anomalib_pedenet.tiling import check_tiler, from_tiles, to_tiles


class PatchScores(NamedTuple):
    """Patches of one scale.

    Attributes:
        embeddings (torch.Tensor): As their scorer takes them, ``[B, h, w, Z]``, or ``Z + 2`` with their place.
        scores (torch.Tensor): In units of a normal patch's typical score, ``[B, h, w]``.
    """

    embeddings: torch.Tensor
    scores: torch.Tensor


class ScoringModel(nn.Module):
    """PEDENet: the networks, a scorer for each scale, and the anomaly map.

    Arguments are those of :class:`anomalib_pedenet.Pedenet` and its recipe, which explain them. Others are ``seed``, of
    the scorers; and ``defect_prediction`` and ``density_estimation``, whether there is a network at each scale to be
    trained on drawn defects, and one to estimate the density of embeddings. The scorer is by default the paper's,
    ``"exact"``.

    Attributes:
        normal_limit (torch.Tensor): Highest score of normal images' pixels, in units of a normal patch's typical score,
            scalar; at least 1, and 1 before :meth:`fit_normal_limit`.
        image_limit (torch.Tensor): Highest score of normal images, likewise.
        region (RegionOfInterest): What of the images is looked at. What it hides is hidden from all that follows.
        tiler (Tiler | None): Set by anomalib's ``TilerConfigurationCallback`` to score large images tile by tile.
    """

    input_mean: torch.Tensor
    input_std: torch.Tensor
    normal_limit: torch.Tensor
    image_limit: torch.Tensor
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
        scorer: str | Mapping[str, Any] = "exact",
        bank_size: float = 5_000,
        coreset: Coreset = "auto",
        embedding_dim: int = 64,
        num_components: int = 10,
        seed: int = 0,
        position_weight: float | Literal["auto"] = "auto",
        batch_norm: bool = True,
        defect_prediction: bool = False,
        model_size: ModelSize = "small",
        density_estimation: bool = False,
    ) -> None:
        super().__init__()
        self.patch_sizes = tuple(sorted(patch_sizes))
        self.scored_sizes = tuple(sorted(scored_sizes or default_scored_sizes(patch_sizes, scorer)))
        self.stride = stride
        self.combination = combination
        self.bank_size = bank_size
        self.coreset: Coreset = coreset
        self.seed = seed
        self.position_weight = position_weight
        self.tiler: Tiler | None = None
        self._register_what_is_measured()
        # How much each scored scale counts. Not a buffer, because it decides what is computed, in exported graphs too.
        self._scale_weights = [1.0] * len(self.scored_sizes)
        self.embedding_dim = embedding_dim
        # A third faster on a CPU, and in bfloat16 twice as fast. From the start, not for training alone, because the
        # other memory format rounds differently: a loaded checkpoint must score exactly as the model that saved it.
        filters = SMALL_CHANNELS[model_size]
        network = PatchEmbeddingNetwork(embedding_dim, filters, batch_norm=batch_norm, patch_sizes=self.patch_sizes)
        self.embedding_network = network.to(memory_format=torch.channels_last)
        self._make_networks_of_training(num_components if density_estimation else 0, defect_prediction)
        self.projections = nn.ModuleDict()
        for size in set(self.scored_sizes) & set(MID_LEVEL_SIZES):
            channels = network.mid_level_channels(size)
            self.projections[str(size)] = PrincipalProjection(channels, min(channels, embedding_dim))
        self.set_scorer(scorer)
        weight = 0.0 if position_weight == "auto" else position_weight
        self.position_encodings = nn.ModuleDict({str(size): PositionEncoding(weight) for size in self.scored_sizes})
        self.region = RegionOfInterest()

    def _register_what_is_measured(self) -> None:
        """Make the buffers for what is measured on normal images."""
        # Location prediction learns only from inputs of about unit variance, which ImageNet's statistics give to
        # colourful photographs but not to, say, grey surfaces of low contrast: the training images' own do.
        self.register_buffer("input_mean", torch.zeros(3, 1, 1))
        self.register_buffer("input_std", torch.ones(()))
        self.register_buffer("normal_limit", torch.ones(()))
        self.register_buffer("image_limit", torch.ones(()))
        # What normal images score at each scale, and together.
        self.register_buffer("map_offsets", torch.zeros(len(self.scored_sizes)))
        self.register_buffer("map_spreads", torch.ones(len(self.scored_sizes)))
        self.register_buffer("typical_score", torch.ones(()))
        # What each trained scale has learned, from 0 to 1; NaN where that is not known.
        self.register_buffer("learned", torch.full((len(self.patch_sizes),), math.nan))

    def _make_networks_of_training(self, num_components: int, defect_prediction: bool) -> None:
        """Make the networks that only training needs, but for the scorer ``density``: as asked for at each scale."""
        sizes, dim = [str(size) for size in self.patch_sizes], self.embedding_dim
        density = {size: DensityEstimationNetwork(num_components, dim) for size in sizes if num_components}
        self.density_networks = nn.ModuleDict(density)
        self.location_networks = nn.ModuleDict({size: LocationPredictionNetwork(dim) for size in sizes})
        defect = {size: DefectPredictionNetwork(dim) for size in sizes if defect_prediction}
        self.defect_networks = nn.ModuleDict(defect)

    def set_scorer(self, scorer: str | Mapping[str, Any]) -> None:
        """Take another scorer, not fitted, at every scale.

        Args:
            scorer (str | Mapping[str, Any]): See :func:`anomalib_pedenet.scorers.make_scorer`.

        Raises:
            ValueError: If the scorer is unknown, or has other arguments.
            ImportError: If it needs a library that is not installed.
        """
        self.scorer = scorer
        self.kind: Kind | None = LOOSE if scorer == AUTO_SCORER else None  # until calibration tells
        self._use_scorer(scorer if self.kind is None else self.kind.scorer)

    def _use_kind(self, kind: Kind) -> None:
        """Take the scorer for a kind of images, not fitted, at every scale."""
        self.kind = kind
        self._use_scorer(kind.scorer)

    def _use_scorer(self, scorer: str | Mapping[str, Any]) -> None:
        """Take a scorer, not fitted, at every scale, and leave embeddings as they are."""
        self.scorer_in_use = scorer
        self.scorers = nn.ModuleDict({str(size): self._make_scorer(size) for size in self.scored_sizes})
        self.whitenings = nn.ModuleDict({str(size): Whitening() for size in self.scored_sizes}).to(self.input_mean)

    def _make_scorer(self, size: int) -> Scorer:
        """Return a scorer, not fitted, for a scale."""
        is_trained = size in self.patch_sizes
        dimension = self.embedding_dim if is_trained else len(self.projections[str(size)].components)
        if self.kind is not None:
            dimension = self.kind.scored_dimension(dimension)
        return make_scorer(
            self.scorer_in_use,
            embedding_dim=dimension + 2 * scorer_class(self.scorer_in_use).encodes_position,
            bank_size=self.bank_size,
            coreset=self.coreset,
            seed=self.seed,
            density_network=self.density_networks[str(size)] if is_trained and self.density_networks else None,
        ).to(self.input_mean.device)

    @property
    def is_fitted(self) -> bool:
        """Whether the scorer of every scale that counts has been fitted."""
        return all(self.scorers[str(size)].is_fitted for size in self.scale_shares)

    @property
    def scale_shares(self) -> dict[int, float]:
        """The scored sizes that count, and how much each does in images' scores."""
        weights = zip(self.scored_sizes, self._scale_weights, strict=True)
        return {size: weight for size, weight in weights if weight > 0}

    @property
    def map_shares(self) -> dict[int, float]:
        """The same, and how much each counts in the map: fine ones more, if the kind of images is such."""
        shares, fineness = self.scale_shares, 0.0 if self.kind is None else self.kind.fineness
        return {size: share * (min(shares) / size) ** fineness for size, share in shares.items()}

    @property
    def reach(self) -> float:
        """Part of a patch's side, around its middle, whose pixels have the patch's score."""
        return 1.0 if self.kind is None else self.kind.reach

    def get_extra_state(self) -> torch.Tensor:
        """Return the scales' weights, and the number of the images' kind (0 without one), ``[S + 1]``."""
        kind = 0 if self.kind is None else KINDS.index(self.kind)
        return torch.tensor([*self._scale_weights, kind], dtype=torch.float64)  # like all else in a checkpoint

    def set_extra_state(self, state: torch.Tensor) -> None:
        """Take the scales' weights and the kind of the images from a checkpoint.

        Raises:
            ValueError: If they are those of another number of scales, or of a later version.
        """
        *weights, kind = state.tolist()
        if len(weights) != len(self.scored_sizes):
            msg = f"The state holds the weights of {len(weights)} scored sizes, but the model has {self.scored_sizes}."
            raise ValueError(msg)
        self._scale_weights = weights
        if self.scorer == AUTO_SCORER:
            # Before their own state is loaded, as that of all parts of a module is after the module's.
            self._use_kind(kind_of_number(int(kind)))

    @property
    def _is_soft_maximum(self) -> bool:
        is_of_kind = self.scorer_in_use == "gaussian_mixture" if self.kind is None else self.kind.is_soft_maximum
        return self.combination == "auto" and is_of_kind

    def check_is_fitted(self) -> None:
        """Check that there is something to score with, a memory bank for instance.

        Raises:
            RuntimeError: If there is not.
        """
        if not self.is_fitted:
            msg = "Pedenet has no memory bank yet, so it can neither score images nor be exported: train it first "
            msg += "(anomalib train), or load a trained checkpoint (--ckpt_path)."
            raise RuntimeError(msg)

    def standardize(self, images: torch.Tensor) -> torch.Tensor:
        """Scale pre-processed images to zero mean and unit variance, by the training images' statistics.

        Args:
            images (torch.Tensor): Pre-processed images ``[B, 3, H, W]``.

        Returns:
            torch.Tensor: Standardised images of the same shape, which the embedding network expects; 0 where hidden.
        """
        return (self.region.hide(images, self.input_mean) - self.input_mean) / self.input_std

    def forward(self, images: torch.Tensor) -> InferenceBatch:
        """Score images.

        Args:
            images (torch.Tensor): Pre-processed images ``[B, 3, H, W]``, at least as large as a patch.

        Returns:
            InferenceBatch: ``anomaly_map [B, 1, H, W]``, the mean score of the patches at each pixel, and
                ``pred_score [B]``, that of :func:`anomalib_pedenet.anomaly_map.image_scores` (times a weight, if the
                scorer has one for images). Both are ``s / (s + limit)`` for the limit of pixels and of images, so
                from 0 to below 1, and 0.5 for the highest score of normal ones.

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
                pred_score=pred_score / (pred_score + self.image_limit),
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
        """Return what each scale adds to the anomaly map, see :meth:`anomalib_pedenet.anomaly_map.Join.parts`.

        Args:
            maps (Mapping[int, torch.Tensor]): Map of each scale that counts, ``[B, 1, H, W]``.

        Returns:
            dict[int, torch.Tensor]: By scale, of the shape of its map.
        """
        return dict(zip(maps, self._join_of(self.map_shares).parts(list(maps.values())), strict=True))

    def _score(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the maps ``[B, 1, H, W]`` and scores ``[B]`` of images, in units of a normal patch's typical score."""
        return self._join(*self._score_scales(to_tiles(images, self.tiler)), images.shape[-2:])

    def _join(
        self, maps: list[torch.Tensor], weights: list[torch.Tensor | None], size: Sequence[int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the maps and scores of images of some height and width from what their tiles have at each scale."""
        anomaly_map = image_map = from_tiles(self.combine(maps), size, self.tiler)
        if self.map_shares != self.scale_shares:
            image_map = from_tiles(self.combine(maps, self.scale_shares), size, self.tiler)
        has_extent = self.kind is not None and self.kind.has_extent
        pred_score = image_scores(image_map, has_extent, self.region.share((size[0], size[1])))
        given = [weight for weight in weights if weight is not None]
        if given:
            pred_score = pred_score * torch.stack(given).mean(dim=0)
        return anomaly_map, pred_score

    def _score_scales(self, tiles: torch.Tensor) -> tuple[list[torch.Tensor], list[torch.Tensor | None]]:
        """Return the map ``[B, 1, h, w]`` of each scale that counts, and its scorer's factors for images, if any."""
        maps, weights = [], []
        for size, patches in self.patch_scores(tiles):
            maps.append(self.scale_map(patches.scores, tiles.shape[-2:], size))
            weights.append(self.scorers[str(size)].image_weights(*patches) if self.tiler is None else None)
        return maps, weights

    def scale_map(self, scores: torch.Tensor, image_size: tuple[int, int], patch_size: int) -> torch.Tensor:
        """Return the map ``[B, 1, H, W]`` of a scale, see :func:`anomalib_pedenet.anomaly_map.scores_to_map`."""
        return scores_to_map(scores, image_size, patch_size, self.stride, self.reach)

    def combine(self, maps: list[torch.Tensor], shares: Mapping[int, float] | None = None) -> torch.Tensor:
        """Join the maps of the scales that count.

        Args:
            maps (list[torch.Tensor]): Map of each scale that counts, ``[B, 1, H, W]``.
            shares (Mapping[int, float] | None): How much each counts. Defaults to ``None``, :attr:`map_shares`.

        Returns:
            torch.Tensor: One map of the same shape, in units of a normal patch's typical score; 0 where hidden.
        """
        joined = self._join_of(shares or self.map_shares)(maps)
        return self.region.clear(joined / self.typical_score if self._is_soft_maximum else joined)

    def _join_of(self, shares: Mapping[int, float]) -> Join:
        """Return how the maps of the scales that count are joined, if each counts so much."""
        used = [self.scored_sizes.index(size) for size in shares]
        joined = "product" if self.combination == "auto" else self.combination
        way: JoinWay = "soft maximum" if self._is_soft_maximum else joined
        return Join(way, list(shares.values()), self.map_offsets[used], self.map_spreads[used])

    @property
    def _goes_by_place(self) -> bool:
        return any(scorer.by_place for scorer in self.scorers.values())

    def _project(self, grid: torch.Tensor, size: int) -> torch.Tensor:
        """Project mid-level embeddings, and leave trained ones as they are."""
        return self.projections[str(size)](grid) if str(size) in self.projections else grid

    def _arrange(self, grid: torch.Tensor, size: int, images: torch.Tensor, stride: int) -> torch.Tensor:
        """Arrange the embeddings ``[B, Z, h, w]`` of images as their scorer takes them, ``[B, h, w, Z or Z + 2]``."""
        grid = self.whitenings[str(size)](self._project(grid, size))
        if self.scorers[str(size)].encodes_position:
            grid = self.position_encodings[str(size)](grid, images.shape[-2:], stride)
        return grid.permute(0, 2, 3, 1)

    def _embed(self, images: torch.Tensor, stride: int, sizes: Sequence[int] | None = None) -> dict[int, torch.Tensor]:
        """Return the embeddings ``[B, Z, h, w]`` of all patches of pre-processed images, for each size that counts."""
        return embed_images(self.embedding_network, self.standardize(images), stride, sizes or list(self.scale_shares))

    def _check_tiler(self) -> None:
        """Check that the model goes with its tiler, if one is set; see :func:`anomalib_pedenet.tiling.check_tiler`."""
        if self.tiler is None:
            return
        encoded = [size for size in map(str, self.scale_shares) if self.scorers[size].encodes_position]
        check_tiler(
            self.tiler,
            max(self.scale_shares),
            has_region=not self.region.is_everywhere,
            by_place=self._goes_by_place or any(whitening.by_place for whitening in self.whitenings.values()),
            position_weight=max((float(self.position_encodings[size].weight) for size in encoded), default=0.0),
        )
