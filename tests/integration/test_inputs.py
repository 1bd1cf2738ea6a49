# Copyright (C) 2026 The anomalib-pedenet authors
# SPDX-License-Identifier: Apache-2.0

"""Every kind of image file, through anomalib's Folder, Engine and command line: used, or refused by its name."""

import io
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from anomalib.cli import AnomalibCLI
from anomalib.data import Folder, PredictDataset
from anomalib.engine import Engine
from PIL import Image
from torchvision.transforms import v2

from anomalib_pedenet import Pedenet

SMALL = {
    "image_size": (112, 112),
    "max_steps": 3,
    "steps_per_image": 1,
    "crops_per_step": 1,
    "patches_per_step": 64,
    "pairs_per_step": 64,
    "bank_size": 500,
    "train_precision": "float32",
}

Save = Callable[[Path], None]


def pixels(height: int = 120, width: int = 130, seed: int = 0) -> np.ndarray:
    """Coloured stripes with noise."""
    generator = np.random.default_rng(seed)
    stripes = 127 + 60 * np.sin(np.arange(width) / 5)[None, :, None] * np.array([1.0, 0.8, 0.6])
    return (stripes + generator.normal(0, 8, (height, width, 3))).clip(0, 255).astype(np.uint8)


def rgb(height: int = 120, width: int = 130) -> Image.Image:
    return Image.fromarray(pixels(height, width))


def grey16(scale: int) -> Image.Image:
    return Image.fromarray(pixels()[..., 0].astype(np.uint16) * scale)


def rgba() -> Image.Image:
    image = rgb().convert("RGBA")
    image.putalpha(Image.fromarray(pixels(seed=1)[..., 0]))
    return image


