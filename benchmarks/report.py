# Copyright (C) 2026 The anomalib-pedenet authors
# SPDX-License-Identifier: Apache-2.0

"""Render what :mod:`reproduce` has measured: the paper's Tables 1 to 4 beside published figures, and pictures.

The full report, ``results.md`` beside the runs, shows images of the data set. Those of MVTec AD and KolektorSDD may not
be published here, so ``--docs`` writes the page of the documentation with plots, and images of the demo's data set
alone.

Example:
    ``python benchmarks/report.py runs/reproduce --docs docs``
"""

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from sklearn.decomposition import PCA

PUBLISHED = Path(__file__).with_name("published.csv")
CONFIGS = Path(__file__).parents[1] / "configs" / "data"
WHERE_IT_LOSES = Path(__file__).with_name("where_it_loses.md")
OBJECTS = (
    "bottle",
    "cable",
    "capsule",
    "hazelnut",
    "metal_nut",
    "pill",
    "screw",
    "toothbrush",
    "transistor",
    "zipper",
)
TEXTURES = ("carpet", "grid", "leather", "tile", "wood")
"""MVTec AD's categories; no averages are taken over those of other data sets."""

FREE_CATEGORIES = ("brick", "grass", "gravel")
"""Categories of the demo's data set, whose images are in the public domain (CC0)."""

OURS = "Pedenet"
GROUPS = {"objects": OBJECTS, "textures": TEXTURES, "all": OBJECTS + TEXTURES}
METRICS = {
    "pixel_AUROC": "pixel AUROC",
    "image_AUROC": "image AUROC",
    "pixel_AUPRO": "pixel AUPRO",
    "pixel_F1Max": "pixel F1 at the best threshold",
}

INTRODUCTION = (
    "Generated from the measurements by `make results`; nothing here is typed. Mean, and standard deviation over the "
    "seeds, of anomalib's metrics on all test images. Models named *random weights* are not what their authors made: "
    "nothing was downloaded. *Published* figures are those of their authors or of anomalib, with pre-trained backbones "
    "where they have them; `benchmarks/published.csv` has the source of each."
)
LOSSES = (
    "Scored by 32-px patches alone. Published averages over MVTec AD's fifteen categories (arXiv:2110.15525): L_DEN "
    "0.810, L_LPN 0.894, both 0.959."
)

Format = Callable[[float], str]
COSTS: dict[str, tuple[str, Format]] = {
    "parameters": ("parameters", lambda value: f"{value / 1e6:.2f} M"),
    "bytes": ("state", lambda value: f"{value / 1e6:.1f} MB"),
    "multiply_adds": ("multiply-adds", lambda value: f"{value / 1e9:.2f} G"),
    "latency_ms": ("ms per image, torch", lambda value: f"{value:.0f}"),
    "train_seconds": ("training, s", lambda value: f"{value:.0f}"),
}


def run_name(row: Mapping[Any, Any]) -> str:
    """Return the name of a run's files, from its category, method and seed."""
    method = "".join(letter if letter.isalnum() else "_" for letter in row["method"])
    return f"{row['category']}-{method}-{row['seed']}"


def mean_and_deviation(values: pd.Series) -> str:
    """Return the mean, and the standard deviation over several seeds."""
    values = values.dropna()
    if values.empty:
        return ""
    return f"{values.mean():.3f}" + (f" ± {values.std():.3f}" if len(values) > 1 else "")


def markdown(table: pd.DataFrame) -> str:
    """Return a table of strings as Markdown; its index is the first column."""
    lines = ["| " + " | ".join([str(table.index.name or ""), *map(str, table.columns)]) + " |"]
    lines.append("|---" * (1 + len(table.columns)) + "|")
    lines += ["| " + " | ".join(map(str, row)) + " |" for row in table.itertuples()]
    return "\n".join(lines)


