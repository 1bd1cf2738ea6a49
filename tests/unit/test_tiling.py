# Copyright (C) 2026 The anomalib-pedenet authors
# SPDX-License-Identifier: Apache-2.0

"""Tiles of exported graphs are those of anomalib's ``Tiler``."""

import pytest
import torch
from anomalib.data.utils.tiler import ImageUpscaleMode, Tiler
from hypothesis import given, settings
from hypothesis import strategies as st

from anomalib_pedenet.tiling import tile, untile


@st.composite
def _tilers(draw: st.DrawFn) -> tuple[Tiler, tuple[int, int]]:
    """Draw a tiler, and the size of images of at least a tile."""
    tile_size = draw(st.tuples(st.integers(4, 20), st.integers(4, 20)))
    stride = tuple(draw(st.integers(3, side)) for side in tile_size)
    # anomalib counts the tiles rightly only with a border narrower than the stride, and nothing may be cut off whole.
    border = draw(st.integers(0, (min(*tile_size, *stride) - 1) // 2))
    tiler = Tiler(tile_size, stride, border, draw(st.sampled_from(ImageUpscaleMode)))
    return tiler, tuple(side + draw(st.integers(0, 40)) for side in tile_size)


@settings(deadline=None)
@given(drawn=_tilers(), batch=st.integers(1, 3))
def test_tiles_equal_anomalibs(drawn: tuple[Tiler, tuple[int, int]], batch: int) -> None:
    tiler, size = drawn
    images = torch.rand(batch, 2, *size)
    expected = tiler.tile(images)
    torch.testing.assert_close(tile(images, tiler), expected, rtol=0, atol=0)
    maps = torch.rand(len(expected), 1, *expected.shape[-2:])
    torch.testing.assert_close(untile(maps, size, tiler), tiler.untile(maps), rtol=0, atol=1e-6)


@pytest.mark.parametrize("mode", ImageUpscaleMode)
def test_a_graph_tiles_batches_of_all_sizes(mode: ImageUpscaleMode) -> None:
    class Halve(torch.nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return untile(tile(images, tiler) / 2, images.shape[-2:], tiler)

    tiler = Tiler(16, 10, mode=mode)
    dynamic = ({0: torch.export.Dim.DYNAMIC},)
    program = torch.export.export(Halve(), (torch.rand(2, 1, 30, 41),), dynamic_shapes=dynamic)
    for batch in (2, 5):
        images = torch.rand(batch, 1, 30, 41)
        torch.testing.assert_close(program.module()(images), tiler.untile(tiler.tile(images) / 2))
