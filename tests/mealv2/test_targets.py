"""mealv2.targets: which view an epoch uses, and who answers for it."""

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import reference
from label_sets import encoded, make_set, same
from mealv2.errors import DataError, LabelSetError
from mealv2.label_set import Appender, Encoding, LabelSet, Rows
from mealv2.models.ensemble import TeacherEnsemble
from mealv2.targets import BatchTargets, HardLabels, OnlineTeachers, StoredLabels
from mealv2.views import scheduled_view

KEYS = ["ant/1.png", "bee/1.png", "猫/1.png"]
NUM_VIEWS, NUM_CLASSES, K = 5, 6, 2
NONE = torch.empty(0)  # no pixels: nobody looks at them


def indices_of(key: str, view: int) -> list[int]:
    """Classes that name the row: the image and its view."""
    return [KEYS.index(key), (KEYS.index(key) + 1 + view) % NUM_CLASSES]


@pytest.fixture(scope="module")
def label_set(tmp_path_factory) -> LabelSet:
    probs = torch.full((len(KEYS) * NUM_VIEWS, NUM_CLASSES), 0.125 / (NUM_CLASSES - K))
    for row, (key, view) in enumerate((key, view) for key in KEYS for view in range(NUM_VIEWS)):
        probs[row, indices_of(key, view)] = torch.tensor([0.75, 0.125])
    made = make_set(
        tmp_path_factory.mktemp("labels"),
        Encoding(NUM_CLASSES, "float16", topk=K),
        KEYS,
        NUM_VIEWS,
        outputs_N=(probs, None),
        skipped={"x": "empty"},
    )
    return LabelSet.open(made.folder)


def test_stored_labels_use_the_schedule_of_the_views_the_set_holds(label_set):
    targets = StoredLabels(label_set, KEYS, seed=9)
    for key in KEYS:
        used = [targets.view(key, epoch) for epoch in range(3 * NUM_VIEWS)]
        assert used == [
            scheduled_view(key, epoch, seed=9, num_views=NUM_VIEWS) for epoch in range(15)
        ]
        for start in range(0, 15, NUM_VIEWS):
            assert sorted(used[start : start + NUM_VIEWS]) == list(range(NUM_VIEWS))


def test_stored_labels_answer_for_positions_of_the_source_and_not_of_the_set(label_set):
    source_keys = ["x", "猫/1.png", "ant/1.png", "bee/1.png"]  # another order, one without labels
    batch = StoredLabels(label_set, source_keys, seed=0).batch([1, 3, 1, 2], [0, 4, 2, 1], NONE)
    assert batch.label_counts == {"labels_stored": 4}
    batch = batch.soft_labels
    expected = [("猫/1.png", 0), ("bee/1.png", 4), ("猫/1.png", 2), ("ant/1.png", 1)]
    assert batch.indices_NK.dtype == torch.int64
    assert batch.indices_NK.tolist() == [indices_of(*place) for place in expected]
    assert batch.probs_NK.dtype == torch.float16, "as the set keeps them"
    assert batch.probs_NK.tolist() == [[0.75, 0.125]] * 4
    assert batch.rest_N.tolist() == [0.125] * 4
    assert batch.num_classes == NUM_CLASSES
    assert float(batch.to_dense()[0].sum()) == pytest.approx(1.0)


@pytest.mark.parametrize("kind", ["rate, logits", "top-k float32, logits"])
def test_answers_move_and_turn_with_their_logits(tmp_path, teachers, kind):
    label_set = made_by(tmp_path, teachers, pixels(15), kind)
    batch = StoredLabels(label_set, KEYS, [4, 5, 6], seed=0).batch([0, 2, 1], [1, 0, 4], NONE)
    for turned in (batch.rows(torch.tensor([2, 0])), pickle.loads(pickle.dumps(batch))):  # noqa: S301
        order = torch.tensor([2, 0]) if len(turned.soft_labels) == 2 else torch.arange(3)
        assert same(rows_of(turned), rows_of(batch).rows(order))
        assert torch.equal(turned.classes_B, batch.classes_B[order])
    assert same(rows_of(batch.to(torch.device("cpu"))), rows_of(batch))
    assert batch.to(torch.device("meta")).kept_logits.rest_N.device.type == "meta"


