# Copyright (C) 2026 The anomalib-pedenet authors
# SPDX-License-Identifier: Apache-2.0

"""Defects drawn to measure a training, and the figures against scikit-learn's."""

import pytest
import torch
from anomalib.data import InferenceBatch
from sklearn.metrics import roc_auc_score
from torch import nn

from anomalib_pedenet.training.label_free import draw_test_defects, drawn_defect_auroc


def surfaces(num_images: int = 10, size: tuple[int, int] = (96, 128)) -> torch.Tensor:
    return torch.randn(num_images, 3, *size, generator=torch.Generator().manual_seed(3))


def test_every_image_has_a_defect_inside_its_mask_and_nothing_else() -> None:
    images = surfaces()
    drawn = draw_test_defects(images)
    assert drawn.images.shape == images.shape
    for image, changed, mask in zip(images, drawn.images, drawn.masks, strict=True):
        assert 0.0005 < mask.float().mean() < 0.2
        assert torch.equal(changed[:, ~mask], image[:, ~mask])
        assert ((changed - image).abs().amax(dim=0) > 0.05)[mask].float().mean() > 0.5


def test_defects_depend_on_the_seed_alone() -> None:
    torch.manual_seed(0)
    first = draw_test_defects(surfaces())
    torch.manual_seed(1)
    again, other = draw_test_defects(surfaces()), draw_test_defects(surfaces(), seed=100)
    assert torch.equal(first.images, again.images)
    assert torch.equal(first.masks, again.masks)
    assert not torch.equal(first.masks, other.masks)
    # An image keeps its defect when more images follow.
    assert torch.equal(draw_test_defects(surfaces(3)).masks, first.masks[:3])


def test_defects_leave_the_colours_of_the_image() -> None:
    """On a ramp, equal in all channels, what has moved is still equal in all channels, and within its range."""
    ramp = torch.linspace(-2, 2, 128).expand(6, 3, 96, 128)
    drawn = draw_test_defects(ramp)
    changes = drawn.images - ramp
    assert changes.std(dim=1).max() < 1e-6
    assert (changes.abs().amax(dim=(1, 2, 3)) > 0.05).all()
    assert drawn.images.abs().max() <= 2 + 1e-5
    # A turned piece is a square, a swirl a disc.
    for index, mask in enumerate(drawn.masks):
        rows, columns = mask.any(dim=1).sum(), mask.any(dim=0).sum()
        filled = mask.sum() / (rows * columns)
        assert filled == 1 if index % 2 == 0 else 0.6 < filled < 0.9


def test_visible_places_are_preferred() -> None:
    """Half of the image is empty, where turning and swirling change nothing."""
    images = surfaces(20)
    images[..., :64] = 0
    drawn = draw_test_defects(images)
    changed = (drawn.images - images).abs().amax(dim=(1, 2, 3))
    assert (changed > 0.1).float().mean() >= 0.9


class Brightness(nn.Module):
    """Scores pixels by their own brightness, far beyond [0, 1]."""

    def forward(self, images: torch.Tensor) -> InferenceBatch:
        anomaly_map = 100 * images.mean(dim=1, keepdim=True).abs()
        return InferenceBatch(anomaly_map=anomaly_map, pred_score=anomaly_map.amax(dim=(1, 2, 3)))


def test_figures_equal_those_of_scikit_learn() -> None:
    normal = surfaces(6)
    drawn = draw_test_defects(normal)
    pixel, image = drawn_defect_auroc(Brightness(), normal, drawn)
    maps = torch.cat([normal, drawn.images]).mean(dim=1).abs()
    masks = torch.cat([torch.zeros_like(drawn.masks), drawn.masks])
    expected = roc_auc_score(masks[:, ::2, ::2].flatten(), maps[:, ::2, ::2].flatten())
    assert pixel == pytest.approx(expected, abs=1e-5)
    assert image == pytest.approx(roc_auc_score([0] * 6 + [1] * 6, maps.amax(dim=(1, 2))), abs=1e-5)
