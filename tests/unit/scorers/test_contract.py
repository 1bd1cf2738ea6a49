# Copyright (C) 2026 The anomalib-pedenet authors
# SPDX-License-Identifier: Apache-2.0

"""What every scorer must do."""

import copy
import pickle
from typing import Any

import pytest
import torch

from anomalib_pedenet.networks import DensityEstimationNetwork
from anomalib_pedenet.scorers import SCORERS, NearestNeighborScorer, Scorer, make_scorer, scorer_class

DIM = 8
EXACT = ["exact", "local", "faiss_flat"]
APPROXIMATE = ["faiss_ivf", "faiss_hnsw"]  # a quantiser's distances are estimates, also to the rows themselves
BANKS = [name for name in SCORERS if name == "exact" or name.startswith("faiss")]

every = pytest.mark.parametrize("name", SCORERS)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def make(name: str, **options: Any) -> Scorer:  # noqa: ANN401
    """A scorer of the name; the density network is the same every time."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        network = DensityEstimationNetwork(3, DIM)
    return make_scorer(name, embedding_dim=DIM, density_network=network, **options)


def normal(num_images: int = 20) -> torch.Tensor:
    """Grids ``[B, h, w, Z]`` of normal embeddings, in (-1, 1), with a mean for each place."""
    return (torch.randn(1, 5, 6, DIM) / 3 + torch.randn(num_images, 5, 6, DIM) / 4).tanh()


def fitted(name: str, grids: torch.Tensor, **options: Any) -> Scorer:  # noqa: ANN401
    scorer = make(name, **options)
    scorer.fit([grids])
    return scorer


@every
def test_scores_have_the_shape_of_the_grid_and_rise_with_abnormality(name: str) -> None:
    grids = normal()
    scorer = fitted(name, grids)
    near, far = scorer(grids[:3]), scorer(-grids[:3].sign())
    assert near.shape == far.shape == (3, 5, 6)
    assert near.dtype == torch.float32
    assert not near.requires_grad
    assert (near >= 0).all()
    assert (far > near.mean()).float().mean() > 0.95
    assert torch.isfinite(far).all()


@every
def test_batched_fit_equals_one_shot_fit(name: str) -> None:
    grids = normal()
    whole, batched = fitted(name, grids, bank_size=100), make(name, bank_size=100)
    batched.fit(grids.split([1, 7, 2, 10]))
    queries = normal(3)
    # The sums of Gaussians' moments round differently; all else is the same arithmetic.
    torch.testing.assert_close(batched(queries), whole(queries), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(batched.typical_score, whole.typical_score, rtol=1e-5, atol=0)


@every
def test_the_same_seed_gives_the_same_scorer(name: str) -> None:
    grids, queries = normal(), normal(3)
    torch.testing.assert_close(fitted(name, grids)(queries), fitted(name, grids)(queries), rtol=0, atol=0)


@every
def test_state_goes_through_a_state_dict_into_a_scorer_of_another_size(name: str) -> None:
    scorer, other, fresh = fitted(name, normal()), fitted(name, normal(4)[:, :3]), make(name)
    assert scorer.is_fitted
    assert not fresh.is_fitted
    queries = normal(3)
    expected = scorer(queries)
    other(normal(1)[:, :3])  # in use before
    for target in (other, fresh):
        target.load_state_dict(scorer.state_dict())
        assert target.is_fitted
        torch.testing.assert_close(target(queries), expected, rtol=0, atol=0)
        assert target.typical_score == scorer.typical_score


@every
def test_copies_and_pickles_score_the_same(name: str) -> None:
    scorer, queries = fitted(name, normal()), normal(2)
    expected = scorer(queries)
    for twin in (copy.deepcopy(scorer), pickle.loads(pickle.dumps(scorer))):
        torch.testing.assert_close(twin(queries), expected, rtol=0, atol=0)


@every
def test_moving_between_types_and_devices_keeps_a_scorer_usable(name: str) -> None:
    scorer, queries = fitted(name, normal()), normal(2)
    expected = scorer(queries)
    torch.testing.assert_close(scorer.to("cpu", torch.float32)(queries), expected, rtol=0, atol=0)
    torch.testing.assert_close(scorer.double()(queries.double()).float(), expected, rtol=1e-3, atol=5e-3)


@every
def test_half_precision_keeps_what_was_arranged_for_it(name: str) -> None:
    """With the last two dimensions as wide as weighted positions, whose squares are hundreds."""

    def placed(grids: torch.Tensor) -> torch.Tensor:
        rows, columns = torch.meshgrid(torch.arange(5), torch.arange(6), indexing="ij")
        return torch.cat([grids[..., :-2], torch.stack([rows, columns], dim=-1).expand(len(grids), -1, -1, -1) * 6], -1)

    scorer, queries = fitted(name, placed(normal())), placed(normal(3))
    expected = scorer(queries)
    scorer.round_to_half()
    torch.testing.assert_close(scorer(queries), expected, rtol=1e-3, atol=1e-3)
    for buffer in scorer.buffers():
        if buffer.is_floating_point():
            buffer.copy_(buffer.half())
    torch.testing.assert_close(scorer(queries), expected, rtol=1e-3, atol=1e-3)


@every
def test_a_fit_that_breaks_off_loses_nothing(name: str) -> None:
    grids, queries = normal(), normal(2)
    scorer = fitted(name, grids)
    expected = scorer(queries)
    with pytest.raises(ValueError, match="NaN or infinite; the training diverged"):
        scorer.fit([normal(3), grids * torch.nan])
    torch.testing.assert_close(scorer(queries), expected, rtol=0, atol=0)
    scorer.fit([grids])
    torch.testing.assert_close(scorer(queries), expected, rtol=1e-5, atol=1e-6)


@every
def test_bad_embeddings_are_refused(name: str) -> None:
    scorer = make(name)
    with pytest.raises(RuntimeError, match=r"reset\(\) before update"):
        scorer.update(normal(1))
    scorer.reset()
    with pytest.raises(ValueError, match=rf"must be \[.*{DIM}\], got \(1, 5, 6, 9\)"):
        scorer.update(torch.zeros(1, 5, 6, 9))
    scorer.update(torch.zeros(0, 5, 6, DIM))
    with pytest.raises(ValueError, match="at least one normal embedding, got none"):
        scorer.finalize()


@every
@pytest.mark.parametrize("case", ["one image", "the same image", "constant", "one row"])
def test_degenerate_banks_give_finite_scores_and_a_usable_unit(name: str, case: str) -> None:
    grids = {
        "one image": normal(1),
        "the same image": normal(1).expand(6, -1, -1, -1),
        "constant": torch.full((3, 5, 6, DIM), 0.5),
        "one row": normal(1)[:, :1, :1],
    }[case]
    scorer = fitted(name, grids)
    assert torch.isfinite(scorer(grids)).all()
    assert torch.isfinite(scorer(-grids)).all()
    assert torch.isfinite(scorer.typical_score)
    assert scorer.typical_score > 0


@pytest.mark.parametrize("name", [*EXACT, *APPROXIMATE])
def test_rows_of_the_bank_score_zero(name: str) -> None:
    grids = normal()
    # Up to the rounding of the square, of which the distance is the root.
    found = (fitted(name, grids)(grids) < 2e-3).float().mean()
    assert found == 1 if name in EXACT else found > 0.9


@pytest.mark.parametrize("name", BANKS)
def test_more_neighbors_than_rows_are_all_rows(name: str) -> None:
    grids, queries = normal(1), normal(2)
    scorer = fitted({"class_path": name, "init_args": {"num_neighbors": 1000}}, grids)
    distances = torch.cdist(queries.reshape(-1, DIM), grids.reshape(-1, DIM)).mean(dim=1).reshape(2, 5, 6)
    torch.testing.assert_close(scorer(queries), distances, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", [name for name in SCORERS if scorer_class(name).exportable])
def test_exportable_scorers_export_with_any_batch(name: str) -> None:
    scorer, queries = fitted(name, normal()), normal(3)
    batch = torch.export.Dim("batch", min=1, max=64)
    exported = torch.export.export(scorer, (queries[:2],), dynamic_shapes=({0: batch},)).module()
    torch.testing.assert_close(exported(queries), scorer(queries), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", [name for name in SCORERS if not scorer_class(name).by_place])
def test_embeddings_of_any_shape(name: str) -> None:
    scorer, queries = fitted(name, normal()), normal(2)
    expected = scorer(queries)
    torch.testing.assert_close(scorer(queries.reshape(-1, DIM)), expected.flatten(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(scorer(queries[0]), expected[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", [name for name in SCORERS if scorer_class(name).by_place])
def test_another_grid_is_refused_by_scorers_of_places(name: str) -> None:
    scorer = fitted(name, normal())
    with pytest.raises(ValueError, match=r"knows 5x6 places, but the image has 4x6.*image_size"):
        scorer(normal()[:, :4])
    with pytest.raises(ValueError, match="Images of different sizes"):
        scorer.fit([normal(), normal()[:, :4]])


def test_names_and_class_paths() -> None:
    scorer = make_scorer("anomalib_pedenet.scorers.NearestNeighborScorer", bank_size=7, coreset="k_means", other=1)
    assert isinstance(scorer, NearestNeighborScorer)
    assert (scorer.bank_size, scorer.coreset) == (7, "k_means")
    given = {"class_path": "exact", "init_args": {"bank_size": 3, "num_neighbors": 2}}
    assert make_scorer(given, bank_size=7).bank_size == 3
    for unknown in ("nearest", "torch.nn.Linear", "no.such.Scorer", {"class_path": "nearest"}, {}, "."):
        with pytest.raises(ValueError, match=r"scorer must be one of 'exact', .*, got"):
            make_scorer(unknown)
    with pytest.raises(ValueError, match=r"NearestNeighborScorer has no argument depth; it has .*num_neighbors"):
        make_scorer({"class_path": "exact", "init_args": {"depth": 3}})
