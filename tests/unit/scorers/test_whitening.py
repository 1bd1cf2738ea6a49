# Copyright (C) 2026 The anomalib-pedenet authors
# SPDX-License-Identifier: Apache-2.0

"""Whitened embeddings, less the mean of all or that of each place; and how far the place explains embeddings."""

import pytest
import torch

from anomalib_pedenet.kinds import LOOSE, SURFACE, share_of_place, unaligned_kind
from anomalib_pedenet.scorers.whitening import Whitening


def grids(count: int = 20, of_place: float = 1.0) -> torch.Tensor:
    """Embeddings ``[N, 5, 12, 10]`` of correlated dimensions, to which each place adds its own."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(5, 5, generator=generator)
    noise = torch.einsum("yz,bzhw->byhw", mixing, torch.randn(count, 5, 12, 10, generator=generator))
    return 3 + noise + of_place * torch.randn(1, 5, 12, 10, generator=generator)


def covariance(grid: torch.Tensor) -> torch.Tensor:
    return torch.cov(grid.transpose(0, 1).flatten(1), correction=0)


def test_nothing_changes_before_a_fit() -> None:
    images = grids()
    assert Whitening()(images) is images


def test_all_directions_vary_alike() -> None:
    whitening = Whitening()
    whitening.fit(grids(), by_place=False)
    white = whitening(grids())
    torch.testing.assert_close(white.mean(dim=(0, 2, 3)), torch.zeros(5), rtol=0, atol=1e-4)
    # What hardly varies is left a little short of it.
    variances = torch.linalg.eigvalsh(covariance(white))
    assert variances.max() < 1.001
    assert variances.min() > 0.5
    whitening.fit(grids(), by_place=False, kept=3)
    torch.testing.assert_close(whitening(grids()), white[:, :3], rtol=0, atol=1e-5)
    whitening.fit(grids()[:, :1].expand(-1, 5, -1, -1), by_place=False)  # of one direction alone
    assert whitening(grids()).isfinite().all()


def test_only_chosen_patches_are_looked_at() -> None:
    whitening, images = Whitening(), grids()
    chosen = torch.zeros(12, 10, dtype=torch.bool)
    chosen[:6] = True
    other = images.clone()
    other[..., 6:, :] = 1e3
    whitening.fit(images, by_place=False, chosen=chosen)
    expected = whitening(images)
    whitening.fit(other, by_place=False, chosen=chosen)
    torch.testing.assert_close(whitening(images), expected, rtol=0, atol=0)


def test_the_mean_of_a_place_is_taken_away_as_far_as_it_is_not_by_chance() -> None:
    whitening, images = Whitening(), grids(of_place=3.0)
    whitening.fit(images, by_place=True)
    assert whitening(images).mean(dim=0).square().mean() < 0.02
    # Of few images that differ from place to place by chance alone, next to nothing is taken away.
    same = grids(10, of_place=0.0)
    whitening.fit(same, by_place=True)
    differences = same.mean(dim=0) - same.mean(dim=(0, 2, 3))[:, None, None]
    kept = same.mean(dim=0) - whitening.mean
    assert (
        whitening.mean - same.mean(dim=(0, 2, 3))[:, None, None]
    ).square().mean() < 0.05 * differences.square().mean()
    torch.testing.assert_close(kept, differences, rtol=0, atol=0.3)


def test_the_shrinkage_is_that_of_james_and_stein() -> None:
    whitening, images = Whitening(), grids(6, of_place=0.5)
    whitening.fit(images, by_place=True)
    for dimension in range(5):
        values = images[:, dimension].double()
        differences = values.mean(dim=0) - values.mean()
        by_chance = values.var(dim=0).mean() / 6
        factor = max(0.0, 1 - float(by_chance / differences.square().mean()))
        torch.testing.assert_close(
            whitening.mean[dimension].double(), values.mean() + factor * differences, rtol=1e-4, atol=1e-4
        )


def test_of_an_image_s_own_mean_as_much_is_taken_away_as_patches_differ_by() -> None:
    whitening, images = Whitening(), grids(8)
    images = images + torch.randn(8, 5, 1, 1, generator=torch.Generator().manual_seed(1))
    chosen = torch.ones(12, 10, dtype=torch.bool)
    chosen[:3] = False
    images[..., :3, :] = 2.0  # hidden
    whitening.fit(images, by_place=False, is_relative=True, chosen=chosen)
    shown = images[..., 3:, :].double()
    means, reach = shown.mean(dim=(2, 3)), shown.std(dim=(0, 2, 3))
    for shift in (0.0, 1.0, 50.0):
        other = images.clone()
        other[..., 3:, :] += shift
        expected = []
        for image in other.double():
            away = image[:, 3:].mean(dim=(1, 2)) - means.mean(dim=0)
            away = torch.stack([away[index].clamp(-most, most) for index, most in enumerate(reach)])
            expected.append(whitening.components.double() @ (image - whitening.mean - away[:, None, None]).flatten(1))
        found = whitening(other).flatten(2)
        torch.testing.assert_close(found[..., 30:].double(), torch.stack(expected)[..., 30:], rtol=1e-3, atol=1e-3)
    whitening.fit(images, by_place=False)
    assert not len(whitening.image_reach)


def test_places_between_those_that_are_known_are_interpolated() -> None:
    whitening = Whitening()
    places = torch.arange(12.0)[:, None].expand(5, 12, 10)
    whitening.fit(places + 0.1 * torch.randn(40, 5, 12, 10, generator=torch.Generator().manual_seed(0)), by_place=True)
    finer = torch.linspace(0, 11, 45)[:, None].expand(1, 5, 45, 37)
    assert whitening(finer).abs().max() < 1


def test_a_state_of_another_size_is_loaded() -> None:
    whitening, other, images = Whitening(), Whitening(), grids()
    whitening.fit(images, by_place=True)
    other.load_state_dict(whitening.state_dict())
    torch.testing.assert_close(other(images), whitening(images), rtol=0, atol=0)


def test_the_share_of_the_place_is_that_of_predictions_by_the_other_images() -> None:
    images = grids(5, of_place=0.7)
    errors = [(images[index] - images[torch.arange(5) != index].mean(dim=0)).square().sum() for index in range(5)]
    around_all = (images - images.mean(dim=(0, 2, 3))[:, None, None]).square().sum()
    assert share_of_place(images) == pytest.approx(float(1 - torch.stack(errors).sum() / around_all), abs=1e-4)
    chosen = torch.zeros(12, 10, dtype=torch.bool)
    chosen[2:5, 3:] = True
    assert share_of_place(images, chosen) == pytest.approx(share_of_place(images[..., 2:5, 3:]), abs=1e-6)


def test_shares_and_kinds() -> None:
    assert share_of_place(torch.zeros(4, 5, 3, 3)) == 0.0
    assert share_of_place(grids(of_place=0.0)) < 0.05
    assert share_of_place(grids(of_place=30.0)) > 0.95
    assert unaligned_kind(share_of_place(grids(of_place=0.0))) is SURFACE
    assert unaligned_kind(0.29) is SURFACE
    assert unaligned_kind(0.31) is unaligned_kind(0.9) is LOOSE
