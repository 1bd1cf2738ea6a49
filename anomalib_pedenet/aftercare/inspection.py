# Copyright (C) 2026 The anomalib-pedenet authors
# SPDX-License-Identifier: Apache-2.0

"""What is known of an inspected image: its scores, its map, and the normal patch that its defect was compared with."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

Truth = Literal["good", "defective"]
"""What a user knows of an image beforehand."""

THRESHOLD = 0.5
"""Scores and maps are normalised such that what is above this is called defective."""


class Box(NamedTuple):
    """A rectangle in the pixels of an image as the model sees it.

    Attributes:
        top (int): First row.
        left (int): First column.
        height (int): Number of rows.
        width (int): Number of columns.
    """

    top: int
    left: int
    height: int
    width: int


@dataclass(frozen=True)
class Explanation:
    """The patch that an image's score is owed to most, and the normal patch that is nearest to it.

    Attributes:
        box (Box): The patch in the image; its side is the scale that found the defect.
        normal_path (Path): File of the normal image with the nearest patch.
        normal_image (NDArray[np.uint8]): That image as the model sees it, RGB ``[H, W, 3]``.
        normal_box (Box): The nearest patch in it.
        distance (float): Distance of the two embeddings, in units of that of two normal images' patches.
    """

    box: Box
    normal_path: Path
    normal_image: NDArray[np.uint8]
    normal_box: Box
    distance: float


@dataclass(frozen=True)
class Inspection:
    """An inspected image.

    Attributes:
        path (Path): Its file.
        image (NDArray[np.uint8]): The image as the model sees it, RGB ``[H, W, 3]``.
        anomaly_map (NDArray[np.float32]): Score of each pixel ``[H, W]``, from 0 to 1; see :data:`THRESHOLD`.
        score (float): Score of the image, from 0 to 1.
        truth (Truth | None): What is known of it beforehand. Defaults to ``None``, nothing.
        explanation (Explanation | None): Why it scores as it does. Defaults to ``None``, not looked for.
    """

    path: Path
    image: NDArray[np.uint8]
    anomaly_map: NDArray[np.float32]
    score: float
    truth: Truth | None = None
    explanation: Explanation | None = None

    @property
    def is_flagged(self) -> bool:
        """Whether it is called defective."""
        return self.score > THRESHOLD
