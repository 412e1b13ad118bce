"""mealv2 labels verify: what is whole passes, what is not is named, with its images."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import stored
from conftest import Result
from mealv2 import view_boxes
from mealv2.errors import LabelSetError
from mealv2.label_set import LabelSet
from pipeline.config import LabelsVerifyConfig
from pipeline.label_sets.relabel import MAX_EXTRA_KL, MIN_TOP1_AGREEMENT, check_verdict, relabel
from pipeline.runtime.device import Runtime

Run = Callable[..., Result]
Make = Callable[..., Path]
Copy = Callable[[Path], Path]
GOLDEN = Path(__file__).parents[2] / "golden" / "label_set_v1"

FORMS = [
    (),
    ("--rate", 0.1),
    ("--topk", 2),
    ("--topk", 2, "--label-dtype", "float16"),
    ("--topk", 1, "--label-dtype", "float32", "--store-logits"),
    ("--topk", "all"),
    ("--topk", "all", "--label-dtype", "float32"),
    ("--store-logits",),
]


def test_whole_sets_of_every_form_pass(done: Run, make_set: Make) -> None:
    for flags in FORMS:
        result = done("labels", "verify", make_set(*flags))
        assert {name: result.report[name] for name in ("sha256", "crc32", "boxes")} == {
            "sha256": "right",
            "crc32": "right",
            "boxes": "right",
        }
        assert (result.report["images"], result.report["views"]) == (36 + 15, 36 * 4 + 15)
        num_shards = len(list(Path(result.report["labels"]).glob("*.h5")))
        assert result.report["files"] == num_shards + 1  # and plan.json
        assert "every byte is right" in result.stderr


def test_appended_rows_are_verified_too(
    done: Run, run_cli: Run, appended_set: Path, flipped_bit: Callable[..., None]
) -> None:
    report = done("labels", "verify", appended_set).report
    assert (report["images"], report["views"]) == (36 + 15 + 1, 36 * 4 + 15 + 3)
    (path,) = appended_set.glob("train-more-*.h5")
    flipped_bit(path, LabelSet.open(appended_set).appended_files[0]._columns["labels"][0])
    result = run_cli("labels", "verify", appended_set)
    assert result.code == 3
    assert path.name in result.stderr
    assert "remove" in result.stderr.splitlines()[-1]


# --- damage -------------------------------------------------------------------------------------


def _labels_at(folder: Path, name: str) -> int:
    file = next(f for _, fs in LabelSet.open(folder).blocks for f in fs if f.path.name == name)
    return int(file._columns["labels"][0])


def test_a_flipped_bit_in_the_labels_is_named_with_its_images_and_made_again(
    done: Run,
    run_cli: Run,
    make_set: Make,
    copied: Copy,
    label: Callable[..., list[object]],
    flipped_bit: Callable[..., None],
) -> None:
    folder = copied(make_set("--topk", 2))
    whole = stored.files_of(folder)
    flipped_bit(folder / "train-00001.h5", _labels_at(folder, "train-00001.h5"))
    first = list(LabelSet.open(folder).keys())[10]

    result = run_cli("labels", "verify", folder)
    assert result.code == 3
    assert f"train-00001.h5: has another SHA-256 (the labels of 1 image: {first})" in (
        result.stderr
    )
    line = result.stderr.splitlines()[-1]
    assert "1 of 7 files" in line
    assert "`mealv2 precompute`" in line
    assert result.stdout == ""

    done(*label("--topk", 2), "--output", folder)
    done("labels", "verify", folder)
    assert {n: digest for n, (digest, _) in stored.files_of(folder).items()} == {
        n: digest for n, (digest, _) in whole.items()
    }


def test_every_kind_of_damage_is_listed_in_one_go(
    run_cli: Run, make_set: Make, copied: Copy, flipped_bit: Callable[..., None]
) -> None:
    folder = copied(make_set("--topk", 2))
    flipped_bit(folder / "train-00000.h5", 20)  # the head
    data = (folder / "train-00001.h5").read_bytes()
    (folder / "train-00001.h5").write_bytes(data[:-1])
    (folder / "train-00002.h5").unlink()
    (folder / "plan.json").write_text("{")
    result = run_cli("labels", "verify", folder)
    assert result.code == 3
    said = dict(line.split(": ", 1) for line in result.stderr.splitlines()[:-1])
    assert "its head fails its SHA-256" in said["train-00000.h5"]
    assert said["train-00001.h5"] == f"has {len(data) - 1} bytes, not {len(data)}"
    assert said["train-00002.h5"] == "cannot be read: No such file or directory"
    assert said["plan.json"] == "differs from the plan in the manifest"
    assert (
        "4 of 7 files damaged or missing (plan.json, train-00000.h5, train-00001.h5, …)"
        in (result.stderr.splitlines()[-1])
    )


def test_swapped_shards_are_both_named(run_cli: Run, make_set: Make, copied: Copy) -> None:
    folder = copied(make_set("--topk", "all"))
    one, other = folder / "train-00000.h5", folder / "train-00001.h5"
    data = one.read_bytes(), other.read_bytes()
    one.write_bytes(data[1])
    other.write_bytes(data[0])
    result = run_cli("labels", "verify", folder)
    assert result.code == 3
    assert "train-00000.h5" in result.stderr.splitlines()[-1]
    assert "train-00001.h5" in result.stderr.splitlines()[-1]


def test_another_plan_beside_the_manifest_is_named(
    run_cli: Run, make_set: Make, copied: Copy
) -> None:
    folder = copied(make_set("--topk", 2))
    shutil.copy(make_set("--topk", "all") / "plan.json", folder / "plan.json")
    result = run_cli("labels", "verify", folder)
    assert result.code == 3
    assert "plan.json: differs from the plan in the manifest" in result.stderr


# --- boxes --------------------------------------------------------------------------------------


def test_views_of_another_seed_under_right_hashes_are_found(
    run_cli: Run, make_set: Make, copied: Copy
) -> None:
    folder = copied(make_set("--topk", 2))

    def change(plan: dict[str, Any], splits: dict[str, Any]) -> None:
        plan["roles"]["train"]["views"]["seed"] = 8

    stored.signed_again(folder, change)
    result = run_cli("labels", "verify", folder)
    assert result.code == 3
    for number in range(4):
        assert (
            f"train-{number:05d}.h5: the drawn boxes differ from the boxes that were labelled"
            in (result.stderr)
        )


def test_arithmetic_that_cuts_other_boxes_is_found(
    run_cli: Run, make_set: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(view_boxes, "_exp", lambda x: np.exp(x) * 1.01)
    result = run_cli("labels", "verify", make_set("--topk", 2))
    assert result.code == 3
    assert "drawn boxes differ from the boxes that were labelled" in result.stderr


# --- data ---------------------------------------------------------------------------------------


def test_the_data_it_was_made_from_passes(done: Run, make_set: Make, data_dir: Path) -> None:
    result = done("labels", "verify", make_set("--topk", 2), "--data-dir", data_dir)
    assert result.report["data"] == "the same"


@pytest.mark.parametrize(
    ("name", "content", "named"),
    [
        ("train/ants/00.jpg", b"other", "the same names, but other files"),
        ("train/ants/new.png", b"new", "images without labels: 1 (ants/new.png)"),
        ("train/ants/00.jpg", None, "missing images with labels: 1 (ants/00.jpg)"),
        ("val/bees/01.jpg", None, "missing images with labels: 1 (bees/01.jpg)"),
    ],
)
def test_other_data_is_found(
    run_cli: Run, make_set: Make, own_data: Path, name: str, content: bytes | None, named: str
) -> None:
    if content is None:
        (own_data / name).unlink()
    else:
        (own_data / name).write_bytes(content)
    result = run_cli("labels", "verify", make_set("--topk", 2), "--data-dir", own_data)
    assert result.code == 3
    assert named in result.stderr
    assert "--missing" not in result.stderr  # which is another command's


# --- the teachers, again ------------------------------------------------------------------------


@pytest.mark.parametrize("flags", [("--topk", 2), ("--rate", 0.1)])
def test_the_same_teachers_give_the_same_labels_again(
    done: Run, make_set: Make, data_dir: Path, teach_flags: list[object], flags: tuple[object, ...]
) -> None:
    words = ["labels", "verify", make_set(*flags), "--data-dir", data_dir, *teach_flags]
    again = done(*words, "--relabel", 60, "--batch-size", 16).report["relabelled"]
    assert (again["views"], again["identical"], again["top1_agreement"]) == (60, 1.0, 100.0)
    assert again["kl"] == again["kl_of_encoding"] > 1e-4


def test_every_view_can_be_asked_again_and_the_kl_is_the_encodings_loss(
    done: Run, make_set: Make, data_dir: Path, teach_flags: list[object]
) -> None:
    flags = ["--data-dir", data_dir, "--relabel", 9999, *teach_flags]
    again = done("labels", "verify", make_set("--topk", 1), *flags).report["relabelled"]
    true = stored.dense_of(make_set("--topk", "all", "--label-dtype", "float32"))
    kept = stored.dense_of(make_set("--topk", 1))
    losses = [
        float((p * (np.log(p) - np.log(kept[place].astype(float)))).sum())
        for place, p in ((place, row.astype(float)) for place, row in true.items())
    ]
    assert again["views"] == len(losses) == 144
    assert again["kl_of_encoding"] == pytest.approx(np.mean(losses), rel=1e-4)


def test_labels_that_are_not_the_teachers_are_noticed(
    make_set: Make,
    copied: Copy,
    data_dir: Path,
    teach_flags: list[object],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A set whose hashes are all right, and whose labels belong to other views."""
    folder = copied(make_set("--topk", 2, "--view-seed", 8))

    def change(plan: dict[str, Any], splits: dict[str, Any]) -> None:
        plan["roles"]["train"]["views"]["seed"] = 7

    stored.signed_again(folder, change)
    teachers = tuple(str(flag) for flag in teach_flags[1:4:2])
    config = LabelsVerifyConfig(
        labels=folder, data_dir=data_dir, relabel=60, teacher=teachers, workers=0
    )
    monkeypatch.setattr("pipeline.label_sets.relabel.check_verdict", lambda *_: None)
    found = relabel(config, folder, Runtime(torch.device("cpu"), None))
    assert found["identical"] < 0.3
    assert found["kl"] > 5 * found["kl_of_encoding"]
    print(found)


