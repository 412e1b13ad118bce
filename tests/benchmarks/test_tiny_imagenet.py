"""benchmarks/tiny_imagenet.py: what rows differ in, and a short run on drawn pictures."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from timm.data.imagenet_info import ImageNetInfo

from benchmarks import tiny_imagenet
from benchmarks.distillation import Bench
from benchmarks.experiments import differences

NAMES = tuple(ImageNetInfo("imagenet-1k").label_names())


def test_students_differ_in_their_label_set_only() -> None:
    bench = Bench(Path("out"), tiny_imagenet.SETTING, Path("classes.txt"))
    dense, *others, hard = tiny_imagenet.Rates(bench, tiny_imagenet.TEACHERS, 4).rows()
    assert [row.name for row in others] == list(tiny_imagenet.SETS)
    for row in others:
        assert differences(row.result(2), dense.result(2)).keys() == {"labels"}
    same = ("seed", "initial_checkpoint", "epochs", "lr", "batch_size", "weight_decay", "class_map")
    one, two = hard.result(2).as_json(), dense.result(2).as_json()
    assert {name: one[name] for name in same} == {name: two[name] for name in same}
    labels = dense.runs(2)[0].as_json()
    for name in ("crop", "img_size", "num_views", "view_seed"):
        assert one[name] == labels[name]


@pytest.mark.slow
def test_drawn_pictures_give_the_tables_of_labels_and_students(
    data_dir: Path,
    make_model: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    data = Path(shutil.copytree(data_dir, tmp_path / "tiny"))
    for folder, name in zip(sorted(data.glob("*/*")), (*NAMES[:3], *NAMES[:3]), strict=True):
        folder.rename(folder.with_name(name))
    teacher = make_model("test_resnet", seed=1, classes=NAMES)
    words = [data, "--output", tmp_path / "out", "--teacher", f"test_resnet={teacher}"]
    words += ["--rows", "top-5", "--seeds", 1, "--views", 2, "--epochs", 2, "--images", 4]
    words += ["--val-images", 3, "--batch-size", 12, "--teacher-img-size", 40]
    tiny_imagenet.main([os.fspath(word) if isinstance(word, Path) else str(word) for word in words])
    lines = capsys.readouterr().out.splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line]
    of_labels, of_students = cells[4:8], cells[8:]
    assert of_labels[2][:3] == ["dense, float32", "all classes, float32", "4000.00"]
    assert of_labels[3][0] == "top-5"
    assert float(of_labels[3][2]) < 100
    assert float(of_labels[3][3]) > 0.0
    assert [row[0] for row in of_students] == ["labels", "---", "dense, float32", "top-5"]
    agreement, kl = of_students[3][4], of_students[3][6]
    assert 0.0 <= float(agreement) <= 100.0
    assert float(kl) > 0.0
    assert (tmp_path / "out" / "rates.md").read_text().splitlines() == lines[5:-1]
