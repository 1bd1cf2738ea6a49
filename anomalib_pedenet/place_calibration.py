# Copyright (C) 2026 The anomalib-pedenet authors
# SPDX-License-Identifier: Apache-2.0

"""Aligned parts: each place of the anomaly map is measured by what normal images score there.

A part has places where good ones differ, a soiled groove or a shining edge, and places where they never do. The
distance to the nearest normal patch is larger in the former. Less its mean there, and in units of its deviation
there, a small defect in a quiet place stands out from them.
"""

from collections.abc import Sequence

import torch
from anomalib.models.components import DynamicBufferMixin
from torch import nn
from torch.nn import functional as F  # noqa: N812

LEAST_IMAGES = 16
"""Of fewer images the deviation at a place says little."""

_CELL = 8  # px: side of the cells in which means and deviations are kept
_BLUR = 3  # cells, along each axis, whose mean and deviation are averaged

# Added to each deviation, as a fraction of the median one: what never differs must not be blown up.
_FLOOR = 1.0


class PlaceCalibration(DynamicBufferMixin, nn.Module):
    """Measures each place of anomaly maps by that place of normal images' maps.

    Before :meth:`fit`, and after :meth:`reset`, maps stay as they are.
    """

    gain: torch.Tensor
    offset: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        # One number for each cell, `[1, 1, h, w]`; the scores between are interpolated.
        self.register_buffer("gain", torch.ones(1, 1, 1, 1))
        self.register_buffer("offset", torch.zeros(1, 1, 1, 1))

    def reset(self) -> None:
        """Leave maps as they are."""
        self.gain = torch.ones_like(self.gain[..., :1, :1])
        self.offset = torch.zeros_like(self.offset[..., :1, :1])

    def fit(self, maps: Sequence[torch.Tensor]) -> None:
        """Take what normal images score at each place.

        Args:
            maps (Sequence[torch.Tensor]): Map of each normal image, ``[1, 1, H, W]``, at least 0, all of one size. Of
                fewer than :data:`LEAST_IMAGES`, or where they do not differ, nothing is taken.
        """
        self.reset()
        if len(maps) < LEAST_IMAGES:
            return
        stacked = torch.cat([F.avg_pool2d(scores, _CELL, ceil_mode=True, count_include_pad=False) for scores in maps])
        spreads = _blur(stacked.std(dim=0, keepdim=True))
        median = spreads.median()
        if float(median) <= torch.finfo(median.dtype).eps * float(stacked.max()):
            return
        means, spreads = _blur(stacked.mean(dim=0, keepdim=True)), spreads + _FLOOR * median
        # Lifted, so that no score is below 0, and in units of a normal pixel's mean.
        lifted = (means / spreads).max() - means / spreads
        typical = (stacked / spreads + lifted).mean()
        self.gain, self.offset = 1 / (spreads * typical), lifted / typical

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        """Measure maps.

        Args:
            maps (torch.Tensor): ``[B, 1, H, W]``, at least 0.

        Returns:
            torch.Tensor: Of the same shape, at least 0; 1 is what normal images have in the mean.
        """
        if self.gain.shape[-2:].numel() == 1:
            return self.gain * maps + self.offset
        size = maps.shape[-2:]
        gain, offset = (
            F.interpolate(cells, size=size, mode="bilinear", align_corners=False) for cells in (self.gain, self.offset)
        )
        return gain * maps + offset


def _blur(cells: torch.Tensor) -> torch.Tensor:
    """Average cells ``[1, 1, h, w]`` with those around them."""
    around = _BLUR // 2
    return F.avg_pool2d(F.pad(cells, (around,) * 4, mode="replicate"), _BLUR, 1)
