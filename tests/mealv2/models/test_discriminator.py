"""discriminator: widths, variants, initialisation, whose gradient turns, dead outputs."""

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import reference
from conftest import linear_layers
from mealv2.losses import discriminator_loss
from mealv2.models.discriminator import (
    PLATEAUS,
    VARIANTS,
    Discriminator,
    Variant,
    num_dead_outputs,
    redraw_dead_outputs,
)

pytestmark = pytest.mark.usefixtures("seeded_weights")


def widths(discriminator: Discriminator) -> list[int]:
    layers = linear_layers(discriminator)
    return [layers[0].in_features, *(layer.out_features for layer in layers)]


def num_parameters(discriminator: Discriminator) -> int:
    return sum(parameter.numel() for parameter in discriminator.parameters())


def test_official_variant_has_127047_parameters_at_1000_classes():
    discriminator = Discriminator(1000, "official")
    assert widths(discriminator) == [1000, 125, 15, 2]
    assert num_parameters(discriminator) == 127_047


@pytest.mark.parametrize(
    ("variant", "num_classes", "expected"),
    [
        ("paper", 1000, [1000, 125, 15, 1]),
        ("paper", 512, [512, 64, 8, 1]),
        ("paper", 10, [10, 8, 8, 1]),  # never below 8
        ("paper", 2, [2, 8, 8, 1]),
        ("official", 64, [64, 8, 1, 2]),
        ("official", 10, [10, 1, 1, 2]),
        ("official", 2, [2, 1, 1, 2]),
        ("official", 21_843, [21_843, 2730, 341, 2]),
    ],
)
def test_widths_fall_by_eight_to_the_variants_floor(variant, num_classes, expected):
    assert widths(Discriminator(num_classes, variant)) == expected


@pytest.mark.parametrize("variant", ["paper", "official"])
@pytest.mark.parametrize("num_classes", [2, 10, 1000])
def test_forward_agrees_with_float64(variant, num_classes):
    discriminator = Discriminator(num_classes, variant)
    rows = 5 * torch.randn(7, num_classes, generator=torch.Generator().manual_seed(num_classes))
    weights = [
        (layer.weight.detach().numpy(), layer.bias.detach().numpy())
        for layer in linear_layers(discriminator)
    ]
    expected, _, _ = reference.discriminator_forward(
        weights, rows.numpy(), last_relu=variant == "official"
    )
    outputs = discriminator(rows)
    assert outputs.dtype == torch.float32
    np.testing.assert_allclose(outputs.detach().numpy(), expected, rtol=1e-4, atol=1e-5)


def test_only_the_official_variant_ends_in_a_relu():
    rows = 10 * torch.randn(500, 20, generator=torch.Generator().manual_seed(0))
    for variant, floor in (("paper", False), ("official", True)):
        outputs = torch.cat([Discriminator(20, variant)(rows) for _ in range(20)])
        assert (float(outputs.detach().min()) >= 0.0) is floor


def test_weights_start_uniform_within_one_over_the_root_of_the_inputs():
    for layer in linear_layers(Discriminator(1000)):
        bound = layer.in_features**-0.5
        assert float(layer.weight.detach().abs().max()) <= bound
        assert float(layer.bias.detach().abs().max()) <= bound
    first = linear_layers(Discriminator(1000))[0].weight.detach()
    assert float(first.std()) == pytest.approx(1000**-0.5 / 3**0.5, rel=0.02)


@pytest.mark.parametrize(
    ("num_classes", "variant", "reason"),
    [(10, "joint", "variant must be one of paper, official"), (1, "paper", "at least 2 classes")],
)
def test_what_makes_no_discriminator_raises_value_error(num_classes, variant, reason):
    with pytest.raises(ValueError, match=reason):
        Discriminator(num_classes, variant)


# --- adversarial: the paper's numbers, the student's gradient turned round ----------------------

ROWS = 12


def logits(num_classes: int, *, seed: int) -> Tensor:
    return 2 * torch.randn(ROWS, num_classes, generator=torch.Generator().manual_seed(seed))


def layers_of(discriminator: Discriminator) -> reference.Layers:
    return [
        (layer.weight.detach().numpy(), layer.bias.detach().numpy())
        for layer in linear_layers(discriminator)
    ]


