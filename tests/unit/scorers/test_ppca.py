# Copyright (C) 2026 The anomalib-pedenet authors
# SPDX-License-Identifier: Apache-2.0

"""Probabilistic principal components of places, beside PaDiM's Gaussians and beside one place at a time."""

import pytest
import torch
from anomalib.models.components import MultiVariateGaussian
from anomalib.models.image.padim.anomaly_map import AnomalyMapGenerator

from anomalib_pedenet.scorers import ProbabilisticPcaScorer, ppca


def grids(count: int = 40, height: int = 3, width: int = 4) -> torch.Tensor:
    """Grids ``[N, h, w, 8]`` whose places differ in mean and in how they vary."""
    generator = torch.Generator().manual_seed(0)
    means = torch.randn(1, height, width, 8, generator=generator)
    mixing = 1.5 * torch.eye(8) + 0.3 * torch.randn(height, width, 8, 8, generator=generator)
    return means + torch.einsum("hwzy,nhwy->nhwz", mixing, torch.randn(count, height, width, 8, generator=generator))


def test_with_all_directions_and_no_shrinkage_distances_are_padims(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ppca, "_SHRINKAGE", 0.0)
    monkeypatch.setattr(ppca, "_HALF_SHRUNK", 0.0)
    monkeypatch.setattr(ppca, "_DIRECTIONS", 8)
    images, queries = grids(), grids(2) + 0.3
    scorer = ProbabilisticPcaScorer(8)
    scorer.fit(images.split(7))
    mean, inverse = MultiVariateGaussian().fit(images.permute(0, 3, 1, 2))
    # PaDiM adds 0.01 to the variances.
    covariances = torch.linalg.inv(inverse.double()) - 0.01 * torch.eye(8)
    inverse = torch.linalg.inv(covariances).float()
    expected = AnomalyMapGenerator.compute_distance(queries.permute(0, 3, 1, 2), [mean, inverse])
    torch.testing.assert_close(scorer(queries), expected[:, 0], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("size", [(3, 4), (5, 7)])
@pytest.mark.parametrize("most_blocks", [6, 1_024])
def test_distances_are_those_of_one_place_at_a_time(
    size: tuple[int, int], most_blocks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ppca, "_MOST_BLOCKS", most_blocks)
    images, queries = grids(30, *size), grids(2, *size) + 0.5
    scorer = ProbabilisticPcaScorer(8)
    scorer.fit(images.split(7))
    blocks = scorer.blocks
    assert len(blocks.unique()) == (12 if size == (3, 4) else 35) if most_blocks > 35 else len(blocks.unique()) <= 12
    centered = images.double() - images.double().mean(dim=0)
    covariances = {}
    for block in blocks.unique().tolist():
        rows = centered[:, blocks == block]  # [N, places, Z]
        covariances[block] = rows.flatten(0, 1).T @ rows.flatten(0, 1) / (29 * rows.shape[1])
    pooled = torch.stack([covariances[int(block)] for block in blocks.flatten()]).mean(dim=0)
    pooled += (1e-3 * pooled.diagonal().mean() + 1e-6) * torch.eye(8)
    unit = torch.linalg.inv(torch.linalg.cholesky(pooled))
    scores, mean = scorer(queries), images.double().mean(dim=0)
    for row in range(size[0]):
        for column in range(size[1]):
            relative = unit @ covariances[int(blocks[row, column])] @ unit.T
            values, vectors = torch.linalg.eigh(0.7 * relative + 0.3 * torch.eye(8))
            values[:4] = values[:4].mean()
            covariance = vectors @ torch.diag(values) @ vectors.T
            offsets = (queries[:, row, column].double() - mean[row, column]) @ unit.T
            expected = torch.einsum("nz,zy,ny->n", offsets, torch.linalg.inv(covariance), offsets).sqrt()
            torch.testing.assert_close(scores[:, row, column].double(), expected, rtol=1e-4, atol=1e-4)


def test_the_typical_score_is_the_root_mean_square_of_the_training_images() -> None:
    images = grids()
    scorer = ProbabilisticPcaScorer(8)
    scorer.fit([images])
    # The unbiased covariance is larger by 40 / 39 than the mean square of the images themselves.
    expected = scorer(images).square().mean().mul(40 / 39).sqrt().item()
    assert scorer.typical_score.item() == pytest.approx(expected, rel=1e-3)


def test_new_images_of_few_known_ones_are_not_far_off() -> None:
    for count, most in ((1, 3.0), (2, 3.0), (3, 2.5), (10, 1.6)):
        images = grids(count + 20)
        scorer = ProbabilisticPcaScorer(8)
        scorer.fit([images[:count]])
        assert scorer(images[count:]).mean() < most * scorer.typical_score


def test_what_is_hidden_does_not_count() -> None:
    images = grids(20, 6, 6)
    hidden = images.clone()
    hidden[:, 3:] = 1.0
    scorer = ProbabilisticPcaScorer(8)
    scorer.fit([images[:, :3]])
    expected, typical = scorer(images[:, :3]), scorer.typical_score
    scorer.fit([hidden])
    torch.testing.assert_close(scorer(hidden)[:, :3], expected, rtol=1e-4, atol=1e-4)
    assert scorer.typical_score.item() == pytest.approx(typical.item(), rel=1e-4)


@pytest.mark.parametrize("images", [grids(1), grids(2), torch.zeros(5, 3, 4, 8), grids(3, 1, 1)])
def test_few_images_and_images_that_are_all_alike_have_finite_scores(images: torch.Tensor) -> None:
    scorer = ProbabilisticPcaScorer(8)
    scorer.fit([images])
    assert scorer(images + 1).isfinite().all()
    assert (scorer(images + 1) > scorer(images)).all()
    assert scorer.typical_score > 0


def test_fewer_dimensions_than_directions_are_enough() -> None:
    images = grids()[..., :3]
    scorer = ProbabilisticPcaScorer(3)
    scorer.fit([images])
    assert scorer.typical_score.item() == pytest.approx(scorer(images).square().mean().sqrt().item(), rel=0.03)


@pytest.mark.parametrize(("height", "width"), [(3, 4), (40, 30)])
def test_places_learn_as_if_what_is_taught_had_been_fitted(height: int, width: int) -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(10, height, width, 4, generator=generator) + torch.randn(height, width, 4, generator=generator)
    fitted, taught = images[:7], images[7:]
    scorer = ProbabilisticPcaScorer(4)  # as many dimensions as directions: covariances are known in full
    scorer.fit([fitted])
    chosen = torch.rand(3, height, width, generator=generator) < 0.7
    scorer.teach(taught[chosen], chosen.nonzero()[:, 1:], torch.zeros(int(chosen.sum()), dtype=torch.bool))
    assert not len(scorer.taught)

    # Place by place, and then block by block.
    shrinkage = 12 / (12 + 7)
    units, expected = images @ scorer.unit.T, torch.zeros(10, height, width)
    scatters, counts = {}, {}
    centered = {}
    for row in range(height):
        for column in range(width):
            rows = torch.cat([units[:7, row, column], units[7:, row, column][chosen[:, row, column]]])
            centered[row, column] = units[:, row, column] - rows.mean(dim=0)
            block = int(scorer.blocks[row, column])
            around = rows - rows.mean(dim=0)
            scatters[block] = scatters.get(block, 0) + around.T @ around
            counts[block] = counts.get(block, 0) + len(rows) - 1
    for (row, column), deviations in centered.items():
        block = int(scorer.blocks[row, column])
        covariance = (1 - shrinkage) * scatters[block] / counts[block] + shrinkage * torch.eye(4)
        squared = torch.einsum("nz,zy,ny->n", deviations, covariance.inverse(), deviations)
        expected[:, row, column] = squared.sqrt()
    torch.testing.assert_close(scorer(images), expected, rtol=1e-3, atol=1e-3)


def test_a_lesson_counts_beside_hundreds_of_images() -> None:
    generator = torch.Generator().manual_seed(0)
    scorer = ProbabilisticPcaScorer(8)
    scorer.fit([torch.randn(320, 3, 4, 8, generator=generator)])
    strange = torch.full((1, 8), 9.0)
    everywhere = strange.expand(1, 3, 4, 8)
    before = scorer(everywhere)
    scorer.teach(strange, torch.tensor([[1, 2]]), torch.tensor([False]))
    after = scorer(everywhere)
    assert after[0, 1, 2] < 0.5 * before[0, 1, 2]
    before[0, 1, 2] = after[0, 1, 2] = 0
    torch.testing.assert_close(after, before, rtol=0, atol=0)


def test_what_is_taught_is_normal_anywhere_and_nothing_else_changes() -> None:
    images = grids()
    scorer = ProbabilisticPcaScorer(8)
    scorer.fit([images])
    before = scorer(images)
    strange = torch.full((1, 8), 40.0) + 0.1 * torch.randn(5, 8, generator=torch.Generator().manual_seed(1))
    everywhere = strange[:1].expand(1, 3, 4, 8)
    assert scorer(everywhere).min() > 4 * scorer.typical_score
    scorer.teach(strange)
    assert scorer(everywhere).max() < 1.5 * scorer.typical_score
    torch.testing.assert_close(scorer(images), before, rtol=0, atol=0)
    assert scorer(-everywhere).min() > 4 * scorer.typical_score
    scorer.fit([images])
    assert not len(scorer.taught)
    torch.testing.assert_close(scorer(images), before, rtol=0, atol=0)
