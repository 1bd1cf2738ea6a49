# Copyright (C) 2026 The anomalib-pedenet authors
# SPDX-License-Identifier: Apache-2.0

"""The whole model against a slow, obvious reference, over sizes, strides, scales, batches and scorers.

The reference cuts every patch, embeds it alone, compares it in float64 with every normal patch, and adds scores to
pixels one patch at a time.
"""

from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import cdist

from anomalib_pedenet import PedenetModel
from anomalib_pedenet.networks import PatchEmbeddingNetwork
from anomalib_pedenet.patches import MID_LEVEL_SIZES
from anomalib_pedenet.scorers import SCORERS

EXPORTABLE = sorted(name for name, (kind, _) in SCORERS.items() if kind.exportable)
NEAREST = ("exact", "local")

# Mid-level patches are scored at any training, 32 and 64 px where they are trained.
SCALES = [*((size,) for size in (*MID_LEVEL_SIZES, 32, 64)), (20, 32), (12, 28), (32, 64), (16, 24, 64)]


class Case(NamedTuple):
    """One drawn model, and what it is fitted on and scores."""

    scored_sizes: tuple[int, ...]
    stride: int
    bank_stride: int
    normal_size: tuple[int, int]
    image_size: tuple[int, int]
    normal_batches: tuple[int, ...]
    batch: int
    scorer: str
    combination: str
    position_weight: float


