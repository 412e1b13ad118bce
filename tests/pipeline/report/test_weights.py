"""The report's section on weights: what is drawn of which runs, and what is missing."""

import csv
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from written_runs import write_run

from mealv2.report.run import open_run
from pipeline.report.page import write_page
from pipeline.report.sections import Inputs, Section
from pipeline.report.weights import section

SHAPES = {
    "conv1.weight": (8, 3, 3, 3),
    "bn1.weight": (8,),
    "layer1.0.conv1.weight": (8, 8, 3, 3),
    "layer1.0.downsample.0.weight": (8, 8, 1, 1),
    "layer2.0.conv1.weight": (16, 8, 3, 3),
    "fc.weight": (3, 16),
}


def save_weights(folder: Path, *, seed: int, width: float = 0.05) -> dict[str, np.ndarray]:
    """Write a model's weights, normal with a standard deviation, as a training does."""
    rng = np.random.default_rng(seed)
    state = {n: rng.normal(0, width, shape).astype(np.float32) for n, shape in SHAPES.items()}
    folder.mkdir(parents=True, exist_ok=True)
    safetensors.numpy.save_file(state, folder / "model.safetensors")
    return state


def log_weights(run: Path, layer: str, epochs: Mapping[int, list[float]]) -> None:
    with (run / "metrics.jsonl").open("a") as file:
        for epoch, values in epochs.items():
            event = {"event": "weights", "epoch": epoch, "layer": layer}
            event |= {"percentiles": [10, 25, 50, 75, 90], "values": values}
            file.write(json.dumps(event) + "\n")


