# Copyright (C) 2026 The anomalib-pedenet authors
# SPDX-License-Identifier: Apache-2.0

"""The nearest neighbour of a place against a search one by one."""

import pytest
import torch

from anomalib_pedenet.scorers import LocalNearestNeighborScorer


@pytest.mark.parametrize("radius", [0, 1, 2, 100])
def test_equals_a_search_one_by_one(radius: int) -> None:
    torch.manual_seed(0)
    bank, queries = torch.randn(7, 4, 6, 8) + 5, torch.randn(3, 4, 6, 8) + 5
    scorer = LocalNearestNeighborScorer(8, radius=radius)
    scorer.fit(bank.split(2))
    expected = torch.zeros(3, 4, 6)
    for row in range(4):
        for column in range(6):
            rows = slice(max(0, row - radius), row + radius + 1)
            columns = slice(max(0, column - radius), column + radius + 1)
            near = bank[:, rows, columns].reshape(-1, 8)
            expected[:, row, column] = torch.cdist(queries[:, row, column], near).min(dim=1).values
    torch.testing.assert_close(scorer(queries), expected, rtol=1e-4, atol=1e-4)


def test_the_typical_score_leaves_an_image_out() -> None:
    bank = torch.randn(5, 2, 3, 8)
    scorer = LocalNearestNeighborScorer(8)
    scorer.fit([bank])
    total = 0.0
    for image in range(5):
        others = torch.cat([bank[:image], bank[image + 1 :]])
        total += (others - bank[image]).norm(dim=-1).amin(dim=0).mean().item()
    assert scorer.typical_score.item() == pytest.approx(total / 5, rel=1e-4)


def test_no_more_images_than_the_limit_are_kept_whole() -> None:
    bank = torch.randn(50, 2, 3, 8)
    scorer = LocalNearestNeighborScorer(8, max_images=10)
    scorer.fit(bank.split(4))
    kept = (scorer.bank + scorer.mean).permute(2, 0, 1, 3)  # [N, h, w, Z]
    assert len(kept) == 10
    apart = (kept[:, None] - bank[None]).flatten(2).norm(dim=2)  # [10, 50]
    assert (apart.min(dim=1).values < 1e-3).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [({"radius": -1}, "radius must be at least 0"), ({"max_images": 0}, "max_images must be at least 1")],
)
def test_arguments_outside_their_range_are_refused(options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LocalNearestNeighborScorer(**options)