@st.composite
def cases(draw: st.DrawFn, scorer: str) -> Case:
    scored_sizes = draw(st.sampled_from(SCALES))
    smallest, largest = min(scored_sizes), max(scored_sizes)
    # Strides of a half of the smallest patch and more keep the slow way short; odd sides leave pixels beyond the grid.
    strides = st.sampled_from(range(smallest // 2 - smallest // 2 % 2, smallest + 1, 2))
    side = st.integers(largest, largest + 2 * smallest)
    image_size = draw(side), draw(side)
    by_place = SCORERS[scorer][0].by_place
    return Case(
        scored_sizes,
        stride=draw(strides),
        bank_stride=draw(strides),
        normal_size=image_size if by_place else (draw(side), draw(side)),
        image_size=image_size,
        normal_batches=draw(st.sampled_from([(3,), (1, 2), (2, 1, 1)])),
        batch=draw(st.integers(1, 3)),
        scorer=scorer,
        combination=draw(st.sampled_from(["product", "mean"])),
        position_weight=draw(st.sampled_from([0.0, 3.0])),
    )


def embed_slowly(model: PedenetModel, image: torch.Tensor, size: int, stride: int) -> np.ndarray:
    """Cut and embed every patch of an image by itself: ``[h, w, Z or Z + 2]`` in float64."""
    network: PatchEmbeddingNetwork = model.embedding_network
    scorer = model.scorers[str(size)]
    height, width = image.shape[1:]
    rows = []
    for top in range(0, height - size + 1, stride):
        row = []
        for left in range(0, width - size + 1, stride):
            patch = (image[:, top : top + size, left : left + size] - model.input_mean) / model.input_std
            embedding = network(patch[None])[0].double().numpy()
            if size in MID_LEVEL_SIZES:
                projection = model.projections[str(size)]
                embedding = projection.components.double().numpy() @ (embedding - projection.center.double().numpy())
            if scorer.encodes_position:
                place = np.array([top, left]) * model.position_weight / max(height, width)
                embedding = np.concatenate([embedding, place])
            row.append(embedding)
        rows.append(row)
    return np.array(rows)


def nearest(queries: np.ndarray, bank: np.ndarray) -> np.ndarray:
    """The distance of each query ``[..., Z]`` to the nearest row of the bank ``[M, Z]``, by brute force."""
    return cdist(queries.reshape(-1, queries.shape[-1]), bank).min(axis=1).reshape(queries.shape[:-1])


def score_slowly(case: Case, model: PedenetModel, normal: list[np.ndarray], grid: np.ndarray, size: int) -> np.ndarray:
    """Scores ``[h, w]`` of a grid of embeddings, in units of a normal patch's typical score."""
    if case.scorer == "exact":
        bank = np.concatenate([image.reshape(-1, image.shape[-1]) for image in normal])
        others = cdist(bank, bank)
        np.fill_diagonal(others, np.inf)
        return nearest(grid, bank) / others.min(axis=1).mean()
    if case.scorer == "local":
        scores = np.empty(grid.shape[:2])
        typical = []
        for row, column in np.ndindex(*grid.shape[:2]):
            bank = np.stack([image[row, column] for image in normal])
            scores[row, column] = nearest(grid[row, column], bank).item()
            others = cdist(bank, bank)
            np.fill_diagonal(others, np.inf)
            typical.append(others.min(axis=1))
        return scores / np.mean(typical)
    # The other scorers have references of their own in tests/unit/scorers: here it is about what reaches them.
    scorer = model.scorers[str(size)]
    return (scorer(torch.from_numpy(grid).float()[None])[0] / scorer.typical_score).double().numpy()


def map_slowly(scores: np.ndarray, image_size: tuple[int, int], size: int, stride: int) -> np.ndarray:
    """Each pixel's mean over the patches that cover its window; beyond the last patch, as at the last covered pixel."""
    result = np.zeros(image_size)
    for y, x in np.ndindex(*image_size):
        middles = (
            min(at, stride * (number - 1) + size - 1) + 0.5 for at, number in zip((y, x), scores.shape, strict=True)
        )
        weights = [
            [
                max(0.0, min(middle + stride / 2, start * stride + size) - max(middle - stride / 2, start * stride))
                for start in range(number)
            ]
            for middle, number in zip(middles, scores.shape, strict=True)
        ]
        share = np.outer(*weights)
        result[y, x] = (share * scores).sum() / share.sum()
    return result


def fitted(case: Case) -> tuple[PedenetModel, torch.Tensor, torch.Tensor]:
    """A model whose networks have random weights and used batch normalisation, and its normal and other images."""
    torch.manual_seed(0)
    model = PedenetModel(
        scored_sizes=case.scored_sizes,
        stride=case.stride,
        combination=case.combination,  # type: ignore[arg-type]
        scorer=case.scorer,
        position_weight=case.position_weight,
        embedding_dim=16,
        density_estimation=True,
    )
    with torch.no_grad():
        model.embedding_network(torch.randn(16, 3, 64, 64))
    model.eval()
    normal = torch.rand(sum(case.normal_batches), 3, *case.normal_size)
    model.fit_standardization(normal)
    model.calibrate(normal, case.bank_stride)
    model.fit(normal.split(case.normal_batches), case.bank_stride)
    return model, normal, torch.rand(case.batch, 3, *case.image_size)


SINGLE = Case((64,), 32, 32, (64, 64), (64, 64), (3,), 1, "exact", "product", 0.0)


@pytest.mark.parametrize("scorer", EXPORTABLE)
def test_maps_and_scores_equal_the_slow_way(scorer: str) -> None:
    @settings(max_examples=8 if scorer not in NEAREST else 15, deadline=None, derandomize=True)
    @given(case=cases(scorer))
    @example(case=SINGLE._replace(scorer=scorer))
    def check(case: Case) -> None:
        check_case(case)

    check()


def test_the_smallest_image_of_the_smallest_patches_equals_the_slow_way() -> None:
    check_case(SINGLE._replace(scored_sizes=(12,), stride=12, bank_stride=6, image_size=(12, 12), normal_size=(31, 12)))


def check_case(case: Case) -> None:
    """Compare one model with the slow way."""
    model, normal, images = fitted(case)
    predictions = model(images)
    assert predictions.anomaly_map.shape == (case.batch, 1, *case.image_size)
    bank_stride = case.stride if SCORERS[case.scorer][0].by_place else case.bank_stride
    with torch.no_grad():
        bank = {size: [embed_slowly(model, image, size, bank_stride) for image in normal] for size in case.scored_sizes}
        for image, anomaly_map, score in zip(images, predictions.anomaly_map, predictions.pred_score, strict=True):
            maps = []
            for size in case.scored_sizes:
                grid = embed_slowly(model, image, size, case.stride)
                scores = score_slowly(case, model, bank[size], grid, size)
                maps.append(map_slowly(scores, case.image_size, size, case.stride))
            expected = np.prod(maps, axis=0) ** (1 / len(maps)) if case.combination == "product" else np.mean(maps, 0)
            bounded = expected / (expected + float(model.normal_limit))
            np.testing.assert_allclose(anomaly_map[0].numpy(), bounded, rtol=2e-3, atol=2e-3)
            assert score == anomaly_map.max()


@settings(max_examples=40, deadline=None, derandomize=True)
@given(scored_sizes=st.sampled_from(SCALES), missing=st.integers(1, 11), on_height=st.booleans(), stride=st.just(2))
def test_whatever_is_smaller_than_a_patch_is_refused(
    scored_sizes: tuple[int, ...], missing: int, on_height: bool, stride: int
) -> None:
    model = PedenetModel(scored_sizes=scored_sizes, stride=stride, embedding_dim=16).eval()
    largest = max(scored_sizes)
    model.fit([torch.rand(2, 3, largest, largest)])
    size = (largest - missing, largest) if on_height else (largest, largest - missing)
    smaller = rf"{size[0]}x{size[1]} px, smaller than a patch of {largest}x{largest} px: enlarge it \(image_size\)"
    images: dict[str, Any] = {"images": torch.rand(1, 3, *size)}
    for use in (model.forward, model.calibrate):
        with pytest.raises(ValueError, match=smaller):
            use(**images)
    with pytest.raises(ValueError, match=smaller):
        model.fit([images["images"]])
