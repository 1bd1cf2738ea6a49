# Copyright (C) 2026 The anomalib-pedenet authors
# SPDX-License-Identifier: Apache-2.0

import pytest
import torch

from anomalib_pedenet import dense_embedding
from anomalib_pedenet.dense_embedding import embed_images
from anomalib_pedenet.networks import PatchEmbeddingNetwork


@pytest.mark.parametrize(("image_size", "stride"), [((72, 64), 2), ((117, 66), 6), ((131, 80), 16)])
def test_strips_equal_the_whole_image(
    monkeypatch: pytest.MonkeyPatch, image_size: tuple[int, int], stride: int
) -> None:
    """Strips of one row of patches and more, the last one shorter, against the network on the whole image."""
    torch.manual_seed(0)
    network = PatchEmbeddingNetwork(64).double()
    images = torch.rand(2, 3, *image_size, dtype=torch.float64)
    whole = network.embed_dense(images, stride, [16, 32, 64])
    for pixels in (1, 20 * image_size[1], 50 * image_size[1]):
        monkeypatch.setattr(dense_embedding, "STRIP_PIXELS", pixels)
        in_strips = embed_images(network, images, stride, [16, 32, 64])
        assert list(in_strips) == [16, 32, 64]
        for size, grid in in_strips.items():
            torch.testing.assert_close(grid, whole[size], rtol=0, atol=1e-12)


def test_memory_for_features_is_that_of_a_strip(monkeypatch: pytest.MonkeyPatch) -> None:
    network = PatchEmbeddingNetwork(64)
    heights: list[int] = []
    network.small_encoder[0].register_forward_pre_hook(lambda _, inputs: heights.append(inputs[0].shape[-2]))
    embed_images(network, torch.rand(1, 3, 512, 96), 8, [32, 64])
    assert heights == [512]
    heights.clear()
    monkeypatch.setattr(dense_embedding, "STRIP_PIXELS", 64 * 96)
    embed_images(network, torch.rand(1, 3, 512, 96), 8, [32, 64])
    assert len(heights) == 8
    assert max(heights) <= 64 + 64
