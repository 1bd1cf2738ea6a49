# Copyright (C) 2026 The anomalib-pedenet authors
# SPDX-License-Identifier: Apache-2.0

"""Thresholds for a rate of false alarms: the rate holds over many draws, and what cannot be kept is refused."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from anomalib_pedenet.false_alarms import choose_threshold


@given(st.lists(st.floats(0, 1), min_size=9, max_size=60), st.floats(0.1, 0.9))
def test_no_lower_threshold_would_do(scores: list[float], rate: float) -> None:
    chosen = choose_threshold(scores, rate)
    # One more image has each of the n + 1 ranks alike, so that above the k-th lowest score are n + 1 - k of them.
    allowed = [
        (score, (len(scores) - rank) / (len(scores) + 1))
        for rank, score in enumerate(sorted(scores))
        if (len(scores) - rank) / (len(scores) + 1) <= rate + 1e-9
    ]
    assert (chosen.threshold, chosen.rate) == (allowed[0][0], pytest.approx(allowed[0][1]))


@pytest.mark.parametrize(("count", "rate"), [(99, 0.01), (150, 0.05), (19, 0.2)])
def test_the_rate_holds_over_many_draws(count: int, rate: float) -> None:
    generator = np.random.default_rng(0)
    realised, within = [], 0
    for _ in range(2_000):
        chosen = choose_threshold(generator.standard_cauchy(count).tolist(), rate)
        # The rate that this threshold really has: of a Cauchy distribution it is known.
        realised.append(0.5 - np.arctan(chosen.threshold) / np.pi)
        within += chosen.low <= realised[-1] <= chosen.high
    error = 3 * np.std(realised) / np.sqrt(len(realised))
    assert np.mean(realised) == pytest.approx(chosen.rate, abs=error)
    assert chosen.rate <= rate
    assert within / len(realised) == pytest.approx(0.95, abs=3 * np.sqrt(0.05 * 0.95 / len(realised)))


def test_as_many_images_as_the_message_asks_for_are_enough() -> None:
    with pytest.raises(ValueError, match=r"With 98 good image\(s\) no rate below 1 in 99 .* give 99 or more"):
        choose_threshold([0.0] * 98, 0.01)
    assert choose_threshold(np.linspace(0, 1, 99).tolist(), 0.01).threshold == 1


@pytest.mark.parametrize("rate", [0.0, 1.0, -0.1, float("nan")])
def test_a_rate_outside_its_range_is_refused(rate: float) -> None:
    with pytest.raises(ValueError, match="above 0 and below 1"):
        choose_threshold([0.1, 0.2], rate)


def test_a_score_that_is_not_finite_is_refused() -> None:
    with pytest.raises(ValueError, match="not finite"):
        choose_threshold([0.1, float("nan")], 0.5)
