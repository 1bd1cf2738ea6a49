# Copyright (C) 2026 The anomalib-pedenet authors
# SPDX-License-Identifier: Apache-2.0

"""Reading checkpoints: a file that is not a whole one is refused by name."""

import zipfile
from pathlib import Path
from typing import Any

from anomalib.engine.plugins.checkpoint_io import AnomalibCheckpointIO


def check_checkpoint_file(path: str | Path) -> None:
    """Check that a checkpoint is a whole file; a file that does not exist is left to the loader's own error.

    Args:
        path (str | Path): Path of the checkpoint.

    Raises:
        ValueError: If it is not the zip archive that ``torch.save`` writes.
    """
    if Path(path).is_file() and not zipfile.is_zipfile(path):
        msg = (
            f"The checkpoint {path} ({Path(path).stat().st_size:,} bytes) is cut short or not a checkpoint: copy it "
            "again from its source, or train anew."
        )
        raise ValueError(msg)


class CheckedCheckpointIO(AnomalibCheckpointIO):
    """anomalib's checkpoint reader and writer, with :func:`check_checkpoint_file` before reading."""

    def load_checkpoint(self, path: str | Path, *args: Any, **kwargs: Any) -> dict[str, Any]:  # noqa: ANN401
        """Load a checkpoint; see ``AnomalibCheckpointIO.load_checkpoint``.

        Raises:
            ValueError: If the file is not a whole checkpoint.
        """
        check_checkpoint_file(path)
        return super().load_checkpoint(path, *args, **kwargs)
