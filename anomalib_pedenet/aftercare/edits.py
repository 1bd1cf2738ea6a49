# Copyright (C) 2026 The anomalib-pedenet authors
# SPDX-License-Identifier: Apache-2.0

"""Changes to trained checkpoints: made in one step, noted in the file itself, and taken back exactly."""

from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from anomalib_pedenet.host.checkpoint_io import CheckedCheckpointIO
from anomalib_pedenet.host.earlier_versions import bring_up_to_date
from anomalib_pedenet.lightning_model import Pedenet
from anomalib_pedenet.post_processor import Thresholds

EDITS = "pedenet_edits"
"""Entry of a checkpoint: a mapping for each change after the training, the latest last, with the tensors replaced."""


def check_exists(ckpt_path: str | Path) -> None:
    """Check that there is a checkpoint.

    Raises:
        ValueError: If there is no such file.
    """
    if not Path(ckpt_path).is_file():
        msg = f"There is no checkpoint {ckpt_path}: pass the model.ckpt of a training."
        raise ValueError(msg)


def _files() -> CheckedCheckpointIO:
    """Return what reads and writes checkpoints of this model."""
    return CheckedCheckpointIO(Pedenet.checkpoint_safe_globals())


def read_checkpoint(ckpt_path: str | Path) -> dict[str, Any]:
    """Read a checkpoint, as data only.

    Args:
        ckpt_path (str | Path): File.

    Returns:
        dict[str, Any]: Its content.

    Raises:
        ValueError: If there is no such file, or it is not a whole checkpoint of this model.
    """
    check_exists(ckpt_path)
    checkpoint = _files().load_checkpoint(ckpt_path, map_location="cpu")
    bring_up_to_date(checkpoint)
    return checkpoint


def edit_checkpoint(
    ckpt_path: str | Path,
    output: str | Path | None,
    what: str,
    details: dict[str, Any],
    tensors: Mapping[str, torch.Tensor],
    replaced: tuple[str, ...] = (),
) -> Path:
    """Change tensors of a checkpoint, and note the change in it, with what was there before.

    Args:
        ckpt_path (str | Path): Checkpoint.
        output (str | Path | None): Where to save the changed one; ``None`` to put it in the place of the old, which is
            whole at every moment.
        what (str): Name of the change.
        details (dict[str, Any]): What else to note: numbers, text and lists of them.
        tensors (Mapping[str, torch.Tensor]): New tensors, by their names in the state.
        replaced (tuple[str, ...]): First parts of names of which the state is to have none but new ones.

    Returns:
        Path: The file that was written.

    Raises:
        ValueError: As :func:`read_checkpoint`.
        OSError: If it cannot be written; the old one is untouched.
    """
    checkpoint = read_checkpoint(ckpt_path)
    state = checkpoint["state_dict"]
    new = {
        name: value.detach().cpu()
        for name, value in tensors.items()
        if name not in state or not _are_equal(state[name], value)
    }
    removed = [name for name in state if name.startswith(replaced) and name not in tensors]
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    before = {name: state[name] for name in [*new, *removed] if name in state}
    added = [name for name in new if name not in state]
    edit = {"what": what, "when": now, **details, "before": before, "added": added}
    checkpoint[EDITS] = [*checkpoint.get(EDITS, []), edit]
    checkpoint["state_dict"] = {name: value for name, value in state.items() if name not in removed} | new
    target = Path(output or ckpt_path)
    _files().save_checkpoint(checkpoint, target)
    return target


def thresholds_state(thresholds: Thresholds) -> dict[str, torch.Tensor]:
    """Return the state of a checkpoint that has some thresholds, by names in the state."""
    return {f"post_processor.{name}": value for name, value in thresholds.state().items()}


def undo_edit(ckpt_path: str | Path, output: str | Path | None = None) -> dict[str, Any]:
    """Take the latest change of a checkpoint back: every tensor is as before.

    Args:
        ckpt_path (str | Path): Checkpoint.
        output (str | Path | None): Where to save it; ``None`` for the same file.

    Returns:
        dict[str, Any]: What was noted of the change.

    Raises:
        ValueError: If there is no change to take back, or as :func:`read_checkpoint`.
        OSError: If it cannot be written; the old one is untouched.
    """
    checkpoint = read_checkpoint(ckpt_path)
    edits = checkpoint.pop(EDITS, [])
    if not edits:
        msg = f"{ckpt_path} was not changed after its training: there is nothing to undo."
        raise ValueError(msg)
    *earlier, latest = edits
    added = latest.pop("added", ())
    kept = {name: value for name, value in checkpoint["state_dict"].items() if name not in added}
    checkpoint["state_dict"] = kept | latest.pop("before")
    if earlier:
        checkpoint[EDITS] = earlier
    _files().save_checkpoint(checkpoint, output or ckpt_path)
    return latest


def _are_equal(first: torch.Tensor, second: torch.Tensor) -> bool:
    return first.shape == second.shape and torch.equal(first, second.to(first))
