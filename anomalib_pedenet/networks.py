# Copyright (C) 2026 The anomalib-pedenet authors
# SPDX-License-Identifier: Apache-2.0

"""The three networks of PEDENet: patch embedding (PE), density estimation (DE) and location prediction (LP).

The patch embedding network is hierarchical: a *small encoder* embeds 32-px sub-patches, and a *large encoder* joins
the four sub-patches of a 64-px patch. On its way to 32 px the small encoder also yields *mid-level* embeddings of
smaller patches, which have kept more of the fine structure. Because nothing pads, running the encoders over a whole
image gives exactly the embeddings of all its patches (:meth:`PatchEmbeddingNetwork.embed_dense`), at a hundredth of the
cost of running them patch by patch (:meth:`PatchEmbeddingNetwork.forward`).

Reference:
    K. Zhang, B. Wang, C.-C. J. Kuo, "PEDENet: Image Anomaly Localization via Patch Embedding and Density Estimation",
    2021, https://arxiv.org/abs/2110.15525 (section 3.1 and 3.2). Where the paper gives no numbers the encoder follows
    J. Yi, S. Yoon, "Patch SVDD", ACCV 2020, https://arxiv.org/abs/2006.16067.
"""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812
from torch.nn.modules.batchnorm import _BatchNorm  # of one process, and synchronised over several

from anomalib_pedenet.patches import BASE_STRIDE, MID_LEVEL_SIZES, PATCH_SIZE, SUB_PATCH_SIZE, grid_size

NEGATIVE_SLOPE = 0.1
"""Negative slope of every LeakyReLU, as in the paper."""

ModelSize = Literal["small", "medium"]

SMALL_CHANNELS: dict[ModelSize, tuple[int, ...]] = {
    "small": (16, 32, 64, 64, 64, 32, 32, 32),
    "medium": (32, 64, 128, 128, 64, 64, 32, 32),
}
"""Filters of the small encoder's eight convolutions. ``medium`` is Patch-SVDD's; ``small`` has a third of its
multiply-adds."""


def initialize_weights(module: nn.Module) -> None:
    """Initialise convolutions and linear layers with Kaiming's normal initialisation for LeakyReLU 0.1.

    PyTorch's default initialisation shrinks the signal so much over the eight convolutions of the small encoder that
    location prediction stays at chance for hundreds of steps.

    Args:
        module (nn.Module): Module whose descendants are initialised in place.
    """
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(layer.weight, a=NEGATIVE_SLOPE, nonlinearity="leaky_relu")
            nn.init.zeros_(layer.bias)


