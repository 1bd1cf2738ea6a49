# Copyright (C) 2026 The anomalib-pedenet authors
# SPDX-License-Identifier: Apache-2.0

"""The region of interest: where images are looked at, and what is hidden from the networks.

Hidden pixels are replaced by the training images' mean colour before anything is computed of an image, in training,
calibration, scoring and exports alike. So no result depends on what is there. Their scores are 0.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from anomalib.models.components import DynamicBufferMixin
from PIL import Image
from scipy import ndimage
from torch import nn
from torch.nn import functional as F  # noqa: N812

from anomalib_pedenet.patches import grid_size

AUTO_ROI = "auto"
"""Asks for the region to be found: all but a constant background."""

# Share of the most visible crop's pixels that a crop of the training has at least.
_LEAST_VISIBLE = 0.5

# Contrast of a part to the background, as a fraction of the standard deviation of all images.
_CONTRAST = 0.25
_SPECK = 5e-4  # of an image: what is smaller is dust on the background, and no part
_MARGIN = 1 / 16  # of the shorter side: so far around the parts the background is looked at, where chips and burrs are
_LEAST_HIDDEN = 0.05  # of an image, below which hiding it is not worth a region


class RegionOfInterest(DynamicBufferMixin, nn.Module):
    """Hides what lies outside of a region, the same one in all images.

    Before :meth:`set`, and after :meth:`reset`, nothing is hidden.

    Attributes:
        visible (torch.Tensor): 1 where images are looked at, else 0, ``[1, 1, H, W]``; one 1 for everywhere.
    """

    visible: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("visible", torch.ones(1, 1, 1, 1))

    @property
    def is_everywhere(self) -> bool:
        """Whether nothing is hidden."""
        return self.visible.shape[-2:].numel() == 1

    def reset(self) -> None:
        """Hide nothing."""
        self.visible = torch.ones_like(self.visible[..., :1, :1])

    def set(self, visible: torch.Tensor) -> None:
        """Hide what is not visible.

        Args:
            visible (torch.Tensor): Bool ``[H, W]``, of the size of pre-processed images.

        Raises:
            ValueError: If nothing is visible.
        """
        if not bool(visible.any()):
            msg = "The region of interest is empty, so that nothing of the images is left to look at."
            raise ValueError(msg)
        self.visible = visible[None, None].to(self.visible)
        if bool(visible.all()):
            self.reset()

    def of(self, size: tuple[int, int]) -> torch.Tensor:
        """Return what is visible of images of some height and width, 1 or 0, ``[1, 1, H, W]``."""
        return F.interpolate(self.visible, size=size, mode="nearest")

    def hide(self, images: torch.Tensor, color: torch.Tensor) -> torch.Tensor:
        """Replace hidden pixels.

        Args:
            images (torch.Tensor): ``[B, C, H, W]``.
            color (torch.Tensor): What they become, ``[C, 1, 1]``.

        Returns:
            torch.Tensor: Images of the same shape; they themselves where nothing is hidden.
        """
        if self.is_everywhere:
            return images
        return torch.where(self.of((images.shape[-2], images.shape[-1])) > 0, images, color.to(images))

    def clear(self, maps: torch.Tensor) -> torch.Tensor:
        """Return maps ``[B, 1, H, W]`` with a score of 0 at hidden pixels."""
        return maps if self.is_everywhere else maps * self.of((maps.shape[-2], maps.shape[-1]))

    def share(self, size: tuple[int, int]) -> torch.Tensor | float:
        """Return which share of images of some height and width is visible, above 0 and up to 1."""
        return 1.0 if self.is_everywhere else self.of(size).mean()

    def pixels(self, size: tuple[int, int]) -> torch.Tensor:
        """Return which pixels of images of some height and width are visible, bool ``[H, W]``."""
        return self.of(size)[0, 0] > 0

    def patches(self, size: tuple[int, int], patch_size: int, stride: int, margin: int = 0) -> torch.Tensor:
        """Return which patches of images of some height and width show a visible pixel, or come near to one.

        Args:
            size (tuple[int, int]): Height and width of the images in pixels.
            patch_size (int): Side of a patch in pixels.
            stride (int): Distance between neighbouring patches in pixels.
            margin (int): How near in pixels. Defaults to ``0``.

        Returns:
            torch.Tensor: Bool ``[h, w]``, true for at least one patch.
        """
        if self.is_everywhere:
            return torch.ones(grid_size(size, patch_size, stride), dtype=torch.bool, device=self.visible.device)
        near = F.max_pool2d(self.of(size), 2 * margin + 1, 1, margin)
        found = F.max_pool2d(near, patch_size, stride)[0, 0] > 0
        # Pixels beyond the last patch may be all that is visible.
        return found | ~found.any()

    def whole_patches(self, size: tuple[int, int], patch_size: int, stride: int) -> torch.Tensor:
        """Return which patches are visible all over; where none is, those of :meth:`patches`."""
        whole = -F.max_pool2d(-self.of(size), patch_size, stride)[0, 0] > 0
        return whole if bool(whole.any()) else self.patches(size, patch_size, stride)

    def crop_positions(self, size: tuple[int, int], crop: tuple[int, int]) -> torch.Tensor:
        """Return where crops that show much of the region may lie.

        Args:
            size (tuple[int, int]): Height and width of the images in pixels.
            crop (tuple[int, int]): Height and width of a crop.

        Returns:
            torch.Tensor: ``(row, column)`` of the crops' top left corners, int64 ``[P, 2]``.
        """
        visible = self.of(size)[0, 0].double()
        total = F.pad(visible.cumsum(dim=0).cumsum(dim=1), (1, 0, 1, 0))
        height, width = crop
        counts = total[height:, width:] - total[:-height, width:] - total[height:, :-width] + total[:-height, :-width]
        return torch.nonzero(counts >= _LEAST_VISIBLE * counts.max())


def read_roi(
    file: str | Path, image_size: tuple[int, int], prepare: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """Read a region of interest, as it lies in pre-processed images.

    Args:
        file (str | Path): Image file: white, or not black, where images are to be looked at.
        image_size (tuple[int, int]): Height and width of the images' files.
        prepare (Callable[[torch.Tensor], torch.Tensor]): The pre-processing of images ``[1, 3, H, W]``.

    Returns:
        torch.Tensor: Which pixels of pre-processed images are visible, bool ``[H, W]``: those that no hidden pixel of a
            file has a part in.

    Raises:
        ValueError: If the file cannot be read, has another size than the images, or shows no region.
    """
    try:
        with Image.open(file) as image:
            values = np.asarray(image.convert("L"))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        msg = (
            f"Cannot read the region of interest {file} ({error}): give an image file, white where parts are looked at."
        )
        raise ValueError(msg) from error
    prepared_size = tuple(prepare(torch.zeros(1, 3, *image_size)).shape[-2:])
    if values.shape not in {tuple(image_size), prepared_size}:
        msg = (
            f"The region of interest {file} has {values.shape[0]}x{values.shape[1]} px (height x width), but the "
            f"images have {image_size[0]}x{image_size[1]}: draw it on one of the images."
        )
        raise ValueError(msg)
    # Above half of the highest: masks have 255 or 1 for white, and JPEG leaves dark noise.
    visible = torch.from_numpy(values > values.max() / 2)
    if not bool(visible.any()):
        msg = f"The region of interest {file} is black all over: paint white what is to be looked at."
        raise ValueError(msg)
    hidden = (~visible).float().expand(1, 3, -1, -1)
    changed = prepare(hidden) != prepare(torch.zeros_like(hidden))
    visible = ~changed.any(dim=1)[0]
    if not bool(visible.any()):
        msg = f"The region of interest {file} is too small: nothing of it is left when images are resized. Paint more."
        raise ValueError(msg)
    return visible


def image_size_of(file: str | Path) -> tuple[int, int]:
    """Return the height and width of an image file."""
    with Image.open(file) as image:
        width, height = image.size
    return height, width


def find_roi(images: torch.Tensor) -> torch.Tensor:
    """Find where parts lie on a background of one colour, which most of the images' edges show.

    It is where one of the images shows something of another colour, with a margin around it, in which chips and burrs
    are seen, and with what it encloses.

    Args:
        images (torch.Tensor): Pre-processed normal images ``[N, C, H, W]``.

    Returns:
        torch.Tensor: Which pixels are to be looked at, bool ``[H, W]``: all, where there is no such background.
    """
    scale = float((images - images.mean(dim=(0, 2, 3), keepdim=True)).square().mean().sqrt())
    height, width = images.shape[-2:]
    edges = torch.cat(
        [images[..., :1, :].flatten(2), images[..., -1:, :].flatten(2), images[..., [0, -1]].flatten(2)], 2
    )
    background = edges.transpose(0, 1).flatten(1).median(dim=1).values  # [C]
    differs = (images - background[:, None, None]).abs().amax(dim=1) > _CONTRAST * scale  # [N, H, W]
    parts = np.zeros((height, width), dtype=bool)
    for image in differs.cpu().numpy():
        labels, _ = ndimage.label(image)
        is_part = np.bincount(labels.flatten()) >= _SPECK * height * width
        is_part[0] = False  # what does not differ
        parts |= is_part[labels]
    margin = round(_MARGIN * min(height, width))
    visible = ndimage.binary_fill_holes(ndimage.binary_dilation(parts, iterations=margin)) if parts.any() else ~parts
    if (~visible).mean() < _LEAST_HIDDEN:
        visible = np.ones_like(visible)
    return torch.from_numpy(visible).to(images.device)
