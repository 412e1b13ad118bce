"""Commands in the section on how runs were made: as typed, of the label set, against a recipe."""

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from written_runs import write_run

from mealv2 import recipes
from mealv2.label_set.manifest import read_manifest
from mealv2.report.run import open_run
from mealv2.report.teachers import label_source
from mealv2.storage.urls import word_without_secrets
from pipeline.report.commands import labelling_command, recipe_differences, typed_commands

Cli = Callable[..., Any]


def test_a_run_keeps_the_commands_that_started_and_resumed_it(
    done: Cli, finetune_flags: list[str], tmp_path: Path
) -> None:
    run = tmp_path / "my run"
    words = [*finetune_flags, "--epochs", "1", "--val-split", "none", "--output", str(run)]
    done(*words)
    done("finetune", "--resume", run, "--epochs", 2)
    first, second = typed_commands(open_run(run))
    assert shlex.split(first) == ["mealv2", *words]
    assert second == f"mealv2 finetune --resume '{run}' --epochs 2"


@pytest.mark.parametrize(
    ("word", "kept"),
    [
        ("--lr=0.1", "--lr=0.1"),
        ("https://user:pa55@host/a.tar", "https://host/a.tar"),
        ("--data-dir=https://user:pa55@host/a?sig=pa55", "--data-dir=https://host/a"),
        ("a=https://u:pa55@h/x,b=https://u:pa55@h/y", "a=https://h/x,b=https://h/y"),
        ("https://a/x?sig=pa55,https://b/y?sig=pa55", "https://a/x,https://b/y"),
        ("https://a/x?url=https://b/y&sig=pa55", "https://a/x"),
        ("https://a/x?n=1,https://b/y&sig=pa55", "https://a/x?n=1,https://b/y&sig=…"),
        ("https://a/x?versionId=3#token=pa55", "https://a/x?versionId=3#token=…"),
        ("https://a/x?n=1&sig=$SIG", "https://a/x?n=1&sig=$SIG"),
        ("pipe:curl -u me:pa55 https://h/a?X-Amz-Signature=pa55", "pipe:curl -u … https://h/a"),
        ("pipe:curl -u $ME https://h/a", "pipe:curl -u $ME https://h/a"),
    ],
)
def test_a_word_of_a_command_line_loses_its_secrets(word: str, kept: str) -> None:
    assert word_without_secrets(word) == kept


@pytest.mark.parametrize(
    "flags",
    [
        ["--rate", 0.02, "--store-logits", "--scale", 0.2, 0.9, "--vflip", 0.5, "--exact-pil"],
        ["--topk", "all", "--crop", "pad", "--padding", 2, "--val-split", "none"],
    ],
)
def test_the_command_of_a_label_set_makes_the_same_plan(
    flags: list[object],
    done: Cli,
    plain_precompute_flags: list[str],
    teacher_dirs: dict[str, Path],
    data_dir: Path,
    tmp_path: Path,
) -> None:
    first, again = tmp_path / "first", tmp_path / "again"
    done(*plain_precompute_flags, "--num-views", 2, *flags, "--output", first)
    source = label_source(first)
    assert source is not None
    command = labelling_command(source)
    assert command is not None
    places = {"DATA": str(data_dir), "LABELS": str(again)}
    places |= {name: f"{name}={path}" for name, path in teacher_dirs.items()}
    words = [places.get(word, word) for word in shlex.split(command)[1:]]
    done(*words, "--workers", 0)
    assert read_manifest(again)["plan_sha256"] == read_manifest(first)["plan_sha256"]


def test_settings_that_differ_from_the_recipe_are_named(tmp_path: Path) -> None:
    recipe = recipes.load("resnet18")
    settings = json.loads(json.dumps(recipe.settings("distill")))
    settings |= {"recipe": "resnet18", "labels": "/labels"}
    run = write_run(tmp_path / "same", settings=settings, planned=settings.get("epochs", 180))
    assert recipe_differences(open_run(run)) == []
    settings |= {"weight_decay": 0.5}
    run = write_run(tmp_path / "other", settings=settings)
    (found,) = recipe_differences(open_run(run)) or []
    assert (found[0], found[2]) == ("--weight-decay", "0.5")
    assert recipe_differences(open_run(write_run(tmp_path / "none"))) is None


def test_the_page_has_the_commands(tmp_path: Path, done: Cli) -> None:
    run = write_run(tmp_path / "run", settings={"recipe": "resnet18", "weight_decay": 0.5})
    log = run / "metrics.jsonl"
    first, *rest = log.read_text().splitlines()
    event = {**json.loads(first), "command": "mealv2 distill --data-dir '<b>x'"}
    log.write_text("\n".join([json.dumps(event), *rest]) + "\n")
    done("report", run, "--output", tmp_path / "report")
    text = (tmp_path / "report/index.html").read_text()
    assert "The command as typed" in text
    assert "mealv2 distill --data-dir &#39;&lt;b&gt;x&#39;" in text
    assert "Differences from the recipe" in text
