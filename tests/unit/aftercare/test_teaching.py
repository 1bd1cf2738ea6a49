# Copyright (C) 2026 The anomalib-pedenet authors
# SPDX-License-Identifier: Apache-2.0

import pytest

from anomalib_pedenet.aftercare.teaching import move_threshold

HELD_OUT = [0.3, 0.35, 0.4, 0.55, 0.6, 0.62]  # others of the taught images were taught: two thirds lie up to 0.6
GOOD = [(0.6, 0.3), (0.7, 0.4), (0.45, 0.45)]


def test_it_rises_until_most_of_what_is_like_the_taught_passes() -> None:
    assert move_threshold(0.5, HELD_OUT, [(0.99, 0.98), (0.9, 0.9)], GOOD) == pytest.approx(0.6)


def test_it_stays_half_way_to_the_lowest_known_defect() -> None:
    # Distances 1 and 1.44: half-way in the logarithm is 1.2.
    assert move_threshold(0.5, HELD_OUT, [(0.9, 0.9), (0.7, 1.44 / 2.44)], GOOD) == pytest.approx(1.2 / 2.2)


def test_a_defect_that_was_not_flagged_before_does_not_hold_it_back() -> None:
    assert move_threshold(0.5, HELD_OUT, [(0.9, 0.9), (0.4, 0.4)], GOOD) == pytest.approx(0.6)


def test_it_falls_just_below_a_known_defect_that_would_be_lost() -> None:
    lower = move_threshold(0.5, HELD_OUT, [(0.9, 0.9), (0.51, 0.48)], GOOD)
    assert 0.4799 < lower < 0.48
    assert move_threshold(0.5, [], [(0.51, 0.48)], GOOD[:1]) == lower  # a single image has no others


@pytest.mark.parametrize(
    ("lowest", "good"),
    [
        (0.47, GOOD),  # a distance of 0.89: good images that are not at hand might be flagged
        (0.48, [(0.6, 0.49)]),  # what was taught would be flagged again
        (0.48, [(0.6, 0.4), (0.45, 0.49)]),  # another good image in its place
    ],
)
def test_it_does_not_fall_far_or_at_the_cost_of_good_images(lowest: float, good: list[tuple[float, float]]) -> None:
    assert move_threshold(0.5, HELD_OUT, [(0.51, lowest)], good) == 0.5


@pytest.mark.parametrize(("held_out", "defects"), [([], [(0.9, 0.9)]), (HELD_OUT, []), (HELD_OUT, [(0.4, 0.3)])])
def test_it_stays_where_nothing_is_known(held_out: list[float], defects: list[tuple[float, float]]) -> None:
    assert move_threshold(0.5, held_out, defects, GOOD) == 0.5
