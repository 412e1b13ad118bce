"""mealv2.open_run and what is made of runs: states, best epochs, methods, gaps, plateaus."""

import json
import math
import os
import time
from pathlib import Path

import pytest
from written_runs import write_run

import mealv2
from mealv2.errors import ConfigError, MealError
from mealv2.report.answer import Entry, gaps_of, table_rows
from mealv2.report.curves import CURVES, levels_of, missing_curves, step_figures
from mealv2.report.methods import comparison_of, differing_settings, methods_of
from mealv2.report.style import Figure, drawing, new_figure
from mealv2.report.teachers import label_source


def log(run: Path, **event: object) -> None:
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(event) + "\n")


def test_a_run_has_its_epochs_last_best_and_state(tmp_path: Path) -> None:
    run = mealv2.open_run(write_run(tmp_path / "run", best=4, top1=70.0))
    assert run.start is not None
    assert run.start["top1"] == 60.0
    assert run.last is not None
    assert run.best is not None
    assert (run.last[0], run.last[1]["top1"]) == (6, 70.0)
    assert (run.best[0], run.best[1]["top1"]) == (4, 71.0)
    assert (run.state, run.seconds) == ("finished after 6 epochs", 360.0)


def test_of_equal_epochs_the_later_one_is_the_best(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run", epochs=1, planned=3)
    for epoch in (2, 3):
        log(path, event="validation", epoch=epoch, top1=70.0)
    best = mealv2.open_run(path).best
    assert best is not None
    assert best[0] == 3


def test_a_run_that_trains_can_be_read(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run", epochs=0, planned=9)
    with (path / "metrics.jsonl").open("a") as file:
        file.write('{"event": "val')  # half a line
    (path / "run.lock").write_text("{}")
    run = mealv2.open_run(path)
    assert (run.state, run.last) == ("still training: 0 of 9 epochs are done", None)
    old = time.time() - 1000
    os.utime(path / "run.lock", (old, old))
    assert mealv2.open_run(path).state == "not finished: 0 of 9 epochs are done"


def test_a_run_in_its_first_epoch_has_curves_over_steps(tmp_path: Path) -> None:
    path = write_run(tmp_path / "new", epochs=0, planned=9)
    for step, loss in ((50, 2.0), (100, 1.5), (100, 1.25)):  # trained again after a resume
        log(path, event="train", epoch=1, step=step, loss=loss, lr=0.01)
    methods = methods_of([mealv2.open_run(path), mealv2.open_run(write_run(tmp_path / "old"))])
    figures = {figure.name: figure for figure in step_figures(methods)}
    assert list(figures) == ["loss-steps", "lr-steps"]
    rows = figures["loss-steps"].data
    assert [(row["method"], row["step"], row["train_loss"]) for row in rows] == [
        ("new", 50, 2.0),
        ("new", 100, 1.25),
    ]
    assert "2 at step 50, 1.25 at step 100" in figures["loss-steps"].alt


def test_a_folder_without_a_run_and_a_damaged_one_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no run in .*: it has no config\.json"):
        mealv2.open_run(tmp_path)
    path = write_run(tmp_path / "run")
    (path / "config.json").write_text("{")
    with pytest.raises(MealError, match=r"config\.json is damaged"):
        mealv2.open_run(path)


def test_names_are_text_in_a_notebook(tmp_path: Path) -> None:
    run = mealv2.open_run(write_run(tmp_path / "<b>run", model="<script>"))
    assert "<script>" not in run._repr_html_()
    assert "&lt;b&gt;run: &lt;script&gt;" in run._repr_html_()


def test_runs_that_differ_in_the_seed_are_one_method(tmp_path: Path) -> None:
    paths = [
        write_run(
            tmp_path / f"seed-{seed}/{name}",
            seed=seed,
            settings={"lr": lr, "initial_checkpoint": f"/a/seed-{seed}/start"},
        )
        for name, lr in (("soft", 0.1), ("hard", 0.2))
        for seed in (3, 1)
    ]
    soft, hard = methods_of([mealv2.open_run(path) for path in paths])
    assert [(m.name, [run.seed for run in m.runs]) for m in (soft, hard)] == [
        ("soft", [1, 3]),
        ("hard", [1, 3]),
    ]
    assert differing_settings([soft, hard]) == {"lr": [0.1, 0.2]}
    found = comparison_of(soft, hard, "top1")
    assert found is not None
    assert (found.seeds, found.differences, found.p) == ((1, 3), (0.0, 0.0), None)


def test_a_method_of_runs_beside_each_other_is_named_by_what_they_share(tmp_path: Path) -> None:
    paths = [write_run(tmp_path / f"resnet-seed{seed}", seed=seed) for seed in (1, 2)]
    (method,) = methods_of([mealv2.open_run(path) for path in paths])
    assert method.name == "resnet"


def test_an_interval_of_percentages_ends_at_0_and_100() -> None:
    row = Entry("x", "last", "x", {"top5": [99.0, 100.0], "ece": [0.5, 1.5], "kl": [0.1, 0.3]})
    top5, ece, kl = (row.interval(name) for name in ("top5", "ece", "kl"))
    assert top5 is not None
    assert (round(top5[0]), top5[1]) == (93, 100.0)
    assert row.half_width("top5") == pytest.approx(12.706 / 2, abs=1e-3)
    assert ece is not None
    assert (ece[0], round(ece[1], 1)) == (0.0, 7.4)
    assert kl is not None
    assert kl[0] < 0 < kl[1] < 2, "nats are no percentage"


def test_gaps_are_to_the_teachers_that_a_run_logged(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run", top1=70.0)
    of_teacher, of_ensemble = {"top1": 75.0, "top5": 96.0}, {"top1": 76.5, "top5": 97.0}
    known = {"teacher test_vit": of_teacher, "ensemble": of_ensemble}
    log(path, event="teachers", step=0, accuracies=known)
    runs = [mealv2.open_run(path)]
    rows = table_rows(methods_of(runs), source=label_source(None, runs))
    assert [row.name for row in rows][-2:] == ["teacher test_vit", "ensemble"]
    assert rows[-2].values["parameters"] == rows[-1].values["parameters"]
    gaps = {gap.teacher: gap.difference for gap in gaps_of(rows)}
    assert gaps["teacher test_vit"]["top1"] == pytest.approx(-5.0)
    assert gaps["ensemble"] == pytest.approx({"top1": -6.5, "top5": -2.0})


def test_curves_that_an_old_run_did_not_log_are_named(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run")
    assert missing_curves(methods_of([mealv2.open_run(path)])) == []
    table = path / "summary.csv"
    table.write_text(table.read_text().replace("train_top1", "train_other"))
    missing = missing_curves(methods_of([mealv2.open_run(path)]))
    assert missing == ["Top-1 accuracy in training"]


def test_plateaus_are_those_of_the_discriminator(tmp_path: Path) -> None:
    runs = [mealv2.open_run(write_run(tmp_path / "run"))]
    (curve,) = [curve for curve in CURVES if curve.name == "discriminator-loss"]
    assert levels_of(curve, methods_of(runs)) == pytest.approx(
        {"dead": math.log(2), "half dead": 0.75 * math.log(2), "floor": 0.5 * math.log(2)}
    )


def test_a_figure_is_svg_pdf_and_csv_and_inline_it_has_no_colour_of_its_own() -> None:
    canvas, (axes,) = new_figure()
    with drawing():
        axes.plot([0, 1], [0, 1], color="#0072b2")
        axes.set_title("<i>$x$ 漢")
    figure = Figure("one", "title", 'alt "x"', canvas, [{"x": 0, "y": 0}, {"x": 1, "z": 2}])
    assert figure.csv() == "x,y,z\n0,0,\n1,,2\n"
    assert figure.pdf().startswith(b"%PDF")
    assert "#0072b2" in figure.svg()
    inline = figure.inline_svg()
    assert "#0072b2" not in inline
    assert "var(--series-0)" in inline
    assert "&lt;i&gt;$x$ 漢" in inline
    assert 'role="img" aria-label="alt &quot;x&quot;"' in inline
    assert "<style" not in inline
