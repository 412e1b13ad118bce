"""benchmarks/experiments.py: figures by hand, pairs by seed, runs that are kept or resumed."""

import argparse
import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest

from benchmarks import experiment_tables as tables
from benchmarks import experiments
from benchmarks.experiments import Row, make, needed, run_all
from benchmarks.subsets import Part, write_subset
from mealv2.errors import ConfigError
from pipeline.config import FinetuneConfig, LabelsConvertConfig, PrecomputeConfig
from pipeline.training import loop


def config_in(folder: Path, data_dir: Path = Path("data"), **settings: Any) -> FinetuneConfig:
    return FinetuneConfig(
        data_dir=data_dir,
        output=folder,
        model="test_resnet",
        **{"pretrained": False, "img_size": 32, "epochs": 2, "workers": 0, **settings},
    )


def row(name: str, output: Path, reference: str = "") -> Row:
    return Row(name, name, lambda seed: [config_in(output / f"{name}-{seed}")], reference)


def finish(config: FinetuneConfig, top1: float) -> None:
    """Leave what a finished run leaves for the tables."""
    settings = {k: v for k, v in config.as_json().items() if k not in experiments._FREE}
    assert config.output is not None
    config.output.mkdir(parents=True)
    record = {"settings": settings, "report": {"top1": top1}}
    config.output.with_name(f"{config.output.name}.json").write_text(json.dumps(record))


def test_interval_is_students_of_the_mean() -> None:
    assert tables.interval([50.0]) is None
    low, high = tables.interval([50.0, 53.0, 53.0]) or (0.0, 0.0)
    # s = sqrt(3), t(0.975, 2) = 4.302653 of a printed table
    assert low == pytest.approx(52.0 - 4.302653 * math.sqrt(3.0) / math.sqrt(3.0), abs=1e-5)
    assert high == pytest.approx(52.0 + 4.302653, abs=1e-5)


def test_differences_are_within_a_seed_and_only_of_seeds_that_both_have(tmp_path: Path) -> None:
    rows = [row("a", tmp_path), row("b", tmp_path, reference="a")]
    for seed, top1 in {0: 50.0, 1: 60.0, 2: 40.0}.items():
        finish(rows[0].runs(seed)[0], top1)  # type: ignore[arg-type]
    for seed, top1 in {0: 51.0, 2: 43.0}.items():
        finish(rows[1].runs(seed)[0], top1)  # type: ignore[arg-type]
    found = tables.figures(rows, range(4))
    assert found["a"].values == {0: 50.0, 1: 60.0, 2: 40.0}
    assert found["a"].differences == {}
    assert found["b"].differences == {0: 1.0, 2: 3.0}
    lines = tables.write_results(tmp_path, rows, range(4)).splitlines()
    # t(0.975, 1) = 12.7062, s = sqrt(2), n = 2: 12.71 around 2
    assert lines[3] == (
        "| b | 2 | 47.00 (-3.82 to 97.82) | a | +2.00 (-10.71 to +14.71) | 51.00 43.00 |"
    )
    written = json.loads((tmp_path / "results.json").read_text())["rows"]["b"]
    assert written["mean_differences"] == 2.0
    assert written["differences"] == {"0": 1.0, "2": 3.0}


def test_a_row_without_a_finished_run_is_not_in_the_table(tmp_path: Path) -> None:
    rows = [row("a", tmp_path), row("b", tmp_path, reference="a")]
    finish(rows[0].runs(0)[0], 50.0)  # type: ignore[arg-type]
    text = tables.rows_table(rows, tables.figures(rows, [0]))
    assert [line.split(" | ")[0] for line in text.splitlines()[2:]] == ["| a"]


def test_a_run_needs_the_runs_whose_folders_it_names(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("teacher", "labels", "start", "other")]
    teacher, labels, start, _ = folders
    of = PrecomputeConfig(
        data_dir=tmp_path, output=labels, teacher=(f"resnet18={teacher}",), topk="all"
    )
    assert needed(of, folders) == {teacher}
    convert = LabelsConvertConfig(labels=labels, output=tmp_path / "top-1", topk="1")
    assert needed(convert, folders) == {labels}
    student = config_in(tmp_path / "student", pretrained=None, initial_checkpoint=start)
    assert needed(student, folders) == {start}


def test_two_runs_in_one_folder_must_be_equal(tmp_path: Path) -> None:
    one = config_in(tmp_path / "run")
    assert len(experiments.distinct([one, config_in(tmp_path / "run")])) == 1
    with pytest.raises(ValueError, match="two runs with different settings"):
        experiments.distinct([one, config_in(tmp_path / "run", lr=0.5)])


