# Copyright (C) 2026 The anomalib-pedenet authors
# SPDX-License-Identifier: Apache-2.0

"""The reproduction runs from the command line, goes on where it was killed, and writes what it measured."""

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import anomalib
import pandas as pd
import pytest
import torch
import yaml
from anomalib.models import Pedenet, get_model

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
ALL_METHODS = yaml.safe_load((BENCHMARKS / "methods.yaml").read_text(encoding="utf-8"))
TINY = {"max_steps": 2, "crops_per_step": 1, "bank_size": 300}
METHODS = {
    "Pedenet": {"table": "methods", "model": {"class_path": "Pedenet", "init_args": TINY}},
    "PaDiM, random weights": {
        "table": "methods",
        "model": {"class_path": "Padim", "init_args": {"pre_trained": False, "n_features": 10}},
    },
    "STFPM, cost only": {
        "table": "methods",
        "cost_only": True,
        "image_size": [96, 128],
        "note": "Built with random weights.",
        "model": {"class_path": "Stfpm"},
    },
    "GANomaly, 1 epoch": {
        "table": "methods",
        "trainer": {"max_epochs": 1},
        "image_size": [64, 64],
        "model": {"class_path": "Ganomaly", "init_args": {"n_features": 4, "latent_vec_size": 8}},
    },
    "L_LPN alone": {
        "table": "losses",
        "model": {"class_path": "Pedenet", "init_args": {**TINY, "lambda_syn": 0.0, "lambda_den": 0.0}},
    },
}
METRICS = ["pixel_AUROC", "image_AUROC", "pixel_AUPRO", "pixel_F1Max"]


