# Copyright (C) 2026 The anomalib-pedenet authors
# SPDX-License-Identifier: Apache-2.0

"""The page of a report in a real browser."""

import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from playwright.sync_api import Browser, ConsoleMessage, Locator, Page, Request, expect, sync_playwright

from anomalib_pedenet.aftercare.inspection import Box, Explanation, Inspection
from anomalib_pedenet.aftercare.report import write_report

CHROMIUM = next(filter(None, map(shutil.which, ["chromium", "chromium-browser", "google-chrome"])), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium on the PATH")

SIZE = (48, 64)
HOT = Box(10, 20, 12, 24)
"""Where the map of an image is its score; elsewhere it is a tenth of it."""

STRANGE_NAME = "b10 \"quoted\" 'é' <img src=x onerror='document.title=1'>.png"
TRUTHS = {"good": "good", "broken": "defective", "new": None}
SCORES = {
    "good/a1.png": 0.08,
    "good/a2.png": 0.21,
    "good/a10.png": 0.34,
    "good/a11.png": 0.62,
    "broken/b1.png": 0.97,
    "broken/b2.png": 0.88,
    "broken/b3.png": 0.55,
    "broken/b4.png": 0.43,
    f"broken/{STRANGE_NAME}": 0.29,
    "new/c1.png": 0.71,
    "new/c2.png": 0.12,
}
EXPLAINED = "broken/b1.png"

Test = Callable[[str, float], bool]
FILTERS: dict[str, Test] = {
    "All": lambda _name, _threshold: True,
    "Flagged": lambda name, threshold: SCORES[name] > threshold,
    "Not flagged": lambda name, threshold: SCORES[name] <= threshold,
    "False alarms": lambda name, threshold: name.startswith("good") and SCORES[name] > threshold,
    "Misses": lambda name, threshold: name.startswith("broken") and SCORES[name] <= threshold,
    "Unknown truth": lambda name, _threshold: name.startswith("new"),
}


def picture(seed: int, size: tuple[int, int] = SIZE) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)


def inspections() -> Iterator[Inspection]:
    for seed, (name, score) in enumerate(SCORES.items()):
        anomaly_map = np.full(SIZE, score / 10, dtype=np.float32)
        anomaly_map[HOT.top : HOT.top + HOT.height, HOT.left : HOT.left + HOT.width] = score
        explanation = None
        if name == EXPLAINED:
            explanation = Explanation(
                Box(8, 24, 16, 16), Path("/data/normal/<n7>.png"), picture(99), Box(16, 4, 16, 16), 1.5
            )
        truth = TRUTHS[name.split("/")[0]]
        yield Inspection(Path("/data/parts") / name, picture(seed), anomaly_map, score, truth, explanation)


def expected_names(what: str, threshold: float = 0.5) -> list[str]:
    names = [name for name in SCORES if FILTERS[what](name, threshold)]
    return sorted(names, key=lambda name: -SCORES[name])


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(inspections(), tmp_path_factory.mktemp("report") / "report.html", title="Bolts <M8> & nuts")


@pytest.fixture(scope="module")
def large_report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    generator = np.random.default_rng(0)

    def source() -> Iterator[Inspection]:
        for index in range(2000):
            anomaly_map = generator.random((16, 16), dtype=np.float32)
            score = float(generator.random())
            yield Inspection(Path(f"part {index}.png"), picture(0, (16, 16)), anomaly_map, score, "good")

    return write_report(source(), tmp_path_factory.mktemp("large") / "report.html")


@pytest.fixture
def open_page(browser: Browser) -> Iterator[Callable[..., Page]]:
    """Open a report; what goes wrong in it, or is asked of a network, fails the test."""
    wrong: list[str] = []
    contexts = []

    def note_message(message: ConsoleMessage) -> None:
        wrong.append(f"{message.type}: {message.text}")

    def open_report(report: Path, width: int = 1280, **options: str) -> Page:
        def note_request(request: Request) -> None:
            if request.url != report.as_uri() and not request.url.startswith("data:"):
                wrong.append(request.url)

        contexts.append(browser.new_context(viewport={"width": width, "height": 900}, **options))
        page = contexts[-1].new_page()
        page.set_default_timeout(20_000)
        page.on("console", note_message)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("request", note_request)
        page.goto(report.as_uri())
        return page

    yield open_report
    for context in contexts:
        context.close()
    assert not wrong


