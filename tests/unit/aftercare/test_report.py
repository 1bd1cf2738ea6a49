# Copyright (C) 2026 The anomalib-pedenet authors
# SPDX-License-Identifier: Apache-2.0

"""The file of a report: what it holds, that it needs nothing else, and that it is written whole or not at all."""

import base64
import html
import io
import json
import os
import re
import weakref
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from anomalib_pedenet.aftercare.inspection import Box, Explanation, Inspection
from anomalib_pedenet.aftercare.report import write_report

STRANGE_NAMES = [
    "</script><script>alert(1)</script>.png",
    "<!-- <script>.png",
    "\"double\" 'single' & `back`.png",
    "Stück № 7 检查.png",
    "{{ title }} {% raw %}.png",
    "https:,,example.org.png",
    "line\nbreak\u2028.png",
    os.fsdecode(b"no-text-\xff.png"),
]


def smooth_image(seed: int, size: tuple[int, int] = (24, 32)) -> np.ndarray:
    rows, columns = np.mgrid[: size[0], : size[1]]
    channels = [np.sin(rows / 9 + seed), np.cos(columns / 11 + seed), np.sin((rows + columns) / 13)]
    return (127 + 100 * np.stack(channels, axis=-1)).astype(np.uint8)


def inspection(name: str = "part.png", seed: int = 0, score: float = 0.25) -> Inspection:
    anomaly_map = np.random.default_rng(seed).random((24, 32), dtype=np.float32)
    return Inspection(Path("/data/parts") / name, smooth_image(seed), anomaly_map, score)


def explanation() -> Explanation:
    return Explanation(Box(4, 8, 16, 16), Path("/data/normal/<7>.png"), smooth_image(9), Box(2, 6, 16, 16), 1.75)


def read_records(report: Path) -> list[dict[str, Any]]:
    """Read the data as a browser does: a script ends where its end tag first appears."""
    text = report.read_text("utf-8")
    return [json.loads(part) for part in re.findall(r'<script type="application/json"[^>]*>(.*?)</script', text, re.S)]


def decode(url: str, kind: str) -> np.ndarray:
    prefix = f"data:image/{kind};base64,"
    assert url.startswith(prefix)
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(url.removeprefix(prefix), validate=True))))


