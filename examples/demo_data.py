# Copyright (C) 2026 The anomalib-pedenet authors
# SPDX-License-Identifier: Apache-2.0

"""Make a small defect-detection data set out of pictures that every installation already has.

scikit-image, which anomalib depends on, ships three photographs of surfaces under the Creative Commons CC0 licence:
brick, grass and gravel, 512x512 pixels, grey. This script cuts them into tiles, draws defects on some of them, and
writes the result in the folder layout of MVTec AD, so that ``anomalib.data.MVTecAD`` reads it. Nothing is downloaded.

What the data set is, and what it is not:

* **Train and test tiles show different parts of the photograph.** Each photograph is cut into three upright strips.
  Test tiles come from the middle one, training tiles from the two at its sides; no pixel is used in both. The middle
  is for testing because the brick wall is seen in perspective: its joints lean one way on the left and the other way
  on the right, so upright joints in the middle lie within what training has seen.
* **A tile is a 128x128 window enlarged to 256x256.** Patches of 64x64 pixels, as PEDENet compares them, then hold
  one brick with its joint, or a handful of stones: enough structure to recognise, little enough to learn quickly. The
  small windows also give many different views of one photograph. Windows within a strip overlap, so sixty training
  tiles are far from sixty independent pictures.
* **Brightness, contrast and noise differ a little from tile to tile**, as between two shots of one camera. The grey
  photographs are coloured by one fixed ramp per category, so that colour can be part of a defect.
* **The defects are drawn, not photographed.** Scores reached here say that the software works; they say nothing about
  how a method compares with another on real parts.

The five kinds of defect are ``misplaced`` (a piece turned and too large), ``missing`` (a piece broken out),
``scratch``, ``spot`` (a splash of paint) and ``stain`` (a discoloured area with a soft edge). A mask is white exactly
where the defect was painted: a pixel outside it equals the defect-free tile bit for bit. A defect that fades out ends,
like its mask, where its opacity falls below ``MIN_OPACITY``.

Example:
    ``python examples/demo_data.py --root demo/data`` writes ``demo/data/brick/train/good/000.png`` and so on.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import skimage.data
from PIL import Image

FloatArray = npt.NDArray[np.float64]
ByteArray = npt.NDArray[np.uint8]
BoolArray = npt.NDArray[np.bool_]

TILE = 256  # side of a tile in pixels
WINDOW = 128  # side of the part of the photograph that one tile shows
TRAIN_STRIPS = ((0, 170), (342, 512))  # columns of the photograph, [first, last)
TEST_STRIPS = ((170, 342),)
MIN_OPACITY = 0.2  # a defect ends, and its mask with it, where its opacity is below this

MANIFEST = "anomalib_pedenet_demo_data.json"  # tells our folders, which may be replaced, from everybody else's
GENERATOR_VERSION = 1  # count up whenever the same parameters would give other pictures


class Surface(NamedTuple):
    """One category: a photograph and the colours that it is given.

    Attributes:
        photograph: Function returning the photograph, uint8 of shape ``(512, 512)``.
        ramp: RGB colours that grey values 0, 128 and 255 become; those between are interpolated.
        ground: RGB colour that shows where a piece is missing.
    """

    photograph: Callable[[], ByteArray]
    ramp: tuple[tuple[int, int, int], ...]
    ground: tuple[int, int, int]


SURFACES = {
    "brick": Surface(skimage.data.brick, ((20, 8, 6), (172, 96, 74), (238, 226, 208)), (74, 62, 54)),
    "grass": Surface(skimage.data.grass, ((14, 26, 8), (98, 134, 60), (226, 236, 164)), (92, 70, 50)),
    "gravel": Surface(skimage.data.gravel, ((18, 18, 22), (128, 126, 124), (246, 242, 234)), (70, 56, 44)),
}


# --- tiles ------------------------------------------------------------------------------------------------------------


def cut_scene(surface: Surface, strips: Sequence[tuple[int, int]], rng: np.random.Generator) -> FloatArray:
    """Cut a random window out of the photograph, enlarge it and colour it.

    Args:
        surface: The category's photograph and colours.
        strips: Column ranges of the photograph that the window may touch.
        rng: Source of randomness.

    Returns:
        RGB scene in grey levels, shape ``(TILE, TILE, 3)``, without noise.
    """
    photograph = surface.photograph()
    first, last = strips[int(rng.integers(len(strips)))]
    left = rng.integers(first, last - WINDOW + 1)
    top = rng.integers(photograph.shape[0] - WINDOW + 1)
    # Cropping before enlarging matters: the interpolation then cannot reach into the neighbouring strip.
    window = Image.fromarray(photograph[top : top + WINDOW, left : left + WINDOW])
    grey = np.asarray(window.resize((TILE, TILE), Image.Resampling.BICUBIC), dtype=np.float64)
    return np.stack([np.interp(grey, (0, 128, 255), channel) for channel in zip(*surface.ramp, strict=True)], axis=-1)


def take_picture(scene: FloatArray, rng: np.random.Generator) -> ByteArray:
    """Photograph a scene: a little too bright or dark, hard or soft, and never without noise."""
    brightness = rng.uniform(-8, 8)
    contrast = rng.uniform(0.92, 1.08)
    noise = rng.normal(0, 2, scene.shape)
    return np.clip((scene - 128) * contrast + 128 + brightness + noise, 0, 255).round().astype(np.uint8)


def make_good_tile(category: str, split: str, index: int, seed: int) -> ByteArray:
    """Make one tile without a defect.

    Args:
        category: A key of ``SURFACES``.
        split: ``"train"`` or ``"test"``; decides which strips of the photograph are used.
        index: Number of the tile; every number gives another tile.
        seed: Seed of the data set.

    Returns:
        RGB image of shape ``(TILE, TILE, 3)``.
    """
    rng = _generator(seed, f"{category}/{split}/good/{index}")
    strips = TRAIN_STRIPS if split == "train" else TEST_STRIPS
    return take_picture(cut_scene(SURFACES[category], strips, rng), rng)


def make_defective_tile(category: str, kind: str, index: int, seed: int) -> tuple[ByteArray, BoolArray, ByteArray]:
    """Make one test tile with a defect.

    Args:
        category: A key of ``SURFACES``.
        kind: A key of ``DEFECTS``.
        index: Number of the tile; every number gives another tile.
        seed: Seed of the data set.

    Returns:
        The image ``(TILE, TILE, 3)``, its mask ``(TILE, TILE)``, and the same image without the defect.
    """
    name = f"{category}/test/{kind}/{index}"
    rng = _generator(seed, name)
    scene = cut_scene(SURFACES[category], TEST_STRIPS, rng)
    opacity, appearance = DEFECTS[kind](scene, SURFACES[category], rng)
    mask = opacity >= MIN_OPACITY
    opacity = np.where(mask, opacity, 0)[..., None]
    painted = scene * (1 - opacity) + appearance * opacity
    # Both pictures are taken with the same generator state, hence the same noise: they differ by the defect alone.
    image, clean = (take_picture(view, _generator(seed, f"{name}/camera")) for view in (painted, scene))
    return image, mask, clean


def _generator(seed: int, name: str) -> np.random.Generator:
    """Give every tile its own random numbers, so that asking for more tiles leaves the others as they are."""
    return np.random.default_rng([seed, zlib.crc32(name.encode())])


# --- defects ----------------------------------------------------------------------------------------------------------
# Each takes the scene, its surface and a generator, and returns an opacity (TILE, TILE) in [0, 1] and the defect's
# appearance (TILE, TILE, 3) in grey levels, which is painted over the scene with that opacity.

Paint = tuple[FloatArray, FloatArray]
ROWS, COLUMNS = np.mgrid[:TILE, :TILE].astype(np.float64)


def draw_scratch(scene: FloatArray, surface: Surface, rng: np.random.Generator) -> Paint:  # noqa: ARG001
    """Draw a thin curved line that is clearly lighter or darker than the surface."""
    start = rng.uniform(30, TILE - 30, 2)
    # The far end lies towards the middle of the tile, so that a long scratch does not run off it.
    heading = np.arctan2(*(TILE / 2 - start)) + rng.uniform(-0.7, 0.7)
    along = np.array([np.sin(heading), np.cos(heading)])
    length, bow, half_width = rng.uniform(80, 150), rng.uniform(-25, 25), rng.uniform(1.5, 2.5)
    distance = np.full((TILE, TILE), np.inf)
    for t in np.linspace(0, 1, 120):
        row, column = start + along * length * t + along[::-1] * (1, -1) * bow * np.sin(np.pi * t)
        distance = np.minimum(distance, np.hypot(ROWS - row, COLUMNS - column))
    opacity = np.clip(half_width + 0.5 - distance, 0, 1)
    light = rng.random() < 0.5
    appearance = 0.3 * scene + 0.7 * (235 if light else 30)
    return opacity, appearance


def draw_spot(scene: FloatArray, surface: Surface, rng: np.random.Generator) -> Paint:  # noqa: ARG001
    """Draw a splash of opaque paint with a rounded, slightly shiny top."""
    opacity = _irregular_patch(rng, radius=rng.uniform(10, 20), softness=2)
    colours = ((226, 222, 210), (42, 40, 44), (60, 84, 130), (196, 150, 40))
    colour = np.array(colours[rng.integers(len(colours))], dtype=np.float64)
    shine = 18 * np.roll(opacity, (-5, -5), axis=(0, 1)) - 18 * np.roll(opacity, (5, 5), axis=(0, 1))
    return opacity, colour + shine[..., None] + 0.1 * (scene - scene.mean())


def draw_missing(scene: FloatArray, surface: Surface, rng: np.random.Generator) -> Paint:  # noqa: ARG001
    """Break a piece out: dull ground shows below, in the shadow of the upper left rim."""
    opacity = _irregular_patch(rng, radius=rng.uniform(16, 28), softness=2)
    lit = np.roll(opacity, (5, 5), axis=(0, 1))
    crumbs = np.asarray(
        Image.fromarray(rng.normal(0, 10, (TILE // 4, TILE // 4)).astype(np.float32)).resize((TILE, TILE)),
        dtype=np.float64,
    )
    return opacity, (np.array(surface.ground) + crumbs[..., None]) * (0.5 + 0.5 * lit[..., None])


def draw_misplaced(scene: FloatArray, surface: Surface, rng: np.random.Generator) -> Paint:  # noqa: ARG001
    """Put a piece of the surface back turned by about a right angle and too large, with a dark gap around it."""
    angle = np.pi / 2 + rng.uniform(-0.4, 0.4)
    zoom = rng.uniform(1.3, 1.7)

    def turned(centre: FloatArray) -> FloatArray:
        down, right = (ROWS - centre[0]) / zoom, (COLUMNS - centre[1]) / zoom
        rows = centre[0] + np.cos(angle) * down - np.sin(angle) * right
        columns = centre[1] + np.sin(angle) * down + np.cos(angle) * right
        # The nearest pixel will do: the scene is an enlargement, so that its neighbouring pixels hardly differ.
        return scene[tuple(np.clip(axis.round(), 0, TILE - 1).astype(int) for axis in (rows, columns))]

    def visibility(centre: FloatArray) -> float:
        nearby = np.hypot(ROWS - centre[0], COLUMNS - centre[1]) < radius
        return float(np.abs(turned(centre) - scene)[nearby].mean())

    # Turning a piece out of the middle of a plain brick changes nothing: of a few places, take the most visible.
    radius = rng.uniform(28, 38)
    centre = max(rng.uniform(64, TILE - 64, (6, 2)), key=visibility)
    opacity = _irregular_patch(rng, radius, softness=5, centre=centre)
    gap = 4 * opacity * (1 - opacity)
    return opacity, turned(centre) * (1 - 0.7 * gap[..., None])


def draw_stain(scene: FloatArray, surface: Surface, rng: np.random.Generator) -> Paint:  # noqa: ARG001
    """Discolour an area with a soft edge; the structure below stays visible."""
    opacity = _irregular_patch(rng, radius=rng.uniform(24, 42), softness=10)
    tints = ((0.72, 0.55, 0.36), (0.50, 0.58, 0.86), (0.52, 0.50, 0.50))
    tint = np.array(tints[rng.integers(len(tints))])
    return opacity, scene * tint


DEFECTS: dict[str, Callable[[FloatArray, Surface, np.random.Generator], Paint]] = {
    "misplaced": draw_misplaced,
    "missing": draw_missing,
    "scratch": draw_scratch,
    "spot": draw_spot,
    "stain": draw_stain,
}


def _irregular_patch(
    rng: np.random.Generator,
    radius: float,
    softness: float,
    centre: FloatArray | None = None,
) -> FloatArray:
    """Opacity of a lumpy disc whose edge fades over ``softness`` pixels, shape ``(TILE, TILE)``."""
    row, column = rng.uniform(50, TILE - 50, 2) if centre is None else centre
    angle = np.arctan2(ROWS - row, COLUMNS - column)
    edge = np.full_like(angle, radius)
    for waves in (2, 3, 5):
        edge += radius * rng.uniform(0.1, 0.6) / waves * np.cos(waves * angle + rng.uniform(0, 2 * np.pi))
    return np.clip((edge - np.hypot(ROWS - row, COLUMNS - column)) / softness + 0.5, 0, 1)


# --- data set ---------------------------------------------------------------------------------------------------------


def make_demo_dataset(
    root: str | Path,
    categories: Sequence[str] = tuple(SURFACES),
    seed: int = 0,
    num_train: int = 60,
    num_test_good: int = 10,
    num_per_defect: int = 4,
    force: bool = False,
) -> Path:
    """Write the data set, unless exactly this one is there already.

    Args:
        root: Folder to create. It is complete or absent: an interrupted run leaves nothing behind.
        categories: Any of ``brick``, ``grass``, ``gravel``.
        seed: The same seed gives the same files, bit for bit.
        num_train: Training tiles per category, all without defects.
        num_test_good: Test tiles without a defect per category.
        num_per_defect: Test tiles per category and kind of defect.
        force: Replace a demo data set made with other parameters.

    Returns:
        ``root`` as a path.

    Raises:
        ValueError: If a category is unknown or a count is too small to train and test with.
        FileExistsError: If ``root`` holds something else and may not be replaced.
    """
    root = Path(root)
    if unknown := sorted(set(categories) - set(SURFACES)):
        msg = f"Unknown categories {unknown}; choose from {sorted(SURFACES)}."
        raise ValueError(msg)
    if not categories or min(num_train, num_test_good, num_per_defect) < 1:
        msg = "At least one category, and at least one tile of each sort, are needed to train and to test."
        raise ValueError(msg)
    manifest = {
        "generator_version": GENERATOR_VERSION,
        "categories": sorted(categories),
        "seed": seed,
        "num_train": num_train,
        "num_test_good": num_test_good,
        "num_per_defect": num_per_defect,
    }
    if _may_reuse(root, manifest, force=force):
        return root

    root.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root.parent, prefix=f".{root.name}-") as unfinished:
        draft = Path(unfinished) / root.name
        for category in categories:
            _write_category(draft / category, category, seed, num_train, num_test_good, num_per_defect)
        (draft / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
        if root.exists():
            shutil.rmtree(root)
        draft.rename(root)
    return root


def _may_reuse(root: Path, manifest: dict[str, Any], *, force: bool) -> bool:
    """Compare what is in ``root`` with what is wanted; refuse to touch anything that is not ours."""
    if not root.exists() or (root.is_dir() and not any(root.iterdir())):
        return False
    if not (root / MANIFEST).is_file():
        msg = f"'{root}' exists and is not a demo data set. Choose another folder with --root."
        raise FileExistsError(msg)
    found = json.loads((root / MANIFEST).read_text(encoding="utf-8"))
    if found != manifest and not force:
        differing = ", ".join(sorted(key for key in manifest if found.get(key) != manifest[key]))
        msg = (
            f"'{root}' holds a demo data set made with other parameters (differing: {differing}). "
            f"Replace it with `python examples/demo_data.py --root {root} --force`, or choose another folder with "
            "--root."
        )
        raise FileExistsError(msg)
    return bool(found == manifest)


def _write_category(
    folder: Path,
    category: str,
    seed: int,
    num_train: int,
    num_test_good: int,
    num_per_defect: int,
) -> None:
    """Write one category in the layout of MVTec AD."""
    for split, count in (("train", num_train), ("test", num_test_good)):
        for index in range(count):
            _save(make_good_tile(category, split, index, seed), folder / split / "good" / f"{index:03d}.png")
    for kind in DEFECTS:
        for index in range(num_per_defect):
            image, mask, _ = make_defective_tile(category, kind, index, seed)
            _save(image, folder / "test" / kind / f"{index:03d}.png")
            _save(mask.astype(np.uint8) * 255, folder / "ground_truth" / kind / f"{index:03d}_mask.png")


def _save(pixels: ByteArray, path: Path) -> None:
    """Write a PNG file, making its folder if needed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, compress_level=1)  # noise hardly compresses: spend little time trying


def main() -> None:
    """Command line: every argument of ``make_demo_dataset`` as an option."""
    parser = argparse.ArgumentParser(
        description="Make the demo data set: textured surfaces with drawn defects, in the layout of MVTec AD.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--root", type=Path, default=Path("demo/data"), help="folder to create")
    parser.add_argument("--categories", nargs="+", choices=list(SURFACES), default=list(SURFACES), help="surfaces")
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same files")
    parser.add_argument("--num-train", type=int, default=60, help="training tiles per category")
    parser.add_argument("--num-test-good", type=int, default=10, help="test tiles without a defect per category")
    parser.add_argument("--num-per-defect", type=int, default=4, help="test tiles per category and kind of defect")
    parser.add_argument("--force", action="store_true", help="replace a demo data set made with other parameters")
    options = parser.parse_args()
    try:
        root = make_demo_dataset(**vars(options))
    except (ValueError, FileExistsError) as error:
        parser.exit(1, f"error: {error}\n")
    print(f"The demo data set is in {root}")


if __name__ == "__main__":
    main()
