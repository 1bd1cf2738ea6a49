# Copyright (C) 2026 The anomalib-pedenet authors
# SPDX-License-Identifier: Apache-2.0

"""Train once, then score in many ways: strides, bank, place of a patch, scales, smoothing, and the image's score.

Each way is one step away from the defaults. A line of ``<output>.csv`` holds pixel and image AUROC on defects drawn on
normal images that were held back (``drawn_``, the label-free figure) and on the test images, the bytes of the scorers'
state, the seconds to fit them and the milliseconds to score an image's embeddings. Pixels are compared on every second
row and column. Nothing is trained anew, so ways compare exactly.

``--ways scorers`` compares all scorers, and small banks; ``--ckpt_path`` takes a trained model instead of training one
(there are no drawn defects then, since no images were held back).

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
from typing import Any, Literal, NamedTuple

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

from anomalib_pedenet.anomaly_map import combine_maps, scores_to_map
from anomalib_pedenet.patches import MID_LEVEL_SIZES
from anomalib_pedenet.scorers import Coreset, Scorer, make_scorer, scorer_class
from anomalib_pedenet.scorers.position import WEIGHTS, PositionEncoding, choose_weight, measure_alignment
from anomalib_pedenet.scorers.projection import PrincipalProjection
from anomalib_pedenet.training.label_free import draw_test_defects

_ALL_ROWS = 10_000_000
_ALIGNMENT_STRIDE = 8


class Way(NamedTuple):
    """A way of scoring; the defaults are Pedenet's.

    Attributes:
        sizes (tuple[int, ...] | None): Scales that are scored, all alike; ``None`` for the model's and their weights.
        combination (Literal["product", "mean"]): How their maps are combined.
        normalized (bool): Whether each is divided by the typical score of normal patches first.
        stride (int): Distance between the patches of a scored image in pixels.
        bank_stride (int): Distance between the patches of the training images in pixels.
        scorer (str | dict[str, Any]): Scorer.
        bank_size (int): Rows of the memory bank.
        coreset (Coreset): How they are chosen.
        position (float | None): Weight of a patch's position; ``None`` to choose it from normal images.
        smoothing (float): Standard deviation in pixels of a Gaussian blur of the map; 0 for none.
        top_share (float): The image's score is the mean over this share of its highest pixels; 0 for the maximum.
    """

    sizes: tuple[int, ...] | None = None
    combination: Literal["product", "mean"] = "product"
    normalized: bool = True
    stride: int = 8
    bank_stride: int = 8
    scorer: str | dict[str, Any] = "exact"
    bank_size: int = 5_000
    coreset: Coreset = "auto"
    position: float | None = None
    smoothing: float = 0.0
    top_share: float = 0.0


WAYS = {
    "defaults": Way(),
    **{f"stride {stride}": Way(stride=stride) for stride in (2, 4, 16, 32)},
    **{f"bank_stride {stride}": Way(bank_stride=stride) for stride in (2, 4, 16, 32)},
    **{f"bank_size {size}": Way(bank_size=size) for size in (500, 1_000, 2_000, 5_000, 15_000, 50_000)},
    **{f"position_weight {weight}": Way(position=weight) for weight in (0.0, 4.0, 8.0, 16.0, 32.0, 64.0)},
    **{f"{size} px": Way(sizes=(size,)) for size in (*MID_LEVEL_SIZES, 32, 64)},
    **{f"{size} and 32 px": Way(sizes=(size, 32)) for size in MID_LEVEL_SIZES},
    "32 and 64 px, product": Way(sizes=(32, 64)),
    "32 and 64 px, mean": Way(sizes=(32, 64), combination="mean"),
    "32 and 64 px, mean, not normalised": Way(sizes=(32, 64), combination="mean", normalized=False),
    **{f"blur {sigma} px": Way(smoothing=sigma) for sigma in (2.0, 4.0, 8.0)},
    **{f"top {share:.1%}": Way(top_share=share) for share in (0.001, 0.01, 0.05)},
}


def with_arguments(name: str, **arguments: Any) -> dict[str, Any]:  # noqa: ANN401 - arguments of any scorer
    """Return a scorer with arguments, as ``Pedenet`` takes it."""
    return {"class_path": name, "init_args": arguments}


SCORER_WAYS = {
    "exact": Way(),
    "exact, all rows": Way(bank_size=_ALL_ROWS),
    **{
        f"exact, {coreset}, {size} rows": Way(bank_size=size, coreset=coreset)
        for size in (500, 1_000, 2_000, 5_000, 10_000)
        for coreset in ("uniform", "k_center", "k_means")
    },
    **{f"exact, uniform, {size} rows": Way(bank_size=size) for size in (15_000, 50_000, 100_000)},
    "exact, without position": Way(position=0.0),
    **{f"exact, {k} neighbours": Way(scorer=with_arguments("exact", num_neighbors=k)) for k in (3, 9)},
    "exact, re-weighted": Way(scorer=with_arguments("exact", reweight_neighbors=9)),
    **{f"local, radius {radius}": Way(scorer=with_arguments("local", radius=radius)) for radius in (0, 1, 2, 4)},
    **{name: Way(scorer=name) for name in ("faiss_flat", "faiss_ivf", "faiss_hnsw", "faiss_pq")},
    "density": Way(scorer="density"),
    "density, diagonal": Way(scorer=with_arguments("density", covariance_type="diag")),
    "mahalanobis": Way(scorer="mahalanobis"),
    "ocsvm": Way(scorer="ocsvm"),
    "svdd": Way(scorer="svdd"),
}


class Embedded(NamedTuple):
    """Images as embeddings, with what is true of them.

    Attributes:
        stride (int): Distance between neighbouring embeddings in pixels.
        grids (list[dict[int, torch.Tensor]]): For each image and scale, ``[1, Z, h, w]``, float16.
        masks (torch.Tensor): True defects, ``[N, H, W]``.
        labels (torch.Tensor): Which images are defective, ``[N]``.
    """

    stride: int
    grids: list[dict[int, torch.Tensor]]
    masks: torch.Tensor
    labels: torch.Tensor


class Embedder(NamedTuple):
    """What turns images into embeddings.

    Attributes:
        model (Pedenet): Trained model.
        projections (dict[int, PrincipalProjection | None]): Of the sizes to embed; ``None`` for those trained.
        stride (int): Distance between neighbouring embeddings in pixels.
    """

    model: Pedenet
    projections: dict[int, PrincipalProjection | None]
    stride: int


@torch.no_grad()
def make_embedder(model: Pedenet, images: torch.Tensor, ways: Iterable[Way]) -> Embedder:
    """Make what embeds images as finely and at the sizes that ways need.

    Args:
        model (Pedenet): Trained model.
        images (torch.Tensor): Pre-processed normal images ``[N, 3, H, W]``, to fit the projections on.
        ways (Iterable[Way]): Ways.

    Returns:
        Embedder: With projections of mid-level sizes.
    """
    network = model.model.embedding_network
    ways = list(ways)
    sizes = set(chain.from_iterable(way.sizes or model.model.scale_shares for way in ways))
    projections: dict[int, PrincipalProjection | None] = {}
    for size in sorted(sizes):
        if size not in MID_LEVEL_SIZES:
            projections[size] = None
            continue
        channels = network.mid_level_channels(size)
        projection = PrincipalProjection(channels, min(channels, model.model.embedding_dim))
        grids = [network.embed_dense(image, 8, [size])[size] for image in model.model.standardize(images).split(1)]
        projection.fit(torch.cat(grids))
        projections[size] = projection
    strides = chain.from_iterable((way.stride, way.bank_stride) for way in ways)
    return Embedder(model, projections, math.gcd(_ALIGNMENT_STRIDE, *strides))


@torch.no_grad()
def embed(embedder: Embedder, images: torch.Tensor, masks: torch.Tensor) -> Embedded:
    """Embed pre-processed images ``[N, 3, H, W]`` with masks ``[N, H, W]``, empty where there is no defect."""
    grids = []
    model = embedder.model.model
    for image in model.standardize(images).split(1):
        embedded = model.embedding_network.embed_dense(image, embedder.stride, list(embedder.projections))
        grids.append(
            {
                size: (embedded[size] if projection is None else projection(embedded[size])).half()
                for size, projection in embedder.projections.items()
            }
        )
    return Embedded(embedder.stride, grids, masks, masks.flatten(1).any(dim=1))


def embed_all(embedder: Embedder, batches: Iterable[Batch]) -> Embedded:
    """Embed all images of a loader."""
    parts = []
    for batch in batches:
        images = embedder.model.pre_processor.transform(batch.image)
        masks = torch.zeros(len(images), 1, *images.shape[-2:])
        if batch.gt_mask is not None:
            masks = batch.gt_mask.reshape(len(images), 1, *batch.gt_mask.shape[-2:]).float()
            masks = torch.nn.functional.interpolate(masks, images.shape[-2:], mode="nearest")
        parts.append(embed(embedder, images, masks[:, 0].bool()))
    return join(parts)


def join(parts: Sequence[Embedded]) -> Embedded:
    """Join several sets of images."""
    strides, grids, masks, labels = zip(*parts, strict=True)
    return Embedded(strides[0], list(chain.from_iterable(grids)), torch.cat(masks), torch.cat(labels))


def at_stride(images: Embedded, size: int, stride: int) -> Iterator[torch.Tensor]:
    """Yield each image's embeddings of one scale at a coarser stride, ``[1, Z, h, w]``, float32."""
    step = stride // images.stride
    for grids in images.grids:
        yield grids[size][..., ::step, ::step].float()


