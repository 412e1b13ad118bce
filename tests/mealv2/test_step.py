"""The whole step of training against the float64 reference: random shapes, every variant."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch import nn

import reference
from cases import mostly_slow
from mealv2.models.discriminator import Discriminator
from mealv2.models.ensemble import TeacherEnsemble
from mealv2.soft_labels import keep_logits, top_k
from mealv2.targets import BatchTargets, OnlineTeachers
from mealv2.task import DistillTask

NUM_FEATURES = 5
quickly = hypothesis_settings(max_examples=60, deadline=None, derandomize=True, database=None)


def layers_of(module: nn.Module) -> reference.Layers:
    return [
        (layer.weight.detach().double().numpy().copy(), layer.bias.detach().double().numpy().copy())
        for layer in module.modules()
        if isinstance(layer, nn.Linear)
    ]


def near(actual: np.ndarray, expected: np.ndarray, what: str) -> None:
    """Equal to 1e-4 of each value, or 1e-5 of the largest one where float32 sums have cancelled."""
    atol = 1e-5 * float(np.abs(expected).max(initial=0.0))
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=atol, err_msg=what)


@st.composite
def steps(draw: st.DrawFn) -> dict[str, Any]:
    """Draw a shape, an ensemble's sureness and the settings of a step."""
    online = draw(st.booleans())
    num_classes = draw(st.one_of(st.integers(2, 12), st.integers(2, 3000)))
    shown = draw(st.sampled_from(["log-probs", "probs", "logits"]))
    return {
        "num_classes": num_classes,
        "num_teachers": draw(st.integers(1, 4)),
        "batch_size": draw(st.integers(1, 5)),
        # online labels are dense
        "k": num_classes if online else draw(st.integers(1, min(20, num_classes))),
        "online": online,
        "scale": draw(st.sampled_from([0.3, 1.5, 5.0])),
        "seed": draw(st.integers(0, 2**31)),
        "settings": reference.Settings(
            variant=draw(st.sampled_from(["paper", "official", "adversarial", None])),
            shown=shown,
            weight=draw(st.sampled_from([1.0, 0.3])),
            temperature=draw(st.sampled_from([1.0, 2.0])),
            hard_weight=draw(st.sampled_from([0.0, 0.25, 1.0])),
            weight_decay=draw(st.sampled_from([0.0, 1e-2])),
        ),
    }


def compare(case: dict[str, Any], *, num_steps: int) -> None:
    """Do the steps with the package and with the reference; compare losses and weights."""
    settings: reference.Settings = case["settings"]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(case["seed"])
        num_classes, scale = case["num_classes"], case["scale"]
        student = nn.Linear(NUM_FEATURES, num_classes)
        teachers = [nn.Linear(NUM_FEATURES, num_classes) for _ in range(case["num_teachers"])]
        for teacher in teachers:
            nn.init.normal_(teacher.weight, std=scale / NUM_FEATURES**0.5)
        discriminator = None
        if settings.variant is not None:
            discriminator = Discriminator(num_classes, settings.variant)  # type: ignore[arg-type]
        batches = torch.randn(num_steps, case["batch_size"], NUM_FEATURES)
        classes = torch.randint(num_classes, (case["batch_size"],))

    task = DistillTask(
        student,
        discriminator,
        discriminator_weight=settings.weight,
        discriminator_input=settings.shown,  # type: ignore[arg-type]
        label_temperature=settings.temperature,
        hard_label_weight=settings.hard_weight,
    )
    optimizer = torch.optim.SGD(
        task.parameters(),
        lr=settings.lr,
        momentum=settings.momentum,
        weight_decay=settings.weight_decay,
    )
    targets = OnlineTeachers(TeacherEnsemble(teachers), classes.tolist())
    reference_layers = layers_of(student), layers_of(discriminator or nn.Identity())
    still = [(0.0 * weight, 0.0 * bias) for layers in reference_layers for weight, bias in layers]
    state = reference.State(*reference_layers, still)

    for images in batches:
        batch_targets = targets.batch(range(len(images)), [0] * len(images), images)
        assert batch_targets.soft_labels is not None
        if not case["online"]:
            soft = top_k(batch_targets.soft_labels.to_dense(), case["k"])
            assert batch_targets.mean_logits_BC is not None
            stored = keep_logits(batch_targets.mean_logits_BC, soft.kept())
            batch_targets = BatchTargets(soft, classes, kept_logits=stored)
        result = task(images, batch_targets)
        optimizer.zero_grad()
        result["loss"].backward()
        optimizer.step()

        of_teachers = np.stack(
            [images.double().numpy() @ w.T + b for w, b in map(_only, map(layers_of, teachers))]
        )
        losses, state = reference.whole_step(
            state, images.double().numpy(), of_teachers, classes.numpy(), case["k"], settings
        )
        actual = {"loss": result["loss"].detach(), **result["parts"]}
        assert actual.keys() - {"discriminator_accuracy"} == losses.keys()
        for name, expected in losses.items():
            assert float(actual[name]) == pytest.approx(expected, rel=1e-4, abs=1e-7), name
        moved = [*state.student, *state.discriminator]
        mine = [*layers_of(student), *layers_of(discriminator or nn.Identity())]
        for position, (here, there) in enumerate(zip(mine, moved, strict=True)):
            near(here[0], there[0], f"weight {position}")
            near(here[1], there[1], f"bias {position}")


def _only(layers: reference.Layers) -> tuple[np.ndarray, np.ndarray]:
    (layer,) = layers
    return layer


@quickly
@given(steps())
def test_a_step_of_random_shape_agrees_with_float64(case: dict[str, Any]) -> None:
    compare(case, num_steps=2)


@pytest.mark.parametrize("variant", mostly_slow(["paper", "official", "adversarial", None]))
@pytest.mark.parametrize(
    ("online", "shown"), [(True, "logits"), (False, "log-probs"), (False, "logits")]
)
def test_ten_steps_of_imagenets_shape_agree_with_float64(
    variant: str | None, online: bool, shown: str
) -> None:
    compare(
        {
            "num_classes": 1000,
            "num_teachers": 2,
            "batch_size": 8,
            "k": 1000 if online else 10,
            "online": online,
            "scale": 3.0,
            "seed": 5,
            "settings": reference.Settings(variant, shown),
        },
        num_steps=10,
    )
