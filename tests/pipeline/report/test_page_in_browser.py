"""The report page in a real browser: sections, requests, console, accessibility, hostile names."""

import csv
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import screenshots
from pages import SECTIONS, in_browser, opened, sections_of, serious_findings
from PIL import Image
from written_runs import write_run

pytestmark = in_browser
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
    with opened(report_dir, size=SIZES[size], scheme=scheme) as page:
        yield page


def test_a_screenshot_of_every_section_is_taken(report_dir: Path, tmp_path: Path) -> None:
    taken = screenshots.take(report_dir, tmp_path)
    assert len(taken) == len(SECTIONS) * len(screenshots.SIZES) * len(screenshots.SCHEMES)
    for path in taken:
        with Image.open(path) as image:
            assert len(image.convert("L").getcolors() or []) > 5


def test_sections_are_there_and_nothing_is_wrong_for_a_screen_reader(tab: Any) -> None:
    assert sections_of(tab) == SECTIONS
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
