# Copyright (C) 2026 The anomalib-pedenet authors
# SPDX-License-Identifier: Apache-2.0

import logging

import pytest
import torch

from anomalib_pedenet.training.progress import MAX_SKIPPED_IN_ROW, Progress


def test_the_log_says_now_and_then_how_far_it_is(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    progress = Progress(first_step=0)
    for step in range(1, 101):
        progress.report(step, 100, torch.tensor(0.5))
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 20
    assert lines[-1].startswith("Step 100 of 100, ")
    assert lines[-1].endswith("about 0 s left, loss 0.500.")


def test_collapse_is_said_once_and_only_where_it_is_known(caplog: pytest.LogCaptureFixture) -> None:
    progress = Progress(first_step=0)
    for spread in (0.3, float("nan"), 0.01, 0.01):
        progress.watch_spread(5, torch.tensor(spread))
    (record,) = caplog.records
    assert "collapsed (spread 0.010 after 5 steps" in record.getMessage()


def test_skipped_steps_are_counted_over_batches() -> None:
    progress = Progress(first_step=0, skipped_in_row=MAX_SKIPPED_IN_ROW - 2)
    terms = {"train_loss": torch.tensor(float("nan"))}
    progress.watch_skipped(7, [True], [terms])
    assert progress.skipped_in_row == MAX_SKIPPED_IN_ROW - 1
    progress.watch_skipped(8, [False], [terms])
    assert progress.skipped_in_row == 0
    progress.watch_skipped(20, [True] * (MAX_SKIPPED_IN_ROW - 1), [terms] * (MAX_SKIPPED_IN_ROW - 1))
    with pytest.raises(
        ValueError, match=r"not finite after 21 steps, 10 in a row .*train_loss nan.*lower learning_rate"
    ):
        progress.watch_skipped(21, [True], [terms])