def evenly_spread(images: Embedded, size: int, stride: int, limit: int = 32) -> torch.Tensor:
    """Return the embeddings ``[n, Z, h, w]`` of some images from all over a set."""
    grids = list(at_stride(images, size, stride))
    return torch.cat([grids[index] for index in torch.linspace(0, len(grids) - 1, min(limit, len(grids))).long()])


class Fitted(NamedTuple):
    """The scorers of a way.

    Attributes:
        shares (dict[int, float]): How much each scale counts.
        scorers (dict[int, Scorer]): By scale.
        encodings (dict[int, PositionEncoding]): What appends positions, by scale.
        seconds (float): Time of the fit.
    """

    shares: dict[int, float]
    scorers: dict[int, Scorer]
    encodings: dict[int, PositionEncoding]
    seconds: float

    @property
    def bytes(self) -> int:
        """Bytes of the scorers' state."""
        states = [scorer.state_dict().values() for scorer in self.scorers.values()]
        return sum(value.numel() * value.element_size() for value in chain.from_iterable(states))

    def arrange(self, grid: torch.Tensor, size: int, image_size: tuple[int, int], stride: int) -> torch.Tensor:
        """Return a grid ``[1, Z, h, w]`` as its scorer takes it, ``[1, h, w, Z or Z + 2]``."""
        if self.scorers[size].encodes_position:
            grid = self.encodings[size](grid, image_size, stride)
        return grid.permute(0, 2, 3, 1)