def accuracy_table(rows: pd.DataFrame, metric: str) -> str:
    """Return a metric by category and method, mean and deviation over the seeds."""
    rows = rows.dropna(subset=[metric])
    table = rows.groupby(["category", "method"], sort=False)[metric].apply(mean_and_deviation).unstack(fill_value="")
    table = table[list(dict.fromkeys(rows["method"]))]
    means = rows.groupby(["method", "category"], sort=False)[metric].mean().unstack(0)
    for label, group in GROUPS.items():
        chosen = [name for name in means.index if name in group]
        if len(chosen) > 1:
            averages = {name: f"{value:.3f}" for name, value in means.loc[chosen].mean(skipna=False).dropna().items()}
            table.loc[f"*mean of {len(chosen)} {label}*"] = [averages.get(name, "") for name in table]
    return markdown(table)


def published_table(rows: pd.DataFrame, metric: str, published: pd.DataFrame) -> str | None:
    """Return published figures of a metric beside ours, for the measured categories and as far as there are any.

    Averages are those that the sources print, and are there if all categories of the group have been measured.
    """
    ours = rows[rows["method"] == OURS].groupby("category", sort=False)[metric].mean().dropna()
    figures = published[published["metric"] == metric].pivot_table("value", "category", "method", sort=False)
    labels = {name: name for name in ours.index if name in figures.index}
    labels |= {group: f"*mean of {len(names)} {group}*" for group, names in GROUPS.items() if set(names) <= set(labels)}
    ours = pd.concat(
        [ours, pd.Series({group: ours[list(GROUPS[group])].mean() for group in GROUPS if group in labels})]
    )
    table = figures.reindex(list(labels)).dropna(axis="columns", how="all")
    if table.empty:
        return None
    table.insert(0, f"{OURS}, measured", ours.reindex(table.index))
    table.index = pd.Index([labels[name] for name in table.index], name="category")
    return markdown(table.map(lambda value: "" if pd.isna(value) else f"{value:.3f}"))


def cost_table(rows: pd.DataFrame) -> str:
    """Return what each method costs, the mean over its runs."""
    means = rows.groupby("method", sort=False)[list(COSTS)].mean()
    shown = {
        title: means[name].map(lambda value, show=show: "" if pd.isna(value) else show(value))
        for name, (title, show) in COSTS.items()
    }
    shown["image"] = rows.groupby("method", sort=False)["image_size"].first()
    return markdown(pd.DataFrame(shown))


def comparison_table(rows: pd.DataFrame, published: pd.DataFrame) -> str:
    """Return how far we are ahead of every other method, on the categories for which both have a figure."""
    lines = {}
    for name, figures in _others(rows, published):
        line = {}
        for metric in ("pixel_AUROC", "image_AUROC"):
            differences = (_ours(rows, metric) - figures.get(metric, pd.Series(dtype=float))).dropna()
            line[METRICS[metric]] = f"{differences.mean():+.3f}" if len(differences) else ""
            line[f"{METRICS[metric]}: ahead"] = f"{(differences > 0).sum()} of {len(differences)}" * bool(
                len(differences)
            )
        if any(line.values()):
            lines[name] = line
    return markdown(pd.DataFrame.from_dict(lines, orient="index").rename_axis(f"{OURS} against"))


def losing_tables(rows: pd.DataFrame, published: pd.DataFrame) -> list[str]:
    """Return where others are ahead of us: in accuracy by category and metric, and in cost by category and cost."""
    parts = []
    accuracy = []
    for metric, title in METRICS.items():
        ours = _ours(rows, metric)
        for category in ours.index:
            ahead = {
                name: figures[metric][category]
                for name, figures in _others(rows, published)
                if category in figures.get(metric, ()) and figures[metric][category] > ours[category]
            }
            accuracy.append(
                [category, title, f"{ours[category]:.3f}", _listing(ahead, lambda value: f"{value:.3f}", -1)]
            )
    parts.append("Accuracy, means over the seeds; a difference below the deviation in the tables above is none:")
    parts.append(_losses(accuracy, "ahead of it"))
    cost = []
    for category, runs in rows.groupby("category", sort=False):
        means = runs.groupby("method", sort=False)[list(COSTS)].mean()
        for name, (title, show) in COSTS.items():
            if OURS in means.index:
                cheaper = means[name][means[name] < means[name][OURS]].to_dict()
                cost.append([category, title, show(means[name][OURS]), _listing(cheaper, show, 1)])
    return [*parts, "Cost, measured here:", _losses(cost, "less")]


