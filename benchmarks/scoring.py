# Copyright (C) 2026 The anomalib-pedenet authors
# SPDX-License-Identifier: Apache-2.0

"""Train once, then score in many ways: strides, bank, place of a patch, scales, smoothing, and the image's score.

Each way is one step away from the defaults. A line of ``<output>.csv`` holds pixel and image AUROC on defects drawn on
normal images that were held back (``drawn_``, the label-free figure) and on the test images. Pixels are compared on
every second row and column. Nothing is trained anew, so ways compare exactly.

Example:
    ``python benchmarks/scoring.py --data configs/data/mvtec_ad.yaml --seeds 0 1 2 --output runs/scoring_bottle``
"""

import argparse
import math
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch
import yaml
from anomalib.data import Batch
from anomalib.engine import Engine
from anomalib.models import Pedenet
from lightning.pytorch import seed_everything
from sklearn.metrics import roc_auc_score
from torchvision.transforms.v2.functional import gaussian_blur
from train import append, make_datamodule

from anomalib_pedenet.anomaly_map import Combination, combine_maps, scores_to_map
from anomalib_pedenet.criterion import draw_test_defects
from anomalib_pedenet.patches import BASE_STRIDE
from anomalib_pedenet.position import WEIGHTS, PositionEncoding, choose_weight, measure_alignment
from anomalib_pedenet.scorers import NearestNeighborScorer


class Way(NamedTuple):
    """A way of scoring; the defaults are Pedenet's.

    Attributes:
        sizes (tuple[int, ...]): Scales that are scored.
        combination (Combination): How their maps are combined.
        normalized (bool): Whether each is divided by the typical score of normal patches first.
        stride (int): Distance between the patches of a scored image in pixels.
        bank_stride (int): Distance between the patches of the training images in pixels.
        bank_size (int): Rows of the memory bank.
        position (float | None): Weight of a patch's position; ``None`` to choose it from normal images.
        smoothing (float): Standard deviation in pixels of a Gaussian blur of the map; 0 for none.
        top_share (float): The image's score is the mean over this share of its highest pixels; 0 for the maximum.
    """

    sizes: tuple[int, ...] = (32,)
    combination: Combination = "product"
    normalized: bool = True
    stride: int = 8
    bank_stride: int = 8
    bank_size: int = 50_000
    position: float | None = None
    smoothing: float = 0.0
    top_share: float = 0.0


WAYS = {
    "defaults": Way(),
    **{f"stride {stride}": Way(stride=stride) for stride in (2, 4, 16, 32)},
    **{f"bank_stride {stride}": Way(bank_stride=stride) for stride in (2, 4, 16, 32)},
    **{f"bank_size {size}": Way(bank_size=size) for size in (200, 1_000, 5_000, 20_000, 100_000)},
    **{f"position_weight {weight}": Way(position=weight) for weight in (0.0, 4.0, 8.0, 16.0, 32.0, 64.0)},
    "64 px": Way(sizes=(64,)),
    "32 and 64 px, product": Way(sizes=(32, 64)),
    "32 and 64 px, mean": Way(sizes=(32, 64), combination="mean"),
    "32 and 64 px, mean, not normalised": Way(sizes=(32, 64), combination="mean", normalized=False),
    **{f"blur {sigma} px": Way(smoothing=sigma) for sigma in (2.0, 4.0, 8.0)},
    **{f"top {share:.1%}": Way(top_share=share) for share in (0.001, 0.01, 0.05)},
}


class Embedded(NamedTuple):
    """Images as embeddings at the finest stride, with what is true of them.

    Attributes:
        grids (list[dict[int, torch.Tensor]]): For each image and scale, ``[1, Z, h, w]``, float16.
        masks (torch.Tensor): True defects, ``[N, H, W]``.
        labels (torch.Tensor): Which images are defective, ``[N]``.
    """

    grids: list[dict[int, torch.Tensor]]
    masks: torch.Tensor
    labels: torch.Tensor


@torch.no_grad()
def embed(model: Pedenet, images: torch.Tensor, masks: torch.Tensor) -> Embedded:
    """Embed pre-processed images ``[N, 3, H, W]`` with masks ``[N, H, W]``, empty where there is no defect."""
    grids = []
    for image in model.model.standardize(images).split(1):
        embedded = model.model.embedding_network.embed_dense(image, BASE_STRIDE)
        grids.append({size: grid.half() for size, grid in embedded.items()})
    return Embedded(grids, masks, masks.flatten(1).any(dim=1))


def embed_all(model: Pedenet, batches: Iterable[Batch]) -> Embedded:
    """Embed all images of a loader."""
    parts = []
    for batch in batches:
        images = model.pre_processor.transform(batch.image)
        masks = torch.zeros(len(images), 1, *images.shape[-2:])
        if batch.gt_mask is not None:
            masks = batch.gt_mask.reshape(len(images), 1, *batch.gt_mask.shape[-2:]).float()
            masks = torch.nn.functional.interpolate(masks, images.shape[-2:], mode="nearest")
        parts.append(embed(model, images, masks[:, 0].bool()))
    return join(parts)


def join(parts: Sequence[Embedded]) -> Embedded:
    """Join several sets of images."""
    grids, masks, labels = zip(*parts, strict=True)
    return Embedded(list(chain.from_iterable(grids)), torch.cat(masks), torch.cat(labels))


def at_stride(images: Embedded, size: int, stride: int) -> Iterator[torch.Tensor]:
    """Yield each image's embeddings of one scale at a coarser stride, ``[1, Z, h, w]``, float32."""
    step = stride // BASE_STRIDE
    for grids in images.grids:
        yield grids[size][..., ::step, ::step].float()


