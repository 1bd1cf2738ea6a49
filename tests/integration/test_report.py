# Copyright (C) 2026 The anomalib-pedenet authors
# SPDX-License-Identifier: Apache-2.0

"""The page of results says what was measured, and the files of methods name what can be made."""

import importlib
import json
from pathlib import Path
from types import ModuleType

import anomalib
import numpy as np
import pandas as pd
import pytest
import yaml
from anomalib.models import get_model

from anomalib_pedenet import Pedenet
from anomalib_pedenet.argument_checks import changes, check_changes

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
FILES = sorted(BENCHMARKS.glob("*.yaml"))


@pytest.fixture
def report(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("report")


def make_rows(report: ModuleType) -> pd.DataFrame:
    """Return rows of two methods on two sets, with two seeds on one of them."""
    figures = {"image_AUROC": 0.9, "pixel_AUPRO": 0.9, "table": "methods", "image_size": "256x256", "data": "sets.yaml"}
    figures |= {**dict.fromkeys(report.COSTS, 1e6), "note": "", "hardware": "A", "anomalib": 1, "torch": 2, "python": 3}
    values = [("bottle", "A", 0, 0.8), ("bottle", "A", 1, 0.6), ("bottle", "Pedenet", 0, 0.5), ("brick", "A", 0, 0.1)]
    values += [("c", "Pedenet", 0, 1.0), ("c", "A", 0, 0.9)]
    names = ["category", "method", "seed", "pixel_AUROC"]
    return pd.DataFrame([{**dict(zip(names, value, strict=True)), **figures} for value in values])


def test_a_table_has_the_means_and_the_worst_of_what_all_methods_share(report: ModuleType) -> None:
    rows = make_rows(report)
    kinds = {"bottle": "aligned", "c": "loose"}
    lines = report.metric_table(rows.assign(kind=rows["category"].map(kinds)), "pixel_AUROC").splitlines()
    assert lines[0] == "| set | kind | A | Pedenet |"
    assert lines[2:] == [
        "| bottle | aligned | 0.700 ± 0.141 | 0.500 |",
        "| brick |  | 0.100 |  |",
        "| c | loose | 0.900 | 1.000 |",
        "| **mean of 2** |  | 0.800 | 0.750 |",
        "| **worst of 2** |  | 0.700 | 0.500 |",
    ]
    assert "kind" not in report.metric_table(rows, "pixel_AUROC")
    published = pd.DataFrame(
        [("Other", "pixel_AUROC", "bottle", 0.975), ("Other", "pixel_AUROC", "all", 0.9)],
        columns=["method", "metric", "category", "value"],
    )
    beside = report.published_table(rows, "pixel_AUROC", published)
    assert beside.splitlines()[2:] == ["| bottle | 0.500 | 0.975 |"]  # an average of all is none of one
    ranked = rows.assign(drawn_pixel_AUROC=[0.3, 0.2, 0.1, 0.5, 0.1, 0.2])
    assert report.drawn_table(ranked).splitlines()[2:] == [
        "| bottle | 1.000 | 3 |",
        "| brick |  | 1 |",
        "| c | -1.000 | 2 |",
    ]


def test_a_difference_of_methods_has_its_interval(report: ModuleType) -> None:
    """Pairs of a seed are compared. With two, Student's t is 12.71, and the standard error half their distance."""
    values = [("a", "X", 0, 0.7), ("a", "Y", 0, 0.6), ("a", "X", 1, 0.8), ("a", "Y", 1, 0.5)]
    values += [("b", "X", 0, 0.9), ("b", "Y", 0, 0.8), ("b", "X", 1, 0.2)]
    rows = pd.DataFrame(values, columns=["category", "method", "seed", "pixel_AUROC"]).assign(image_AUROC=0.5)
    rows[["pixel_AUPRO", "pixel_F1Max"]] = np.nan
    assert report.difference_table(rows, "X", "Y").splitlines() == [
        "| set | Pixel AUROC | Image AUROC |",
        "|---|---|---|",
        "| a | +0.200 (-1.071 to +1.471) | +0.000 (+0.000 to +0.000) |",
        "| b | +0.100 | +0.000 |",
        "| **all 2** | +0.150 (-0.485 to +0.785) | +0.000 (+0.000 to +0.000) |",
    ]
    assert report.difference_table(rows, "X", "Z") is None


def test_location_prediction_alone_is_ours_on_the_sets_of_other_losses(report: ModuleType) -> None:
    rows = make_rows(report)
    joint = rows[rows["category"] == "c"].head(1).assign(method=report.JOINT, table="losses", pixel_AUROC=0.75)
    losses = report.losses_of(pd.concat([rows, joint]))
    found = losses[["category", "method", "pixel_AUROC"]].to_numpy().tolist()
    assert found == [["c", report.ALONE, 1.0], ["c", report.JOINT, 0.75]]
    assert report.losses_of(rows).empty


def test_a_page_shows_what_there_is(report: ModuleType, tmp_path: Path) -> None:
    """Without maps and curves it has none; with them it has, but of images that are not free to publish."""
    rows, out, docs = make_rows(report), tmp_path / "out", tmp_path / "docs"
    (out / "runs").mkdir(parents=True)
    docs.mkdir()
    rows.to_csv(out / "results.csv", index=False)
    page = report.render(out).read_text(encoding="utf-8")
    assert "accuracy_by_cost.png" in page
    assert "make bench-accuracy SETS=<folder>/sets.yaml SEEDS=0,1\n" in page
    assert "Fewer seeds: A on brick 1; A on c 1; Pedenet 1 on each set." in page
    assert not any(part in page for part in ("heatmaps", "by_time", "Table 4", "Drawn defects"))

    rows.drop(columns=["pixel_AUROC", "image_AUROC", "pixel_AUPRO", "train_seconds"]).to_csv(out / "results.csv")
    assert "| A | 256x256 | 1.00 | 1.0 | 0.00 | 1000000 |  |" in report.render(out).read_text(encoding="utf-8")

    rows.to_csv(out / "results.csv", index=False)
    square = np.zeros((8, 8), dtype=bool)
    square[2:5, 2:5] = True
    maps = {"image_0": np.zeros((8, 8, 3), dtype=np.uint8), "mask_0": square, "map_0": square / 2, "outline_0": square}
    curve = [{"step": step, "seconds": 10.0 * step, "val_pixel_AUROC": 0.9} for step in (1, 2)]
    for name in ("brick-A-0", "bottle-A-0"):
        np.savez_compressed(out / "runs" / f"{name}.npz", **maps)
        (out / "runs" / f"{name}.json").write_text(json.dumps({"curve": curve}), encoding="utf-8")
    pages = report.render(out).read_text(encoding="utf-8"), report.render(out, docs).read_text(encoding="utf-8")
    assert all("accuracy_by_time.png" in page and "heatmaps_brick.png" in page for page in pages)
    assert ["heatmaps_bottle.png" in page for page in pages] == [True, False]
    assert (docs / "images" / "results" / "heatmaps_brick.png").stat().st_size > 1000
    assert not (docs / "images" / "results" / "heatmaps_bottle.png").exists()


def test_the_page_of_results_is_what_was_measured(report: ModuleType, tmp_path: Path) -> None:
    page = BENCHMARKS.parent / "docs" / "results.md"
    text = page.read_text(encoding="utf-8")
    assert report.render(BENCHMARKS / "measured", tmp_path).read_text(encoding="utf-8") == text
    for line in text.splitlines():
        if line.startswith("!["):
            assert (page.parent / line.split("](")[1].rstrip(")")).stat().st_size > 5000


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


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_method_can_be_made_without_a_download(
    path: Path, report: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    del report  # makes the benchmarks importable
    runs, peers = importlib.import_module("runs"), importlib.import_module("peers")

    def refuse(*args: object, **kwargs: object) -> None:
        pytest.fail(f"A download was tried: {args}, {kwargs}")

    for name in ("torch.hub", "timm.models._hub"):
        module = importlib.import_module(name)
        for function in ("load_state_dict_from_url", "download_url_to_file", "load_state_dict_from_hf"):
            if hasattr(module, function):
                monkeypatch.setattr(module, function, refuse)
    methods = runs.read_methods(path)
    defaults = Pedenet().hparams
    for name, method in methods.items():
        assert method["table"] in {"methods", "losses"}
        arguments = method["model"].get("init_args", {})
        if method.get("cost_only"):
            model = peers.without_weights(runs.class_of(method["model"]), arguments)
        else:
            model = get_model(method["model"])
        assert type(model).__name__ == method["model"]["class_path"]
        if "weights_of" in method:  # what cannot be changed for a checkpoint is no way of scoring it
            assert method["weights_of"] in methods
            asked = changes(model.hparams, defaults)
            assert asked, name
            check_changes(asked, model.hparams, defaults, "evaluate")
    assert yaml.safe_load(path.read_text(encoding="utf-8")).keys() == methods.keys()
