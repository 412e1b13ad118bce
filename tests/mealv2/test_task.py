"""mealv2.task: what a step computes, and where its gradients go."""

import dataclasses
import functools
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from timm.data.mixup import mixup_target
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import Tensor, nn

import reference
from label_sets import Made, ensemble_outputs, make_set
from mealv2.label_set import Encoding, LabelSet
from mealv2.losses import discriminator_loss
from mealv2.models import Classifier, create_classifier
from mealv2.models.discriminator import (
    VARIANTS,
    Discriminator,
    Variant,
    num_dead_outputs,
    redraw_dead_outputs,
)
from mealv2.models.ensemble import combine
from mealv2.soft_labels import SoftLabels, tempered, top_k
from mealv2.targets import BatchTargets, StoredLabels
from mealv2.task import GRADIENT_RATIO, DistillTask, HardLabelTask, Mixture

NUM_CLASSES = 20


pytestmark = pytest.mark.usefixtures("seeded_weights")


@pytest.fixture
def student() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(12, NUM_CLASSES))


@pytest.fixture
def images() -> Tensor:
    return torch.randn(6, 3, 2, 2)


def labels_of(logits: Tensor, k: int) -> SoftLabels:
    return top_k(torch.softmax(logits, 1), k)


def distillation(
    student: nn.Module, images: Tensor, labels: SoftLabels, discriminator: Discriminator
) -> tuple[float, reference.Discrimination, np.ndarray]:
    """Return the reference's (similarity loss, discrimination, rows the teachers' side shows)."""
    logits = student(images).detach().numpy()
    indices = labels.indices_NK.numpy()
    probs = reference.dense(indices, labels.probs_NK.numpy(), labels.rest_N.numpy(), NUM_CLASSES)
    layers = [
        (layer.weight.detach().numpy(), layer.bias.detach().numpy())
        for layer in discriminator.layers
        if isinstance(layer, nn.Linear)
    ]
    seen = reference.discriminate(
        layers,
        reference.compress_top_k(logits, indices),
        np.log(probs),
        variant=discriminator.variant,
    )
    return reference.similarity(logits, probs)[0], seen, logits


@pytest.mark.parametrize("variant", ["paper", "official"])
@pytest.mark.parametrize("k", [1, 5, NUM_CLASSES])
@pytest.mark.parametrize("weight", [1.0, 0.25])
def test_loss_is_similarity_plus_weighted_discriminator_loss(student, images, variant, k, weight):
    labels = labels_of(2 * torch.randn(6, NUM_CLASSES), k)
    discriminator = Discriminator(NUM_CLASSES, variant)
    result = DistillTask(student, discriminator, discriminator_weight=weight)(
        images, BatchTargets(labels)
    )
    similarity, seen, logits = distillation(student, images, labels, discriminator)
    assert set(result) == {"loss", "output", "parts"}
    assert float(result["loss"].detach()) == pytest.approx(
        similarity + weight * seen.loss, rel=1e-5
    )
    np.testing.assert_array_equal(result["output"].detach().numpy(), logits)
    assert {name: float(part) for name, part in result["parts"].items()} == pytest.approx(
        {
            "similarity_loss": similarity,
            "discriminator_loss": seen.loss,
            "discriminator_accuracy": seen.accuracy,
        },
        rel=1e-5,
    )


def test_without_a_discriminator_the_loss_is_the_similarity_loss_alone(student, images):
    labels = labels_of(torch.randn(6, NUM_CLASSES), 5)
    result = DistillTask(student)(images, BatchTargets(labels))
    expected, _, _ = distillation(student, images, labels, Discriminator(NUM_CLASSES))
    assert float(result["loss"].detach()) == pytest.approx(expected, rel=1e-5)
    assert set(result["parts"]) == {"similarity_loss"}


def test_one_backward_reaches_student_and_discriminator_and_not_the_labels(student, images):
    labels = labels_of(torch.randn(6, NUM_CLASSES), 5)
    task = DistillTask(student, Discriminator(NUM_CLASSES))
    task(images, BatchTargets(labels))["loss"].backward()
    parameters = dict(task.named_parameters())
    assert {name.split(".")[0] for name in parameters} == {"student", "discriminator"}
    assert all(int(parameter.grad.count_nonzero()) > 0 for parameter in parameters.values())
    assert labels.probs_NK.grad is None


