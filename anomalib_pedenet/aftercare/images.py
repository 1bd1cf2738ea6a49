# Copyright (C) 2026 The anomalib-pedenet authors
# SPDX-License-Identifier: Apache-2.0

"""Images of files and folders, as a model sees them."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from anomalib.data.utils import read_image
from anomalib.data.utils.image import IMG_EXTENSIONS
from numpy.typing import NDArray
from PIL import Image
from torchvision.transforms.v2.functional import resize

from anomalib_pedenet.lightning_model import Pedenet

ImageSource = str | Path | Sequence[str | Path]
"""Images: a file, a folder with all that is in it, or several of them."""


def image_files(source: ImageSource) -> list[Path]:
    """Return the image files of files and folders, those of a folder in order, each once.

    Args:
        source (ImageSource): Files and folders.

    Returns:
        list[Path]: At least one file.

    Raises:
        ValueError: If there is no such file or folder, or no image in a folder.
    """
    files: list[Path] = []
    for path in [source] if isinstance(source, str | Path) else source:
        path = Path(path)  # noqa: PLW2901 - the same, as a Path
        if path.is_dir():
            found = sorted(file for file in path.rglob("*") if file.suffix.lower() in IMG_EXTENSIONS)
            if not found:
                msg = f"There is no image in {path}: files must end with {', '.join(IMG_EXTENSIONS)}."
                raise ValueError(msg)
            files += found
        elif path.is_file():
            files.append(path)
        else:
            msg = f"There is no file or folder {path}: pass images, or a folder with images."
            raise ValueError(msg)
    if not files:
        msg = "No images were given: pass files, or folders with images."
        raise ValueError(msg)
    return list(dict.fromkeys(files))


class PreparedImages:
    """Images of files, as a model's networks see them; they are read anew each time.

    Args:
        model (Pedenet): The model, with its pre-processor.
        files (Sequence[Path]): Files.
    """

    def __init__(self, model: Pedenet, files: Sequence[Path]) -> None:
        self._model = model
        self.files = list(files)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> torch.Tensor:
        """Return an image ``[1, 3, H, W]``, pre-processed."""
        image = read(self.files[index]).to(self._model.device)[None]
        processor = self._model.pre_processor
        return image if processor is None else processor(image)

    def __iter__(self) -> Iterator[torch.Tensor]:
        return (self[index] for index in range(len(self)))

    def take(self, positions: Sequence[int]) -> "PreparedImages":
        """Return some of them."""
        return PreparedImages(self._model, [self.files[position] for position in positions])


def read(file: Path) -> torch.Tensor:
    """Read an image as anomalib does.

    Args:
        file (Path): File.

    Returns:
        torch.Tensor: RGB ``[3, H, W]``, from 0 to 1.

    Raises:
        ValueError: If it cannot be read; the message names the file.
    """
    try:
        return read_image(file, as_tensor=True)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        msg = f"Cannot read {file} ({error}): copy the file again, or take it out of the folder."
        raise ValueError(msg) from error


def as_seen(file: Path, size: tuple[int, int]) -> NDArray[np.uint8]:
    """Return an image in the size in which a model sees it, to be looked at: RGB ``[H, W, 3]``."""
    image = resize(read(file), list(size), antialias=True)
    return (image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
