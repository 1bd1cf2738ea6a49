# Copyright (C) 2026 The anomalib-pedenet authors
# SPDX-License-Identifier: Apache-2.0

"""Checkpoint files: written whole or not at all, and checked to the last byte before anything in them is used."""

import contextlib
import inspect
import os
import pickle
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, BinaryIO

import torch
from anomalib.engine.plugins.checkpoint_io import AnomalibCheckpointIO
from anomalib.utils.serialization import anomalib_safe_globals
from lightning.fabric.utilities.cloud_io import _is_local_file_protocol
from lightning.pytorch import Trainer

from anomalib_pedenet.host.earlier_versions import hyper_parameters_of

# Bit of an archive's entry that makes it a folder.
_FOLDER = 0x10

NETWORK = "model.embedding_network."
"""First part of the names of the weights that every checkpoint of this model has."""


def check_checkpoint_file(
    path: str | Path,
    weights_only: bool | None = True,
    extra_safe_globals: Sequence[Any] = (),
) -> None:
    """Check that a checkpoint is whole, holds nothing but data, and is one of this model.

    torch does not verify the checksums of the zip archive that it writes, so that a flipped bit would become another
    weight. Here every byte is read and compared with them. Then the content is listed, without its tensors.

    Args:
        path (str | Path): Path of the checkpoint. A file that does not exist here is left to the loader's own error.
        weights_only (bool | None): ``False`` if the caller trusts the file so far as to run code in it: the content is
            not listed then.
        extra_safe_globals (Sequence[Any]): Types that it may hold besides anomalib's.

    Raises:
        ValueError: If the file is damaged, holds anything that could run code, or is another model's; the message names
            the file and the remedy.
    """
    if not Path(path).is_file():
        return
    size = f"{Path(path).stat().st_size:,} bytes"
    again = "copy it again from its source, or train anew."
    damage = _find_damage(path)
    if damage:
        msg = f"The checkpoint {path} ({size}) is {damage}: {again}"
        raise ValueError(msg)
    if weights_only is False:
        return
    try:
        with anomalib_safe_globals(extra=extra_safe_globals):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        reason = str(error).partition("\n")[0].rstrip(". ")
        msg = (
            f"The checkpoint {path} holds more than data, and was not loaded ({reason}): do not use it, but one that "
            "was saved by a training of this model."
        )
        raise ValueError(msg) from error
    except Exception as error:
        msg = f"The checkpoint {path} ({size}) is damaged ({type(error).__name__} while listing it): {again}"
        raise ValueError(msg) from error
    weights = content.get("state_dict") if isinstance(content, dict) else None
    if not isinstance(weights, dict) or not any(str(name).startswith(NETWORK) for name in weights):
        msg = f"The checkpoint {path} holds no Pedenet weights: pass one that was trained with --model Pedenet."
        raise ValueError(msg)


def _find_damage(path: str | Path) -> str:
    """Return what is wrong with a zip archive, by its checksums; ``""`` if it is whole."""
    try:
        if not zipfile.is_zipfile(path):
            return "cut short or not a checkpoint"
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            # What Python reads must be what torch reads: it takes files as they are, and what has the mark of a folder
            # for empty, which leaves a tensor as it happens to lie in memory.
            is_plain = [
                not (entry.compress_type or entry.is_dir() or entry.external_attr & _FOLDER) for entry in entries
            ]
            if not all(is_plain) or len(set(archive.namelist())) < len(entries):
                return "damaged (its list of contents)"
            damaged = archive.testzip()
            return f"damaged (the checksum of {damaged})" if damaged else ""
    except Exception as error:  # noqa: BLE001 - zipfile and zlib raise many types on headers that are not what they were
        return f"damaged ({type(error).__name__}: {error})"


