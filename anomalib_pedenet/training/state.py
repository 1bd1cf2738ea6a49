# Copyright (C) 2026 The anomalib-pedenet authors
# SPDX-License-Identifier: Apache-2.0

"""What a checkpoint needs besides weights, so that a training goes on exactly where it was: generators, and origin."""

import os
import platform
import random
from enum import Enum
from importlib.metadata import PackageNotFoundError, version
from pathlib import PurePath
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Trainer

_PACKAGES = ("anomalib-pedenet", "anomalib", "torch", "torchvision", "lightning", "numpy")


def random_state(device: torch.device) -> dict[str, Any]:
    """Return the states of the global random generators of torch, NumPy and Python as plain data.

    Args:
        device (torch.device): Device of the training, whose own generator is included if it is a CUDA device.

    Returns:
        dict[str, Any]: Tensors, numbers and tuples, which ``torch.load(weights_only=True)`` accepts.
    """
    numpy_state: Any = np.random.get_state()  # noqa: NPY002 - what other code may draw from
    name, keys, position, has_gauss, cached = numpy_state
    return {
        "torch": torch.get_rng_state(),
        "numpy": (name, torch.from_numpy(keys.astype(np.int64)), int(position), int(has_gauss), float(cached)),
        "python": random.getstate(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
    }


def set_random_state(state: dict[str, Any], device: torch.device) -> None:
    """Put the global random generators back into a state.

    Args:
        state (dict[str, Any]): What :func:`random_state` returned.
        device (torch.device): Device of the training.
    """
    torch.set_rng_state(state["torch"].cpu())
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.cpu().numpy().astype(np.uint32), *rest))  # noqa: NPY002
    random.setstate(state["python"])
    if device.type == "cuda" and state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"].cpu(), device)


def seed_generators(seed: int) -> None:
    """Seed the global random generators of torch (on every device), NumPy and Python.

    Args:
        seed (int): Seed, from 0 to 2**32 - 1.
    """
    torch.manual_seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    random.seed(seed)


def origin(trainer: Trainer) -> dict[str, Any]:
    """Return what a training's result depends on besides the model's arguments, which Lightning saves.

    Args:
        trainer (Trainer): Trainer of the training.

    Returns:
        dict[str, Any]: ``seed``, as given to ``seed_everything`` (``None`` if it was not called); ``torch_seed``, that
            of torch's generator in any case; ``versions`` by name; and the plain values among the arguments of the
            data module (``data``) and of the trainer (``trainer``).
    """
    seed = os.environ.get("PL_GLOBAL_SEED")
    datamodule = getattr(trainer, "datamodule", None)
    return {
        "seed": None if seed is None else int(seed),
        "torch_seed": torch.initial_seed(),
        "versions": {"python": platform.python_version()} | {package: _version(package) for package in _PACKAGES},
        "data": {"class": type(datamodule).__name__} | _plain(vars(datamodule) if datamodule is not None else {}),
        "trainer": {
            "max_epochs": trainer.max_epochs,
            "max_steps": trainer.max_steps,
            "precision": str(trainer.precision),
            "device": str(trainer.strategy.root_device),
            "world_size": trainer.world_size,
            "strategy": type(trainer.strategy).__name__,
            "threads": torch.get_num_threads(),
        },
    }


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    """Return the public values that are plain data, paths and members of enumerations as what they stand for."""
    plain = {
        name: str(value) if isinstance(value, PurePath) else value.value if isinstance(value, Enum) else value
        for name, value in values.items()
        if not name.startswith("_")
    }
    return {name: value for name, value in plain.items() if isinstance(value, str | int | float | None)}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # for instance a checkout on the path
        return "unknown"