def _ours(rows: pd.DataFrame, metric: str) -> pd.Series:
    """Return our mean of a metric by category."""
    return rows[rows["method"] == OURS].groupby("category", sort=False)[metric].mean().dropna()


def _others(rows: pd.DataFrame, published: pd.DataFrame) -> list[tuple[str, dict[str, pd.Series]]]:
    """Return the other methods, measured and published, with their metrics by category."""
    others: list[tuple[str, dict[str, pd.Series]]] = []
    for name, runs in rows[rows["method"] != OURS].groupby("method", sort=False):
        means = runs.groupby("category", sort=False)[list(METRICS)].mean()
        others.append((str(name), {metric: means[metric].dropna() for metric in METRICS}))
    for name, figures in published.groupby("method", sort=False):
        by_metric = {str(metric): part.set_index("category")["value"] for metric, part in figures.groupby("metric")}
        others.append((f"{name} (published)", by_metric))
    return others


def _listing(values: Mapping[Any, float], show: Format, sign: int) -> str:
    """Return names and values, the best first."""
    return "; ".join(f"{name} {show(value)}" for name, value in sorted(values.items(), key=lambda item: sign * item[1]))


def _losses(lines: list[list[str]], title: str) -> str:
    """Return the lines in which someone is ahead as a table."""
    kept = [line for line in lines if line[-1]]
    if not kept:
        return "In none."
    return markdown(pd.DataFrame(kept, columns=["category", "figure", OURS, title]).set_index("category"))


def _finish(axes: Axes, handles_from: Axes | None = None) -> None:
    """Draw a light grid, and the legend beside the data instead of over it."""
    axes.grid(alpha=0.3)
    if handles_from is not None:
        figure = axes.get_figure()
        assert isinstance(figure, Figure)
        figure.legend(*handles_from.get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)


