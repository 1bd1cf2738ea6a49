# Copyright (C) 2026 The anomalib-pedenet authors
# SPDX-License-Identifier: Apache-2.0

"""Render what :mod:`reproduce` has measured: the paper's Tables 1 to 4 beside published figures, and pictures.

Example:
    ``python benchmarks/report.py runs/reproduce``
"""

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.figure import Figure

PUBLISHED = Path(__file__).with_name("published.csv")
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

INTRODUCTION = (
    "Written by `make reproduce` from the `results.csv` beside it. Mean, and standard deviation over the seeds, of "
    "anomalib's metrics on all test images. Models named *random weights* are not what their authors made: nothing was "
    "downloaded. *Published* figures are their authors' own, with pre-trained backbones where they have them "
    "(`benchmarks/published.csv`)."
)
LOSSES = (
    "Scored by 32-px patches alone. Published averages over MVTec AD's fifteen categories (arXiv:2110.15525): L_DEN "
    "0.810, L_LPN 0.894, both 0.959."
)

Format = Callable[[float], str]


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


def accuracy_table(rows: pd.DataFrame, metric: str, published: pd.DataFrame | None = None) -> str:
    """Return a metric by category and method, mean and deviation over the seeds, and the published figures."""
    table = rows.groupby(["category", "method"], sort=False)[metric].apply(mean_and_deviation).unstack(fill_value="")
    table = table[list(dict.fromkeys(rows["method"]))]
    if published is not None:
        for method, figures in published.groupby("method", sort=False):
            by_category = figures.set_index("category")["pixel_AUROC"]
            column = [f"{by_category[name]:.3f}" if name in by_category else "" for name in table.index]
            if any(column):
                table[f"{method} (published)"] = column
    means = rows.groupby(["method", "category"], sort=False)[metric].mean().unstack(0)
    for label, chosen in (
        ("objects", [name for name in means.index if name in OBJECTS]),
        ("textures", [name for name in means.index if name in TEXTURES]),
        ("all", [name for name in means.index if name in OBJECTS + TEXTURES]),
    ):
        if len(chosen) > 1:
            averages = {name: f"{value:.3f}" for name, value in means.loc[chosen].mean().items()}
            table.loc[f"*mean of {len(chosen)} {label}*"] = [averages.get(name, "") for name in table]
    return markdown(table)


def cost_table(rows: pd.DataFrame) -> str:
    """Return what each method costs, the mean over its runs."""
    columns: dict[str, tuple[str, Format]] = {
        "parameters": ("parameters", lambda value: f"{value / 1e6:.2f} M"),
        "state": ("bytes", lambda value: f"{value / 1e6:.1f} MB"),
        "multiply-adds": ("multiply_adds", lambda value: f"{value / 1e9:.2f} G"),
        "ms per image, torch": ("latency_ms", lambda value: f"{value:.0f}"),
        "training, s": ("train_seconds", lambda value: f"{value:.0f}"),
    }
    means = rows.groupby("method", sort=False)[[name for name, _ in columns.values()]].mean()
    return markdown(pd.DataFrame({title: means[name].map(show) for title, (name, show) in columns.items()}))


