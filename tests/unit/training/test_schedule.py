# Copyright (C) 2026 The anomalib-pedenet authors
# SPDX-License-Identifier: Apache-2.0

from typing import Any

import pytest
import torch

from anomalib_pedenet import Pedenet
from anomalib_pedenet.training.schedule import Schedule, take_back


def schedule(
    num_images: int | None = 100,
    limits: dict[str, Any] | None = None,
    **arguments: Any,  # noqa: ANN401
) -> Schedule:
    return Schedule(Pedenet(**arguments).hparams, num_images, **limits or {})


def optimizer() -> torch.optim.Optimizer:
    return torch.optim.Adam([torch.zeros(1, requires_grad=True)], lr=1e-3)


@pytest.mark.parametrize(
    ("limits", "steps"),
    [
        ({}, 900),
        ({"max_steps": 500}, 500),
        ({"max_steps": 5000}, 900),
        ({"max_epochs": 1}, 900),  # then each image serves three times as many
        ({"max_epochs": -1}, 900),
        ({"shortened_to": 300, "max_steps": 500}, 300),
    ],
)
def test_the_shortest_limit_stands(limits: dict[str, Any], steps: int) -> None:
    assert schedule(max_steps=900, limits=limits).total_steps == steps


def test_epochs_limit_the_steps_where_each_image_serves_a_given_number() -> None:
    planned = schedule(max_steps=900, steps_per_image=2, limits={"max_epochs": 3})
    assert (planned.total_steps, planned.steps_per_image) == (600, 2)


@pytest.mark.parametrize(
    ("num_images", "max_epochs", "steps"), [(100, None, 3), (100, 2, 5), (7, None, 43), (None, 2, 4)]
)
def test_steps_per_image_make_about_three_epochs(num_images: int | None, max_epochs: int | None, steps: int) -> None:
    assert schedule(num_images, max_steps=900, limits={"max_epochs": max_epochs}).steps_per_image == steps


def test_the_density_loss_sets_in_after_its_warm_up() -> None:
    planned = schedule(max_steps=100, density_warmup=0.25)
    assert [planned.density_scale(step) for step in (0, 25, 30, 50, 99)] == [0, 0, pytest.approx(0.2), 1, 1]
    assert schedule(density_warmup=0.0).density_scale(0) == 1


def test_the_rate_rises_and_falls_to_nothing() -> None:
    adam = optimizer()
    rates = schedule(max_steps=10, learning_rate=0.5).learning_rate(adam)
    assert rates is not None
    seen = []
    for _ in range(10):
        seen.append(rates.get_last_lr()[0])
        adam.step()
        if len(seen) < 10:
            rates.step()
    assert max(seen) == seen[2] == pytest.approx(0.5)  # after three tenths
    assert seen[-1] < 1e-4
    assert schedule(lr_schedule="constant").learning_rate(adam) is None


def test_a_training_at_chance_is_shortened_once() -> None:
    planned = schedule(max_steps=3000, max_steps_at_chance=900)
    assert not planned.shorten_at_chance(599, learned=0.0)  # too early to say
    assert not planned.shorten_at_chance(600, learned=0.2)
    assert planned.shorten_at_chance(600, learned=0.19)
    assert planned.total_steps == planned.shortened_to == 900
    assert not planned.shorten_at_chance(700, learned=0.0)


def test_a_batch_that_passes_the_time_of_the_decision_moves_the_end() -> None:
    planned = schedule(max_steps=3000, max_steps_at_chance=900)
    assert planned.shorten_at_chance(1000, learned=0.0)
    assert planned.total_steps == 1500
    assert not schedule(max_steps=3000, max_steps_at_chance=900).shorten_at_chance(2500, learned=0.0)
    assert not schedule(max_steps=3000, max_steps_at_chance=None).shorten_at_chance(2000, learned=0.0)


def test_skipped_steps_are_taken_back() -> None:
    adam = optimizer()
    rates, made = (schedule(max_steps=10).learning_rate(adam) for adam in (adam, optimizer()))
    assert rates is not None
    assert made is not None
    adam.step()
    made.optimizer.step()
    for _ in range(5):
        rates.step()
    for _ in range(3):
        made.step()
    take_back(rates, 2)
    assert rates.get_last_lr() == made.get_last_lr()
    take_back(None, 3)  # a constant rate
