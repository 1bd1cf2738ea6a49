# Copyright (C) 2026 The anomalib-pedenet authors
# SPDX-License-Identifier: Apache-2.0

"""Render what :mod:`accuracy` has measured as one page, ``results.md``: tables, pictures and published figures.

The page beside the runs shows images of the data set. Those of MVTec AD and KolektorSDD may not be published here, so
``--docs`` writes the page of the documentation with plots, and images of the demo's data set alone.

Example:
    ``python benchmarks/report.py benchmarks/measured --docs docs``
"""

import argparse
import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pandas as pd
import yaml
from common import markdown, run_name
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from scipy import stats

PUBLISHED = Path(__file__).with_name("published.csv")
CONFIGS = Path(__file__).parents[1] / "configs" / "data"
FREE_CATEGORIES = ("brick", "grass", "gravel")
"""Categories of the demo's data set, whose images are in the public domain (CC0)."""

OURS = "Pedenet"
OBJECTS = ("bottle", "cable", "capsule", "hazelnut", "metal_nut", "pill", "screw", "toothbrush", "transistor", "zipper")
TEXTURES = ("carpet", "grid", "leather", "tile", "wood")
GROUPS = {"objects": OBJECTS, "textures": TEXTURES, "all": OBJECTS + TEXTURES}
"""MVTec AD's categories, and the averages of them that are published."""

METRICS = {
    "pixel_AUROC": "Pixel AUROC",
    "image_AUROC": "Image AUROC",
    "pixel_AUPRO": "Pixel AUPRO",
    "pixel_F1Max": "Pixel F1 at the best threshold",
}
COSTS = {
    "parameters": ("parameters, M", 1e6, "{:.2f}"),
    "bytes": ("state, MB", 1e6, "{:.1f}"),
    "multiply_adds": ("multiply-adds, G", 1e9, "{:.2f}"),
    "latency_ms": ("ms per image, torch", 1, "{:.0f}"),
    "train_seconds": ("training, s", 1, "{:.0f}"),
}

INTRODUCTION = (
    "Nothing here is typed. Mean, and standard deviation over the seeds, of anomalib's metrics on all test images."
)
JOINT, ALONE = "L_DEN and L_LPN", "L_LPN alone"
LOSSES = (
    "Trainings by the defaults, which of the paper's losses have L_LPN alone (beside drawn defects and the variance "
    "loss); with L_DEN added, at the weight 1e-4; and with L_DEN in its place, without drawn defects. All are scored "
    "by the defaults. Published averages over MVTec AD's fifteen categories (arXiv:2110.15525): L_DEN 0.810, L_LPN "
    "0.894, both 0.959."
)
DIFFERENCES = (
    f"*{JOINT}* less *{ALONE}*, and the 95 % interval of the mean (Student's t): of a set over the seeds, of all over "
    "the sets' means."
)
PUBLISHED_BY = (
    "Figures of the methods' authors or of anomalib, with pre-trained backbones where they have them; "
    "`benchmarks/published.csv` has the source of each. Averages are those that the sources print."
)


def mean_and_deviation(values: pd.Series) -> str:
    """Return the mean, and the standard deviation over several seeds."""
    return f"{values.mean():.3f}" + (f" ± {values.std():.3f}" if len(values) > 1 else "")


def metric_table(rows: pd.DataFrame, metric: str) -> str:
    """Return a metric, sets by methods, then the mean and the worst over the sets that all methods share."""
    rows = rows.dropna(subset=[metric])
    groups = rows.groupby(["category", "method"], sort=False)[metric]
    means = groups.mean().unstack().reindex(index=rows["category"].unique(), columns=rows["method"].unique())
    table = groups.apply(mean_and_deviation).unstack().reindex_like(means)
    shared = means.dropna()
    if len(shared) > 1:
        table.loc[f"**mean of {len(shared)}**"] = shared.mean().map("{:.3f}".format)
        table.loc[f"**worst of {len(shared)}**"] = shared.min().map("{:.3f}".format)
    if "kind" in rows and rows["kind"].notna().any():
        table.insert(0, "kind", rows.drop_duplicates("category").set_index("category")["kind"].reindex(table.index))
    return markdown(table.fillna("").rename_axis("set"))


