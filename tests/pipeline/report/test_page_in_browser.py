"""The report page in a real browser: sections, requests, console, accessibility, hostile names."""

import csv
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import screenshots
from PIL import Image
from written_runs import write_run

playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe is not installed")
CHROMIUM = Path("/usr/bin/chromium")
pytestmark = [
    pytest.mark.browser,
    pytest.mark.slow,
    pytest.mark.skipif(not CHROMIUM.exists(), reason="Debian's chromium is not installed"),
]
SECTIONS = ["answer", "curves", "browser", "labels", "classes", "weights", "made"]
HOSTILE = ("<script>alert(1)<|script>", "quote\" ' $x^2$\nline", "_שלום \u202egnp")
SIZES = {"desktop": (1280, 900), "phone": (360, 740)}


@pytest.fixture(scope="module")
def report_dir(done: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    paths = [
        write_run(folder / name, seed=1, settings={"lr": 0.1 * i}) for i, name in enumerate(HOSTILE)
    ]
    paths.append(write_run(folder / "open", epochs=2, planned=5, is_soft=False))
    output = tmp_path_factory.mktemp("page") / "report"
    done("report", *paths, "--output", output)
    return output


@pytest.fixture(params=[(size, scheme) for size in SIZES for scheme in ("light", "dark")])
def tab(report_dir: Path, request: pytest.FixtureRequest) -> Iterator[Any]:
    """The page at a size and in a colour scheme; console and requests are checked at the end."""
    size, scheme = request.param
    errors: list[str] = []
    urls: list[str] = []
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox"])
        width, height = SIZES[size]
        page = chromium.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on(
            "console", lambda m: errors.append(m.text) if m.type in ("error", "warning") else None
        )
        page.on(
            "dialog", lambda dialog: (errors.append(f"dialog {dialog.message}"), dialog.dismiss())
        )
        page.on("request", lambda sent: urls.append(sent.url))
        page.goto((report_dir / "index.html").as_uri())
        yield page
        chromium.close()
    assert errors == []
    assert urls
    assert [url for url in urls if not url.startswith(("file:", "data:"))] == []


def test_a_screenshot_of_every_section_is_taken(report_dir: Path, tmp_path: Path) -> None:
    taken = screenshots.take(report_dir, tmp_path)
    assert len(taken) == len(SECTIONS) * len(screenshots.SIZES) * len(screenshots.SCHEMES)
    for path in taken:
        with Image.open(path) as image:
            assert len(image.convert("L").getcolors() or []) > 5


def serious_findings(tab: Any) -> list[Any]:
    results = axe.Axe().run(tab, options={"preload": False})  # it would fetch the style sheets
    return [
        (rule["id"], [node["html"][:200] for node in rule["nodes"][:3]])
        for rule in results.response["violations"]
        if rule["impact"] in ("serious", "critical")
    ]


def test_sections_are_there_and_nothing_is_wrong_for_a_screen_reader(tab: Any) -> None:
    found = tab.eval_on_selector_all("main > section", "all => all.map(one => one.id)")
    assert found == SECTIONS
    assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert serious_findings(tab) == []


def test_names_are_text_and_the_page_is_read_with_the_keyboard(tab: Any) -> None:
    names = tab.eval_on_selector_all("#curves .key bdi", "all => all.map(one => one.textContent)")
    assert names == [*HOSTILE, "open"]
    texts = tab.eval_on_selector_all(
        "#figure-gain svg text", "all => all.map(one => one.textContent)"
    )
    assert any(text.startswith("<script>") for text in texts)
    assert tab.locator("main script").count() == 0
    tab.keyboard.press("Tab")
    assert tab.evaluate("document.activeElement.textContent") == "Skip to the results"
    tab.keyboard.press("Enter")
    assert tab.evaluate("location.hash") == "#answer"


def test_a_curve_is_zoomed_with_the_keyboard(tab: Any, report_dir: Path) -> None:
    zoom = tab.locator("#figure-top1 button")
    zoom.focus()
    tab.keyboard.press("Enter")
    chart, epochs = tab.locator("#zoom canvas"), tab.locator("#zoom-range")
    assert tab.locator("#zoom-title").text_content() == "Top-1 accuracy, validation"
    assert chart.bounding_box()["width"] <= tab.viewport_size["width"]
    assert epochs.text_content() == "Epochs 0 to 6"
    names, values = (
        tab.locator(f"#zoom-lines {kind}").all_text_contents() for kind in ("bdi", "output")
    )
    with (report_dir / "figures/top1.csv").open(newline="") as file:
        last = {row["run"]: row for row in csv.DictReader(file) if float(row["epoch"]) == 6}
    for name, value in zip(names, values, strict=True):
        expected = f"{float(last[name]['val_top1']):.5g}" if name in last else "–"
        assert value == expected
    tab.keyboard.press("+")
    assert epochs.text_content() == "Epochs 1.5 to 4.5"
    tab.keyboard.press("ArrowRight")
    assert epochs.text_content() == "Epochs 2.25 to 5.25"
    assert serious_findings(tab) == []
    tab.keyboard.press("0")
    assert epochs.text_content() == "Epochs 0 to 6"
    tab.keyboard.press("Escape")
    assert not tab.locator("#zoom").is_visible()
    assert zoom.evaluate("button => button === document.activeElement")
