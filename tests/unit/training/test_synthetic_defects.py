# Copyright (C) 2026 The anomalib-pedenet authors
# SPDX-License-Identifier: Apache-2.0

"""Drawn defects: nothing but the mask is changed, and labels are those of a loop over patches."""

import pytest
import torch

from anomalib_pedenet.patches import grid_size
from anomalib_pedenet.training.synthetic_defects import (
    MIN_COVERAGE,
    draw_defects,
    draw_masks,
    label_patches,
    smooth_noise,
)


@pytest.mark.parametrize("size", [(128, 128), (112, 150)])
def test_only_what_the_mask_covers_changes(size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    crops = torch.randn(24, 3, *size)
    defective, masks = draw_defects(crops)
    assert defective.shape == crops.shape
    assert masks.shape == (24, 1, *size)
    assert set(masks.unique().tolist()) == {0.0, 1.0}
    near = torch.nn.functional.max_pool2d(masks, 3, stride=1, padding=1)  # the soft edge is one pixel wide
    changes = (defective - crops).abs()
    assert float((changes * (1 - near)).max()) == 0
    changed = changes.amax(dim=1, keepdim=True)[masks > 0]
    assert (changed > 0).float().mean() > 0.99
    assert changed.median() > 0.2  # clearly visible: images have unit variance


def test_masks_are_of_many_sizes_and_kinds() -> None:
    torch.manual_seed(0)
    areas = torch.cat([draw_masks(8, (128, 128)).mean(dim=(1, 2, 3)) for _ in range(40)])
    assert areas.mean() < 0.15
    assert areas.max() < 0.6
    assert (areas > 0.1).float().mean() > 0.05
    assert ((areas > 0) & (areas < 0.01)).float().mean() > 0.1


def test_smooth_noise_is_smooth_and_of_unit_size() -> None:
    torch.manual_seed(0)
    field = smooth_noise(5, (96, 128), cells=4)
    torch.testing.assert_close(field.square().mean(dim=(1, 2, 3)), torch.ones(5))
    assert field.diff(dim=-1).abs().max() < 0.25


@pytest.mark.parametrize("patch_size", [32, 64])
def test_labels_are_those_of_a_loop_over_patches(patch_size: int) -> None:
    torch.manual_seed(0)
    masks = draw_masks(4, (112, 130))
    rows, columns = grid_size((112, 130), patch_size, 6)
    expected = torch.zeros(4, rows, columns)
    for n in range(4):
        for row in range(rows):
            for column in range(columns):
                window = masks[n, 0, row * 6 : row * 6 + patch_size, column * 6 : column * 6 + patch_size]
                expected[n, row, column] = float(window.mean() >= MIN_COVERAGE)
    assert 0 < expected.mean() < 1
    torch.testing.assert_close(label_patches(masks, patch_size, 6), expected)


def test_a_single_crop_is_enough() -> None:
    defective, _ = draw_defects(torch.randn(1, 3, 128, 128))
    assert torch.isfinite(defective).all()
