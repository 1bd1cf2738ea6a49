# Copyright (C) 2026 The anomalib-pedenet authors
# SPDX-License-Identifier: Apache-2.0

"""The projection of mid-level embeddings against scikit-learn's PCA."""

import pytest
import torch
from sklearn.decomposition import PCA

from anomalib_pedenet.scorers.position import neighbor_distance
from anomalib_pedenet.scorers.projection import NEIGHBOR_DISTANCE, PrincipalProjection


@pytest.fixture
def grids() -> torch.Tensor:
    """Embeddings of 5 images whose 12 channels are correlated and of very different strength."""
    torch.manual_seed(0)
    mixing = torch.randn(12, 12) * torch.logspace(0, -3, 12)
    return torch.einsum("ncyx,kc->nkyx", torch.randn(5, 12, 9, 7), mixing) + torch.randn(12)[:, None, None]


def test_components_are_those_of_pca_with_half_of_the_whitening(grids: torch.Tensor) -> None:
    projection = PrincipalProjection(12, 4)
    projection.fit(grids)
    rows = grids.permute(0, 2, 3, 1).flatten(0, 2).numpy()
    pca = PCA().fit(rows)
    variances = pca.explained_variance_ * (len(rows) - 1) / len(rows)
    expected = torch.from_numpy(pca.transform(rows)[:, :4] / (variances[:4] + 0.1 * variances.mean()) ** 0.25)

    projected = projection(grids).permute(0, 2, 3, 1).flatten(0, 2)
    scale = projected.norm() / expected.norm()
    torch.testing.assert_close(projected.abs(), (scale * expected).abs().float(), rtol=1e-3, atol=1e-4)


def test_a_patch_lies_at_the_given_distance_from_its_neighbour_elsewhere(grids: torch.Tensor) -> None:
    projection = PrincipalProjection(12, 6)
    for factor in (1.0, 1e-3, 1e3):
        projection.fit(factor * grids)
        assert neighbor_distance(projection(factor * grids)) == pytest.approx(NEIGHBOR_DISTANCE, rel=1e-3)


@pytest.mark.parametrize("kind", ["constant", "one image", "one channel"])
def test_degenerate_embeddings_give_finite_ones(grids: torch.Tensor, kind: str) -> None:
    if kind == "constant":
        grids = torch.ones_like(grids)
    elif kind == "one image":
        grids = grids[:1]
    else:
        grids = torch.cat([grids[:, :1], torch.zeros_like(grids[:, 1:])], dim=1)
    projection = PrincipalProjection(12, 4)
    projection.fit(grids)
    assert torch.isfinite(projection(grids)).all()


def test_more_components_than_channels_are_refused() -> None:
    with pytest.raises(ValueError, match="12 channels has at most so many components, got 13"):
        PrincipalProjection(12, 13)