@pytest.mark.parametrize(("variant", "sign"), [("paper", 1), ("adversarial", -1), ("official", 1)])
@pytest.mark.parametrize("num_classes", [10, 200])
def test_only_adversarial_turns_the_students_gradient_round_and_not_its_own(
    variant, sign, num_classes
):
    student, teacher = logits(num_classes, seed=1).requires_grad_(), logits(num_classes, seed=2)
    discriminator = Discriminator(num_classes, variant)
    redraw_dead_outputs(discriminator, torch.cat([student.detach(), teacher]))
    loss, accuracy = discriminator_loss(discriminator, student, teacher)
    loss.backward()
    expected = reference.discriminate(
        layers_of(discriminator),
        student.detach().numpy(),
        teacher.numpy(),
        variant="official" if variant == "official" else "paper",
    )
    assert float(loss.detach()) == pytest.approx(expected.loss, rel=1e-6)
    assert float(accuracy) == pytest.approx(expected.accuracy)
    assert np.abs(expected.grad_student).max() > 1e-4
    np.testing.assert_allclose(
        student.grad.numpy(), sign * expected.grad_student, rtol=1e-4, atol=1e-7
    )
    for layer, (weight, bias) in zip(
        linear_layers(discriminator), expected.grad_layers, strict=True
    ):
        np.testing.assert_allclose(layer.weight.grad.numpy(), weight, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(layer.bias.grad.numpy(), bias, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("variant", "direction"), [("paper", -1), ("adversarial", 1)])
def test_a_student_lowers_the_papers_loss_and_raises_the_adversarial_one(variant, direction):
    discriminator = Discriminator(50, variant)
    student, teacher = logits(50, seed=1).requires_grad_(), logits(50, seed=2)
    losses = []
    for _ in range(20):
        loss, _ = discriminator_loss(discriminator, student, teacher)
        losses.append(float(loss.detach()))
        (grad,) = torch.autograd.grad(loss, student)
        student = (student.detach() - 1.0 * grad).requires_grad_()
    assert all((after - before) * direction > 0 for before, after in pairwise(losses))


def test_the_discriminator_itself_learns_whichever_way_the_student_is_pulled():
    student, teacher = logits(50, seed=1), logits(50, seed=2)
    torch.manual_seed(0)
    paper = trained(Discriminator(50, "paper"), student, teacher, steps=50)
    torch.manual_seed(0)
    adversarial = trained(Discriminator(50, "adversarial"), student, teacher, steps=50)
    assert paper == adversarial
    assert paper[-1] < 0.5 * paper[0]


# --- dead outputs -------------------------------------------------------------------------------


def killed(variant: Variant, *, outputs: tuple[int, ...] = (), hidden: bool = False) -> Any:
    """Return a discriminator with outputs, or a hidden layer, that no row reaches."""
    discriminator = Discriminator(20, variant)
    with torch.no_grad():
        if hidden:
            linear_layers(discriminator)[1].bias.fill_(-1e4)
        for output in outputs:
            linear_layers(discriminator)[2].bias[output] = -1e4
    return discriminator


def lively(variant: Variant) -> Discriminator:
    """Return a discriminator whose outputs all react: biases far above what a ReLU cuts off."""
    discriminator = Discriminator(20, variant)
    with torch.no_grad():
        for layer in linear_layers(discriminator):
            layer.bias.fill_(100.0)
            layer.weight.abs_()
    return discriminator


@pytest.mark.parametrize(
    ("make", "dead"),
    [
        pytest.param(lambda: lively("paper"), 0, id="paper"),
        pytest.param(lambda: lively("adversarial"), 0, id="adversarial"),
        pytest.param(lambda: lively("official"), 0, id="official"),
        pytest.param(lambda: killed("paper", hidden=True), 1, id="paper, hidden layer dead"),
        pytest.param(lambda: killed("paper", outputs=(0,)), 0, id="paper's output cannot die"),
        pytest.param(lambda: killed("official", hidden=True), 2, id="official, hidden layer dead"),
        pytest.param(lambda: killed("official", outputs=(0, 1)), 2, id="official, both dead"),
    ],
)
def test_dead_outputs_are_counted(make, dead):
    assert num_dead_outputs(make(), logits(20, seed=0)) == dead


@pytest.mark.parametrize("output", [0, 1])
def test_one_dead_output_of_two_is_counted(output):
    discriminator = lively("official")
    with torch.no_grad():
        linear_layers(discriminator)[2].bias[output] = -1e6
    assert num_dead_outputs(discriminator, logits(20, seed=0)) == 1


def test_an_output_that_reacts_to_a_single_row_is_alive():
    discriminator = killed("paper", hidden=True)
    rows = torch.zeros(50, 20)
    assert num_dead_outputs(discriminator, rows) == 1
    with torch.no_grad():
        for layer in linear_layers(discriminator):
            layer.weight.fill_(1.0)
    rows[17] = 1e6
    assert num_dead_outputs(discriminator, rows) == 0


def test_counting_the_dead_leaves_no_gradient_and_works_without_grad_mode():
    discriminator = lively("official")
    with torch.no_grad():
        assert num_dead_outputs(discriminator, logits(20, seed=0)) == 0
    assert all(parameter.grad is None for parameter in discriminator.parameters())


@pytest.mark.parametrize("variant", VARIANTS)
def test_wake_redraws_until_every_output_reacts_and_says_how_often(variant):
    discriminator, rows = killed(variant, hidden=True), logits(20, seed=0)
    torch.manual_seed(4)
    redraws = redraw_dead_outputs(discriminator, rows)
    assert redraws >= 1
    assert num_dead_outputs(discriminator, rows) == 0
    # the same draws by hand
    torch.manual_seed(4)
    drawn = [Discriminator(20, variant) for _ in range(redraws)]
    assert [num_dead_outputs(d, rows) > 0 for d in drawn] == [True] * (redraws - 1) + [False]
    for ours, theirs in zip(discriminator.parameters(), drawn[-1].parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_wake_draws_as_often_as_chance_has_it_and_the_same_under_the_same_seed():
    rows = logits(20, seed=0)

    def redraws(seed: int) -> int:
        torch.manual_seed(seed)
        return redraw_dead_outputs(killed("official", outputs=(0, 1)), rows)

    often = [redraws(seed) for seed in range(20)]
    assert [redraws(seed) for seed in range(20)] == often
    assert max(often) > 1, "official widths at 20 classes die often"


def test_wake_leaves_one_that_is_alive_as_it_is():
    discriminator = lively("official")
    before = [parameter.clone() for parameter in discriminator.parameters()]
    assert redraw_dead_outputs(discriminator, logits(20, seed=0)) == 0
    assert all(map(torch.equal, before, discriminator.parameters()))


def test_draws_that_wake_nothing_end_in_a_runtime_error():
    class Stillborn(Discriminator):
        draws = 0

        def redraw(self) -> None:
            self.draws += 1

    discriminator = Stillborn(20)
    with torch.no_grad():
        linear_layers(discriminator)[1].bias.fill_(-1e4)
    with pytest.raises(RuntimeError, match="every initialisation"):
        redraw_dead_outputs(discriminator, logits(20, seed=0))
    assert discriminator.draws == 100


# --- the plateaus of the loss -------------------------------------------------------------------


def trained(
    discriminator: Discriminator, student: Tensor, teacher: Tensor, *, steps: int
) -> list[float]:
    """Train a discriminator on fixed rows; return its losses."""
    optimizer = torch.optim.SGD(discriminator.parameters(), lr=0.1, momentum=0.9)
    losses = []
    for _ in range(steps):
        loss, _ = discriminator_loss(discriminator, student, teacher)
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return losses


def separable(num_classes: int = 64) -> tuple[Tensor, Tensor]:
    """Return rows that one look at the sign tells apart."""
    return logits(num_classes, seed=1).abs(), -logits(num_classes, seed=2).abs()


def apart(variant: Variant) -> Discriminator:
    """Return a discriminator that says teacher where the rows are negative, student elsewhere."""
    discriminator = Discriminator(64, variant)
    first, second, last = linear_layers(discriminator)
    with torch.no_grad():
        for layer in (first, second, last):
            layer.weight.zero_()
            layer.bias.zero_()
        first.weight[0] = 0.1  # one hidden unit: how positive the row is
        second.weight[0, 0] = 1.0
        last.weight[0, 0] = 1.0
        if variant == "official":  # output 0 student, output 1 teacher
            last.weight[1, 0] = -1.0
            last.bias[1] = 1.0
    return discriminator


def test_plateau_of_an_official_discriminator_with_both_outputs_dead_is_ln_2():
    discriminator = killed("official", outputs=(0, 1))
    losses = trained(discriminator, logits(20, seed=1), logits(20, seed=2), steps=20)
    assert losses == pytest.approx([PLATEAUS["official"]["dead"]] * 20, abs=1e-6)
    assert PLATEAUS["official"]["dead"] == pytest.approx(np.log(2))


@pytest.mark.parametrize("dead", [0, 1])
def test_plateau_with_one_dead_output_is_three_quarters_of_ln_2(dead):
    """Whatever the other output learns: it approaches its floor of half of ln 2 from above."""
    discriminator = apart("official")
    with torch.no_grad():
        linear_layers(discriminator)[2].bias[dead] = -1e6
    losses = trained(discriminator, *separable(), steps=400)
    floor = PLATEAUS["official"]["half dead"]
    assert floor == pytest.approx(0.75 * np.log(2))
    assert min(losses) >= floor - 1e-6
    assert losses[-1] == pytest.approx(floor, abs=0.02)
    assert losses[0] > losses[-1]


def test_floor_of_a_separated_official_discriminator_is_half_of_ln_2():
    losses = trained(apart("official"), *separable(), steps=400)
    floor = PLATEAUS["official"]["floor"]
    assert floor == pytest.approx(0.5 * np.log(2))
    assert min(losses) >= floor - 1e-6
    assert losses[-1] == pytest.approx(floor, abs=0.02)
    assert losses[0] > floor + 0.05


@pytest.mark.parametrize("variant", ["paper", "adversarial"])
def test_a_separated_discriminator_of_the_paper_has_no_floor_but_zero(variant):
    losses = trained(Discriminator(64, variant), *separable(), steps=200)
    assert losses[0] == pytest.approx(PLATEAUS[variant]["chance"], abs=0.1)
    assert losses[-1] < 0.01


@pytest.mark.parametrize("variant", VARIANTS)
def test_chance_is_ln_2_for_every_variant(variant):
    """A discriminator that cannot tell: both sides are the same rows."""
    rows = logits(64, seed=1)
    losses = trained(Discriminator(64, variant), rows, rows, steps=300)
    assert losses[-1] == pytest.approx(np.log(2), abs=1e-3)
