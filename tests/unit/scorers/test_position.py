# Copyright (C) 2026 The anomalib-pedenet authors
# SPDX-License-Identifier: Apache-2.0

"""Positions as features, and the choice of their weight, against slow references."""

import math
from typing import Any

import pytest
import torch
from anomalib.data.utils.tiler import Tiler

from anomalib_pedenet import Pedenet, PedenetModel
from anomalib_pedenet.scorers.position import WEIGHTS, PositionEncoding, choose_weight, measure_alignment


def aligned_grids(num_images: int = 6, noise: float = 0.05) -> torch.Tensor:
    """Every place has its own embedding, the same in all images but for noise."""
    torch.manual_seed(0)
    return torch.randn(1, 8, 7, 9) + noise * torch.randn(num_images, 8, 7, 9)


def shuffled_grids() -> torch.Tensor:
    """The same embeddings, at other places in every image."""
    grids = aligned_grids().flatten(2)
    return torch.stack([grid[:, torch.randperm(63)] for grid in grids]).unflatten(2, (7, 9))


def test_encoding_equals_a_loop_over_patches() -> None:
    grid = torch.randn(2, 8, 3, 4)
    encoded = PositionEncoding(5.0)(grid, (40, 64), stride=8)
    assert encoded.shape == (2, 10, 3, 4)
    for row in range(3):
        for column in range(4):
            expected = torch.tensor([5 * row * 8 / 64, 5 * column * 8 / 64])
            torch.testing.assert_close(encoded[:, 8:, row, column], expected.expand(2, 2))
    torch.testing.assert_close(encoded[:, :8], grid)


def test_a_position_is_the_same_at_every_stride() -> None:
    fine = PositionEncoding(5.0)(torch.zeros(1, 1, 8, 8), (64, 64), stride=2)
    coarse = PositionEncoding(5.0)(torch.zeros(1, 1, 2, 2), (64, 64), stride=8)
    torch.testing.assert_close(fine[..., ::4, ::4], coarse)


def weight_of(grids: torch.Tensor) -> float:
    return choose_weight(measure_alignment(grids, (96, 112), 8))


def test_aligned_parts_get_the_largest_weight_and_unaligned_ones_none() -> None:
    assert weight_of(aligned_grids()) == WEIGHTS[-1]
    assert weight_of(shuffled_grids()) == 0
    assert weight_of(aligned_grids(1)) == 0


def test_high_dimensions_alone_are_no_alignment() -> None:
    """In many dimensions all distances are alike, so that looking at one place only hardly costs anything."""
    torch.manual_seed(0)
    assert weight_of(torch.randn(6, 256, 7, 9)) == 0


def test_equal_images_without_any_structure_get_no_weight() -> None:
    assert weight_of(torch.zeros(4, 8, 7, 9)) == 0


def test_the_choice_equals_a_search_one_by_one() -> None:
    grids = aligned_grids(4, noise=0.8)[:, :2]  # two dimensions: a patch has rivals all over the image
    patches = [(n, r, c) for n in range(4) for r in range(7) for c in range(9)]
    vectors = {(n, r, c): grids[n, :, r, c].tolist() for n, r, c in patches}
    generator = torch.Generator().manual_seed(0)
    orders = [torch.randperm(63, generator=generator).tolist() for _ in range(4)]

    def distance(weight: float, is_shuffled: bool) -> float:
        total = 0.0
        for n, r, c in patches:
            others = []
            for m, i, j in patches:
                if m != n:
                    row, column = divmod(orders[m][9 * i + j], 9) if is_shuffled else (i, j)
                    apart = math.dist(vectors[n, r, c], vectors[m, i, j])
                    shift = weight * 8 / 112 * ((r - row) ** 2 + (c - column) ** 2) ** 0.5
                    others.append((apart**2 + shift**2, apart))
            total += min(others)[1]
        return total

    weights = (0.0, 0.5, 1.0, 2.0, 4.0, 8.0)
    anywhere = distance(0.0, False)
    alignments = [1 - (distance(w, False) - anywhere) / (distance(w, True) - anywhere) for w in weights[1:]]
    found = measure_alignment(grids, (96, 112), 8, weights[1:])
    assert found == pytest.approx(alignments, abs=1e-4)
    chosen = set()
    for limit in alignments:
        expected = max(w for w, alignment in zip(weights[1:], alignments, strict=True) if alignment >= limit)
        assert choose_weight(found, weights, limit - 1e-4) == expected
        chosen.add(expected)
    assert len(chosen) > 1  # else this would not tell right from wrong
    assert choose_weight(found, weights, max(alignments) + 1e-4) == 0


def test_a_large_weight_compares_with_the_same_place_only() -> None:
    torch.manual_seed(0)
    images, queries = torch.rand(3, 3, 96, 96), torch.rand(1, 3, 96, 96)
    model = PedenetModel(patch_sizes=[32], scored_sizes=[32], stride=32, position_weight=1e2).eval()
    model.fit(images.split(1))
    bank, query = model._embed(images, 32)[32], model._embed(queries, 32)[32]
    expected = (bank - query).norm(dim=1).amin(dim=0) / model.scorers["32"].typical_score  # [h, w]
    with torch.no_grad():
        (scores,) = dict(model.patch_scores(queries))[32].scores
    torch.testing.assert_close(scores, expected, rtol=1e-2, atol=1e-4)


def test_a_given_weight_stays_and_tiles_have_no_position() -> None:
    images = torch.rand(2, 3, 96, 96)
    assert PedenetModel(scored_sizes=(32, 64), position_weight=3.0).calibrate(images) == {32: 3.0, 64: 3.0}
    same = images[:1].repeat(2, 1, 1, 1)
    model = PedenetModel(scored_sizes=(32, 64))
    assert model.calibrate(same) == {32: WEIGHTS[-1], 64: WEIGHTS[-1]}
    model.tiler = Tiler(tile_size=96, stride=96)
    assert model.calibrate(same) == {32: 0.0, 64: 0.0}


@pytest.mark.parametrize("value", [-1.0, float("inf"), float("nan")])
def test_weights_outside_their_range_are_refused(value: Any) -> None:  # noqa: ANN401
    with pytest.raises(ValueError, match="position_weight must be 'auto' or a finite number of at least 0"):
        Pedenet(position_weight=value)
