# Copyright (C) 2026 The anomalib-pedenet authors
# SPDX-License-Identifier: Apache-2.0

"""Mixture statistics against scikit-learn's and plain loops, log density against torch.distributions."""

from typing import Literal

import pytest
import torch
from sklearn.mixture._gaussian_mixture import _estimate_gaussian_parameters
from torch.distributions import Categorical, Independent, MixtureSameFamily, MultivariateNormal, Normal

from anomalib_pedenet.mixture import GaussianMixture, estimate_mixture, log_density

Covariance = Literal["diag", "full"]


@pytest.fixture
def batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    embeddings = torch.randn(200, 64, generator=generator, dtype=torch.float64).tanh()
    responsibilities = torch.randn(200, 5, generator=generator, dtype=torch.float64).mul(3).softmax(dim=1)
    return embeddings, responsibilities


def reference_distribution(mixture: GaussianMixture) -> MixtureSameFamily:
    components = (
        Independent(Normal(mixture.means, mixture.covariances.sqrt()), 1)
        if mixture.covariances.ndim == 2
        else MultivariateNormal(mixture.means, covariance_matrix=mixture.covariances)
    )
    return MixtureSameFamily(Categorical(probs=mixture.weights), components)


@pytest.mark.parametrize("covariance_type", ["diag", "full"])
def test_estimates_equal_scikit_learns(
    batch: tuple[torch.Tensor, torch.Tensor],
    covariance_type: Covariance,
) -> None:
    embeddings, responsibilities = batch
    mixture = estimate_mixture(embeddings, responsibilities, covariance_type, jitter=1e-3)
    counts, means, covariances = _estimate_gaussian_parameters(
        embeddings.numpy(),
        responsibilities.numpy(),
        reg_covar=1e-3,
        covariance_type=covariance_type,
    )
    torch.testing.assert_close(mixture.weights, torch.from_numpy(counts) / 200)
    torch.testing.assert_close(mixture.means, torch.from_numpy(means))
    torch.testing.assert_close(mixture.covariances, torch.from_numpy(covariances))


def test_estimates_equal_the_equations(batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    """Eqs. 3 to 5, one component and one embedding at a time."""
    embeddings, responsibilities = batch
    mixture = estimate_mixture(embeddings, responsibilities, "full", jitter=0.0)
    for k in range(5):
        gamma = responsibilities[:, k]
        mean = sum(g * z for g, z in zip(gamma, embeddings, strict=True)) / gamma.sum()
        covariance = sum(g * torch.outer(z - mean, z - mean) for g, z in zip(gamma, embeddings, strict=True))
        torch.testing.assert_close(mixture.weights[k], gamma.sum() / 200)
        torch.testing.assert_close(mixture.means[k], mean)
        torch.testing.assert_close(mixture.covariances[k], covariance / gamma.sum())


@pytest.mark.parametrize("covariance_type", ["diag", "full"])
def test_log_density_equals_torch_distributions(
    batch: tuple[torch.Tensor, torch.Tensor],
    covariance_type: Covariance,
) -> None:
    embeddings, responsibilities = batch
    mixture = estimate_mixture(embeddings, responsibilities, covariance_type)
    expected = reference_distribution(mixture).log_prob(embeddings)
    torch.testing.assert_close(log_density(embeddings, mixture), expected, rtol=1e-10, atol=1e-10)


def test_diagonal_is_the_full_covariances_diagonal(batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    diagonal, full = (estimate_mixture(*batch, covariance_type) for covariance_type in ("diag", "full"))
    torch.testing.assert_close(diagonal.variances, full.variances)
    as_full = GaussianMixture(diagonal.weights, diagonal.means, torch.diag_embed(diagonal.covariances))
    torch.testing.assert_close(log_density(batch[0], diagonal), log_density(batch[0], as_full))


def test_known_parameters_are_recovered() -> None:
    torch.manual_seed(0)
    means = torch.tensor([[-2.0, 0.0], [2.0, 1.0]], dtype=torch.float64)
    labels = torch.randint(2, (50_000,))
    embeddings = means[labels] + torch.tensor([0.5, 1.5]) * torch.randn(50_000, 2, dtype=torch.float64)
    mixture = estimate_mixture(embeddings, torch.eye(2, dtype=torch.float64)[labels], "diag", jitter=0.0)
    torch.testing.assert_close(mixture.means, means, rtol=0, atol=0.05)
    torch.testing.assert_close(mixture.variances, torch.tensor([[0.25, 2.25]] * 2).double(), rtol=0.05, atol=0)


@pytest.mark.parametrize("covariance_type", ["diag", "full"])
def test_gradients(covariance_type: Covariance) -> None:
    generator = torch.Generator().manual_seed(1)
    embeddings = torch.randn(12, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    logits = torch.randn(12, 2, generator=generator, dtype=torch.float64, requires_grad=True)

    def loss(embeddings: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        return log_density(embeddings, estimate_mixture(embeddings, logits.softmax(dim=1), covariance_type)).sum()

    assert torch.autograd.gradcheck(loss, (embeddings, logits))


@pytest.mark.parametrize("covariance_type", ["diag", "full"])
def test_fewer_embeddings_than_dimensions_are_finite_in_float32(covariance_type: Covariance) -> None:
    """The paper's 128 patches over 10 components leave every full covariance singular: the jitter must hold."""
    torch.manual_seed(0)
    embeddings = torch.randn(128, 64).tanh().requires_grad_()
    mixture = estimate_mixture(embeddings, torch.randn(128, 10).mul(5).softmax(dim=1), covariance_type)
    total = log_density(embeddings, mixture).sum()
    total.backward()
    assert torch.isfinite(total)
    assert torch.isfinite(embeddings.grad).all()


def test_a_component_without_embeddings_is_finite() -> None:
    embeddings = torch.randn(20, 64)
    responsibilities = torch.tensor([[1.0, 0.0]]).expand(20, 2)
    assert torch.isfinite(log_density(embeddings, estimate_mixture(embeddings, responsibilities))).all()


def test_far_embeddings_do_not_underflow() -> None:
    """exp(-3e6) is 0 in any floating point type; its logarithm must still rank embeddings."""
    mixture = GaussianMixture(torch.ones(1), torch.zeros(1, 64), torch.full((1, 64), 1e-3))
    near, far = log_density(torch.tensor([[10.0] * 64, [20.0] * 64]), mixture)
    assert torch.isfinite(far)
    assert far < near


def test_singular_covariance_names_the_remedy() -> None:
    embeddings = torch.zeros(10, 4)
    mixture = estimate_mixture(embeddings, torch.ones(10, 1), "full", jitter=0.0)
    with pytest.raises(ValueError, match=r"components \[0\] are not positive definite.*covariance_jitter"):
        log_density(embeddings, mixture)


def test_shapes_and_types_are_checked() -> None:
    with pytest.raises(ValueError, match="same N"):
        estimate_mixture(torch.zeros(10, 4), torch.ones(9, 2))
    with pytest.raises(ValueError, match="'diag' or 'full', got 'tied'"):
        estimate_mixture(torch.zeros(10, 4), torch.ones(10, 2), "tied")  # type: ignore[arg-type]


@pytest.mark.parametrize("covariance_type", ["diag", "full"])
def test_what_is_not_finite_stays_so_and_raises_nothing(covariance_type: str) -> None:
    """A training leaves out such a step, and goes on."""
    embeddings = torch.randn(20, 4)
    embeddings[3, 1] = torch.nan
    mixture = estimate_mixture(embeddings, torch.full((20, 2), 0.5), covariance_type)  # type: ignore[arg-type]
    assert log_density(embeddings, mixture).isnan().all()
