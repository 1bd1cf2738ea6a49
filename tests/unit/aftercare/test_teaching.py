# Copyright (C) 2026 The anomalib-pedenet authors
# SPDX-License-Identifier: Apache-2.0

import pytest

from anomalib_pedenet.aftercare.teaching import move_threshold

TAUGHT = [0.3, 0.35, 0.4, 0.55, 0.6, 0.62]  # others of them were taught: two thirds lie up to 0.6


def test_it_rises_until_most_of_what_is_like_the_taught_passes() -> None:
    assert move_threshold(0.5, TAUGHT, [(0.99, 0.98), (0.9, 0.9)]) == pytest.approx(0.6)


def test_it_stays_half_way_to_the_lowest_known_defect() -> None:
    # Distances 1 and 1.44: half-way in the logarithm is 1.2.
    assert move_threshold(0.5, TAUGHT, [(0.9, 0.9), (0.7, 1.44 / 2.44)]) == pytest.approx(1.2 / 2.2)


def test_a_defect_that_was_not_flagged_before_does_not_hold_it_back() -> None:
    assert move_threshold(0.5, TAUGHT, [(0.9, 0.9), (0.4, 0.4)]) == pytest.approx(0.6)


def test_it_falls_just_below_a_known_defect_that_would_be_lost() -> None:
    lower = move_threshold(0.5, [0.2, 0.3, 0.35, 0.49], [(0.51, 0.48)], good=[(0.6, 0.3), (0.45, 0.49)])
    assert 0.4799 < lower < 0.48


@pytest.mark.parametrize(
    ("held_out", "good"),
    [
        ([0.2, 0.45, 0.46], []),  # then most of what is like the taught would be flagged
        ([0.1, 0.2, 0.3], [(0.3, 0.3), (0.45, 0.45)]),  # or more of the known good images
    ],
)
def test_it_does_not_fall_at_the_cost_of_good_images(held_out: list[float], good: list[tuple[float, float]]) -> None:
    assert move_threshold(0.5, held_out, [(0.51, 0.41)], good) == 0.5


@pytest.mark.parametrize(("held_out", "defects"), [([], [(0.9, 0.9)]), (TAUGHT, []), (TAUGHT, [(0.4, 0.3)])])
def test_it_stays_where_nothing_is_known(held_out: list[float], defects: list[tuple[float, float]]) -> None:
    assert move_threshold(0.5, held_out, defects) == 0.5