def test_stored_labels_refuse_an_image_or_a_view_without_label(label_set):
    targets = StoredLabels(label_set, ["x", *KEYS], seed=0)
    with pytest.raises(LabelSetError, match="it was skipped: empty"):
        targets.batch([0], [0], NONE)
    with pytest.raises(LabelSetError, match=f"no view {NUM_VIEWS}"):
        targets.batch([1], [NUM_VIEWS], NONE)


def test_hard_labels_answer_with_class_ids_whatever_the_view():
    targets = HardLabels([2, 0, 1])
    batch = targets.batch([2, 0, 0], [5, 6, 7], NONE).classes_B
    assert batch.dtype == torch.int64
    assert batch.tolist() == [1, 2, 2]


def test_hard_labels_use_a_fresh_view_every_epoch():
    targets = HardLabels([0])
    assert [targets.view("a.png", epoch) for epoch in range(100)] == list(range(100))


def test_hard_labels_use_the_views_of_a_label_set_where_told_how_many_it_holds(label_set):
    stored = StoredLabels(label_set, KEYS, seed=9)
    hard = HardLabels([0, 1, 2], num_views=NUM_VIEWS, seed=9)
    for key in KEYS:
        assert [hard.view(key, e) for e in range(15)] == [stored.view(key, e) for e in range(15)]


# --- teachers online ----------------------------------------------------------------------------


