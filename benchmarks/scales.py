# Copyright (C) 2026 The anomalib-pedenet authors
# SPDX-License-Identifier: Apache-2.0

"""Score the checkpoints of ``make bench-accuracy`` at every scale, and weigh the scales in several ways.

Nothing is trained. For each checkpoint and scale (16, 24, 32 and 64 px) the test images are scored by the nearest of
5,000 random normal patches, plain as Pedenet does and whitened, and by one Gaussian of all normal patches. Some normal
images are scored too, by the patches of the *other* images: what can be known without defects. Of them ``spread`` is
the standard deviation of the logarithm of an image's highest score.

``<output>/scales.csv`` has a line for each scale and scorer. ``<output>/weights.csv`` has one for each way to weigh the
scales in the product of their maps, ``weight = learned^a / spread^p``, where ``learned`` is how much location
prediction has learned at a trained scale, from 0 (chance) to 1, and 1 at the others.

Example:
    ``python benchmarks/scales.py --sets data/sets.yaml --runs runs/accuracy/runs --output runs/scales``
"""

import argparse
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from accuracy import read_sets
from anomalib.data import get_datamodule
from anomalib.models import Pedenet
from report import run_name
from reproduce import names, numbers
from scoring import Embedded, Way, embed_all, make_embedder
from sklearn.metrics import precision_recall_curve, roc_auc_score
from train import append

from anomalib_pedenet.anomaly_map import scores_to_map
from anomalib_pedenet.data.normal_images import spread
from anomalib_pedenet.loss import synthetic_weight
from anomalib_pedenet.scorers.position import PositionEncoding, choose_weight, neighbor_distance
from anomalib_pedenet.scorers.projection import NEIGHBOR_DISTANCE
from anomalib_pedenet.training.step import TrainingStep

SIZES = (16, 24, 32, 64)
SCORERS = ("plain", "white", "gauss")
_STRIDE = 8
_ROWS = 5_000
_COVARIANCE_ROWS = 60_000
_SHRINKAGE = 0.01  # of the variances towards their mean
_LEAST = 1e-6  # a score of 0 has no logarithm
_HELD_OUT = 16
_POWERS_OF_LEARNED = (0.0, 0.5, 1.0)
_POWERS_OF_SPREAD = (0.0, 1.0, 1.5, 2.0)


class Scores(NamedTuple):
    """What one scale and scorer say.

    Attributes:
        test (torch.Tensor): Logarithms of the test images' maps ``[N, H, W]``, on every second row and column.
        normal (torch.Tensor): Those of normal images, each scored by the others.
    """

    test: torch.Tensor
    normal: torch.Tensor

    @property
    def spread(self) -> float:
        """Standard deviation of the highest score of a normal image."""
        return float(self.normal.flatten(1).amax(dim=1).std())