def set_plain_ticks(axis: Axis, unit: float = 1.0) -> None:
    """Label a logarithmic axis with 1, 2, 5, 10, ... of a unit in place of powers."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value / unit:g}"))
    axis.set_minor_formatter(NullFormatter())


def _log_axis(axes: Axes, unit: float = 1.0) -> None:
    """Make the horizontal axis logarithmic, with plain numbers."""
    axes.set_xscale("log")
    set_plain_ticks(axes.xaxis, unit)


def scatter(rows: pd.DataFrame, cost: str, label: str, unit: float, path: Path) -> None:
    """Draw pixel AUROC against a cost: a panel for each image size, a point for each method.

    Both are means over the categories that all methods of the panel share; bars are the deviation over the seeds.
    """
    rows = rows.dropna(subset=["pixel_AUROC", cost])
    sizes = list(dict.fromkeys(rows["image_size"]))
    methods = list(dict.fromkeys(rows["method"]))
    height = 3.6 + 0.25 * ((len(methods) + 1) // 2)
    figure = Figure(figsize=(max(6, 4.2 * len(sizes)), height), layout="constrained")
    for axes, size in zip(figure.subplots(1, len(sizes), squeeze=False)[0], sizes, strict=True):
        panel = rows[rows["image_size"] == size]
        table = panel.groupby(["category", "method"], sort=False)["pixel_AUROC"].mean().unstack().dropna(axis="columns")
        categories = list(table.index)
        for index, method in enumerate(methods):
            runs = panel[panel["method"] == method]
            known = runs if method in table else runs.iloc[:0]
            seeds = known.groupby("seed")["pixel_AUROC"].mean()
            axes.errorbar(
                [known[cost].mean()] if len(known) else [],
                [seeds.mean()] if len(known) else [],
                yerr=[seeds.std() if len(seeds) > 1 else 0.0] if len(known) else [],
                marker="o",
                linestyle="none",
                capsize=3,
                color=f"C{index}",
                label=method,
            )
        _log_axis(axes, unit)
        what = categories[0] if len(categories) == 1 else f"mean of {len(categories)} categories"
        axes.set(xlabel=label, title=f"{what}, {size}")
        axes.margins(x=0.15)
        _finish(axes)
    figure.axes[0].set_ylabel("pixel AUROC")
    _finish(figure.axes[0], figure.axes[0])
    figure.savefig(path, dpi=120)


def time_curves(points: pd.DataFrame, path: Path) -> None:
    """Draw pixel AUROC against seconds of training: a panel for each category, a line for each method.

    Args:
        points (pd.DataFrame): ``category``, ``method``, ``seed``, ``step``, ``seconds`` and ``val_pixel_AUROC``, a row
            for each validation. Lines are means over the seeds, and bands their range.
        path (Path): The picture's file.
    """
    categories, methods = list(dict.fromkeys(points["category"])), list(dict.fromkeys(points["method"]))
    columns = min(3, len(categories))
    lines = -(-len(categories) // columns)
    figure = Figure(figsize=(max(6, 4.2 * columns), 3.4 * lines + 0.6), layout="constrained")
    grid = figure.subplots(lines, columns, squeeze=False)
    for axes, category in zip(grid.flat, categories, strict=False):
        for index, method in enumerate(methods):
            runs = points[(points["category"] == category) & (points["method"] == method)]
            table = runs.groupby("step")[["seconds", "val_pixel_AUROC"]].agg(["mean", "min", "max"])
            auroc = table["val_pixel_AUROC"]
            seconds = table["seconds"]["mean"]
            axes.plot(seconds, auroc["mean"], marker="o", markersize=4, color=f"C{index}", label=method)
            axes.fill_between(seconds, auroc["min"], auroc["max"], color=f"C{index}", alpha=0.2, linewidth=0)
        _log_axis(axes)
        axes.set(title=category, xlabel="seconds of training and memory banks", ylabel="pixel AUROC")
        _finish(axes)
    for axes in grid.flat[len(categories) :]:
        axes.set_axis_off()
    _finish(grid.flat[0], grid.flat[0])
    figure.savefig(path, dpi=120)


def bars(rows: pd.DataFrame, path: Path) -> None:
    """Draw pixel AUROC of each loss, by category, with the deviation over the seeds; 0.5 is chance."""
    categories, methods = list(dict.fromkeys(rows["category"])), list(dict.fromkeys(rows["method"]))
    figure = Figure(figsize=(max(5.5, 2 + 1.6 * len(categories)), 4), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(methods)
    for index, method in enumerate(methods):
        runs = rows[rows["method"] == method].groupby("category")["pixel_AUROC"]
        means, deviations = runs.mean().reindex(categories), runs.std().reindex(categories).fillna(0)
        places = np.arange(len(categories)) + (index - (len(methods) - 1) / 2) * width
        axes.bar(places, means, width, yerr=deviations, capsize=3, label=method)
    lowest = min(0.5, float(rows["pixel_AUROC"].min()))
    axes.set(ylabel="pixel AUROC", ylim=(lowest, 1), xticks=range(len(categories)), xticklabels=categories)
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    axes.tick_params(axis="x", rotation=45 if len(categories) > 4 else 0)
    figure.legend(loc="outside upper center", ncols=len(methods), frameon=False)
    figure.savefig(path, dpi=120)


def embedding_map(rows: pd.DataFrame, folder: Path, path: Path) -> bool:
    """Draw the first two principal components of our patches' embeddings, normal and defective, first seed.

    Args:
        rows (pd.DataFrame): Runs of all methods.
        folder (Path): Folder of the runs' files.
        path (Path): The picture's file.

    Returns:
        bool: Whether there were embeddings to draw.
    """
    runs = rows[rows["method"] == OURS].sort_values("seed", kind="stable").drop_duplicates("category")
    kept = {
        run.category: np.load(folder / f"{run.file}.npz") for run in runs.itertuples() if _has_file(folder, run.file)
    }
    kept = {category: arrays for category, arrays in kept.items() if "embeddings" in arrays}
    if not kept:
        return False
    columns = min(3, len(kept))
    lines = -(-len(kept) // columns)
    figure = Figure(figsize=(max(5.5, 4 * columns), 3.6 * lines + 0.5), layout="constrained")
    grid = figure.subplots(lines, columns, squeeze=False)
    for axes, (category, arrays) in zip(grid.flat, kept.items(), strict=False):
        embeddings, shares = arrays["embeddings"].astype(np.float32), arrays["defect_share"]
        pca = PCA(n_components=2).fit(embeddings[shares == 0])
        groups = {
            "patches without a defect": (embeddings[shares == 0], {"color": "0.6", "alpha": 0.4}),
            "patches of which a defect covers a quarter or more": (embeddings[shares >= 0.25], {"color": "C3"}),
        }
        for label, (members, style) in groups.items():
            places = pca.transform(members) if len(members) else np.empty((0, 2))
            axes.scatter(*places.T, s=6, linewidths=0, label=label, **style)  # type: ignore[arg-type]
        first, second = 100 * pca.explained_variance_ratio_
        axes.set(title=category, xlabel=f"component 1 ({first:.0f} %)", ylabel=f"component 2 ({second:.0f} %)")
        axes.grid(alpha=0.3)
    for axes in grid.flat[len(kept) :]:
        axes.set_axis_off()
    handles, labels = grid.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", frameon=False, markerscale=2)
    figure.savefig(path, dpi=120)
    return True


def _has_file(folder: Path, name: Any) -> bool:  # noqa: ANN401 - a field of a row
    """Return whether a run has kept maps."""
    return (folder / f"{name}.npz").exists()


def outline(mask: np.ndarray) -> np.ndarray:
    """Return the pixels of a mask that touch one that is not in it."""
    padded = np.pad(mask, 1, mode="edge")
    inner = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return mask & ~inner


def heatmaps(rows: pd.DataFrame, folder: Path, path: Path) -> bool:
    """Draw images of one category with their true defects, and each method's map and outline, first seed.

    Returns:
        bool: Whether there were maps to draw.
    """
    runs = rows.sort_values("seed", kind="stable").drop_duplicates("method")
    files = {run.method: folder / f"{run.file}.npz" for run in runs.itertuples()}
    kept = {method: np.load(file) for method, file in files.items() if file.exists()}
    if not kept:
        return False
    first = next(iter(kept.values()))
    count = sum(name.startswith("image_") for name in first)
    height, width = first["map_0"].shape
    figure = Figure(figsize=(1.8 * (2 + len(kept)), 1.8 * count * height / width + 0.3), layout="constrained")
    axes = figure.subplots(count, 2 + len(kept), squeeze=False)
    for row in range(count):
        axes[row, 0].imshow(first[f"image_{row}"])
        axes[row, 1].imshow(first[f"mask_{row}"], cmap="gray", vmin=0, vmax=1)
        for column, maps in enumerate(kept.values(), start=2):
            image = maps[f"image_{row}"] / 255
            heat = colormaps["turbo"](np.clip(maps[f"map_{row}"], 0, 1))[..., :3]
            blend = 0.5 * image + 0.5 * heat
            blend[outline(maps[f"outline_{row}"])] = 1
            axes[row, column].imshow(blend)
    for axis, title in zip(axes[0], ["image", "true defect", *kept], strict=True):
        axis.set_title(title.replace(", ", ",\n"), fontsize=8)
    for axis in axes.flat:
        axis.set_axis_off()
    figure.savefig(path, dpi=120)
    return True


def read_curves(rows: pd.DataFrame, folder: Path) -> pd.DataFrame:
    """Return the points of the runs' curves, a row for each validation."""
    points = []
    for run in rows.to_dict("records"):
        file = folder / f"{run['file']}.json"
        curve = json.loads(file.read_text(encoding="utf-8")).get("curve", []) if file.exists() else []
        points += [{name: run[name] for name in ("category", "method", "seed")} | point for point in curve]
    return pd.DataFrame(points)


