# Copyright (C) 2026 The anomalib-pedenet authors
# SPDX-License-Identifier: Apache-2.0

"""What the documentation says to type works: its Python runs, and anomalib takes its commands."""

import re
import shlex
import shutil
from pathlib import Path

import pytest
from anomalib.cli import AnomalibCLI
from anomalib.data import MVTecAD
from anomalib.engine import Engine
from anomalib.models import Pedenet

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    str(path.relative_to(ROOT))
    for path in (ROOT / "README.md", *(ROOT / "docs").glob("tutorials/*.md"), *(ROOT / "docs").glob("how_to/*.md"))
)


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / page).read_text(encoding="utf-8"), re.M | re.S)


# The page of the first week has tests of its own, which follow it from the first command to the last.
WITH_CODE = [page for page in PAGES if blocks(page, "python") and "first_week" not in page]


def commands() -> list[str]:
    """Return every ``anomalib`` command of the pages and the configurations' comments, its variables filled in."""
    texts = [block for page in PAGES for block in blocks(page, "bash")]
    for path in (ROOT / "configs").glob("*/*.yaml"):
        texts += re.findall(r"# Command: *(.*)", path.read_text(encoding="utf-8"))
    lines = "\n".join(texts).replace("\\\n", " ").splitlines()
    lines = [line.replace("$CKPT", "model.ckpt").split("  #")[0].split(" # ")[0] for line in lines]
    return sorted({" ".join(line.split()) for line in lines if line.startswith("anomalib ")})


@pytest.fixture(scope="module")
def trained(dataset_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what a training and an export leave: ``model.ckpt`` and OpenVINO's files."""
    folder = tmp_path_factory.mktemp("trained")
    engine = Engine(default_root_dir=folder, accelerator="cpu", logger=False)
    model = Pedenet(max_steps=4, bank_size=500)
    engine.fit(model, datamodule=MVTecAD(root=dataset_root, category="stripes", num_workers=0))
    engine.trainer.save_checkpoint(folder / "model.ckpt")
    for path in Path(engine.export(model, "openvino", export_root=folder)).parent.glob("model.*"):
        shutil.copy(path, folder)
    return folder


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
    assert len(WITH_CODE) >= 5


@pytest.mark.usefixtures("workplace")
@pytest.mark.parametrize("command", commands())
def test_commands_are_accepted(command: str) -> None:
    AnomalibCLI(shlex.split(command)[1:], run=False)


@pytest.mark.parametrize("page", WITH_CODE)
def test_code_runs(page: str, workplace: Path, trained: Path) -> None:
    """Each block by itself, as a reader copies it."""
    for path in trained.glob("model.*"):
        shutil.copy(path, workplace)
    for block in blocks(page, "python"):
        # Only the length of a training is another.
        exec(block.replace("Pedenet()", "Pedenet(max_steps=4, bank_size=500)"), {})


def test_examples_of_docstrings_become_code_on_the_site() -> None:
    """Under "Example:" the site takes ``>>>`` for quotations in quotations; under "Examples:" for Python."""
    for path in (ROOT / "anomalib_pedenet").glob("**/*.py"):
        assert not re.search(r"^ *Example:\n *>>>", path.read_text(encoding="utf-8"), re.M), path