def whiten(rows: torch.Tensor, shrinkage: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the mean ``[Z]`` of rows ``[N, Z]`` and the matrix ``[Z, Z]`` that makes their covariance the identity."""
    variances, directions = torch.linalg.eigh(torch.cov(rows.T).double())
    variances = variances.clamp(min=0) + shrinkage * variances.mean() + torch.finfo(torch.float32).eps
    return rows.mean(dim=0), (directions * variances.rsqrt()).float()


def nearest(
    queries: torch.Tensor,
    rows: torch.Tensor,
    images: torch.Tensor | None = None,
    images_of_rows: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the distance ``[N]`` of queries ``[N, Z]`` to the nearest of rows ``[M, Z]`` of another image."""
    smallest = []
    for start in range(0, len(queries), 2_048):
        distances = torch.cdist(queries[start : start + 2_048], rows)
        if images is not None:
            distances.masked_fill_(images[start : start + 2_048, None] == images_of_rows, torch.inf)
        smallest.append(distances.amin(dim=1))
    return torch.cat(smallest)


def score_scale(normal: Embedded, test: Embedded, size: int) -> dict[str, Scores]:
    """Score all images at one scale, by every scorer."""
    image_size = (normal.masks.shape[1], normal.masks.shape[2])
    grids, test_grids = (torch.cat([grids[size] for grids in images.grids]).float() for images in (normal, test))
    num_images, _, height, width = grids.shape
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(num_images * height * width, generator=generator)
    chosen, held_out = order[:_ROWS], torch.tensor(spread(num_images, _HELD_OUT))
    mean, matrix = whiten(_rows(grids)[order[:_COVARIANCE_ROWS]], _SHRINKAGE)

    def white(values: torch.Tensor) -> torch.Tensor:
        return torch.einsum("nzhw,zy->nyhw", values - mean[:, None, None], matrix)

    def by_neighbors(ours: torch.Tensor, theirs: torch.Tensor) -> dict[str, torch.Tensor]:
        encode = PositionEncoding(choose_weight(ours[held_out], image_size, _STRIDE))
        ours, theirs = (encode(values, image_size, _STRIDE) for values in (ours, theirs))
        bank, own = _rows(ours)[chosen], ours[held_out]
        owners = held_out.repeat_interleave(height * width)
        scores = nearest(_rows(own), bank, owners, chosen // (height * width))
        return {
            "test": nearest(_rows(theirs), bank).reshape(-1, height, width),
            "normal": scores.reshape(-1, height, width),
        }

    ours, theirs = white(grids), white(test_grids)
    # The weight of the position is chosen for distances like those of the trained embeddings.
    unit = NEIGHBOR_DISTANCE / neighbor_distance(ours[held_out])
    scores = {
        "plain": by_neighbors(grids, test_grids),
        "white": by_neighbors(unit * ours, unit * theirs),
        "gauss": {"test": theirs.norm(dim=1), "normal": ours[held_out].norm(dim=1)},
    }
    return {
        scorer: Scores(
            **{
                name: scores_to_map(values, image_size, size, _STRIDE)[:, 0, ::2, ::2].clamp(min=_LEAST).log()
                for name, values in parts.items()
            }
        )
        for scorer, parts in scores.items()
    }


def _rows(grids: torch.Tensor) -> torch.Tensor:
    """Return grids ``[N, Z, h, w]`` as rows ``[N * h * w, Z]``."""
    return grids.permute(0, 2, 3, 1).flatten(0, 2)


def measure(maps: torch.Tensor, images: Embedded) -> dict[str, float]:
    """Return pixel and image AUROC, and pixel F1 at the best threshold, of maps ``[N, H, W]`` of every second pixel."""
    masks, pixels = images.masks[:, ::2, ::2].flatten().numpy(), maps.flatten().numpy()
    precision, recall, _ = precision_recall_curve(masks, pixels)
    return {
        "pixel_AUROC": round(roc_auc_score(masks, pixels), 4),
        "image_AUROC": round(roc_auc_score(images.labels.numpy(), maps.flatten(1).amax(dim=1).numpy()), 4),
        "pixel_F1": round(float(np.max(2 * precision * recall / np.maximum(precision + recall, 1e-9))), 4),
    }


@torch.no_grad()
def learned(model: Pedenet, images: torch.Tensor, repetitions: int = 4) -> dict[int, float]:
    """Measure how much location prediction has learned at each trained scale, from 0 (chance) to 1.

    Args:
        model (Pedenet): Trained model, whose running averages this moves.
        images (torch.Tensor): Pre-processed normal images ``[N, 3, H, W]``.
        repetitions (int): Steps to average. Defaults to ``4``.
    """
    step = TrainingStep(model.model, model.loss, model.hparams, records=False)
    metrics = [step(model.model.standardize(images), density_scale=1.0)[1] for _ in range(repetitions)]
    return {
        size: 1 - float(synthetic_weight(torch.stack([values[f"loss_lpn_{size}"] for values in metrics]).mean()))
        for size in model.model.patch_sizes
    }


def run(checkpoint: Path, data_set: dict[str, Any], label: dict[str, Any], output: Path) -> None:
    """Score one checkpoint in all ways, and append the lines."""
    torch.manual_seed(0)
    model = Pedenet.load_from_checkpoint(checkpoint).eval()
    datamodule = get_datamodule(data_set["data"])
    datamodule.setup()
    data = datamodule.train_data
    sample = [data[index].image[None] for index in spread(len(data), 32)]
    images = torch.cat([model.pre_processor.transform(image) for image in sample])
    embedder = make_embedder(model, images, [Way(sizes=SIZES)])
    normal = embed_all(embedder, torch.utils.data.DataLoader(data, collate_fn=data.collate_fn))
    test = embed_all(embedder, datamodule.test_dataloader())
    shares = dict.fromkeys(SIZES, 1.0) | learned(model, images[:16])
    scores = {size: score_scale(normal, test, size) for size in SIZES}
    for size, scorer in product(SIZES, SCORERS):
        values = scores[size][scorer]
        row = {**label, "size": size, "scorer": scorer, **measure(values.test, test), "learned": round(shares[size], 3)}
        append(output / "scales.csv", [row | {"spread": round(values.spread, 4)}])
    for scorer, a, p in product(SCORERS[:2], _POWERS_OF_LEARNED, _POWERS_OF_SPREAD):
        weights = torch.tensor([shares[size] ** a / scores[size][scorer].spread ** p for size in SIZES])
        weights = weights / weights.sum()
        maps = torch.stack([w * scores[size][scorer].test for size, w in zip(SIZES, weights, strict=True)]).sum(dim=0)
        row = {**label, "scorer": scorer, "learned^": a, "1/spread^": p, **measure(maps, test)}
        append(
            output / "weights.csv",
            [row | {f"weight_{size}": round(float(w), 3) for size, w in zip(SIZES, weights, strict=True)}],
        )
    print(f"{label['data']}, seed {label['seed']}: scored", flush=True)


def main() -> None:
    """Score what was not scored yet, and print the means over the sets."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n", maxsplit=1)[0])
    parser.add_argument("--sets", type=Path, required=True, help="YAML file of data sets, see benchmarks/accuracy.py")
    parser.add_argument("--names", type=names, help="of the sets to take; by default all that have a checkpoint")
    parser.add_argument("--seeds", type=numbers, default=[0])
    parser.add_argument("--method", default="Pedenet", help="whose checkpoints to score (default: Pedenet)")
    parser.add_argument("--runs", type=Path, default=Path("runs/accuracy/runs"), help="folder of the checkpoints")
    parser.add_argument("--output", type=Path, default=Path("runs/scales"))
    options = parser.parse_args()

    table = options.output / "weights.csv"
    for (name, data_set), seed in product(read_sets(options.sets, options.names).items(), options.seeds):
        run_key = {"category": name, "method": options.method, "seed": seed}
        checkpoint = options.runs / f"{run_name(run_key)}.ckpt"
        label = {"data": name, "seed": seed}
        done = pd.read_csv(table).filter(label).drop_duplicates().to_dict("records") if table.exists() else []
        if label in done or not checkpoint.exists():
            continue
        run(checkpoint, data_set, label, options.output)
    if not table.exists():
        parser.error(f"{options.runs} has no checkpoint of {options.method}: run make bench-accuracy first")
    ways = pd.read_csv(table).groupby(["scorer", "learned^", "1/spread^"], sort=False)
    print(ways[["pixel_AUROC", "image_AUROC", "pixel_F1"]].mean().round(4).to_string())


if __name__ == "__main__":
    main()
