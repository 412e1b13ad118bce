"""`mealv2 recipes record`: a run beside the published numbers; a changed one never among them."""

import json
import os
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from conftest import ROOT, Result
from mealv2 import recipes
from pipeline.config import DistillConfig, FinetuneConfig
from pipeline.recipes import table
from pipeline.training.run_folder import SETTINGS_NAME

Run = Callable[..., Result]
STEPS = 180 * 2503  # of 1,281,167 images in batches of 512
RECORD = (  # of an earlier version, say: a list of versions
    '{"results": [{"recipe": "resnet18", "published": {"top1": 73.19, "top5": null}, "top1": 73.3,'
    '"top5": 91.0, "difference": 0.11, "epoch": 180, "best_epoch": 178, "best_top1": 73.35,'
    '"hours": 1.5, "gpu_hours": 12.0, "hardware": "8 x A100", "labels": "online", "run": "/x",'
    '"date": "2026-11-29", "differs": [], "versions": []}]}'
)
VERSIONS = {"mealv2": "1.0", "torch": "2.15.0", "timm": "1.0.31", "numpy": "2.4.6"}


def write_run(run: Path, name: str = "resnet18", **changes: Any) -> Path:
    """Write the files of a finished online run of a recipe on ImageNet, with 8 GPUs in two parts.

    ``changes`` are settings, or figures of the report.
    """
    recipe = recipes.load(name)
    settings = recipe.settings("distill", online=True) | {"data_dir": "/imagenet", "online": True}
    report: dict[str, Any] = {"num_images": 50_000, "steps": STEPS, "top1": 73.3, "top5": 91.0}
    report |= {"selected_epoch": 180, "best_epoch": 178, "best_top1": 73.35}
    settings |= {key: value for key, value in changes.items() if key not in report}
    report |= {key: value for key, value in changes.items() if key in report}
    config = DistillConfig.from_json(settings | {"recipe": name}).as_json()
    session = {"event": "session", "ranks": 8, "device": "NVIDIA A100", "precision": "bfloat16"}
    events: list[dict[str, Any]] = [
        {"time": 1000.0, "step": 0, **session, "versions": VERSIONS},
        {"time": 4600.0, "event": "epoch", "epoch": 1},
        {"time": 90_000.0, "step": 100, **session, "versions": VERSIONS},  # a day later
        {"time": 91_800.0, "event": "validation", "epoch": 180},
    ]
    run.mkdir(parents=True)
    (run / "config.json").write_text(json.dumps(config))
    (run / "report.json").write_text(json.dumps(report))
    (run / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    return run


def change(run: Path, name: str, **values: Any) -> None:
    """Change values of a JSON file of the run; None removes."""
    found = json.loads((run / name).read_text()) | values
    (run / name).write_text(json.dumps({k: v for k, v in found.items() if v is not None}))


def cells(path: Path, name: str) -> list[list[str]]:
    """Return the rows of a recipe in the tables of a file."""
    rows = [line for line in path.read_text().splitlines() if line.startswith(f"| `{name}` |")]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


def test_a_reproduction_fills_the_row_of_its_recipe(done: Run, tmp_path: Path) -> None:
    run, output = write_run(tmp_path / "run"), tmp_path / "all.json"
    report = done("recipes", "record", run, "--output", output).report
    assert report["differs"] == []
    assert (report["hours"], report["gpu_hours"]) == (1.5, 12.0), "without the day between"
    (row,) = cells(tmp_path / "all.md", "resnet18")
    versions = "mealv2 1.0, torch 2.15.0, timm 1.0.31"
    assert row == [
        *("`resnet18`", "73.19", "–", "73.30", "91.00", "+0.11", "180 (best 73.35 at 178)"),
        *("1.50", "12.00", "8 x NVIDIA A100, bfloat16", "online", versions, "1970-01-02", str(run)),
    ]
    assert cells(tmp_path / "all.md", "resnet50-224")[0][3:] == [""] * 11

    other = write_run(tmp_path / "other", "resnet50-224", top1=80.5)
    for path in (other, run, run):  # a run that is recorded again replaces its row
        done("recipes", "record", path, "--output", output)
    assert len(json.loads(output.read_text())["results"]) == 2
    assert len(cells(tmp_path / "all.md", "resnet18")) == 1
    assert cells(tmp_path / "all.md", "resnet50-224")[0][5] == "-0.17"


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"epochs": 360}, "--epochs 360 (recipe: 180)"),
        ({"model_ema": True}, "--model-ema True (recipe: False)"),
        ({"teacher": ["resnet18"]}, "--teacher ['resnet18'] (recipe: ['senet154.gluon_in1k', "),
        ({"num_images": 49_999}, "validation images 49999 (recipe: 50000)"),
        ({"steps": STEPS - 1}, f"steps {STEPS - 1} (recipe: {STEPS})"),
    ],
)
def test_a_run_that_differs_is_refused_or_recorded_apart(
    run_cli: Run, done: Run, tmp_path: Path, changes: dict[str, Any], named: str
) -> None:
    run, output = write_run(tmp_path / "run", **changes), tmp_path / "all.json"
    refused = run_cli("recipes", "record", run, "--output", output)
    assert refused.code == 2
    assert f"{run} is not a reproduction of resnet18: {named}" in refused.stderr
    assert "--variant" in refused.stderr
    assert not list(tmp_path.glob("all.*"))

    done("recipes", "record", run, "--output", output, "--variant")
    empty, row = cells(tmp_path / "all.md", "resnet18")
    assert empty[3:] == [""] * 11, "it is not in the table of reproductions"
    assert row[3] == "73.30"
    assert row[-1].startswith(named.replace("[", "\\["))


