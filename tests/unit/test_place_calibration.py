# Copyright (C) 2026 The anomalib-pedenet authors
# SPDX-License-Identifier: Apache-2.0

"""Maps of aligned parts are measured by what normal images score at each place."""

import pytest
import torch

from anomalib_pedenet import PedenetModel
from anomalib_pedenet.place_calibration import LEAST_IMAGES, PlaceCalibration


def normal_maps(count: int = 20, size: tuple[int, int] = (96, 128)) -> list[torch.Tensor]:
    """Draw maps whose right half is larger, and differs more from image to image."""
    generator = torch.Generator().manual_seed(0)
    width = size[1]
    right = (torch.arange(width) >= width // 2).float()
    return [
        1 + right * (2 + torch.randn(1, generator=generator)).abs() + 0.1 * torch.rand(1, 1, *size, generator=generator)
        for _ in range(count)
    ]


def test_a_place_is_measured_by_its_mean_and_deviation() -> None:
    maps = normal_maps()
    calibration = PlaceCalibration()
    calibration.fit(maps)
    stacked = torch.cat(maps)
    measured = calibration(stacked)
    # Away from the middle, where both halves meet, each half has one mean and one deviation.
    for columns in (slice(0, 24), slice(104, 128)):
        cells = stacked[:, :, :, columns].unflatten(3, (3, 8)).unflatten(2, (12, 8)).mean(dim=(1, 3, 5))  # [N, 12, 3]
        spread = cells.std(dim=0).mean() + _median_spread(stacked)
        expected = (stacked[:, :, :, columns] - cells.mean()) / spread
        difference = measured[:, :, :, columns] - measured[:, :, :, columns].mean()
        scale = float((difference * expected).sum() / expected.square().sum())
        torch.testing.assert_close(difference, scale * expected, atol=0.02, rtol=0.02)
    assert measured.min() >= 0
    assert measured.mean() == pytest.approx(1, abs=0.02)


def _median_spread(stacked: torch.Tensor) -> torch.Tensor:
    """Return the median over cells of 8 px of the deviation of their means, averaged over neighbouring cells."""
    cells = stacked.unflatten(3, (16, 8)).unflatten(2, (12, 8)).mean(dim=(1, 3, 5))  # [N, 12, 16]
    spreads = cells.std(dim=0)
    around = torch.zeros_like(spreads)
    for row in range(12):
        for column in range(16):
            rows = [min(max(row + step, 0), 11) for step in (-1, 0, 1)]
            columns = [min(max(column + step, 0), 15) for step in (-1, 0, 1)]
            around[row, column] = torch.stack([spreads[r, c] for r in rows for c in columns]).mean()
    return around.median()


def test_what_stands_out_in_a_quiet_place_is_above_what_is_usual_in_another() -> None:
    maps = normal_maps()
    calibration = PlaceCalibration()
    calibration.fit(maps)
    defect = torch.cat(maps).mean(dim=0, keepdim=True)
    defect[..., 40:50, 20:30] += 1.0
    assert defect[..., 40:50, 20:30].max() < defect[..., 64:].max()
    measured = calibration(defect)
    assert measured[..., 40:50, 20:30].min() > measured[..., 64:].max()


@pytest.mark.parametrize("maps", [normal_maps(LEAST_IMAGES - 1), [torch.ones(1, 1, 96, 128)] * 20])
def test_of_few_or_equal_images_nothing_is_taken(maps: list[torch.Tensor]) -> None:
    calibration = PlaceCalibration()
    calibration.fit(normal_maps())
    calibration.fit(maps)
    image = torch.rand(2, 1, 70, 90)
    torch.testing.assert_close(calibration(image), image, atol=0, rtol=0)


def test_its_state_loads_whatever_its_size() -> None:
    calibration, other = PlaceCalibration(), PlaceCalibration()
    calibration.fit(normal_maps())
    other.load_state_dict(calibration.state_dict())
    image = torch.rand(2, 1, 100, 130)  # another size than it was fitted on
    torch.testing.assert_close(other(image), calibration(image), atol=0, rtol=0)
    assert calibration(image).shape == image.shape


@pytest.mark.parametrize(("position_weight", "is_measured"), [(4.0, True), (0.0, False)])
def test_a_model_measures_places_where_parts_are_aligned(position_weight: float, is_measured: bool) -> None:
    torch.manual_seed(0)
    images = torch.rand(20, 3, 96, 128)
    model = PedenetModel(position_weight=position_weight, bank_size=200).eval()
    model.fit_standardization(images)
    model.calibrate(images, learned={32: 0.5, 64: 0.8})
    model.fit(images.split(1))
    model.fit_normal_limit(images)
    assert (model.place_calibration.gain.numel() > 1) == is_measured
    scores = model(images).pred_score
    assert scores.max() == pytest.approx(0.5, abs=1e-5)  # the limit is that of the measured maps
    maps = [found for found, _ in (model._score_scales(image) for image in images.split(1))]
    raw = [model._join_scales(found) for found in maps]
    reference = PlaceCalibration()
    if is_measured:
        reference.fit(raw)
    expected = reference(torch.cat(raw))
    torch.testing.assert_close(model(images).anomaly_map, expected / (expected + model.normal_limit))