def test_a_step_makes_the_students_output_more_like_the_labels(student, images):
    task = DistillTask(student, Discriminator(NUM_CLASSES))
    labels = labels_of(3 * torch.randn(6, NUM_CLASSES), 5)
    optimizer = torch.optim.SGD(task.parameters(), lr=0.1)
    losses = []
    for _ in range(20):
        result = task(images, BatchTargets(labels))
        losses.append(float(result["parts"]["similarity_loss"]))
        optimizer.zero_grad()
        result["loss"].backward()
        optimizer.step()
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("k", [1, 5, NUM_CLASSES])
def test_a_student_that_answers_as_the_labels_leaves_the_discriminator_at_chance(images, k):
    student = nn.Sequential(nn.Flatten(), nn.Linear(12, NUM_CLASSES))
    labels = labels_of(student(images).detach(), k)
    parts = DistillTask(student, Discriminator(NUM_CLASSES))(images, BatchTargets(labels))["parts"]
    assert float(parts["discriminator_accuracy"]) == 0.5


def test_a_label_rounded_to_nothing_gives_a_finite_loss(student, images):
    certain = SoftLabels(
        torch.zeros(6, 1, dtype=torch.int64), torch.ones(6, 1), torch.zeros(6), NUM_CLASSES
    )
    task = DistillTask(student, Discriminator(NUM_CLASSES))
    loss = task(images, BatchTargets(certain))["loss"]
    loss.backward()
    assert torch.isfinite(loss)
    assert all(torch.isfinite(parameter.grad).all() for parameter in task.parameters())


def test_the_discriminator_sees_no_probability_below_the_smallest_float16(images):
    rows: list[Tensor] = []
    discriminator = Discriminator(NUM_CLASSES)
    discriminator.register_forward_pre_hook(lambda _, inputs: rows.extend(inputs))
    logits = torch.zeros(6, NUM_CLASSES)
    logits[:, 0] = 100.0
    DistillTask(nn.Identity(), discriminator)(logits, BatchTargets(labels_of(logits, 3)))
    smallest = float(np.log(np.finfo(np.float16).smallest_subnormal.astype(np.float64)))
    assert rows[0].shape == (12, NUM_CLASSES)
    assert float(rows[0][:, 0].min()) == pytest.approx(0.0, abs=1e-6)
    np.testing.assert_allclose(rows[0][:, 1:].numpy(), smallest, rtol=1e-6)


def test_parts_are_detached(student, images):
    labels = labels_of(torch.randn(6, NUM_CLASSES), 5)
    results = (
        DistillTask(student, Discriminator(NUM_CLASSES))(images, BatchTargets(labels)),
        HardLabelTask(student)(images, BatchTargets(classes_B=torch.zeros(6, dtype=torch.int64))),
    )
    assert not any(part.requires_grad for result in results for part in result["parts"].values())
    assert all(result["loss"].requires_grad for result in results)


