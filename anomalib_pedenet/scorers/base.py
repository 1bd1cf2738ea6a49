# Copyright (C) 2026 The anomalib-pedenet authors
# SPDX-License-Identifier: Apache-2.0

"""The interface of a scorer."""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import ClassVar

import torch
from anomalib.models.components import DynamicBufferMixin
from torch import nn


class Scorer(DynamicBufferMixin, nn.Module, ABC):
    """Scores embeddings by how far they are from normal ones.

    Normal embeddings arrive in batches: :meth:`reset`, then :meth:`update` for each batch, then :meth:`finalize`. What
    was fitted before stays in use until ``finalize``, so an interrupted fit loses nothing. What is learned lives in
    buffers: it goes into checkpoints, follows ``.to(device)``, and loads whatever its size.

    Attributes:
        exportable (bool): Whether :meth:`forward` can be part of an ONNX or OpenVINO graph.
        typical_score (torch.Tensor): Typical score of a normal patch, scalar; 1 before fitting. Dividing by it makes
            the scores of different scales comparable.
    """

    exportable: ClassVar[bool]
    typical_score: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("typical_score", torch.ones(()))

    @property
    @abstractmethod
    def is_fitted(self) -> bool:
        """Whether the scorer has been fitted (or loaded from something fitted)."""

    @abstractmethod
    def reset(self) -> None:
        """Start a new fit; what was fitted before stays in use until :meth:`finalize`."""

    @abstractmethod
    def update(self, embeddings: torch.Tensor) -> None:
        """Take in a batch of normal embeddings.

        Args:
            embeddings (torch.Tensor): ``[N, Z]`` embeddings.

        Raises:
            ValueError: If the shape is wrong or a value is not finite.
        """

    @abstractmethod
    def finalize(self) -> None:
        """Finish the fit and put it to use.

        Raises:
            ValueError: If no embeddings came in since :meth:`reset`.
        """

    @abstractmethod
    def forward(self, queries: torch.Tensor) -> torch.Tensor:
        """Score embeddings.

        Args:
            queries (torch.Tensor): Embeddings ``[..., P, Z]``.

        Returns:
            torch.Tensor: Scores ``[..., P]``, float32, higher means more abnormal.
        """

    def fit(self, batches: Iterable[torch.Tensor]) -> None:
        """Fit on batches of normal embeddings.

        Args:
            batches (Iterable[torch.Tensor]): ``[N_i, Z]`` embeddings.

        Raises:
            ValueError: See :meth:`update` and :meth:`finalize`.
        """
        self.reset()
        for embeddings in batches:
            self.update(embeddings)
        self.finalize()