@torch.no_grad()
def fit(way: Way, model: Pedenet, normal: Embedded) -> Fitted:
    """Fit the scorers of a way on normal images."""
    image_size = (normal.masks.shape[1], normal.masks.shape[2])
    shares = model.model.scale_shares if way.sizes is None else dict.fromkeys(way.sizes, 1.0)
    fitted = Fitted(shares, {}, {}, 0.0)
    kind = scorer_class(way.scorer)
    stride = way.stride if kind.by_place else way.bank_stride
    seconds = 0.0
    for size in shares:
        weight = way.position
        if weight is None and kind.encodes_position:
            weight = choose_weight(evenly_spread(normal, size, stride), image_size, stride)
        fitted.encodings[size] = PositionEncoding(weight or 0.0)
        fitted.scorers[size] = make_scorer(
            way.scorer,
            embedding_dim=normal.grids[0][size].shape[1] + 2 * kind.encodes_position,
            bank_size=way.bank_size,
            coreset=way.coreset,
            density_network=model.model.density_networks[str(size)] if size in model.model.patch_sizes else None,
        )
        start = time.monotonic()
        fitted.scorers[size].fit(
            fitted.arrange(grid, size, image_size, stride) for grid in at_stride(normal, size, stride)
        )
        seconds += time.monotonic() - start
    return fitted._replace(seconds=seconds)