def test_the_discriminator_computes_in_float32_under_autocast(student, images):
    labels = labels_of(torch.randn(6, NUM_CLASSES), 5)
    discriminator = Discriminator(NUM_CLASSES)
    seen: list[torch.dtype] = []
    discriminator.register_forward_hook(
        lambda _, inputs, out: seen.extend([inputs[0].dtype, out.dtype])
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = DistillTask(student, discriminator)(images, BatchTargets(labels))
    assert seen == [torch.float32] * 2
    assert result["loss"].dtype == result["output"].dtype == torch.float32


def test_hard_label_task_is_cross_entropy(student, images):
    labels = torch.tensor([0, 3, 19, 7, 7, 1])
    result = HardLabelTask(student)(images, BatchTargets(classes_B=labels))
    one_hot = np.eye(NUM_CLASSES)[labels.numpy()]
    expected, _ = reference.similarity(student(images).detach().numpy(), one_hot)
    assert float(result["loss"].detach()) == pytest.approx(expected, rel=1e-5)
    assert float(result["parts"]["cross_entropy"]) == pytest.approx(expected, rel=1e-5)
    assert torch.equal(result["output"], student(images))


@pytest.mark.parametrize("smoothing", [0.1, 1.0])
def test_label_smoothing_is_timms(student, images, smoothing):
    labels = torch.tensor([0, 3, 19, 7, 7, 1])
    task = HardLabelTask(student, smoothing=smoothing)
    loss = task(images, BatchTargets(classes_B=labels))["loss"].detach()
    smooth = (1 - smoothing) * np.eye(NUM_CLASSES)[labels.numpy()] + smoothing / NUM_CLASSES
    expected, _ = reference.similarity(student(images).detach().numpy(), smooth)
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    if smoothing < 1:
        of_timm = LabelSmoothingCrossEntropy(smoothing)(student(images), labels)
        assert loss.item() == pytest.approx(of_timm.item(), rel=1e-5)


@pytest.mark.parametrize("temperature", [0.5, 4.0])
def test_student_temperature_divides_the_logits_of_the_similarity_alone(
    student, images, temperature
):
    """CE(logits / T, q), as in FKD's train_FKD.py."""
    targets = BatchTargets(labels_of(torch.randn(6, NUM_CLASSES), 5), classes_B=torch.arange(6))
    settings = {"hard_label_weight": 0.25, "student_temperature": temperature}
    parts = DistillTask(student, **settings)(images, targets)["parts"]
    plain = DistillTask(student, hard_label_weight=0.25)(images, targets)["parts"]
    logits = student(images).detach().numpy().astype(np.float64) / temperature
    expected, _ = reference.similarity(logits, targets.soft_labels.to_dense().numpy())
    assert parts["similarity_loss"].item() == pytest.approx(expected, rel=1e-5)
    assert parts["hard_label_loss"] == plain["hard_label_loss"]
    assert parts["similarity_loss"] != plain["similarity_loss"]


# --- what the discriminator is shown ------------------------------------------------------------


def online_answer(*, num_classes: int = NUM_CLASSES, num_rows: int = 6) -> BatchTargets:
    """Return an answer as OnlineTeachers gives it: dense, with the mean logits of two teachers."""
    logits_TBC = 2 * torch.randn(2, num_rows, num_classes)
    probs_BC, mean_logits_BC = combine(logits_TBC)
    classes_B = torch.arange(num_rows) % num_classes
    return BatchTargets(top_k(probs_BC, num_classes), classes_B, mean_logits_BC)


def shown_rows(task: DistillTask, images: Tensor, *args: Any) -> tuple[np.ndarray, np.ndarray]:
    """Return the (student's, teachers') rows that the task shows its discriminator, float64."""
    rows: list[Tensor] = []
    hook = task.discriminator.register_forward_pre_hook(lambda _, inputs: rows.extend(inputs))
    task(images, *args)
    hook.remove()
    student, teacher = (side.detach().double().numpy() for side in rows[0].chunk(2))
    return student, teacher


@pytest.mark.parametrize("shown", ["logits", None])
def test_logits_are_the_students_and_the_teachers_mean_logits(student, images, shown):
    targets = online_answer()
    task = DistillTask(student, Discriminator(NUM_CLASSES), discriminator_input=shown)
    rows = shown_rows(task, images, targets)
    np.testing.assert_array_equal(rows[0], student(images).detach().numpy())
    np.testing.assert_array_equal(rows[1], targets.mean_logits_BC.numpy())


@pytest.mark.parametrize("online", [True, False])
def test_log_probs_are_both_sides_through_the_labels_top_k(student, images, online):
    targets = (
        online_answer() if online else BatchTargets(labels_of(2 * torch.randn(6, NUM_CLASSES), 5))
    )
    shown = "log-probs" if online else None
    task = DistillTask(student, Discriminator(NUM_CLASSES), discriminator_input=shown)
    rows = shown_rows(task, images, targets)
    labels, logits = targets.soft_labels, student(images).detach().numpy()
    probs = reference.dense(
        labels.indices_NK.numpy(), labels.probs_NK.numpy(), labels.rest_N.numpy(), NUM_CLASSES
    )
    expected = reference.compress_top_k(logits, labels.indices_NK.numpy())
    np.testing.assert_allclose(rows[0], expected, rtol=1e-5)
    np.testing.assert_allclose(rows[1], np.log(probs), rtol=1e-5)


@pytest.mark.parametrize("online", [True, False])
def test_probs_are_the_students_softmax_and_the_recovered_label(student, images, online):
    targets = (
        online_answer() if online else BatchTargets(labels_of(2 * torch.randn(6, NUM_CLASSES), 5))
    )
    task = DistillTask(student, Discriminator(NUM_CLASSES), discriminator_input="probs")
    rows = shown_rows(task, images, targets)
    labels, logits = targets.soft_labels, student(images).detach().numpy()
    probs = reference.dense(
        labels.indices_NK.numpy(), labels.probs_NK.numpy(), labels.rest_N.numpy(), NUM_CLASSES
    )
    np.testing.assert_allclose(rows[0], reference.softmax(logits), rtol=1e-5)
    np.testing.assert_allclose(rows[1], probs, rtol=1e-5)


# --- stored logits --------------------------------------------------------------------------------

ENCODINGS = {
    "rate": Encoding(NUM_CLASSES, rate=1e-2, logits=True),
    "curve": Encoding(NUM_CLASSES, topk=5, logits=True),
    "float16": Encoding(NUM_CLASSES, "float16", topk=5, logits=True),
    "dense": Encoding(NUM_CLASSES, "float32", topk=NUM_CLASSES, logits=True),
}


def stored_answer(made: Made, *, with_logits: bool = True) -> BatchTargets:
    """Return the answer for six images of a set, as a run gets it."""
    source = ["an image of no label", *made.keys]
    targets = StoredLabels(LabelSet.open(made.folder), source, [0] * 6, seed=0)
    batch_targets = targets.batch([2, 1, 5, 3, 4, 2], [0, 1, 0, 1, 1, 1], torch.empty(0))
    return batch_targets if with_logits else dataclasses.replace(batch_targets, kept_logits=None)


def ids_of(targets: BatchTargets) -> list[list[int]]:
    kept = targets.soft_labels.kept()
    pairs = zip(kept.indices_NK, kept.is_kept_NK, strict=True)
    return [ids[is_kept].tolist() for ids, is_kept in pairs]


@pytest.mark.parametrize("name", ENCODINGS)
@pytest.mark.parametrize("shown", ["logits", None])
def test_the_discriminator_is_shown_the_logits_that_a_set_keeps(
    tmp_path, student, images, name, shown
):
    made = make_set(tmp_path, ENCODINGS[name], num_views=2)
    targets = stored_answer(made)
    task = DistillTask(student, Discriminator(NUM_CLASSES), discriminator_input=shown)
    of_student, of_teachers = shown_rows(task, images, targets)
    logits = student(images).detach().numpy()
    np.testing.assert_allclose(
        of_student, reference.compress_logits(logits, ids_of(targets)), rtol=1e-5, atol=1e-6
    )
    # the teachers' rows are those of the set, all others at one number
    dense = made.rows.logits.to_dense(made.rows.labels.kept(), NUM_CLASSES).numpy()
    order = [2, 1, 8, 5, 7, 3]  # positions and views in the order of the set
    np.testing.assert_array_equal(of_teachers, dense[order])
    _, mean_logits = ensemble_outputs(10, NUM_CLASSES, num_views=2)
    expected = reference.compress_logits(mean_logits.numpy()[order], ids_of(targets))
    is_exact_NC = np.ones(expected.shape, bool)
    if ENCODINGS[name].has_fitted_logits:  # but for the classes kept: a line
        is_exact_NC = ~targets.soft_labels.kept().mask(NUM_CLASSES).numpy()
        assert np.abs(of_teachers - expected)[~is_exact_NC].mean() < 1.0
    np.testing.assert_allclose(
        of_teachers[is_exact_NC], expected[is_exact_NC], rtol=2e-3, atol=2e-3
    )


@pytest.mark.parametrize("name", ENCODINGS)
def test_log_probs_are_shown_where_asked_for_though_the_set_keeps_logits(
    tmp_path, student, images, name
):
    made = make_set(tmp_path, ENCODINGS[name], num_views=2)
    asked = DistillTask(student, Discriminator(NUM_CLASSES), discriminator_input="log-probs")
    left = DistillTask(student, Discriminator(NUM_CLASSES))
    targets = stored_answer(made)
    rows = shown_rows(asked, images, targets)
    logits = student(images).detach().numpy()
    floor = reference.MIN_LOG
    expected = reference.compress_top_k(logits, ids_of(targets))
    np.testing.assert_allclose(rows[0], np.maximum(expected, floor), rtol=1e-4, atol=1e-5)
    with np.errstate(divide="ignore"):
        of_labels = np.log(targets.soft_labels.to_dense().double().numpy())
    np.testing.assert_allclose(rows[1], np.maximum(of_labels, floor), rtol=1e-5, atol=1e-6)
    without = shown_rows(left, images, stored_answer(made, with_logits=False))
    assert all(np.array_equal(a, b) for a, b in zip(rows, without, strict=True))


@pytest.mark.parametrize("variant", VARIANTS)
def test_with_everything_kept_a_set_teaches_as_the_teachers_themselves(
    tmp_path, student, images, variant
):
    probs_BC, mean_logits_BC = ensemble_outputs(10, NUM_CLASSES)
    mean_logits_BC = mean_logits_BC.half().float()  # what float16 keeps is then the same
    made = make_set(tmp_path, ENCODINGS["dense"], num_views=2, outputs_N=(probs_BC, mean_logits_BC))
    stored, order = stored_answer(made), [2, 1, 8, 5, 7, 3]
    online = BatchTargets(
        SoftLabels.from_dense(probs_BC[order]), stored.classes_B, mean_logits_BC[order]
    )
    task = DistillTask(student, Discriminator(NUM_CLASSES, variant))
    seen = []
    for targets in (stored, online):
        task.zero_grad()
        rows = shown_rows(task, images, targets)
        result = task(images, targets)
        result["loss"].backward()
        grads = [parameter.grad.clone() for parameter in task.parameters()]
        seen.append((rows, [result["loss"].detach(), *result["parts"].values(), *grads]))
    (rows, numbers), (online_rows, online_numbers) = seen
    assert all(np.array_equal(a, b) for a, b in zip(rows, online_rows, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(numbers, online_numbers, strict=True))


@pytest.mark.parametrize(
    ("encoding", "tolerance"),
    [
        (Encoding(12, topk=5, logits=True), 2e-3),
        (Encoding(12, rate=1e-5, logits=True), 0.2),  # a line, over a curve
    ],
)
def test_a_student_that_equals_its_teacher_shows_the_rows_that_a_set_keeps(
    images, encoding, tolerance
):
    logits = images.flatten(1)  # twelve classes
    rows = encoding.encode(torch.softmax(logits, 1), logits)
    task = DistillTask(nn.Flatten(), Discriminator(12))
    of_student, of_teachers = shown_rows(
        task, images, BatchTargets(rows.labels, kept_logits=rows.logits)
    )
    assert np.abs(of_student - of_teachers).mean(axis=1).max() < tolerance


# --- the channel, and what the discriminator would learn without it -----------------------------


def learned_accuracy(show: Callable[[Tensor, SoftLabels], tuple[Tensor, Tensor]]) -> float:
    """Train a discriminator 300 steps on a student that equals its only teacher; return how often
    it is right about rows that it has not seen.
    """
    return max(map(functools.partial(_learned_accuracy, show), range(3)))


def _learned_accuracy(
    show: Callable[[Tensor, SoftLabels], tuple[Tensor, Tensor]], seed: int
) -> float:
    num_classes, k = 50, 5
    torch.manual_seed(seed)  # some initialisations have too many dead units to learn from
    discriminator = Discriminator(num_classes)
    optimizer = torch.optim.SGD(discriminator.parameters(), lr=0.05, momentum=0.9)
    generator = torch.Generator().manual_seed(0)

    def step(num_rows: int) -> tuple[Tensor, Tensor]:
        logits = 3 * torch.randn(num_rows, num_classes, generator=generator)
        labels = top_k(torch.softmax(logits, 1), k).rounded(torch.float16)
        return discriminator_loss(discriminator, *show(logits, labels))

    for _ in range(300):
        loss, _ = step(64)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        return float(step(1000)[1])


@pytest.mark.slow
def test_through_the_channel_nothing_tells_a_student_from_the_teacher_it_equals():
    def through_the_task(logits: Tensor, labels: SoftLabels) -> tuple[Tensor, Tensor]:
        task = DistillTask(nn.Identity(), Discriminator(labels.num_classes))
        student, teacher = shown_rows(task, logits, BatchTargets(labels))
        return torch.from_numpy(student).float(), torch.from_numpy(teacher).float()

    assert learned_accuracy(through_the_task) == pytest.approx(0.5, abs=0.03)


def test_without_the_channel_the_compression_gives_the_student_away():
    def plain(logits: Tensor, labels: SoftLabels) -> tuple[Tensor, Tensor]:
        return torch.log_softmax(logits, 1), labels.to_dense().log()

    assert learned_accuracy(plain) > 0.7


# --- the ratio of the gradients -----------------------------------------------------------------


def on_logits(shown: str, logits: np.ndarray, indices: np.ndarray, grad: np.ndarray) -> np.ndarray:
    """Take a gradient on the rows that the discriminator is shown back to the student's logits."""
    probs = reference.softmax(logits)
    if shown == "logits":
        return grad
    if shown == "probs":  # ds = p (g - sum p g)
        return probs * (grad - (probs * grad).sum(1, keepdims=True))
    # kept: ds = g - p sum g; others share the sum of their g by their share of the rest
    kept = np.zeros_like(probs, dtype=bool)
    np.put_along_axis(kept, indices, True, axis=1)
    rest = np.where(kept, 0.0, probs)
    share = rest / np.maximum(rest.sum(1, keepdims=True), 1e-300)
    spread = share * np.where(kept, 0.0, grad).sum(1, keepdims=True)
    return np.where(kept, grad, spread) - probs * grad.sum(1, keepdims=True)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    ("shown", "k", "weight", "hard"),
    [
        ("logits", NUM_CLASSES, 1.0, 0.0),
        ("log-probs", NUM_CLASSES, 0.25, 0.0),
        ("log-probs", 5, 1.0, 0.0),
        ("probs", 5, 8.0, 0.0),
        ("logits", NUM_CLASSES, 1.0, 0.5),
    ],
)
def test_gradient_ratio_is_that_of_the_two_terms_as_they_are_weighted(
    student, images, variant, shown, k, weight, hard
):
    targets = online_answer()
    if k < NUM_CLASSES:
        targets = BatchTargets(labels_of(2 * torch.randn(6, NUM_CLASSES), k), targets.classes_B)
    discriminator = Discriminator(NUM_CLASSES, variant)
    task = DistillTask(
        student,
        discriminator,
        discriminator_weight=weight,
        discriminator_input=shown,
        hard_label_weight=hard,
    )
    rows = shown_rows(task, images, targets)
    redraw_dead_outputs(
        discriminator, torch.from_numpy(rows[0]).float()
    )  # to the student: no gradient otherwise
    result = task(images, targets)
    assert GRADIENT_RATIO not in result["parts"], "it is measured on the way back"
    result["loss"].backward()

    layers = [
        (layer.weight.detach().numpy(), layer.bias.detach().numpy())
        for layer in discriminator.layers
        if isinstance(layer, nn.Linear)
    ]
    kind = "official" if variant == "official" else "paper"
    grad_rows = reference.discriminate(layers, *rows, variant=kind).grad_student
    logits, labels = student(images).detach().numpy(), targets.soft_labels
    probs = reference.dense(
        labels.indices_NK.numpy(), labels.probs_NK.numpy(), labels.rest_N.numpy(), NUM_CLASSES
    )
    one_hot = np.eye(NUM_CLASSES)[targets.classes_B.numpy()]
    of_labels = (1 - hard) * reference.similarity(logits, probs)[1]
    of_labels += hard * reference.similarity(logits, one_hot)[1]
    back = weight * on_logits(shown, logits, labels.indices_NK.numpy(), grad_rows)
    expected = np.linalg.norm(back) / np.linalg.norm(of_labels)
    assert expected > 1e-6
    assert float(result["parts"][GRADIENT_RATIO]) == pytest.approx(expected, rel=1e-3)
    assert not result["parts"][GRADIENT_RATIO].requires_grad


def dead(variant: Variant) -> Discriminator:
    """Return a discriminator with a hidden layer that no row wakes."""
    discriminator = Discriminator(NUM_CLASSES, variant)
    with torch.no_grad():
        discriminator.layers[2].bias.fill_(-1e4)
    return discriminator


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradient_ratio_of_a_dead_discriminator_is_0(student, images, variant):
    result = DistillTask(student, dead(variant))(images, online_answer())
    result["loss"].backward()
    assert float(result["parts"][GRADIENT_RATIO]) == 0.0


def test_gradient_ratio_of_a_weight_of_0_is_0(student, images):
    task = DistillTask(student, Discriminator(NUM_CLASSES), discriminator_weight=0.0)
    result = task(images, online_answer())
    result["loss"].backward()
    assert float(result["parts"][GRADIENT_RATIO]) == 0.0


def test_gradient_ratio_of_a_perfect_student_is_finite(images):
    """Its similarity gradient is 0 to the last bit: even logits and even labels."""
    student = nn.Sequential(nn.Flatten(), nn.Linear(12, 16))
    nn.init.zeros_(student[1].weight)
    nn.init.zeros_(student[1].bias)
    even = top_k(torch.full((6, 16), 1 / 16), 16)
    task = DistillTask(student, Discriminator(16))
    result = task(images, BatchTargets(even, mean_logits_BC=torch.randn(6, 16)))
    result["loss"].backward()
    assert torch.isfinite(result["parts"][GRADIENT_RATIO])
    assert float(result["parts"][GRADIENT_RATIO]) > 1e3


def test_a_step_without_gradients_has_no_ratio_and_no_error(student, images):
    task = DistillTask(student, Discriminator(NUM_CLASSES))
    with torch.no_grad():
        result = task(images, online_answer())
    assert GRADIENT_RATIO not in result["parts"]


# --- label temperature, hard labels, mixtures ---------------------------------------------------


@pytest.mark.parametrize("temperature", [0.5, 2.0, 4.0])
@pytest.mark.parametrize("k", [5, NUM_CLASSES])
def test_temperature_softens_the_labels_of_the_similarity_and_not_of_the_discriminator(
    student, images, temperature, k
):
    labels = labels_of(2 * torch.randn(6, NUM_CLASSES), k)
    targets, discriminator = BatchTargets(labels), Discriminator(NUM_CLASSES)
    task = DistillTask(student, discriminator, label_temperature=temperature)
    similarity = float(task(images, targets)["parts"]["similarity_loss"])
    probs = reference.dense(
        labels.indices_NK.numpy(), labels.probs_NK.numpy(), labels.rest_N.numpy(), NUM_CLASSES
    )
    raised = probs ** (1 / temperature)
    raised /= raised.sum(axis=1, keepdims=True)
    logits = student(images).detach().numpy()
    expected, plain = (reference.similarity(logits, q)[0] for q in (raised, probs))
    assert similarity == pytest.approx(expected, rel=1e-5)
    assert abs(expected - plain) > 1e-3
    np.testing.assert_array_equal(
        shown_rows(task, images, targets),
        shown_rows(DistillTask(student, discriminator), images, targets),
    )


@pytest.mark.parametrize("weight", [0.25, 1.0])
def test_hard_label_weight_takes_so_much_from_the_soft_labels(student, images, weight):
    targets, discriminator = online_answer(), Discriminator(NUM_CLASSES)
    plain = DistillTask(student, discriminator)(images, targets)["parts"]
    result = DistillTask(student, discriminator, hard_label_weight=weight)(images, targets)
    one_hot = np.eye(NUM_CLASSES)[targets.classes_B.numpy()]
    hard, _ = reference.similarity(student(images).detach().numpy(), one_hot)
    assert float(result["parts"]["hard_label_loss"]) == pytest.approx(hard, rel=1e-5)
    expected = (
        (1 - weight) * float(plain["similarity_loss"])
        + weight * hard
        + float(plain["discriminator_loss"])
    )
    assert float(result["loss"].detach()) == pytest.approx(expected, rel=1e-5)
    assert float(result["parts"]["similarity_loss"]) == float(plain["similarity_loss"])
    assert "hard_label_loss" not in plain


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_mixture_weighs_every_term_of_both_answers_by_area(student, images, share, variant):
    targets = BatchTargets(labels_of(2 * torch.randn(6, NUM_CLASSES), 5), torch.arange(6))
    partner = targets.rows(torch.tensor([2, 0, 1, 5, 3, 4]))
    task = DistillTask(
        student,
        Discriminator(NUM_CLASSES, variant),
        discriminator_weight=0.5,
        hard_label_weight=0.2,
    )
    own, other = (task(images, a) for a in (targets, partner))
    mixed = task(images, targets, Mixture(partner=partner, lam=share))
    assert abs(float((own["loss"] - other["loss"]).detach())) > 1e-3
    for name, part in mixed["parts"].items():
        expected = share * own["parts"][name] + (1 - share) * other["parts"][name]
        assert float(part) == pytest.approx(float(expected), rel=1e-5), name
    expected = share * own["loss"] + (1 - share) * other["loss"]
    assert float(mixed["loss"].detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    assert set(mixed["parts"]) == set(own["parts"])


def test_gradient_of_a_mixture_is_that_of_both_answers_by_area(student, images):
    targets = BatchTargets(labels_of(2 * torch.randn(6, NUM_CLASSES), 5))
    partner = targets.rows(torch.tensor([2, 0, 1, 5, 3, 4]))
    task = DistillTask(student, Discriminator(NUM_CLASSES))

    def gradient(*args: Any) -> Tensor:
        task.zero_grad()
        task(images, *args)["loss"].backward()
        return student[1].weight.grad.clone()

    expected = 0.3 * gradient(targets) + 0.7 * gradient(partner)
    torch.testing.assert_close(gradient(targets, Mixture(partner=partner, lam=0.3)), expected)


ORDER = torch.tensor([2, 0, 1, 5, 3, 4])


def gradient_of_logits(task: Any, images: Tensor, *args: Any) -> tuple[float, np.ndarray]:
    """Return the loss of a task and its gradient by the bias, the sum over the rows."""
    task.zero_grad()
    result = task(images, *args)
    result["loss"].backward()
    return float(result["loss"].detach()), task.student[1].bias.grad.numpy()


@pytest.mark.parametrize("lam", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("k", [5, NUM_CLASSES])
def test_a_mixture_of_soft_labels_is_the_loss_of_the_mixed_label(student, images, lam, k):
    labels = labels_of(2 * torch.randn(6, NUM_CLASSES), k)
    targets, task = BatchTargets(labels), DistillTask(student)
    mixture = Mixture(partner=targets.rows(ORDER), lam=lam)
    loss, grad = gradient_of_logits(task, images, targets, mixture)
    probs = reference.dense(
        labels.indices_NK.numpy(), labels.probs_NK.numpy(), labels.rest_N.numpy(), NUM_CLASSES
    )
    mixed = reference.blended(probs, ORDER.numpy(), lam)
    expected, grad_NC = reference.similarity(student(images).detach().numpy(), mixed)
    assert loss == pytest.approx(expected, rel=1e-5)
    np.testing.assert_allclose(grad, grad_NC.sum(axis=0), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("lam", [0.0, 0.3, 1.0])
def test_a_mixture_of_class_ids_is_timms_soft_target(student, images, lam, smoothing):
    classes_B = torch.randint(NUM_CLASSES, (6,))
    targets, task = BatchTargets(classes_B=classes_B), HardLabelTask(student, smoothing=smoothing)
    order_B = torch.arange(6).flip(0)  # timm's
    mixture = Mixture(partner=targets.rows(order_B), lam=lam)
    loss, grad = gradient_of_logits(task, images, targets, mixture)
    target_BC = mixup_target(classes_B, NUM_CLASSES, lam, smoothing)
    logits_BC = student(images)
    timms = SoftTargetCrossEntropy()(logits_BC, target_BC)
    (timms_grad,) = torch.autograd.grad(timms, student[1].bias)
    assert loss == pytest.approx(float(timms.detach()), rel=1e-5)
    np.testing.assert_allclose(grad, timms_grad.numpy(), rtol=1e-4, atol=1e-6)
    one_hot = np.eye(NUM_CLASSES)[classes_B.numpy()] * (1 - smoothing) + smoothing / NUM_CLASSES
    mixed = reference.blended(one_hot, order_B.numpy(), lam)
    expected, grad_NC = reference.similarity(logits_BC.detach().numpy(), mixed)
    assert loss == pytest.approx(expected, rel=1e-5)
    np.testing.assert_allclose(grad, grad_NC.sum(axis=0), rtol=1e-4, atol=1e-6)


# --- before the first step ----------------------------------------------------------------------


@pytest.fixture
def classifier() -> Classifier:
    """A student with batch normalisation, in train mode as the loop has it."""
    return create_classifier("test_resnet", num_classes=NUM_CLASSES, pretrained=False).train()


PICTURES = torch.randint(
    0, 256, (6, 3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8
)


@pytest.mark.parametrize("variant", ["paper", "adversarial"])
@pytest.mark.parametrize("online", [True, False])
def test_a_dead_discriminator_is_redrawn_and_that_is_said(classifier, variant, online):
    targets = online_answer() if online else BatchTargets(labels_of(torch.randn(6, NUM_CLASSES), 5))
    task = DistillTask(classifier, dead(variant))
    said = task.prepare(PICTURES, targets)
    assert re.fullmatch(r"1 of the discriminator's outputs .*; redrawn \d+ times", said)
    rows = shown_rows(task, PICTURES, targets)
    both = torch.from_numpy(np.concatenate(rows)).float()
    assert num_dead_outputs(task.discriminator, both) == 0
    assert task.prepare(PICTURES, targets) is None


def test_the_official_discriminators_dead_outputs_are_kept_and_that_is_said(classifier):
    discriminator = dead("official")
    before = [parameter.clone() for parameter in discriminator.parameters()]
    said = DistillTask(classifier, discriminator).prepare(PICTURES, online_answer())
    assert said.startswith("2 of the discriminator's outputs")
    assert said.endswith("kept, as the official code does")
    assert all(map(torch.equal, before, discriminator.parameters()))


def test_a_discriminator_that_is_alive_is_left_as_it_is_and_nothing_is_said(classifier):
    discriminator, targets = Discriminator(NUM_CLASSES), online_answer()
    redraw_dead_outputs(
        discriminator, torch.cat([classifier.eval()(PICTURES).detach(), targets.mean_logits_BC])
    )
    before = [parameter.clone() for parameter in discriminator.parameters()]
    assert DistillTask(classifier, discriminator).prepare(PICTURES, targets) is None
    assert all(map(torch.equal, before, discriminator.parameters()))


@pytest.mark.parametrize("training", [True, False])
def test_the_student_is_only_looked_at(classifier, training):
    """Weights, batch-norm statistics, gradients, mode: all as before."""
    classifier.train(training)
    before = {name: value.clone() for name, value in classifier.state_dict().items()}
    DistillTask(classifier, dead("paper")).prepare(PICTURES, online_answer())
    assert all(torch.equal(before[n], value) for n, value in classifier.state_dict().items())
    assert all(module.training is training for module in classifier.modules())
    assert all(parameter.grad is None for parameter in classifier.parameters())
    assert any("running_mean" in name for name in before)


def test_preparation_is_in_float32_under_autocast_and_the_first_step_learns(classifier):
    discriminator = Discriminator(NUM_CLASSES)
    task, targets = DistillTask(classifier, discriminator), online_answer()
    seen: list[torch.dtype] = []
    for module in (classifier, discriminator):
        module.register_forward_hook(lambda _, inputs, output: seen.append(output.dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        task.prepare(PICTURES, targets)
        assert set(seen) == {torch.float32}
        loss = task(PICTURES, targets)["loss"]
    loss.backward()
    assert all(parameter.grad is not None for parameter in classifier.parameters())


def test_without_a_discriminator_there_is_nothing_to_prepare(student, images):
    assert DistillTask(student).prepare(images, online_answer()) is None
    assert HardLabelTask(student).prepare(images, online_answer()) is None


def test_a_very_low_temperature_leaves_the_likeliest_class_and_no_nan() -> None:
    even = torch.full((1, 1000), 1e-3)
    np.testing.assert_allclose(tempered(even, 0.05).numpy(), 1e-3, rtol=1e-5)
    sharp = tempered(torch.tensor([[0.3, 0.2, 0.5, 0.0]]), 0.01)
    np.testing.assert_allclose(sharp.numpy(), [[0.0, 0.0, 1.0, 0.0]], atol=1e-6)