class Recording(nn.Module):
    """A linear teacher of 3 x 4 x 4 pixels that notes which images it is shown."""

    def __init__(self, num_classes: int = NUM_CLASSES, *, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(torch.randn(num_classes, 48, generator=generator))
        self.seen: list[torch.Tensor] = []

    def forward(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        self.seen.extend(images_BCHW)
        return (images_BCHW.float() / 255).flatten(1) @ self.weight.T

    def logits(self, images_BCHW: torch.Tensor) -> np.ndarray:
        """Return what it answers, in float64 and by NumPy."""
        pixels = images_BCHW.numpy().astype(np.float64).reshape(len(images_BCHW), -1) / 255
        return pixels @ self.weight.detach().numpy().astype(np.float64).T


def pixels(num_images: int, *, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (num_images, 3, 4, 4), generator=generator, dtype=torch.uint8)


@pytest.fixture
def teachers() -> list[Recording]:
    return [Recording(seed=seed) for seed in (1, 2)]


def test_online_teachers_use_a_view_that_never_repeats(teachers):
    targets = OnlineTeachers(TeacherEnsemble(teachers), [0] * 3)
    assert [targets.view("a", epoch) for epoch in range(300)] == list(range(300))


def test_online_teachers_answer_with_the_mean_of_softmax_and_the_mean_of_logits(teachers):
    images = pixels(5)
    batch = OnlineTeachers(TeacherEnsemble(teachers), [4, 0, 5]).batch(
        [2, 0, 0, 1, 2], [9] * 5, images
    )
    probs, mean_logits = reference.ensemble([teacher.logits(images) for teacher in teachers])
    np.testing.assert_allclose(batch.soft_labels.to_dense().numpy(), probs, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(batch.mean_logits_BC.numpy(), mean_logits, rtol=1e-4, atol=1e-5)
    assert batch.soft_labels.probs_NK.shape == (5, NUM_CLASSES), "every class is kept"
    assert not np.allclose(reference.softmax(mean_logits), probs, atol=1e-3), "they differ"
    assert batch.classes_B.tolist() == [5, 4, 4, 0, 5]
    assert batch.label_counts == {"labels_online": 5}
    assert not batch.mean_logits_BC.requires_grad


def test_rows_of_an_answer_in_another_order_are_those_rows(teachers):
    batch = OnlineTeachers(TeacherEnsemble(teachers), [4, 0, 5]).batch(
        [0, 1, 2], [0] * 3, pixels(3)
    )
    turned = batch.rows(torch.tensor([2, 0, 0]))
    assert torch.equal(turned.soft_labels.probs_NK, batch.soft_labels.probs_NK[[2, 0, 0]])
    assert torch.equal(turned.mean_logits_BC, batch.mean_logits_BC[[2, 0, 0]])
    assert turned.classes_B.tolist() == [5, 4, 4]


# --- a label set, and its teachers for what it lacks --------------------------------------------

KINDS = {
    "rate": Encoding(NUM_CLASSES, rate=1e-2),
    "rate, logits": Encoding(NUM_CLASSES, rate=1e-2, logits=True),
    "curve": Encoding(NUM_CLASSES, topk=3),
    "top-k float16": Encoding(NUM_CLASSES, "float16", topk=K),
    "top-k float32, logits": Encoding(NUM_CLASSES, "float32", topk=K, logits=True),
    "dense float16": Encoding(NUM_CLASSES, "float16", topk=NUM_CLASSES),
    "dense float32": Encoding(NUM_CLASSES, "float32", topk=NUM_CLASSES),
}


def made_by(
    folder: Path,
    teachers: list[Recording],
    images: torch.Tensor,
    kind: str,
    *,
    precision: str = "float32",
) -> LabelSet:
    """Write a set as stage one does: image i of KEYS, view v, is ``images[i * NUM_VIEWS + v]``."""
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bfloat16"):
        said = TeacherEnsemble(teachers)(images)
    make_set(folder, KINDS[kind], KEYS, NUM_VIEWS, outputs_N=tuple(said), precision=precision)
    for teacher in teachers:
        teacher.seen.clear()
    return LabelSet.open(folder)


def rows_of(batch: BatchTargets) -> Rows:
    assert batch.soft_labels is not None
    return Rows(batch.soft_labels, batch.kept_logits)


def test_only_rows_that_the_set_lacks_go_through_the_teachers(tmp_path, teachers):
    label_set = made_by(tmp_path, teachers, pixels(15), "top-k float16")
    source_keys = ["new.png", *KEYS]
    targets = StoredLabels(
        label_set, source_keys, seed=0, missing="teach", ensemble=TeacherEnsemble(teachers)
    )
    images = pixels(6, seed=1)
    # lacking: a new image, a view beyond the stored ones, the new image again
    batch = targets.batch([1, 0, 2, 3, 1, 0], [0, 0, 7, 4, 1, 3], images)
    assert batch.label_counts == {"labels_stored": 3, "labels_online": 3}
    for teacher in teachers:
        assert len(teacher.seen) == 3
        assert all(
            torch.equal(a, images[row]) for a, row in zip(teacher.seen, (1, 2, 5), strict=True)
        )


@pytest.mark.parametrize("kind", KINDS)
def test_a_taught_row_equals_what_the_set_would_hold(tmp_path, teachers, kind):
    """Of the very images whose labels the set holds: asked for as views that it lacks."""
    images = pixels(len(KEYS) * NUM_VIEWS)
    label_set = made_by(tmp_path, teachers, images, kind)
    keys = [key for key in KEYS for _ in range(NUM_VIEWS)]
    stored = label_set.rows(keys, list(range(NUM_VIEWS)) * len(KEYS))
    targets = StoredLabels(
        label_set, ["new.png"], seed=0, missing="teach", ensemble=TeacherEnsemble(teachers)
    )
    assert same(rows_of(targets.batch([0] * 15, list(range(15)), images)), stored)


@pytest.mark.parametrize("student", ["float32", "bfloat16"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_taught_row_is_in_the_precision_of_the_set_and_not_of_the_student(
    tmp_path, teachers, precision, student
):
    images = pixels(15)
    label_set = made_by(tmp_path, teachers, images, "dense float32", precision=precision)
    keys = [key for key in KEYS for _ in range(NUM_VIEWS)]
    stored = label_set.rows(keys, list(range(NUM_VIEWS)) * len(KEYS))
    targets = StoredLabels(
        label_set, ["new.png"], seed=0, missing="teach", ensemble=TeacherEnsemble(teachers)
    )
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=student == "bfloat16"):
        assert same(rows_of(targets.batch([0] * 15, list(range(15)), images)), stored)


def test_an_answer_that_is_not_finite_is_never_kept(tmp_path, teachers, contents):
    label_set = made_by(tmp_path, teachers, pixels(15), "top-k float16")
    before = contents(tmp_path)
    with torch.no_grad():
        teachers[1].weight[0, 0] = torch.inf
    ensemble, appender = TeacherEnsemble(teachers), Appender(label_set)
    targets = StoredLabels(
        label_set, ["new"], seed=0, missing="teach", ensemble=ensemble, appender=appender
    )
    with pytest.raises(DataError, match="not finite"):
        targets.batch([0], [0], pixels(1))
    targets.flush()
    assert contents(tmp_path) == before


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lacking", [(), (0,), (3,), (0, 2, 3), (0, 1, 2, 3)])
def test_rows_stay_in_their_order_whoever_answers(tmp_path, teachers, kind, lacking):
    images = pixels(len(KEYS) * NUM_VIEWS)
    label_set = made_by(tmp_path, teachers, images, kind)
    targets = StoredLabels(
        label_set,
        ["new.png", *KEYS],
        [9, 8, 7, 6],
        seed=0,
        missing="teach",
        ensemble=TeacherEnsemble(teachers),
    )
    rows = [(2, 1), (3, 4), (1, 0), (2, 2)]  # positions and views that the set holds
    shown = images[[(p - 1) * NUM_VIEWS + v for p, v in rows]]
    expected = targets.batch(*map(list, zip(*rows, strict=True)), shown)
    asked = [(0, v) if row in lacking else (p, v) for row, (p, v) in enumerate(rows)]
    batch = targets.batch(*map(list, zip(*asked, strict=True)), shown)
    # a batch of one row is multiplied in another order than a batch of fifteen
    within = {"float32": 1e-6, "float16": 1e-3, "curve": 0.05}[KINDS[kind].form]
    dense = batch.soft_labels.to_dense()
    torch.testing.assert_close(dense, expected.soft_labels.to_dense(), rtol=0, atol=within)
    assert batch.soft_labels.argmax().tolist() == expected.soft_labels.argmax().tolist()
    assert (batch.kept_logits is None) == (not KINDS[kind].logits)
    if batch.kept_logits is not None:
        said, before = (
            a.kept_logits.to_dense(a.soft_labels.kept(), NUM_CLASSES) for a in (batch, expected)
        )
        torch.testing.assert_close(said, before, rtol=2e-3, atol=2e-3)
    assert batch.classes_B.tolist() == [9 - p for p, _ in asked]
    assert batch.mean_logits_BC is None
    taught = len(lacking)
    assert batch.label_counts == {"labels_stored": 4 - taught, "labels_online": taught}


@pytest.mark.parametrize("kind", KINDS)
def test_taught_rows_that_were_appended_are_stored_rows_for_the_next_job(tmp_path, teachers, kind):
    label_set = made_by(tmp_path, teachers, pixels(15), kind)

    def job(opened: LabelSet) -> BatchTargets:
        targets = StoredLabels(
            opened,
            ["new.png", *KEYS],
            seed=0,
            missing="teach",
            ensemble=TeacherEnsemble(teachers),
            appender=Appender(opened),
        )
        batch = targets.batch([0, 1, 2], [3, 99, 0], pixels(3, seed=1))
        targets.flush()
        return batch

    first = job(label_set)
    second = job(LabelSet.open(tmp_path))
    assert first.label_counts == {"labels_stored": 1, "labels_online": 2}
    assert second.label_counts == {"labels_stored": 3, "labels_online": 0}
    assert same(rows_of(first), rows_of(second))
    assert len(list(tmp_path.glob("*more*"))) == 1, "the second job had nothing to append"


# --- views that the set lacks ---------------------------------------------------------------------


def teaching(label_set: LabelSet, **given: Any) -> StoredLabels:
    ensemble = TeacherEnsemble([Recording(seed=0)])
    return StoredLabels(label_set, KEYS, seed=9, missing="teach", ensemble=ensemble, **given)


def test_without_reuse_the_stored_views_come_once_and_then_view_e_in_epoch_e(label_set):
    targets = teaching(label_set, reuse=False)
    for key in [*KEYS, "new.png"]:
        used = [targets.view(key, epoch) for epoch in range(12)]
        expected = [scheduled_view(key, e, seed=9, num_views=NUM_VIEWS) for e in range(NUM_VIEWS)]
        assert used == [*expected, *range(NUM_VIEWS, 12)]
        assert sorted(used) == list(range(12)), "none repeats"


def test_with_reuse_the_teachers_are_asked_for_the_images_that_the_set_lacks_alone(label_set):
    targets = teaching(label_set)
    for key in [*KEYS, "new.png"]:
        used = [targets.view(key, epoch) for epoch in range(2 * NUM_VIEWS)]
        assert sorted(used) == sorted([*range(NUM_VIEWS)] * 2)


def test_skip_leaves_out_what_the_set_lacks_and_nothing_else(label_set):
    targets = StoredLabels(label_set, KEYS, seed=9, reuse=False, missing="skip")
    for key in KEYS:
        used = [targets.view(key, epoch) for epoch in range(8)]
        assert sorted(used[:NUM_VIEWS]) == list(range(NUM_VIEWS))
        assert used[NUM_VIEWS:] == [None] * 3
    assert [targets.view("new.png", epoch) for epoch in range(8)] == [None] * 8


def test_skip_uses_a_view_that_another_job_appended(tmp_path, teachers):
    label_set = made_by(tmp_path, teachers, pixels(15), "top-k float16")
    appender = Appender(label_set)
    rows = encoded(KINDS["top-k float16"], 2)
    appender.add(["new.png", KEYS[0]], [1, 6], rows)
    appender.flush()
    opened = LabelSet.open(tmp_path)
    targets = StoredLabels(opened, [*KEYS, "new.png"], seed=9, reuse=False, missing="skip")
    assert [targets.view(KEYS[0], e) for e in range(NUM_VIEWS, 8)] == [None, 6, None]
    assert {targets.view("new.png", e) for e in range(NUM_VIEWS)} == {None, 1}
    assert same(rows_of(targets.batch([3, 0], [1, 6], NONE)), rows)


def test_fail_names_a_view_beyond_the_stored_ones(label_set):
    targets = StoredLabels(label_set, KEYS, seed=9, reuse=False)
    view = targets.view(KEYS[0], NUM_VIEWS)
    assert view == NUM_VIEWS
    with pytest.raises(LabelSetError, match=f"no view {NUM_VIEWS} of 'ant/1.png'"):
        targets.batch([0], [view], NONE)


@pytest.mark.parametrize("missing", ["fail", "skip"])
def test_teachers_that_would_never_be_asked_raise_value_error(label_set, teachers, missing):
    with pytest.raises(ValueError, match="ensemble"):
        StoredLabels(label_set, KEYS, seed=0, missing=missing, ensemble=TeacherEnsemble(teachers))


def test_teaching_without_teachers_raises_value_error(label_set):
    with pytest.raises(ValueError, match="ensemble"):
        StoredLabels(label_set, KEYS, seed=0, missing="teach")


def test_flushing_targets_that_keep_nothing_writes_nothing(tmp_path, teachers, contents):
    label_set = made_by(tmp_path, teachers, pixels(15), "top-k float16")
    before = contents(tmp_path)
    ensemble = TeacherEnsemble(teachers)
    taught = StoredLabels(label_set, ["new"], seed=0, missing="teach", ensemble=ensemble)
    for targets in (taught, OnlineTeachers(ensemble, [0])):
        targets.batch([0], [0], pixels(1))
        targets.flush()
    assert contents(tmp_path) == before
