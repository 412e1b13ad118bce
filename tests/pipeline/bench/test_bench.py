"""pipeline.bench: every line for real on tiny networks; what cannot be measured says why."""

import json
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from benchmarks.speed import document
from conftest import Result
from mealv2 import recipes
from mealv2.models.cost import forward_macs
from pipeline.bench import command_of, hardware, imagenet, steps
from pipeline.bench.context import BenchContext
from pipeline.bench.lines import GOALS, Line, by_cpu_time, ratios
from pipeline.bench.synthetic_images import draw_jpeg, write_image_folder
from pipeline.config import BenchConfig
from pipeline.config.bench import LINES
from pipeline.runtime.device import Runtime
from pipeline.timing import (
    Sample,
    Turn,
    cpu_seconds,
    step_macs,
    take_turns,
)
from pipeline.training.step import TrainStep

pytestmark = pytest.mark.slow

Run = Callable[..., Result]

TINY = {
    "--model": "test_resnet",
    "--teacher": "test_resnet,test_efficientnet",
    "--img-size": 32,
    "--batch-size": 4,
    "--num-images": 12,
    "--rounds": 1,
    "--workers": 0,
    "--device": "cpu",
}
FLAGS = [part for item in TINY.items() for part in item]
ALL_LINES = [*FLAGS, "--memory-images", 8]


@pytest.fixture(scope="module", autouse=True)
def short_turns() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipeline.bench.labelling._TURN_S", 0.01)
        patch.setattr("pipeline.bench.labelling._NUM_LOOKUPS", 1)
        patch.setattr("pipeline.bench.labelling.LOOKUP_SIZE", 32)
        patch.setattr("pipeline.bench.steps._TURN_S", 0.01)
        patch.setattr("pipeline.bench.imagenet._TURN_S", 0.01)
        yield


@pytest.fixture(scope="module")
def everything(done: Run, tmp_path_factory: pytest.TempPathFactory) -> tuple[Result, Any]:
    """A run of all lines, and what --results-file kept of it."""
    path = tmp_path_factory.mktemp("bench") / "raw.json"
    result = done("bench", *ALL_LINES, "--results-file", path)
    return result, json.loads(path.read_text())


def test_every_line_is_measured_for_real_or_says_what_it_needs(everything: Any) -> None:
    result, _ = everything
    lines = {line["line"]: line for line in result.report["lines"]}
    assert tuple(lines) == LINES == tuple(GOALS)
    for name, line in lines.items():
        if name in ("loader-packed", "loader-tar"):
            assert line["verdict"].startswith(("met", "missed", "not measured: needs "))
        else:
            assert line["figure"] > 0 or name == "memory"
            assert line["least"] <= line["figure"] <= line["most"]
            assert line["verdict"] == ("met" if line["met"] else "missed")
            assert line["met"] is GOALS[name].is_met(line["figure"])
        assert f"\n{name} " in result.stderr


def test_the_report_says_command_day_machine_and_versions_and_no_path(everything: Any) -> None:
    result, raw = everything
    report = result.report
    assert report["command"].startswith("mealv2 bench ")
    assert report["command"].endswith("--results-file RESULTS_FILE")
    assert {"torch", "timm", "python", "mealv2"} <= report["versions"].keys()
    assert {"cpu", "cores", "memory_gb"} <= report["hardware"].keys()
    assert report["images"]["num_images"] == 12
    assert report["estimate"]["arithmetic_bound"] > 1
    for text in (result.stdout, json.dumps(raw)):
        assert "/" not in text.replace("views/s", "").replace("1/4", "").replace("tar/", "")


def test_json_has_the_turns_behind_every_figure(everything: Any) -> None:
    _, raw = everything
    for line in raw["lines"]:
        if "figure" not in line:
            continue
        assert line["figures"]
        for turns in line["turns"].values():
            assert len(turns) >= (1 if line["line"] == "memory" else raw["rounds"])
            assert all(turn["units"] > 0 and turn["seconds"] > 0 for turn in turns)
            assert all(turn["cpu_seconds"] >= 0 for turn in turns)
    by_name = {line["line"]: line for line in raw["lines"]}
    (step,), (once,) = by_name["loader-4"]["turns"]["loader-4"], by_name["loader-1"]["figures"]
    assert step["units"] == 12 * 4
    ours, baseline = (by_name["loader-1"]["turns"][n][0] for n in by_name["loader-1"]["turns"])
    rates = [turn["units"] / turn["seconds"] for turn in (ours, baseline)]
    assert once == pytest.approx(rates[0] / rates[1], rel=1e-3)


