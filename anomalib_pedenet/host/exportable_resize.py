# Copyright (C) 2026 The anomalib-pedenet authors
# SPDX-License-Identifier: Apache-2.0

"""Resizing with antialiasing in exported graphs: what torchvision does in training.

anomalib turns antialiasing off for exports. A large image would then be scored otherwise than in training, where the
threshold was found. ONNX has a resize with antialiasing, but OpenVINO reads it as one without, and says nothing. So
the graph weighs pixels itself, by matrix products, which mean the same everywhere and are as fast.
"""

from typing import TypeAlias

import torch
from anomalib.pre_processing import PreProcessor
from anomalib.pre_processing.utils.transform import get_exportable_transform
from PIL.Image import Resampling
from torch import nn
from torchvision.transforms.v2 import Compose, InterpolationMode, Resize, Transform

# Rows of the output that are computed together. Neighbouring rows see nearly the same rows of the input: fewer would
# copy these more often, more would multiply more zeros.
_BLOCK = 16

# How far a filter reaches, in pixels of the coarser of the two images.
_REACH = {"bilinear": 1, "bicubic": 2}

Interpolation: TypeAlias = InterpolationMode | str | int
"""How torchvision names a filter; a number is Pillow's."""


class ExportableResize(Resize):
    """torchvision's ``Resize`` with antialiasing, and the same in exported graphs.

    Its arguments are those of ``torchvision.transforms.v2.Resize``.
    """

    def transform(self, inpt: torch.Tensor, params: dict[str, object]) -> torch.Tensor:
        """Resize images.

        Args:
            inpt (torch.Tensor): Images ``[..., C, H, W]``, floating point where a graph is exported.
            params (dict[str, object]): Unused.

        Returns:
            torch.Tensor: Images ``[..., C, h, w]``.
        """
        if not torch.compiler.is_compiling():
            return super().transform(inpt, params)
        # Of the shorter side alone torchvision says how large the image becomes; the graph leaves out what is not used.
        is_given = self.size is not None and len(self.size) == 2
        height, width = self.size if is_given else super().transform(inpt, params).shape[-2:]
        rows = resize_rows(inpt, height, self.interpolation)
        return resize_rows(rows.mT, width, self.interpolation).mT


def filter_name(interpolation: Interpolation) -> str:
    """Return the name of a filter, whichever of torchvision's ways it is given in: ``"bilinear"``, for instance."""
    if isinstance(interpolation, InterpolationMode):
        return str(interpolation.value)
    return interpolation if isinstance(interpolation, str) else Resampling(interpolation).name.lower()


def resize_rows(images: torch.Tensor, size: int, interpolation: Interpolation) -> torch.Tensor:
    """Resize the last dimension but one with antialiasing, in operations that every format of exports has.

    A row of the output is a weighted mean of the rows of the input around its place. The filter is as wide as a pixel
    of the coarser of the two images.

    Args:
        images (torch.Tensor): Images ``[..., H, W]`` in floating point. H may be dynamic in an exported graph.
        size (int): Number h of rows of the output.
        interpolation (Interpolation): Bilinear or bicubic.

    Returns:
        torch.Tensor: ``[..., h, W]``.
    """
    height = images.shape[-2]
    if isinstance(height, int) and height == size:  # to compare a dynamic one would fix it
        return images
    name = filter_name(interpolation)
    device, reach = images.device, _REACH[name]
    # Places and distances are in units of 1/(2h) of the input's rows, so that they are integers: OpenVINO may compute
    # with 8 bits of precision, and could not tell the rows of a large image from each other.
    pixel = 2 * torch.sym_max(height, size)
    num_blocks = -(-size // _BLOCK)
    num_seen = ((_BLOCK - 1 + 2 * reach) * height + size - 1) // size + 2 * reach + 1  # rows that a block sees, or more
    rows = torch.arange(num_blocks * _BLOCK, device=device).clamp(max=size - 1).reshape(num_blocks, _BLOCK)
    centers = (2 * rows + 1) * height
    first = (centers[:, :1] - reach * pixel - size).clamp(min=0) // (2 * size)
    seen = first + torch.arange(num_seen, device=device)  # [blocks, seen]
    distances = (((2 * seen + 1) * size)[:, None] - centers[..., None]).abs()  # [blocks, rows of a block, seen]
    weights = _weigh(distances, pixel, name) * (seen < height)[:, None]
    weights = (weights / weights.sum(dim=-1, keepdim=True)).to(images.dtype)
    blocks = images.index_select(-2, seen.clamp(max=height - 1).flatten()).unflatten(-2, (num_blocks, num_seen))
    return (weights @ blocks).flatten(-3, -2)[..., :size, :]


def _weigh(distances: torch.Tensor, pixel: int, name: str) -> torch.Tensor:
    """Return torch's weights of pixels, not normalised, by their distances from the centre: integers, as a pixel is."""
    if name == "bilinear":
        return (pixel - distances).clamp(min=0)
    x = distances / pixel
    near, far = (1.5 * x - 2.5) * x * x + 1, ((2.5 - 0.5 * x) * x - 4) * x + 2  # Keys' cubic, a = -0.5
    return torch.where(x < 1, near, far) * (x < 2)


def resize_as_in_training(pre_processor: nn.Module | None) -> None:
    """Have a pre-processor resize in exports, and where the model is called, as it does in training.

    Args:
        pre_processor (nn.Module | None): A model's pre-processor. One that is not anomalib's own is left alone.
    """
    if pre_processor is not None and type(pre_processor) is PreProcessor:  # not of a subclass
        pre_processor.export_transform = _exportable(pre_processor.transform)


def _exportable(transform: Transform | None) -> Transform | None:
    """Return a copy of a transform that does the same and can be exported."""
    if transform is None:
        return None
    if isinstance(transform, Compose):
        return Compose([_exportable(step) for step in transform.transforms])
    # Not subclasses, which may resize in another way.
    if type(transform) is Resize and transform.antialias and filter_name(transform.interpolation) in _REACH:
        return ExportableResize(transform.size, transform.interpolation, transform.max_size, transform.antialias)
    return get_exportable_transform(transform)
