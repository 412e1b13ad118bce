"""Screenshots of every section of a report page, at two widths, light and dark, to look at."""

import sys
from pathlib import Path
from typing import Any

CHROMIUM = "/usr/bin/chromium"
SIZES = {"desktop": (1280, 900), "phone": (390, 844)}
SCHEMES = ("light", "dark")
# a section is drawn in one piece: all of it, whether in sight or not
_ALL_IN_SIGHT = """
for (const image of document.images) image.loading = "eager";
document.querySelector("nav").style.position = "static";
const later = document.querySelectorAll(".drawing, .browser > li");
for (const one of later) one.style.contentVisibility = "visible";
"""


def take(report: Path, output: Path) -> list[Path]:
    """Write SIZE-SCHEME-SECTION.png for each section of a report; return the paths."""
    from playwright.sync_api import sync_playwright

    output.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        found = [
            path
            for size in SIZES
            for scheme in SCHEMES
            for path in _sections(browser, report, output, size, scheme)
        ]
        browser.close()
    return found


def _sections(browser: Any, report: Path, output: Path, size: str, scheme: str) -> list[Path]:
    width, height = SIZES[size]
    page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)
    page.goto((report.resolve() / "index.html").as_uri())
    page.evaluate(_ALL_IN_SIGHT)
    page.wait_for_function("Array.from(document.images).every(image => image.complete)")
    found = []
    for section in page.locator("main > section").all():
        path = output / f"{size}-{scheme}-{section.get_attribute('id')}.png"
        section.screenshot(path=path)
        found.append(path)
    page.close()
    return found


if __name__ == "__main__":
    for taken in take(Path(sys.argv[1]), Path(sys.argv[2])):
        print(taken)
