# Copyright (C) 2026 The anomalib-pedenet authors
# SPDX-License-Identifier: Apache-2.0

"""Pixel scores against a plain average over patches."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anomalib_pedenet.anomaly_map import (
    averaging_matrix,
    combine_maps,
    image_scores,
    measure_normal,
    scores_to_map,
    soft_maximum,
)
from anomalib_pedenet.patches import grid_size


def overlap(pixel: int, start: int, patch_size: int, stride: int) -> float:
    """Return how much of the window of a pixel, a stride wide, a patch covers along an axis, in pixels."""
    middle = pixel + 0.5
    return max(0.0, min(middle + stride / 2, start + patch_size) - max(middle - stride / 2, start))


def naive_map(scores: torch.Tensor, image_size: tuple[int, int], patch_size: int, stride: int) -> torch.Tensor:
    """Average all patches' scores at each pixel, by how much of its window they cover."""
    result = torch.zeros(image_size, dtype=scores.dtype)
    for row in range(image_size[0]):
        down = [overlap(row, i * stride, patch_size, stride) for i in range(scores.shape[0])]
        for column in range(image_size[1]):
            right = [overlap(column, j * stride, patch_size, stride) for j in range(scores.shape[1])]
            weights = torch.tensor(down, dtype=scores.dtype)[:, None] * torch.tensor(right, dtype=scores.dtype)
            result[row, column] = (weights * scores).sum() / weights.sum()
    return result


def mean_over_covering(scores: torch.Tensor, size: tuple[int, int], patch_size: int, stride: int) -> torch.Tensor:
    """Add every patch's score to the pixels it covers and divide by how many there were, as the paper does."""
    total, count = torch.zeros(2, *size, dtype=scores.dtype)
    for i in range(scores.shape[0]):
        for j in range(scores.shape[1]):
            rows = slice(i * stride, i * stride + patch_size)
            columns = slice(j * stride, j * stride + patch_size)
            total[rows, columns] += scores[i, j]
            count[rows, columns] += 1
    return total / count


@settings(max_examples=30, deadline=None)
@given(
    height=st.integers(8, 24),
    width=st.integers(8, 24),
    patch_size=st.integers(2, 8),
    stride=st.integers(1, 8),
)
def test_equals_the_naive_average(height: int, width: int, patch_size: int, stride: int) -> None:
    stride = min(stride, patch_size)
    image_size = height, width
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(*grid_size(image_size, patch_size, stride), dtype=torch.float64, generator=generator)
    expected = naive_map(scores, image_size, patch_size, stride)
    result = scores_to_map(scores[None], image_size, patch_size, stride)[0, 0]
    covered_rows = (scores.shape[0] - 1) * stride + patch_size
    covered_columns = (scores.shape[1] - 1) * stride + patch_size
    torch.testing.assert_close(result[:covered_rows, :covered_columns], expected[:covered_rows, :covered_columns])
    # Pixels beyond the last patch repeat the last covered ones, apart from how the product is rounded.
    beyond = result[covered_rows:]
    torch.testing.assert_close(beyond, result[covered_rows - 1].expand_as(beyond))
    beyond = result[:, covered_columns:]
    torch.testing.assert_close(beyond, result[:, covered_columns - 1 : covered_columns].expand_as(beyond))


@pytest.mark.parametrize("patch_size", [2, 5, 8])
def test_a_step_of_one_pixel_gives_the_papers_mean(patch_size: int) -> None:
    scores = torch.rand(*grid_size((24, 30), patch_size, 1), dtype=torch.float64)
    expected = mean_over_covering(scores, (24, 30), patch_size, 1)
    torch.testing.assert_close(scores_to_map(scores[None], (24, 30), patch_size, 1)[0, 0], expected)


