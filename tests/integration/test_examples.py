# Copyright (C) 2026 The anomalib-pedenet authors
# SPDX-License-Identifier: Apache-2.0

"""The examples of deployment give what anomalib's inferencers give, and the one without torch never imports it."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from anomalib.data import MVTecAD
from anomalib.data.utils import read_image
from anomalib.deploy import OpenVINOInferencer
from anomalib.engine import Engine
from PIL import Image
from torchvision.transforms.v2 import Resize

from anomalib_pedenet import Pedenet

EXAMPLES = Path(__file__).parents[2] / "examples"
SIZE = (80, 96)
LINE = re.compile(r"^(.*): score ([\d.]+), (normal|anomalous), ([\d.]+) ms$", re.M)


@pytest.fixture(scope="module")
def exported(dataset_root: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A trained model's exports: with images of any size, of one size, and Torch's."""
    root = tmp_path_factory.mktemp("exported")
    datamodule = MVTecAD(root=dataset_root, category="stripes", train_batch_size=3, num_workers=0)
    model = Pedenet(image_size=SIZE, patch_sizes=[32], max_steps=4, steps_per_image=1, crops_per_step=1, crop_size=80)
    engine = Engine(default_root_dir=root, enable_progress_bar=False, logger=False)
    engine.fit(model, datamodule=datamodule)
    return {
        "any": model.to_openvino(root / "any"),
        "fixed": model.to_openvino(root / "fixed", input_size=SIZE, onnx_kwargs={"dynamic_axes": {}}),
        "torch": model.to_torch(root / "torch"),
    }


def run_alone(tmp_path: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run the example where nothing can import torch or anomalib, not even in a `try`."""
    for module in ("torch", "anomalib", "anomalib_pedenet", "lightning"):
        package = tmp_path / "absent" / module
        package.mkdir(parents=True, exist_ok=True)
        (package / "__init__.py").write_text(f"raise SystemExit('{module} was imported')\n", encoding="utf-8")
    command = [sys.executable, str(EXAMPLES / "openvino_folder.py"), *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "absent")}
    return subprocess.run(command, check=False, capture_output=True, text=True, env=environment)


def printed(output: str) -> dict[str, tuple[float, str]]:
    return {Path(path).name: (float(score), label) for path, score, label, _ in LINE.findall(output)}


@pytest.fixture
def images(dataset_root: Path, tmp_path: Path) -> Path:
    """A folder of good and defective images, a file that is no image, and one that was stored turned."""
    folder = tmp_path / "images"
    for name in ("good/000", "square/001"):
        target = folder / f"{name}.png"
        target.parent.mkdir(parents=True)
        shutil.copy(dataset_root / f"stripes/test/{name}.png", target)
    with Image.open(folder / "square/001.png") as image:
        image.resize((300, 400), Image.Resampling.NEAREST).save(folder / "large.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees to show it
    with Image.open(dataset_root / "stripes/test/square/002.png") as image:
        image.save(folder / "turned.png", exif=exif)
    return folder


@pytest.mark.parametrize("model", ["any", "fixed"])
def test_scores_are_those_of_anomalib_without_anomalib(
    model: str, exported: dict[str, Path], images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # where anomalib's inferencer leaves a cache
    result = run_alone(tmp_path, exported[model], images, "--threads", "1", "--output", tmp_path / "overlays")
    assert result.returncode == 0, result.stderr
    lines = printed(result.stdout)
    assert list(lines) == ["000.png", "large.png", "001.png", "turned.png"]
    assert "4 images in" in result.stdout
    inferencer = OpenVINOInferencer(exported[model], device="CPU", config={"INFERENCE_PRECISION_HINT": "f32"})
    for path in images.rglob("*.png"):
        pixels = read_image(path, as_tensor=True)
        # A model of one size gets what has been resized outside of it, as in training.
        prediction = inferencer.predict(pixels if model == "any" else Resize(SIZE)(pixels))
        score, label = lines[path.name]
        assert score == pytest.approx(np.asarray(prediction.pred_score).item(), abs=6e-5)  # printed with four digits
        if score != 0.5:  # of four digits, from either side of the threshold, which is a score of the validation
            assert label == ("anomalous" if score > 0.5 else "normal")
        with Image.open(tmp_path / "overlays" / path.relative_to(images)) as overlay, Image.open(path) as image:
            assert overlay.size == image.size
            is_outlined = (np.asarray(overlay) == 255).all(axis=2).any()
        assert is_outlined == np.asarray(prediction.pred_mask).any()


def test_a_broken_image_is_named_and_does_not_stop_the_others(
    exported: dict[str, Path], images: Path, tmp_path: Path
) -> None:
    (images / "a.png").write_bytes(b"this is no image")
    whole = (images / "good/000.png").read_bytes()
    (images / "b.png").write_bytes(whole[: len(whole) // 2])
    result = run_alone(tmp_path, exported["any"], images)
    assert result.returncode == 1
    assert list(printed(result.stdout)) == ["000.png", "large.png", "001.png", "turned.png"]
    assert all(f"error: {images / name}: " in result.stderr for name in ("a.png", "b.png"))
    assert "2 images could not be inspected" in result.stderr


def test_frames_of_a_video_are_inspected(exported: dict[str, Path], images: Path, tmp_path: Path) -> None:
    frame = cv2.imread(str(images / "good/000.png"))
    video = cv2.VideoWriter(
        str(tmp_path / "line.avi"), cv2.VideoWriter.fourcc(*"MJPG"), 5, (frame.shape[1], frame.shape[0])
    )
    for _ in range(2):
        video.write(frame)
    video.release()
    result = run_alone(tmp_path, exported["fixed"], "--camera", tmp_path / "line.avi", "--precision", "default")
    assert result.returncode == 0, result.stderr
    assert list(printed(result.stdout)) == ["frame_000000.png", "frame_000001.png"]


def test_bad_input_is_refused_with_a_reason(exported: dict[str, Path], images: Path, tmp_path: Path) -> None:
    before = {path: path.read_bytes() for path in images.rglob("*.png")}
    (tmp_path / "empty").mkdir()
    cases = {
        ("nothing.xml", images): "nothing.xml cannot be used",
        (exported["any"], tmp_path / "empty"): "there are no images",
        (exported["any"],): "give either images or a --camera",
        (exported["any"], images, "--output", images): "the images' own folder",
        (exported["any"], images, "--output", images / "overlays"): "the images' own folder",
        (exported["any"], "--camera", "99"): "camera 99 cannot be opened",
    }
    for arguments, message in cases.items():
        result = run_alone(tmp_path, *arguments)
        assert result.returncode != 0, arguments
        assert message in result.stderr
    assert {path: path.read_bytes() for path in images.rglob("*.png")} == before


@pytest.mark.parametrize("model", ["any", "torch"])
def test_anomalibs_inferencers(
    model: str, exported: dict[str, Path], images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRUST_REMOTE_CODE", "1")
    command = [sys.executable, str(EXAMPLES / "anomalib_inferencers.py"), str(exported[model]), str(images)]
    result = subprocess.run(command, check=True, capture_output=True, text=True, cwd=tmp_path)
    lines = re.findall(r"^(.*): score ([\d.]+), (?:normal|anomalous)$", result.stdout, re.M)
    alone = printed(run_alone(tmp_path, exported["any"], images).stdout)
    assert {Path(path).name: float(score) for path, score in lines} == pytest.approx(
        {name: score for name, (score, _) in alone.items()}, abs=2e-3
    )
