# Copyright (C) 2026 The anomalib-pedenet authors
# SPDX-License-Identifier: Apache-2.0

"""The networks against the paper's numbers, and dense evaluation against one patch at a time."""

import pytest
import torch

from anomalib_pedenet.networks import DensityEstimationNetwork, LocationPredictionNetwork, PatchEmbeddingNetwork
from anomalib_pedenet.patches import MID_LEVEL_SIZES


def count_parameters(*modules: torch.nn.Module) -> int:
    return sum(parameter.numel() for module in modules for parameter in module.parameters())


def test_parameter_count_is_the_papers() -> None:
    """Table 3 gives 0.47 M; the split is the one that the layers of section 3.1 to 3.2 yield for K = 10."""
    networks = (
        PatchEmbeddingNetwork(batch_norm=False),
        DensityEstimationNetwork(num_components=10),
        LocationPredictionNetwork(),
    )
    assert [count_parameters(network) for network in networks] == [422_528, 18_656 + 33 * 10, 25_864]
    assert count_parameters(*networks) == 467_378


@pytest.mark.parametrize("image_size", [(64, 64), (70, 65), (80, 96), (101, 67)])
@pytest.mark.parametrize("stride", [2, 4, 6, 16])
def test_dense_equals_patch_by_patch(image_size: tuple[int, int], stride: int) -> None:
    torch.manual_seed(0)
    # As deep as the real one, and narrow: thousands of patches are embedded one by one.
    network = PatchEmbeddingNetwork(16, small_channels=(3, 5, 8, 7, 6, 5, 4, 6), large_channels=9).double()
    network(torch.randn(32, 3, 64, 64, dtype=torch.float64), batch_statistics=True)
    images = torch.randn(2, 3, *image_size, dtype=torch.float64)

    grids = network.embed_dense(images, stride, [*MID_LEVEL_SIZES, 32, 64])
    assert list(grids) == [*MID_LEVEL_SIZES, 32, 64]

    for patch_size, grid in grids.items():
        rows = range(0, image_size[0] - patch_size + 1, stride)
        columns = range(0, image_size[1] - patch_size + 1, stride)
        channels = network.mid_level_channels(patch_size) if patch_size in MID_LEVEL_SIZES else 16
        assert grid.shape == (2, channels, len(rows), len(columns))
        patches = [images[:, :, top : top + patch_size, left : left + patch_size] for top in rows for left in columns]
        expected = torch.stack([network(patch) for patch in patches], dim=-1)
        torch.testing.assert_close(grid.flatten(2), expected, rtol=0, atol=1e-12)


def test_dense_equals_patch_by_patch_in_float32() -> None:
    torch.manual_seed(0)
    network = PatchEmbeddingNetwork().eval()
    image = torch.randn(1, 3, 128, 128)
    patches = image.unfold(2, 64, 8).unfold(3, 64, 8).permute(0, 2, 3, 1, 4, 5).flatten(0, 2)  # [81, 3, 64, 64]
    dense = network.embed_dense(image, stride=8)[64].flatten(2)[0].T
    torch.testing.assert_close(dense, network(patches), rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", MID_LEVEL_SIZES)
def test_a_mid_level_embedding_sees_its_patch_and_nothing_else(size: int) -> None:
    """Patches of 4k + 4 px, whose last row and column the first convolution's stride leaves out, as for 32 px."""
    torch.manual_seed(0)
    network = PatchEmbeddingNetwork().double().eval()
    image = torch.randn(1, 3, 48, 48, dtype=torch.float64, requires_grad=True)
    network.embed_dense(image, 2, [size])[size][0, :, 3, 2].sum().backward()
    assert image.grad is not None
    rows, columns = (image.grad[0].abs().sum(dim=(0, axis)).nonzero().flatten().tolist() for axis in (2, 1))
    assert rows == list(range(6, 6 + size - 1))
    assert columns == list(range(4, 4 + size - 1))


def test_sub_patches_are_placed_as_in_the_patch() -> None:
    """A change in one quarter of a patch must reach the large encoder through that quarter's weights alone."""
    network = PatchEmbeddingNetwork().eval()
    patch = torch.randn(1, 3, 64, 64)
    quarters = {(0, 0): (0, 0), (0, 1): (0, 32), (1, 0): (32, 0), (1, 1): (32, 32)}
    for (row, column), (top, left) in quarters.items():
        only = torch.zeros_like(network.large_encoder[0].weight)
        only[:, :, row, column] = network.large_encoder[0].weight[:, :, row, column].detach()
        masked = PatchEmbeddingNetwork().eval()
        masked.load_state_dict(network.state_dict())
        masked.large_encoder[0].weight.data = only
        elsewhere = torch.randn_like(patch)
        elsewhere[..., top : top + 32, left : left + 32] = patch[..., top : top + 32, left : left + 32]
        torch.testing.assert_close(masked(patch), masked(elsewhere))
        assert not torch.allclose(masked(patch), masked(torch.randn_like(patch)))


@pytest.mark.parametrize("size", [(63, 64), (48, 48), (128, 128)])
def test_patches_of_other_sizes_are_refused(size: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="64x64 or 32x32"):
        PatchEmbeddingNetwork()(torch.zeros(1, 3, *size))


def test_images_smaller_than_a_patch_are_refused() -> None:
    with pytest.raises(ValueError, match="31x64 px, smaller than a patch of 32x32"):
        PatchEmbeddingNetwork().embed_dense(torch.zeros(1, 3, 31, 64), patch_sizes=[32])
    with pytest.raises(ValueError, match="60x64 px, smaller than a patch of 64x64"):
        PatchEmbeddingNetwork().embed_dense(torch.zeros(1, 3, 60, 64))


def test_small_encoder_needs_eight_convolutions() -> None:
    with pytest.raises(ValueError, match="8 convolutions, got 3"):
        PatchEmbeddingNetwork(small_channels=(32, 64, 128))


def test_initialization_keeps_the_signal() -> None:
    """PyTorch's default initialisation loses it: then location prediction does not start to learn."""
    torch.manual_seed(0)
    spread = PatchEmbeddingNetwork()(torch.randn(64, 3, 64, 64)).std(dim=0).mean()
    assert 0.2 < spread < 0.9


def test_responsibilities_sum_to_one() -> None:
    responsibilities = DensityEstimationNetwork(num_components=7)(torch.randn(33, 64))
    torch.testing.assert_close(responsibilities.sum(dim=1), torch.ones(33))
    assert responsibilities.shape == (33, 7)


def test_location_prediction_sees_the_difference_only() -> None:
    network = LocationPredictionNetwork()
    first, second, shift = torch.randn(3, 5, 64).unbind()
    torch.testing.assert_close(network(first, second), network(first + shift, second + shift), rtol=1e-4, atol=1e-4)