def scatter(rows: pd.DataFrame, cost: str, label: str, path: Path) -> None:
    """Draw pixel AUROC against a cost, a point for each method, and bars for the deviation over all its runs."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for method, runs in rows.groupby("method", sort=False):
        spread = runs["pixel_AUROC"].std() if len(runs) > 1 else 0
        axes.errorbar(runs[cost].mean(), runs["pixel_AUROC"].mean(), yerr=spread, marker="o", capsize=3, label=method)
    axes.set(xscale="log", xlabel=label, ylabel="pixel AUROC")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


def bars(rows: pd.DataFrame, path: Path) -> None:
    """Draw pixel AUROC of each loss, by category, with the deviation over the seeds."""
    categories, methods = list(dict.fromkeys(rows["category"])), list(dict.fromkeys(rows["method"]))
    figure = Figure(figsize=(2 + 2.2 * len(categories), 4), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(methods)
    for index, method in enumerate(methods):
        runs = rows[rows["method"] == method].groupby("category")["pixel_AUROC"]
        means, deviations = runs.mean().reindex(categories), runs.std().reindex(categories).fillna(0)
        places = np.arange(len(categories)) + (index - (len(methods) - 1) / 2) * width
        axes.bar(places, means, width, yerr=deviations, capsize=3, label=method)
    axes.set(ylabel="pixel AUROC", ylim=(0.5, 1), xticks=range(len(categories)), xticklabels=categories)
    axes.grid(axis="y", alpha=0.3)
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=len(methods), frameon=False)
    figure.savefig(path, dpi=120)


def outline(mask: np.ndarray) -> np.ndarray:
    """Return the pixels of a mask that touch one that is not in it."""
    padded = np.pad(mask, 1, mode="edge")
    inner = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return mask & ~inner


def heatmaps(rows: pd.DataFrame, folder: Path, path: Path) -> None:
    """Draw images of one category with their true defects, and each method's map and outline, first seed."""
    runs = rows.sort_values("seed", kind="stable").drop_duplicates("method")
    files = {run.method: folder / f"{run.file}.npz" for run in runs.itertuples()}
    kept = {method: np.load(file) for method, file in files.items() if file.exists()}
    if not kept:
        return
    first = next(iter(kept.values()))
    count = sum(name.startswith("image_") for name in first)
    height, width = first["map_0"].shape
    figure = Figure(figsize=(1.8 * (2 + len(kept)), 1.8 * count * height / width), layout="constrained")
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


def render(output: Path) -> Path:
    """Render the report of the runs in ``results.csv``.

    Args:
        output (Path): Folder of :mod:`reproduce`'s results.

    Returns:
        Path: The report, ``results.md``, beside its figures.
    """
    rows = pd.read_csv(output / "results.csv")
    rows["file"] = [run_name(row) for row in rows.to_dict("records")]
    methods, losses = rows[rows["table"] == "methods"], rows[rows["table"] == "losses"]
    published = pd.read_csv(PUBLISHED)
    versions = [f"{name} {'/'.join(rows[name].astype(str).unique())}" for name in ("anomalib", "torch", "python")]
    seeds = ", ".join(map(str, sorted(rows["seed"].unique())))
    parts = [
        "# Results",
        f"{INTRODUCTION} Seeds {seeds}; {', '.join(versions)}; {'; '.join(rows['hardware'].unique())}.",
    ]
    if len(methods):
        parts += ["## Table 1: pixel AUROC", accuracy_table(methods, "pixel_AUROC", published)]
        parts += ["## Table 2: image AUROC", accuracy_table(methods, "image_AUROC")]
        parts += ["Pixel AUPRO:", accuracy_table(methods, "pixel_AUPRO")]
        parts += ["Pixel F1 at the best threshold:", accuracy_table(methods, "pixel_F1Max")]
        parts += ["## Table 3: cost", "Of one image, and with the memory bank or statistics in the state."]
        for category, runs in methods.groupby("category", sort=False):
            parts += [f"{category}, {runs['image_size'].iloc[0]}:", cost_table(runs)]
            heatmaps(runs, output / "runs", output / f"heatmaps_{category}.png")
            parts.append(f"![Images of {category} with true defects, maps and outlines](heatmaps_{category}.png)")
        for cost, label in (
            ("latency_ms", "milliseconds per image, torch"),
            ("bytes", "bytes of the state"),
            ("train_seconds", "seconds of training"),
        ):
            scatter(methods, cost, label, output / f"accuracy_{cost}.png")
            parts.append(f"![Pixel AUROC against {label}](accuracy_{cost}.png)")
    if len(losses):
        parts += [
            "## Table 4: losses",
            LOSSES,
            "Pixel AUROC:",
            accuracy_table(losses, "pixel_AUROC"),
            "Image AUROC:",
            accuracy_table(losses, "image_AUROC"),
            "![Pixel AUROC by loss](losses.png)",
        ]
        bars(losses, output / "losses.png")
    report = output / "results.md"
    report.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return report


if __name__ == "__main__":
    print(render(Path(sys.argv[1])))
