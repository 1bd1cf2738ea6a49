# Copyright (C) 2026 The anomalib-pedenet authors
# SPDX-License-Identifier: Apache-2.0

"""Memory is bounded: by the size of a strip, of the bank and of a batch, not of the image or the data set.

Each measurement is a process of its own, since the peak of a process never falls. ``python tests/integration/
test_memory.py NAME ARGUMENTS`` prints one in MiB.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import torch
from anomalib.data import Folder
from anomalib.data.utils.tiler import Tiler
from anomalib.engine import Engine
from anomalib.metrics import AUROC, Evaluator, F1Score
from lightning.pytorch import Callback
from PIL import Image

from anomalib_pedenet import Pedenet, PedenetModel
from anomalib_pedenet.scorers.coreset import make_bank_builder

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")


def memory(key: str) -> float:
    """MiB of this process: ``VmRSS`` now, or ``VmHWM`` at its peak so far."""
    found = re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="utf-8"))
    assert found is not None
    return int(found[1]) / 1024


def measure(name: str, *arguments: object, **variables: str) -> Any:  # noqa: ANN401
    """Run one of the measurements below in a fresh process, with one thread and more environment variables."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **variables}
    command = [sys.executable, str(Path(__file__)), name, *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    return json.loads(result.stdout.splitlines()[-1])


def scoring(height: int, width: int, tile_size: int = 0, tile_stride: int = 0, bank_size: int = 1_000) -> float:
    """Peak while one image is scored by the defaults, above what the process takes without it."""
    model = PedenetModel(bank_size=bank_size).eval()
    if tile_size:
        model.tiler = Tiler(tile_size, tile_stride)
    normal = torch.rand(2, 3, 512, 512)
    model.calibrate(normal[..., :256, :256] if not tile_size else normal)
    model.fit([normal])
    image = torch.rand(1, 3, height, width)
    before = memory("VmRSS")
    model(image)
    return memory("VmHWM") - before


def streaming(coreset: str, num_batches: int, batch_size: int, bank_size: int) -> float:
    """Peak while a bank is built of embeddings that stream in, above what the process takes before."""
    import sklearn.cluster  # noqa: F401 - it is a part of what is there before

    builder = make_bank_builder(coreset, bank_size)  # type: ignore[arg-type]
    noise = torch.rand(batch_size + 1_000, 66)
    before = memory("VmRSS")
    for index in range(num_batches):
        builder.update(noise[index % 1_000 :][:batch_size] + index)
    assert builder.build().shape == (bank_size, 66)
    return memory("VmHWM") - before


class Recorder(Callback):
    """Notes the memory after each batch of a test or prediction."""

    def __init__(self) -> None:
        self.megabytes: list[float] = []

    def on_test_batch_end(self, *_: object) -> None:
        self.megabytes.append(memory("VmRSS"))

    on_predict_batch_end = on_test_batch_end


def folder_of(num_images: int, evaluator: str, stage: str) -> list[float]:
    """What a process takes after a fifth of a folder of 64x64 images, after the last one, and at its peak."""
    evaluators = {
        "none": False,
        "default": True,
        "binned": Evaluator(
            test_metrics=[
                AUROC(fields=["pred_score", "gt_label"], prefix="image_"),
                AUROC(fields=["anomaly_map", "gt_mask"], prefix="pixel_", thresholds=200),
                F1Score(fields=["pred_mask", "gt_mask"], prefix="pixel_"),
            ]
        ),
    }
    with TemporaryDirectory() as folder:
        root = Path(folder)
        for name in ("train", "test", "defect", "mask"):
            (root / name).mkdir()
            pixels = np.random.default_rng(0).integers(0, 255, (64, 64, 3)).astype(np.uint8)
            Image.fromarray(pixels if name != "mask" else pixels[..., 0] // 250 * 255).save(root / name / "0000.png")
            count = {"train": 4, "test": num_images * 10 // 9 - 10}.get(name, 10)
            for index in range(1, count):
                (root / name / f"{index:04}.png").hardlink_to(root / name / "0000.png")
        datamodule = Folder(
            name="many",
            root=root,
            normal_dir="train",
            normal_test_dir="test",
            abnormal_dir="defect",
            mask_dir="mask",
            val_split_mode="from_test",
            val_split_ratio=0.1,
            eval_batch_size=16,
            num_workers=0,
        )
        model = Pedenet(
            image_size=(64, 64),
            patch_sizes=[32],
            crop_size=64,
            max_steps=2,
            bank_size=200,
            evaluator=evaluators[evaluator],
            visualizer=False,
        )
        recorder = Recorder()
        engine = Engine(default_root_dir=root, callbacks=[recorder], enable_progress_bar=False)
        engine.fit(model, datamodule=datamodule)
        datamodule.setup()
        if stage == "test":
            engine.test(model, datamodule=datamodule)
        else:
            engine.predict(model, dataloaders=datamodule.test_dataloader(), return_predictions=stage == "predictions")
    assert len(recorder.megabytes) == -(-len(datamodule.test_data) // 16)
    return [recorder.megabytes[len(recorder.megabytes) // 5], recorder.megabytes[-1], memory("VmHWM")]


@pytest.mark.parametrize(
    ("height", "width", "limit"),
    [(1500, 2000, 600), pytest.param(3000, 4000, 1300, marks=pytest.mark.slow)],
)
def test_scoring_a_large_image_takes_no_more_than_strips_and_maps(height: int, width: int, limit: float) -> None:
    """Of the whole image, the two feature maps of 128 channels that are alive at once would take more than that."""
    assert 2 * (height / 2) * (width / 2) * 128 * 4 / 2**20 > limit
    assert measure("scoring", height, width) < limit


@pytest.mark.parametrize(
    ("coreset", "num_batches"),
    [
        ("uniform", 1_000),
        ("k_means", 1_000),
        *(pytest.param(name, 20_000, marks=pytest.mark.slow) for name in ("uniform", "k_center", "k_means")),
    ],
)
def test_a_bank_takes_the_same_memory_whatever_streams_in(coreset: str, num_batches: int) -> None:
    """Of 20,000 images' 784 patches, all embeddings would take 3,948 MiB; of 1,000, 197 MiB."""
    assert measure("streaming", coreset, num_batches, 784, 1_000) < 100


@pytest.mark.slow
@pytest.mark.parametrize(("evaluator", "stage"), [("none", "test"), ("none", "predict"), ("binned", "test")])
def test_testing_5000_images_takes_no_more_than_1000(evaluator: str, stage: str) -> None:
    """The maps alone of 4,000 images of 64x64 would take 62 MiB, with the images 250 MiB."""
    # glibc's threshold for large blocks, at its default but fixed: where it adapts, freed images leave holes below the
    # small tensors that metrics keep, and a process sometimes grows though it holds nothing.
    fixed = {"MALLOC_MMAP_THRESHOLD_": "131072"}
    after_1000, after_5000, _ = measure("folder_of", 5_000, evaluator, stage, **fixed)
    assert after_5000 - after_1000 < 30


if __name__ == "__main__":
    given = [int(value) if value.isdigit() else value for value in sys.argv[2:]]
    print(json.dumps(globals()[sys.argv[1]](*given)))