@pytest.mark.parametrize(("patch_size", "stride"), [(64, 8), (32, 8), (64, 2), (32, 32)])
def test_is_the_papers_mean_seen_through_a_window_of_a_step(patch_size: int, stride: int) -> None:
    """Away from the edges: the mean over the pixels of a window, those at its ends by half."""
    size = (256, 320)
    scores = torch.rand(*grid_size(size, patch_size, stride), dtype=torch.float64)
    inner = (slice(patch_size, 256 - patch_size), slice(patch_size, 320 - patch_size))
    mean = mean_over_covering(scores, size, patch_size, stride)
    window = torch.ones(stride + 1, dtype=torch.float64)
    window[0] = window[-1] = 0.5
    kernel = window[:, None] * window / stride**2
    expected = torch.nn.functional.conv2d(mean[None, None], kernel[None, None], padding=stride // 2)[0, 0]
    found = scores_to_map(scores[None], size, patch_size, stride)[0, 0]
    torch.testing.assert_close(found[inner], expected[inner])


@settings(max_examples=30, deadline=None)
@given(height=st.integers(24, 40), width=st.integers(24, 40), quarter=st.integers(1, 6), stride=st.integers(1, 12))
def test_the_middle_of_a_patch_counts_as_a_smaller_patch_there(
    height: int, width: int, quarter: int, stride: int
) -> None:
    size, generator = 4 * quarter, torch.Generator().manual_seed(0)
    scores = torch.rand(1, *grid_size((height, width), size, stride), dtype=torch.float64, generator=generator)
    found = scores_to_map(scores, (height, width), size, stride, reach=0.5)
    smaller = scores_to_map(scores, (height - 2 * quarter, width - 2 * quarter), size // 2, stride)
    # The frame around it repeats its edge.
    expected = torch.nn.functional.pad(smaller, (quarter, quarter, quarter, quarter), mode="replicate")
    torch.testing.assert_close(found, expected)


def test_the_map_changes_evenly() -> None:
    scores = torch.rand(1, 29, 29, generator=torch.Generator().manual_seed(0))
    result = scores_to_map(scores, (256, 256), patch_size=32, stride=8)[0, 0]
    steps = result.diff(dim=0).abs()
    by_box = mean_over_covering(scores[0], (256, 256), 32, 8).diff(dim=0).abs()
    assert steps.max() < by_box.max() / 4


def test_a_hot_patch_lands_where_it_is() -> None:
    scores = torch.zeros(1, 25, 33)
    scores[0, 10, 20] = 1
    result = scores_to_map(scores, (256, 320), patch_size=64, stride=8)[0, 0]
    rows, columns = torch.nonzero(result, as_tuple=True)
    assert (rows.min(), rows.max()) == (80 - 4, 80 + 63 + 4)
    assert (columns.min(), columns.max()) == (160 - 4, 160 + 63 + 4)
    assert result[80 + 32, 160 + 32] == result.max()


def test_constant_scores_give_a_constant_map() -> None:
    torch.testing.assert_close(
        scores_to_map(torch.full((2, 8, 9), 3.0), (95, 99), 32, 8), torch.full((2, 1, 95, 99), 3.0)
    )


def test_rows_of_the_matrix_sum_to_one() -> None:
    torch.testing.assert_close(averaging_matrix(251, 64, 10).sum(dim=1), torch.ones(251))


def test_scores_off_the_grid_are_refused() -> None:
    with pytest.raises(ValueError, match=r"must be \(25, 25\), got \(24, 25\)"):
        scores_to_map(torch.zeros(1, 24, 25), (256, 256), 64, 8)


def test_images_smaller_than_a_patch_are_refused() -> None:
    with pytest.raises(ValueError, match="40x256 px, smaller than a patch of 64x64"):
        scores_to_map(torch.zeros(1, 1, 25), (40, 256), 64, 8)


def test_product_is_the_geometric_mean_and_mean_the_arithmetic() -> None:
    maps = [torch.tensor([1.0, 4.0]), torch.tensor([4.0, 9.0])]
    torch.testing.assert_close(combine_maps(maps, combination="product"), torch.tensor([2.0, 6.0]))
    torch.testing.assert_close(combine_maps(maps, combination="mean"), torch.tensor([2.5, 6.5]))


@pytest.mark.parametrize("combination", ["product", "mean"])
def test_one_map_stays_as_it_is(combination: str) -> None:
    scores = torch.tensor([0.0, 2.0])
    torch.testing.assert_close(combine_maps([scores], combination=combination), scores)  # type: ignore[arg-type]


@pytest.mark.parametrize(("combination", "expected"), [("product", [8.0, 0.0]), ("mean", [34 / 3, 1.0])])
def test_a_map_of_weight_two_counts_as_two_maps(combination: str, expected: list[float]) -> None:
    maps = [torch.tensor([2.0, 3.0]), torch.tensor([16.0, 0.0])]
    torch.testing.assert_close(combine_maps(maps, [1.0, 2.0], combination), torch.tensor(expected))  # type: ignore[arg-type]


def test_unknown_combination_is_refused() -> None:
    with pytest.raises(ValueError, match="'product' or 'mean', got 'max'"):
        combine_maps([torch.zeros(1)], combination="max")  # type: ignore[arg-type]


def measured(
    maps: list[torch.Tensor], offsets: torch.Tensor, spreads: torch.Tensor, weights: list[float]
) -> torch.Tensor:
    """Return each scale's map in units of its spread, weighted, ``[S, B, 1, H, W]``."""
    return torch.stack(
        [
            weight * (scores - offset) / spread
            for scores, offset, spread, weight in zip(maps, offsets, spreads, weights, strict=True)
        ]
    )


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 1_000), scales=st.integers(1, 4))
def test_the_soft_maximum_is_close_above_the_largest_scale_and_never_negative(seed: int, scales: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    maps = list(torch.rand(scales, 2, 1, 4, 5, generator=generator) * 10)
    offsets, spreads = torch.rand(2, scales, generator=generator) + 0.01
    weights = (torch.rand(scales, generator=generator) + 0.1).tolist()
    joined = soft_maximum(maps, offsets, spreads, weights)
    largest = measured(maps, offsets, spreads, weights).amax(dim=0)
    constant = joined - largest
    lift = float((offsets / spreads * torch.tensor(weights)).max())
    assert constant.min() >= lift - 1e-3
    assert constant.max() <= lift + math.log(scales) + 1e-3
    zeros = [torch.zeros_like(scores) for scores in maps]
    assert soft_maximum(zeros, offsets, spreads, weights).min() >= 0


@pytest.mark.parametrize(("apart", "expected"), [(0.5, 0.5), (0.02, 0.1), (0.0, 0.1)])
def test_a_scales_spread_is_that_of_the_highest_scores_or_a_tenth_of_all(apart: float, expected: float) -> None:
    """Two images whose highest scores lie so far apart, in units of all pixels' standard deviation."""
    torch.manual_seed(0)
    scores = torch.randn(2, 10_000)
    for image, highest in zip(scores, (6.0, 6.0 + apart * 2**0.5), strict=True):
        image[0] = highest
    offset, spread = measure_normal(list(scores))
    assert float(offset) == pytest.approx(float(scores.mean()), abs=1e-6)
    assert float(spread) == pytest.approx(expected * float(scores.std()), rel=0.02)


def test_the_soft_maximum_does_not_overflow() -> None:
    maps = [torch.full((1, 1, 1, 1), 1e6), torch.full((1, 1, 1, 1), 2e6)]
    joined = soft_maximum(maps, torch.zeros(2), torch.ones(2), [1.0, 1.0])
    torch.testing.assert_close(joined, maps[1])


def test_an_image_is_scored_by_its_worst_pixel_or_by_that_and_the_mean() -> None:
    anomaly_map = torch.tensor([[1.0, 1.0, 1.0, 9.0], [3.0, 3.0, 3.0, 3.0]])[:, None, None]
    assert image_scores(anomaly_map, has_extent=False).tolist() == [9, 3]
    assert image_scores(anomaly_map, has_extent=True).tolist() == pytest.approx([math.sqrt(9 * 3), 3])


def test_hidden_pixels_have_no_part_in_an_images_score() -> None:
    anomaly_map = torch.tensor([[2.0, 4.0, 0.0, 0.0]])[:, None, None]  # of which the right half is hidden
    expected = image_scores(anomaly_map[..., :2], has_extent=True)
    torch.testing.assert_close(image_scores(anomaly_map, has_extent=True, visible=0.5), expected)
