# Copyright (C) 2026 The anomalib-pedenet authors
# SPDX-License-Identifier: Apache-2.0

"""The region of interest: what is hidden changes nothing, and what is visible is as without a region."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import pad
from torchvision.transforms.v2 import CenterCrop, Compose, Normalize, Resize

from anomalib_pedenet import PedenetModel
from anomalib_pedenet.region import RegionOfInterest, find_roi, read_roi
from anomalib_pedenet.scales import AUTO_SCORER
from anomalib_pedenet.training.sampling import draw_views

SIZE = (96, 128)


def left_half() -> torch.Tensor:
    visible = torch.zeros(SIZE, dtype=torch.bool)
    visible[:, :64] = True
    return visible


def images(count: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(count, 3, *SIZE, generator=torch.Generator().manual_seed(seed))


def changed_at_the_right(batch: torch.Tensor) -> torch.Tensor:
    return torch.where(left_half(), batch, 5 * images(len(batch), seed=99))


def fitted(normal: torch.Tensor, scorer: str) -> PedenetModel:
    torch.manual_seed(0)
    model = PedenetModel(scorer=scorer, bank_size=100, density_estimation=True).eval()
    model.region.set(left_half())
    model.fit_standardization(normal)
    model.calibrate(normal, learned={32: 0.5, 64: 0.5})
    model.fit(normal.split(1))
    model.fit_normal_limit(normal)
    return model


@pytest.mark.parametrize("scorer", [AUTO_SCORER, "exact", "gaussian_mixture", "mahalanobis", "density", "local"])
def test_what_is_hidden_changes_nothing(scorer: str) -> None:
    normal, test = images(20), images(2, seed=1)
    model, other = fitted(normal, scorer), fitted(changed_at_the_right(normal), scorer)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(other.state_dict()[name], value, rtol=0, atol=0, msg=name)
    predictions, hidden = model(test), other(changed_at_the_right(test))
    assert torch.equal(predictions.anomaly_map, hidden.anomaly_map)
    assert torch.equal(predictions.pred_score, hidden.pred_score)
    assert predictions.anomaly_map[..., 64:].eq(0).all()
    assert predictions.anomaly_map[..., :64].gt(0).all()
    units = predictions.anomaly_map / (1 - predictions.anomaly_map) * model.normal_limit
    expected = units.amax(dim=(1, 2, 3))
    if scorer == AUTO_SCORER:  # the mean is that of visible pixels
        expected = (expected * units[..., :64].mean(dim=(1, 2, 3))).sqrt()
    torch.testing.assert_close(predictions.pred_score, expected / (expected + model.image_limit))


@pytest.mark.parametrize("scorer", ["exact", "gaussian_mixture"])
def test_normal_pixels_score_one_in_the_mean_where_they_are_visible(scorer: str) -> None:
    normal = images(20)
    model = fitted(normal, scorer)
    scores = model(normal).anomaly_map[..., :64]
    units = scores / (1 - scores) * model.normal_limit
    assert units.mean().item() == pytest.approx(1, rel=0.25)


def test_no_row_of_the_bank_shows_hidden_pixels_alone() -> None:
    normal = images(4)
    model = PedenetModel(scored_sizes=(32,), scorer="exact", bank_size=10_000, position_weight=0.0).eval()
    model.region.set(left_half())
    model.fit_standardization(normal)
    model.fit(normal.split(1), stride=8)
    # Of 13 columns of patches, at 0, 8, ..., 96, those from 72 on are half a step or more away from what is visible.
    assert len(model.scorers["32"].rows) == 4 * 9 * 9


def test_patches_and_crops_are_those_of_an_obvious_search() -> None:
    region = RegionOfInterest()
    visible = torch.zeros(SIZE, dtype=torch.bool)
    visible[20:60, 30:70] = True
    region.set(visible)
    for size, stride in ((16, 8), (32, 4), (24, 24)):
        for margin in (0, 3):
            found, whole = region.patches(SIZE, size, stride, margin), region.whole_patches(SIZE, size, stride)
            near, inside = torch.zeros_like(found), torch.zeros_like(found)
            for row in range(found.shape[0]):
                for column in range(found.shape[1]):
                    top, left = row * stride, column * stride
                    rows = slice(max(0, top - margin), top + size + margin)
                    near[row, column] = visible[rows, max(0, left - margin) : left + size + margin].any()
                    inside[row, column] = visible[top : top + size, left : left + size].all()
            assert torch.equal(found, near)
            assert torch.equal(whole, inside if inside.any() else region.patches(SIZE, size, stride))
    positions = region.crop_positions(SIZE, (48, 40))
    counts = {
        (row, column): int(visible[row : row + 48, column : column + 40].sum())
        for row in range(SIZE[0] - 47)
        for column in range(SIZE[1] - 39)
    }
    assert {tuple(place) for place in positions.tolist()} == {
        place for place, count in counts.items() if count >= 0.5 * max(counts.values())
    }


def test_crops_are_drawn_from_the_given_places() -> None:
    coordinates = torch.stack(torch.meshgrid(torch.arange(96.0), torch.arange(128.0), indexing="ij"))
    image = torch.cat([coordinates, torch.zeros(1, *SIZE)])[None]
    positions = torch.tensor([[3, 50], [40, 7]])
    views, _ = draw_views(image, num_crops=64, crop_size=32, color_shift=0, noise=0, positions=positions)
    assert {tuple(view[:2, 0, 0].int().tolist()) for view in views} == {(3, 50), (40, 7)}


def test_nothing_is_hidden_at_first_and_after_a_reset() -> None:
    region = RegionOfInterest()
    batch, color = images(1), torch.zeros(3, 1, 1)
    assert region.is_everywhere
    assert region.hide(batch, color) is batch
    region.set(left_half())
    assert not region.is_everywhere
    assert torch.equal(region.hide(batch, color), batch * left_half())
    region.reset()
    assert region.hide(batch, color) is batch
    region.set(torch.ones(SIZE, dtype=torch.bool))
    assert region.is_everywhere
    with pytest.raises(ValueError, match="empty"):
        region.set(torch.zeros(SIZE, dtype=torch.bool))


def write(path: Path, visible: np.ndarray, white: int = 255) -> Path:
    Image.fromarray((white * visible).astype(np.uint8)).save(path)
    return path


def test_a_pixel_is_visible_if_no_hidden_one_of_the_file_has_a_part_in_it(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    visible = pad(torch.zeros(160, 200), (20, 20, 20, 20), value=1.0).numpy()
    file = write(tmp_path / "roi.png", visible)
    prepare = Compose([Resize((100, 120), antialias=True), CenterCrop((96, 104)), Normalize([0.4] * 3, [0.2] * 3)])
    found = read_roi(file, (200, 240), prepare)
    assert found.shape == (96, 104)
    before = torch.from_numpy(generator.random((1, 3, 200, 240), dtype=np.float32))
    after = torch.where(torch.from_numpy(visible) > 0, before, 1 - before)
    same = (prepare(before) == prepare(after)).all(dim=1)[0]
    assert torch.equal(found, same)
    assert 0 < found.float().mean() < visible.mean() + 0.1


@pytest.mark.parametrize("white", [1, 7, 255])
def test_masks_with_small_numbers_are_masks(tmp_path: Path, white: int) -> None:
    file = write(tmp_path / "roi.png", left_half().numpy(), white)
    assert torch.equal(read_roi(file, SIZE, torch.nn.Identity()), left_half())


def test_a_mask_may_have_the_size_of_prepared_images(tmp_path: Path) -> None:
    file = write(tmp_path / "roi.png", left_half().numpy())
    found = read_roi(file, (960, 1280), Resize(SIZE))
    assert torch.equal(found, left_half())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: write(path, np.zeros(SIZE)), "black all over"),
        (lambda path: write(path, np.ones((50, 50))), "50x50 px .* but the images have 96x128"),
        (lambda path: path.write_text("no image"), "Cannot read"),
        (lambda _: None, "Cannot read"),
        (lambda path: write(path, np.eye(96, 128)), "too small"),
    ],
)
def test_unusable_masks_are_refused(tmp_path: Path, make: object, message: str) -> None:
    file = tmp_path / "roi.png"
    make(file)  # type: ignore[operator]
    prepare = Resize((48, 64)) if message == "too small" else torch.nn.Identity()
    with pytest.raises(ValueError, match=message) as error:
        read_roi(file, SIZE, prepare)
    assert str(file) in str(error.value)


def parts_on_a_background(count: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    """Return images of a bright square that moves, on a grey background with noise and dust, and where it comes."""
    generator = torch.Generator().manual_seed(0)
    batch = 0.3 + 0.004 * torch.randn(count, 3, 128, 128, generator=generator)
    where = torch.zeros(128, 128, dtype=torch.bool)
    for index, image in enumerate(batch):
        columns = slice(40 + 2 * index, 70 + 2 * index)
        image[:, 40:70, columns] += 0.5
        where[40:70, columns] = True
        image[:, 5 + index, 100:102] = 0.9  # dust
    return batch, where


def test_a_constant_background_is_found_and_dust_on_it_is_no_part() -> None:
    batch, where = parts_on_a_background()
    found = find_roi(batch)
    assert found[where].all()
    around = torch.nn.functional.max_pool2d(where[None, None].float(), 2 * 8 + 1, 1, 8)[0, 0] > 0
    assert not found[~around].any()
    assert found[36, 50]  # a little above of a part: its edge is looked at


def test_no_background_is_found_where_there_is_none() -> None:
    assert find_roi(images(4)).all()
    assert find_roi(torch.zeros(2, 3, *SIZE)).all()