@pytest.fixture
def page(open_page: Callable[..., Page], report: Path) -> Page:
    return open_page(report)


def filter_label(page: Page, what: str) -> Locator:
    return page.locator("#filters label").filter(has_text=re.compile(f"^{what}"))


def expect_names(page: Page, names: list[str]) -> None:
    expect(page.locator(".card .name")).to_have_text(names)


def expect_counts(page: Page, threshold: float) -> None:
    expect(page.locator("#total")).to_have_text(str(len(SCORES)))
    for what, place in [("Flagged", "flagged"), ("False alarms", "false-alarms"), ("Misses", "misses")]:
        expect(page.locator(f"#{place}")).to_have_text(str(len(expected_names(what, threshold))))
    for what in FILTERS:
        expect(filter_label(page, what).locator("b")).to_have_text(str(len(expected_names(what, threshold))))
    badges = [badge.is_visible() for badge in page.locator(".card .badge").all()]
    assert sum(badges) == len(expected_names("Flagged", threshold))


def choose(page: Page, what: str) -> None:
    filter_label(page, what).click()


def open_viewer(page: Page, name: str) -> None:
    page.locator(".card").filter(has_text=name).click()
    expect(page.locator("#viewer")).to_be_visible()


def test_it_says_what_was_found(page: Page) -> None:
    expect(page).to_have_title("Bolts <M8> & nuts")
    expect(page.locator("h1")).to_have_text("Bolts <M8> & nuts")
    expect(page.locator("time")).to_have_text(re.compile(r"^\d{4}-\d\d-\d\d \d\d:\d\d$"))
    expect(page.locator("#shown")).to_have_text("11 images")
    expect(page.locator("#of-good")).to_have_text("of 4 good")
    expect(page.locator("#of-defective")).to_have_text("of 5 defective")
    expect(page.locator(".group span")).to_have_text(["1 of 4 flagged", "3 of 5 flagged", "1 of 2 flagged"])
    expect_counts(page, 0.5)
    card = page.locator(".card").filter(has_text="a11.png")
    expect(card.locator(".score")).to_have_text("0.620")
    expect(card.locator(".truth")).to_have_text("GoodFalse alarm")
    expect(card.locator("img")).to_have_attribute("alt", "Picture of good/a11.png")
    assert card.locator("img").evaluate("image => image.decode().then(() => image.naturalWidth)") == SIZE[1]


@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.55, 1.0])
def test_the_slider_recounts(page: Page, threshold: float) -> None:
    page.locator("#threshold").fill(str(threshold))
    expect(page.locator("#threshold-value")).to_have_text(f"{threshold:.3f}")
    expect_counts(page, threshold)


def test_the_slider_goes_by_thousandths_with_the_keys(page: Page) -> None:
    page.locator("#threshold").focus()
    page.keyboard.press("ArrowRight")
    expect(page.locator("#threshold-value")).to_have_text("0.501")


def test_the_threshold_is_dragged_in_the_histogram(page: Page) -> None:
    area = page.locator(".group svg").first.bounding_box()
    assert area is not None
    page.mouse.move(area["x"] + 0.5 * area["width"], area["y"] + 10)
    page.mouse.down()
    page.mouse.move(area["x"] + 0.4 * area["width"], area["y"] + 10)
    page.mouse.move(area["x"] + 0.25 * area["width"], area["y"] + 40)
    page.mouse.up()
    page.mouse.move(area["x"] + 0.9 * area["width"], area["y"] + 10)
    threshold = float(page.locator("#threshold").input_value())
    assert threshold == pytest.approx(0.25, abs=0.005)
    expect_counts(page, threshold)


@pytest.mark.parametrize("what", FILTERS)
def test_filters(page: Page, what: str) -> None:
    choose(page, what)
    expect_names(page, expected_names(what))
    page.locator("#threshold").fill("0.3")
    expect_names(page, expected_names(what, 0.3))


def test_sorting(page: Page) -> None:
    expect_names(page, expected_names("All"))
    page.locator("#sort").select_option("ascending")
    expect_names(page, expected_names("All")[::-1])
    page.locator("#sort").select_option("name")
    numbers = ["b1.png", "b2.png", "b3.png", "b4.png", STRANGE_NAME]
    good = ["a1.png", "a2.png", "a10.png", "a11.png"]
    expect_names(
        page, [*(f"broken/{name}" for name in numbers), *(f"good/{name}" for name in good), "new/c1.png", "new/c2.png"]
    )


