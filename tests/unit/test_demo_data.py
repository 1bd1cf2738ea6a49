# Copyright (C) 2026 The anomalib-pedenet authors
# SPDX-License-Identifier: Apache-2.0

"""Tests of the embedded demo data set, ``examples/demo_data.py``."""

import hashlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from anomalib.data import MVTecAD
from PIL import Image

CATEGORIES = ("brick", "grass", "gravel")
KINDS = ("misplaced", "missing", "scratch", "spot", "stain")
SMALL = {"num_train": 3, "num_test_good": 2, "num_per_defect": 2}


def _load_demo_data() -> ModuleType:
    """Load the script under a name of its own, since ``examples`` is no package."""
    path = Path(__file__).parents[2] / "examples" / "demo_data.py"
    spec = importlib.util.spec_from_file_location("_demo_data", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


demo_data = _load_demo_data()


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return demo_data.make_demo_dataset(tmp_path_factory.mktemp("demo") / "data", **SMALL)


def _digests(root: Path) -> dict[str, str]:
    """Digest of every file's bytes by its path below the root."""
    return {
        path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in root.rglob("*")
        if path.is_file()
    }


def _read(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


def test_layout_is_that_of_mvtec_ad(root: Path) -> None:
    expected = {demo_data.MANIFEST}
    for category in CATEGORIES:
        expected |= {f"{category}/train/good/{index:03d}.png" for index in range(3)}
        expected |= {f"{category}/test/good/{index:03d}.png" for index in range(2)}
        for kind in KINDS:
            expected |= {f"{category}/test/{kind}/{index:03d}.png" for index in range(2)}
            expected |= {f"{category}/ground_truth/{kind}/{index:03d}_mask.png" for index in range(2)}
    assert set(_digests(root)) == expected


def test_images_are_rgb_and_masks_are_black_and_white(root: Path) -> None:
    for path in root.rglob("*.png"):
        pixels = _read(path)
        assert pixels.dtype == np.uint8
        if "ground_truth" in path.parts:
            assert pixels.shape == (256, 256)
            assert set(np.unique(pixels)) == {0, 255}
        else:
            assert pixels.shape == (256, 256, 3)


def test_no_two_images_are_equal(root: Path) -> None:
    digests = _digests(root)
    assert len(set(digests.values())) == len(digests)


def test_same_seed_gives_the_same_bytes(root: Path, tmp_path: Path) -> None:
    again = demo_data.make_demo_dataset(tmp_path / "again", **SMALL)
    assert _digests(again) == _digests(root)


def test_other_seed_gives_other_images(root: Path, tmp_path: Path) -> None:
    other = _digests(demo_data.make_demo_dataset(tmp_path / "other", seed=1, **SMALL))
    first = _digests(root)
    assert set(other) == set(first)
    assert all(other[name] != first[name] for name in first)


def test_asking_for_more_tiles_keeps_the_others(root: Path, tmp_path: Path) -> None:
    more = demo_data.make_demo_dataset(tmp_path / "more", ["brick"], num_train=5, num_test_good=3, num_per_defect=3)
    digests, fewer = _digests(more), _digests(root / "brick")
    assert {name: digests[f"brick/{name}"] for name in fewer} == fewer


@pytest.mark.parametrize("category", CATEGORIES)
@pytest.mark.parametrize("kind", KINDS)
def test_image_differs_from_the_clean_one_exactly_where_its_mask_is_white(category: str, kind: str) -> None:
    for index in range(8):
        image, mask, clean = demo_data.make_defective_tile(category, kind, index, seed=0)
        difference = np.abs(image.astype(int) - clean.astype(int)).max(axis=-1)
        np.testing.assert_array_equal(difference[~mask], 0)
        # A piece that was turned may by chance keep a pixel's colour, but not those of many.
        assert np.mean(difference[mask] > 0) > 0.9
        # Visible to a person, and small enough to leave most of the tile as it was.
        assert difference[mask].mean() > 15
        assert 0.003 < mask.mean() < 0.15


def test_written_files_hold_the_defective_tile_and_its_mask(root: Path) -> None:
    image, mask, _ = demo_data.make_defective_tile("gravel", "stain", 1, seed=0)
    np.testing.assert_array_equal(_read(root / "gravel/test/stain/001.png"), image)
    np.testing.assert_array_equal(_read(root / "gravel/ground_truth/stain/001_mask.png") == 255, mask)


def test_defects_fit_into_the_tile() -> None:
    for kind in KINDS:
        for index in range(12):
            _, mask, _ = demo_data.make_defective_tile("brick", kind, index, seed=0)
            inside = mask[1:-1, 1:-1]
            assert inside.sum() == mask.sum(), (kind, index)


def test_training_and_test_tiles_share_no_pixel_of_the_photograph(monkeypatch: pytest.MonkeyPatch) -> None:
    surface = demo_data.SURFACES["brick"]
    photograph = surface.photograph()
    is_test_column = (np.arange(512) >= 170) & (np.arange(512) < 342)

    def tiles() -> tuple[list[bytes], list[bytes]]:
        train = [demo_data.make_good_tile("brick", "train", index, seed=0) for index in range(12)]
        test = [demo_data.make_good_tile("brick", "test", index, seed=0) for index in range(6)]
        test += [demo_data.make_defective_tile("brick", kind, 0, seed=0)[0] for kind in KINDS]
        return [tile.tobytes() for tile in train], [tile.tobytes() for tile in test]

    def tiles_of(changed: np.ndarray) -> tuple[list[bytes], list[bytes]]:
        monkeypatch.setitem(demo_data.SURFACES, "brick", surface._replace(photograph=lambda: changed))
        return tiles()

    train, test = tiles()
    train_with_other_test, other_test = tiles_of(np.where(is_test_column, 255 - photograph, photograph))
    assert train_with_other_test == train
    assert not set(other_test) & set(test)

    other_train, test_with_other_train = tiles_of(np.where(is_test_column, photograph, 255 - photograph))
    assert test_with_other_train == test
    assert not set(other_train) & set(train)


def test_existing_data_set_is_reused(tmp_path: Path) -> None:
    root = demo_data.make_demo_dataset(tmp_path / "data", ["brick"], **SMALL)
    image = root / "brick/train/good/000.png"
    image.write_bytes(b"left alone")
    assert demo_data.make_demo_dataset(root, ["brick"], **SMALL) == root
    assert image.read_bytes() == b"left alone"


def test_data_set_with_other_parameters_is_replaced_only_by_force(tmp_path: Path) -> None:
    root = demo_data.make_demo_dataset(tmp_path / "data", ["brick"], **SMALL)
    before = _digests(root)
    with pytest.raises(FileExistsError, match=r"data' holds .* \(differing: seed\)\. .* --force"):
        demo_data.make_demo_dataset(root, ["brick"], seed=7, **SMALL)
    assert _digests(root) == before

    demo_data.make_demo_dataset(root, ["grass"], force=True, **SMALL)
    assert not (root / "brick").exists()
    assert (root / "grass/test/stain/001.png").is_file()


@pytest.mark.parametrize("force", [False, True])
def test_foreign_folder_is_never_touched(tmp_path: Path, force: bool) -> None:
    (tmp_path / "holiday.png").write_bytes(b"precious")
    with pytest.raises(FileExistsError, match="is not a demo data set"):
        demo_data.make_demo_dataset(tmp_path, force=force, **SMALL)
    assert _digests(tmp_path) == {"holiday.png": hashlib.sha256(b"precious").hexdigest()}


def test_interrupted_run_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(demo_data, "make_defective_tile", interrupt)
    with pytest.raises(KeyboardInterrupt):
        demo_data.make_demo_dataset(tmp_path / "data", **SMALL)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"categories": ["sand"]}, r"Unknown categories \['sand'\]"), ({"num_train": 0}, "At least one")],
)
def test_arguments_are_checked(tmp_path: Path, arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        demo_data.make_demo_dataset(tmp_path / "data", **arguments)
    assert list(tmp_path.iterdir()) == []


def test_command_line_ends_with_a_message_and_a_status(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    counts = ["--num-train", "1", "--num-test-good", "1", "--num-per-defect", "1", "--categories", "brick"]
    monkeypatch.setattr(sys, "argv", ["demo_data.py", "--root", str(tmp_path / "data"), *counts])
    demo_data.main()
    assert (tmp_path / "data/brick/test/scratch/000.png").is_file()

    monkeypatch.setattr(sys, "argv", ["demo_data.py", "--root", str(tmp_path / "data"), *counts, "--seed", "1"])
    with pytest.raises(SystemExit) as raised:
        demo_data.main()
    assert raised.value.code == 1
    assert "differing: seed" in capsys.readouterr().err


def test_stock_data_module_reads_it(root: Path) -> None:
    datamodule = MVTecAD(root=root, category="brick", num_workers=0)
    datamodule.prepare_data()
    datamodule.setup()
    assert len(datamodule.train_data) == 3
    assert {item.gt_label.item() for item in datamodule.train_data} == {False}

    items = list(datamodule.test_data)
    assert len(items) == 2 + 2 * len(KINDS)
    for item in items:
        path = Path(item.image_path)
        assert item.image.shape == (3, 256, 256)
        assert item.gt_label.item() == (path.parent.name != "good")
        if item.gt_label:
            mask = _read(root / "brick/ground_truth" / path.parent.name / f"{path.stem}_mask.png") == 255
            np.testing.assert_array_equal(item.gt_mask.numpy().astype(bool), mask)
