# Copyright (C) 2026 The anomalib-pedenet authors
# SPDX-License-Identifier: Apache-2.0

"""Sampling for a training step: what the dense way gives must be what the patch-by-patch way gives."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from anomalib_pedenet.networks import PatchEmbeddingNetwork
from anomalib_pedenet.patches import NEIGHBOR_DIRECTIONS, sample_jittered_pairs, sample_neighbor_pairs
from anomalib_pedenet.training import sampling
from anomalib_pedenet.training.sampling import draw_views, sample_dense, sample_patches


@pytest.fixture
def network() -> PatchEmbeddingNetwork:
    torch.manual_seed(0)
    # Narrow, as thousands of patches are embedded one by one. Normalisation would mix the patches of a batch.
    return PatchEmbeddingNetwork(small_channels=(8, 8, 16, 16, 16, 8, 8, 8), large_channels=16, batch_norm=False)


def sample_crops(
    network: PatchEmbeddingNetwork,
    images: torch.Tensor,
    patch_sizes: tuple[int, ...],
    num_patches: int = 1024,
    num_pairs: int = 1024,
    with_jitter: bool = False,
    **drawing: Any,  # noqa: ANN401
) -> dict[int, sampling.EmbeddingSample]:
    """Draw views and sample them, as a step does."""
    views, masks = draw_views(images, **drawing)
    return sample_dense(network, views, masks, patch_sizes, num_patches, num_pairs, with_jitter)


@pytest.mark.parametrize("num_images", [1, 3, 6])
def test_shapes_and_gradients(network: PatchEmbeddingNetwork, num_images: int) -> None:
    images = torch.randn(num_images, 3, 130, 150)
    dense = sample_crops(network, images, (32, 64), num_crops=4, num_patches=50, num_pairs=30)
    separate = sample_patches(network, images, (32, 64), num_patches=50, num_pairs=30)
    for samples, num_pairs in ((dense, 32), (separate, 30)):  # 30 pairs over 4 crops are 8 each
        for sample in samples.values():
            assert sample.embeddings.shape == (50, 64)
            assert sample.centers.shape == sample.neighbors.shape == (num_pairs, 64)
            assert sample.directions.shape == (num_pairs,)
        sum(sample.centers.sum() for sample in samples.values()).backward()
        assert all(p.grad is not None for p in network.small_encoder.parameters())


def test_dense_pairs_are_the_embeddings_of_neighbouring_patches(
    network: PatchEmbeddingNetwork,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Every pair that is handed on must be found among the patches of the image, at its direction's offset."""
    drawn = []

    def recording(*args: object, **kwargs: object) -> object:
        drawn.append(sample_neighbor_pairs(*args, **kwargs))
        return drawn[-1]

    monkeypatch.setattr(sampling, "sample_neighbor_pairs", recording)
    image = torch.randn(1, 3, 128, 128)
    samples = sample_crops(network, image, (32, 64), num_crops=2, num_pairs=16, color_shift=0.0, noise=0.0)
    for (size, sample), pairs in zip(samples.items(), drawn, strict=True):
        for embeddings, positions in ((sample.centers, pairs.positions), (sample.neighbors, pairs.neighbor_positions)):
            patches = [image[0, :, r : r + size, c : c + size] for r, c in positions.flatten(0, 1).tolist()]
            torch.testing.assert_close(embeddings, network(torch.stack(patches)), rtol=0, atol=1e-5)
        signs = (pairs.neighbor_positions - pairs.positions).flatten(0, 1).sign()
        assert (signs == torch.tensor(NEIGHBOR_DIRECTIONS)[sample.directions]).all()


def test_the_two_patches_of_a_pair_are_disturbed_independently(network: PatchEmbeddingNetwork) -> None:
    """On a constant image all patches are equal, so embeddings differ by the disturbance alone."""
    image = torch.zeros(1, 3, 128, 128)
    for sample_function in (sample_crops, sample_patches):
        (sample,) = sample_function(network, image, (64,), num_pairs=8, color_shift=0.5, noise=0.0).values()
        assert (sample.centers - sample.neighbors).abs().amax(dim=1).min() > 1e-3
        (sample,) = sample_function(network, image, (64,), num_pairs=8, color_shift=0.0, noise=0.0).values()
        assert (sample.centers - sample.neighbors).abs().max() < 1e-5


