"""mealv2.task: what a step computes, and where its gradients go."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import reference
from mealv2.discriminator import Discriminator
from mealv2.soft_labels import SoftLabels, top_k
from mealv2.targets import Answer
from mealv2.task import DistillTask, HardLabelTask

NUM_CLASSES = 20


@pytest.fixture(autouse=True)
def _seeded_weights():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


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
        reference.through_top_k(logits, indices),
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
        images, Answer(labels)
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
    result = DistillTask(student)(images, Answer(labels))
    expected, _, _ = distillation(student, images, labels, Discriminator(NUM_CLASSES))
    assert float(result["loss"].detach()) == pytest.approx(expected, rel=1e-5)
    assert set(result["parts"]) == {"similarity_loss"}


def test_one_backward_reaches_student_and_discriminator_and_not_the_labels(student, images):
    labels = labels_of(torch.randn(6, NUM_CLASSES), 5)
    task = DistillTask(student, Discriminator(NUM_CLASSES))
    task(images, Answer(labels))["loss"].backward()
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
        result = task(images, Answer(labels))
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
    parts = DistillTask(student, Discriminator(NUM_CLASSES))(images, Answer(labels))["parts"]
    assert float(parts["discriminator_accuracy"]) == 0.5


def test_a_label_rounded_to_nothing_gives_a_finite_loss(student, images):
    certain = SoftLabels(
        torch.zeros(6, 1, dtype=torch.int64), torch.ones(6, 1), torch.zeros(6), NUM_CLASSES
    )
    task = DistillTask(student, Discriminator(NUM_CLASSES))
    loss = task(images, Answer(certain))["loss"]
    loss.backward()
    assert torch.isfinite(loss)
    assert all(torch.isfinite(parameter.grad).all() for parameter in task.parameters())


def test_the_discriminator_sees_no_probability_below_the_smallest_float16(images):
    rows: list[Tensor] = []
    discriminator = Discriminator(NUM_CLASSES)
    discriminator.register_forward_pre_hook(lambda _, inputs: rows.extend(inputs))
    logits = torch.zeros(6, NUM_CLASSES)
    logits[:, 0] = 100.0
    DistillTask(nn.Identity(), discriminator)(logits, Answer(labels_of(logits, 3)))
    smallest = float(np.log(np.finfo(np.float16).smallest_subnormal.astype(np.float64)))
    assert rows[0].shape == (12, NUM_CLASSES)
    assert float(rows[0][:, 0].min()) == pytest.approx(0.0, abs=1e-6)
    np.testing.assert_allclose(rows[0][:, 1:].numpy(), smallest, rtol=1e-6)


def test_parts_are_detached(student, images):
    labels = labels_of(torch.randn(6, NUM_CLASSES), 5)
    results = (
        DistillTask(student, Discriminator(NUM_CLASSES))(images, Answer(labels)),
        HardLabelTask(student)(images, Answer(classes_B=torch.zeros(6, dtype=torch.int64))),
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
        result = DistillTask(student, discriminator)(images, Answer(labels))
    assert seen == [torch.float32] * 2
    assert result["loss"].dtype == result["output"].dtype == torch.float32


def test_hard_label_task_is_cross_entropy(student, images):
    labels = torch.tensor([0, 3, 19, 7, 7, 1])
    result = HardLabelTask(student)(images, Answer(classes_B=labels))
    one_hot = np.eye(NUM_CLASSES)[labels.numpy()]
    expected, _ = reference.similarity(student(images).detach().numpy(), one_hot)
    assert float(result["loss"].detach()) == pytest.approx(expected, rel=1e-5)
    assert float(result["parts"]["cross_entropy"]) == pytest.approx(expected, rel=1e-5)
    assert torch.equal(result["output"], student(images))