class Attributes(HTMLParser):
    """Collects the addresses that a page refers to."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str | None] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:  # noqa: ARG002
        self.addresses += [value for name, value in attrs if name in {"src", "href", "srcset", "action", "data"}]


def test_it_holds_what_was_found(tmp_path: Path) -> None:
    found = [
        replace(inspection("a.png", 1, 0.75), truth="defective", explanation=explanation()),
        replace(inspection("b.png", 2, 1 / 3), truth="good"),
        inspection("c.png", 3, 0.0),
    ]
    output = tmp_path / "new" / "folder" / "report.html"
    assert write_report(iter(found), output) == output
    records = read_records(output)
    assert [record["path"] for record in records] == ["/data/parts/a.png", "/data/parts/b.png", "/data/parts/c.png"]
    assert [record["score"] for record in records] == [0.75, 1 / 3, 0.0]
    assert [record["truth"] for record in records] == ["defective", "good", None]
    assert [record["explanation"] is None for record in records] == [False, True, True]
    for expected, record in zip(found, records, strict=True):
        assert (record["height"], record["width"]) == (24, 32)
        np.testing.assert_allclose(decode(record["map"], "png") / 255, expected.anomaly_map, atol=0.5 / 255 + 1e-6)
        difference = decode(record["image"], "jpeg").astype(int) - expected.image
        assert abs(difference).mean() < 4


def test_it_holds_the_explanation(tmp_path: Path) -> None:
    expected = explanation()
    write_report([replace(inspection(), explanation=expected)], tmp_path / "report.html")
    record = read_records(tmp_path / "report.html")[0]["explanation"]
    assert record["box"] == {"top": 4, "left": 8, "height": 16, "width": 16}
    assert record["distance"] == 1.75
    assert record["normal"]["path"] == "/data/normal/<7>.png"
    assert record["normal"]["box"] == {"top": 2, "left": 6, "height": 16, "width": 16}
    assert (record["normal"]["height"], record["normal"]["width"]) == (24, 32)
    assert abs(decode(record["normal"]["image"], "jpeg").astype(int) - expected.normal_image).mean() < 4


@pytest.mark.parametrize("name", STRANGE_NAMES)
def test_file_names_hold_any_characters(tmp_path: Path, name: str) -> None:
    write_report([inspection(name), inspection("other.png")], tmp_path / "report.html", title=name)
    assert [record["path"] for record in read_records(tmp_path / "report.html")] == [
        f"/data/parts/{name}",
        "/data/parts/other.png",
    ]
    text = (tmp_path / "report.html").read_text("utf-8")
    # Two more scripts would be there if one had been closed early.
    assert text.count("<script") == text.count("</script>") == 3
    heading = re.search(r"<h1>(.*?)</h1>", text, re.S)
    assert heading is not None
    assert "<" not in heading[1]
    if "\udcff" not in name:
        assert html.unescape(heading[1]) == name


def test_it_refers_to_nothing_else(tmp_path: Path) -> None:
    write_report([replace(inspection(), explanation=explanation())], tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text("utf-8")
    for reference in ("http:", "https:", "//cdn", "@import", "url(", "import(", "fetch(", "XMLHttpRequest"):
        assert reference not in text
    page = Attributes()
    page.feed(text)
    assert page.addresses == ["data:,"]


def test_map_values_out_of_range_are_cut_off(tmp_path: Path) -> None:
    anomaly_map = np.array([[-0.5, 0.0, 0.5, 1.0, 1.5]], dtype=np.float32).repeat(8, axis=0)
    found = Inspection(Path("part.png"), smooth_image(0, (8, 5)), anomaly_map, 0.5)
    write_report([found], tmp_path / "report.html")
    assert decode(read_records(tmp_path / "report.html")[0]["map"], "png")[0].tolist() == [0, 0, 128, 255, 255]


def test_numpy_numbers_are_taken(tmp_path: Path) -> None:
    box = Box(*np.array([4, 8, 16, 16]))
    found = replace(inspection(), score=np.float32(0.5), explanation=replace(explanation(), box=box))
    write_report([found], tmp_path / "report.html")
    assert read_records(tmp_path / "report.html")[0]["explanation"]["box"]["height"] == 16


def test_images_are_not_held_in_memory(tmp_path: Path) -> None:
    yielded: list[weakref.ref[Inspection]] = []

    def source() -> Iterator[Inspection]:
        for seed in range(6):
            # The last one, which is in the caller's hands.
            assert sum(reference() is not None for reference in yielded) <= 1
            found = inspection(seed=seed)
            yielded.append(weakref.ref(found))
            yield found
            del found

    write_report(source(), tmp_path / "report.html")
    assert len(read_records(tmp_path / "report.html")) == 6


def test_no_images_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="pass the inspections of one image or more"):
        write_report([], tmp_path / "report.html")
    assert not list(tmp_path.iterdir())


def test_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is a folder: pass the name of a file"):
        write_report([inspection()], tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("place", ["score", "map", "distance"])
def test_numbers_that_are_not_finite_are_refused(tmp_path: Path, value: float, place: str) -> None:
    found = inspection("broken part.png")
    if place == "score":
        found = replace(found, score=value)
    elif place == "map":
        found.anomaly_map[3, 4] = value
    else:
        found = replace(found, explanation=replace(explanation(), distance=value))
    with pytest.raises(ValueError, match=r"broken part\.png is not a finite number"):
        write_report([inspection(), found], tmp_path / "report.html")
    assert not list(tmp_path.iterdir())


def test_a_failure_leaves_an_earlier_report_as_it_was(tmp_path: Path) -> None:
    output = write_report([inspection()], tmp_path / "report.html")
    before = output.read_bytes()

    def source() -> Iterator[Inspection]:
        yield inspection("new.png")
        msg = "the disk is gone"
        raise OSError(msg)

    with pytest.raises(OSError, match="the disk is gone"):
        write_report(source(), output)
    assert output.read_bytes() == before
    assert list(tmp_path.iterdir()) == [output]


def test_an_earlier_report_is_replaced(tmp_path: Path) -> None:
    output = write_report([inspection("old.png")], tmp_path / "report.html")
    write_report([inspection("new.png")], output)
    assert [record["path"] for record in read_records(output)] == ["/data/parts/new.png"]
    assert list(tmp_path.iterdir()) == [output]
