# Copyright (C) 2026 The anomalib-pedenet authors
# SPDX-License-Identifier: Apache-2.0

"""A region of interest in trainings, checkpoints and exports: what lies outside of it changes nothing."""

import shutil
from pathlib import Path

import numpy as np
import onnxruntime
import openvino
import pytest
import torch
from anomalib.data import MVTecAD
from anomalib.engine import Engine
from PIL import Image

from anomalib_pedenet import Pedenet
from tests.integration.trainings import SMALL

SIZE = (144, 160)  # of the images
MIDDLE = 80


def paint(file: Path, visible: np.ndarray | None = None) -> Path:
    """Write a mask of the left half, or another one."""
    if visible is None:
        visible = np.zeros(SIZE)
        visible[:, :MIDDLE] = 255
    Image.fromarray(visible.astype(np.uint8)).save(file)
    return file


def data(root: Path) -> MVTecAD:
    return MVTecAD(root=root, category="stripes", train_batch_size=3, eval_batch_size=2, num_workers=0)


@pytest.fixture(scope="module")
def other_root(dataset_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same data with noise in the right halves of all images."""
    root = tmp_path_factory.mktemp("other") / "data"
    shutil.copytree(dataset_root, root)
    generator = np.random.default_rng(1)
    for file in sorted(root.glob("stripes/t*/*/*.png")):
        image = np.array(Image.open(file))
        image[:, MIDDLE:] = generator.integers(0, 256, image[:, MIDDLE:].shape)
        Image.fromarray(image).save(file)
    return root


def train(root: Path, folder: Path, roi: str | Path | None) -> tuple[Pedenet, Engine, MVTecAD]:
    model = Pedenet(**SMALL, max_steps=12, seed=0, roi=roi)
    engine = Engine(default_root_dir=folder, accelerator="cpu", devices=1, logger=False)
    datamodule = data(root)
    engine.fit(model, datamodule)
    return model, engine, datamodule


def test_what_is_hidden_changes_neither_training_nor_scores_nor_exports(
    dataset_root: Path, other_root: Path, tmp_path: Path
) -> None:
    roi = paint(tmp_path / "roi.png")
    results = []
    for root in (dataset_root, other_root):
        model, engine, datamodule = train(root, tmp_path / root.parent.name / "run", roi)
        found = engine.predict(model, datamodule=datamodule)
        assert found is not None
        results.append((model, torch.cat([batch.anomaly_map for batch in found])))
    (model, maps), (other, other_maps) = results
    for name, value in model.state_dict().items():
        if not name.startswith("post_processor."):  # the masks of defects are hidden in no data set
            assert torch.equal(value, other.state_dict()[name]), name
    thresholds = [part.post_processor.image_threshold for part in (model, other)]
    assert torch.equal(*thresholds)
    assert torch.equal(maps, other_maps)
    assert maps[..., : SMALL["image_size"][1] // 2 - 2].gt(0).all()
    assert maps[..., SMALL["image_size"][1] // 2 :].eq(0).all()

    file = model.to_onnx(tmp_path, verbose=False)
    session = onnxruntime.InferenceSession(file)
    compiled = openvino.compile_model(file, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    images = torch.rand(2, 3, *SIZE)
    changed = torch.where(torch.arange(SIZE[1]) < MIDDLE, images, torch.rand_like(images))
    expected = model.eval()(images).anomaly_map.numpy()
    for run in (
        lambda batch: session.run(["anomaly_map"], {"input": batch})[0],
        lambda batch: compiled(batch)["anomaly_map"],
    ):
        found_map = run(images.numpy())
        np.testing.assert_allclose(found_map, expected, atol=1e-4)
        np.testing.assert_array_equal(run(changed.numpy()), found_map)


def test_a_checkpoint_keeps_its_region_without_the_file(dataset_root: Path, tmp_path: Path) -> None:
    roi = paint(tmp_path / "roi.png")
    model, engine, datamodule = train(dataset_root, tmp_path, str(roi))
    roi.unlink()
    path = engine.best_model_path
    assert path
    loaded = Pedenet.load_from_checkpoint(path)
    assert torch.equal(loaded.model.region.visible, model.model.region.visible)
    again = Engine(default_root_dir=tmp_path, accelerator="cpu", devices=1, logger=False)
    assert again.test(Pedenet(**SMALL), datamodule=datamodule, ckpt_path=path) == engine.test(
        model, datamodule=datamodule
    )


def test_another_region_is_for_a_memory_bank_that_is_built_anew(dataset_root: Path, tmp_path: Path) -> None:
    _, engine, _ = train(dataset_root, tmp_path, None)
    path = engine.best_model_path
    roi = paint(tmp_path / "roi.png")
    model = Pedenet(**SMALL, roi=roi)
    again = Engine(default_root_dir=tmp_path, accelerator="cpu", devices=1, logger=False)
    found = again.predict(model, datamodule=data(dataset_root), ckpt_path=path)
    assert found is not None
    assert found[0].anomaly_map[..., SMALL["image_size"][1] // 2 :].eq(0).all()
    assert model.model.region.visible.mean() < 0.6


def test_a_region_of_another_size_is_refused_before_training(dataset_root: Path, tmp_path: Path) -> None:
    roi = paint(tmp_path / "roi.png", np.full((77, 88), 255))
    with pytest.raises(ValueError, match=r"77x88 px .* but the images have 144x160") as error:
        train(dataset_root, tmp_path, roi)
    assert str(roi) in str(error.value)


def test_a_background_that_is_not_there_is_not_found(
    dataset_root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, _, _ = train(dataset_root, tmp_path, "auto")
    assert model.model.region.is_everywhere
    assert "is all of the images" in caplog.text
