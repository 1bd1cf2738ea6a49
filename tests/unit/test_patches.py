# Copyright (C) 2026 The anomalib-pedenet authors
# SPDX-License-Identifier: Apache-2.0

"""Geometry of patches and neighbour pairs."""

import pytest
import torch

from anomalib_pedenet.patches import (
    NEIGHBOR_DIRECTIONS,
    disturb,
    extract_patches,
    gather_embeddings,
    grid_size,
    minimum_training_size,
    sample_jittered_pairs,
    sample_neighbor_pairs,
    sample_positions,
)


@pytest.mark.parametrize(
    ("image_size", "patch_size", "stride", "expected"),
    [
        ((256, 256), 64, 2, (97, 97)),
        ((256, 640), 64, 8, (25, 73)),
        ((64, 64), 64, 8, (1, 1)),
        ((79, 80), 64, 8, (2, 3)),
    ],
)
def test_grid_size(
    image_size: tuple[int, int],
    patch_size: int,
    stride: int,
    expected: tuple[int, int],
) -> None:
    assert grid_size(image_size, patch_size, stride) == expected


def test_the_message_about_a_small_image_names_size_limit_and_remedy() -> None:
    with pytest.raises(ValueError, match=r"63x200 px, smaller than a patch of 64x64 px: .*64 px a side.*\[32\]"):
        grid_size((63, 200), 64, 2)


@pytest.mark.parametrize("patch_size", [32, 64])
@pytest.mark.parametrize("step", [1, 2])
@pytest.mark.parametrize("scale", [1.0, 1.3, 3.0])
def test_pairs_obey_patch_svdds_rule(patch_size: int, step: int, scale: float) -> None:
    torch.manual_seed(0)
    smallest = minimum_training_size(patch_size)
    image_size = (smallest, round(scale * smallest))
    pairs = sample_neighbor_pairs(4000, image_size, patch_size, step)

    limits = torch.tensor(image_size) - patch_size
    for positions in (pairs.positions, pairs.neighbor_positions):
        assert (positions >= 0).all()
        assert (positions <= limits).all()
        assert (positions % step == 0).all()
    offsets = pairs.neighbor_positions - pairs.positions
    assert (offsets.sign() == torch.tensor(NEIGHBOR_DIRECTIONS)[pairs.directions]).all()
    distances = offsets.abs()[offsets != 0]
    assert distances.min() == 3 * patch_size // 4
    assert distances.max() < patch_size
    # Each of the eight is drawn, about equally often: 500 +- 5 standard deviations.
    assert (torch.bincount(pairs.directions, minlength=8) - 500).abs().max() < 105


def test_jitter_and_positions_reach_their_limits() -> None:
    torch.manual_seed(0)
    pairs = sample_neighbor_pairs(20_000, (160, 160), patch_size=64)
    offsets = (pairs.neighbor_positions - pairs.positions).abs()
    assert set(offsets[offsets > 0].tolist()) == set(range(48, 64))
    assert set(pairs.positions.flatten().tolist()) == set(range(97))


def test_pairs_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"111x200 px.*needs at least 112x112 px.*crop_size"):
        sample_neighbor_pairs(1, (111, 200), 64)


@pytest.mark.parametrize(("patch_size", "step", "reach"), [(64, 1, 2), (32, 1, 1), (64, 2, 2), (32, 2, 2)])
def test_jittered_pairs_lie_within_reach_and_never_at_the_same_place(patch_size: int, step: int, reach: int) -> None:
    """The reach of Patch-SVDD's code, K // 32 px; on the dense grid at least a step."""
    torch.manual_seed(0)
    image_size = (patch_size + 2, patch_size + 8)
    first, second = sample_jittered_pairs((100, 200), image_size, patch_size, step)
    assert first.shape == second.shape == (100, 200, 2)
    for positions in (first, second):
        assert (positions >= 0).all()
        assert (positions <= torch.tensor([2, 8])).all()
        assert (positions % step == 0).all()
    steps = range(-reach, reach + 1, step)
    offsets = {(row, column) for row in steps for column in steps} - {(0, 0)}
    assert set(map(tuple, (second - first).flatten(0, 1).tolist())) == offsets


def test_extracted_patches_equal_slices() -> None:
    torch.manual_seed(0)
    images = torch.randn(3, 2, 20, 30)
    positions = sample_positions(50, (20, 30), (7, 11))
    indices = torch.randint(3, (50,))
    patches = extract_patches(images, indices, positions, (7, 11))
    for patch, index, (top, left) in zip(patches, indices, positions, strict=True):
        torch.testing.assert_close(patch, images[index, :, top : top + 7, left : left + 11], rtol=0, atol=0)


def test_positions_are_uniform_up_to_the_border() -> None:
    torch.manual_seed(0)
    positions = sample_positions(5000, (10, 12), (8, 8))
    assert set(map(tuple, positions.tolist())) == {(row, column) for row in range(3) for column in range(5)}


def test_gathered_embeddings_are_those_of_the_position() -> None:
    grid = torch.randn(2, 5, 4, 6)
    positions = torch.tensor([[[0, 0], [6, 10]], [[2, 4], [4, 0]]])
    gathered = gather_embeddings(grid, positions, stride=2)
    for b in range(2):
        for p in range(2):
            row, column = (positions[b, p] // 2).tolist()
            torch.testing.assert_close(gathered[b, p], grid[b, :, row, column], rtol=0, atol=0)


def test_disturbance_is_one_shift_for_each_image_and_channel_plus_noise() -> None:
    torch.manual_seed(0)
    images = torch.zeros(400, 3, 16, 16)
    shifted = disturb(images, color_shift=0.1, noise=0.0)
    assert (shifted == shifted[..., :1, :1]).all()
    assert shifted[:, :, 0, 0].std().item() == pytest.approx(0.1, rel=0.1)
    assert disturb(images, color_shift=0.0, noise=0.2).std().item() == pytest.approx(0.2, rel=0.02)
    assert disturb(images, color_shift=0.0, noise=0.0) is images
