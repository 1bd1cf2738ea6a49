# Copyright (C) 2026 The anomalib-pedenet authors
# SPDX-License-Identifier: Apache-2.0

import pytest

from anomalib_pedenet.scales import MIN_SCALE_WEIGHT, default_scored_sizes, weigh


@pytest.mark.parametrize(
    ("patch_sizes", "scorer", "sizes"),
    [
        ((32, 64), "auto", (16, 24, 32, 64)),
        ((32, 64), "gaussian_mixture", (16, 24, 32, 64)),
        ((32, 64), "exact", (16, 24, 32)),
        ((32,), "auto", (16, 24, 32)),
        ((64,), "auto", (64,)),
    ],
)
def test_the_scales_that_are_scored(patch_sizes: tuple[int, ...], scorer: str, sizes: tuple[int, ...]) -> None:
    assert default_scored_sizes(patch_sizes, scorer) == sizes


@pytest.mark.parametrize(
    ("learned", "finest", "trained"), [(0.0, 1.0, 0.0), (0.25, 0.5, 0.25), (0.45, 0.0, 0.45), (1.0, 0.0, 1.0)]
)
def test_in_a_product_the_finest_gives_way_to_what_was_learned(learned: float, finest: float, trained: float) -> None:
    assert weigh((16, 24, 32), (32, 64), {32: learned, 64: 0.9}, by_root=False) == {16: finest, 24: 1.0, 32: trained}


def test_in_a_soft_maximum_a_trained_scale_counts_by_the_root() -> None:
    assert weigh((16, 32, 64), (32, 64), {32: 0.25, 64: 0.01}, by_root=True) == {16: 1.0, 32: 0.5, 64: 0.0}
    assert MIN_SCALE_WEIGHT**2 > 0.01


def test_all_count_alike_where_nothing_is_known_or_nothing_is_mid_level() -> None:
    assert weigh((16, 32), (32, 64), {}, by_root=False) == {16: 1.0, 32: 1.0}
    assert weigh((32, 64), (32, 64), {32: 0.1, 64: 0.5}, by_root=True) == {32: 1.0, 64: 1.0}
