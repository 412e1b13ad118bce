"""benchmarks/transfer.py: what the backbones differ in, and a short run on drawn images."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from timm.data.imagenet_info import ImageNetInfo

from benchmarks import transfer
from benchmarks.distillation import Bench
from benchmarks.experiments import differences, distinct, needed
from benchmarks.subsets import Part
from benchmarks.tiny_imagenet import TEACHERS
from pipeline.config import DistillConfig, FinetuneConfig

NAMES = tuple(ImageNetInfo("imagenet-1k").label_names())
MADE = transfer.backbones(
    Bench(Path("out"), transfer.SETTING, Path("classes.txt")),
    TEACHERS,
    base_epochs=14,
    num_views=2,
)
RUNS = transfer.transfers(Path("out"), {name: each[-1] for name, each in MADE.items()}, 3)


def test_base_more_has_the_start_steps_rates_and_views_of_the_distilled_one() -> None:
    base, distilled, more = (MADE[name][-1] for name in ("base", "distilled", "base-more"))
    assert isinstance(distilled, DistillConfig)
    assert isinstance(more, FinetuneConfig)
    assert distilled.initial_checkpoint == more.initial_checkpoint == base.output
    one, two, labels = distilled.as_json(), more.as_json(), MADE["distilled"][0].as_json()
    for name in ("model", "seed", "epochs", "lr", "batch_size", "weight_decay", "sched"):
        assert one[name] == two[name]
    for name in ("crop", "img_size", "num_views", "view_seed"):
        assert two[name] == labels[name]


def test_transfers_of_all_backbones_have_the_same_settings_and_come_last() -> None:
    runs = distinct([*(each for several in MADE.values() for each in several), *RUNS.values()])
    compare, fine_tune, frozen, *present = RUNS.values()
    folders = {name: Path(str(each[-1].output)) for name, each in MADE.items()}
    assert needed(compare, runs) == {folders["base"], folders["distilled"]}
    assert needed(fine_tune, runs) == needed(frozen, runs) == {folders["base-more"]}
    for each in present:
        assert needed(each, runs) == {folders["distilled-present"]}
    for other in (fine_tune, frozen, *present):
        for name in ("epochs", "batch_size", "img_size", "seeds", "sets", "weight_decay"):
            assert getattr(other, name) == getattr(compare, name)
        one = compare.cell(model="m", mode=other.mode, data_dir=Path("d"))
        assert one.lr == other.lr


def test_the_two_distilled_backbones_differ_in_their_label_set_only() -> None:
    one, two = (MADE[name][-1] for name in ("distilled", "distilled-present"))
    assert differences(one, two).keys() == {"labels"}
    assert needed(two, [Path("out/labels/present")]) == {Path("out/labels/present")}


def test_differences_are_within_a_seed() -> None:
    values = {
        ("flowers17", "frozen", "base"): {0: 50.0, 1: 60.0},
        ("flowers17", "frozen", "base-more"): {0: 40.0, 1: 41.0},
        ("flowers17", "frozen", "distilled"): {0: 51.0, 1: 63.0},
    }
    lines = {line.split("|")[1].strip(): line for line in transfer.table_6(values).splitlines()}
    # t(0.975, 1) = 12.7062, s = sqrt(2), n = 2: 12.71 around 2
    title = "Freeze backbone: distilled"
    assert "+2.00 (-10.71 to +14.71)" in lines[f"{title} minus base"]
    assert "+16.50" in lines[f"{title} minus base, as many steps more"]
    assert lines["From scratch"].split("|")[2:4] == ["  ", "  "]


@pytest.mark.slow
def test_drawn_images_give_backbones_and_the_table(
    data_dir: Path,
    make_model: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(
        transfer,
        "SETS",
        {name: {part: Part(part, 4) for part in ("train", "val")} for name in transfer.SETS},
    )
    data = Path(shutil.copytree(data_dir, tmp_path / "tiny"))
    for folder, name in zip(sorted(data.glob("*/*")), (*NAMES[:3], *NAMES[:3]), strict=True):
        folder.rename(folder.with_name(name))
    teacher = make_model("test_resnet", seed=1, classes=NAMES)
    words = [data, data_dir, data_dir, "--output", tmp_path / "out", "--seeds", 2]
    words += ["--teacher", f"test_resnet={teacher}", "--epochs", 1, "--base-epochs", 1]
    words += ["--images", 4, "--val-images", 3, "--batch-size", 12, "--img-size", 32]
    words += ["--teacher-img-size", 40, "--transfer-epochs", 1, "--transfer-batch-size", 6]
    printed = []
    for _ in range(2):
        transfer.main([os.fspath(w) if isinstance(w, Path) else str(w) for w in words])
        printed.append(capsys.readouterr())
    first, again = printed
    table = (tmp_path / "out" / "table.md").read_text()
    assert first.out.endswith(f"{table}\n")
    assert again.out == f"{table}\n"
    assert "runs left" in first.err
    assert "runs left" not in again.err
    lines = [line.split("|")[1:-1] for line in table.splitlines()]
    assert len(lines) == 2 + 9 + 8
    assert all(cell.strip() for line in lines for cell in line)
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert set(results["values"]["cifar10 frozen base-more"]) == {"0", "1"}
    assert results["backbones"]["distilled"]["steps"] == results["backbones"]["base-more"]["steps"]