def rotated_by_exif(image: Image.Image, path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90 degrees
    image.save(path, quality=95, exif=exif)


def cut(suffix: str) -> Save:
    def save(path: Path) -> None:
        buffer = io.BytesIO()
        rgb().save(buffer, suffix)
        path.write_bytes(buffer.getvalue()[: buffer.tell() // 2])

    return save


# What each kind of file is, beside the RGB image whose pixels it must have the score of (None where there is none).
USED: dict[str, tuple[Save, Image.Image | None]] = {
    "rgb.png": (rgb().save, rgb()),
    "grey.png": (rgb().convert("L").save, rgb().convert("L").convert("RGB")),
    "rgba.png": (rgba().save, rgb()),
    "grey in 16 bits, values up to 255.png": (grey16(1).save, Image.fromarray(pixels()[..., :1].repeat(3, axis=2))),
    "two colours.png": (rgb().convert("1").save, rgb().convert("1").convert("RGB")),
    "palette.png": (rgb().convert("P").save, rgb().convert("P").convert("RGB")),
    "palette.gif": (rgb().convert("P").save, None),
    "cmyk.jpg": (rgb().convert("CMYK").save, None),
    "exif.jpg": (lambda path: rotated_by_exif(rgb(), path), None),
    "1x1.png": (rgb(1, 1).save, rgb(1, 1)),
    "63x63.png": (rgb(63, 63).save, rgb(63, 63)),
    "64x64.png": (rgb(64, 64).save, rgb(64, 64)),
    "257x301.png": (rgb(257, 301).save, rgb(257, 301)),
    "4000x3000.jpg": (rgb(3000, 4000).save, None),
    "constant.png": (Image.new("RGB", (120, 130), (90, 90, 90)).save, Image.new("RGB", (120, 130), (90, 90, 90))),
    "Prüfling №5, 部品.png": (rgb().save, rgb()),
    "n" * 251 + ".png": (rgb().save, rgb()),
}

REFUSED: dict[str, tuple[Save, str]] = {
    "grey16.png": (grey16(257).save, r"grey16\.png has values from \d+ to \d{5}, .* Save it with 8 bits"),
    "grey16.tif": (grey16(257).save, r"grey16\.tif has values from \d+ to \d{5}"),
    "float.tif": (
        lambda path: Image.fromarray(pixels()[..., 0].astype(np.float32) / 255).save(path),
        r"float\.tif has values from 0\.\d+ to 0\.\d+, .* all below 1 black",
    ),
    "empty.png": (
        lambda path: path.write_bytes(b"") and None,
        r"Cannot read \S*empty\.png \(cannot identify",
    ),
    "cut.png": (cut("PNG"), r"Cannot read \S*cut\.png \(image file is truncated.*\): copy the files again, or remove"),
    "cut.jpg": (cut("JPEG"), r"Cannot read \S*cut\.jpg \(image file is truncated"),
    "text.png": (lambda path: path.write_text("no image") and None, r"Cannot read \S*text\.png \(cannot identify"),
}


def make_engine(root: Path) -> Engine:
    return Engine(default_root_dir=root, enable_progress_bar=False)


def write(folder: Path, name: str, save: Save) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save(folder / name)
    return folder / name


def folder_of(root: Path, **options: object) -> Folder:
    return Folder(
        name="parts",
        root=root,
        normal_dir="train",
        normal_test_dir="test",
        extensions=(".png", ".jpg", ".tif", ".gif"),
        abnormal_dir="defect",
        val_split_mode="same_as_test",
        train_batch_size=8,
        eval_batch_size=8,
        num_workers=0,
        **options,
    )


def ordinary_images(root: Path) -> Path:
    for index in range(4):
        write(root / "train", f"{index}.png", Image.fromarray(pixels(seed=index)).save)
    write(root / "test", "good.png", Image.fromarray(pixels(seed=5)).save)
    defective = pixels(seed=6)
    defective[40:80, 40:80] = 240
    write(root / "defect", "bad.png", Image.fromarray(defective).save)
    return root


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    """A checkpoint of a training on all kinds of files that are used, tested on them all; and its scores by file."""
    root = ordinary_images(tmp_path_factory.mktemp("inputs"))
    for name, (save, _) in USED.items():
        write(root / "train", name, save)
        write(root / "test", name, save)
    datamodule = folder_of(root)
    model = Pedenet(**SMALL, scorer="exact")
    engine = make_engine(root)
    engine.fit(model, datamodule=datamodule)
    assert {Path(path).name for path in datamodule.train_data.samples.image_path} >= set(USED)
    assert len(model.model.scorers["24"].bank) == 500
    (metrics,) = engine.test(model, datamodule=datamodule)
    assert {"image_AUROC", "image_F1Score"} <= set(metrics)
    scores = {}
    for batch in engine.predict(model, dataloaders=datamodule.test_dataloader(), return_predictions=True):
        for path, score, anomaly_map in zip(batch.image_path, batch.pred_score, batch.anomaly_map, strict=True):
            assert torch.isfinite(anomaly_map).all()
            assert anomaly_map.shape[-2:] == (112, 112)
            scores[Path(path).name] = score
    return Path(engine.best_model_path), scores


def predict(checkpoint: Path, folder: Path) -> torch.Tensor:
    """The score of the one file in a folder, read by anomalib's PredictDataset."""
    (batch,) = make_engine(folder).predict(
        Pedenet(**SMALL, visualizer=False), data_path=folder, ckpt_path=checkpoint, return_predictions=True
    )
    return batch.pred_score[0]


@pytest.mark.parametrize("name", USED)
def test_a_file_that_is_used(trained: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path, name: str) -> None:
    checkpoint, scores = trained
    save, same = USED[name]
    assert torch.isfinite(scores[name])
    path = write(tmp_path / "images", name, save)
    if path.suffix == ".gif":
        with pytest.raises(ValueError, match="Found 0 images in"):
            predict(checkpoint, path.parent)
        return
    alone = predict(checkpoint, path.parent)
    assert torch.isfinite(alone)
    if same is not None:
        as_rgb = predict(checkpoint, write(tmp_path / "rgb", "image.png", same.save).parent)
        torch.testing.assert_close(alone, as_rgb, rtol=0, atol=0)


def test_files_with_other_endings_are_left_out_unless_their_endings_are_given(tmp_path: Path) -> None:
    root = ordinary_images(tmp_path)
    write(root / "train", "palette.gif", USED["palette.gif"][0])
    for extensions, count in ((None, 4), ((".png", ".gif"), 5)):
        datamodule = Folder(
            name="parts",
            root=root,
            normal_dir="train",
            normal_test_dir="test",
            abnormal_dir="defect",
            extensions=extensions,
        )
        datamodule.setup()
        assert len(datamodule.train_data) == count


def test_the_orientation_in_exif_is_ignored_in_training_and_testing(
    trained: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    plain, rotated = tmp_path / "plain", tmp_path / "rotated"
    for root in (plain, rotated):
        ordinary_images(root)
    for index in range(3):
        image = Image.fromarray(pixels(seed=index))
        write(plain / "train", f"{index}.jpg", lambda path, image=image: image.save(path, quality=95))
        write(rotated / "train", f"{index}.jpg", lambda path, image=image: rotated_by_exif(image, path))
    models = []
    for root in (plain, rotated):
        torch.manual_seed(0)
        model = Pedenet(**SMALL)
        make_engine(root).fit(model, datamodule=folder_of(root))
        models.append(model.model.state_dict())
    torch.testing.assert_close(models[0], models[1], rtol=0, atol=0)
    images = [Path(shutil.copytree(root / "train", tmp_path / f"{root.name} images")) for root in (plain, rotated)]
    for path in (path for folder in images for path in folder.iterdir() if path.name != "0.jpg"):
        path.unlink()
    scores = [predict(trained[0], folder) for folder in images]
    torch.testing.assert_close(scores[0], scores[1], rtol=0, atol=0)


@pytest.mark.parametrize("name", REFUSED)
def test_a_file_that_is_refused(trained: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path, name: str) -> None:
    save, message = REFUSED[name]
    root = ordinary_images(tmp_path)
    in_training = write(root / "train", name, save)
    with pytest.raises((OSError, ValueError), match=message):
        make_engine(root).fit(Pedenet(**SMALL), datamodule=folder_of(root))
    assert not list(root.rglob("*.ckpt"))
    in_training.unlink()

    write(root / "test", name, save)
    with pytest.raises((OSError, ValueError), match=message):
        make_engine(root).test(Pedenet(**SMALL), datamodule=folder_of(root), ckpt_path=trained[0])
    with pytest.raises((OSError, ValueError), match=message):
        predict(trained[0], write(root / "images", name, save).parent)


def test_the_command_line_names_a_file_that_it_cannot_read(
    trained: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "images", "good.png", rgb().save)
    write(tmp_path / "images", "cut.png", cut("PNG"))
    checkpoint = shutil.copy(trained[0], tmp_path / "model.ckpt")
    model = ["--model", "Pedenet", "--trainer.enable_progress_bar", "false"]
    with pytest.raises(OSError, match=r"Cannot read \S*cut\.png \(image file is truncated"):
        AnomalibCLI(["predict", *model, "--data", "images", "--ckpt_path", str(checkpoint)])
    Path("images/cut.png").unlink()
    AnomalibCLI(["predict", *model, "--data", "images", "--ckpt_path", str(checkpoint)])
    assert list(tmp_path.rglob("good.png"))


def test_all_files_that_cannot_be_read_are_named_from_worker_processes_too(tmp_path: Path) -> None:
    root = ordinary_images(tmp_path)
    write(root / "train", "cut.png", cut("PNG"))
    write(root / "train", "cut.jpg", cut("JPEG"))
    datamodule = folder_of(root)
    datamodule.num_workers = 1
    with pytest.raises(OSError, match=r"Cannot read \S*cut\.jpg .*, \S*cut\.png .*: copy the files again"):
        make_engine(root).fit(Pedenet(**SMALL), datamodule=datamodule)


def test_a_mask_that_cannot_be_read_is_named(trained: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path) -> None:
    root = ordinary_images(tmp_path)
    write(root / "mask", "bad.png", cut("PNG"))
    datamodule = folder_of(root, mask_dir="mask")
    with pytest.raises(OSError, match=r"Cannot read \S*mask/bad\.png"):
        make_engine(root).test(Pedenet(**SMALL), datamodule=datamodule, ckpt_path=trained[0])


class NanInOne(v2.Transform):
    """Spoils images whose mean is high, as a transform with a fault might."""

    def transform(self, inpt: torch.Tensor, params: dict) -> torch.Tensor:
        del params
        return inpt * torch.nan if inpt.mean() > 0.8 else inpt


def test_transforms_that_make_nan_are_found_by_the_file(
    trained: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    root = ordinary_images(tmp_path)
    white = Image.new("RGB", (120, 130), (250, 250, 250))
    write(root / "train", "white.png", white.save)
    datamodule = folder_of(root, train_augmentations=NanInOne())
    with pytest.raises(ValueError, match=r"NaN or infinite pixel values in \S*white\.png: Pedenet needs finite"):
        make_engine(root).fit(Pedenet(**SMALL), datamodule=datamodule)
    write(root / "test", "white.png", white.save)
    datamodule = folder_of(root, test_augmentations=NanInOne())
    with pytest.raises(ValueError, match=r"NaN or infinite pixel values in \S*test/white\.png"):
        make_engine(root).test(Pedenet(**SMALL), datamodule=datamodule, ckpt_path=trained[0])


def test_without_a_pre_processor_images_of_several_sizes_are_refused(tmp_path: Path) -> None:
    root = ordinary_images(tmp_path)
    write(root / "train", "wide.png", rgb(120, 200).save)
    with pytest.raises(ValueError, match=r"differ in size .*\(\S*0\.png is 120x130 px, \S*wide\.png 120x200 px\): use"):
        make_engine(root).fit(Pedenet(**SMALL, pre_processor=False), datamodule=folder_of(root))


def test_without_a_pre_processor_images_smaller_than_a_patch_are_named(
    trained: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    root = ordinary_images(tmp_path)
    for index in range(4):
        write(root / "train", f"{index}.png", Image.fromarray(pixels(50, 60, seed=index)).save)
    datamodule = folder_of(root)
    with pytest.raises(
        ValueError, match=r"50x60 px, smaller than a patch of 64x64 px: enlarge .*\(Files: .*[0-3]\.png"
    ):
        make_engine(root).fit(Pedenet(**SMALL, pre_processor=False), datamodule=datamodule)
    model = Pedenet.load_from_checkpoint(trained[0])
    model.pre_processor = model.visualizer = None
    write(root / "images", "tiny.png", rgb(19, 60).save)  # below 24 px, a scale that is scored
    dataset = PredictDataset(root / "images")
    with pytest.raises(ValueError, match=r"19x60 px, smaller than a patch of \d+x\d+ px: enlarge it .*tiny\.png"):
        make_engine(root).predict(model, dataset=dataset)