def saved_hyper_parameters(path: str | Path, weights_only: bool, safe_globals: Sequence[Any]) -> dict[str, Any]:
    """Return the hyper-parameters in a checkpoint.

    Args:
        path (str | Path): Path of the checkpoint, which has been checked.
        weights_only (bool): As in :func:`check_checkpoint_file`.
        safe_globals (Sequence[Any]): Likewise, ``extra_safe_globals``.

    Returns:
        dict[str, Any]: By name, with what earlier versions did not save; none if the file is not here, but somewhere
            that Lightning knows.
    """
    if not Path(path).is_file():
        return {}
    with anomalib_safe_globals(extra=safe_globals):
        checkpoint = torch.load(path, map_location="cpu", weights_only=weights_only, mmap=True)
    return hyper_parameters_of(checkpoint)


def engine_frame(method: str) -> FrameType | None:
    """Return the frame of a method of anomalib's ``Engine`` from which this is called, if it is.

    ``Engine.export`` and ``Engine.train`` do not hand on what a model has to know: only their frames have it.

    Args:
        method (str): Name of the method.

    Returns:
        FrameType | None: Its frame.
    """
    frame = inspect.currentframe()
    while frame is not None:
        if (frame.f_globals.get("__name__"), frame.f_code.co_name) == ("anomalib.engine.engine", method):
            return frame
        frame = frame.f_back
    return None


class CheckedCheckpointIO(AnomalibCheckpointIO):
    """anomalib's checkpoint reader and writer, with whole files only.

    Lightning writes to the system's folder for temporary files and moves the file from there: where that is another
    file system, the move is a copy, and a process that is killed in it leaves half a checkpoint in place of the last.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:  # noqa: ANN401
        """Save a checkpoint; see :func:`written_whole`.

        Args:
            checkpoint (dict[str, Any]): What to save.
            path (str | Path): Where. Other than local paths are left to Lightning.
            storage_options (Any): Not supported, as in ``TorchCheckpointIO``.

        Raises:
            OSError: If it cannot be written; the earlier file is untouched.
        """
        if storage_options is not None or not _is_local_file_protocol(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        target = Path(str(path).removeprefix("file://"))
        target.parent.mkdir(parents=True, exist_ok=True)
        with written_whole(target) as file:
            torch.save(checkpoint, file)

    def load_checkpoint(
        self,
        path: str | Path,
        map_location: Any = None,  # noqa: ANN401 - of torch
        weights_only: bool | None = True,
    ) -> dict[str, Any]:
        """Load a checkpoint; see ``AnomalibCheckpointIO.load_checkpoint``.

        Raises:
            ValueError: If :func:`check_checkpoint_file` refuses it.
        """
        # Lightning passes None for its default, which an environment variable can turn into False.
        weights_only = weights_only is not False
        check_checkpoint_file(path, weights_only, self.extra_safe_globals)
        return super().load_checkpoint(path, map_location=map_location, weights_only=weights_only)


def read_checked(trainer: Trainer) -> None:
    """Have a Trainer read and write whole checkpoints only, unless the user chose how it does.

    Args:
        trainer (Trainer): Trainer, of anomalib's engine or not.
    """
    present = trainer.strategy.checkpoint_io
    if type(present) is AnomalibCheckpointIO:
        allowed = present.extra_safe_globals  # type: ignore[attr-defined] # mypy sees nothing of anomalib
        trainer.strategy.checkpoint_io = CheckedCheckpointIO(allowed)


@contextlib.contextmanager
def written_whole(target: Path) -> Iterator[BinaryIO]:
    """Give a file to write to, which takes its place on the disk in one step when all is written.

    A process that is killed before leaves an earlier file as it was, and perhaps a ``.<name>.part`` beside it, which
    the next one overwrites.

    Args:
        target (Path): Where it is to be, in a folder that exists.

    Yields:
        BinaryIO: The file.

    Raises:
        OSError: If it cannot be written; an earlier file is untouched, as after any other exception.
    """
    part = target.with_name(f".{target.name}.part")
    try:
        with part.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        part.replace(target)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    _sync_folder(target.parent)


def _sync_folder(folder: Path) -> None:
    """See that the new name in a folder outlasts a power failure, where the system can."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
