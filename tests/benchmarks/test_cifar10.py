"""benchmarks/cifar10.py: what rows differ in, and a short run on drawn pictures."""

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks import cifar10
from benchmarks.distillation import Bench
from benchmarks.experiments import differences, distinct
from pipeline.config.meal import MealConfig

BENCH = Bench(Path("out"), cifar10.SETTING)
ROWS = {row.name: row for row in cifar10.rows(BENCH)}

# What differs between the run of a row and that of the row it is compared with.
HARD = {
    *("labels", "crop", "img_size", "num_views", "train_split", "view_seed", "smoothing"),
    *("discriminator", "discriminator_weight", "label_temperature", "student_temperature"),
    *("hard_label_weight", "missing", "online", "write_back", "check_images", "dry_run"),
    *("exact_pil", "extra_data", "teacher", "cutmix_target", "mixup_target"),
    *(field.name for field in dataclasses.fields(MealConfig)),
}
MODEL = {"model", "model_kwargs", "initial_checkpoint"}
MEAL = {"labels", "online", "teacher", "img_size", "crop", "method", "discriminator"}
OF = {
    "hard": HARD,
    "meal-one": MEAL,
    "meal": MEAL,
    "meal-d-off": MEAL,
    "meal-blocks": MEAL | {"out_layer", "out_dims", "pool"},
    "d-off": {"discriminator"},
    "weight-decay": {"weight_decay"},
    "teacher-0": {"labels"},
    "teacher-1": {"labels"},
    "weak": {"labels"},
    "random": {"initial_checkpoint", "pretrained"},
    "views-1": {"labels"},
    "views-3": {"labels"},
    "views-6": {"labels"},
    **{f"rate-{rate:g}": {"labels"} for rate in cifar10.RATES},
    "mean-logits": {"labels"},
    "top-1": {"labels"},
    "top-3": {"labels"},
    "online": {"labels", "online", "teacher", "img_size", "crop"},
    "d-lr": {"discriminator_lr"},
    "d-official": {"discriminator"},
    "d-adversarial": {"discriminator"},
    "cutmix": {"cutmix", "cutmix_target"},
    "cutmix-teachers": {
        *("labels", "online", "teacher", "img_size", "crop", "cutmix", "cutmix_target")
    },
    "hard-weight-decay": {"weight_decay"},
    "start-all": {"initial_checkpoint"},
    "random-extra": {"initial_checkpoint"},
    "random-twice": {"initial_checkpoint", "pretrained", "epochs", "val_interval"},
    "hard-thrice": HARD - {"num_views"} | {"epochs", "val_interval"},
    "boxes": {"labels"},
    "hard-boxes": HARD,
    "larger": {"labels", "initial_checkpoint"},
    "hard-larger": HARD,
    **{f"soft-{name}": MODEL for name in ("small", "big", "large")},
    **{f"hard-{name}": HARD for name in ("small", "big", "large")},
}


@pytest.mark.parametrize("name", OF)
def test_a_row_differs_from_its_reference_in_what_its_title_says(name: str) -> None:
    row = ROWS[name]
    found = differences(row.result(1), ROWS[row.reference].result(1))
    allowed = OF[name]
    assert found.keys() <= allowed
    assert allowed is HARD or found.keys() >= allowed - HARD - {"model_kwargs"}
    assert found


def test_every_row_is_compared_but_the_reference() -> None:
    assert ROWS.keys() - {"soft"} == OF.keys()
    assert len([row for row in ROWS.values() if row.is_quick]) == 8


@pytest.mark.parametrize("seed", [0, 1])
def test_rows_share_starts_teachers_and_labels(seed: int) -> None:
    runs = distinct(config for row in ROWS.values() for config in row.runs(seed))
    starts = {path.relative_to("out") for path in runs if "starts" in path.parts}
    names = ("hard", "teacher-images", "larger", "small", "big", "large")
    assert starts == {Path("starts", name, f"seed-{seed}") for name in names}
    hard, soft = ROWS["hard"].result(seed), ROWS["soft"].result(seed)
    assert (
        hard.initial_checkpoint == soft.initial_checkpoint == Path(f"out/starts/hard/seed-{seed}")
    )
    assert hard.seed == soft.seed == seed


def test_hard_labels_see_the_views_of_the_label_set() -> None:
    hard, labels = ROWS["hard"].result(0), runs_of("soft")["of-resnet18-small"]
    assert hard.num_views == labels["num_views"] == hard.epochs
    for name in ("crop", "hflip", "padding", "img_size", "view_seed", "data_dir", "train_split"):
        assert hard.as_json()[name] == labels[name]


def test_label_sets_differ_in_what_the_row_is_about() -> None:
    alone = runs_of("soft")["of-resnet18-small"]
    few, boxes = runs_of("views-3")["views-3"], runs_of("boxes")["boxes"]
    for other, names in ((few, {"num_views"}), (boxes, {"crop"})):
        apart = {name for name, value in alone.items() if other[name] != value}
        assert apart == names | {"output", "teacher"}  # all teachers at once


def runs_of(name: str) -> dict[str, dict[str, object]]:
    """The settings of the label sets of a row, by folder."""
    runs = distinct(ROWS[name].runs(0))
    return {path.name: each.as_json() for path, each in runs.items() if "labels" in path.parts}


@pytest.mark.slow
def test_two_rows_of_drawn_pictures_give_a_table_and_are_kept(
    data_dir: Path,
    make_model: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    data = tmp_path / "cifar10"
    data.mkdir()
    (data / "train").symlink_to(data_dir / "train")
    (data / "test").symlink_to(data_dir / "val")
    sizes = {"--images": 4, "--teacher-images": 8, "--val-images": 3, "--batch-size": 12}
    short = {"--epochs": 2, "--teacher-epochs": 1, "--teacher-img-size": 40, "--seeds": 1}
    words = [data, "--output", tmp_path / "out", "--rows", "hard"]
    for name in ("test_efficientnet", "test_resnet"):
        words += ["--teacher", f"{name}={make_model(name, steps=8)}"]
    words += [word for flag in (sizes | short).items() for word in flag]
    printed = []
    for _ in range(2):
        cifar10.main([os.fspath(word) if isinstance(word, Path) else str(word) for word in words])
        printed.append(capsys.readouterr())
    assert printed[0].out == printed[1].out
    assert "runs left" in printed[0].err
    assert "runs left" not in printed[1].err
    lines = printed[0].out.splitlines()
    titles = [line.split(" | ")[0] for line in lines if line]
    assert titles[2:] == ["| soft labels, stored", "| hard labels"]
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    found = results["rows"]["hard"]
    report = json.loads((tmp_path / "out" / "rows" / "hard" / "seed-0.json").read_text())["report"]
    assert found["values"] == {"0": report["top1"]}
    assert report["epochs"] == 2