def evenly_spread(images: Embedded, size: int, stride: int, limit: int = 32) -> torch.Tensor:
    """Return the embeddings ``[n, Z, h, w]`` of some images from all over a set."""
    grids = list(at_stride(images, size, stride))
    return torch.cat([grids[index] for index in torch.linspace(0, len(grids) - 1, min(limit, len(grids))).long()])


def anomaly_maps(way: Way, normal: Embedded, images: Embedded) -> torch.Tensor:
    """Score images one way, without smoothing, and return their maps ``[N, H, W]``."""
    image_size = tuple(images.masks.shape[1:])
    maps = []
    for size in way.sizes:
        weight = way.position
        if weight is None:
            weight = choose_weight(evenly_spread(normal, size, way.bank_stride), image_size, way.bank_stride)
        encoding = PositionEncoding(weight)
        scorer = NearestNeighborScorer(next(at_stride(normal, size, 32)).shape[1] + 2, way.bank_size)
        scorer.fit(
            encoding(grid, image_size, way.bank_stride).flatten(2)[0].T
            for grid in at_stride(normal, size, way.bank_stride)
        )
        unit = scorer.typical_score if way.normalized else 1.0
        scores = []
        for grid in at_stride(images, size, way.stride):
            distances = scorer(encoding(grid, image_size, way.stride).flatten(2).transpose(1, 2))
            scores.append(scores_to_map(distances.unflatten(1, grid.shape[-2:]) / unit, image_size, size, way.stride))
        maps.append(torch.cat(scores))
    return combine_maps(maps, way.combination)[:, 0]


def measure(way: Way, maps: torch.Tensor, images: Embedded) -> dict[str, float]:
    """Return pixel and image AUROC of maps ``[N, H, W]``."""
    if way.smoothing > 0:
        side = 2 * math.ceil(3 * way.smoothing) + 1
        maps = gaussian_blur(maps[:, None], [side, side], [way.smoothing, way.smoothing])[:, 0]
    count = max(1, round(way.top_share * maps[0].numel()))
    scores = maps.flatten(1).topk(count, dim=1).values.mean(dim=1)
    pixels, masks = maps[:, ::2, ::2], images.masks[:, ::2, ::2]
    return {
        "pixel_AUROC": round(roc_auc_score(masks.flatten().numpy(), pixels.flatten().numpy()), 4),
        "image_AUROC": round(roc_auc_score(images.labels.numpy(), scores.numpy()), 4),
    }


def train(options: argparse.Namespace, seed: int) -> tuple[Embedded, Embedded, Embedded]:
    """Train; return the normal images trained on, those held back without and with a defect, and the test images."""
    seed_everything(seed)
    model = Pedenet(**{"holdout": options.holdout} | options.base, evaluator=False, visualizer=False)
    datamodule = make_datamodule(options)
    with tempfile.TemporaryDirectory() as results:
        engine = Engine(
            default_root_dir=results, logger=False, enable_progress_bar=False, accelerator="cpu", limit_val_batches=0
        )
        engine.fit(model, datamodule=datamodule)
    model.eval()
    held_back = model._held_back  # noqa: SLF001 - what the training has chosen
    data = torch.utils.data.Subset(datamodule.train_data, held_back.trained_on)
    normal = embed_all(model, torch.utils.data.DataLoader(data, collate_fn=datamodule.train_data.collate_fn))
    drawn = draw_test_defects(held_back.normal, unit=model.model.input_std)
    without = embed(model, held_back.normal, torch.zeros_like(drawn.masks))
    return (
        normal,
        join([without, embed(model, drawn.images, drawn.masks)]),
        embed_all(model, datamodule.test_dataloader()),
    )


def main() -> None:
    """Train with each seed and score in every way."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n", maxsplit=1)[0])
    parser.add_argument("--data", type=Path, required=True, help="configuration of a data module, see configs/data")
    parser.add_argument("--root", type=Path, help="root of the data set, instead of the configuration's")
    parser.add_argument("--category", help="category, instead of the configuration's")
    parser.add_argument("--base", type=yaml.safe_load, default={}, help="arguments of Pedenet, YAML")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--holdout", type=float, default=0.15, help="part of the normal images to hold back")
    parser.add_argument("--output", default="scoring", help="path of the CSV file, without ending")
    options = parser.parse_args()

    for seed in options.seeds:
        normal, held_back, test = train(options, seed)
        image_size = tuple(test.masks.shape[1:])
        for size in sorted(normal.grids[0]):
            alignments = measure_alignment(evenly_spread(normal, size, 8), image_size, 8)
            values = ", ".join(
                f"{value:.2f} at {weight:g}" for weight, value in zip(WEIGHTS[1:], alignments, strict=True)
            )
            print(f"seed {seed}, {size} px: alignment by weight of the position: {values}", flush=True)
        for name, way in WAYS.items():
            row: dict[str, Any] = {"data": options.category or options.data.stem, "way": name, "seed": seed}
            start = time.monotonic()
            for prefix, images in (("drawn_", held_back), ("", test)):
                maps = anomaly_maps(way, normal, images)
                row |= {f"{prefix}{metric}": value for metric, value in measure(way, maps, images).items()}
            row["seconds"] = round(time.monotonic() - start, 1)
            append(Path(f"{options.output}.csv"), [row])
            print(row, flush=True)
    table = pd.read_csv(f"{options.output}.csv").groupby("way", sort=False).mean(numeric_only=True)
    print(table.drop(columns="seed").round(4).to_string())


if __name__ == "__main__":
    main()
