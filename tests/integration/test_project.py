# Copyright (C) 2026 The anomalib-pedenet authors
# SPDX-License-Identifier: Apache-2.0

"""What surrounds the code: the site, the forge's workflows and forms, the package."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(*command: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", *command],
        cwd=ROOT,
        env=os.environ | environment,
        check=False,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def test_the_site_has_no_broken_link_and_no_undocumented_argument(tmp_path: Path) -> None:
    run("mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site"))
    arguments = (tmp_path / "site/reference/arguments/index.html").read_text(encoding="utf-8")
    for name in ("max_steps_at_chance", "covariance_jitter", "roi"):
        assert f"<code>{name}</code>" in arguments
    assert ":class:" not in arguments


@pytest.mark.parametrize(
    ("schema", "files"),
    [
        ("vendor.github-workflows", ".github/workflows/*.yml"),
        ("vendor.github-issue-forms", ".github/ISSUE_TEMPLATE/*.yml"),
        ("vendor.dependabot", ".github/dependabot.yml"),
    ],
)
def test_the_forge_takes_its_files(schema: str, files: str) -> None:
    paths = [str(path) for path in ROOT.glob(files)]
    assert paths
    run("check_jsonschema", "--builtin-schema", schema, *paths)


def test_the_workflows_run_what_the_makefile_has() -> None:
    targets = (ROOT / "Makefile").read_text(encoding="utf-8")
    for workflow in (ROOT / ".github/workflows").glob("*.yml"):
        lines = workflow.read_text(encoding="utf-8").split("make ")[1:]
        for target in (line.split()[0] for line in lines):
            assert f"\n{target}:" in targets or target.startswith('"$')


def test_the_package_is_one_that_an_index_takes(tmp_path: Path) -> None:
    run("build", "--no-isolation", "--outdir", str(tmp_path))
    packages = [str(path) for path in tmp_path.iterdir()]
    assert len(packages) == 2
    run("twine", "check", "--strict", *packages)


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md"])
def test_links_to_files_lead_somewhere(page: str) -> None:
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", (ROOT / page).read_text(encoding="utf-8"))
    missing = [link for link in links if not link.startswith("http") and not (ROOT / link).exists()]
    assert not missing
