# Copyright (C) 2026 The anomalib-pedenet authors
# SPDX-License-Identifier: Apache-2.0

"""The mixture of whitened embeddings: against slow references, and what its loss can and cannot win by."""

import copy

import pytest
import torch
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal

from anomalib_pedenet.loss import PedenetLoss, share_to_learn
from anomalib_pedenet.whitened_density import WhitenedDensityEstimationNetwork, whitened_density_loss


def clusters(count: int = 4, num_embeddings: int = 800, dims: int = 6) -> torch.Tensor:
    """Embeddings in small clusters that lie apart."""
    centers = 3 * torch.randn(count, dims, generator=torch.Generator().manual_seed(1))
    return centers[torch.arange(num_embeddings) % count] + 0.1 * torch.randn(num_embeddings, dims)


@pytest.fixture
def network() -> WhitenedDensityEstimationNetwork:
    torch.manual_seed(0)
    return WhitenedDensityEstimationNetwork(num_components=4, embedding_dim=6, projected_dim=3)


def loss_of(network: WhitenedDensityEstimationNetwork, embeddings: torch.Tensor) -> torch.Tensor:
    """The loss of a first batch."""
    return whitened_density_loss(copy.deepcopy(network).estimate(embeddings))


def test_whitening_makes_the_covariance_one(network: WhitenedDensityEstimationNetwork) -> None:
    embeddings = torch.randn(500, 6) @ torch.randn(6, 6) + 5
    whitened = network.estimate(embeddings).embeddings
    torch.testing.assert_close(whitened.mean(dim=0), torch.zeros(3), rtol=0, atol=1e-4)
    torch.testing.assert_close(torch.cov(whitened.T, correction=0), torch.eye(3), rtol=0, atol=0.02)


def test_embeddings_cannot_win_by_shrinking_or_moving(network: WhitenedDensityEstimationNetwork) -> None:
    embeddings = clusters().requires_grad_()
    loss = loss_of(network, embeddings)
    torch.testing.assert_close(loss_of(network, 0.05 * embeddings + 2), loss, rtol=0, atol=1e-3)
    (gradient,) = torch.autograd.grad(loss, embeddings)
    assert (gradient * embeddings).sum().abs() < 1e-3 * gradient.norm() * embeddings.norm()


def test_embeddings_win_by_gathering_in_clusters(network: WhitenedDensityEstimationNetwork) -> None:
    """After some steps of the networks alone clusters are denser than one cloud of the same covariance."""
    losses = {}
    for name, embeddings in {"clusters": clusters(), "cloud": torch.randn(800, 6)}.items():
        trained = copy.deepcopy(network)
        optimizer = torch.optim.Adam(trained.parameters(), lr=1e-2)
        for _ in range(100):
            optimizer.zero_grad()
            loss = whitened_density_loss(trained.estimate(embeddings))
            loss.backward()
            optimizer.step()
        losses[name] = loss.item()
    assert losses["clusters"] < losses["cloud"] - 1


def test_the_mixture_is_that_of_all_batches_the_later_the_more(network: WhitenedDensityEstimationNetwork) -> None:
    """The slow reference weighs each embedding of each batch by itself."""
    batches = [torch.randn(50, 6) for _ in range(3)]
    samples = [network.estimate(batch) for batch in batches]
    shares = (0.81, 0.09, 0.1)
    for component in range(4):
        count, first, second = 0.0, torch.zeros(3), torch.zeros(3, 3)
        for share, sample in zip(shares, samples, strict=True):
            for vector, gamma in zip(sample.embeddings, sample.responsibilities[:, component], strict=True):
                count += share * gamma / 50
                first += share * gamma * vector / 50
                second += share * gamma * torch.outer(vector, vector) / 50
        mean = first / count
        mixture = samples[-1].mixture
        torch.testing.assert_close(mixture.weights[component], count, rtol=0, atol=1e-5)
        torch.testing.assert_close(mixture.means[component], mean, rtol=0, atol=1e-4)
        covariance = second / count - torch.outer(mean, mean) + 0.02 * torch.eye(3)
        torch.testing.assert_close(mixture.covariances[component], covariance, rtol=0, atol=1e-4)


