# Copyright (C) 2026 The anomalib-pedenet authors
# SPDX-License-Identifier: Apache-2.0

"""The joint loss against the equations written out."""

import math

import pytest
import torch

from anomalib_pedenet.loss import (
    MIN_CLASS_SHARE,
    PedenetLoss,
    compactness_loss,
    covariance_regularization,
    defect_loss,
    density_loss,
    location_loss,
    share_to_learn,
    variance_loss,
)
from anomalib_pedenet.mixture import CovarianceType, GaussianMixture, estimate_mixture, log_density


def make_inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return (
        torch.randn(40, 8, generator=generator, dtype=torch.float32),
        torch.randn(40, 3, generator=generator).softmax(dim=1),
        torch.randn(36, 8, generator=generator),
        torch.randint(8, (36,), generator=generator),
    )


def test_both_readings_of_the_density_loss() -> None:
    log_densities = torch.tensor([-1.0, -2.0, -4.0], dtype=torch.float64)
    assert density_loss(log_densities, "dagmm").item() == pytest.approx(7 / 3)
    expected = -math.log(math.exp(-1) + math.exp(-2) + math.exp(-4)) / 3
    assert density_loss(log_densities, "paper").item() == pytest.approx(expected)


def test_the_papers_reading_survives_densities_that_underflow() -> None:
    assert density_loss(torch.tensor([-2000.0, -2001.0]), "paper").item() == pytest.approx(999.8434, abs=1e-3)


def test_location_loss_of_an_undecided_network_is_log_8() -> None:
    assert location_loss(torch.zeros(5, 8), torch.arange(5)).item() == pytest.approx(math.log(8))


def test_location_loss_is_the_cross_entropy() -> None:
    _, _, logits, directions = make_inputs()
    expected = -sum(row.softmax(0)[k].log() for row, k in zip(logits, directions, strict=True)) / 36
    torch.testing.assert_close(location_loss(logits, directions), expected)


def test_variance_loss_is_the_mean_shortfall_of_the_standard_deviations() -> None:
    # Two points at +-a have the standard deviation a * sqrt(2).
    embeddings = torch.tensor([[-0.1, -0.5, 0.0], [0.1, 0.5, 0.0]])
    expected = ((0.25 - math.sqrt(0.02 + 1e-4)) + 0.0 + (0.25 - 0.01)) / 3
    assert variance_loss(embeddings, 0.25).item() == pytest.approx(expected)


def test_variance_loss_drives_nearly_equal_embeddings_apart() -> None:
    embeddings = torch.tensor([[0.001], [-0.001]], requires_grad=True)
    variance_loss(embeddings, 0.25).backward()
    assert embeddings.grad is not None
    assert embeddings.grad[0] < 0 < embeddings.grad[1]  # a step against the gradient


def test_variance_loss_has_a_finite_gradient_where_all_embeddings_are_equal() -> None:
    embeddings = torch.zeros(4, 3, requires_grad=True)
    variance_loss(embeddings, 0.25).backward()
    assert embeddings.grad is not None
    assert bool(embeddings.grad.isfinite().all())


@pytest.mark.parametrize("is_full", [False, True])
def test_regularization_sums_inverse_variances(is_full: bool) -> None:
    variances = torch.tensor([[0.5, 2.0], [4.0, 0.25]])
    covariances = torch.diag_embed(variances) + 0.1 * (1 - torch.eye(2)) if is_full else variances
    mixture = GaussianMixture(torch.full((2,), 0.5), torch.zeros(2, 2), covariances)
    assert covariance_regularization(mixture).item() == pytest.approx(2 + 0.5 + 0.25 + 4)


def test_total_is_the_weighted_sum() -> None:
    embeddings, responsibilities, logits, directions = make_inputs()
    terms = PedenetLoss(0.5, 2.0, 1e-3, lambda_var=3.0, min_std=1.5)(embeddings, responsibilities, logits, directions)
    mixture = estimate_mixture(embeddings, responsibilities)
    torch.testing.assert_close(terms.density, -log_density(embeddings, mixture).mean())
    torch.testing.assert_close(terms.location, location_loss(logits, directions))
    torch.testing.assert_close(terms.regularization, covariance_regularization(mixture))
    torch.testing.assert_close(terms.variance, variance_loss(embeddings, 1.5))
    expected = 0.5 * terms.density + 2 * terms.location + 1e-3 * terms.regularization + 3 * terms.variance
    torch.testing.assert_close(terms.total, expected)


def test_warm_up_scales_the_density_terms_only() -> None:
    inputs = make_inputs()
    loss = PedenetLoss(0.5, 2.0, 1e-3, lambda_var=3.0, min_std=1.5)
    full, half, none = (loss(*inputs, density_scale=scale) for scale in (1.0, 0.5, 0.0))
    torch.testing.assert_close(half.total, (full.total + none.total) / 2)
    torch.testing.assert_close(none.total, 2 * none.location + 3 * none.variance)
    assert none.variance > 0


@pytest.mark.parametrize(("lambda_den", "lambda_lpn"), [(0.0, 1.0), (1.0, 0.0)])
def test_a_weight_of_zero_leaves_the_term_out(lambda_den: float, lambda_lpn: float) -> None:
    embeddings, responsibilities, logits, directions = make_inputs()
    embeddings.requires_grad_()
    logits.requires_grad_()
    terms = PedenetLoss(lambda_den, lambda_lpn, 0.1, lambda_var=0.0)(embeddings, responsibilities, logits, directions)
    terms.total.backward()
    assert (embeddings.grad is None) == (lambda_den == 0)
    assert (logits.grad is None) == (lambda_lpn == 0)
    assert (terms.density == 0) == (lambda_den == 0)


