# Copyright (C) 2026 The anomalib-pedenet authors
# SPDX-License-Identifier: Apache-2.0

"""Every configuration makes what it names, by anomalib's own factories."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from anomalib.data import get_datamodule
from anomalib.models import get_model

from anomalib_pedenet import Pedenet

CONFIGS = Path(__file__).parents[2] / "configs"


def read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    return content


@pytest.mark.parametrize("path", sorted((CONFIGS / "model").glob("*.yaml")), ids=lambda path: path.stem)
def test_model_configurations(path: Path) -> None:
    model = get_model(read(path))
    assert isinstance(model, Pedenet)
    for name, value in read(path)["init_args"].items():
        assert model.hparams[name] == value


@pytest.mark.parametrize("path", sorted((CONFIGS / "data").glob("*.yaml")), ids=lambda path: path.stem)
def test_data_configurations(path: Path) -> None:
    config = read(path)
    assert get_datamodule(config).name.lower() in {"mvtecad", "parts", "commutator"}


def test_the_papers_configuration_has_the_papers_parameters() -> None:
    model = get_model(read(CONFIGS / "model" / "paper.yaml"))
    assert sum(parameter.numel() for parameter in model.model.parameters()) == 467_378
