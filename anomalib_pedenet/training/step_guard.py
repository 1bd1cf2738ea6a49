# Copyright (C) 2026 The anomalib-pedenet authors
# SPDX-License-Identifier: Apache-2.0

"""Optimizer steps that change nothing if the loss or a gradient is not finite, without waiting for the device."""

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm  # of one process, and synchronised over several


class StepGuard:
    """Keeps a model as it was before a step that cannot be made.

    Whether a step is finite is known on the device only, and asking for it would make the host wait in every step. So
    nothing is asked: the fused optimizer is told on the device not to change weights and moments (as it is by a
    gradient scaler), and running averages of batch normalisation, which the forward pass has updated already, are put
    back where the flag says so.

    Args:
        optimizer (torch.optim.Optimizer): Fused optimizer (``found_inf`` is an attribute of those).
        module (nn.Module): Module whose running averages are looked after.

    Examples:
        >>> layer = nn.Linear(2, 1)
        >>> optimizer = torch.optim.Adam(layer.parameters(), fused=True)
        >>> guard, before = StepGuard(optimizer, layer), layer.weight.clone()
        >>> guard.begin()
        >>> loss = layer(torch.full((1, 2), torch.inf)).sum()
        >>> loss.backward()
        >>> is_skipped = guard.check(loss)
        >>> optimizer.step()
        >>> bool(is_skipped), torch.equal(layer.weight, before)
        (True, True)
    """

    def __init__(self, optimizer: torch.optim.Optimizer, module: nn.Module) -> None:
        self.optimizer = optimizer
        buffers = running_averages(module)
        # A vector for each type, so that a step costs a few launches and not one for each layer.
        types = {buffer.dtype for buffer in buffers}
        self._groups = [[buffer for buffer in buffers if buffer.dtype == dtype] for dtype in types]
        self._kept: list[torch.Tensor] = []

    def begin(self) -> None:
        """Note the running averages: call it before the forward pass."""
        self._kept = [_flatten(group) for group in self._groups]

    def check(self, loss: torch.Tensor) -> torch.Tensor:
        """Decide on the step: call it between the backward pass and the optimizer's step.

        Args:
            loss (torch.Tensor): Loss of the step, scalar. The gradients are the optimizer's parameters'.

        Returns:
            torch.Tensor: Whether the step is skipped, bool scalar on the loss's device.
        """
        gradients = [p.grad for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
        averages = [_flatten(group) for group in self._groups]
        # Normalisation can hide from the loss that its averages have overflowed.
        checked = [loss.detach(), nn.utils.get_total_norm(gradients), *averages]
        is_skipped = ~torch.stack([torch.isfinite(value).all() for value in checked]).all()
        self.optimizer.found_inf = is_skipped.float()
        for group, kept, average in zip(self._groups, self._kept, averages, strict=True):
            values = torch.where(is_skipped, kept, average).split([buffer.numel() for buffer in group])
            torch._foreach_copy_(  # as torch's optimizers do
                group, [value.view_as(buffer) for value, buffer in zip(values, group, strict=True)]
            )
        return is_skipped


def running_averages(module: nn.Module) -> list[torch.Tensor]:
    """Return the buffers of a module that its forward passes change in training."""
    layers = (layer for layer in module.modules() if isinstance(layer, _BatchNorm))
    return [buffer for layer in layers for buffer in layer.buffers()]


def _flatten(tensors: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors])
