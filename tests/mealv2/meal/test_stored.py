"""MEAL from stored labels: losses against float64 NumPy, whose turn it is, what is missing."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mealv2.label_set import Encoding, Rows
from mealv2.meal import BLOCK_LOSSES, BlockLayers, MealTask, StoredTeachers, block_loss
from mealv2.meal import block_discriminators as new_discriminators
from mealv2.meal.stored import stored_logits, stored_loss
from mealv2.meal.teachers import drawn_teachers
from mealv2.soft_labels import SoftLabels
from mealv2.targets import BatchTargets

NUM_CLASSES, BATCH = 12, 5
ENCODINGS = {
    "dense": Encoding(NUM_CLASSES, "float32", topk=NUM_CLASSES, logits=True),
    "rate": Encoding(NUM_CLASSES, rate=1e-2, logits=True),
    "curve": Encoding(NUM_CLASSES, topk=4, logits=True),
    "float16": Encoding(NUM_CLASSES, "float16", topk=4, logits=True),
}


def logits(seed: int) -> Tensor:
    return 2 * torch.randn(BATCH, NUM_CLASSES, generator=torch.Generator().manual_seed(seed))


def rows_of(logits_BC: Tensor, encoding: Encoding) -> Rows:
    return encoding.encode(torch.softmax(logits_BC, dim=1), logits_BC)


def log_softmax(values: np.ndarray) -> np.ndarray:
    shifted = values - values.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def compressed(values: np.ndarray, is_kept: np.ndarray) -> np.ndarray:
    """Return values with the mean of the classes not kept in place of each of them."""
    found = values.copy()
    for row, kept in zip(found, is_kept, strict=True):
        if not kept.all():
            row[~kept] = row[~kept].mean()
    return found


def expected_loss(student: np.ndarray, teacher: np.ndarray, stored: Rows, kind: str) -> float:
    """Return a loss to what a row says, in float64."""
    label = stored.labels.to_dense().double().numpy()
    log_probs = log_softmax(student)
    if kind == "ce":
        return float(-(label * log_probs).sum(axis=1).mean())
    kept = stored.labels.kept()
    is_kept = kept.mask(NUM_CLASSES).numpy()
    a, b = np.exp(log_probs), label
    if not kind.endswith("_soft"):
        a, b = compressed(student, is_kept), compressed(teacher, is_kept)
    return float(np.abs(a - b).mean() if kind.startswith("l1") else ((a - b) ** 2).mean())


@pytest.mark.parametrize("name", ENCODINGS)
@pytest.mark.parametrize("kind", BLOCK_LOSSES)
def test_losses_are_those_of_what_the_row_says(name: str, kind: Any) -> None:
    student_BC, teacher_BC = logits(1), logits(2)
    stored = rows_of(teacher_BC, ENCODINGS[name])
    student, teacher = student_BC.double().numpy(), teacher_BC.double().numpy()
    expected = expected_loss(student, teacher, stored, kind)
    # logits are stored in float16
    close = {"rel": 5e-3, "abs": 1e-3} if kind in ("l1", "l2") else {"rel": 1e-5}
    assert stored_loss(student_BC, stored, kind).item() == pytest.approx(expected, **close)


@pytest.mark.parametrize("kind", ["ce", "l1_soft", "l2_soft"])
def test_losses_and_gradients_of_exact_labels_are_those_of_the_teacher(kind: Any) -> None:
    teacher_BC = logits(2)
    found, expected = logits(1).requires_grad_(), logits(1).requires_grad_()
    without_logits = rows_of(teacher_BC, ENCODINGS["dense"])._replace(logits=None)
    loss, exact = stored_loss(found, without_logits, kind), block_loss(expected, teacher_BC, kind)
    (loss + 0.0).backward()
    exact.backward()
    torch.testing.assert_close(loss, exact, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(found.grad, expected.grad, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("kind", ["ce", "l1_soft", "l2_soft"])
def test_a_teacher_without_doubt_gives_finite_losses_and_gradients(kind: Any) -> None:
    certain = Rows(SoftLabels.from_dense(torch.eye(NUM_CLASSES)[:BATCH]))
    student_BC = logits(1).requires_grad_()
    loss = stored_loss(student_BC, certain, kind)
    loss.backward()
    assert torch.isfinite(loss)
    assert student_BC.grad is not None
    assert torch.isfinite(student_BC.grad).all()


@pytest.mark.parametrize("name", ENCODINGS)
def test_the_discriminator_sees_both_sides_compressed_in_the_same_way(name: str) -> None:
    student_BC, teacher_BC = logits(1), logits(2)
    stored = rows_of(teacher_BC, ENCODINGS[name])
    own, others = stored_logits(student_BC, stored)
    is_kept = stored.labels.kept().mask(NUM_CLASSES).numpy()
    expected = compressed(student_BC.double().numpy(), is_kept)
    np.testing.assert_allclose(own, expected, rtol=1e-5, atol=1e-6)
    expected = compressed(teacher_BC.double().numpy(), is_kept)
    is_exact = ~is_kept if name == "rate" else np.ones_like(is_kept)  # else on a line
    np.testing.assert_allclose(others[is_exact], expected[is_exact], rtol=2e-3, atol=2e-3)
    np.testing.assert_allclose(others, expected, rtol=0, atol=0.5)


class Network(nn.Module):
    """A network that has these logits for any image."""

    def __init__(self, logits_BC: Tensor) -> None:
        super().__init__()
        self.logits_BC = logits_BC

    def forward(self, images_BCHW: Tensor) -> Tensor:
        return self.logits_BC


def test_task_with_stored_rows_is_the_task_with_their_logits() -> None:
    """Of two teachers, whose logits float16 has exactly, mixed images included."""
    teachers = [logits(seed).half().float() for seed in (2, 3)]
    stored = BatchTargets(stored=tuple(rows_of(each, ENCODINGS["dense"]) for each in teachers))
    online = BatchTargets(blocks=tuple((each,) for each in teachers))
    torch.manual_seed(0)
    discriminators = new_discriminators([NUM_CLASSES])
    task = MealTask(
        Network(logits(1)), BlockLayers(), discriminators, loss="l2", gammas=[0.5], etas=[2.0]
    )
    images, order = torch.zeros(BATCH, 3, 1, 1), torch.tensor([1, 0, 2, 4, 3])
    assert task.prepare(images, stored) == task.prepare(images, online)
    found, expected = (
        task(images, t, {"partner": t.rows(order), "lam": 0.3})["parts"] for t in (stored, online)
    )
    assert found.keys() == expected.keys() >= {"similarity_loss", "discriminator_loss"}
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-7)


# --- targets ------------------------------------------------------------------------------------


class Set:
    """Labels of one teacher, whose likeliest class is its number; it may lack views."""

    def __init__(self, number: int, lacks: tuple[str, ...] = ()) -> None:
        self._number = number
        self._lacks = lacks

    def view(self, key: str, epoch: int) -> int | None:
        return None if key in self._lacks else epoch + 3

    def batch(self, positions: list[int], views: list[int], images: Tensor) -> BatchTargets:
        probs = torch.eye(NUM_CLASSES)[[self._number] * len(positions)]
        return BatchTargets(SoftLabels.from_dense(probs))


def teachers_of(sets: list[Set], **options: Any) -> StoredTeachers:
    return StoredTeachers(sets, [0, 1, 2], seed=5, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("selection", ["random", "round-robin", "all"])
def test_a_step_has_the_labels_of_the_teachers_that_it_would_have_online(selection: Any) -> None:
    targets = teachers_of([Set(number) for number in range(4)], selection=selection)
    seen = []
    for step in range(1, 9):
        found = targets.batch([2, 0], [0, 0], torch.empty(0), step=step)
        seen.append(tuple(int(rows.labels.argmax()[0]) for rows in found.stored))
        assert found.classes_B is not None
        assert found.classes_B.tolist() == [2, 0]
        assert found.label_counts == {"labels_stored": 2}
    assert seen == [drawn_teachers(4, selection, seed=5, step=step) for step in range(1, 9)]


def test_a_view_that_one_set_lacks_is_skipped_whoever_is_drawn() -> None:
    targets = teachers_of([Set(0), Set(1, lacks=("b",))])
    assert [targets.view(key, 2) for key in ("a", "b")] == [5, None]
