# Copyright (C) 2026 The anomalib-pedenet authors
# SPDX-License-Identifier: Apache-2.0

"""How good a training is, by normal images alone: AUROC on defects drawn on images that were held back.

Two kinds of defect, drawn by other means than those that the embeddings are trained on
(:mod:`anomalib_pedenet.training.synthetic_defects`): a piece of the image turned and put elsewhere, and a swirl. Both
change how a part is built and leave its colours; lines, stains and smoothed areas rank trainings no better than chance,
or the wrong way round (``docs/experiments/label_free_figure.md``). They depend on the images and a seed only, so that
settings and epochs are compared on the very same pictures.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812
from torchmetrics.functional.classification import binary_auroc

_PLACES = 4  # tried for each defect; the most visible one is taken, as empty backgrounds hide most of them

_PIXEL_STEP = 2  # pixels are compared on every second row and column: neighbours hardly differ

Drawing = tuple[torch.Tensor, torch.Tensor]
"""A changed image ``[C, H, W]`` and where it was changed ``[H, W]``, bool."""


class DrawnDefects(NamedTuple):
    """Normal images with a drawn defect each.

    Attributes:
        images (torch.Tensor): ``[N, C, H, W]``.
        masks (torch.Tensor): Where the defects are, bool ``[N, H, W]``.
    """

    images: torch.Tensor
    masks: torch.Tensor


class _Random:
    """Numbers and places from a seeded generator on the CPU, the same on every device."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def uniform(self, low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand((), generator=self.generator))

    def sign(self) -> float:
        return 1.0 if self.uniform(0, 1) < 0.5 else -1.0

    def center(self, image: torch.Tensor, margin: float) -> tuple[float, float]:
        height, width = image.shape[-2:]
        return self.uniform(margin, height - margin), self.uniform(margin, width - margin)


def _offsets(image: torch.Tensor, center: tuple[float, float]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return how far each row ``[H, 1]`` and column ``[1, W]`` lies from a point."""
    rows = torch.arange(image.shape[-2], device=image.device)[:, None] - center[0]
    columns = torch.arange(image.shape[-1], device=image.device)[None, :] - center[1]
    return rows, columns


def _distance(image: torch.Tensor, center: tuple[float, float]) -> torch.Tensor:
    """Return each pixel's distance to a point, ``[H, W]``."""
    rows, columns = _offsets(image, center)
    return torch.hypot(rows.float(), columns.float())


def _turned_piece(image: torch.Tensor, random: _Random, side: float) -> Drawing:
    """Put a square piece of the image, turned by a right angle, elsewhere."""
    size = max(4, round(random.uniform(0.05, 0.15) * side))
    (top, left), (to_top, to_left) = ([int(value) for value in random.center(image, size / 2)] for _ in range(2))
    top, left, to_top, to_left = (value - size // 2 for value in (top, left, to_top, to_left))
    top, to_top = (min(max(0, value), image.shape[-2] - size) for value in (top, to_top))
    left, to_left = (min(max(0, value), image.shape[-1] - size) for value in (left, to_left))
    changed, mask = image.clone(), torch.zeros_like(image[0], dtype=torch.bool)
    piece = image[:, top : top + size, left : left + size].rot90(1, dims=(1, 2))
    changed[:, to_top : to_top + size, to_left : to_left + size] = piece
    mask[to_top : to_top + size, to_left : to_left + size] = True
    return changed, mask


def _swirl(image: torch.Tensor, random: _Random, side: float) -> Drawing:
    """Turn the inside of a disc, most in its middle."""
    radius = random.uniform(0.06, 0.16) * side
    center = random.center(image, radius)
    distance = _distance(image, center)
    angle = random.sign() * random.uniform(1.5, 3.0) * (1 - distance / radius).clamp(min=0)
    rows, columns = _offsets(image, center)
    from_row = center[0] + rows * angle.cos() - columns * angle.sin()
    from_column = center[1] + rows * angle.sin() + columns * angle.cos()
    height, width = image.shape[-2:]
    grid = torch.stack([2 * from_column / (width - 1) - 1, 2 * from_row / (height - 1) - 1], dim=-1)
    sampled = F.grid_sample(image[None], grid[None], mode="bilinear", padding_mode="border", align_corners=True)[0]
    mask = distance < radius
    return torch.where(mask, sampled, image), mask


_KINDS: tuple[Callable[[torch.Tensor, _Random, float], Drawing], ...] = (_turned_piece, _swirl)


def draw_test_defects(images: torch.Tensor, visible: torch.Tensor | None = None, seed: int = 0) -> DrawnDefects:
    """Draw a defect on each image, the two kinds in turn.

    Args:
        images (torch.Tensor): Normal images ``[N, C, H, W]``.
        visible (torch.Tensor | None): Pixels that are looked at, bool ``[H, W]``: of a defect these alone count.
            Defaults to ``None``, all.
        seed (int): The same seed gives the same defects. Defaults to ``0``.

    Returns:
        DrawnDefects: The images with defects, and the masks.
    """
    drawn, masks = [], []
    side = float(min(images.shape[-2:]))
    for index, image in enumerate(images):
        random = _Random(seed + index)
        drawings = [_KINDS[index % len(_KINDS)](image, random, side) for _ in range(_PLACES)]
        if visible is not None:
            drawings = [(changed, mask & visible) for changed, mask in drawings]
        visibility = torch.stack([((changed - image).abs().mean(dim=0) * mask).sum() for changed, mask in drawings])
        changed, mask = drawings[int(visibility.argmax())]
        drawn.append(changed)
        masks.append(mask)
    return DrawnDefects(torch.stack(drawn), torch.stack(masks))


@torch.no_grad()
def drawn_defect_auroc(score: nn.Module, normal: torch.Tensor, drawn: DrawnDefects) -> tuple[float, float]:
    """Measure how well drawn defects are told from what is normal.

    Args:
        score (nn.Module): Takes images ``[1, C, H, W]`` and returns anomalib's ``InferenceBatch``.
        normal (torch.Tensor): Normal images ``[N, C, H, W]`` that have not been trained on.
        drawn (DrawnDefects): The same images with defects; both as ``score`` takes them.

    Returns:
        tuple[float, float]: AUROC of the pixels, and of the images.
    """
    predictions = [score(image) for image in torch.cat([normal, drawn.images]).split(1)]
    maps = torch.cat([prediction.anomaly_map[:, 0] for prediction in predictions])
    scores = torch.cat([prediction.pred_score.flatten() for prediction in predictions])
    masks = torch.cat([torch.zeros_like(drawn.masks), drawn.masks])
    labels = torch.arange(len(scores), device=scores.device) >= len(normal)
    thinned = (slice(None), slice(None, None, _PIXEL_STEP), slice(None, None, _PIXEL_STEP))
    # Ranks are all that counts; torchmetrics takes values beyond [0, 1] for logits and saturates them.
    pixels = maps[thinned] / maps.amax().clamp(min=torch.finfo(maps.dtype).tiny)
    images = scores / scores.amax().clamp(min=torch.finfo(scores.dtype).tiny)
    return (
        float(binary_auroc(pixels.flatten(), masks[thinned].flatten().long())),
        float(binary_auroc(images, labels.long())),
    )
