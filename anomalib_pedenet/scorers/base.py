# Copyright (C) 2026 The anomalib-pedenet authors
# SPDX-License-Identifier: Apache-2.0

"""The interface of a scorer."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import ClassVar

import torch
from anomalib.models.components import DynamicBufferMixin
from torch import nn


class Scorer(DynamicBufferMixin, nn.Module, ABC):
    """Scores embeddings by how far they are from normal ones.

    Normal embeddings arrive in batches: :meth:`reset`, then :meth:`update` for each batch, then :meth:`finalize`. What
    was fitted before stays in use until ``finalize``, so an interrupted fit loses nothing. What is learned lives in
    buffers: it goes into checkpoints, follows ``.to(device)``, and loads whatever its size.

    A subclass defines ``_reset``, ``_update``, ``_finalize``, ``is_fitted`` and ``forward``.

    Args:
        embedding_dim (int): Dimension Z of the embeddings that arrive. Defaults to ``64``.
        seed (int): Seed of whatever is random in the fit. Defaults to ``0``.

    Attributes:
        exportable (bool): Whether :meth:`forward` can be part of an ONNX or OpenVINO graph.
        encodes_position (bool): Whether embeddings are to arrive with their weighted position appended, see
            :mod:`anomalib_pedenet.scorers.position`.
        by_place (bool): Whether it learns each place of the image by itself. Embeddings must then arrive as grids
            ``[B, h, w, Z]``, of the same size and stride in the fit and afterwards.
        typical_score (torch.Tensor): Typical score of a normal patch, scalar; 1 before fitting. Dividing by it makes
            the scores of different scales comparable.
    """

    exportable: ClassVar[bool] = True
    encodes_position: ClassVar[bool] = False
    by_place: ClassVar[bool] = False
    typical_score: torch.Tensor

    def __init__(self, embedding_dim: int = 64, seed: int = 0) -> None:
        super().__init__()
        self.embedding_dim = embedding_dim
        self.seed = seed
        self.register_buffer("typical_score", torch.ones(()))
        # Of the fit under way: batches so far, embeddings that will come in, and size of the grids.
        self._num_updates: int | None = None
        self._num_expected: int | None = None
        self._grid: tuple[int, int] | None = None

    @property
    @abstractmethod
    def is_fitted(self) -> bool:
        """Whether the scorer has been fitted (or loaded from something fitted)."""

    @abstractmethod
    def forward(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Score embeddings.

        Args:
            embeddings (torch.Tensor): Embeddings ``[..., Z]``; grids ``[B, h, w, Z]`` if the scorer is ``by_place``.

        Returns:
            torch.Tensor: Scores ``[...]``, float32, at least 0, higher means more abnormal.
        """

    @abstractmethod
    def _reset(self) -> None:
        """Start a new fit."""

    @abstractmethod
    def _update(self, embeddings: torch.Tensor) -> None:
        """Take in checked, detached float32 embeddings: ``[N, Z]``, or ``[B, h, w, Z]`` if ``by_place``."""

    @abstractmethod
    def _finalize(self) -> torch.Tensor:
        """Put the fit to use, let go of what only the fit needed, and return a normal patch's typical score."""

    def reset(self, num_embeddings: int | None = None) -> None:
        """Start a new fit; what was fitted before stays in use until :meth:`finalize`.

        Args:
            num_embeddings (int | None): How many embeddings will come in, if that is known.
        """
        self._num_expected = num_embeddings
        self._reset()
        self._num_updates = 0
        self._grid = None

    def update(self, embeddings: torch.Tensor) -> None:
        """Take in a batch of normal embeddings.

        Args:
            embeddings (torch.Tensor): Embeddings ``[..., Z]``; grids ``[B, h, w, Z]`` if the scorer is ``by_place``.

        Raises:
            ValueError: If the shape is wrong or a value is not finite.
            RuntimeError: If no fit was started.
        """
        if self._num_updates is None:
            msg = "Call reset() before update(), to start a fit."
            raise RuntimeError(msg)
        self._check_shape(embeddings)
        if not bool(torch.isfinite(embeddings).all()):
            msg = "Embeddings of normal images are NaN or infinite; the training diverged: lower the learning_rate."
            raise ValueError(msg)
        if embeddings.numel():
            if self.by_place:
                self._note_grid((embeddings.shape[1], embeddings.shape[2]))
            embeddings = embeddings.detach().float()
            self._update(embeddings if self.by_place else embeddings.reshape(-1, self.embedding_dim))
            self._num_updates += 1

    def finalize(self) -> None:
        """Finish the fit and put it to use.

        Raises:
            ValueError: If no embeddings came in since :meth:`reset`.
        """
        if not self._num_updates:
            msg = "A scorer needs at least one normal embedding, got none: is the training set empty?"
            raise ValueError(msg)
        typical = self._finalize().to(self.typical_score)
        is_usable = torch.isfinite(typical) & (typical > torch.finfo(typical.dtype).eps)
        self.typical_score = torch.where(is_usable, typical, torch.ones_like(typical))
        self._num_updates = None

    def fit(self, batches: Iterable[torch.Tensor]) -> None:
        """Fit on batches of normal embeddings.

        Args:
            batches (Iterable[torch.Tensor]): Embeddings ``[..., Z]``; grids ``[B, h, w, Z]`` if ``by_place``.

        Raises:
            ValueError: See :meth:`update` and :meth:`finalize`.
        """
        sizes = [batch.shape[:-1].numel() for batch in batches] if isinstance(batches, Sequence) else None
        self.reset(sum(sizes) if sizes is not None else None)
        for embeddings in batches:
            self.update(embeddings)
        self.finalize()

    def teach(
        self, embeddings: torch.Tensor, places: torch.Tensor | None = None, flagged: torch.Tensor | None = None
    ) -> None:
        """Take further embeddings for normal, beside what was fitted.

        A subclass that can do so overrides it.

        Args:
            embeddings (torch.Tensor): Embeddings ``[N, Z]``, one or more.
            places (torch.Tensor | None): Row and column of each in the grid of its image, int64 ``[N, 2]``, for those
                that go ``by_place``. Defaults to ``None``, not known.
            flagged (torch.Tensor | None): Which are abnormal by themselves, bool ``[N]``; the others are unusual, and
                lie near to such. Defaults to ``None``, all.

        Raises:
            NotImplementedError: If this scorer cannot.
        """
        del embeddings, places, flagged
        self.check_teachable()

    def check_teachable(self) -> None:
        """Check that the scorer can be taught.

        Raises:
            NotImplementedError: If it cannot.
        """
        if type(self).teach is not Scorer.teach:
            return
        msg = (
            f"{type(self).__name__} cannot be taught after its fit: train, or load the checkpoint, with the scorer "
            "'exact', 'gaussian_mixture' or 'ppca'; or add the images to the training set and train again."
        )
        raise NotImplementedError(msg)

    def image_weights(self, embeddings: torch.Tensor, scores: torch.Tensor) -> torch.Tensor | None:
        """Return factors ``[B]`` for the images' scores, or ``None`` if the scorer has none.

        Args:
            embeddings (torch.Tensor): Embeddings ``[B, h, w, Z]``.
            scores (torch.Tensor): Their scores ``[B, h, w]``.

        Returns:
            torch.Tensor | None: Factors, or ``None``.
        """
        del embeddings, scores
        return None

    def round_to_half(self) -> None:
        """Arrange what was fitted so that half precision keeps it well; here, where that needs nothing, do nothing."""

    def _check_shape(self, embeddings: torch.Tensor) -> None:
        """Check the shape of embeddings.

        Raises:
            ValueError: If it is wrong.
        """
        wanted = f"[B, h, w, {self.embedding_dim}]" if self.by_place else f"[..., {self.embedding_dim}]"
        is_right_rank = embeddings.ndim == 4 if self.by_place else embeddings.ndim > 1
        if not is_right_rank or embeddings.shape[-1] != self.embedding_dim:
            msg = f"Embeddings must be {wanted}, got {tuple(embeddings.shape)}."
            raise ValueError(msg)

    def _note_grid(self, grid: tuple[int, int]) -> None:
        """Note the size of the grids that come in.

        Raises:
            ValueError: If it is another than before.
        """
        if self._grid not in (None, grid):
            msg = f"Images of different sizes: grids of {self._grid} and {grid} patches cannot be compared by place."
            raise ValueError(msg)
        self._grid = grid


