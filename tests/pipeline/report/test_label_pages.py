"""The sections on labels in a real browser: filters, names as text, no request off the disk."""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from pages import in_browser, opened, serious_findings

from mealv2.label_set import LabelSet
from pipeline.report import browser, classes, labels, page
from pipeline.report.sections import Inputs

pytestmark = in_browser

CLASSES = ("<img src=x onerror=alert(1)>", "bees & \"wasps\" 'x'", "قطة \u202egnp.tac $x^2")
HOSTILE_FILE = "quote\" '\n</script><script>alert(2)<|script> \u202egpj.jpg"


@pytest.fixture(scope="module")
def hostile_data(draw_tree: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    data = draw_tree(tmp_path_factory.mktemp("hostile") / "data", classes=CLASSES)
    first = data / "train" / CLASSES[0] / "00.jpg"
    first.rename(first.with_name(HOSTILE_FILE.replace("/", "|")))
    return data


@pytest.fixture(scope="module")
def hostile_labels(
    hostile_data: Path,
    make_model: Callable[..., Path],
    done: Callable[..., Any],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    out = tmp_path_factory.mktemp("labels") / "set"
    teacher = make_model("test_resnet", seed=1, steps=8, classes=CLASSES)
    settings = ["--img-size", 32, "--num-views", 12, "--workers", 0, "--topk", 2]
    named = ["--data-dir", hostile_data, "--teacher", f"test_resnet={teacher}", "--output", out]
    done("precompute", *named, *settings)
    return out


@pytest.fixture(scope="module")
def report_dir(
    hostile_data: Path, hostile_labels: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A page with the sections on labels only."""
    output = tmp_path_factory.mktemp("report")
    inputs = Inputs((), (), hostile_labels, hostile_data, output)
    sections = [part.section(inputs) for part in (browser, labels, classes)]
    about = {"title": "Labels", "version": "0", "made_at": "2026-11-30", "notes": []}
    page.write_page(output, sections, **about)
    return output


@pytest.fixture
def shown(report_dir: Path) -> Iterator[Any]:
    """The page in a browser; its errors and requests are checked at the end."""
    with opened(report_dir) as tab:
        yield tab


def titles(tab: Any) -> list[str]:
    return [title.text_content() for title in tab.locator("#browser-images h4").all()]


def count(tab: Any) -> int:
    return int(re.match(r"\d+|No", tab.locator("#browser-count").text_content())[0])


def show_all(tab: Any) -> None:
    while tab.locator("#browser-more").is_visible():
        tab.locator("#browser-more").click()


def test_names_are_text(shown: Any) -> None:
    shown.locator("[name=text]").fill('quote"')
    (title,) = titles(shown)
    assert title == f"{CLASSES[0]}/{HOSTILE_FILE.replace('/', '|')}"
    text = shown.locator("main").inner_text()
    assert CLASSES[0] in text
    assert shown.locator("main img[src=x], main script").count() == 0
    names = shown.locator("#browser-images bdi").all_text_contents()
    assert CLASSES[2] in names


def test_filters_and_orders_show_what_they_name(shown: Any, report_dir: Path) -> None:
    data = json.loads(
        (report_dir / "data" / "browser.js").read_text().split("= ", 2)[2].rstrip(";\n")
    )
    images = data["images"]
    assert sum(len(image["views"]) for image in images) >= 200
    assert count(shown) == len(images) == 36
    shown.select_option("[name=sort]", "hard")
    expected = sorted(images, key=lambda image: image["hard_prob"])
    assert titles(shown) == [image["key"] for image in expected[:8]]
    shown.select_option("[name=sort]", "key")
    show_all(shown)
    assert titles(shown) == sorted(image["key"] for image in images)
    shown.select_option("[name=reason]", "contradicted")
    assert count(shown) == sum(image["contradicting"] > 0 for image in images)
    shown.select_option("[name=reason]", "")
    shown.select_option("[name=class]", str(data["images"][0]["hard"]))
    assert count(shown) == 12
    shown.locator("[name=text]").fill("nothing has this name")
    assert shown.locator("#browser-count").text_content().startswith("No image matches")
    shown.locator("button[type=reset]").click()
    shown.wait_for_function("document.querySelectorAll('#browser-images h4').length == 8")


def test_a_view_shows_its_crop_box_and_label(shown: Any, hostile_labels: Path) -> None:
    first = shown.locator("#browser-images article").first
    key = first.locator("h4").text_content()
    figure = first.locator("figure.view").first
    view = int(figure.get_attribute("data-view"))
    assert first.locator(f"svg g[data-view='{view}'] rect.box").count() == 1
    crop = figure.locator("img")
    shown.wait_for_function("image => image.complete", arg=crop.element_handle())
    assert crop.evaluate("image => image.naturalWidth") == 32
    labels = LabelSet.open(hostile_labels)
    dense_C = labels.soft_labels([key], [view]).to_dense()[0]
    best = figure.locator(".bars li").first
    assert best.locator("bdi").text_content() == CLASSES_IN_ORDER[int(dense_C.argmax())]
    shown_prob = float(best.locator(".value").text_content().split()[0])
    assert shown_prob == pytest.approx(100 * float(dense_C.max()), abs=0.5)


CLASSES_IN_ORDER = sorted(CLASSES)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_axe_has_no_serious_finding(shown: Any, width: int, scheme: str) -> None:
    shown.set_viewport_size({"width": width, "height": 800})
    shown.emulate_media(color_scheme=scheme)
    assert shown.evaluate("document.documentElement.scrollWidth") <= width
    assert serious_findings(shown) == []


def test_the_page_works_with_the_keyboard(shown: Any) -> None:
    shown.locator("[name=sort]").focus()
    shown.keyboard.press("ArrowDown")
    assert shown.locator("[name=sort]").input_value() == "hard"
    shown.locator("#browser-more").focus()
    shown.keyboard.press("Enter")
    assert len(titles(shown)) == 16
    focused = shown.evaluate("document.activeElement.id")
    assert focused == shown.locator("#browser-images h4").nth(8).get_attribute("id")
