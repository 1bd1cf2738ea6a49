# Copyright (C) 2026 The anomalib-pedenet authors
# SPDX-License-Identifier: Apache-2.0

"""The post-processor: anomalib's normalisation where that keeps the order of scores, and an order everywhere."""

import math
from types import SimpleNamespace

import pytest
import torch
from anomalib.data import InferenceBatch
from anomalib.post_processing import PostProcessor
from hypothesis import given
from hypothesis import strategies as st
from torchmetrics.utilities import dim_zero_cat

from anomalib_pedenet import Pedenet
from anomalib_pedenet.post_processor import PedenetPostProcessor, SyncedF1AdaptiveThreshold


def fitted(kind: type[PostProcessor], low: float, threshold: float, high: float) -> PostProcessor:
    """Return a post-processor that a validation has given thresholds and ranges."""
    processor = kind()
    for level in ("image", "pixel"):
        getattr(processor, f"_{level}_threshold").fill_(threshold)
        getattr(processor, f"{level}_min").fill_(low)
        getattr(processor, f"{level}_max").fill_(high)
    return processor


def normalized(processor: PostProcessor, scores: torch.Tensor) -> torch.Tensor:
    """Return normalised scores, given as an anomaly map."""
    batch = InferenceBatch(pred_score=scores.amax()[None], anomaly_map=scores[None, None])
    return processor(batch).anomaly_map[0, 0]


def test_it_is_the_default() -> None:
    assert isinstance(Pedenet().post_processor, PedenetPostProcessor)
    assert type(Pedenet(post_processor=PostProcessor()).post_processor) is PostProcessor


@pytest.mark.parametrize("threshold", [3.0, 17.0])
def test_order_is_kept_within_the_validations_range(threshold: float) -> None:
    scores = torch.linspace(1, 21, 401)
    result = normalized(fitted(PedenetPostProcessor, 1.0, threshold, 21.0), scores[None])[0]
    assert (result.diff() > 0).all()
    assert (result > 0.5).equal(scores > threshold)
    assert 0 <= result[0] < result[-1] <= 1
    anomalibs = normalized(fitted(PostProcessor, 1.0, threshold, 21.0), scores[None])[0]
    assert (anomalibs.diff() == 0).any()  # what this class is for


def test_the_side_that_anomalib_does_not_clip_is_anomalibs() -> None:
    scores = torch.linspace(1, 21, 401)[None]
    for threshold, is_same in ((17.0, scores >= 17), (3.0, scores <= 3), (11.0, scores > 0)):
        ours = normalized(fitted(PedenetPostProcessor, 1.0, threshold, 21.0), scores)
        anomalibs = normalized(fitted(PostProcessor, 1.0, threshold, 21.0), scores)
        torch.testing.assert_close(ours[is_same], anomalibs[is_same], rtol=0, atol=1e-6)


@given(
    low=st.floats(0, 10),
    span=st.floats(0, 10),
    fraction=st.one_of(st.floats(0, 1), st.just(math.nan)),
    score=st.floats(-5, 30),
)
def test_any_score_lands_on_its_side_between_0_and_1(low: float, span: float, fraction: float, score: float) -> None:
    threshold = low + fraction * span
    processor = fitted(PedenetPostProcessor, low, threshold, low + span)
    result = normalized(processor, torch.tensor([[score]])).item()
    middle = torch.tensor(low + span / 2 if math.isnan(threshold) else threshold, dtype=torch.float32).item()
    assert 0 <= result <= 1
    if abs(score - middle) > 1e-3 * (1 + span):
        assert (result > 0.5) == (score > middle)


def test_without_a_validation_scores_stay_as_they_are() -> None:
    scores = torch.tensor([[0.1, 7.0]])
    torch.testing.assert_close(normalized(PedenetPostProcessor(), scores), scores, rtol=0, atol=0)


def test_missing_predictions_stay_missing() -> None:
    processor = fitted(PedenetPostProcessor, 0.0, 1.0, 2.0)
    assert processor(InferenceBatch(pred_score=torch.ones(1))).anomaly_map is None


def test_scores_gathered_from_processes_are_not_looked_at_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    metric = SyncedF1AdaptiveThreshold(fields=["anomaly_map", "gt_mask"])
    scores, labels = torch.rand(4, 8, 8), torch.zeros(4, 8, 8, dtype=torch.bool)
    labels[3] = scores[3] > 0.5
    metric.update(SimpleNamespace(anomaly_map=scores, gt_mask=labels))
    expected = metric.compute()
    metric.reset()
    metric.update(SimpleNamespace(anomaly_map=scores, gt_mask=labels))
    # As torchmetrics leaves them after gathering.
    metric.preds, metric.target = dim_zero_cat(metric.preds), dim_zero_cat(metric.target)

    def refuse(tensor: torch.Tensor) -> None:
        pytest.fail(f"went through a tensor of {len(tensor)} elements")

    monkeypatch.setattr(torch.Tensor, "__iter__", refuse)
    assert metric.compute() == expected