@pytest.mark.parametrize("changes", [{"seed": 7}, {"amp": True}, {"data_dir": "/elsewhere"}])
def test_seeds_paths_and_precision_are_no_difference(
    done: Run, tmp_path: Path, changes: dict[str, Any]
) -> None:
    run = write_run(tmp_path / "run", **changes)
    assert done("recipes", "record", run, "--output", tmp_path / "r.json").report["differs"] == []


def test_labels_of_other_teachers_or_of_nobody_are_a_difference(
    done: Run, labels_dir: Path, tmp_path: Path
) -> None:
    run, flags = tmp_path / "run", ["--output", tmp_path / "r.json", "--variant"]
    stored = {"labels": str(labels_dir), "online": False, "teacher": [], "img_size": None}
    write_run(run, **stored)
    sha256 = json.loads((labels_dir / "manifest.json").read_text())["plan_sha256"]
    labels = {"plan_sha256": sha256, "num_views": 4}
    change(run, "report.json", labels=labels)

    record = done("recipes", "record", run, *flags).report
    assert record["labels"] == f"4 views, {sha256[:12]}"
    teachers, pixels, views = record["differs"]
    assert teachers.startswith("teachers ['test_resnet', 'test_efficientnet'] (recipe: ['senet154")
    assert pixels == "pixels 32 (recipe: 224)"
    assert views == "views 4 (recipe: 30)"

    labels = {"plan_sha256": "0" * 64, "num_views": 60}  # of a set that is gone
    change(run, "report.json", labels=labels)
    differs = done("recipes", "record", run, *flags).report["differs"]
    assert [text.partition(" (")[0] for text in differs] == ["teachers unknown", "pixels unknown"]


def test_a_stored_cutmix_run_is_a_variant(run_cli: Run, tmp_path: Path) -> None:
    stored = {"online": False, "teacher": [], "img_size": None, "cutmix_target": "mixed-labels"}
    run = write_run(tmp_path / "run", "resnet50-cutmix", labels="/gone", **stored)
    change(run, "report.json", labels={"num_views": 30, "plan_sha256": "0" * 64})
    refused = run_cli("recipes", "record", run, "--output", tmp_path / "r.json")
    assert "--cutmix-target mixed-labels (recipe: teachers)" in refused.stderr


