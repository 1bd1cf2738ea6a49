# Copyright (C) 2026 The anomalib-pedenet authors
# SPDX-License-Identifier: Apache-2.0

"""The torch model against its parts applied slowly."""

import pytest
import torch
from anomalib.data.utils.tiler import Tiler
from scipy.spatial.distance import cdist

from anomalib_pedenet import PedenetModel


def fitted(*scored_sizes: int, position_weight: float = 2.0) -> PedenetModel:
    torch.manual_seed(0)
    model = PedenetModel(scored_sizes=scored_sizes, stride=16, bank_size=300, position_weight=position_weight).eval()
    images = torch.rand(3, 3, 128, 160)
    model.fit_standardization(images)
    model.calibrate(images)
    model.fit([images])
    return model


@pytest.fixture
def model() -> PedenetModel:
    return fitted(32, 64)


@pytest.fixture
def mid_level() -> PedenetModel:
    return fitted(16, 32)


def naive_map(model: PedenetModel, image: torch.Tensor, size: int) -> torch.Tensor:
    """Cut, embed and score every patch by itself and average the scores at the pixels, by how much of them it covers.

    A pixel stands for its window, a stride wide.
    """

    def covered(pixels: int, start: int) -> torch.Tensor:
        middles = torch.arange(pixels) + 0.5
        stops = (middles + model.stride / 2).clamp(max=start + size)
        return (stops - (middles - model.stride / 2).clamp(min=start)).clamp(min=0)

    total, count = torch.zeros(image.shape[1:]), torch.zeros(image.shape[1:])
    scorer = model.scorers[str(size)]
    bank = (scorer.bank + scorer.mean).numpy()
    for top in range(0, image.shape[1] - size + 1, model.stride):
        for left in range(0, image.shape[2] - size + 1, model.stride):
            window = slice(top, top + size), slice(left, left + size)
            patch = model.standardize(image[(slice(None), *window)])
            embedded = model.embedding_network(patch[None])[0]
            if str(size) in model.projections:
                projection = model.projections[str(size)]
                embedded = projection.components @ (embedded - projection.center)
            embedding = embedded.tolist()
            position = [model.position_weight * side / max(image.shape) for side in (top, left)]
            share = covered(image.shape[1], top)[:, None] * covered(image.shape[2], left)
            total += share * float(cdist([embedding + position], bank).min())
            count += share
    return total / count / scorer.typical_score


def distances(scores: torch.Tensor, model: PedenetModel) -> torch.Tensor:
    """Undo the last step: from scores between 0 and 1 to units of a normal patch's typical score."""
    return model.normal_limit * scores / (1 - scores)