@pytest.mark.parametrize(
    ("extra_kl", "agreement", "is_right"),
    [
        (0.0, 100.0, True),
        (0.99 * MAX_EXTRA_KL, 100.0, True),
        (1.01 * MAX_EXTRA_KL, 100.0, False),
        (0.0, MIN_TOP1_AGREEMENT, True),
        (0.0, MIN_TOP1_AGREEMENT - 0.4, True),  # by chance
        (0.0, MIN_TOP1_AGREEMENT - 1.0, False),
        (float("nan"), 100.0, False),
    ],
)
def test_other_labels_than_the_bounds_allow_are_an_error(
    make_set: Make, extra_kl: float, agreement: float, is_right: bool
) -> None:
    found = {"kl": 0.1 + extra_kl, "kl_of_encoding": 0.1, "top1_agreement": agreement}
    labels = LabelSet.open(make_set("--topk", 2))
    if is_right:
        check_verdict({**found, "images": 10_000}, labels)
        return
    with pytest.raises(LabelSetError, match="these teachers give other labels"):
        check_verdict({**found, "images": 10_000}, labels)


def test_the_choice_of_views_is_the_seeds(
    done: Run, make_set: Make, data_dir: Path, teach_flags: list[object]
) -> None:
    words = ["labels", "verify", make_set("--topk", 2), "--data-dir", data_dir, *teach_flags]
    found = [
        done(*words, "--relabel", 10, "--seed", seed).report["relabelled"]["kl"]
        for seed in (3, 3, 4)
    ]
    assert found[0] == found[1] != found[2]


