# Copyright (C) 2026 The anomalib-pedenet authors
# SPDX-License-Identifier: Apache-2.0

"""One-class scorers against scikit-learn and a general optimiser."""

from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from sklearn.kernel_approximation import Nystroem
from sklearn.linear_model import SGDOneClassSVM

from anomalib_pedenet.scorers import OneClassSvmScorer, SvddScorer


def test_the_svm_is_scikit_learns() -> None:
    torch.manual_seed(0)
    rows, queries = torch.randn(400, 8) * 0.3, torch.randn(60, 8)
    scorer = OneClassSvmScorer(8, nu=0.1, num_features=100, gamma=0.7, seed=5)
    scorer.fit(rows.split(50))
    nystroem = Nystroem(gamma=0.7, n_components=100, random_state=5)
    svm = SGDOneClassSVM(nu=0.1, random_state=5, average=True)
    svm.fit(nystroem.fit_transform(rows.double().numpy()))
    decision = torch.from_numpy(svm.score_samples(nystroem.transform(queries.double().numpy()))).float()
    norm = float(np.linalg.norm(svm.coef_))
    torch.testing.assert_close(scorer(queries), norm - decision, rtol=1e-3, atol=1e-3 * norm)


def test_the_kernel_is_as_wide_as_the_embeddings_lie_from_the_centres() -> None:
    """Tight clusters far apart: the width is that of a cluster, not that of all embeddings."""
    torch.manual_seed(0)
    rows = 20 * torch.randn(5, 8).repeat(100, 1) + 0.1 * torch.randn(500, 8)
    scorer = OneClassSvmScorer(8, num_features=100)
    scorer.fit([rows])
    apart = torch.cdist(rows[:250], rows[250:]).min(dim=1).values.square().mean().item()
    assert scorer.gamma.item() == pytest.approx(1 / apart, rel=0.5)
    between = scorer((rows[0] + rows[1])[None] / 2)
    assert between > scorer(rows).max()


@pytest.mark.parametrize("nu", [0.05, 0.3])
def test_the_ball_is_that_of_a_general_optimiser(nu: float) -> None:
    torch.manual_seed(0)
    rows = torch.randn(200, 3) + torch.rand(200, 1) * 4

    def objective(parameters: np.ndarray) -> float:
        outside = ((rows.numpy() - parameters[:3]) ** 2).sum(axis=1) - parameters[3]
        return parameters[3] + np.maximum(outside, 0).sum() / (nu * len(rows))

    start = np.append(rows.mean(dim=0).numpy(), 4.0)
    best = minimize(objective, start, method="Nelder-Mead", options={"maxiter": 20_000, "xatol": 1e-6, "fatol": 1e-9})
    scorer = SvddScorer(3, nu=nu)
    scorer.fit([rows])
    squared = scorer(rows).square().numpy()
    ours = objective(np.append(scorer.center.numpy(), np.quantile(squared, 1 - nu)))
    assert ours <= best.fun * 1.01
    torch.testing.assert_close(scorer(rows), (rows - scorer.center).norm(dim=1))


@pytest.mark.parametrize(
    ("scorer", "options", "message"),
    [
        (SvddScorer, {"nu": 0.0}, "nu must lie between 0 and 1, got 0"),
        (SvddScorer, {"max_rows": 0}, "max_rows must be at least 1, got 0"),
        (OneClassSvmScorer, {"num_features": 0}, "num_features must be at least 1, got 0"),
        (OneClassSvmScorer, {"gamma": -1.0}, "gamma must be above 0, or None to choose it, got -1"),
    ],
)
def test_arguments_outside_their_range_are_refused(scorer: Any, options: dict[str, Any], message: str) -> None:  # noqa: ANN401
    with pytest.raises(ValueError, match=message):
        scorer(**options)
