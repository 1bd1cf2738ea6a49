# Copyright (C) 2026 The anomalib-pedenet authors
# SPDX-License-Identifier: Apache-2.0

"""The comparison of searches runs from the command line, and what it says of exact searches is right."""

import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "scorers.py"
EXACT = ["exact", "faiss_flat", "anomalib PatchCore", "scikit-learn brute"]
OTHERS = ["faiss_ivf", "faiss_hnsw", "faiss_pq"]


def run(*arguments: str) -> str:
    command = [sys.executable, str(SCRIPT), "--device", "cpu", "--rounds", "1", *arguments]
    environment = {**os.environ, "PYTHONWARNINGS": "ignore"}
    return subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout


@pytest.mark.slow
def test_every_search_is_measured_but_those_that_need_too_large_a_matrix(tmp_path: Path) -> None:
    output = tmp_path / "runs" / "scorers"
    # 50 x 300 distances take 5.6e-5 GiB, 20 x 300 of them 2.2e-5.
    printed = run("--rows", "300", "--queries", "20", "50", "--largest_matrix", "4e-5", "--output", str(output))
    assert printed.count("left out") == 2
    table = pd.read_csv(f"{output}.csv")
    few = table[table["queries"] == 20].set_index("search")
    many = table[table["queries"] == 50].set_index("search")
    assert set(few.index) == {*EXACT, *OTHERS, "torch.cdist"}
    assert set(many.index) == set(few.index) - {"torch.cdist", "anomalib PatchCore"}
    exact = table[table["search"].isin([*EXACT, "torch.cdist"])]
    assert (exact["recall"] == 1).all()
    assert (exact["largest_error"] < 1e-4).all()
    assert table["recall"].between(0, 1).all()
    assert (table[["ms", "bytes", "repetitions", "matrix_tflops", "threads"]] > 0).all().all()
    assert few.loc["torch.cdist", "bytes"] == 300 * 64 * 4
    assert table["hardware"].str.len().gt(0).all()
    assert Path(f"{output}.png").stat().st_size > 10_000


@pytest.mark.slow
def test_embeddings_of_a_file_are_taken(tmp_path: Path) -> None:
    # A bank of corners, and queries at known distances from them.
    bank = torch.eye(8)
    torch.save({"bank": bank, "queries": bank * 1.5}, tmp_path / "given.pt")
    output = tmp_path / "scorers"
    arguments = ["--scorers", "exact", "torch.cdist", "--embeddings", str(tmp_path / "given.pt")]
    run(*arguments, "--rows", "4", "100", "--queries", "100", "--output", str(output))
    table = pd.read_csv(f"{output}.csv")
    assert table[["rows", "queries"]].drop_duplicates().to_numpy().tolist() == [[4, 8], [8, 8]]  # what there is
    assert (table["recall"] == 1).all()
    assert table["largest_error"].to_numpy() == pytest.approx(0, abs=1e-5)
