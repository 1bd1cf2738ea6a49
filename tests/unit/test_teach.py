# Copyright (C) 2026 The anomalib-pedenet authors
# SPDX-License-Identifier: Apache-2.0

"""A fitted model is taught, and what each scale adds to its map sums up to the map."""

import copy

import pytest
import torch
from anomalib.data.utils.tiler import Tiler

from anomalib_pedenet import PedenetModel
from anomalib_pedenet.anomaly_map import scores_to_map


def fitted(scorer: str, combination: str = "auto") -> tuple[PedenetModel, torch.Tensor]:
    """Return a model, and the images it was fitted on."""
    torch.manual_seed(0)
    images = 0.3 * torch.rand(6, 3, 96, 128)
    model = PedenetModel(scorer=scorer, combination=combination, position_weight=0.0, bank_size=500).eval()  # type: ignore[arg-type]
    model.fit_standardization(images)
    model.calibrate(images, learned={32: 0.5, 64: 0.8})
    model.fit(images.split(1))
    model.fit_normal_limit(images)
    return model, images


def with_mark(image: torch.Tensor, top: int = 30, left: int = 60) -> torch.Tensor:
    marked = image.clone()
    marked[..., top : top + 20, left : left + 20] = 1.0
    return marked


@pytest.mark.parametrize(
    ("scorer", "combination"), [("exact", "product"), ("exact", "mean"), ("gaussian_mixture", "auto")]
)
@torch.no_grad()
def test_what_scales_add_sums_up_to_the_map(scorer: str, combination: str) -> None:
    model, images = fitted(scorer, combination)
    image = with_mark(images[:1])
    maps = {
        size: scores_to_map(patches.scores, (96, 128), size, model.stride)
        for size, patches in model.patch_scores(image)
    }
    assert list(maps) == list(model.scale_shares)
    parts = torch.stack(list(model.contributions(maps).values()))
    shares = sum(model.scale_shares.values())
    if combination == "auto":
        weights = torch.tensor(list(model.map_shares.values()))
        used = [model.scored_sizes.index(size) for size in model.map_shares]
        lift = (model.map_offsets / model.map_spreads)[used] * weights
        expected = (torch.logsumexp(parts, dim=0) + lift.max()) / model.typical_score
    else:
        expected = (parts.sum(dim=0) / shares).exp() if combination == "product" else parts.sum(dim=0) / shares
    joined = model.combine(list(maps.values()))
    torch.testing.assert_close(joined, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model(image).anomaly_map, joined / (joined + model.normal_limit))


@pytest.mark.parametrize("scorer", ["exact", "gaussian_mixture"])
@torch.no_grad()
def test_a_mark_is_normal_once_taught_and_another_one_is_not(scorer: str) -> None:
    model, images = fitted(scorer)
    taught, elsewhere = with_mark(images[:1]), with_mark(images[1:2], top=50, left=20)
    dark = images[2:3].clone()
    dark[..., 40:70, 30:60] = -0.5
    before = {name: float(model(image).pred_score) for name, image in (("taught", taught), ("dark", dark))}
    assert min(before.values()) > 0.6
    counts = model.teach([taught], limit=0.5)
    assert counts.keys() == model.scale_shares.keys()
    assert sum(counts.values()) > 0
    assert float(model(taught).pred_score) < before["taught"] - 0.1
    assert float(model(elsewhere).pred_score) < before["taught"] - 0.1  # the same mark on other ground
    assert float(model(dark).pred_score) > before["dark"] - 0.05


@torch.no_grad()
def test_an_image_that_is_flagged_by_its_mean_alone_is_taught_by_its_highest_pixels() -> None:
    model, images = fitted("exact")
    taught = with_mark(images[:1])
    highest = float(model(taught).anomaly_map.max())
    as_if_flagged, by_its_own = copy.deepcopy(model), copy.deepcopy(model)
    expected = as_if_flagged.teach([taught], limit=highest)
    assert by_its_own.teach([taught], limit=0.99) == expected  # no pixel scores so high
    assert min(expected.values()) > 0
    for name, value in by_its_own.state_dict().items():
        torch.testing.assert_close(value, as_if_flagged.state_dict()[name], rtol=0, atol=0)


@torch.no_grad()
def test_nothing_is_taken_from_where_images_are_not_said_to_be_good() -> None:
    model, images = fitted("exact")
    state = {name: value.clone() for name, value in model.state_dict().items()}
    nowhere = torch.zeros(96, 128, dtype=torch.bool)
    assert set(model.teach([with_mark(images[:1])], limit=0.5, within=nowhere).values()) == {0}
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, state[name], rtol=0, atol=0)


def test_what_cannot_be_taught_is_refused() -> None:
    with pytest.raises(RuntimeError, match="no memory bank yet"):
        PedenetModel().teach([torch.rand(1, 3, 96, 128)], limit=0.5)
    model, images = fitted("exact")
    model.tiler = Tiler(tile_size=(96, 64), stride=(96, 64))
    with pytest.raises(ValueError, match="train one without tiles"):
        model.teach(images.split(1), limit=0.5)
    model, images = fitted("svdd")
    with pytest.raises(NotImplementedError, match="SvddScorer cannot be taught"):
        model.teach([with_mark(images[:1])], limit=0.0)
