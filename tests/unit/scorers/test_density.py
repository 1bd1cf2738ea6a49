# Copyright (C) 2026 The anomalib-pedenet authors
# SPDX-License-Identifier: Apache-2.0

"""Density scorers against torch.distributions and anomalib's PaDiM."""

from typing import Any

import pytest
import torch
from anomalib.models.components import MultiVariateGaussian
from anomalib.models.image.padim.anomaly_map import AnomalyMapGenerator

from anomalib_pedenet.mixture import CovarianceType, estimate_mixture, log_density
from anomalib_pedenet.networks import DensityEstimationNetwork
from anomalib_pedenet.scorers import MahalanobisScorer, MixtureDensityScorer


@pytest.mark.parametrize("covariance_type", ["diag", "full"])
def test_the_mixture_is_that_of_the_whole_training_set(covariance_type: CovarianceType) -> None:
    torch.manual_seed(0)
    rows, queries = torch.randn(900, 8) * 0.3 + 2, torch.randn(50, 8) * 0.5 + 2
    network = DensityEstimationNetwork(4, 8)
    scorer = MixtureDensityScorer(8, density_network=network, covariance_type=covariance_type, jitter=1e-3)
    scorer.fit(rows.split(111))
    mixture = estimate_mixture(rows.double(), network(rows).detach().double(), covariance_type, 1e-3)
    expected = -log_density(queries.double(), mixture)
    scores = scorer(queries).double()
    torch.testing.assert_close(scores - scores[0], expected - expected[0], rtol=1e-4, atol=1e-3)


def test_the_score_is_zero_where_a_single_component_is_densest() -> None:
    torch.manual_seed(0)
    rows = torch.randn(500, 8)
    scorer = MixtureDensityScorer(8)
    scorer.fit([rows])
    assert scorer(rows.mean(dim=0, keepdim=True)).item() == pytest.approx(0, abs=1e-5)
    gaussian = torch.distributions.MultivariateNormal(rows.mean(0), rows.T.cov(correction=0) + 1e-3 * torch.eye(8))
    peak = gaussian.log_prob(rows.mean(0))
    torch.testing.assert_close(scorer(rows), peak - gaussian.log_prob(rows), rtol=1e-3, atol=1e-3)


def test_a_component_without_embeddings_changes_nothing() -> None:
    def hard(rows: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.one_hot((rows[:, 0] > 0).long(), 3).float()

    torch.manual_seed(0)
    rows, queries = torch.randn(500, 4), torch.randn(20, 4)
    three, two = MixtureDensityScorer(4, density_network=hard), MixtureDensityScorer(4)
    three.fit([rows])
    two = MixtureDensityScorer(4, density_network=lambda rows: hard(rows)[:, :2])
    two.fit([rows])
    torch.testing.assert_close(three(queries), two(queries), rtol=1e-4, atol=1e-4)


def test_the_density_network_is_not_part_of_the_state() -> None:
    scorer = MixtureDensityScorer(8, density_network=DensityEstimationNetwork(4, 8))
    assert not list(scorer.parameters())
    assert set(scorer.state_dict()) == {"typical_score", "log_weights", "whitening", "shifts", "log_norms"}


def test_mahalanobis_distances_are_padims() -> None:
    torch.manual_seed(0)
    grids, queries = torch.randn(40, 3, 4, 8) + torch.randn(1, 3, 4, 8), torch.randn(2, 3, 4, 8)
    scorer = MahalanobisScorer(8)
    scorer.fit(grids.split(7))
    mean, inverse = MultiVariateGaussian().fit(grids.permute(0, 3, 1, 2))
    expected = AnomalyMapGenerator.compute_distance(queries.permute(0, 3, 1, 2), [mean, inverse])
    torch.testing.assert_close(scorer(queries), expected[:, 0], rtol=1e-3, atol=1e-3)


def test_mahalanobis_typical_score_is_the_root_mean_square_of_the_training_images() -> None:
    torch.manual_seed(0)
    grids = torch.randn(40, 3, 4, 8)
    scorer = MahalanobisScorer(8)
    scorer.fit([grids])
    # The unbiased covariance is larger by 40 / 39 than the mean square of the images themselves.
    expected = scorer(grids).square().mean().mul(40 / 39).sqrt().item()
    assert scorer.typical_score.item() == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(
    ("scorer", "options", "message"),
    [
        (MixtureDensityScorer, {"covariance_type": "tied"}, "covariance_type must be 'diag' or 'full', got 'tied'"),
        (MixtureDensityScorer, {"jitter": 0.0}, "jitter must be above 0 and finite, got 0"),
        (MahalanobisScorer, {"jitter": float("nan")}, "jitter must be above 0 and finite, got nan"),
    ],
)
def test_arguments_outside_their_range_are_refused(scorer: Any, options: dict[str, Any], message: str) -> None:  # noqa: ANN401
    with pytest.raises(ValueError, match=message):
        scorer(**options)
