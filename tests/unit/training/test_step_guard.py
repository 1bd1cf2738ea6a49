# Copyright (C) 2026 The anomalib-pedenet authors
# SPDX-License-Identifier: Apache-2.0

"""Steps that are not finite, on a small network."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

from anomalib_pedenet.training.step_guard import StepGuard


def step(network: nn.Module, optimizer: torch.optim.Optimizer, guard: StepGuard | None, scale: float) -> torch.Tensor:
    """Make a step whose inputs are scaled, and return its flag."""
    images = torch.linspace(-1, 1, 2 * 3 * 5 * 5).reshape(2, 3, 5, 5) * scale
    if guard is not None:
        guard.begin()
    loss = network(images).square().mean()
    optimizer.zero_grad()
    loss.backward()
    flag = torch.tensor(False) if guard is None else guard.check(loss)
    optimizer.step()
    return flag


def make() -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 1, 3))
    return network, torch.optim.Adam(network.parameters(), lr=0.1, fused=True)


def state(network: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    return copy.deepcopy({"weights": network.state_dict(), "moments": optimizer.state_dict()["state"]})


def flat(nested: Any) -> list[torch.Tensor]:  # noqa: ANN401
    return [nested] if isinstance(nested, torch.Tensor) else [tensor for key in nested for tensor in flat(nested[key])]


@pytest.mark.parametrize("scale", [torch.inf, torch.nan, 1e30])
def test_steps_between_are_as_if_the_bad_one_had_not_been(scale: float) -> None:
    (network, optimizer), (expected, reference) = make(), make()
    guard = StepGuard(optimizer, network)
    flags = [bool(step(network, optimizer, guard, each)) for each in (1.0, scale, 1.0, scale, scale, 1.0)]
    assert flags == [False, True, False, True, True, False]
    for _ in range(3):
        step(expected, reference, None, 1.0)
    ours, theirs = flat(state(network, optimizer)), flat(state(expected, reference))
    assert len(ours) == len(theirs) > 20
    for left, right in zip(ours, theirs, strict=True):
        assert torch.equal(left, right)


def test_a_gradient_alone_is_enough() -> None:
    """The root's slope at 0 is infinite, and the loss is 0."""
    network, optimizer = make()
    step(network, optimizer, None, 1.0)
    before = state(network, optimizer)
    guard = StepGuard(optimizer, network)
    guard.begin()
    loss = (network[0].weight - network[0].weight.detach()).abs().sqrt().sum()
    optimizer.zero_grad()
    loss.backward()
    assert bool(torch.isfinite(loss))
    assert bool(guard.check(loss))
    optimizer.step()
    assert all(
        torch.equal(left, right) for left, right in zip(flat(before), flat(state(network, optimizer)), strict=True)
    )