def rows_of(page: Path, name: str) -> list[dict[str, str]]:
    with (page / f"figures/{name}.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def found_in(*runs: Path, control: Sequence[Path] = (), output: Path = Path()) -> Section:
    return section(
        Inputs(tuple(map(open_run, runs)), tuple(map(open_run, control)), None, None, output)
    )


def models_of(found: Section) -> dict[str, list[str]]:
    """Return whose weights each figure shows."""
    return {f.name: list(dict.fromkeys(row["model"] for row in f.data)) for f in found.figures}


def section_of(page: Path) -> str:
    text = (page / "index.html").read_text()
    found = re.search(r'<section id="weights".*?</section>', text, re.DOTALL)
    assert found is not None
    return found[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A soft run and its control from one start, with weights and percentiles."""
    folder = tmp_path_factory.mktemp("runs")
    save_weights(folder / "start", seed=0)
    for number, name in enumerate(("soft", "hard"), start=1):
        settings = {"initial_checkpoint": str(folder / "start"), "lr": 0.1 * number}
        run = write_run(folder / name, is_soft=name == "soft", settings=settings)
        save_weights(run / "student", seed=number, width=0.05 * (1 + number))
        epochs = {e: [number * v * (1 + e) for v in (-2.0, -1, 0.5, 1, 2)] for e in range(3)}
        log_weights(run, "layer1.0.conv1", epochs)
    return folder


@pytest.fixture(scope="module")
def page(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("page")
    found = found_in(folder / "soft", control=[folder / "hard"], output=output)
    write_page(output, [found], title="t", notes=[], made_at="now", version="0")
    return output


@pytest.mark.parametrize(
    ("place", "layer"),
    [("first", "conv1"), ("middle", "layer1.0.conv1"), ("last", "layer2.0.conv1")],
)
def test_histograms_have_the_saved_weights_of_start_run_and_control(
    page: Path, folder: Path, place: str, layer: str
) -> None:
    rows = rows_of(page, f"weights-{place}")
    folders = {"start": "start", "soft": "soft/student", "hard": "hard/student"}
    saved = {
        name: safetensors.numpy.load_file(folder / path / "model.safetensors")[f"{layer}.weight"]
        .astype(np.float64)
        .ravel()
        for name, path in folders.items()
    }
    assert list(dict.fromkeys(row["model"] for row in rows)) == list(saved)
    for name, values in saved.items():
        bins = [
            tuple(float(row[k]) for k in ("low", "high", "percent"))
            for row in rows
            if row["model"] == name
        ]
        for low, high, percent in bins[:-1]:
            inside = int(((values >= low) & (values < high)).sum())
            assert percent == pytest.approx(100 * inside / values.size, abs=1e-9)
        assert sum(percent for *_, percent in bins) > 98.5
    assert f"layer of test_resnet: {layer}" in section_of(page)


def test_table_has_the_spread_of_the_weights(page: Path, folder: Path) -> None:
    shown = [float(value) for value in re.findall(r'<data value="([^"]+)"', section_of(page))]
    start, soft = (
        np.sort(
            safetensors.numpy.load_file(folder / path / "model.safetensors")["conv1.weight"]
            .astype(np.float64)
            .ravel()
        )
        for path in ("start", "soft/student")
    )
    for values in (start, soft):
        deviation = float(np.sqrt(((values - values.mean()) ** 2).mean()))
        assert any(value == pytest.approx(deviation) for value in shown)
    near = 100 * float((np.abs(soft) < 0.1 * start.std()).mean())
    assert any(value == pytest.approx(near) for value in shown)


def test_percentiles_over_epochs_are_those_that_both_runs_logged(page: Path) -> None:
    rows = rows_of(page, "weight-percentiles-1")
    assert [(row["model"], row["epoch"]) for row in rows] == [
        (name, str(epoch)) for name in ("soft", "hard") for epoch in range(3)
    ]
    assert [float(rows[-1][f"p{p}"]) for p in (10, 25, 50, 75, 90)] == [-12, -6, 3, 6, 12]
    assert "Weights of layer1.0.conv1, test_resnet" in section_of(page)
    assert "missing" not in section_of(page)


def test_runs_without_weights_have_a_sentence(tmp_path: Path) -> None:
    found = found_in(write_run(tmp_path / "run"))
    assert found.missing is not None
    assert "no saved weights: a training writes student/model.safetensors" in found.missing
    assert "not logged: train with --log-weights auto." in found.missing
    assert not found.figures


def test_of_many_runs_a_handful_is_drawn_and_named(tmp_path: Path) -> None:
    paths = []
    for number in range(7):
        name = f"lr-{number // 2}/seed-{number % 2}"
        settings = {"lr": 0.1 * (number // 2), "pretrained": False}
        paths.append(write_run(tmp_path / name, seed=number % 2, settings=settings))
        save_weights(paths[-1] / "student", seed=number)
    found = found_in(*paths)
    assert (len(found.context["runs"]), found.context["left_out"]) == (3, 1)
    assert models_of(found)["weights-first"] == ["lr-0", "lr-1", "lr-2"]
    starts = [row[-1] for row in found.context["runs"]]
    assert starts == ["not drawn: it started from random weights"] * 3
    assert "The weights of the start are not on this machine." in (found.missing or "")


def test_models_of_other_layers_and_a_start_of_another_head_are_drawn_apart(tmp_path: Path) -> None:
    vit = {
        "patch_embed.proj.weight": (8, 3, 4, 4),
        "pos_embed": (1, 5, 8),
        "blocks.0.attn.qkv.weight": (24, 8),
        "blocks.0.mlp.fc1.weight": (16, 8),
        "head.weight": (3, 8),
    }
    rng = np.random.default_rng(0)
    state = {name: rng.normal(size=shape).astype(np.float32) for name, shape in vit.items()}
    safetensors.numpy.save_file(
        {**state, "head.weight": np.zeros((9, 8), np.float32)}, tmp_path / "start.safetensors"
    )
    first = write_run(
        tmp_path / "vit",
        model="test_vit",
        settings={"initial_checkpoint": str(tmp_path / "start.safetensors")},
    )
    safetensors.numpy.save_file(state, first / "student/model.safetensors")
    second = write_run(tmp_path / "resnet", settings={"initial_checkpoint": "/gone"})
    save_weights(second / "student", seed=1)
    found = found_in(first, second)
    titles = [figure.title for figure in found.figures]
    assert "Middle layer of test_vit: blocks.0.mlp.fc1" in titles
    assert "Last layer of test_resnet: layer2.0.conv1" in titles
    assert found.context["runs"][1][-1].startswith("not drawn: no checkpoint at /gone")
    assert models_of(found) == {
        **{f"weights-{place}": ["start", "vit"] for place in ("first", "middle")},
        "weights-last": ["vit"],
        **{f"weights-{place}-2": ["resnet"] for place in ("first", "middle", "last")},
    }