def test_search(page: Page) -> None:
    page.locator("#search").fill("A1")
    expect_names(page, ["good/a11.png", "good/a10.png", "good/a1.png"])
    choose(page, "Flagged")
    expect_names(page, ["good/a11.png"])
    page.locator("#search").fill("<img")
    expect(page.locator("#nothing")).to_be_visible()
    expect(page.locator("#shown")).to_have_text("0 of 11 images")
    page.locator("#show-all").click()
    expect_names(page, expected_names("All"))


def test_outlines_follow_their_own_threshold(page: Page) -> None:
    outline = page.locator(".card").filter(has_text="b2.png").locator(".contour .core")
    expect(outline).to_have_attribute("d", re.compile("^M"))
    box = outline.evaluate("path => { const box = path.getBBox(); return [box.y, box.x, box.height, box.width]; }")
    np.testing.assert_allclose(box, HOT, atol=1.1)
    page.locator("#outline").fill("0.9")
    expect(outline).to_have_attribute("d", "")
    expect_counts(page, 0.5)
    page.locator("#outline").fill("0.01")
    expect(outline).to_have_attribute("d", re.compile("^M"))
    box = outline.evaluate("path => { const box = path.getBBox(); return [box.y, box.x, box.height, box.width]; }")
    np.testing.assert_allclose(box, [0, 0, *SIZE], atol=0.51)


def test_the_viewer_goes_through_what_is_shown(page: Page) -> None:
    choose(page, "Flagged")
    names = expected_names("Flagged")
    page.locator(".card").first.focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    viewer = page.locator("#viewer")
    expect(viewer).to_have_attribute("data-path", f"/data/parts/{names[1]}")
    expect(page.locator("#viewer-place")).to_have_text(f"2 of {len(names)}")
    for _ in range(len(names)):
        page.keyboard.press("ArrowRight")
    expect(viewer).to_have_attribute("data-path", f"/data/parts/{names[-1]}")
    page.keyboard.press("ArrowLeft")
    expect(viewer).to_have_attribute("data-path", f"/data/parts/{names[-2]}")
    page.locator("#next").click()
    expect(page.locator("#viewer-score")).to_have_text(f"{SCORES[names[-1]]:.3f}")
    page.keyboard.press("Escape")
    expect(viewer).to_be_hidden()
    expect(page.locator(".card").last).to_be_focused()


def test_keys_of_the_viewer(page: Page) -> None:
    open_viewer(page, "b2.png")
    heat, outline = page.locator("#viewer-heat"), page.locator("#viewer-contour")
    expect(heat).to_be_visible()
    expect(outline).to_be_visible()
    page.keyboard.press("h")
    expect(heat).to_be_hidden()
    expect(page.locator("#heat-on")).not_to_be_checked()
    page.keyboard.press("o")
    expect(outline).to_be_hidden()
    page.keyboard.press("h")
    page.keyboard.press("o")
    expect(heat).to_be_visible()
    expect(outline).to_be_visible()
    page.keyboard.press("?")
    expect(page.locator("#keys")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.locator("#keys")).to_be_hidden()
    expect(page.locator("#viewer")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.locator("#viewer")).to_be_hidden()


def test_the_viewer_shows_map_and_outline(page: Page) -> None:
    open_viewer(page, "b2.png")
    expect(page.locator("#viewer-peak")).to_have_text(f"{round(255 * 0.88) / 255:.3f}")
    expect(page.locator("#viewer-area")).to_have_text(f"{100 * HOT.height * HOT.width / (SIZE[0] * SIZE[1]):.1f} %")
    pixels = page.locator("#viewer-heat").evaluate(
        "canvas => [...canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data]"
    )
    opacity = np.reshape(pixels, (*SIZE, 4))[..., 3]
    expected = np.zeros(SIZE)
    expected[HOT.top : HOT.top + HOT.height, HOT.left : HOT.left + HOT.width] = 255
    np.testing.assert_array_equal(opacity, expected)
    page.locator("#opacity").fill("0.25")
    expect(page.locator("#viewer-heat")).to_have_css("opacity", "0.25")
    page.locator("#viewer-outline").fill("0.9")
    expect(page.locator("#viewer-area")).to_have_text("0.0 %")
    expect(page.locator("#outline-value")).to_have_text("0.900")