class PatchEmbeddingNetwork(nn.Module):
    """Patch embedding (PE) network, Eq. 1: ``z = f(patch)``.

    The small encoder is eight 3x3 convolutions without padding, the first with stride 2, so that a 32x32 sub-patch
    ends at 1x1 (32 -> 15 -> 13 -> 11 -> 9 -> 7 -> 5 -> 3 -> 1), then a 1x1 output layer with tanh. The large encoder
    is a 2x2 convolution over the four sub-patch embeddings and a 1x1 output layer with tanh.

    The mid-level embedding of a patch of 4k + 4 px is the mean of the k-th convolution's features (after batch
    normalisation and LeakyReLU) over the 3x3 positions that the patch holds; PatchCore (section 3.1) takes such means
    of a pre-trained network. It is not in the paper, and training does not ask anything of it directly.

    Args:
        embedding_dim (int): Dimension Z of the embeddings. Defaults to ``64``.
        small_channels (Sequence[int]): Filters of the small encoder's eight convolutions. Defaults to those of
            ``medium``.
        large_channels (int): Filters of the large encoder's 2x2 convolution. Defaults to ``128``.
        in_channels (int): Channels of the images. Defaults to ``3``.
        batch_norm (bool): Whether batch normalisation follows each of the eight convolutions. The paper mentions none;
            without it only parts with clear structure train well. With its running averages it is an affine map of each
            channel, so that dense evaluation stays exact. Defaults to ``True``.
        patch_sizes (Sequence[int]): Sizes of the patches to embed. Without 64 there is no large encoder.
            Defaults to ``(32, 64)``.

    Raises:
        ValueError: If ``small_channels`` does not have eight entries; only eight convolutions take 32 px to 1x1.

    Examples:
        >>> network = PatchEmbeddingNetwork()
        >>> network(torch.zeros(5, 3, 64, 64)).shape, network(torch.zeros(5, 3, 20, 20)).shape
        (torch.Size([5, 64]), torch.Size([5, 128]))
        >>> grids = network.embed_dense(torch.zeros(1, 3, 96, 128), stride=8)
        >>> grids[32].shape, grids[64].shape
        (torch.Size([1, 64, 9, 13]), torch.Size([1, 64, 5, 9]))
    """

    def __init__(
        self,
        embedding_dim: int = 64,
        small_channels: Sequence[int] = SMALL_CHANNELS["medium"],
        large_channels: int = 128,
        in_channels: int = 3,
        batch_norm: bool = True,
        patch_sizes: Sequence[int] = (SUB_PATCH_SIZE, PATCH_SIZE),
    ) -> None:
        super().__init__()
        self.patch_sizes = tuple(patch_sizes)
        if len(small_channels) != 8:
            msg = f"small_channels must list the filters of 8 convolutions, got {len(small_channels)}."
            raise ValueError(msg)

        self.small_channels = tuple(small_channels)
        layers: list[nn.Module] = []
        channels = in_channels
        for index, filters in enumerate(small_channels):
            layers.append(nn.Conv2d(channels, filters, kernel_size=3, stride=2 if index == 0 else 1))
            if batch_norm:
                layers.append(nn.BatchNorm2d(filters))
            layers.append(nn.LeakyReLU(NEGATIVE_SLOPE))
            channels = filters
        self.small_encoder = nn.Sequential(*layers, nn.Conv2d(channels, embedding_dim, kernel_size=1), nn.Tanh())
        if PATCH_SIZE in self.patch_sizes:
            self.large_encoder = nn.Sequential(
                nn.Conv2d(embedding_dim, large_channels, kernel_size=2),
                nn.LeakyReLU(NEGATIVE_SLOPE),
                nn.Conv2d(large_channels, embedding_dim, kernel_size=1),
                nn.Tanh(),
            )
        initialize_weights(self)

    def mid_level_channels(self, patch_size: int) -> int:
        """Return the dimension of the embeddings of one of :data:`anomalib_pedenet.patches.MID_LEVEL_SIZES`."""
        return self.small_channels[_mid_level_depth(patch_size) - 1]

    def forward(self, patches: torch.Tensor, batch_statistics: bool = False) -> torch.Tensor:
        """Embed separate patches, as the paper describes it.

        Args:
            patches (torch.Tensor): ``[N, C, 64, 64]`` patches; ``[N, C, 32, 32]`` sub-patches, which go through the
                small encoder alone; or mid-level ones, ``[N, C, 20, 20]`` for instance. Normalised to about zero mean
                and unit variance.
            batch_statistics (bool): Whether batch normalisation goes by the statistics of these patches, and remembers
                them: in training, and there alone. The module's mode (``train``, ``eval``) makes no difference.
                Defaults to ``False``.

        Returns:
            torch.Tensor: Embeddings ``[N, Z]`` in (-1, 1), or mid-level ones ``[N, mid_level_channels(size)]``.

        Raises:
            ValueError: If the patches are not of one of the network's sizes.
        """
        size = tuple(patches.shape[-2:])
        if size == (SUB_PATCH_SIZE, SUB_PATCH_SIZE):
            return self._embed_sub_patches(patches, batch_statistics).flatten(1)  # [N, Z, 1, 1] -> [N, Z]
        if size == (PATCH_SIZE, PATCH_SIZE) and PATCH_SIZE in self.patch_sizes:
            rows = [
                torch.cat(
                    [self._embed_sub_patches(part, batch_statistics) for part in row.split(SUB_PATCH_SIZE, dim=-1)],
                    dim=-1,
                )  # [N, Z, 1, 2]
                for row in patches.split(SUB_PATCH_SIZE, dim=-2)
            ]
            return self.large_encoder(torch.cat(rows, dim=-2)).flatten(1)  # [N, Z, 2, 2] -> [N, Z]
        if patches.shape[-2] == patches.shape[-1] and patches.shape[-1] in MID_LEVEL_SIZES:
            size = patches.shape[-1]
            features = self._encode(patches, [size], batch_statistics=batch_statistics)[size]  # [N, ., 3, 3]
            return features.mean(dim=(-2, -1))
        sizes = sorted({SUB_PATCH_SIZE, *self.patch_sizes})
        msg = f"Patches must be {' or '.join(f'{side}x{side}' for side in reversed(sizes))} px, got {size}."
        raise ValueError(msg)

    def embed_dense(
        self,
        images: torch.Tensor,
        stride: int = BASE_STRIDE,
        patch_sizes: Sequence[int] | None = None,
        batch_statistics: bool = False,
    ) -> dict[int, torch.Tensor]:
        """Embed all patches of whole images at once, on a regular grid.

        The first convolution's stride makes 2 px the finest grid. On it, the four sub-patches of a 64-px patch lie 16
        steps apart, so the large encoder's 2x2 convolution becomes one with dilation 16. Apart from rounding the
        result equals :meth:`forward` on every patch.

        Args:
            images (torch.Tensor): ``[B, C, H, W]`` images, normalised as in :meth:`forward`.
            stride (int): Distance between neighbouring patches in pixels, a multiple of 2. Defaults to ``2``.
            patch_sizes (Sequence[int] | None): Which scales to return, mid-level ones too. Defaults to the network's.
            batch_statistics (bool): As in :meth:`forward`. Defaults to ``False``.

        Returns:
            dict[int, torch.Tensor]: For each patch size, embeddings ``[B, Z, h, w]`` (mid-level ones have
                :meth:`mid_level_channels`) where ``(h, w) = grid_size((H, W), patch_size, stride)`` and entry
                ``(i, j)`` belongs to the patch whose top left corner is pixel ``(i * stride, j * stride)``.

        Raises:
            ValueError: If the images are smaller than a patch.
        """
        patch_sizes = patch_sizes or self.patch_sizes
        step = stride // BASE_STRIDE
        image_size = (images.shape[-2], images.shape[-1])
        grid_size(image_size, max(patch_sizes), stride)  # refuses images smaller than a patch
        # Sub-patches are embedded only where one is needed; those of a 64-px patch lie 16 steps apart.
        apart = SUB_PATCH_SIZE // BASE_STRIDE
        sub_step = math.gcd(step, apart) if PATCH_SIZE in patch_sizes else step
        features = self._encode(
            images, patch_sizes, sub_step, batch_statistics
        )  # [B, ., ., .], mid-level ones at stride 2

        embeddings: dict[int, torch.Tensor] = {}
        for size in patch_sizes:
            if size in MID_LEVEL_SIZES:
                grid = F.avg_pool2d(features[size], kernel_size=3, stride=step)
            elif size == SUB_PATCH_SIZE:
                grid = features[SUB_PATCH_SIZE][..., :: step // sub_step, :: step // sub_step]
            else:
                joined = F.conv2d(
                    features[SUB_PATCH_SIZE],
                    self.large_encoder[0].weight,
                    self.large_encoder[0].bias,
                    stride=step // sub_step,
                    dilation=apart // sub_step,
                )
                grid = self.large_encoder[1:](joined)
            # Receptive fields are 1 px narrower than patches, so an odd image side yields one position too many.
            rows, columns = grid_size(image_size, size, stride)
            embeddings[size] = grid[..., :rows, :columns]
        return embeddings

    def _embed_sub_patches(self, patches: torch.Tensor, batch_statistics: bool) -> torch.Tensor:
        """Return the embeddings ``[N, Z, 1, 1]`` of sub-patches ``[N, C, 32, 32]``."""
        return self._encode(patches, [SUB_PATCH_SIZE], batch_statistics=batch_statistics)[SUB_PATCH_SIZE]

    def _encode(
        self, images: torch.Tensor, patch_sizes: Sequence[int], sub_step: int = 1, batch_statistics: bool = False
    ) -> dict[int, torch.Tensor]:
        """Run the small encoder as far as patch sizes need it, and return what they are made of.

        Args:
            images (torch.Tensor): ``[B, C, H, W]`` images or patches.
            patch_sizes (Sequence[int]): Patch sizes.
            sub_step (int): Distance between neighbouring sub-patches in steps of 2 px. Defaults to ``1``.
            batch_statistics (bool): As in :meth:`forward`. Defaults to ``False``.

        Returns:
            dict[int, torch.Tensor]: The features of each mid-level size at stride 2, before their mean over 3x3
                positions; and the sub-patches' embeddings, if another size is asked for.
        """
        depths = {_mid_level_depth(size): size for size in patch_sizes if size in MID_LEVEL_SIZES}
        is_whole = any(size not in MID_LEVEL_SIZES for size in patch_sizes)
        outputs: dict[int, torch.Tensor] = {}
        features, depth = images, 0
        for layer in self.small_encoder:
            if depth == len(self.small_channels) - 1 and isinstance(layer, nn.Conv2d):
                features = F.conv2d(features, layer.weight, layer.bias, stride=sub_step)
            elif isinstance(layer, _BatchNorm):
                features = _normalize(layer, features, batch_statistics)
            else:
                features = layer(features)
            if isinstance(layer, nn.LeakyReLU):
                depth += 1
                if depth in depths:
                    outputs[depths[depth]] = features
                if not is_whole and len(outputs) == len(depths):
                    return outputs
        outputs[SUB_PATCH_SIZE] = features
        return outputs


def _normalize(layer: _BatchNorm, features: torch.Tensor, batch_statistics: bool) -> torch.Tensor:
    """Apply batch normalisation by the batch's statistics, which it remembers, or by its running averages.

    The layer's own mode is not asked: a model that was just loaded is in training mode, and would score an image by the
    image's own statistics and remember them.
    """
    if batch_statistics:
        layer.train()
        return layer(features)
    return F.batch_norm(features, layer.running_mean, layer.running_var, layer.weight, layer.bias, eps=layer.eps)


def _mid_level_depth(patch_size: int) -> int:
    """Return the convolution k whose features make the mid-level embedding of a patch size, 4k + 4 px."""
    return patch_size // 4 - 1


class DensityEstimationNetwork(nn.Sequential):
    """Density estimation (DE) network, Eq. 2: responsibilities of K mixture components for an embedding.

    A multi-layer perceptron Z -> 128 -> 64 -> 32 -> K with LeakyReLU 0.1 and a softmax.

    Args:
        num_components (int): Number K of mixture components. Defaults to ``10``.
        embedding_dim (int): Dimension Z of the embeddings. Defaults to ``64``.
        hidden_dims (Sequence[int]): Widths of the hidden layers.

    Examples:
        >>> responsibilities = DensityEstimationNetwork(num_components=4)(torch.randn(7, 64))
        >>> responsibilities.shape, bool(torch.allclose(responsibilities.sum(-1), torch.ones(7)))
        (torch.Size([7, 4]), True)
    """

    def __init__(
        self,
        num_components: int = 10,
        embedding_dim: int = 64,
        hidden_dims: Sequence[int] = (128, 64, 32),
    ) -> None:
        super().__init__(*_perceptron([embedding_dim, *hidden_dims, num_components]), nn.Softmax(dim=-1))
        initialize_weights(self)


class LocationPredictionNetwork(nn.Module):
    """Location prediction (LP) network, Eq. 7: which of the eight neighbours of a patch is another one?

    A multi-layer perceptron Z -> 128 -> 128 -> 8 with LeakyReLU 0.1 on the difference of two embeddings.

    Args:
        embedding_dim (int): Dimension Z of the embeddings. Defaults to ``64``.
        hidden_dims (Sequence[int]): Widths of the hidden layers.

    Examples:
        >>> LocationPredictionNetwork()(torch.randn(36, 64), torch.randn(36, 64)).shape
        torch.Size([36, 8])
    """

    def __init__(self, embedding_dim: int = 64, hidden_dims: Sequence[int] = (128, 128)) -> None:
        super().__init__()
        self.layers = nn.Sequential(*_perceptron([embedding_dim, *hidden_dims, 8]))
        initialize_weights(self)

    def forward(self, embeddings: torch.Tensor, neighbor_embeddings: torch.Tensor) -> torch.Tensor:
        """Predict where the neighbour lies.

        Args:
            embeddings (torch.Tensor): Embeddings ``z`` of the centre patches, ``[N, Z]``.
            neighbor_embeddings (torch.Tensor): Embeddings ``z'`` of one neighbour of each, ``[N, Z]``.

        Returns:
            torch.Tensor: Logits ``[N, 8]`` over :data:`anomalib_pedenet.patches.NEIGHBOR_DIRECTIONS`.
        """
        return self.layers(embeddings - neighbor_embeddings)


class DefectPredictionNetwork(nn.Sequential):
    """Defect prediction network: does a patch hold a drawn defect? Used in training only, and not in the paper.

    A multi-layer perceptron Z -> 128 -> 1 with LeakyReLU 0.1 on an embedding.

    Args:
        embedding_dim (int): Dimension Z of the embeddings. Defaults to ``64``.
        hidden_dims (Sequence[int]): Widths of the hidden layers.

    Examples:
        >>> DefectPredictionNetwork()(torch.randn(7, 64)).shape
        torch.Size([7, 1])
    """

    def __init__(self, embedding_dim: int = 64, hidden_dims: Sequence[int] = (128,)) -> None:
        super().__init__(*_perceptron([embedding_dim, *hidden_dims, 1]))
        initialize_weights(self)


def _perceptron(widths: Sequence[int]) -> list[nn.Module]:
    """Return the layers of a multi-layer perceptron, with LeakyReLU 0.1 between them and none after the last."""
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.LeakyReLU(NEGATIVE_SLOPE)]
    return layers[:-1]