def test_defects_are_drawn_on_a_third_view(network: PatchEmbeddingNetwork) -> None:
    """Each labelled embedding is that of its patch, with the drawn defect or without; the density sees none of them."""
    torch.manual_seed(1)
    image = torch.randn(1, 3, 128, 128)
    options = {"num_crops": 2, "num_pairs": 8, "num_patches": 200, "color_shift": 0.0, "noise": 0.0}
    samples = sample_crops(network, image, (32, 64), **options, with_defects=True)
    for size, sample in samples.items():
        patches = image[0].unfold(1, size, 2).unfold(2, size, 2).permute(1, 2, 0, 3, 4).flatten(0, 1)
        clean = network(patches)
        first, drawn_on = sample.defect_embeddings.chunk(2)
        assert not sample.defect_labels[: len(first)].any()
        labels = sample.defect_labels[len(first) :]
        assert 0 < labels.mean() < 1
        torch.testing.assert_close(first, clean.repeat(2, 1), rtol=0, atol=1e-4)
        changed = (drawn_on - clean.repeat(2, 1)).abs().amax(dim=1)
        assert changed[labels > 0].median() > 1e-2
        exact = "donot_use_mm_for_euclid_dist"
        is_clean = torch.cdist(sample.embeddings, clean, compute_mode=exact).amin(dim=1) < 1e-3
        assert is_clean.all()
    assert sample_crops(network, image, (64,), **options)[64].defect_embeddings is None


@pytest.mark.parametrize("sample_function", [sample_crops, sample_patches])
def test_jittered_pairs_are_the_embeddings_of_nearly_the_same_patch(
    network: PatchEmbeddingNetwork,
    monkeypatch: pytest.MonkeyPatch,
    sample_function: Callable[..., dict[int, sampling.EmbeddingSample]],
) -> None:
    """Both patches of a pair are found in the image, where they were drawn; patch by patch they are not disturbed."""
    drawn = []

    def recording(*args: object, **kwargs: object) -> object:
        drawn.append(sample_jittered_pairs(*args, **kwargs))
        return drawn[-1]

    monkeypatch.setattr(sampling, "sample_jittered_pairs", recording)
    image = torch.randn(1, 3, 128, 128)
    disturbance = 0.0 if sample_function is sample_crops else 0.5
    options = {"num_pairs": 16, "color_shift": disturbance, "noise": disturbance}
    samples = sample_function(network, image, (32, 64), **options, with_jitter=True)
    for (size, sample), pairs in zip(samples.items(), drawn, strict=True):
        assert sample.jittered is not None
        for embeddings, positions in zip(sample.jittered, pairs, strict=True):
            places = positions.reshape(-1, 2).tolist()
            patches = [image[0, :, r : r + size, c : c + size] for r, c in places]
            torch.testing.assert_close(embeddings, network(torch.stack(patches)), rtol=0, atol=1e-5)
    assert sample_function(network, image, (64,), **options)[64].jittered is None


@pytest.mark.parametrize("sample_function", [sample_crops, sample_patches])
def test_without_jittered_pairs_nothing_more_is_drawn(
    network: PatchEmbeddingNetwork, sample_function: Callable[..., dict[int, sampling.EmbeddingSample]]
) -> None:
    """With the pairs the generator goes on farther, and without them a seed gives what it always gave."""
    image = torch.randn(2, 3, 128, 128)
    found = []
    for with_jitter in (False, True):
        torch.manual_seed(3)
        sample = sample_function(network, image, (64,), num_pairs=8, num_patches=8, with_jitter=with_jitter)[64]
        found.append((sample, torch.rand(())))
    (without, state), (with_pairs, later_state) = found
    torch.testing.assert_close(without.centers, with_pairs.centers, rtol=0, atol=1e-5)
    torch.testing.assert_close(without.directions, with_pairs.directions)
    assert state != later_state


def test_small_images_are_taken_whole(network: PatchEmbeddingNetwork) -> None:
    samples = sample_crops(network, torch.randn(2, 3, 112, 120), (64,), crop_size=256, num_pairs=8)
    assert samples[64].centers.shape == (8, 64)


def test_images_too_small_for_a_pair_are_refused(network: PatchEmbeddingNetwork) -> None:
    for sample_function in (sample_crops, sample_patches):
        with pytest.raises(ValueError, match="at least 112x112 px"):
            sample_function(network, torch.randn(2, 3, 100, 200), (64,))