@pytest.mark.parametrize("covariance_type", ["diag", "full"])
def test_autocast_does_not_touch_the_statistics(covariance_type: CovarianceType) -> None:
    inputs = make_inputs()
    loss = PedenetLoss(0.5, 2.0, 1e-3, covariance_type=covariance_type)
    expected = loss(*inputs)
    with torch.autocast("cpu", torch.bfloat16):
        terms = loss(*inputs)
    torch.testing.assert_close(terms.density, expected.density, rtol=0, atol=0)
    torch.testing.assert_close(terms.total, expected.total, rtol=0, atol=0)


def test_unknown_reading_is_refused() -> None:
    with pytest.raises(ValueError, match="'dagmm' or 'paper', got 'other'"):
        density_loss(torch.zeros(3), "other")  # type: ignore[arg-type]


def test_defect_loss_gives_both_classes_equal_weight() -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(300), (torch.rand(300) < 0.2).float()
    bce = torch.nn.functional.binary_cross_entropy_with_logits
    positive, negative = labels == 1, labels == 0
    expected = (bce(logits[positive], labels[positive]) + bce(logits[negative], labels[negative])) / 2
    torch.testing.assert_close(defect_loss(logits, labels), expected)


def test_a_handful_of_defective_patches_does_not_make_a_step() -> None:
    labels = torch.zeros(1000)
    labels[0] = 1
    wrong = torch.where(labels > 0, -1.0, -20.0)  # right about the normal ones, wrong about the single defective one
    share = defect_loss(wrong, labels) / torch.nn.functional.softplus(torch.tensor(1.0))
    assert share.item() == pytest.approx(0.5 * (1 / 1000) / MIN_CLASS_SHARE, rel=1e-3)


def test_defect_prediction_joins_the_total_with_its_weight() -> None:
    embeddings, responsibilities = torch.randn(16, 64), torch.full((16, 2), 0.5)
    arguments = (embeddings, responsibilities, torch.zeros(4, 8), torch.arange(4))
    logits, labels = torch.randn(20), torch.arange(20).remainder(2).float()
    without = PedenetLoss()(*arguments)
    terms = PedenetLoss(lambda_syn=3.0)(*arguments, defect_logits=logits, defect_labels=labels)
    assert without.synthetic == 0
    torch.testing.assert_close(terms.total, without.total + 3 * defect_loss(logits, labels))
    with pytest.raises(ValueError, match="pass defect_logits and defect_labels"):
        PedenetLoss(lambda_syn=3.0)(*arguments)


def test_defect_prediction_counts_as_far_as_location_prediction_fails() -> None:
    chance = torch.tensor(8.0).log()
    losses = torch.stack([torch.tensor(0.0), chance / 2, chance, 2 * chance])
    weights = torch.stack([share_to_learn(loss) for loss in losses])
    torch.testing.assert_close(weights, torch.tensor([0.0, 0.25, 1.0, 1.0]))
    assert not share_to_learn(losses.requires_grad_()[1]).requires_grad  # else failing would be a way to learn less


def test_the_weight_of_defect_prediction_is_in_the_total() -> None:
    torch.manual_seed(0)
    embeddings, responsibilities = torch.randn(16, 64), torch.full((16, 2), 0.5)
    logits, labels = torch.randn(20), torch.arange(20).remainder(2).float()
    directions = torch.arange(4)
    knows = 2 * torch.eye(8)[:4]  # location prediction that is right, and half sure
    arguments = (embeddings, responsibilities, knows, directions)
    for lambda_lpn, weight in ((1.0, (location_loss(knows, directions) / math.log(8)) ** 2), (0.0, 1.0)):
        without = PedenetLoss(lambda_lpn=lambda_lpn)(*arguments)
        terms = PedenetLoss(lambda_lpn=lambda_lpn, lambda_syn=3.0)(
            *arguments, defect_logits=logits, defect_labels=labels
        )
        torch.testing.assert_close(terms.total, without.total + 3 * weight * defect_loss(logits, labels))


def test_compactness_is_the_mean_distance() -> None:
    generator = torch.Generator().manual_seed(0)
    embeddings, jittered = torch.randn(2, 12, 8, generator=generator)
    distances = [math.dist(a, b) for a, b in zip(embeddings.tolist(), jittered.tolist(), strict=True)]
    assert compactness_loss(embeddings, jittered).item() == pytest.approx(sum(distances) / 12)
    assert compactness_loss(embeddings, embeddings + torch.tensor([3.0, 4.0] + [0.0] * 6)).item() == pytest.approx(5.0)


def test_compactness_has_a_finite_gradient_where_patches_are_equal() -> None:
    embeddings = torch.randn(4, 3, requires_grad=True)
    compactness_loss(embeddings, embeddings.detach().clone()).backward()
    assert embeddings.grad is not None
    assert bool(embeddings.grad.isfinite().all())


def test_compactness_joins_the_total_with_its_weight() -> None:
    inputs = make_inputs()
    pairs = (torch.randn(10, 8), torch.randn(10, 8))
    without = PedenetLoss()(*inputs)
    terms = PedenetLoss(lambda_svdd=3.0)(*inputs, jittered=pairs)
    assert without.compactness == 0
    torch.testing.assert_close(terms.total, without.total + 3 * compactness_loss(*pairs))
    with pytest.raises(ValueError, match="pass jittered"):
        PedenetLoss(lambda_svdd=3.0)(*inputs)


def test_a_density_loss_without_responsibilities_is_refused() -> None:
    embeddings, _, *pairs = make_inputs()
    with pytest.raises(ValueError, match="lambda_den is above 0, but there is no mixture: pass responsibilities"):
        PedenetLoss(1e-4)(embeddings, None, *pairs)
    assert PedenetLoss(0.0)(embeddings, None, *pairs).density == 0
