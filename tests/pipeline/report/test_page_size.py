"""The page on many runs and classes: how long it takes, how big it is, how fast it opens."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from written_runs import write_run

from mealv2.label_set import Encoding
from pipeline.bench.context import simulated_rows, write_labels

playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
CHROMIUM = Path("/usr/bin/chromium")
pytestmark = [
    pytest.mark.browser,
    pytest.mark.slow,
    pytest.mark.timing,
    pytest.mark.skipif(not CHROMIUM.exists(), reason="Debian's chromium is not installed"),
]
NUM_CLASSES, NUM_IMAGES, NUM_VIEWS = 1000, 500, 4
MAX_CPU_S, MAX_BYTES, MAX_OPEN_S = 60, 20_000_000, 2.0


def test_twenty_runs_of_a_thousand_classes(done: Callable[..., Any], tmp_path: Path) -> None:
    encoding = Encoding(NUM_CLASSES, rate=30)
    rows = simulated_rows(encoding, NUM_IMAGES * NUM_VIEWS)
    keys = [f"class {i % 100}/{i}.jpg" for i in range(NUM_IMAGES)]
    write_labels(tmp_path / "labels", encoding, keys, rows)
    paths = [
        write_run(
            tmp_path / f"lr-{method}/seed-{seed}",
            **{"seed": seed, "epochs": 180, "num_classes": NUM_CLASSES, "model": "resnet18"},
            settings={"lr": 0.1 * (method + 1)},
        )
        for method in range(10)
        for seed in (1, 2)
    ]
    output = tmp_path / "report"
    start_s = time.process_time()
    done("report", *paths, "--labels", tmp_path / "labels", "--output", output)
    cpu_s = time.process_time() - start_s
    num_bytes = sum(path.stat().st_size for path in output.rglob("*") if path.is_file())
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox"])
        tab = chromium.new_page()
        tab.goto((output / "index.html").as_uri(), wait_until="load")
        open_s = tab.evaluate(
            "performance.timing.loadEventEnd - performance.timing.navigationStart"
        )
        chromium.close()
    print(f"{cpu_s:.1f} s of CPU, {num_bytes / 1e6:.2f} MB, opens in {open_s / 1000:.2f} s")
    assert cpu_s < MAX_CPU_S
    assert num_bytes < MAX_BYTES
    assert open_s / 1000 < MAX_OPEN_S