def test_the_document_has_the_table_the_reasons_and_every_repetition(everything: Any) -> None:
    _, raw = everything
    text = document([raw])
    for name in LINES:
        assert f"| {name} |" in text
    assert raw["command"] in text
    assert text.count("units in seconds") == sum(len(line["turns"]) for line in raw["lines"])
    for line in raw["lines"]:
        if "figure" not in line:
            assert f"- `{line['line']}` was {line['verdict']}." in text


def test_profile_names_where_the_time_goes(done: Run) -> None:
    result = done("bench", *FLAGS, "--profile")
    assert result.report["lines"] == []
    two, one = (result.report["profile"][f"stage_{name}"] for name in ("two", "one"))
    assert set(two["step"]) == {
        "waiting for images",
        "copy to the device",
        "labels",
        "forward and loss",
        "backward",
        "optimizer",
    }
    assert {"waiting for images", "teachers", "encoding", "writing"} <= one["step"].keys()
    for found in (two, one):
        assert {"file", "decode", "crop, resize, flip", "collate"} <= found["reading"].keys()
        for part in ("step", "reading"):
            percent = sum(phase["percent"] for phase in found[part].values())
            assert percent == pytest.approx(100, abs=0.1)
        assert found["arithmetic"]["TFLOP/s"] >= 0
    assert "### Where the time of stage two goes" in document([result.report])


def test_own_images_are_measured_beside_drawn_ones(
    done: Run, data_dir: Path, tmp_path: Path
) -> None:
    path, names = tmp_path / "raw.json", ("loader-1", "loader-4", "loader-tar")
    flags = ["--data-dir", data_dir, "--lines", ",".join(names), "--num-images", 9]
    result = done("bench", *FLAGS, *flags, "--results-file", path)
    report = result.report
    assert report["images"]["num_images"] == report["drawn_images"]["num_images"] == 9
    assert report["images"]["mean_bytes"] < report["drawn_images"]["mean_bytes"] / 10
    kinds = ("--data-dir", "drawn pictures")
    named = [(line["line"], line["pictures"]) for line in report["lines"]]
    assert named == [(name, kind) for name in names for kind in kinds]
    assert "estimate" not in report
    text = document([json.loads(path.read_text())])
    for name, kind in named:
        assert f"\n{name}, {kind} " in result.stderr
        assert f"| {name}, {kind} |" in text
    assert "9 drawn JPEGs of" in text
    for line in json.loads(path.read_text())["lines"]:
        ours, other = line["turns"]
        assert {name.partition(", ")[2] for name in (ours, other)} == {line["pictures"]}
        (figure,), rates = line["figures"], [_rate(line["turns"][n][0]) for n in (ours, other)]
        assert figure == pytest.approx(rates[0] / rates[1], rel=1e-3)


def _rate(turn: dict[str, Any]) -> float:
    return float(turn["units"] / turn["seconds"])


def test_lines_on_other_things_than_reading_have_no_drawn_images(done: Run, data_dir: Path) -> None:
    report = done("bench", *FLAGS, "--data-dir", data_dir, "--lines", "help,labels").report
    assert [line["line"] for line in report["lines"]] == ["labels", "help"]
    assert "drawn_images" not in report
    assert all("pictures" not in line for line in report["lines"])


def test_own_images_in_class_folders_alone_are_measured(done: Run, data_dir: Path) -> None:
    flags = ["--data-dir", data_dir / "train", "--lines", "loader-1", "--num-images", 9]
    report = done("bench", *FLAGS, *flags).report
    assert [line["pictures"] for line in report["lines"]] == ["--data-dir", "drawn pictures"]
    assert all(line["figure"] > 0 for line in report["lines"])


