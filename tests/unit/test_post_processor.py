# Copyright (C) 2026 The anomalib-pedenet authors
# SPDX-License-Identifier: Apache-2.0

"""The post-processor: a normalisation that keeps the order of all scores, and thresholds between scores."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from anomalib.data import InferenceBatch
from anomalib.post_processing import PostProcessor
from hypothesis import given
from hypothesis import strategies as st
from torchmetrics.utilities import dim_zero_cat

from anomalib_pedenet import Pedenet
from anomalib_pedenet.post_processor import F1ThresholdBetweenScores, PedenetPostProcessor


def fitted(kind: type[PostProcessor], threshold: float, low: float = 0.1, high: float = 0.9) -> PostProcessor:
    """Return a post-processor that a validation has given thresholds and ranges."""
    processor = kind()
    for level in ("image", "pixel"):
        getattr(processor, f"_{level}_threshold").fill_(threshold)
        getattr(processor, f"{level}_min").fill_(low)
        getattr(processor, f"{level}_max").fill_(high)
    return processor


def batch_of(scores: torch.Tensor) -> InferenceBatch:
    """Return scores ``[N]`` as the scores of images, and as maps of one pixel."""
    return InferenceBatch(pred_score=scores, anomaly_map=scores[:, None, None, None])


def bounded(distance: float) -> float:
    return distance / (distance + 1)


def test_it_is_the_default() -> None:
    assert isinstance(Pedenet().post_processor, PedenetPostProcessor)
    assert type(Pedenet(post_processor=PostProcessor()).post_processor) is PostProcessor


@given(distance=st.floats(0, 1e4), threshold=st.floats(1e-3, 1e3))
def test_a_distance_is_compared_with_that_of_the_threshold(distance: float, threshold: float) -> None:
    processor = fitted(PedenetPostProcessor, bounded(threshold))
    score = processor(batch_of(torch.tensor([bounded(distance)]))).pred_score.item()
    # A score near 1 has few digits for what it lacks of 1.
    tolerance = 1e-6 * (1 + threshold) * (1 + distance)
    assert score == pytest.approx(distance / (distance + threshold), abs=min(1e-2, tolerance))


@pytest.mark.parametrize("threshold", [0.05, 0.5, 0.95, 0.999])
def test_the_order_is_kept_far_beyond_the_validations_range(threshold: float) -> None:
    scores = torch.linspace(0, 1 - 1e-6, 20_001)
    result = processor_scores = fitted(PedenetPostProcessor, threshold, low=threshold / 2, high=threshold)(
        batch_of(scores)
    )
    assert (processor_scores.pred_score.diff() >= 0).all()
    assert len(processor_scores.pred_score.unique()) > 0.999 * len(scores)
    assert processor_scores.pred_score.max() < 1
    assert result.pred_label.equal(scores > threshold)
    assert result.pred_mask.flatten().equal(scores > threshold)
    anomalibs = fitted(PostProcessor, threshold, low=threshold / 2, high=threshold)(batch_of(scores)).pred_score
    assert (anomalibs.diff() == 0).any()  # what this class is for


def test_no_score_leaves_0_to_1() -> None:
    for threshold in (0.0, 0.3, 1.0, math.nan):
        result = fitted(PedenetPostProcessor, threshold)(batch_of(torch.tensor([0.0, 1e-9, 0.5, 1.0])))
        assert ((result.pred_score >= 0) & (result.pred_score <= 1)).all()
        assert (result.pred_score.diff() > 0).sum() >= 1


def test_without_a_validation_scores_stay_as_they_are() -> None:
    scores = torch.tensor([0.1, 0.5, 0.7])
    result = PedenetPostProcessor()(batch_of(scores))
    torch.testing.assert_close(result.pred_score, scores)
    assert result.pred_label.tolist() == [False, False, True]


def test_labels_without_normalisation_go_by_the_threshold() -> None:
    processor = fitted(PedenetPostProcessor, 0.2)
    processor.enable_normalization = False
    scores = torch.tensor([0.1, 0.19, 0.21, 0.5])
    result = processor(batch_of(scores))
    assert result.pred_score.equal(scores)
    assert result.pred_label.tolist() == result.pred_mask.flatten().tolist() == [False, False, True, True]
    # A sensitivity moves the threshold to the same scores as with normalisation.
    normalizing = fitted(PedenetPostProcessor, 0.2)
    scores = torch.linspace(0, 0.99, 100)
    for sensitivity in (0.2, 0.5, 0.9):
        processor.image_sensitivity = normalizing.image_sensitivity = sensitivity
        assert processor(batch_of(scores)).pred_label.equal(normalizing(batch_of(scores)).pred_label)


def test_missing_predictions_stay_missing() -> None:
    processor = fitted(PedenetPostProcessor, 0.5)
    assert processor(InferenceBatch(pred_score=torch.ones(1))).anomaly_map is None


def f1_by_counting(scores: list[float], labels: list[bool], threshold: float) -> float:
    found = [score > threshold for score in scores]
    right = sum(a and b for a, b in zip(found, labels, strict=True))
    return 2 * right / (sum(found) + sum(labels)) if right else 0.0


def threshold_of(scores: list[float], labels: list[bool]) -> float:
    metric = F1ThresholdBetweenScores(fields=["pred_score", "gt_label"])
    metric.update(SimpleNamespace(pred_score=torch.tensor(scores), gt_label=torch.tensor(labels)))
    return metric.compute().item()


@given(st.lists(st.tuples(st.integers(1, 12), st.booleans()), min_size=1, max_size=12))
def test_the_threshold_has_the_best_f1_and_lies_between_scores(samples: list[tuple[int, bool]]) -> None:
    scores, labels = [score / 16 for score, _ in samples], [label for _, label in samples]
    threshold = threshold_of(scores, labels)
    if not any(labels):
        assert threshold == max(scores)  # none of them is called defective
        return
    between = [-1.0, *sorted(set(scores))]
    best = max(f1_by_counting(scores, labels, limit) for limit in between)
    if all(labels):
        assert threshold < min(scores)
    assert f1_by_counting(scores, labels, threshold) == pytest.approx(best)
    assert threshold not in scores


def test_one_defective_validation_image_is_found() -> None:
    assert threshold_of([0.2, 0.3, 0.7], [False, False, True]) == pytest.approx(0.5)


def test_between_neighbouring_numbers_the_threshold_is_the_lower_one() -> None:
    low = np.float32(0.25)
    high = np.nextafter(low, np.float32(1))
    assert threshold_of([float(low), float(high)], [False, True]) == low


def test_scores_gathered_from_processes_are_not_looked_at_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    metric = F1ThresholdBetweenScores(fields=["anomaly_map", "gt_mask"])
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
