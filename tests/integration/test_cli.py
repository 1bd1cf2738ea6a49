# Copyright (C) 2026 The anomalib-pedenet authors
# SPDX-License-Identifier: Apache-2.0

"""anomalib's own command line, from training to export, and its benchmark."""

import shutil
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml
from anomalib.cli import AnomalibCLI
from anomalib.pipelines.benchmark.generator import BenchmarkJobGenerator

CONFIGS = Path(__file__).parents[2] / "configs"
SHORT = ["--model.max_steps", "4", "--model.bank_size", "500"]


@pytest.fixture
def data(dataset_root: Path) -> list[str]:
    options = "--data MVTecAD --data.category stripes --data.train_batch_size 2 --data.num_workers 0"
    return [*options.split(), "--data.root", str(dataset_root)]


def test_train_test_predict_export(
    data: list[str],
    dataset_root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    model = ["--model", "Pedenet", "--trainer.enable_progress_bar", "false"]
    # The checkpoint carries the image size to the later commands.
    AnomalibCLI(["train", *model, *SHORT, "--model.image_size", "[144,160]", *data])
    assert "pixel_AUROC" in capsys.readouterr().out
    (checkpoint,) = tmp_path.rglob("latest/weights/lightning/model.ckpt")
    checkpoint = shutil.copy(checkpoint, tmp_path / "model.ckpt")
    from_checkpoint = ["--ckpt_path", str(checkpoint)]

    AnomalibCLI(["test", *model, *data, *from_checkpoint])
    assert "pixel_AUROC" in capsys.readouterr().out

    AnomalibCLI(["predict", *model, "--data", str(dataset_root / "stripes/test"), *from_checkpoint])
    pictures = [path for path in tmp_path.rglob("*.png") if "images" in path.parts and "Pedenet/latest" in str(path)]
    assert len(pictures) == 6

    AnomalibCLI(["export", "--model", "Pedenet", *from_checkpoint, "--export_type", "torch", "--export_root", "export"])
    (exported,) = tmp_path.glob("export/**/*.pt")
    scores = torch.load(exported, weights_only=False)["model"](torch.rand(1, 3, 144, 160))
    assert scores.anomaly_map.shape[-2:] == (144, 160)


def test_the_same_seed_gives_the_same_result(
    data: list[str], dataset_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["--model", "Pedenet", "--trainer.enable_progress_bar", "false", *SHORT, *data]
    saved = []
    for run, seed in enumerate((5, 5)):
        folder = tmp_path / str(run)
        folder.mkdir()
        monkeypatch.chdir(folder)
        AnomalibCLI(["train", *arguments, "--model.image_size", "[112,128]", "--model.seed", str(seed)])
        (checkpoint,) = folder.rglob("latest/weights/lightning/model.ckpt")
        saved.append(torch.load(checkpoint, weights_only=True))
    first, second = (checkpoint["state_dict"] for checkpoint in saved)
    tensors = [name for name, value in first.items() if isinstance(value, torch.Tensor)]
    assert any(name.endswith("whitening") for name in tensors)
    assert "post_processor._pixel_threshold" in tensors
    for name in tensors:
        assert first[name].numpy().tobytes() == second[name].numpy().tobytes(), name

    # What the result came from stands in the checkpoint.
    origin = saved[1]["pedenet_origin"]
    assert set(origin["versions"]) >= {"anomalib-pedenet", "anomalib", "torch", "lightning", "python"}
    assert origin["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert origin["trainer"]["max_steps"] == -1
    assert origin["data"]["train_batch_size"] == 2
    assert origin["data"]["root"] == str(dataset_root)
    given = dict(saved[1]["hyper_parameters"])
    assert (given["max_steps"], given["seed"]) == (4, 5)
    assert tuple(given["image_size"]) == (112, 128)
    assert set(given) >= {"bank_seed", "lambda_den", "covariance_jitter", "train_precision"}


def test_training_without_defective_images_keeps_the_best_epoch(
    dataset_root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    options = ["--data.root", str(dataset_root / "stripes"), "--data.num_workers", "0", "--data.train_batch_size", "2"]
    options += ["--data.test_split_ratio", "0.2", "--model.holdout", "0.25"]  # of six images
    AnomalibCLI(["train", "--config", str(CONFIGS / "label_free.yaml"), *SHORT, *options])
    (checkpoint,) = tmp_path.rglob("model.ckpt")
    states = torch.load(checkpoint, weights_only=True)["callbacks"].values()
    (best,) = [state for state in states if state.get("monitor") == "drawn_pixel_AUROC" and "best_model_path" in state]
    assert Path(best["best_model_path"]).name == "model.ckpt"
    assert 0 <= best["best_model_score"] <= 1


def test_the_benchmark_configuration_makes_jobs_that_fit_into_one_table() -> None:
    config = yaml.safe_load((CONFIGS / "benchmark" / "mvtec_ad.yaml").read_text(encoding="utf-8"))
    jobs = list(BenchmarkJobGenerator("cpu").generate_jobs(config["benchmark"], None))
    assert [job.model.name for job in jobs] == ["Pedenet", "Padim", "Patchcore"]
    # anomalib's table wants the same columns of every job.
    assert len({tuple(job.flat_cfg) for job in jobs}) == 1


def test_benchmark_writes_its_table(dataset_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = yaml.safe_load((CONFIGS / "benchmark" / "mvtec_ad.yaml").read_text(encoding="utf-8"))
    model, data = config["benchmark"]["model"], config["benchmark"]["data"]
    model["class_path"] = "Pedenet"
    model["init_args"].update(max_steps={"grid": [2, 4]}, bank_size=500)
    data["init_args"].update(root=str(dataset_root), category="stripes", train_batch_size=2, num_workers=0)
    monkeypatch.chdir(tmp_path)
    Path("benchmark.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    AnomalibCLI(["benchmark", "--config", "benchmark.yaml"])
    (path,) = tmp_path.glob("runs/benchmark/*/results.csv")
    results = pd.read_csv(path)
    assert list(results["model.init_args.max_steps"]) == [2, 4]
    assert results["pixel_AUROC"].between(0, 1).all()