def test_a_real_run_keeps_what_a_row_needs(
    done: Run,
    data_dir: Path,
    teacher_flags: list[str],
    student_dir: Path,
    events: Callable[..., list[dict[str, Any]]],
    tmp_path: Path,
) -> None:
    run = tmp_path / "run"
    words = ["distill", "--recipe", "resnet18", "--online", "--data-dir", data_dir, *teacher_flags]
    words += ["--model", "test_resnet", "--initial-checkpoint", student_dir, "--img-size", 32]
    words += ["--batch-size", 12, "--workers", 0, "--output", run]
    done(*words, "--epochs", 1)
    done("distill", "--resume", run, "--epochs", 2)
    done("distill", "--resume", run)  # is finished: not a session
    first, second = events(run, "session")
    assert (first["step"], second["step"]) == (0, 3)
    assert (first["ranks"], first["device"], first["precision"]) == (1, "cpu", "float32")

    record = done("recipes", "record", run, "--output", tmp_path / "r.json", "--variant").report
    assert record["gpu_hours"] is None
    assert record["hours"] < 0.1
    assert record["hardware"] == "1 x cpu, float32"
    assert record["versions"].keys() == {"mealv2", "torch", "timm"}
    assert "--model test_resnet (recipe: resnet18.tv_in1k)" in record["differs"]
    assert "steps 6 (recipe: 450540)" in record["differs"]


def remove(name: str) -> Callable[[Path], None]:
    return lambda run: (run / name).unlink()


def changed(name: str, **values: Any) -> Callable[[Path], None]:
    return lambda run: change(run, name, **values)


def content(name: str, text: str) -> Callable[[Path], None]:
    return lambda run: (run / name).write_text(text) and None


def session(**values: Any) -> Callable[[Path], None]:
    """Change the first session."""

    def spoil(run: Path) -> None:
        first, *others = (run / "metrics.jsonl").read_text().splitlines()
        lines = [json.dumps(json.loads(first) | values), *others]
        (run / "metrics.jsonl").write_text("\n".join(lines))

    return spoil


def keep_settings_of_finetune(run: Path) -> None:
    settings = {"model": "resnet18", "data_dir": "/imagenet"}
    (run / "config.json").write_text(json.dumps(FinetuneConfig.from_json(settings).as_json()))


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (shutil.rmtree, "RUN: no file or folder at "),
        (remove("config.json"), "is not a run of `mealv2 distill`"),
        (content("config.json", "[1]"), "is not a run of `mealv2 distill` (it has no settings)"),
        (keep_settings_of_finetune, "run is a run of finetune; recipes are of distill"),
        (changed("config.json", recipe=None), "is not a run of a recipe; train with --recipe"),
        (changed("config.json", recipe=["x"]), "is not a run of `mealv2 distill`"),
        (changed("config.json", lr=10**400), "is not a run of `mealv2 distill`"),
        (remove("report.json"), "is not finished: it has no report.json; continue it with `mealv2"),
        (content("report.json", "[]"), "report.json is no JSON object"),
        (changed("report.json", top1=None), "has no accuracy: it was trained with --val-split non"),
        (content("report.json", '{"top1": null}'), "report.json has no num_images"),
        (changed("report.json", best_epoch=None), "report.json has no best_epoch"),
        (changed("report.json", top5=None), "report.json has no top5"),
        (changed("report.json", top1="abc"), "report.json: top1 cannot be 'abc'"),
        (changed("report.json", best_top1=101), "report.json: best_top1 cannot be '101'"),
        (changed("report.json", steps=1.5), "report.json: steps cannot be '1.5'"),
        (remove("metrics.jsonl"), "does not say on what the run was trained"),
        (session(time="x"), "metrics.jsonl: time cannot be 'x'"),
        (session(time=1e300), "metrics.jsonl: time cannot be '1e+300'"),
        (session(time=10**400), "metrics.jsonl: time cannot be '1000"),
        (session(ranks="8"), "metrics.jsonl: ranks cannot be '8'"),
        (session(device="\ud800"), "metrics.jsonl: device cannot be "),
        (session(versions={}), "metrics.jsonl: versions cannot be '{}'"),
    ],
)
def test_what_cannot_be_recorded_is_one_line(
    run_cli: Run, tmp_path: Path, spoil: Callable[[Path], None], named: str
) -> None:
    run = write_run(tmp_path / "run")
    spoil(run)
    result = run_cli("recipes", "record", run, "--output", tmp_path / "r.json")
    assert result.code == 2, result.stderr
    (line,) = result.stderr.splitlines()
    assert named in line
    assert not list(tmp_path.glob("r.*"))


def test_a_name_that_is_not_utf8_is_one_line(run_cli: Run, tmp_path: Path) -> None:
    run = write_run(tmp_path / os.fsdecode(b"run-\xff"))
    result = run_cli("recipes", "record", run, "--output", tmp_path / "r.json")
    assert result.code == 2, result.stderr
    (line,) = result.stderr.splitlines()
    assert "has a name that is not UTF-8" in line


