# Copyright (C) 2026 The anomalib-pedenet authors
# SPDX-License-Identifier: Apache-2.0

"""The fastest way to make training steps, with a clock that the tests move."""

from collections.abc import Callable, Sequence

import pytest
import torch

from anomalib_pedenet.training import pace as module
from anomalib_pedenet.training.pace import RETRY_STEPS, TURNS, Pace, Way, precisions_to_try, ways

TWO, ONE = Way("float32", 2), Way("float32", 1)
BFLOAT16 = Way("bfloat16", 2)
ALL = [TWO, BFLOAT16, ONE, Way("bfloat16", 1)]


class Machine:
    """Makes steps on a machine whose speed by way and step is given, and notes how each was made."""

    def __init__(self, seconds: Callable[[Way, int], float], tried: Sequence[Way], **options: bool | int) -> None:
        self.time, self.seconds = 0.0, seconds
        self.threads: list[int] = []
        self.pace = Pace(tried, now=lambda: self.time, **options)  # type: ignore[arg-type]

    def go(self, first: int, last: int) -> list[Way]:
        made = []
        for step in range(first, last):
            made.append(self.pace.way(step))
            with self.pace.step(step):
                self.threads.append(torch.get_num_threads())
                self.time += self.seconds(made[-1], step)
        return made


def test_every_way_has_its_turns_and_the_fastest_is_kept() -> None:
    usual = dict(zip(ALL, (3.0, 1.0, 2.0, 4.0), strict=True))
    made = Machine(lambda way, _: usual[way], ALL).go(0, 100)
    assert made[: TURNS * 4] == ALL * TURNS
    assert set(made[TURNS * 4 :]) == {BFLOAT16}


def test_the_first_turn_and_a_single_hiccup_do_not_count() -> None:
    def seconds(way: Way, step: int) -> float:
        first_of_one = way == ONE and step == 1
        return 50.0 if first_of_one or step == 5 else {TWO: 2.0, ONE: 1.0}[way]

    assert Machine(seconds, [TWO, ONE]).go(0, 20)[-1] == ONE


@pytest.mark.parametrize(("seconds", "expected"), [(0.95, TWO), (0.85, BFLOAT16)])
def test_a_way_that_is_hardly_faster_is_not_preferred(seconds: float, expected: Way) -> None:
    assert Machine(lambda way, _: 1.0 if way == TWO else seconds, [TWO, BFLOAT16]).go(0, 20)[-1] == expected


def test_another_program_that_comes_and_goes_changes_the_threads() -> None:
    comes, goes = 100, 400

    def seconds(way: Way, step: int) -> float:
        return {TWO: 5.0, ONE: 1.2}[way] if comes <= step < goes else {TWO: 0.5, ONE: 1.0}[way]

    made = Machine(seconds, [TWO, ONE]).go(0, goes + RETRY_STEPS + 50)
    assert made[comes - 1] == TWO
    assert made[comes + 20] == ONE  # noticed within a few steps, and settled
    assert made[-1] == TWO
    assert made[:comes].count(ONE) == TURNS
    assert made[comes:goes].count(TWO) < 25  # few steps are spent on noticing and trying


def test_steps_that_are_slow_for_good_are_not_tried_for_ever() -> None:
    made = Machine(lambda way, step: (1.0 if way == TWO else 2.0) * (1 if step < 50 else 9), [TWO, ONE]).go(0, 1000)
    assert made.count(ONE) == 2 * TURNS


def test_what_must_not_change_does_not() -> None:
    made = Machine(lambda _, step: 1.0 if step < 50 else 9.0, [TWO, BFLOAT16], may_change=False).go(0, 500)
    assert set(made[2 * TURNS :]) == {TWO}


@pytest.mark.parametrize("first", [0, 1, 3, 7, 8, 100])
def test_a_training_that_goes_on_tries_what_was_left_to_try(first: int) -> None:
    whole = Machine(lambda way, _: 1.0 if way == ONE else 2.0, [TWO, ONE]).go(0, 320)
    rest = Machine(lambda way, _: 1.0 if way == ONE else 2.0, [TWO, ONE], first_step=first).go(first, 320)
    if first < 2 * TURNS:
        assert rest == whole[first:]
    else:  # what was chosen is not known: it is found again
        assert rest[: 2 * TURNS] == [TWO, ONE] * TURNS
        assert set(rest[2 * TURNS : RETRY_STEPS]) == {ONE}


def test_threads_are_set_for_the_step_alone_even_if_it_fails() -> None:
    before = torch.get_num_threads()
    machine = Machine(lambda *_: 1.0, [Way("float32", 3), Way("float32", 1)])
    machine.go(0, 4)
    assert machine.threads == [3, 1, 3, 1]
    assert torch.get_num_threads() == before
    with pytest.raises(ZeroDivisionError), machine.pace.step(4):
        _ = 1 / 0
    assert torch.get_num_threads() == before


def test_what_is_tried() -> None:
    assert ways(["float32", "bfloat16"], 2, may_change_threads=True) == ALL
    assert ways(["float32"], 8, may_change_threads=True) == [Way("float32", 8), Way("float32", 4)]
    assert ways(["float32"], 1, may_change_threads=True) == [ONE]
    assert ways(["float32", "bfloat16"], 2, may_change_threads=False) == [TWO, BFLOAT16]


@pytest.mark.parametrize(
    ("has_bfloat16", "asked", "earlier", "expected"),
    [
        (True, "auto", None, ["float32", "bfloat16"]),
        (False, "auto", None, ["float32"]),
        (True, "auto", "bfloat16", ["bfloat16"]),
        (True, "auto", "float32", ["float32"]),
        (False, "auto", "bfloat16", ["float32"]),  # goes on on another machine, where it would take hours
        (False, "bfloat16", None, ["bfloat16"]),
        (True, "float32", "bfloat16", ["float32"]),
    ],
)
def test_precisions(
    has_bfloat16: bool, asked: str, earlier: str | None, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module.torch.cpu, "_is_avx512_bf16_supported", lambda: has_bfloat16)
    assert precisions_to_try(torch.device("cpu"), asked, earlier) == expected  # type: ignore[arg-type]