@torch.no_grad()
def score(way: Way, fitted: Fitted, images: Embedded) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Score images one way, without smoothing.

    Returns:
        tuple[torch.Tensor, torch.Tensor, float]: Maps ``[N, H, W]``, weights of the images' scores ``[N]``, and
            milliseconds of the scorers for an image.
    """
    image_size = (images.masks.shape[1], images.masks.shape[2])
    maps, weights, seconds = [], torch.ones(len(images.grids)), 0.0
    for size, scorer in fitted.scorers.items():
        unit = scorer.typical_score if way.normalized else 1.0
        parts = []
        for index, grid in enumerate(at_stride(images, size, way.stride)):
            embeddings = fitted.arrange(grid, size, image_size, way.stride)
            start = time.perf_counter()
            scores = scorer(embeddings)
            weight = scorer.image_weights(embeddings, scores)
            seconds += time.perf_counter() - start
            parts.append(scores_to_map(scores / unit, image_size, size, way.stride))
            weights[index] = 1.0 if weight is None else weight
        maps.append(torch.cat(parts))
    combined = combine_maps(maps, list(fitted.shares.values()), way.combination)[:, 0]
    return combined, weights, 1000 * seconds / len(images.grids)


def measure(way: Way, maps: torch.Tensor, weights: torch.Tensor, images: Embedded) -> dict[str, float]:
    """Return pixel and image AUROC of maps ``[N, H, W]``, the images' scores times their weights ``[N]``."""
    if way.smoothing > 0:
        side = 2 * math.ceil(3 * way.smoothing) + 1
        maps = gaussian_blur(maps[:, None], [side, side], [way.smoothing, way.smoothing])[:, 0]
    count = max(1, round(way.top_share * maps[0].numel()))
    scores = maps.flatten(1).topk(count, dim=1).values.mean(dim=1) * weights
    pixels, masks = maps[:, ::2, ::2], images.masks[:, ::2, ::2]
    return {
        "pixel_AUROC": round(roc_auc_score(masks.flatten().numpy(), pixels.flatten().numpy()), 4),
        "image_AUROC": round(roc_auc_score(images.labels.numpy(), scores.numpy()), 4),
    }