def test_other_weights_are_refused(
    run_cli: Run, make_set: Make, make_model: Callable[..., Path], data_dir: Path
) -> None:
    teachers = f"test_resnet={make_model('test_resnet', seed=5)},test_efficientnet"
    teachers += f"={make_model('test_efficientnet', seed=6)}"
    words = ["labels", "verify", make_set("--topk", 2), "--data-dir", data_dir, "--relabel", 5]
    result = run_cli(*words, "--teacher", teachers, "--workers", 0)
    assert result.code == 3
    assert "other weights or normalisation" in result.stderr


def test_another_precision_is_refused_with_the_flags_to_give(
    run_cli: Run, make_set: Make, data_dir: Path, teach_flags: list[object]
) -> None:
    words = ["labels", "verify", make_set("--topk", 2), "--data-dir", data_dir, "--relabel", 5]
    result = run_cli(*words, *teach_flags, "--amp")
    assert result.code == 2
    assert "was computed in float32, this run computes in bfloat16; use --amp" in result.stderr


def test_an_image_that_was_damaged_since_is_named_also_by_quick(
    run_cli: Run, make_set: Make, own_data: Path, teach_flags: list[object]
) -> None:
    path = own_data / "train" / "ants" / "02.png"
    path.write_bytes(bytes(path.stat().st_size))  # as long as it was
    words = ["labels", "verify", make_set("--topk", 2), "--data-dir", own_data, "--relabel", 999]
    for flags in ((), ("--quick",)):  # --relabel compares the images that it reads
        result = run_cli(*words, *teach_flags, *flags)
        assert result.code == 3
        assert "ants/02.png" in result.stderr
    words += ["--quick", "--on-bad-image", "skip"]
    found = run_cli(*words, *teach_flags).report["relabelled"]
    assert (found["views"], found["identical"]) == (35 * 4, 1.0)


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--relabel", 5], "--relabel needs --data-dir"),
        (["--relabel", -1], "--relabel must be at least 0"),
        (["--seed", 5], "--seed has no effect without --relabel"),
        (["--teacher", "test_resnet"], "--teacher has no effect without --relabel"),
        (["--amp"], "--amp has no effect without --relabel"),
        (["--on-bad-image", "skip"], "--on-bad-image has no effect without --relabel"),
    ],
)
def test_flags_that_do_not_fit_are_named(
    run_cli: Run, make_set: Make, flags: list[object], named: str
) -> None:
    result = run_cli("labels", "verify", make_set("--topk", 2), *flags)
    assert result.code == 2
    assert named in result.stderr


def test_the_manifest_itself_is_verified(
    run_cli: Run, make_set: Make, copied: Copy, data_dir: Path
) -> None:
    folder = copied(make_set("--topk", 2))
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["roles"]["train"]["num_images"] = 35
    (folder / "manifest.json").write_text(json.dumps(manifest, sort_keys=True, indent=2) + "\n")
    result = run_cli("labels", "verify", folder)
    assert result.code == 3
    assert "manifest.json is damaged" in result.stderr