class _Pictures:
    """Where a page's pictures go, and how the page names them.

    Args:
        folder (Path): Folder of the pictures.
        link (str): Path from the page to that folder, with a slash at its end, or empty.
    """

    def __init__(self, folder: Path, link: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.link = link

    def path(self, name: str) -> Path:
        """Return the file of a picture."""
        return self.folder / f"{name}.png"

    def markdown(self, name: str, text: str) -> str:
        """Return the line that shows a picture."""
        return f"![{text}]({self.link}{name}.png)"


def _reproduction(rows: pd.DataFrame) -> list[str]:
    """Return how to measure again, and with what it was measured."""
    seeds = " ".join(map(str, sorted(rows["seed"].unique())))
    names = ("anomalib", "torch", "python")
    versions = ", ".join(f"{name} {'/'.join(rows[name].astype(str).unique())}" for name in names)
    commands = []
    for (data, size), runs in rows.dropna(subset=["pixel_AUROC"]).groupby(["data", "image_size"], sort=False):
        config = CONFIGS / str(data)
        if not config.is_file():
            continue  # another data module than those of the repository
        where = f"DATA=configs/data/{data} "
        if "category" in yaml.safe_load(config.read_text(encoding="utf-8"))["init_args"]:
            where += f"CATEGORIES={','.join(dict.fromkeys(runs['category']))} "
        image_size = "" if size == "256x256" else f"IMAGE_SIZE={str(size).replace('x', ',')} "
        commands.append(f'make reproduce {where}{image_size}SEEDS="{seeds}" CURVE=1 ROOT=<folder of the data set>')
    return [
        "## How to reproduce",
        "In a clone, with the data set on disk:",
        "```bash\n" + "\n".join([*commands, "make results"]) + "\n```",
        (
            '`make reproduce` goes on where it was stopped, takes `METHODS="Pedenet;PaDiM, random weights"` for some '
            "methods, and writes a report with images beside the runs; `make results` renders this page from them. "
            f"Measured with {versions}; {'; '.join(rows['hardware'].unique())}. Seeds {seeds.replace(' ', ', ')}. "
            "Each run on a CPU had the threads named, and whatever else the machine did beside it: times are rough."
        ),
    ]


def _sections(rows: pd.DataFrame, folder: Path, pictures: _Pictures, shown: Callable[[str], bool]) -> list[str]:
    """Return the parts of the report.

    Args:
        rows (pd.DataFrame): Rows of all runs.
        folder (Path): Folder of the runs' files.
        pictures (_Pictures): Where pictures go.
        shown (Callable[[str], bool]): Whether images of a category may be shown.

    Returns:
        list[str]: Paragraphs of Markdown.
    """
    methods, losses = rows[rows["table"] == "methods"], rows[rows["table"] == "losses"]
    published = pd.read_csv(PUBLISHED)
    parts = ["# Results", INTRODUCTION, *_reproduction(rows)]
    if len(methods):
        for number, metric in enumerate(("pixel_AUROC", "image_AUROC"), start=1):
            parts += [f"## Table {number}: {METRICS[metric]}", accuracy_table(methods, metric)]
            beside = published_table(methods, metric, published)
            parts += ["Published figures beside it:", beside] if beside else []
        for metric in ("pixel_AUPRO", "pixel_F1Max"):
            parts += [f"{METRICS[metric][0].upper()}{METRICS[metric][1:]}:", accuracy_table(methods, metric)]
        parts += ["## Table 3: cost", "Of one image, and with the memory bank or statistics in the state."]
        for category, runs in methods.groupby("category", sort=False):
            parts += [f"{category}:", cost_table(runs)]
        if "note" in methods:
            parts += ["\n".join(f"- {note}" for note in dict.fromkeys(methods["note"].dropna()) if note)]
        parts.append("## Accuracy against cost")
        for cost, label, unit in (
            ("latency_ms", "ms per image, torch", 1),
            ("bytes", "MB of state", 1e6),
            ("train_seconds", "seconds of training", 1),
        ):
            scatter(methods, cost, label, unit, pictures.path(f"accuracy_{cost}"))
            parts.append(pictures.markdown(f"accuracy_{cost}", f"Pixel AUROC against {label}"))
        points = read_curves(methods, folder)
        if len(points):
            time_curves(points, pictures.path("accuracy_by_time"))
            parts += ["## AUROC against training time", "Lines are means over the seeds, bands their range."]
            parts.append(pictures.markdown("accuracy_by_time", "Pixel AUROC by seconds of training"))
        parts += [
            "## Comparison",
            "Mean difference over the categories for which both have a figure, and on how many of them we are ahead.",
            comparison_table(methods, published),
        ]
    if len(losses):
        bars(losses, pictures.path("losses"))
        parts += ["## Table 4: losses", LOSSES]
        parts += ["Pixel AUROC:", accuracy_table(losses, "pixel_AUROC")]
        parts += ["Image AUROC:", accuracy_table(losses, "image_AUROC")]
        parts.append(pictures.markdown("losses", "Pixel AUROC by loss"))
    if len(methods):
        if embedding_map(methods, folder, pictures.path("embeddings")):
            parts += [
                "## Embeddings",
                "Patches of the first test image of each kind, by the normal ones' principal components.",
            ]
            parts.append(pictures.markdown("embeddings", "Embeddings of normal and defective patches"))
        maps = [
            pictures.markdown(f"heatmaps_{category}", f"Images of {category} with true defects, maps and outlines")
            for category, runs in methods.groupby("category", sort=False)
            if shown(str(category)) and heatmaps(runs, folder, pictures.path(f"heatmaps_{category}"))
        ]
        parts += ["## Maps", *maps] if maps else []
        parts += [f"## Where {OURS} loses", WHERE_IT_LOSES.read_text(encoding="utf-8").strip()]
        parts += losing_tables(methods, published)
    return [part for part in parts if part]


def render(output: Path, docs: Path | None = None) -> Path:
    """Render the report of the runs in ``results.csv``.

    Args:
        output (Path): Folder of :mod:`reproduce`'s results.
        docs (Path | None): Folder of the documentation, for its page without images whose licence forbids them, or
            ``None`` for the full report.

    Returns:
        Path: The report, ``results.md``: beside the results, or in the documentation with pictures in
            ``images/results``.
    """
    rows = pd.read_csv(output / "results.csv")
    rows["file"] = [run_name(row) for row in rows.to_dict("records")]
    rows["data"] = rows["data"].fillna("") if "data" in rows else ""  # of runs before there was the column
    if docs is None:
        pictures, page = _Pictures(output, ""), output / "results.md"
    else:
        pictures, page = _Pictures(docs / "images" / "results", "images/results/"), docs / "results.md"
    parts = _sections(rows, output / "runs", pictures, lambda name: docs is None or name in FREE_CATEGORIES)
    page.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return page


def main(arguments: Sequence[str] | None = None) -> None:
    """Render the report, or the page of the documentation."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n", maxsplit=1)[0])
    parser.add_argument("output", type=Path, help="folder of reproduce.py's results")
    parser.add_argument("--docs", type=Path, help="folder of the documentation: write its page instead")
    options = parser.parse_args(arguments)
    print(f"Rendered {render(options.output, options.docs)}")


if __name__ == "__main__":
    main()