def train(
    options: argparse.Namespace, seed: int, ways: dict[str, Way]
) -> tuple[Pedenet, Embedded, dict[str, Embedded]]:
    """Train, or load a trained model, and embed the images as finely as ways need.

    Returns:
        tuple[Pedenet, Embedded, dict[str, Embedded]]: The model, the normal images it was trained on, and images to
            score by the prefix of their figures: the test images, and those held back without and with a defect.
    """
    seed_everything(seed)
    datamodule = make_datamodule(options)
    if options.ckpt_path is not None:
        model = Pedenet.load_from_checkpoint(options.ckpt_path)
        datamodule.setup()
    else:
        model = Pedenet(**{"holdout": options.holdout} | options.base, evaluator=False, visualizer=False)
        with tempfile.TemporaryDirectory() as results:
            engine = Engine(
                default_root_dir=results,
                logger=False,
                enable_progress_bar=False,
                accelerator="cpu",
                limit_val_batches=0,
            )
            engine.fit(model, datamodule=datamodule)
    model.eval()
    held_back = model._held_back  # noqa: SLF001 - what the training has chosen
    trained_on = range(len(datamodule.train_data)) if held_back is None else held_back.trained_on
    data = torch.utils.data.Subset(datamodule.train_data, trained_on)
    sample = [data[index].image for index in torch.linspace(0, len(data) - 1, min(32, len(data))).long()]
    images = torch.cat([model.pre_processor.transform(image[None]) for image in sample])
    embedder = make_embedder(model, images, ways.values())
    batches = torch.utils.data.DataLoader(data, collate_fn=datamodule.train_data.collate_fn)
    normal = embed_all(embedder, batches)
    sets = {"": embed_all(embedder, datamodule.test_dataloader())}
    if held_back is not None:
        drawn = draw_test_defects(held_back.normal)
        without = embed(embedder, held_back.normal, torch.zeros_like(drawn.masks))
        sets["drawn_"] = join([without, embed(embedder, drawn.images, drawn.masks)])
    return model, normal, sets


def main() -> None:
    """Train with each seed and score in every way."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n", maxsplit=1)[0])
    parser.add_argument("--data", type=Path, required=True, help="configuration of a data module, see configs/data")
    parser.add_argument("--root", type=Path, help="root of the data set, instead of the configuration's")
    parser.add_argument("--category", help="category, instead of the configuration's")
    parser.add_argument("--base", type=yaml.safe_load, default={}, help="arguments of Pedenet, YAML")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of the trainings (default: 0)")
    parser.add_argument("--holdout", type=float, default=0.15, help="part of the normal images to hold back")
    parser.add_argument("--ways", choices=("settings", "scorers"), default="settings", help="what to compare")
    parser.add_argument("--only", nargs="+", metavar="WAY", help="names of ways, instead of all")
    parser.add_argument("--ckpt_path", type=Path, help="checkpoint of a trained model, instead of training")
    parser.add_argument("--output", default="scoring", help="path of the CSV file, without ending")
    options = parser.parse_args()

    ways = WAYS if options.ways == "settings" else SCORER_WAYS
    if options.only is not None:
        unknown = set(options.only) - set(ways)
        if unknown:
            parser.error(f"unknown ways {', '.join(sorted(unknown))}: --ways {options.ways} has {'; '.join(ways)}")
        ways = {name: ways[name] for name in options.only}

    for seed in options.seeds:
        model, normal, sets = train(options, seed, ways)
        image_size = (normal.masks.shape[1], normal.masks.shape[2])
        for size in sorted(normal.grids[0]):
            grids = evenly_spread(normal, size, _ALIGNMENT_STRIDE)
            alignments = measure_alignment(grids, image_size, _ALIGNMENT_STRIDE)
            values = ", ".join(
                f"{value:.2f} at {weight:g}" for weight, value in zip(WEIGHTS[1:], alignments, strict=True)
            )
            print(f"seed {seed}, {size} px: alignment by weight of the position: {values}", flush=True)
        for name, way in ways.items():
            row: dict[str, Any] = {"data": options.category or options.data.stem, "way": name, "seed": seed}
            fitted = fit(way, model, normal)
            for prefix, images in sets.items():
                maps, weights, milliseconds = score(way, fitted, images)
                row |= {f"{prefix}{metric}": value for metric, value in measure(way, maps, weights, images).items()}
            row |= {"bytes": fitted.bytes, "fit_seconds": round(fitted.seconds, 2), "score_ms": round(milliseconds, 2)}
            append(Path(f"{options.output}.csv"), [row])
            print(row, flush=True)
    table = pd.read_csv(f"{options.output}.csv").groupby("way", sort=False).mean(numeric_only=True)
    print(table.drop(columns="seed").round(4).to_string())


if __name__ == "__main__":
    main()
