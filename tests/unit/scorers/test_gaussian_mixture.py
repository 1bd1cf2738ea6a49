# Copyright (C) 2026 The anomalib-pedenet authors
# SPDX-License-Identifier: Apache-2.0

"""The Gaussian mixture, beside scikit-learn's."""

from itertools import pairwise

import pytest
import torch
from sklearn.mixture import GaussianMixture

from anomalib_pedenet.scorers import GaussianMixtureScorer
from anomalib_pedenet.scorers.gaussian_mixture import fit_mixture


def draw(num_rows: int, seed: int = 0) -> torch.Tensor:
    """Draw rows ``[3 * num_rows, 4]`` of three Gaussians, far apart, of different shape."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(3, num_rows, 4, generator=generator)
    shapes = torch.stack([torch.eye(4), torch.diag(torch.tensor([2.0, 0.5, 1.0, 0.1])), torch.eye(4) * 0.3])
    shapes[2, 0, 1] = 0.5
    centers = torch.tensor([[0.0, 0, 0, 0], [9.0, 0, 0, 0], [0.0, 9, 0, 0]])
    return (rows @ shapes + centers[:, None]).flatten(0, 1)


def log_density(rows: torch.Tensor, mixture: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Return the log density ``[N]`` of rows, one component after the other, by torch's own distribution."""
    parts = [
        weight.log() + torch.distributions.MultivariateNormal(mean, covariance).log_prob(rows)
        for weight, mean, covariance in zip(*mixture, strict=True)
    ]
    return torch.logsumexp(torch.stack(parts), dim=0)


def test_without_a_prior_it_is_the_mixture_of_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("anomalib_pedenet.scorers.gaussian_mixture._PRIOR_ROWS", 0)
    monkeypatch.setattr("anomalib_pedenet.scorers.gaussian_mixture._LEAST_VARIANCE", 0)
    rows = draw(4_000)
    reference = GaussianMixture(3, random_state=0, n_init=3).fit(rows.numpy())
    scorer = GaussianMixtureScorer(embedding_dim=4, num_gaussians=3)
    scorer.fit([rows])
    others = draw(200, seed=1)
    expected = -torch.from_numpy(reference.score_samples(others.numpy())).float()
    differences = scorer(others) - expected  # a constant: the least value of the negative log density
    torch.testing.assert_close(differences - differences.mean(), torch.zeros(600), rtol=0, atol=0.05)


def test_scores_are_the_negative_log_density_less_its_least_value() -> None:
    rows = draw(500)
    scorer = GaussianMixtureScorer(embedding_dim=4, num_gaussians=9)  # more than are computed together
    scorer.fit([rows])
    covariances = torch.linalg.inv(scorer.whitening.mT @ scorer.whitening)
    means = torch.linalg.solve(scorer.whitening, scorer.shifts[..., None])[..., 0]
    density = log_density(rows, (scorer.log_weights.exp(), means, covariances))
    differences = scorer(rows) + density  # a constant, no less than any density
    torch.testing.assert_close(differences, differences[:1].expand_as(differences), rtol=0, atol=1e-3)
    assert scorer(rows).min() >= 0


def test_more_components_describe_the_rows_better() -> None:
    rows = draw(500)
    assert log_density(rows, fit_mixture(rows, 3)).mean() > log_density(rows, fit_mixture(rows, 1)).mean() + 1


def test_each_step_raises_the_likelihood(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = draw(400)
    monkeypatch.setattr("anomalib_pedenet.scorers.gaussian_mixture._PRIOR_ROWS", 0)
    likelihoods = []
    for steps in range(6):
        monkeypatch.setattr("anomalib_pedenet.scorers.gaussian_mixture._STEPS", steps)
        likelihoods.append(float(log_density(rows, fit_mixture(rows, 8)).mean()))
    assert all(later >= earlier - 1e-3 for earlier, later in pairwise(likelihoods))


def test_what_lies_between_two_kinds_of_patches_is_abnormal_and_a_rare_kind_is_not() -> None:
    """Of a single Gaussian neither holds."""
    generator = torch.Generator().manual_seed(0)
    common = torch.randn(2_000, 4, generator=generator) * 0.1
    rare = torch.randn(60, 4, generator=generator) * 0.1 + torch.tensor([4.0, 0, 0, 0])
    between = torch.tensor([[2.0, 0, 0, 0]])
    scorer = GaussianMixtureScorer(embedding_dim=4, num_gaussians=8)
    scorer.fit([torch.cat([common, rare])])
    assert scorer(between) > 2 * scorer(rare).max()


@pytest.mark.parametrize("count", [1, 2, 5])
def test_few_or_equal_rows_have_a_density(count: int) -> None:
    scorer = GaussianMixtureScorer(embedding_dim=4)
    scorer.fit([torch.ones(count, 4)])
    assert scorer(torch.ones(1, 4)).isfinite().all()
    assert scorer(torch.zeros(1, 4)) > scorer(torch.ones(1, 4))


def test_batches_make_no_difference_and_the_seed_does() -> None:
    rows = draw(500)
    whole, parts, other = (GaussianMixtureScorer(4, seed=seed, num_gaussians=5) for seed in (0, 0, 1))
    whole.fit([rows])
    parts.fit(list(rows.split(170)))
    other.fit([rows])
    torch.testing.assert_close(whole(rows), parts(rows), rtol=0, atol=0)
    assert not torch.equal(whole.shifts, other.shifts)


def test_a_mixture_needs_a_component() -> None:
    with pytest.raises(ValueError, match="num_gaussians must be at least 1, got 0"):
        GaussianMixtureScorer(num_gaussians=0)
