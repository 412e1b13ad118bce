"""A report page in Debian's Chromium, opened from the disk; its errors and requests are checked."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from screenshots import CHROMIUM

playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe is not installed")

in_browser = [
    pytest.mark.browser,
    pytest.mark.slow,
    pytest.mark.skipif(not Path(CHROMIUM).exists(), reason="Debian's chromium is not installed"),
]
SECTIONS = ["answer", "curves", "browser", "labels", "classes", "weights", "made"]


@contextlib.contextmanager
def opened(
    report: Path, *, size: tuple[int, int] = (1280, 900), scheme: str = "light"
) -> Iterator[Any]:
    """Open a report's page; at the end the console has no message, and only files were read."""
    errors: list[str] = []
    urls: list[str] = []
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        viewport = {"width": size[0], "height": size[1]}
        tab = chromium.new_page(viewport=viewport, color_scheme=scheme)
        tab.on("pageerror", lambda error: errors.append(str(error)))
        tab.on(
            "console", lambda m: errors.append(m.text) if m.type in ("error", "warning") else None
        )
        tab.on(
            "dialog", lambda dialog: (errors.append(f"dialog {dialog.message}"), dialog.dismiss())
        )
        tab.on("request", lambda sent: urls.append(sent.url))
        tab.goto((report.resolve() / "index.html").as_uri())
        yield tab
        chromium.close()
    assert errors == []
    assert urls
    assert [url for url in urls if not url.startswith(("file:", "data:"))] == []


def sections_of(tab: Any) -> list[str]:
    """Return the ids of the page's sections, in order."""
    found: list[str] = tab.eval_on_selector_all("main > section", "all => all.map(one => one.id)")
    return found


def serious_findings(tab: Any) -> list[Any]:
    """Return what axe finds serious or critical: the rule, and up to three elements."""
    results = axe.Axe().run(tab, options={"preload": False})  # it would fetch the style sheets
    return [
        (rule["id"], [node["html"][:200] for node in rule["nodes"][:3]])
        for rule in results.response["violations"]
        if rule["impact"] in ("serious", "critical")
    ]