def test_the_loss_equals_torch_distributions(network: WhitenedDensityEstimationNetwork) -> None:
    network.estimate(torch.randn(60, 6))
    sample = network.estimate(clusters())
    weights, means, covariances = sample.mixture.weights, sample.mixture.means, sample.mixture.covariances
    mixture = MixtureSameFamily(Categorical(weights), MultivariateNormal(means, covariances))
    use = sample.responsibilities.mean(dim=0)
    expected = -mixture.log_prob(sample.embeddings).mean() - Categorical(use).entropy()
    torch.testing.assert_close(whitened_density_loss(sample), expected)


def test_an_unused_component_costs(network: WhitenedDensityEstimationNetwork) -> None:
    sample = network.estimate(clusters())
    one_alone = torch.eye(4)[torch.zeros(len(sample.embeddings), dtype=torch.int64)]
    assert whitened_density_loss(sample._replace(responsibilities=one_alone)) > whitened_density_loss(sample)


def test_responsibilities_afterwards_are_by_the_averages_of_training(
    network: WhitenedDensityEstimationNetwork,
) -> None:
    batch = clusters()
    estimated = network.estimate(batch).responsibilities
    torch.testing.assert_close(network(batch), estimated, rtol=0, atol=1e-4)
    saved = copy.deepcopy(network.state_dict())
    network(5 * batch)
    assert all(torch.equal(value, saved[name]) for name, value in network.state_dict().items())
    network.estimate(batch + 1)
    torch.testing.assert_close(
        network.mean, network.projection(batch).mean(dim=0) + 0.1 * network.projection.weight.sum(1)
    )


@pytest.mark.parametrize("embeddings", [torch.zeros(20, 6), 1e-6 * torch.randn(20, 6), torch.ones(2, 6)])
def test_equal_or_few_embeddings_have_finite_loss_and_gradients(
    network: WhitenedDensityEstimationNetwork, embeddings: torch.Tensor
) -> None:
    embeddings = embeddings.clone().requires_grad_()
    loss = loss_of(network, embeddings)
    loss.backward()
    assert loss.isfinite()
    assert embeddings.grad is not None
    assert embeddings.grad.isfinite().all()


def test_autocast_does_not_touch_it(network: WhitenedDensityEstimationNetwork) -> None:
    embeddings = clusters()
    expected = loss_of(network, embeddings)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(loss_of(network, embeddings), expected, rtol=0, atol=0)


def test_it_counts_as_far_as_location_prediction_has_learned(network: WhitenedDensityEstimationNetwork) -> None:
    embeddings = clusters()
    directions = torch.arange(16) % 8
    logits = 2 * torch.eye(8)[directions] + torch.randn(16, 8)
    loss = PedenetLoss(0.1, lambda_var=0.0, reading="whitened")
    terms = loss(embeddings, copy.deepcopy(network).estimate(embeddings), logits, directions, 0.5)
    learned = 1 - share_to_learn(terms.location)
    assert 0.1 < learned < 0.9
    torch.testing.assert_close(terms.density, loss_of(network, embeddings))
    torch.testing.assert_close(terms.total, terms.location + 0.5 * 0.1 * learned * terms.density)
    assert terms.regularization == 0
    alone = PedenetLoss(0.1, lambda_lpn=0.0, lambda_var=0.0, reading="whitened")
    terms = alone(embeddings, copy.deepcopy(network).estimate(embeddings), logits, directions)
    torch.testing.assert_close(terms.total, 0.1 * terms.density)


def test_a_reading_needs_its_own_network(network: WhitenedDensityEstimationNetwork) -> None:
    embeddings, responsibilities = clusters(), torch.full((800, 4), 0.25)
    rest = (torch.zeros(4, 8), torch.arange(4))
    with pytest.raises(TypeError, match="whitened L_DEN needs a WhitenedDensityEstimationNetwork's estimate"):
        PedenetLoss(reading="whitened")(embeddings, responsibilities, *rest)
    with pytest.raises(TypeError, match="'dagmm' of L_DEN needs responsibilities"):
        PedenetLoss(reading="dagmm")(embeddings, network.estimate(embeddings), *rest)