@pytest.mark.parametrize("combination", ["product", "mean"])
def test_map_and_score_equal_the_slow_way(model: PedenetModel, combination: str) -> None:
    model.combination = combination  # type: ignore[assignment]
    image = torch.rand(3, 128, 160)
    small, large = (naive_map(model, image, size) for size in (32, 64))
    expected = (small * large).sqrt() if combination == "product" else (small + large) / 2
    predictions = model(image[None])
    torch.testing.assert_close(distances(predictions.anomaly_map[0, 0], model), expected, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(predictions.pred_score[0], predictions.anomaly_map.max())


def test_a_batch_equals_its_images(model: PedenetModel) -> None:
    images = torch.rand(4, 3, 130, 97)
    together = model(images)
    for index, image in enumerate(images):
        alone = model(image[None])
        torch.testing.assert_close(alone.anomaly_map[0], together.anomaly_map[index])
        torch.testing.assert_close(alone.pred_score[0], together.pred_score[index])


def test_predictions_are_detached_although_gradients_are_on(model: PedenetModel) -> None:
    predictions = model(torch.rand(1, 3, 128, 128))
    assert not predictions.anomaly_map.requires_grad
    assert not predictions.pred_score.requires_grad


def test_training_images_score_lower_than_others() -> None:
    torch.manual_seed(0)
    model = PedenetModel(stride=16).eval()
    images = torch.rand(2, 3, 128, 128)
    model.fit([images], stride=16)
    assert model(images).pred_score.max() < 0.1
    assert model(torch.rand(2, 3, 128, 128)).pred_score.min() > 0.3


def test_one_scale_is_the_papers() -> None:
    model = PedenetModel(patch_sizes=(64,), batch_norm=False, model_size="medium", density_estimation=True)
    assert sum(p.numel() for p in model.parameters()) == 467_378
    assert set(model.scorers) == {"64"}


def test_the_small_scale_alone_has_no_large_encoder() -> None:
    model = PedenetModel(patch_sizes=(32,), model_size="medium", density_estimation=True)
    assert sum(p.numel() for p in model.parameters()) == 427_314
    assert set(model.embedding_network.embed_dense(torch.zeros(1, 3, 56, 56))) == {32}
    with pytest.raises(ValueError, match="Patches must be 32x32 px, got"):
        model.embedding_network(torch.zeros(1, 3, 64, 64))


def test_mid_level_patches_are_scored_as_the_slow_way_does(mid_level: PedenetModel) -> None:
    image = torch.rand(3, 96, 80)
    small, large = naive_map(mid_level, image, 16), naive_map(mid_level, image, 32)
    predicted = distances(mid_level(image[None]).anomaly_map[0, 0], mid_level)
    torch.testing.assert_close(predicted, (small * large).sqrt(), rtol=1e-3, atol=1e-3)

    mid_level.weigh_scales({32: 0.5, 64: 0.9})
    predicted = distances(mid_level(image[None]).anomaly_map[0, 0], mid_level)
    torch.testing.assert_close(predicted, (small * large.sqrt()) ** (2 / 3), rtol=1e-3, atol=1e-3)


def test_a_scale_that_learned_nothing_takes_neither_time_nor_memory(mid_level: PedenetModel) -> None:
    image = torch.rand(3, 96, 80)
    expected = naive_map(mid_level, image, 16)
    mid_level.weigh_scales({32: 0.05, 64: 0.0})
    predicted = distances(mid_level(image[None]).anomaly_map[0, 0], mid_level)
    torch.testing.assert_close(predicted, expected, rtol=1e-3, atol=1e-3)
    assert mid_level.calibrate(torch.rand(2, 3, 96, 96)) == {16: 2.0}
    mid_level.fit([torch.rand(3, 3, 128, 160)])
    assert mid_level.scorers["16"].is_fitted
    assert not mid_level.scorers["32"].is_fitted  # nor is there what an earlier fit had left
    assert mid_level.is_fitted
    layers: list[torch.nn.Module] = []
    for layer in mid_level.embedding_network.small_encoder:
        layer.register_forward_hook(lambda module, *_: layers.append(module))
    mid_level(image[None])
    assert sum(isinstance(layer, torch.nn.Conv2d) for layer in layers) == 3


def test_scales_that_are_all_trained_count_alike(model: PedenetModel) -> None:
    model.weigh_scales({32: 0.0, 64: 0.3})
    assert model.scale_shares == {32: 1.0, 64: 1.0}


def test_the_finest_of_several_mid_level_scales_counts_where_nothing_is_learned() -> None:
    model = PedenetModel()
    model.weigh_scales({32: 0.25, 64: 0.9})
    assert model.scale_shares == {16: 0.5, 24: 1.0, 32: 0.25}
    model.weigh_scales({32: 0.75, 64: 1.0})
    assert model.scale_shares == {24: 1.0, 32: 0.75}
    model.weigh_scales({32: 0.0, 64: 0.5})
    assert model.scale_shares == {16: 1.0, 24: 1.0}


def test_the_scored_scales_by_default() -> None:
    assert PedenetModel().scored_sizes == (16, 24, 32)
    assert PedenetModel(patch_sizes=(32,)).scored_sizes == (16, 24, 32)
    assert PedenetModel(patch_sizes=(64,)).scored_sizes == (64,)


def test_one_trained_scale_is_scored_alone(model: PedenetModel) -> None:
    small = PedenetModel(scored_sizes=(32,), stride=16, bank_size=300, position_weight=2.0).eval()
    of_scales = ["map_offsets", "map_spreads", "_extra_state"]
    state = {name: value for name, value in model.state_dict().items() if name not in of_scales}
    missing, unexpected = small.load_state_dict(state, strict=False)
    assert missing == of_scales
    assert {name.split(".")[1] for name in unexpected} == {"64"}
    small.fit([torch.rand(3, 3, 128, 160)])
    image = torch.rand(3, 48, 80)  # too small for a patch of 64 px
    predicted = distances(small(image[None]).anomaly_map[0, 0], small)
    torch.testing.assert_close(predicted, naive_map(small, image, 32), rtol=1e-3, atol=1e-3)


def test_standardization_makes_the_training_images_unit_variance() -> None:
    model = PedenetModel()
    images = torch.randn(8, 3, 64, 64) * 0.3 + torch.tensor([1.0, 2.0, -1.0])[:, None, None]
    model.fit_standardization(images)
    standardized = model.standardize(images)
    torch.testing.assert_close(standardized.mean(dim=(0, 2, 3)), torch.zeros(3), rtol=0, atol=1e-4)
    assert standardized.std().item() == pytest.approx(1, abs=1e-3)
    model.fit_standardization(torch.ones(2, 3, 64, 64))
    assert torch.isfinite(model.standardize(torch.rand(1, 3, 64, 64))).all()


def test_an_empty_bank_says_what_to_do() -> None:
    with pytest.raises(RuntimeError, match=r"no memory bank yet.*anomalib train.*--ckpt_path"):
        PedenetModel().eval()(torch.rand(1, 3, 256, 256))


def test_images_smaller_than_a_patch_are_refused(model: PedenetModel) -> None:
    with pytest.raises(ValueError, match="63x128 px, smaller than a patch of 64x64 px"):
        model(torch.rand(1, 3, 63, 128))


def test_tiles_are_scored_one_by_one_and_put_back() -> None:
    model = fitted(32, 64, position_weight=0.0)
    image = torch.rand(1, 3, 128, 256)
    tiles = [model(tile).anomaly_map for tile in image.split(128, dim=-1)]
    model.tiler = Tiler(tile_size=128, stride=128)
    torch.testing.assert_close(model(image).anomaly_map, torch.cat(tiles, dim=-1))
    model.fit([image])
    assert len(model.scorers["64"].bank) == 2 * 5 * 5


def test_tiles_that_a_model_cannot_score_are_refused(model: PedenetModel) -> None:
    image = torch.rand(1, 3, 128, 256)
    model.tiler = Tiler(tile_size=128, stride=128)
    for use in (lambda: model(image), lambda: model.fit([image])):
        with pytest.raises(ValueError, match=r"no place in the image.*position weight 2.*turn tiling off, or train"):
            use()
    model.tiler = Tiler(tile_size=48, stride=48)
    with pytest.raises(ValueError, match=r"Tiles of 48x48 px .* patch of 64x64 px: set tile_size to at least 64"):
        model(image)


def test_with_tiles_the_position_that_was_chosen_before_is_forgotten() -> None:
    model = PedenetModel(stride=16, bank_size=300).eval()
    for encoding in model.position_encodings.values():
        encoding.weight.fill_(8)
    model.tiler = Tiler(tile_size=64, stride=64)
    images = torch.rand(2, 3, 128, 128)
    assert model.calibrate(images) == {16: 0.0, 24: 0.0, 32: 0.0}
    model.fit([images])
    assert model(images).anomaly_map.shape == (2, 1, 128, 128)


def test_a_bank_as_a_fraction_of_all_patches() -> None:
    model = PedenetModel(stride=16, bank_size=0.5).eval()
    model.fit([torch.rand(1, 3, 64, 64) for _ in range(6)])  # 9 patches of 32 px each
    assert len(model.scorers["32"].bank) == 27


@pytest.mark.parametrize("density_estimation", [True, False])
def test_the_density_has_the_networks_components_if_there_is_a_network(density_estimation: bool) -> None:
    torch.manual_seed(0)
    options = {"scored_sizes": (16, 32), "stride": 16, "num_components": 4, "scorer": "density"}
    model = PedenetModel(**options, density_estimation=density_estimation).eval()  # type: ignore[arg-type]
    assert sorted(model.density_networks) == (["32", "64"] if density_estimation else [])
    images = torch.rand(3, 3, 128, 160)
    model.fit_standardization(images)
    model.calibrate(images)
    model.fit([images])
    components = {size: len(scorer.log_weights) for size, scorer in model.scorers.items()}
    assert components == {"16": 1, "32": 4 if density_estimation else 1}  # no network is trained at 16 px
