# Copyright (C) 2026 The anomalib-pedenet authors
# SPDX-License-Identifier: Apache-2.0

"""No module knows one that stands above it; the order is that of docs/explanation/architecture.md."""

import ast
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "anomalib_pedenet"
LAYERS = [
    {"patches", "mixture", "networks", "loss", "anomaly_map", "region", "tiling", "false_alarms", "post_processor"},
    {"scorers"},
    {"dense_embedding", "scales"},
    {"scoring_model"},
    {"torch_model"},
    {"recipe", "hyper_parameters", "data"},
    {"host"},
    {"training"},
    {"lightning_model"},
    {"aftercare"},
]
MAX_LINES = 400


def layer(module: str) -> int:
    """Return the layer of a module by the part of its name below the package."""
    part = module.split(".")[1]
    (found,) = [index for index, parts in enumerate(LAYERS) if part in parts]
    return found


def imported(path: Path) -> set[str]:
    """Return the modules of the package that a file imports, wherever it does."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("anomalib_pedenet"):
            names |= {
                f"{node.module}.{alias.name}" if node.module.count(".") == 0 else node.module for alias in node.names
            }
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names if alias.name.startswith("anomalib_pedenet.")}
    return names


def test_imports_flow_one_way() -> None:
    upward = []
    for path in PACKAGE.rglob("*.py"):
        module = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
        if module.startswith("anomalib_pedenet.__init__"):
            continue
        for name in imported(path):
            if name in {
                "anomalib_pedenet.Pedenet",
                "anomalib_pedenet.__version__",
            }:  # the registration's
                continue
            if layer(name) > layer(module):
                upward.append(f"{module} imports {name}")
    assert not upward


def test_no_module_is_long() -> None:
    lines = {str(path): len(path.read_text(encoding="utf-8").splitlines()) for path in PACKAGE.rglob("*.py")}
    assert {path: count for path, count in lines.items() if count > MAX_LINES} == {}