class PlaceScorer(Scorer):
    """A scorer that learns each place of the image by itself.

    A subclass defines ``_reset``, ``_update``, ``_finalize``, ``_fitted`` and ``_distances``.
    """

    by_place: ClassVar[bool] = True

    @property
    @abstractmethod
    def _fitted(self) -> torch.Tensor:
        """What is known of each place, ``[h, w, ...]``; empty before a fit."""

    @abstractmethod
    def _distances(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Return distances ``[B, h, w]`` of checked grids ``[B, h, w, Z]`` of the type of what was fitted."""

    @property
    def is_fitted(self) -> bool:
        """Whether something is known of the places."""
        return len(self._fitted) > 0

    def forward(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Return each embedding's distance to what is normal at its place.

        Args:
            embeddings (torch.Tensor): Grids ``[B, h, w, Z]``, of the size of those fitted.

        Returns:
            torch.Tensor: Distances ``[B, h, w]``, float32; Mahalanobis distances in standard deviations, others in
                embedding units.

        Raises:
            ValueError: If the grid has another size.
        """
        self._check_places(embeddings)
        with torch.autocast(embeddings.device.type, enabled=False):
            return self._distances(embeddings.to(self._fitted.dtype))

    def _check_places(self, embeddings: torch.Tensor) -> None:
        """Check that a grid of embeddings has the places that were fitted.

        Raises:
            ValueError: If it has not.
        """
        self._check_shape(embeddings)
        (height, width), (rows, columns) = embeddings.shape[1:3], self._fitted.shape[:2]
        if torch.jit.is_tracing() or torch.compiler.is_compiling() or (height, width) == (rows, columns):
            return
        msg = (
            f"The scorer knows {rows}x{columns} places, but the image has {height}x{width}: it compares patches of the "
            "same place, so keep the image_size and the stride of the training, or use the scorer 'exact'."
        )
        raise ValueError(msg)