def test_settings_that_are_not_those_of_the_checkpoint_are_refused(
    run_cli: Run, done: Run, tmp_path: Path
) -> None:
    run = write_run(tmp_path / "run")
    settings = json.loads((run / "config.json").read_text())
    path = run / "checkpoints" / "step-00450540.pt"
    path.parent.mkdir()
    for epochs, said in ((180, None), (10, "--epochs is 180 in ")):
        with zipfile.ZipFile(path, "w") as archive:
            kept = settings | {"epochs": epochs, "output": "/elsewhere", "workers": 3}
            archive.writestr(SETTINGS_NAME, json.dumps(kept))
        result = run_cli("recipes", "record", run, "--output", tmp_path / "r.json")
        assert result.code == (2 if said else 0), result.stderr
        if said:
            assert said in result.stderr
            assert "but 10 in the checkpoint: restore config.json" in result.stderr


def test_another_file_beside_the_results_is_kept(run_cli: Run, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    (tmp_path / "README.md").write_text("# My project\n")
    result = run_cli("recipes", "record", run, "--output", tmp_path / "README.json")
    assert result.code == 2
    assert "README.md is another file, not a table of results" in result.stderr
    assert (tmp_path / "README.md").read_text() == "# My project\n"
    assert not (tmp_path / "README.json").exists()


def test_a_run_has_one_row_by_any_name(done: Run, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    (tmp_path / "link").symlink_to(run)
    (tmp_path / "a").mkdir()
    for path in (run, tmp_path / "link", tmp_path / "a" / ".." / "run"):
        done("recipes", "record", path, "--output", tmp_path / "r.json")
    (record,) = json.loads((tmp_path / "r.json").read_text())["results"]
    assert record["run"] == str(run)


def test_stored_labels_have_a_table_of_their_own(done: Run, tmp_path: Path) -> None:
    run, output = write_run(tmp_path / "run"), tmp_path / "r.json"
    record = done("recipes", "record", run, "--output", output).report
    stored = record | {"labels": "30 views, 0123456789ab", "run": "/stored", "top1": 72.0}
    text = table.document([record, stored])
    first, second = text.split("## From stored labels")
    assert ("73.30" in first, "72.00" in first) == (True, False)
    assert ("73.30" in second, "72.00" in second) == (False, True)
    assert "## Variants" not in text
    (tmp_path / "stored.md").write_text(table.document([stored]))
    empty, row = cells(tmp_path / "stored.md", "resnet18")
    assert empty[3:] == [""] * 11
    assert row[10] == "30 views, 0123456789ab"


def test_a_cell_shows_text_as_it_is(done: Run, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    session(device="<b>`[x](y)|", versions=VERSIONS)(run)
    change_all = (run / "metrics.jsonl").read_text().replace('"1.0"', '"1|0"')
    (run / "metrics.jsonl").write_text(change_all)
    done("recipes", "record", run, "--output", tmp_path / "r.json")
    text = (tmp_path / "r.md").read_text()
    assert r"8 x \<b>\`\[x](y)\|, bfloat16" in text
    assert r"mealv2 1\|0, torch" in text


@pytest.mark.parametrize(
    "content",
    ["{", "[]", '{"results": [{"run": "x"}]}', '{"results": 1}', '{"results": ["x"]}', RECORD],
)
def test_a_damaged_file_of_results_is_kept(run_cli: Run, tmp_path: Path, content: str) -> None:
    run, output = write_run(tmp_path / "run"), tmp_path / "r.json"
    output.write_text(content)
    result = run_cli("recipes", "record", run, "--output", output)
    assert result.code == 2
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"mealv2: cannot read results from {output}: ")
    assert output.read_text() == content


def test_results_are_json_beside_their_table(run_cli: Run, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    result = run_cli("recipes", "record", run, "--output", tmp_path / "r.md")
    assert result.code == 2
    assert "--output must end in .json" in result.stderr


def test_the_document_has_the_table_that_record_writes() -> None:
    text = (ROOT / "docs" / "how-to" / "reproduce.md").read_text(encoding="utf-8")
    assert text.endswith(f"\n\n{table.reproductions([])}")
