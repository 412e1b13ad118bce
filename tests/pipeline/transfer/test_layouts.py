"""mealv2 transfer on the published layouts: mAP of VOC2007, top-1 of the others."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from layouts import draw_birdsnap, draw_cub, draw_lists, draw_voc

from conftest import Result

Run = Callable[..., Result]
Events = Callable[[Path, str], list[dict[str, Any]]]
Weights = Callable[[Path], dict[str, bytes]]


@pytest.fixture(scope="module")
def voc(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(f"voc2007:{draw_voc(tmp_path_factory.mktemp('voc') / 'VOC2007')}")


def test_several_classes_per_image_are_learned(
    done: Run, transfer_flags: list[str], voc: Path, run: Path, events: Events
) -> None:
    words = ["--data-dir", voc, "--mode", "scratch", "--lr", 0.5, "--epochs", 20]
    words += ["--select", "best"]
    result = done(*transfer_flags, *words, "--output", run)
    report, start = result.report, events(run, "validation")[0]
    assert report["map"] > max(70, start["map"])
    assert report["map_11point"] > 70
    assert "top1" not in report
    assert "11-point mAP" in result.stderr
    words = ["evaluate", "--data-dir", voc, "--checkpoint", run, "--workers", 0]
    again = done(*words, "--results-file", run / "classes.json", "--json").report
    assert again["map"] == pytest.approx(report["map"])
    classes = json.loads((run / "classes.json").read_text())["per_class"]
    assert [row["class"] for row in classes] == ["aeroplane", "bicycle", "cat"]
    assert [row["ignored"] for row in classes] == [0, 0, 2]
    eleven = [100 * row["ap_11point"] for row in classes]
    assert sum(eleven) / 3 == pytest.approx(report["map_11point"])
    assert "11-point AP %" in done(*words).stdout
    row = json.loads((run / "report.json").read_text())
    assert row["best_map_11point"] == report["map_11point"] >= row["last_map_11point"]


@pytest.mark.parametrize("mode", ["fine-tune", "frozen"])
def test_a_resumed_run_of_several_classes_ends_with_the_same_bits(
    done: Run,
    transfer_flags: list[str],
    start: list[str],
    voc: Path,
    tmp_path: Path,
    weights: Weights,
    mode: str,
) -> None:
    words = [*transfer_flags, "--data-dir", voc, "--mode", mode, *start, "--sched", "constant"]
    done(*words, "--output", tmp_path / "whole")
    done(*words, "--epochs", 1, "--output", tmp_path / "parts")
    done("transfer", "--resume", tmp_path / "parts", "--epochs", 2)
    assert weights(tmp_path / "parts") == weights(tmp_path / "whole")


def test_a_run_of_several_classes_that_stops_early_names_its_own_metric(
    done: Run, transfer_flags: list[str], voc: Path, run: Path
) -> None:
    words = ["--data-dir", voc, "--mode", "scratch", "--lr", 0, "--min-lr", 0, "--epochs", 9]
    result = done(*transfer_flags, *words, "--early-stopping", 1, "--output", run)
    assert "stopped early: no better 11-point mAP since epoch 1;" in result.stderr
    assert "no better 11-point mAP since" in done("transfer", "--resume", run).stderr


@pytest.mark.parametrize("layout", ["cub200", "birdsnap", "list"])
def test_every_layout_trains(
    done: Run, transfer_flags: list[str], start: list[str], tmp_path: Path, layout: str
) -> None:
    draw = {"cub200": draw_cub, "birdsnap": draw_birdsnap, "list": draw_lists}[layout]
    folder = draw(tmp_path / "set")
    name = f"{folder}/lists={folder}" if layout == "list" else folder
    words = ["--data-dir", f"{layout}:{name}", "--mode", "frozen", *start, "--epochs", 1]
    assert done(*transfer_flags, *words, "--output", tmp_path / "run").report["num_images"] == 9


def test_only_transfer_trains_on_several_classes(
    run_cli: Run, finetune_flags: list[str], voc: Path, run: Path
) -> None:
    result = run_cli(*finetune_flags, "--data-dir", voc, "--output", run)
    assert result.code == 2
    assert "only `mealv2 transfer`" in result.stderr


def test_strict_makes_another_size_than_the_published_an_error(
    run_cli: Run, transfer_flags: list[str], voc: Path, run: Path
) -> None:
    words = ["--data-dir", voc, "--mode", "scratch", "--strict", "--output", run]
    result = run_cli(*transfer_flags, *words)
    assert result.code == 2
    assert "published are 5011" in result.stderr


def test_smoothing_has_no_effect_on_several_classes(
    run_cli: Run, transfer_flags: list[str], voc: Path, run: Path
) -> None:
    words = ["--data-dir", voc, "--mode", "scratch", "--smoothing", 0.1, "--output", run]
    result = run_cli(*transfer_flags, *words)
    assert result.code == 2
    assert "--smoothing" in result.stderr


def test_own_code_can_have_several_classes_per_image(
    done: Run, transfer_flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw_voc(tmp_path / "images", num_train=6, num_test=6)
    (tmp_path / "own_several.py").write_text(
        "from pathlib import Path\n"
        "import mealv2\n"
        "class Several(mealv2.UnorderedSource):\n"
        "    def __init__(self, split):\n"
        "        self.name, self.split, self.classes = 'own', split, ['a', 'b']\n"
        "        self._paths = sorted(Path('images/JPEGImages').iterdir())[:8]\n"
        "        self.keys = [path.name for path in self._paths]\n"
        "        self.sizes = self.stored_sizes = [path.stat().st_size for path in self._paths]\n"
        "        self.multi_labels = [[1, -1], [1, 1], [-1, 1], [0, 1]] * 2\n"
        "        self.labels = [0, 0, 1, 1] * 2\n"
        "    def __len__(self):\n"
        "        return 8\n"
        "    def read(self, position):\n"
        "        return self._paths[position].read_bytes()\n"
        "def load(split):\n"
        "    return Several(split)\n"
    )
    monkeypatch.chdir(tmp_path)
    words = ["--data-dir", "own_several:load", "--mode", "scratch", "--epochs", 1]
    report = done(*transfer_flags, *words, "--output", "run").report
    assert 0 < report["map"] <= 100
    assert report["num_images"] == 8