def test_the_viewer_explains(page: Page) -> None:
    open_viewer(page, "b1.png")
    expect(page.locator("#explanation")).to_be_visible()
    expect(page.locator("#scale")).to_have_text("16 \u00d7 16 px")
    expect(page.locator("#distance")).to_contain_text("1.50 \u00d7")
    expect(page.locator("#normal-caption")).to_have_text("normal/<n7>.png")
    for crop, box in [("patch", Box(8, 24, 16, 16)), ("normal", Box(16, 4, 16, 16))]:
        mark = page.locator(f"#{crop} .mark").last
        values = [float(mark.get_attribute(name) or "") for name in ("y", "x", "height", "width")]
        assert values == list(box)
        left, top, width, height = map(float, (page.locator(f"#{crop}").get_attribute("viewBox") or "").split())
        assert 0 <= left <= box.left <= box.left + box.width <= left + width <= SIZE[1]
        assert 0 <= top <= box.top <= box.top + box.height <= top + height <= SIZE[0]
    page.keyboard.press("ArrowRight")
    expect(page.locator("#explanation")).to_be_hidden()


def test_file_names_are_text(page: Page) -> None:
    open_viewer(page, "quoted")
    expect(page.locator("#viewer-path")).to_have_text(f"/data/parts/broken/{STRANGE_NAME}")
    expect(page.locator("#viewer-name")).to_have_text(f"broken/{STRANGE_NAME}")
    expect(page).to_have_title("Bolts <M8> & nuts")


def test_narrow_screens_and_dark_ones(open_page: Callable[..., Page], report: Path) -> None:
    backgrounds = set()
    for scheme in ("light", "dark"):
        page = open_page(report, width=360, color_scheme=scheme)
        backgrounds.add(page.evaluate("getComputedStyle(document.body).backgroundColor"))
        assert page.evaluate("document.documentElement.scrollWidth") == 360
        open_viewer(page, "b1.png")
        assert page.locator("#viewer").evaluate("viewer => viewer.scrollWidth <= viewer.clientWidth")
    assert len(backgrounds) == 2


def test_images_without_truth(open_page: Callable[..., Page], tmp_path: Path) -> None:
    found = Inspection(Path("alone.png"), picture(0), np.zeros(SIZE, np.float32), 0.7)
    page = open_page(write_report([found], tmp_path / "report.html"))
    expect_names(page, ["alone.png"])
    expect(page.locator("#misses-figure")).to_be_hidden()
    expect(page.locator("#false-alarms-figure")).to_be_hidden()
    expect(page.locator("#filters label")).to_have_text(["All1", "Flagged1", "Not flagged0", "Unknown truth1"])


def test_thousands_of_images(open_page: Callable[..., Page], large_report: Path) -> None:
    page = open_page(large_report)
    expect(page.locator("#shown")).to_have_text("2000 images")
    number, most = page.evaluate(
        """async () => {
          const seen = new Set();
          let most = 0;
          for (let at = 0; ; at += 1500) {
            scrollTo(0, at);
            await new Promise(requestAnimationFrame);
            const cards = [...document.querySelectorAll(".cards li")];
            most = Math.max(most, cards.length, document.querySelectorAll("img, canvas").length);
            cards.forEach((card) => seen.add(card.querySelector(".name").textContent));
            if (at > document.documentElement.scrollHeight) return [seen.size, most];
          }
        }"""
    )
    assert number == 2000
    assert most < 100
    # From the last image, the viewer closes on one far away.
    page.locator(".card").last.click()
    expect(page.locator("#viewer-place")).to_have_text("2000 of 2000")
    page.evaluate("for (let index = 0; index < 50; index++) step(-1)")
    expect(page.locator("#viewer-place")).to_have_text("1950 of 2000")
    name = page.locator("#viewer-name").text_content()
    page.keyboard.press("Escape")
    expect(page.locator(".card:focus .name")).to_have_text(name or "")
    expect(page.locator(".card:focus")).to_be_in_viewport()
    page.locator("#threshold").fill("0.9")
    page.locator("#sort").select_option("name")
    page.evaluate("scrollTo(0, 0)")
    expect(page.locator(".card .name").first).to_have_text("part 0.png")
