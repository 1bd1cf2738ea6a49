# Copyright (C) 2026 The anomalib-pedenet authors
# SPDX-License-Identifier: Apache-2.0

"""What the documentation says to type works: its Python runs, and anomalib takes its commands."""

import re
import shlex
import shutil
from pathlib import Path

import pytest
from anomalib.cli import AnomalibCLI
from anomalib.engine import Engine
from anomalib.models import Pedenet

ROOT = Path(__file__).parents[2]
DOCUMENTS = ("README.md", "docs/guide.md")


def blocks(document: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / document).read_text(encoding="utf-8"), re.M | re.S)


def commands() -> list[str]:
    """Return every ``anomalib`` command of the documents and the configurations' comments, its variables filled in."""
    texts = [block for document in DOCUMENTS for block in blocks(document, "bash")]
    for path in (ROOT / "configs").glob("*/*.yaml"):
        texts += re.findall(r"# Command: *(.*)", path.read_text(encoding="utf-8"))
    lines = "\n".join(texts).replace("\\\n", " ").splitlines()
    lines = [line.replace("$CKPT", "model.ckpt").split("  #")[0] for line in lines]
    return sorted({" ".join(line.split()) for line in lines if line.startswith("anomalib ")})


@pytest.fixture
def workplace(dataset_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory in which the documents' paths exist."""
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    (tmp_path / "datasets" / "MVTecAD").mkdir(parents=True)
    (tmp_path / "datasets" / "MVTecAD" / "bottle").symlink_to(dataset_root / "stripes")
    parts = shutil.copytree(dataset_root / "stripes", tmp_path / "datasets" / "parts")
    (parts / "test" / "square").rename(parts / "test" / "defect")
    (parts / "ground_truth" / "square").rename(parts / "ground_truth" / "defect")
    (tmp_path / "model.ckpt").touch()
    shutil.copy(dataset_root / "stripes/test/good/000.png", tmp_path / "image.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_there_are_commands_and_code() -> None:
    assert len(commands()) >= 8
    assert all(blocks(document, "python") for document in DOCUMENTS)


@pytest.mark.usefixtures("workplace")
@pytest.mark.parametrize("command", commands())
def test_commands_are_accepted(command: str) -> None:
    AnomalibCLI(shlex.split(command)[1:], run=False)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_code_runs(document: str, workplace: Path) -> None:
    names: dict[str, object] = {}
    trained: object = None  # the engine of the first block, which trains
    for block in blocks(document, "python"):
        if 'path="model.xml"' in block:
            assert isinstance(trained, Engine)
            assert isinstance(trained.model, Pedenet)
            exported = trained.export(trained.model, "openvino", export_root=workplace)
            for path in Path(exported).parent.glob("model.*"):
                shutil.copy(path, workplace / path.name)
        if '"model.ckpt"' in block:
            assert isinstance(trained, Engine)
            trained.trainer.save_checkpoint(workplace / "model.ckpt")
        # Only the length of the training is another.
        exec(block.replace("Pedenet()", "Pedenet(max_steps=4, bank_size=500)"), names)
        trained = trained or names.get("engine")