@pytest.fixture
def reproduce(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("reproduce")


@pytest.fixture
def report(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("report")


def command(dataset_root: Path, folder: Path, methods: dict[str, object], *options: str) -> list[str]:
    data = {
        "class_path": "anomalib.data.MVTecAD",
        "init_args": {"root": str(dataset_root), "category": "stripes", "train_batch_size": 3, "num_workers": 0},
    }
    (folder / "data.yaml").write_text(yaml.safe_dump(data), encoding="utf-8")
    (folder / "methods.yaml").write_text(yaml.safe_dump(methods, sort_keys=False), encoding="utf-8")
    files = ["--data", str(folder / "data.yaml"), "--methods_file", str(folder / "methods.yaml")]
    script = str(BENCHMARKS / "reproduce.py")
    return [sys.executable, script, *files, "--image_size", "144,160", "--output", str(folder / "out"), *options]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONWARNINGS": "ignore"}


def pictures(page: Path) -> list[str]:
    """Return the pictures that a page shows, all of which are there."""
    lines = page.read_text(encoding="utf-8").splitlines()
    names = [line.split("](")[1].rstrip(")") for line in lines if line.startswith("![")]
    for name in names:
        assert (page.parent / name).stat().st_size > 5000
    return names


def test_tables_and_figures_of_all_methods(dataset_root: Path, tmp_path: Path, report: ModuleType) -> None:
    arguments = command(dataset_root, tmp_path, METHODS, "--curve", "--checkpoints")
    subprocess.run(arguments, check=True, capture_output=True, env=environment())
    out = tmp_path / "out"
    rows = pd.read_csv(out / "results.csv").set_index("method")
    assert list(rows.index) == list(METHODS)
    assert (rows[["latency_ms", "bytes", "multiply_adds"]] > 0).all(axis=None)
    assert rows.loc["Pedenet", "parameters"] == 271_622
    assert rows.loc["STFPM, cost only", [*METRICS, "train_seconds"]].isna().all()
    assert rows.loc["STFPM, cost only", "image_size"] == "96x128"
    # GANomaly tells images alone; the others have everything.
    measured = rows.drop(index="STFPM, cost only")
    assert (measured["train_seconds"] > 0).all()
    assert measured["image_AUROC"].between(0, 1).all()
    assert measured.drop(index="GANomaly, 1 epoch")[METRICS].stack().between(0, 1).all()
    assert measured.loc["PaDiM, random weights", "pixel_AUROC"] > 0.6  # 0.5 if scores lost their order
    assert measured.loc["GANomaly, 1 epoch", ["pixel_AUROC", "pixel_AUPRO", "pixel_F1Max"]].isna().all()

    curve = json.loads((out / "runs" / "stripes-Pedenet-0.json").read_text(encoding="utf-8"))["curve"]
    assert curve[-1]["step"] == TINY["max_steps"]
    assert curve[-1]["val_pixel_AUROC"] == pytest.approx(rows.loc["Pedenet", "pixel_AUROC"], abs=1e-4)
    assert 0 < curve[-1]["seconds"] <= rows.loc["Pedenet", "train_seconds"] + 0.1

    kept = Pedenet.load_from_checkpoint(out / "runs" / "stripes-Pedenet-0.ckpt")
    assert kept.model.is_fitted
    assert tuple(kept.hparams.image_size) == (144, 160)

    text = (out / "results.md").read_text(encoding="utf-8")
    assert f"| stripes | {rows.loc['Pedenet', 'pixel_AUROC']:.3f} |" in text
    assert f"| STFPM, cost only | {rows.loc['STFPM, cost only', 'parameters'] / 1e6:.2f} M |" in text
    assert "- Built with random weights." in text
    assert "Generated by `make reproduce`" in text
    shown = pictures(out / "results.md")
    assert {"heatmaps_stripes.png", "embeddings.png", "accuracy_by_time.png", "losses.png"} <= set(shown)

    # The page of the documentation is the same, but for images of data sets that are not the demo's.
    (tmp_path / "docs").mkdir()
    report.main([str(out), "--docs", str(tmp_path / "docs")])
    published = pictures(tmp_path / "docs" / "results.md")
    assert published == [f"images/results/{name}" for name in shown if not name.startswith("heatmaps")]
    for file in (out / "runs").glob("stripes-*"):
        file.rename(file.with_name(file.name.replace("stripes", "brick")))
    rows.reset_index().assign(category="brick").to_csv(out / "results.csv", index=False)
    report.main([str(out), "--docs", str(tmp_path / "docs")])
    assert "images/results/heatmaps_brick.png" in pictures(tmp_path / "docs" / "results.md")


def test_the_page_of_results_is_what_was_measured(report: ModuleType, tmp_path: Path) -> None:
    """All of its words and tables; pictures need maps, which are not kept."""

    def lines(page: Path) -> list[str]:
        text = page.read_text(encoding="utf-8").splitlines()
        return [line for line in text if line and not line.startswith("![")]

    (tmp_path / "docs").mkdir()
    measured = lines(report.render(BENCHMARKS / "measured", tmp_path / "docs"))
    page = BENCHMARKS.parent / "docs" / "results.md"
    assert [line for line in lines(page) if line in measured] == measured
    assert pictures(page)
    rows = pd.read_csv(BENCHMARKS / "measured" / "results.csv")
    files = (BENCHMARKS / "measured" / "runs").glob("*.json")
    runs = {file.stem: json.loads(file.read_text(encoding="utf-8")) for file in files}
    assert len(rows) == len(runs)
    for row in rows.to_dict("records"):
        for name, value in runs[report.run_name(row)].items():
            if name != "curve" and value != "":
                assert row[name] == value, (report.run_name(row), name)


def test_a_run_without_what_is_asked_for_is_repeated(dataset_root: Path, tmp_path: Path, reproduce: ModuleType) -> None:
    command(dataset_root, tmp_path, {"Pedenet": METHODS["Pedenet"]})  # writes the files of data and methods
    arguments = {
        "methods_file": tmp_path / "methods.yaml",
        "data": tmp_path / "data.yaml",
        "output": tmp_path,
        "accelerator": "cpu",
        "image_size": [144, 160],
        "seeds": [0],
        **dict.fromkeys(("methods", "categories", "root")),
    }

    def jobs(curve: bool, checkpoints: bool = False) -> list[object]:
        wanted = {**arguments, "curve": curve, "checkpoints": checkpoints}
        return list(reproduce.ReproduceJobGenerator().generate_jobs(wanted, None))

    (job,) = jobs(curve=False)
    file = tmp_path / "runs" / f"{reproduce.run_name(job.key)}.json"
    file.write_text(json.dumps({**job.key, "curve": []}), encoding="utf-8")
    assert len(jobs(curve=False)) == 0
    assert len(jobs(curve=True)) == 1
    file.write_text(json.dumps({**job.key, "curve": [{"step": 2}]}), encoding="utf-8")
    assert len(jobs(curve=False)) == len(jobs(curve=True)) == 0
    assert len(jobs(curve=True, checkpoints=True)) == 1
    file.with_suffix(".ckpt").touch()
    assert len(jobs(curve=True, checkpoints=True)) == 0


def test_a_changed_default_is_another_setting(reproduce: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    before = reproduce.arguments_of({"class_path": "Pedenet", "init_args": {"stride": 4}})
    assert before["stride"] == "4"
    hparams = Pedenet().hparams
    assert before["bank_size"] == repr(hparams.bank_size)
    assert reproduce.arguments_of({"class_path": "Pedenet"})["stride"] == repr(hparams.stride)  # not None

    def changed(self: Pedenet, bank_size: int = 7) -> None:
        del self, bank_size

    monkeypatch.setattr(Pedenet, "__init__", changed)
    assert reproduce.arguments_of({"class_path": "Pedenet"})["bank_size"] == "7"


@pytest.mark.slow
def test_a_killed_reproduction_goes_on_and_repeats_nothing(dataset_root: Path, tmp_path: Path) -> None:
    arguments = command(dataset_root, tmp_path, {"Pedenet": METHODS["Pedenet"]}, "--seeds", "0,1,2")
    runs = tmp_path / "out" / "runs"
    with subprocess.Popen(
        arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment()
    ) as process:
        while not (runs / "stripes-Pedenet-0.json").exists():
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
    before = {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in runs.glob("*.json")}
    assert 0 < len(before) < 3

    said = subprocess.run(arguments, check=True, capture_output=True, text=True, env=environment()).stdout
    assert said.count("finished before") == len(before)
    for name, (modified, content) in before.items():
        assert (runs / name).stat().st_mtime_ns == modified
        assert (runs / name).read_bytes() == content
    assert list(pd.read_csv(tmp_path / "out" / "results.csv")["seed"]) == [0, 1, 2]

    smaller = {"table": "methods", "model": {"class_path": "Pedenet", "init_args": {**TINY, "bank_size": 200}}}
    changed = command(dataset_root, tmp_path, {"Pedenet": smaller}, "--seeds", "0")
    said = subprocess.run(changed, check=True, capture_output=True, text=True, env=environment()).stdout
    assert "finished before" not in said


def test_distances_of_other_models_keep_their_order(reproduce: ModuleType) -> None:
    distances = torch.tensor([0.0, 0.01, 0.5, 0.99, 1.01, 7.0, 40.0, 41.0, 1000.0])
    for threshold in (0.1, 1.0, 30.0):
        normalized = reproduce.DistancePostProcessor._normalize(
            distances, distances.min(), distances.max(), torch.tensor(threshold)
        )
        assert (normalized.diff() > 0).all()
        assert ((normalized > 0.5) == (distances > threshold)).all()
        assert normalized.min() == 0
        assert normalized.max() < 1


def test_an_unknown_method_is_named(dataset_root: Path, tmp_path: Path) -> None:
    arguments = command(dataset_root, tmp_path, METHODS, "--methods", "Pedenet;PaDiN")
    said = subprocess.run(arguments, check=False, capture_output=True, text=True, env=environment())
    assert said.returncode != 0
    assert "Unknown methods PaDiN" in said.stderr


@pytest.mark.parametrize("name", ALL_METHODS)
def test_every_method_is_a_model_and_downloads_nothing(
    name: str, reproduce: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        pytest.fail(f"A download was tried: {args}, {kwargs}")

    for module in ("torch.hub", "timm.models._hub"):
        for function in ("load_state_dict_from_url", "download_url_to_file", "load_state_dict_from_hf"):
            if hasattr(importlib.import_module(module), function):
                monkeypatch.setattr(f"{module}.{function}", refuse)
    method = ALL_METHODS[name]
    assert method["table"] in {"methods", "losses"}
    make = reproduce.without_weights if method.get("cost_only") else get_model
    assert type(make(method["model"])).__name__ == method["model"]["class_path"]


def test_what_the_page_says_of_others_is_what_the_tables_say(report: ModuleType) -> None:
    """Two categories: against one measured method we are ahead on one, and behind a published one on the other."""
    figures = {"image_AUROC": 0.9, "pixel_AUPRO": 0.9, "pixel_F1Max": 0.9, "seed": 0, "image_size": "256x256"}
    cost = dict.fromkeys(report.COSTS, 1e6)
    rows = pd.DataFrame(
        [
            {"category": category, "method": method, "pixel_AUROC": value, **figures, **cost}
            for category, ours, other in (("bottle", 0.95, 0.90), ("tile", 0.80, 0.85))
            for method, value in (("Pedenet", ours), ("Peer", other))
        ]
    )
    published = pd.DataFrame(
        [("Other", "pixel_AUROC", "bottle", 0.975), ("Other", "pixel_AUROC", "all", 0.9)],
        columns=["method", "metric", "category", "value"],
    )
    comparison = report.comparison_table(rows, published).splitlines()
    assert "| Peer | +0.000 | 1 of 2 | +0.000 | 0 of 2 |" in comparison
    assert "| Other (published) | -0.025 | 0 of 1 |  |  |" in comparison
    accuracy, costs = report.losing_tables(rows, published)[1::2]
    assert accuracy.splitlines()[2:] == [
        "| bottle | pixel AUROC | 0.950 | Other (published) 0.975 |",
        "| tile | pixel AUROC | 0.800 | Peer 0.850 |",
    ]
    assert costs == "In none."
    beside = report.published_table(rows, "pixel_AUROC", published)
    assert beside.splitlines()[2:] == ["| bottle | 0.950 | 0.975 |"]  # an average of all is none of two


def test_published_figures_have_the_averages_that_their_sources_print(report: ModuleType) -> None:
    """To half a unit of the last digit, of the figures and of the average."""
    figures = pd.read_csv(BENCHMARKS / "published.csv", dtype={"value": str})
    assert not figures.duplicated(["method", "metric", "category"]).any()
    assert figures["source"].notna().all()
    without_average = set()
    for (method, metric), column in figures.groupby(["method", "metric"], sort=False):
        values = column.set_index("category")["value"]
        known = values.index.intersection(report.GROUPS["all"])
        assert len(known) in {0, 15}, method
        digit = 10.0 ** -min(len(value.partition(".")[2]) for value in values)
        for group, categories in report.GROUPS.items():
            if len(known) and group in values:
                mean = values[list(categories)].astype(float).mean()
                assert mean == pytest.approx(float(values[group]), abs=digit + 1e-9), (method, metric, group)
        if "all" not in values:
            without_average.add((method, metric))
    # The source prints 0.965, which is not the mean of the fifteen figures beside it (0.960): left out.
    assert without_average == {("SPADE", "pixel_AUROC")}


def test_figures_quoted_from_anomalib_are_those_of_its_pages() -> None:
    figures = pd.read_csv(BENCHMARKS / "published.csv", dtype={"value": str})
    quoted = figures[figures["source"].str.startswith("anomalib 2.7.0, ")]
    assert quoted["method"].nunique() == 6
    for source, rows in quoted.groupby("source"):
        page = Path(anomalib.__file__).parent / str(source).removeprefix("anomalib 2.7.0, ")
        if anomalib.__version__ != "2.7.0" or not page.exists():
            pytest.skip("anomalib's pages are those of another version")
        cells = page.read_text(encoding="utf-8").replace("|", " ").split()
        assert set(rows["value"].astype(float)) <= {float(cell) for cell in cells if cell.replace(".", "").isdigit()}
