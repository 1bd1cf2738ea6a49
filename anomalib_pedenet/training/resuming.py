# Copyright (C) 2026 The anomalib-pedenet authors
# SPDX-License-Identifier: Apache-2.0

"""Going on with a training exactly where its checkpoint was: random generators, pool of images, skipped steps.

And what a training's result depends on besides, for the record: seeds, versions, data.
"""

import logging
import os
import platform
import random
from collections.abc import Callable
from enum import Enum
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Trainer

from anomalib_pedenet.argument_checks import TrainPrecision
from anomalib_pedenet.data.image_pool import ImagePool
from anomalib_pedenet.data.normal_images import TrainingSet

logger = logging.getLogger(__name__)

_PACKAGES = ("anomalib-pedenet", "anomalib", "torch", "torchvision", "lightning", "numpy")


class Resuming:
    """Seeds a training, or puts it where its checkpoint was.

    Attributes:
        precision (str | None): That in which an earlier part of the training chose to make steps, if it is known.
        loaded (list[dict[str, Any]] | None): What a checkpoint holds of each process, from :meth:`state`, until the
            training goes on.
    """

    def __init__(self) -> None:
        self.precision: TrainPrecision | None = None
        self.loaded: list[dict[str, Any]] | None = None
        self._random: dict[str, Any] | None = None  # what the first epoch is to draw from, until its first batch

    @staticmethod
    def state(
        trainer: Trainer,
        device: torch.device,
        pool: ImagePool,
        images: TrainingSet,
        skipped_in_row: int,
        precision: TrainPrecision | None,
    ) -> list[dict[str, Any]]:
        """Return what each process needs to go on exactly, as plain data.

        Args:
            trainer (Trainer): Trainer of the training.
            device (torch.device): Its device.
            pool (ImagePool): The images that crops are drawn from.
            images (TrainingSet): The training images.
            skipped_in_row (int): Steps that were skipped just before.
            precision (str | None): Precision of the steps, if one has been chosen.

        Returns:
            list[dict[str, Any]]: For each process: its generators, and what is in its pool of images.
        """
        state: dict[str, Any] = {"random": random_state(device), "skipped_in_row": skipped_in_row}
        state["precision"] = precision
        positions = images.positions(pool.sources)
        if positions is not None:
            names = [Path(str(source)).name for source in pool.sources]
            state["pool"] = pool.state_dict() | {"positions": positions, "names": names}
        states = [state] * trainer.world_size
        if trainer.world_size > 1:
            torch.distributed.all_gather_object(states, state)
        return states

    def seed(self, trainer: Trainer, device: torch.device, seed: int | None) -> None:
        """Seed a new training, each process by another number: else all would draw the same crops.

        Args:
            trainer (Trainer): Trainer of the training.
            device (torch.device): Its device.
            seed (int | None): Seed, or ``None`` to leave the generators as they are.
        """
        rank = trainer.global_rank
        if seed is not None:
            seed_generators(seed + 1 + rank)  # other numbers than those of the weights
            self._random = random_state(device)
        elif trainer.world_size > 1:
            torch.manual_seed(torch.initial_seed() + rank)

    def go_on(
        self,
        trainer: Trainer,
        device: torch.device,
        pool: ImagePool,
        images: TrainingSet,
        standardize: Callable[[torch.Tensor], torch.Tensor],
    ) -> int:
        """Put a training where its checkpoint was.

        Args:
            trainer (Trainer): Trainer of the training.
            device (torch.device): Its device.
            pool (ImagePool): An empty pool, which is filled.
            images (TrainingSet): The training images.
            standardize (Callable[[torch.Tensor], torch.Tensor]): What is done to images before they enter the pool.

        Returns:
            int: Steps that were skipped just before.
        """
        states, self.loaded = self.loaded, None
        if states is None or len(states) != trainer.world_size:
            logger.warning(
                "The checkpoint was saved by an earlier version or by another number of processes: the training goes "
                "on from its weights, but not exactly as it would have."
            )
            return 0
        state = states[trainer.global_rank]
        if "pool" in state:
            _restore_pool(pool, state["pool"], images, standardize)
        self._random = state["random"]
        self.precision = state.get("precision")  # not in checkpoints of earlier versions
        set_random_state(state["random"], device)
        return int(state["skipped_in_row"])

    def begin_epoch(self, trainer: Trainer, device: torch.device) -> None:
        """Have the first epoch of a seeded or resumed training draw from the generators as they are meant to be.

        Args:
            trainer (Trainer): Trainer of the training, at the start of an epoch.
            device (torch.device): Its device.
        """
        if self._random is None:
            return
        set_random_state(self._random, device)
        loop = trainer.fit_loop
        if trainer.current_epoch == 0 or loop.is_resuming or loop.epoch_loop.restarting:
            # The loop has drawn the order of the images before, and draws it at the start of other epochs only.
            assert loop._data_fetcher is not None  # noqa: SLF001 - as the loop itself does
            iter(loop._data_fetcher)  # noqa: SLF001

    def begin_batch(self) -> None:
        """Note that the epoch has begun."""
        self._random = None


def _restore_pool(
    pool: ImagePool,
    state: dict[str, Any],
    images: TrainingSet,
    standardize: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    """Decode the images again that were in the pool, if the training set is the same."""
    paths, positions = images.paths, state["positions"]
    if [Path(paths[position]).name for position in positions if position < len(paths)] != state["names"]:
        logger.warning("The training set is not that of the checkpoint: the training goes on with its images.")
        return
    standardized = (standardize(image) for image in images.images(positions, with_augmentations=True))
    try:
        pool.load_state_dict(state, standardized, [paths[position] for position in positions])
    except ValueError as error:
        logger.warning("%s The training goes on, but not exactly.", error)


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