def test_rows_that_are_asked_for_come_with_their_reference(tmp_path: Path) -> None:
    rows = [row("a", tmp_path), row("b", tmp_path, "a"), row("c", tmp_path, "a")]
    rows[1] = dataclasses.replace(rows[1], is_quick=True)
    options = argparse.Namespace(rows=["c"], quick=False, minus=None)
    assert [each.name for each in tables.chosen(rows, options)] == ["a", "c"]
    options = argparse.Namespace(rows=None, quick=True, minus=None)
    assert [each.name for each in tables.chosen(rows, options)] == ["a", "b"]
    options = argparse.Namespace(rows=["c"], quick=False, minus="b")
    found = tables.chosen(rows, options)
    assert [(each.name, each.reference) for each in found] == [("b", ""), ("c", "b")]
    for rows_and_minus in ({"rows": ["d"], "minus": None}, {"rows": ["c"], "minus": "d"}):
        with pytest.raises(ConfigError, match="no row d; known: a, b, c"):
            tables.chosen(rows, argparse.Namespace(quick=False, **rows_and_minus))


def test_a_run_from_before_a_setting_is_kept_only_if_the_setting_has_its_default(
    tmp_path: Path,
) -> None:
    finish(config_in(tmp_path / "run"), 50.0)
    record = tmp_path / "run.json"
    kept = json.loads(record.read_text())
    assert kept["settings"].pop("smoothing") == 0.0
    record.write_text(json.dumps(kept))
    assert experiments.finished(config_in(tmp_path / "run")) == {"top1": 50.0}
    with pytest.raises(ConfigError, match="made with smoothing None"):
        experiments.finished(config_in(tmp_path / "run", smoothing=0.1))


def test_a_finished_run_is_kept_an_interrupted_one_resumed_other_settings_refused(
    data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_in(tmp_path / "run", data_dir, batch_size=12, lr=0.01)
    whole = make(config_in(tmp_path / "whole", data_dir, batch_size=12, lr=0.01))

    def stop_after_one(*args: Any, **kwargs: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(loop.RunResult, "finalize", stop_after_one)
        with pytest.raises(KeyboardInterrupt):
            make(config)
    assert experiments.finished(config) is None
    metrics = tmp_path / "run" / "metrics.jsonl"
    logged = metrics.read_text().splitlines()
    report = make(config)
    assert report["cross_entropy"] == whole["cross_entropy"]
    assert metrics.read_text().splitlines()[: len(logged)] == logged  # not trained again
    monkeypatch.setitem(experiments._RUN, FinetuneConfig, stop_after_one)
    assert make(config) == report
    assert make(dataclasses.replace(config, workers=2)) == report
    with pytest.raises(ConfigError, match=r"run was made with lr 0.01, not 0.02; give another"):
        make(dataclasses.replace(config, lr=0.02))


@pytest.mark.slow
def test_processes_wait_for_the_runs_they_need(data_dir: Path, tmp_path: Path) -> None:
    start = config_in(tmp_path / "start", data_dir, epochs=1)
    given: dict[str, Any] = {"pretrained": None, "initial_checkpoint": start.output}
    student = config_in(tmp_path / "student", data_dir, epochs=1, **given)
    run_all([student, start], jobs=2)
    other = config_in(tmp_path / "other", data_dir, epochs=1, **given)
    make(other)
    found, expected = experiments.finished(student), experiments.finished(other)
    assert found is not None
    assert expected is not None
    assert found["cross_entropy"] == expected["cross_entropy"]


def test_a_smaller_subset_is_the_beginning_of_a_larger_one(data_dir: Path, tmp_path: Path) -> None:
    parts = {"many": Part("train", 6), "few": Part("train", 2), "rest": Part("train", 4, 2)}
    folder = write_subset(data_dir, tmp_path / "subset", parts)
    files = {
        name: {path.relative_to(folder / name) for path in (folder / name).rglob("*.*")}
        for name in parts
    }
    assert len(files["few"]) == 2 * 3
    assert files["many"] == files["few"] | files["rest"]
    assert not files["few"] & files["rest"]
    some = next(iter(files["few"]))
    written = (folder / "few" / some).read_bytes()
    assert written in {path.read_bytes() for path in (data_dir / "train").rglob("*.*")}
    assert write_subset(data_dir, folder, parts) == folder
    with pytest.raises(ConfigError, match="other images"):
        write_subset(data_dir, folder, {"many": Part("train", 5)})
    with pytest.raises(ConfigError, match=r"of train has 12 images, 13 are needed"):
        write_subset(data_dir, tmp_path / "more", {"all": Part("train", 13)})
