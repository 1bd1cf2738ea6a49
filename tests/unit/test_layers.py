# Copyright (C) 2026 The anomalib-pedenet authors
# SPDX-License-Identifier: Apache-2.0

"""No module knows one that stands above it; the order is that of docs/explanation/architecture.md."""

import ast
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "anomalib_pedenet"
LAYERS = [
    {
        "patches",
        "mixture",
        "networks",
        "loss",
        "anomaly_map",
        "region",
        "tiling",
        "false_alarms",
        "post_processor",
    },
    {"scorers"},
    {"dense_embedding", "kinds"},
    {"scales"},
    {"scoring_model"},
    {"torch_model"},
    {"recipe", "argument_checks", "data"},
    {"host"},
    {"training"},
    {"lightning_model"},
    {"aftercare"},
]
MAX_LINES = 400
MAX_LINES_OF_CLASS, MAX_LINES_OF_FUNCTION = 250, 50
"""Without docstrings."""


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


def lines_of_docstrings(node: ast.AST) -> int:
    """Return how many lines the docstrings in a class or function have."""
    firsts = [inner.body[0] for inner in ast.walk(node) if isinstance(inner, ast.ClassDef | ast.FunctionDef)]
    texts = [first for first in firsts if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)]
    return sum((text.end_lineno or 0) - text.lineno + 1 for text in texts)


def test_no_class_or_function_is_long() -> None:
    limits = {ast.ClassDef: MAX_LINES_OF_CLASS, ast.FunctionDef: MAX_LINES_OF_FUNCTION}
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef | ast.FunctionDef):
                lines = (node.end_lineno or 0) - node.lineno + 1 - lines_of_docstrings(node)
                assert lines <= limits[type(node)], f"{path.name}: {node.name} has {lines} lines"
