"""benchmarks/flowers17.py: which pictures and labels each run has, and a short run of all rows."""

from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.experiment_tables import figures, rows_table
from benchmarks.experiments import differences, run_all
from benchmarks.flowers17 import Experiment, Scale
from mealv2.data.open import open_source

SCALE = Scale(
    num_train=4,
    num_val=2,
    student="test_resnet",
    teachers=("test_resnet", "test_efficientnet"),
    img_size=32,
    larger_size=40,
    num_views=1,
    distill_epochs=1,
    epochs=((1, 1), (2, 1), (4, 1)),
    labelled=(1, 2),
)


@pytest.fixture
def experiment(draw_tree: Callable[..., Path], tmp_path: Path) -> Experiment:
    data = draw_tree(tmp_path / "flowers", num_train=4, num_val=2)
    return Experiment(data, None, tmp_path / "out", SCALE)


def contents(folder: Path, split: str = "train") -> set[bytes]:
    source = open_source(folder, split)
    return {source.read(position) for position in range(len(source))}


@pytest.mark.parametrize("seed", [0, 1])
def test_few_labelled_pictures_and_the_rest_are_all_pictures_and_differ_by_seed(
    experiment: Experiment, seed: int
) -> None:
    start, *_, labels, student = experiment.soft(1, seed)
    labelled = contents(Path(str(start.data_dir)))
    rest = {path.read_bytes() for folder in labels.extra_data for path in folder.rglob("*.*")}
    everything = contents(experiment.data_dir)
    assert len(labelled) == 3
    assert labelled | rest == everything
    assert not labelled & rest
    assert labelled != contents(experiment.labelled(1, 1 - seed))
    assert (student.data_dir, student.extra_data) == (labels.data_dir, labels.extra_data)


def test_teachers_of_few_labels_see_the_pictures_of_the_start_and_no_others(
    experiment: Experiment,
) -> None:
    start, *teachers, _, _ = experiment.soft(2, 1)
    for teacher in teachers:
        assert {*differences(start, teacher)} <= {"model", "seed"}


def test_soft_and_hard_labels_on_all_pictures_have_one_start_and_one_schedule(
    experiment: Experiment,
) -> None:
    (start, hard), (*_, soft) = experiment.hard_all(1, 0), experiment.soft_all(1, 0)
    assert hard.initial_checkpoint == soft.initial_checkpoint == start.output
    for name in ("epochs", "lr", "sched", "batch_size", "seed", "model"):
        assert getattr(hard, name) == getattr(soft, name)
    assert contents(hard.data_dir) == contents(soft.data_dir)


def test_teachers_kept_apart_and_their_student_share_no_picture(experiment: Experiment) -> None:
    start, *teachers, labels, student = experiment.soft_apart(1, 1)
    of_student, of_teachers = contents(student.data_dir), contents(teachers[0].data_dir)
    assert labels.data_dir == student.data_dir
    assert not of_student & of_teachers
    assert contents(start.data_dir) < of_student


def test_longer_hard_labels_have_as_many_images_as_soft_ones(experiment: Experiment) -> None:
    longer, soft = experiment.hard_longer(2, 0)[-1], experiment.soft(2, 0)[-1]
    assert longer.epochs * 2 == soft.epochs * SCALE.num_train


def test_larger_views_are_those_of_the_teachers_alone(experiment: Experiment) -> None:
    pairs = zip(experiment.soft(1, 0), experiment.soft_larger(1, 0), strict=True)
    found = [set(differences(plain, larger)) for plain, larger in pairs]
    assert found == [set(), {"img_size"}, {"img_size"}, {"teacher"}, {"labels"}]


@pytest.mark.slow
def test_all_rows_have_a_figure(experiment: Experiment) -> None:
    rows = experiment.rows()
    run_all(config for row in rows for config in row.runs(0))
    text = rows_table(rows, figures(rows, [0]))
    assert text.count("\n") == 2 + len(rows) == 12
    assert "| hard labels on 1 a class | 1 | " in text
