# Copyright (C) 2026 The anomalib-pedenet authors
# SPDX-License-Identifier: Apache-2.0

"""Every configuration makes what it names, by anomalib's own factories."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from anomalib.data import get_datamodule
from anomalib.data.datasets.image.mvtecad import CATEGORIES
from anomalib.models import get_model

from anomalib_pedenet import Pedenet

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs"


def read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    return content


def side_by_side(arguments: dict[str, Any]) -> dict[str, Any]:
    """Return arguments with the recipe's parts among them."""
    return {name: value for name, value in arguments.items() if name != "recipe"} | arguments.get("recipe", {})


@pytest.mark.parametrize("path", sorted((CONFIGS / "model").glob("*.yaml")), ids=lambda path: path.stem)
def test_model_configurations(path: Path) -> None:
    model = get_model(read(path))
    assert isinstance(model, Pedenet)
    for name, value in side_by_side(read(path)["init_args"]).items():
        assert value is None or model.hparams[name] == value


@pytest.mark.parametrize("path", sorted((CONFIGS / "data").glob("*.yaml")), ids=lambda path: path.stem)
def test_data_configurations(path: Path) -> None:
    config = read(path)
    assert get_datamodule(config).name.lower() in {"mvtecad", "visa", "parts", "commutator"}


def test_the_papers_configuration_has_the_papers_parameters() -> None:
    model = get_model(read(CONFIGS / "model" / "paper.yaml"))
    assert sum(parameter.numel() for parameter in model.model.parameters()) == 467_378


def test_the_benchmark_of_all_categories_has_them_all() -> None:
    config = read(CONFIGS / "benchmark" / "mvtec_ad_all.yaml")
    assert sorted(config["benchmark"]["data"]["init_args"]["category"]["grid"]) == sorted(CATEGORIES)


def test_benchmarks_compare_with_patch_svdd_as_it_is_configured() -> None:
    """The same arguments in both places, but for the length of the training and of its epochs."""
    lengths = {"max_steps", "steps_per_image"}
    arguments = [
        side_by_side(read(CONFIGS / "model" / "patch_svdd.yaml")["init_args"]),
        read(ROOT / "benchmarks" / "methods.yaml")["Patch-SVDD's recipe"],
    ]
    first, other = [{name: value for name, value in each.items() if name not in lengths} for each in arguments]
    assert other == first
    assert first["lambda_svdd"] > 0