def test_chosen_lines_come_in_the_order_of_the_table(done: Run) -> None:
    report = done("bench", *FLAGS, "--lines", "help,labels").report
    assert [line["line"] for line in report["lines"]] == ["labels", "help"]


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--lines", "loader-1,lables"], "lables"),
        (["--teacher", "resnet18=somewhere"], "--teacher"),
        (["--train-split", "val"], "--train-split"),
        (["--results-file", "nowhere/raw.json"], "--results-file"),
        (["--batch-size", 1], "--batch-size"),
    ],
)
def test_wrong_use_is_one_line_and_exit_code_2(
    run_cli: Run, flags: list[object], named: str
) -> None:
    result = run_cli("bench", *flags)
    assert result.code == 2
    assert result.stderr.count("\n") == 1
    assert named in result.stderr


def test_a_line_whose_package_is_missing_is_not_measured(
    done: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    report = done("bench", *FLAGS, "--lines", "loader-packed").report
    assert [line["verdict"] for line in report["lines"]] == ["not measured: needs jpegtran"]


def test_webdatasets_pipeline_reads_all_that_was_written(done: Run) -> None:
    (line,) = done("bench", *FLAGS, "--lines", "loader-tar").report["lines"]
    assert line["figure"] > 0


def test_hours_for_imagenet_are_said_of_every_recipe(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(imagenet, "teachers_rate", lambda bench, names, size: 1000.0)
    monkeypatch.setattr(imagenet, "step_rate", lambda bench, name, size: 500.0)
    runtime = Runtime(torch.device("cpu"), None)
    told = imagenet.gpu_hours(BenchContext(BenchConfig(), runtime, tmp_path))
    assert [row["recipe"] for row in told["recipes"]] == recipes.names()
    row = next(row for row in told["recipes"] if row["recipe"] == "resnet50-224")
    assert row["stage_one_180_views_h"] == pytest.approx(180 * 1_281_167 / 1000 / 3600, abs=0.1)
    assert row["stage_two_h"] == pytest.approx(180 * 1_281_167 / 500 / 3600, abs=0.1)
    assert row["online_h"] == pytest.approx(row["stage_two_h"] + row["stage_one_180_views_h"], 0.01)


def test_rates_for_imagenet_are_measured_for_real(tmp_path: Path) -> None:
    config = BenchConfig(batch_size=4, num_images=12)
    bench = BenchContext(config, Runtime(torch.device("cpu"), None), tmp_path)
    assert imagenet.teachers_rate(bench, ["test_resnet", "test_efficientnet"], 32) > 0
    assert imagenet.step_rate(bench, "test_resnet", 32) > 0


def test_a_batch_that_does_not_fit_is_halved(tmp_path: Path) -> None:
    bench = BenchContext(BenchConfig(batch_size=16), Runtime(torch.device("cpu"), None), tmp_path)
    tried: list[int] = []

    def create(batch_size: int) -> Callable[[], int]:
        def work() -> int:
            tried.append(batch_size)
            if batch_size > 4:
                raise torch.cuda.OutOfMemoryError
            return batch_size

        return work

    assert imagenet.rate_of(bench, create) > 0
    assert list(dict.fromkeys(tried)) == [16, 8, 4]


def test_the_stored_labels_line_runs_the_training_step_of_the_real_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config = BenchConfig(model="test_resnet", img_size=32, batch_size=6, num_images=4)
    bench = BenchContext(config, Runtime(torch.device("cpu"), None), tmp_path)
    step = steps.train_step(bench, bench.network(config.model), "stored")
    assert type(step) is TrainStep
    seen: list[int] = []
    forward = step._model.forward

    def recorded(images_BCHW: torch.Tensor, *arguments: Any) -> Any:
        seen.append(len(images_BCHW))
        return forward(images_BCHW, *arguments)

    monkeypatch.setattr(step._model, "forward", recorded)
    assert steps.workload(bench, step)() == config.batch_size
    assert seen == [config.batch_size]
    assert next(step.spec.student.parameters()).grad is None  # the optimizer has stepped
    assert step.state.optimizer.state


# --- the parts --------------------------------------------------------------------------------


def test_works_take_turns_and_a_first_round_does_not_count() -> None:
    done: list[str] = []

    def spec(name: str) -> Callable[[], int]:
        return lambda: len(done.append(name) or name)  # type: ignore[func-returns-value]

    turns = take_turns({"a": spec("a"), "bb": spec("bb")}, rounds=3, device=torch.device("cpu"))
    assert done == ["a", "bb"] * 4
    assert [turn.units for turn in turns["bb"]] == [2, 2, 2]


def test_ratios_are_of_turns_of_the_same_round() -> None:
    turns = {"ours": [Turn(4, 1.0), Turn(8, 1.0)], "theirs": [Turn(2, 1.0), Turn(2, 2.0)]}
    assert ratios(turns, "ours", "theirs") == [2.0, 8.0]


@pytest.mark.parametrize(
    ("name", "figure", "verdict"),
    [
        ("loader-1", 1.8, "met"),
        ("loader-1", 1.79, "missed"),
        ("labels", 2.0, "missed"),
        ("step-hard", 1.03, "met"),
        ("step-hard", 1.04, "missed"),
        ("help", 0.2, "met"),
    ],
)
def test_a_goal_is_met_or_missed(name: str, figure: float, verdict: str) -> None:
    assert Line(name, [figure]).verdict == verdict


@pytest.mark.parametrize(("waited", "limit"), [(4.0, "reading images"), (0.1, "the networks")])
def test_what_is_waited_for_is_what_limits(waited: float, limit: str) -> None:
    assert Sample(10, 5.0, waited).limit == limit


def test_multiplications_are_those_known_of_resnet50() -> None:
    import timm

    with torch.device("meta"):
        model = timm.create_model("resnet50")
    assert forward_macs(model, 224) / 1e9 == pytest.approx(4.09, abs=0.01)
    assert step_macs(model, 224) / 1e9 == pytest.approx(12.15, abs=0.05)


def test_a_synthetic_image_is_the_same_for_a_seed_and_about_as_large_as_imagenets(
    tmp_path: Path,
) -> None:
    assert draw_jpeg(3) == draw_jpeg(3) != draw_jpeg(4)
    drawn = write_image_folder(tmp_path, num_images=16)
    assert 80_000 < drawn.mean_bytes < 150_000
    assert 140_000 < drawn.mean_pixels < 260_000
    with Image.open(next(tmp_path.rglob("*.JPEG"))) as image:
        assert image.format == "JPEG"


def test_a_command_line_is_reported_without_paths() -> None:
    config = BenchConfig(rounds=7, data_dir=Path("secret"), amp=True, lines=("help", "labels"))
    command = command_of(config)
    assert "secret" not in command
    words = "mealv2 bench --amp --lines help,labels --rounds 7 --data-dir DATA_DIR"
    assert set(command.split()) == set(words.split())


@pytest.mark.parametrize(
    ("card", "peak"),
    [
        ("NVIDIA H200", 989.0),
        ("NVIDIA H100 80GB HBM3", 989.0),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA A100-SXM4-40GB", 312.0),
        ("NVIDIA L40S", 362.0),
        ("NVIDIA A10", 125.0),
        ("NVIDIA Unheard Of", None),
    ],
)
def test_the_peak_of_a_known_card(
    monkeypatch: pytest.MonkeyPatch, card: str, peak: float | None
) -> None:
    class Properties:
        name = card

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    assert hardware.peak_tflops(torch.device("cuda")) == peak


def test_time_computed_counts_processes_below_this_one() -> None:
    before = cpu_seconds()
    busy = "import time\nwhile time.process_time() < 0.3: pass"
    subprocess.run([sys.executable, "-c", busy], check=True)
    assert cpu_seconds() - before >= 0.25


def test_cpu_time_does_not_go_back_while_threads_end() -> None:
    stop = threading.Event()

    def start_and_end_threads() -> None:
        while not stop.is_set():
            thread = threading.Thread(target=int)
            thread.start()
            thread.join()

    busy = threading.Thread(target=start_and_end_threads)
    busy.start()
    try:
        readings = [cpu_seconds() for _ in range(500)]
    finally:
        stop.set()
        busy.join()
    assert readings == sorted(readings)


def test_a_ratio_by_time_computed_leaves_out_turns_too_short_to_count() -> None:
    turns = {
        "ours": [Turn(10, 9.0, 1.0), Turn(10, 1.0, 0.01)],
        "theirs": [Turn(5, 1.0, 1.0), Turn(5, 1.0, 1.0)],
    }
    assert by_cpu_time(turns, "ours", "theirs") == {"by_cpu_time": 2.0}
    assert by_cpu_time({name: of[1:] for name, of in turns.items()}, "ours", "theirs") == {}