def mean_and_interval(values: pd.Series) -> str:
    """Return the mean of differences, and its 95 % interval (Student's t) where there are several."""
    text = f"{values.mean():+.3f}"
    if len(values) < 2:
        return text
    half = stats.t.ppf(0.975, len(values) - 1) * values.sem()
    return f"{text} ({values.mean() - half:+.3f} to {values.mean() + half:+.3f})"


def difference_table(rows: pd.DataFrame, first: str, second: str) -> str | None:
    """Return how much better a method is than another with the same seed, sets by metrics, and the mean of the sets."""
    columns = {}
    for metric, title in METRICS.items():
        values = rows.pivot_table(metric, ["category", "seed"], "method", sort=False)
        if not {first, second} <= set(values):
            continue
        of_sets = (values[first] - values[second]).dropna().groupby("category", sort=False)
        cells = {name: mean_and_interval(differences) for name, differences in of_sets}
        if len(cells) > 1:
            cells[f"**all {len(cells)}**"] = mean_and_interval(of_sets.mean())
        columns[title] = cells
    table = pd.DataFrame(columns)
    return None if table.empty else markdown(table.fillna("").rename_axis("set"))


def losses_of(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the runs of Table 4: those of other losses, after ours, which is location prediction, on the same sets."""
    others = rows[rows["table"] == "losses"]
    ours = rows[(rows["method"] == OURS) & rows["category"].isin(others["category"])]
    return pd.concat([ours.assign(method=ALONE, note=""), others])


def accuracy_tables(rows: pd.DataFrame) -> list[str]:
    """Return a heading and a table for each metric, of the methods that are no losses of Table 4."""
    rows = rows[rows["table"] == "methods"]
    known = [metric for metric in METRICS if metric in rows and rows[metric].notna().any()]
    return [part for name in known for part in (f"## {METRICS[name]}", metric_table(rows, name))]


def published_table(rows: pd.DataFrame, metric: str, published: pd.DataFrame) -> str | None:
    """Return published figures of a metric beside ours, for measured categories; averages where all were measured."""
    ours = rows[rows["method"] == OURS].groupby("category", sort=False)[metric].mean().dropna()
    figures = published[published["metric"] == metric].pivot_table("value", "category", "method", sort=False)
    for group, names in GROUPS.items():
        if set(names) <= set(ours.index):
            ours[group] = ours[list(names)].mean()
    table = figures.reindex([name for name in ours.index if name in figures.index]).dropna(axis="columns", how="all")
    if table.empty:
        return None
    table.insert(0, f"{OURS}, measured", ours)
    table.index = pd.Index([f"*mean of {name}*" if name in GROUPS else name for name in table.index], name="category")
    return markdown(table.map("{:.3f}".format, na_action="ignore").fillna(""))


def notes(rows: pd.DataFrame) -> str:
    """Return what is to be known of the rows' methods, as a list."""
    return "\n".join(f"- {note}" for note in rows["note"].dropna().unique() if note)


def cost_table(rows: pd.DataFrame) -> str:
    """Return what each method costs at each size of the image, the mean over its runs."""
    means = rows.groupby(["method", "image_size"], sort=False)[list(COSTS)].mean()
    table = pd.DataFrame(
        {
            title: (means[name] / unit).map(form.format, na_action="ignore")
            for name, (title, unit, form) in COSTS.items()
        }
    )
    return markdown(table.fillna("").rename_axis(["method", "image"]).reset_index("image"))


def drawn_table(rows: pd.DataFrame) -> str:
    """Return the rank correlation over the runs on each set of pixel AUROC on drawn defects with that on true ones."""
    rows = rows.dropna(subset=["drawn_pixel_AUROC", "pixel_AUROC"])
    groups = rows.groupby("category", sort=False)
    values = groups.apply(lambda runs: runs["drawn_pixel_AUROC"].corr(runs["pixel_AUROC"], method="spearman"))
    table = pd.DataFrame(
        {"rank correlation": values.map("{:.3f}".format, na_action="ignore").fillna(""), "runs": groups.size()}
    )
    return markdown(table.rename_axis("set"))


def _make_figure(panels: int) -> tuple[Figure, list[Axes]]:
    """Return a figure of up to three panels a line."""
    columns = min(3, panels)
    lines = -(-panels // columns)
    figure = Figure(figsize=(max(6, 4.2 * columns), 3.4 * lines + 1.2), layout="constrained")
    grid = figure.subplots(lines, columns, squeeze=False).flat
    for axes in grid[panels:]:
        axes.set_axis_off()
    for axes in grid[:panels]:
        axes.grid(alpha=0.3)
        axes.set_axisbelow(True)
    return figure, list(grid[:panels])


def _log_axis(axes: Axes, unit: float = 1.0) -> None:
    """Make the horizontal axis logarithmic, with 1, 2, 5, 10, ... of a unit in place of powers."""
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value / unit:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())


def _save(figure: Figure, path: Path) -> None:
    """Save a figure, with one legend for all panels beside the data instead of over it."""
    handles = figure.axes[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=2, frameon=False)
    figure.savefig(path, dpi=120)


def accuracy_by_cost(rows: pd.DataFrame, path: Path) -> bool:
    """Draw pixel AUROC against costs, means over the sets that all methods share; bars are the seeds' deviation."""
    rows = rows.dropna(subset=["pixel_AUROC"])
    table = rows.pivot_table(index="category", columns="method", values="pixel_AUROC").dropna()
    rows = rows[rows["category"].isin(table.index)]
    if rows.empty:
        return False
    names = ("latency_ms", "bytes", "multiply_adds")
    figure, panels = _make_figure(len(names))
    for axes, name in zip(panels, names, strict=True):
        title, unit, _ = COSTS[name]
        for method, runs in rows.groupby("method", sort=False):
            seeds = runs.groupby("seed")["pixel_AUROC"].mean()
            deviation = seeds.std() if len(seeds) > 1 else 0
            axes.errorbar(runs[name].mean(), seeds.mean(), yerr=deviation, fmt="o", capsize=3, label=method)
        axes.set(xlabel=title)
        axes.margins(x=0.15)
        # Up to 1, with as much below the lowest as above: what differs by a thousandth looks as small as it is.
        axes.set_ylim(2 * rows.groupby("method")["pixel_AUROC"].mean().min() - 1, 1)
        _log_axis(axes, unit)
    panels[0].set_ylabel(f"pixel AUROC, mean of {', '.join(table.index) if len(table) < 4 else f'{len(table)} sets'}")
    _save(figure, path)
    return True


def accuracy_by_time(rows: pd.DataFrame, folder: Path, path: Path) -> bool:
    """Draw pixel AUROC against seconds of training where there are curves: means over the seeds, and their range."""
    points = []
    for run in rows.to_dict("records"):
        file = folder / f"{run_name(run)}.json"
        curve = json.loads(file.read_text(encoding="utf-8")).get("curve", []) if file.exists() else []
        points += [{"category": run["category"], "method": run["method"], **point} for point in curve]
    table = pd.DataFrame(points, columns=["category", "method", "step", "seconds", "val_pixel_AUROC"]).dropna()
    if table.empty:
        return False
    colors = {name: f"C{index}" for index, name in enumerate(table["method"].unique())}
    categories = list(table["category"].unique())
    figure, panels = _make_figure(len(categories))
    for axes, category in zip(panels, categories, strict=True):
        for method, color in colors.items():
            runs = table[(table["category"] == category) & (table["method"] == method)].groupby("step")
            seconds, auroc = runs["seconds"].mean(), runs["val_pixel_AUROC"].agg(["mean", "min", "max"])
            axes.plot(seconds, auroc["mean"], "o-", markersize=4, color=color, label=method)
            axes.fill_between(seconds, auroc["min"], auroc["max"], color=color, alpha=0.2, linewidth=0)
        axes.set(title=category, xlabel="seconds of training and memory banks", ylabel="pixel AUROC")
        _log_axis(axes)
    _save(figure, path)
    return True


def loss_bars(rows: pd.DataFrame, path: Path) -> None:
    """Draw pixel AUROC of each loss by category, with the deviation over the seeds; 0.5 is chance."""
    figures = rows.groupby(["category", "method"], sort=False)["pixel_AUROC"].agg(["mean", "std"]).unstack()
    means, deviations = (figures[name][rows["method"].unique()] for name in ("mean", "std"))
    figure, (axes,) = _make_figure(1)
    means.plot.bar(ax=axes, yerr=deviations.fillna(0), capsize=3, rot=30, legend=False)
    lowest = float((means - deviations.fillna(0)).min(axis=None)) - 0.02
    axes.set(xlabel="", ylabel="pixel AUROC", ylim=(min(0.5, lowest), 1))
    _save(figure, path)


def heatmaps(rows: pd.DataFrame, folder: Path, path: Path) -> bool:
    """Draw images of one category with their true defects, and each method's map and outline, first seed."""
    runs = rows.sort_values("seed", kind="stable").drop_duplicates("method").to_dict("records")
    files = {run["method"]: folder / f"{run_name(run)}.npz" for run in runs}
    kept = {method: np.load(file) for method, file in files.items() if file.exists()}
    if not kept:
        return False
    first = next(iter(kept.values()))
    count = sum(name.startswith("image_") for name in first)
    height, width = first["map_0"].shape
    figure = Figure(figsize=(1.8 * (2 + len(kept)), 1.8 * count * height / width + 0.3), layout="constrained")
    grid = figure.subplots(count, 2 + len(kept), squeeze=False)
    for row, panels in enumerate(grid):
        panels[0].imshow(first[f"image_{row}"])
        panels[1].imshow(first[f"mask_{row}"], cmap="gray", vmin=0, vmax=1)
        for axes, maps in zip(panels[2:], kept.values(), strict=True):
            axes.imshow(maps[f"image_{row}"])
            axes.imshow(maps[f"map_{row}"], cmap="turbo", vmin=0, vmax=1, alpha=0.5)
            if maps[f"outline_{row}"].any():
                axes.contour(maps[f"outline_{row}"], levels=[0.5], colors="white", linewidths=0.8)
    for axes, title in zip(grid[0], ["image", "true defect", *kept], strict=True):
        axes.set_title(title.replace(", ", ",\n"), fontsize=8)
    for axes in grid.flat:
        axes.set_axis_off()
    figure.savefig(path, dpi=120)
    return True


def reproduction(rows: pd.DataFrame, curve: str) -> list[str]:
    """Return how to measure again, with an option for curves, and with what it was measured."""
    commands = []
    for (data, size), runs in rows.dropna(subset=["pixel_AUROC"]).groupby(["data", "image_size"], sort=False):
        seeds = ",".join(map(str, sorted(runs["seed"].unique())))
        if (CONFIGS / data).is_file():
            config = yaml.safe_load((CONFIGS / data).read_text(encoding="utf-8"))["init_args"]
            what = f"CATEGORIES={','.join(runs['category'].unique())} " if "category" in config else ""
            what += f"IMAGE_SIZE={size.replace('x', ',')} ROOT=<folder of the data set>"
            commands.append(f"make reproduce DATA=configs/data/{data} {what} SEEDS={seeds}{curve}")
        else:
            commands.append(f"make bench-accuracy SETS=<folder>/{data} SEEDS={seeds}{curve}")
    versions = [f"{name} {'/'.join(rows[name].astype(str).unique())}" for name in ("anomalib", "torch", "python")]
    compared = rows[rows["table"] == "methods"]
    counts = compared.dropna(subset=["image_AUROC"]).groupby(["category", "method"], sort=False)["seed"].nunique()
    fewer = [
        text
        for method, seeds in counts.groupby("method", sort=False)
        for text in fewer_seeds(method, seeds, counts.max())
    ]
    text = f"Measured with {', '.join(versions)}; {'; '.join(rows['hardware'].unique())}. Each run had as many of the "
    text += "cores as named, and whatever else the machine did on the others: times are rough."
    text += f" Fewer seeds: {'; '.join(fewer)}." if fewer else ""
    return ["## How to reproduce", "```bash\n" + "\n".join(dict.fromkeys(commands)) + "\n```", text]


def fewer_seeds(method: str, counts: pd.Series, usual: int) -> list[str]:
    """Return on which categories a method has fewer seeds than usual, by its number of seeds of each."""
    if counts.nunique() == 1:
        return [f"{method} {counts.iloc[0]} on each set"] if counts.iloc[0] < usual else []
    return [f"{method} on {category} {count}" for (category, _), count in counts.items() if count < usual]


def sections(rows: pd.DataFrame, folder: Path, pictures: Path, link: str, shown: Iterable[str]) -> list[str]:
    """Return the parts of the page, whose pictures go into a folder, and into it by a link.

    Images are shown of some categories alone.
    """
    methods, losses = rows[rows["table"] == "methods"], losses_of(rows)
    parts = accuracy_tables(rows)
    published = pd.read_csv(PUBLISHED)
    beside = {METRICS[metric]: published_table(methods, metric, published) for metric in METRICS}
    if any(beside.values()):
        parts += ["## Published figures beside ours", PUBLISHED_BY]
        parts += [part for title, table in beside.items() if table for part in (f"{title}:", table)]
    if len(losses):
        loss_bars(losses, pictures / "losses.png")
        parts += ["## Table 4: losses", LOSSES, "Pixel AUROC:", metric_table(losses, "pixel_AUROC")]
        parts += ["Image AUROC:", metric_table(losses, "image_AUROC"), f"![Pixel AUROC by loss]({link}losses.png)"]
        differences = difference_table(losses, JOINT, ALONE)
        parts += [DIFFERENCES, differences] if differences else []
        parts += [notes(losses)]
    if len(methods):
        parts += ["## Cost", "Of one image; the memory bank or statistics are in the state.", cost_table(methods)]
        parts += [notes(methods)]
    if accuracy_by_cost(methods, pictures / "accuracy_by_cost.png"):
        parts += [f"![Pixel AUROC against milliseconds, bytes and multiply-adds]({link}accuracy_by_cost.png)"]
    has_curves = accuracy_by_time(methods, folder, pictures / "accuracy_by_time.png")
    if has_curves:
        parts += ["## AUROC by time of training", "Lines are means over the seeds, bands their range."]
        parts += [f"![Pixel AUROC by seconds of training]({link}accuracy_by_time.png)"]
    if "drawn_pixel_AUROC" in rows:
        parts += ["## Drawn defects", "How pixel AUROC on drawn defects ranks the runs on a set:", drawn_table(rows)]
    for category, runs in methods.groupby("category", sort=False):
        if category in shown and heatmaps(runs, folder, pictures / f"heatmaps_{category}.png"):
            parts += [
                f"## Maps of {category}",
                f"![Images, true defects, maps and outlines]({link}heatmaps_{category}.png)",
            ]
    return [part for part in [*parts, *reproduction(rows, " CURVE=1" if has_curves else "")] if part]


def render(output: Path, docs: Path | None = None) -> Path:
    """Render the page of the runs in ``results.csv`` of a folder, beside it, and return its path.

    With a folder of the documentation that page, without images whose licence forbids them.
    """
    rows = pd.read_csv(output / "results.csv")
    # Where all runs measured the cost alone, or were made before there was a column, it is missing.
    rows = rows.reindex(columns=list(dict.fromkeys([*rows.columns, *METRICS, *COSTS, "note", "data"])))
    rows["data"] = rows["data"].fillna("")
    page, link = (docs or output) / "results.md", "images/results/" if docs else ""
    (page.parent / link).mkdir(parents=True, exist_ok=True)
    shown = FREE_CATEGORIES if docs else rows["category"].unique()
    source = "by `make results` from the rows in `benchmarks/measured`" if docs else "from the rows in `results.csv`"
    parts = ["# Results", f"Generated {source}. {INTRODUCTION}"]
    parts += sections(rows, output / "runs", page.parent / link, link, shown)
    page.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return page


def main() -> None:
    """Render the page, or that of the documentation."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n", maxsplit=1)[0])
    parser.add_argument("output", type=Path, help="folder of accuracy.py's results")
    parser.add_argument("--docs", type=Path, help="folder of the documentation: write its page instead")
    print(f"Rendered {render(**vars(parser.parse_args()))}")


if __name__ == "__main__":
    main()
