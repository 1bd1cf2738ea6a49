# Copyright (C) 2026 The anomalib-pedenet authors
# SPDX-License-Identifier: Apache-2.0

"""The scorer and the combination of scales that are chosen from normal images."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

import pytest
import torch
from anomalib.data.utils.tiler import Tiler

from anomalib_pedenet import PedenetModel
from anomalib_pedenet.anomaly_map import scores_to_map
from anomalib_pedenet.host.earlier_versions import bring_up_to_date
from anomalib_pedenet.kinds import ALIGNED, KINDS, LOOSE, NEARLY_ALIGNED, SURFACE, Kind
from anomalib_pedenet.scorers import GaussianMixtureScorer, NearestNeighborScorer, ProbabilisticPcaScorer, Scorer
from anomalib_pedenet.training.bank_building import fit_scorers

LEARNED = {32: 0.49, 64: 0.81}


def aligned(count: int = 6) -> torch.Tensor:
    """Images ``[N, 3, 96, 128]`` of the same part: one picture, and a little noise."""
    generator = torch.Generator().manual_seed(0)
    part = torch.nn.functional.interpolate(torch.rand(1, 3, 12, 16, generator=generator), size=(96, 128))
    return part + 0.02 * torch.randn(count, 3, 96, 128, generator=generator)


def nearly_aligned(count: int = 16) -> torch.Tensor:
    """Images ``[N, 3, 96, 128]`` of the same part, which is moved by up to 8 pixels."""
    generator = torch.Generator().manual_seed(0)
    part = torch.nn.functional.interpolate(
        torch.rand(1, 3, 8, 10, generator=generator), size=(128, 160), mode="bilinear"
    )
    images = 0.02 * torch.randn(count, 3, 96, 128, generator=generator)
    for image in images:
        row, column = torch.randint(8, 25, (2,), generator=generator).tolist()
        image.add_(part[0, :, row : row + 96, column : column + 128])
    return images


def surface(count: int = 6) -> torch.Tensor:
    """Images ``[N, 3, 96, 128]`` that look alike everywhere."""
    return torch.rand(count, 3, 96, 128, generator=torch.Generator().manual_seed(0))


def fitted(images: torch.Tensor, **arguments: object) -> PedenetModel:
    torch.manual_seed(0)
    model = PedenetModel(scorer="auto", stride=8, bank_size=200, **arguments).eval()  # type: ignore[arg-type]
    model.fit_standardization(images)
    model.calibrate(images, learned=LEARNED)
    model.fit(images.split(1))
    model.fit_normal_limit(images)
    return model


def loose(count: int = 8) -> torch.Tensor:
    """Images ``[N, 3, 96, 128]`` of a part that lies anywhere on a plain ground."""
    generator = torch.Generator().manual_seed(0)
    part = 0.8 + 0.2 * torch.nn.functional.interpolate(torch.rand(1, 3, 6, 6, generator=generator), size=(56, 56))
    images = 0.2 + 0.02 * torch.randn(count, 3, 96, 128, generator=generator)
    for image in images:
        row, column = torch.randint(17, (2,), generator=generator).tolist()
        turned = part.rot90(int(torch.randint(4, (1,), generator=generator)), (2, 3))
        image[:, 12 + row : 68 + row, 28 + column : 84 + column] = turned[0]
    return images


@pytest.mark.parametrize(
    ("images", "kind", "scorer"),
    [(aligned(), ALIGNED, ProbabilisticPcaScorer), (nearly_aligned(), NEARLY_ALIGNED, NearestNeighborScorer)],
)
def test_aligned_parts_are_compared_by_place_and_all_scales_are_multiplied(
    images: torch.Tensor, kind: Kind, scorer: type[Scorer]
) -> None:
    model = fitted(images)
    assert model.kind is kind
    assert all(isinstance(one, scorer) for one in model.scorers.values())
    assert model.scale_shares == pytest.approx({16: 1.0, 24: 1.0, 32: 0.7, 64: 0.9})
    image = aligned(7)[6:] if kind is ALIGNED else nearly_aligned(17)[16:]
    log_map, log_image_map = torch.zeros(1, 1, 96, 128), torch.zeros(1, 1, 96, 128)
    in_map = {16: 1.0, 24: 16 / 24, 32: 0.7 * 16 / 32, 64: 0.9 * 16 / 64}  # fine scales count more
    for size, patches in model.patch_scores(image):
        of_scale = scores_to_map(patches.scores, (96, 128), size, 8, reach=0.5).log()
        log_map += in_map[size] / sum(in_map.values()) * of_scale
        log_image_map += model.scale_shares[size] / 3.6 * of_scale
    joined, for_image = log_map.exp(), log_image_map.exp()
    score = (for_image.max() * for_image.mean()).sqrt()
    found = model(image)
    torch.testing.assert_close(found.anomaly_map, joined / (joined + model.normal_limit), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.pred_score, (score / (score + model.image_limit))[None], rtol=1e-4, atol=1e-5)


def test_nearly_aligned_parts_are_compared_with_rows_of_a_bank_and_near_places_count_more() -> None:
    model = fitted(nearly_aligned())
    weights = {size: float(encoding.weight) for size, encoding in model.position_encodings.items()}
    assert min(weights.values()) > 0
    image = nearly_aligned(17)[16:]
    for size, patches in model.patch_scores(image):
        rows, columns = torch.meshgrid(*map(torch.arange, patches.scores.shape[1:]), indexing="ij")
        places = torch.stack([rows, columns], dim=-1) * 8 / 128 * weights[str(size)]
        torch.testing.assert_close(patches.embeddings[0, ..., -2:], places)
        scorer = model.scorers[str(size)]
        bank = scorer.bank + scorer.mean
        apart = (patches.embeddings[0, ..., None, :] - bank).norm(dim=-1).amin(dim=-1)
        torch.testing.assert_close(patches.scores[0], apart / scorer.typical_score, rtol=1e-3, atol=2e-3)


def test_loose_parts_are_compared_with_whitened_rows_of_a_bank() -> None:
    model = fitted(loose())
    assert model.kind is LOOSE
    assert all(isinstance(scorer, NearestNeighborScorer) for scorer in model.scorers.values())
    assert model.scale_shares == pytest.approx({16: 1.0, 24: 1.0, 32: 0.7, 64: 0.9})
    for _, patches in model.patch_scores(loose()):
        rows = patches.embeddings[..., :-2].flatten(0, 2)  # without the place, which counts nothing
        assert patches.embeddings.shape[-1] == 48 + 2  # three quarters of 64 directions
        assert patches.embeddings[..., -2:].abs().max() == 0
        assert rows.mean(dim=0).abs().max() < 1e-3
        assert rows.var(dim=0).max() < 1.01
        assert rows.var(dim=0).median() > 0.2
    assert model.map_shares == pytest.approx({16: 1.0, 24: (16 / 24) ** 0.5, 32: 0.7 * 0.5**0.5, 64: 0.9 * 0.5})
    image = loose(9)[8:]
    maps = [scores_to_map(patches.scores, (96, 128), size, 8) for size, patches in model.patch_scores(image)]
    parts = zip(maps, model.map_offsets, model.map_spreads, strict=True)
    units = [(scores - offset) / spread for scores, offset, spread in parts]
    found = model(image)
    for shares, limit, is_of_image in (
        (model.map_shares, model.normal_limit, False),
        (model.scale_shares, model.image_limit, True),
    ):
        lift = max(
            share * float(offset / spread)
            for share, offset, spread in zip(shares.values(), model.map_offsets, model.map_spreads, strict=True)
        )
        total = torch.stack([(share * unit).exp() for share, unit in zip(shares.values(), units, strict=True)]).sum(0)
        joined = (total.log() + lift) / model.typical_score
        distance = (joined.max() * joined.mean()).sqrt()[None] if is_of_image else joined
        given_out = found.pred_score if is_of_image else found.anomaly_map
        torch.testing.assert_close(given_out, distance / (distance + limit), rtol=1e-3, atol=1e-4)


def test_surfaces_are_compared_with_a_mixture_after_the_means_of_image_and_place() -> None:
    model = fitted(surface())
    assert model.kind is SURFACE
    assert all(isinstance(scorer, GaussianMixtureScorer) for scorer in model.scorers.values())
    assert model.scale_shares == pytest.approx({16: 1.0, 24: 1.0, 32: 0.7, 64: 0.9})
    assert model.map_shares == model.scale_shares
    for _, patches in model.patch_scores(surface()):
        of_image = patches.embeddings.mean(dim=(1, 2))
        assert of_image.shape == (6, 48)  # three quarters of 64 directions
        torch.testing.assert_close(of_image, of_image[:1].expand(6, -1), rtol=0, atol=1e-4)


@pytest.mark.parametrize("tile_size", [None, 64])
def test_a_surface_that_is_abnormal_all_over_is_seen(tile_size: int | None) -> None:
    torch.manual_seed(0)
    model = PedenetModel(scorer="auto", stride=8).eval()
    model.tiler = None if tile_size is None else Tiler(tile_size=tile_size, stride=tile_size)
    images = torch.rand(40, 3, 128, 128, generator=torch.Generator().manual_seed(0))
    normal, images = images[:4], images[4:]
    model.fit_standardization(images)
    model.calibrate(images, learned=LEARNED)
    model.fit(images.split(1))
    model.fit_normal_limit(images)
    assert model.kind is SURFACE
    limit = model(normal).pred_score.max()
    stained = normal.clone()
    stained[..., :64, :64] = 0  # as large as a tile
    assert (model(stained).pred_score > limit).all()
    if tile_size is None:
        assert (model(normal * 0.5).pred_score > limit).all()
        assert (model(torch.full_like(normal, 0.5)).pred_score > limit).all()


@pytest.mark.parametrize("images", [aligned(), loose(), surface()])
def test_a_given_weight_of_the_position_decides_whether_parts_are_aligned(images: torch.Tensor) -> None:
    assert fitted(images, position_weight=32.0).kind is ALIGNED
    model = fitted(images, position_weight=4.0)
    assert model.kind is NEARLY_ALIGNED
    assert {float(encoding.weight) for encoding in model.position_encodings.values()} == {4.0}
    assert fitted(images, position_weight=0.0).kind in {LOOSE, SURFACE}


def test_the_map_is_the_soft_maximum_of_the_scales_one_by_one() -> None:
    model = fitted(surface())
    normal, image = surface(), surface(7)[6:]

    def scale_map(size: int, images: torch.Tensor) -> torch.Tensor:
        grid = model.embedding_network.embed_dense(model.standardize(images), 8, [size])[size]
        if str(size) in model.projections:
            grid = model.projections[str(size)](grid)
        whitening = model.whitenings[str(size)]
        of_image = grid.mean(dim=(2, 3), keepdim=True) - whitening.image_mean
        grid = grid - of_image.clamp(-whitening.image_reach, whitening.image_reach)
        grid = torch.einsum("yz,bzhw->byhw", whitening.components, grid - whitening.mean)
        scorer = model.scorers[str(size)]
        scores = scorer(grid.permute(0, 2, 3, 1)) / scorer.typical_score
        return scores_to_map(scores, (96, 128), size, 8, reach=0.75).detach()

    total, lift, normals = torch.zeros(1, 1, 96, 128), 0.0, torch.zeros(6, 1, 96, 128)
    for size, weight in model.scale_shares.items():
        of_normal = scale_map(size, normal)
        offset, spread = of_normal.mean(), of_normal.amax(dim=(1, 2, 3)).std()
        total += (weight * (scale_map(size, image) - offset) / spread).exp()
        normals += (weight * (of_normal - offset) / spread).exp()
        lift = max(lift, weight * float(offset / spread))
    unit = (normals.log() + lift).mean()
    limit = ((normals.log() + lift) / unit).max()
    scores = (total.log() + lift) / unit
    predicted = model(image).anomaly_map
    torch.testing.assert_close(predicted, scores / (scores + limit), rtol=1e-4, atol=1e-4)


def test_one_normal_image_is_enough_for_a_soft_maximum() -> None:
    images = surface(2)
    model = fitted(images)
    model.fit_normal_limit(images[:1])
    assert model(images).anomaly_map.isfinite().all()
    model.fit_normal_limit(images[:1].expand(3, -1, -1, -1))  # the highest scores do not differ at all
    assert model(images).anomaly_map.isfinite().all()


@pytest.mark.parametrize("images", [aligned(), loose(), surface()])
def test_what_was_chosen_is_saved(images: torch.Tensor) -> None:
    model = fitted(images)
    loaded = PedenetModel(scorer="auto", stride=8, bank_size=200).eval()
    loaded.load_state_dict(model.state_dict())
    assert loaded.scale_shares == model.scale_shares
    torch.testing.assert_close(loaded(images).anomaly_map, model(images).anomaly_map, rtol=0, atol=0)
    # Fitted again without a training, it weighs the scales as the training did.
    loaded.calibrate(images)
    assert loaded.scale_shares == pytest.approx(model.scale_shares)


def test_the_choice_is_made_anew_for_other_images() -> None:
    model = fitted(surface())
    model.reset_choices()
    assert math.isnan(float(model.learned[0]))
    model.calibrate(aligned(), learned=LEARNED)
    model.fit(aligned().split(1))
    model.fit_normal_limit(aligned())
    assert model.kind is ALIGNED
    assert all(not len(whitening.components) for whitening in model.whitenings.values())
    assert model(aligned()).pred_score.isfinite().all()


def test_a_checkpoint_from_before_there_was_a_choice_scores_as_it_did() -> None:
    torch.manual_seed(0)
    images = aligned()
    model = PedenetModel(stride=8, bank_size=200).eval()
    model.calibrate(images, learned=LEARNED)
    model.fit(images.split(1))
    model.fit_normal_limit(images)
    saved = {f"model.{name}": value for name, value in model.state_dict().items()}
    for name in ("learned", "map_offsets", "map_spreads", "typical_score"):
        del saved[f"model.{name}"]
    saved["model._extra_state"] = saved["model._extra_state"][:-1]
    checkpoint = {"state_dict": saved}
    bring_up_to_date(checkpoint)
    loaded = PedenetModel(stride=8, bank_size=200).eval()
    loaded.load_state_dict({name.removeprefix("model."): value for name, value in checkpoint["state_dict"].items()})
    assert loaded.scale_shares == model.scale_shares
    torch.testing.assert_close(loaded(images).anomaly_map, model(images).anomaly_map, rtol=0, atol=0)
    assert loaded.learned.isnan().all()


@pytest.mark.parametrize("number", range(len(KINDS)))
def test_all_kinds_that_checkpoints_may_hold_score_as_they_did(number: int) -> None:
    torch.manual_seed(0)
    images = loose()
    model = PedenetModel(scorer="auto", stride=8, bank_size=200).eval()
    model._use_kind(KINDS[number])
    for size, grid in model._embed(images, 8, model.scored_sizes).items():
        model._calibrate_scale(size, grid, (96, 128), 8)
    model.fit(images.split(1))
    model.fit_normal_limit(images)
    saved = {f"model.{name}": value for name, value in model.state_dict().items()}
    if not KINDS[number].has_extent:  # as those of before, which had one limit
        saved = {name: saved[name] for name in saved if not name.endswith(("image_limit", "num_images"))}
    bring_up_to_date({"state_dict": saved})
    loaded = PedenetModel(scorer="auto", stride=8, bank_size=200).eval()
    loaded.load_state_dict({name.removeprefix("model."): value for name, value in saved.items()})
    assert loaded.kind == KINDS[number]
    torch.testing.assert_close(loaded(images).anomaly_map, model(images).anomaly_map, rtol=0, atol=0)
    torch.testing.assert_close(loaded(images).pred_score, model(images).pred_score, rtol=0, atol=0)
    dimensions = {patches.embeddings.shape[-1] for _, patches in loaded.patch_scores(images)}
    # What earlier versions wrote: two without whitening, and three, none of which left a direction out.
    assert [kind.scorer for kind in KINDS[:5]] == ["gaussian_mixture", "exact", "ppca", "exact", "gaussian_mixture"]
    assert [kind.is_whitened for kind in KINDS[:5]] == [False, False, False, True, True]
    assert [kind.has_means for kind in KINDS[:5]] == [False, False, False, False, True]
    assert all(kind.kept == 1 and not kind.is_relative for kind in KINDS[:5])
    # The latter two with fewer directions; all three with another score of images; and now with sharper maps.
    assert KINDS[10:] == (ALIGNED, replace(LOOSE, fineness=0.25), SURFACE, LOOSE, NEARLY_ALIGNED)
    assert KINDS[7:10] == tuple(replace(kind, reach=1.0, fineness=0.0) for kind in KINDS[10:13])
    assert KINDS[5:7] == tuple(replace(kind, has_extent=False) for kind in KINDS[8:10])
    assert KINDS[2:7] == tuple(replace(kind, has_extent=False, reach=1.0, fineness=0.0) for kind in KINDS[2:7])
    of_scorer = {"ppca": 64, "exact": 66, "gaussian_mixture": 64}[KINDS[number].scorer]
    assert dimensions == {of_scorer - 16 * (KINDS[number].kept < 1)}


def test_another_scorer_weighs_the_scales_by_what_was_learned() -> None:
    model = fitted(surface())
    other = PedenetModel(scorer="exact", stride=8, bank_size=200).eval()
    other.learned.copy_(model.learned)
    other.calibrate(surface())
    assert other.scale_shares == pytest.approx({24: 1.0, 32: 0.49})


@pytest.mark.parametrize(("number", "kind"), enumerate(["gaussian_mixture", "exact"]))
def test_kinds_of_earlier_versions_are_scored_as_they_were(number: int, kind: str) -> None:
    model = PedenetModel(scorer="auto")
    model.set_extra_state(torch.tensor([1.0, 1.0, 1.0, 1.0, number]))
    assert model.scorer_in_use == kind
    assert model._is_soft_maximum == (kind == "gaussian_mixture")


def test_a_kind_of_a_later_version_is_refused() -> None:
    with pytest.raises(ValueError, match=f"a kind {len(KINDS)} of images, of a later version"):
        PedenetModel(scorer="auto").set_extra_state(torch.tensor([1.0, 1.0, 1.0, 1.0, len(KINDS)]))


def test_the_edge_of_a_region_makes_no_loose_parts_of_a_surface() -> None:
    rows, columns = torch.meshgrid(torch.arange(96) - 48, torch.arange(128) - 64, indexing="ij")
    images = surface()
    torch.manual_seed(0)
    model = PedenetModel(scorer="auto", stride=8, bank_size=200).eval()
    model.region.set(rows.square() + columns.square() < 40**2)
    model.fit_standardization(images)
    model.calibrate(images, learned=LEARNED)
    assert model.kind is SURFACE


class Images:
    """Images that can be taken in parts."""

    def __init__(self, images: torch.Tensor) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __iter__(self) -> Iterator[torch.Tensor]:
        return iter(self.images.split(1))

    def take(self, positions: Sequence[int]) -> "Images":
        return Images(self.images[list(positions)])


@pytest.mark.parametrize("count", [2, 4, 8])
def test_of_few_loose_parts_a_defect_is_found(count: int) -> None:
    images = loose(count + 6)
    torch.manual_seed(0)
    model = PedenetModel(scorer="auto", stride=8).eval()
    model.fit_standardization(images[:count])
    model.calibrate(images[:count], learned=LEARNED)
    assert model.kind is LOOSE
    fit_scorers(model, Images(images[:count]), images[:count], quiet=True)
    good = images[count:]
    defective = good.clone()
    defective[:, :, 40:56, 48:64] = 0.0
    found, normal = model(defective), model(good)
    rise = (found.anomaly_map - normal.anomaly_map)[..., 40:56, 48:64]
    assert (rise.amax(dim=(1, 2, 3)) > 0).all()
    # The highest pixel of some images is an edge of the part, as a network that nobody trained sees it.
    assert ((found.pred_score > normal.pred_score).sum()) >= 5
    assert normal.pred_score.max() < 0.999


def test_loose_parts_are_measured_by_unseen_images_if_there_are_any() -> None:
    images, unseen = loose(8), loose(12)[8:]
    model = fitted(images)
    fit_scorers(model, Images(images), images, unseen=unseen, quiet=True)
    found = model.map_offsets.clone()
    model.fit_normal_limit(unseen)
    torch.testing.assert_close(found, model.map_offsets, rtol=0, atol=0)


def test_a_single_image_is_scored_by_a_mixture() -> None:
    assert fitted(loose()[:1]).kind is SURFACE


def test_aligned_parts_at_another_stride_are_refused() -> None:
    model = fitted(aligned())
    model.stride = 4
    with pytest.raises(ValueError, match="keep the image_size and the stride of the training"):
        model(aligned())


def test_tiles_are_never_aligned() -> None:
    model = PedenetModel(scorer="auto", stride=8, position_weight=4.0).eval()
    model.tiler = Tiler(tile_size=64, stride=64)
    model.calibrate(surface(), learned=LEARNED)
    assert model.kind is SURFACE
