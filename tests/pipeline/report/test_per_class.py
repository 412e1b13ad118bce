"""The section on classes: its numbers are those of `mealv2 evaluate`; what is missing is named."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mealv2.report.run import open_run
from pipeline.report import classes
from pipeline.report.sections import Inputs, Section

pytest.importorskip("matplotlib", reason="matplotlib is not installed")
pytest.importorskip("sklearn", reason="scikit-learn is not installed")


@pytest.fixture(scope="module")
def finished_run(
    done: Callable[..., Any], distill_flags: list[str], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    run = tmp_path_factory.mktemp("runs") / "run"
    done(*distill_flags, "--output", run)
    config = json.loads((run / "config.json").read_text())
    # as of a run without --img-size: the student says the size
    (run / "config.json").write_text(json.dumps({**config, "img_size": None}))
    return run


def section(
    tmp_path: Path, run: Path, *, labels: Path | None = None, data_dir: Path | None = None
) -> Section:
    return classes.section(Inputs((open_run(run),), (), labels, data_dir, tmp_path))


@pytest.mark.slow
def test_the_numbers_are_those_of_evaluate(
    finished_run: Path,
    student_dir: Path,
    labels_dir: Path,
    data_dir: Path,
    done: Callable[..., Any],
    tmp_path: Path,
) -> None:
    found = section(tmp_path, finished_run, labels=labels_dir, data_dir=data_dir)
    assert found.missing is None
    rows = {row["class"]: row for row in found.figures[0].data}
    for which, checkpoint in (("before", student_dir), ("after", finished_run)):
        out = tmp_path / which
        done("evaluate", "--data-dir", data_dir, "--checkpoint", checkpoint, "--output", out)
        evaluation = json.loads((out / "evaluation.json").read_text())
        assert found.context["top1"][which == "after"] == f"{evaluation['top1']:.2f}"
        assert evaluation["per_class"]
        for row in evaluation["per_class"]:
            assert rows[row["class"]][which] == pytest.approx(row["top1"])
            assert rows[row["class"]]["images"] == row["images"]
    assert [figure.name for figure in found.figures][-2:] == ["class-tsne-1", "class-tsne-2"]
    manifest = json.loads((labels_dir / "manifest.json").read_text())
    ensemble = manifest["roles"]["val"]["accuracy"]["ensemble"]["top1"]
    assert float(found.context["ensemble_top1"]) == pytest.approx(ensemble, abs=0.01)


@pytest.mark.slow
def test_the_first_run_of_every_method_is_measured(
    finished_run: Path, data_dir: Path, tmp_path: Path
) -> None:
    paths = [finished_run, tmp_path / "other", tmp_path / "unfinished"]
    for path in paths[1:]:
        shutil.copytree(finished_run, path)
        config = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps({**config, "note": path.name}))
    (tmp_path / "unfinished/student/model.safetensors").unlink()
    runs = tuple(map(open_run, paths))
    found = classes.section(Inputs(runs, (), None, data_dir, tmp_path))
    rows = {row[0]: row[1:] for row in found.context["methods"]}
    first, other = rows
    assert (first.split("/")[-1], other.split("/")[-1]) == ("run", "other")
    assert rows[other] == rows[first]
    assert found.context["columns"] == ["class", "images", "start", first, "gain", other]
    assert all(row[f"top-1, {other}"] == row["after"] for row in found.figures[0].data)
    (note,) = found.context["compared"].notes
    assert "unfinished is left out: " in note


@pytest.mark.slow
def test_what_is_missing_is_named(finished_run: Path, labels_dir: Path, tmp_path: Path) -> None:
    found = section(tmp_path, finished_run, labels=labels_dir)
    assert "give the data set of the run with --data-dir" in str(found.missing)
    assert found.context["similar"]
    assert found.context["ensemble"]
    nothing = section(tmp_path, finished_run)
    assert nothing.template is None
    assert nothing.missing
