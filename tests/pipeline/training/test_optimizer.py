"""pipeline.training.optimizer: timm's optimizers and schedules, as a run uses them."""

import io
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from torch import nn

from cases import mostly_slow
from conftest import Result
from mealv2.errors import ConfigError
from mealv2.models import create_classifier
from pipeline.config import OPTIMIZERS, FinetuneConfig
from pipeline.training.optimizer import Schedule, create_optimizer, restore_optimizer

Run = Callable[..., Result]
CPU = torch.device("cpu")


def make(**values: Any) -> FinetuneConfig:
    return FinetuneConfig(data_dir=Path("/d"), model="m", **{"lr": 0.01, "epochs": 9} | values)


def network() -> nn.Module:
    """Return convolution, normalisation and a head, laid out as on a GPU."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.AdaptiveAvgPool2d(1)]
    found = nn.Sequential(*layers, nn.Flatten(), nn.Linear(6, 4))
    return found.to(memory_format=torch.channels_last)


def spec_of(backbone: nn.Module, extra: nn.Module | None = None, lr: float = 0.25) -> Any:
    """Return what an optimizer needs of a training."""
    student = SimpleNamespace(backbone=backbone)
    return SimpleNamespace(student=student, extra={} if extra is None else {"extra": (extra, lr)})


def optimizer_of(config: FinetuneConfig, *modules: nn.Module) -> torch.optim.Optimizer:
    return create_optimizer(config, spec_of(*modules), CPU)


def train(net: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        images = torch.randn(8, 3, 6, 6, generator=generator)
        truth = torch.randint(0, 4, (8,), generator=generator)
        nn.functional.cross_entropy(net(images), truth).backward()
        optimizer.step()
        optimizer.zero_grad()


def rates(config: FinetuneConfig, *, updates: int, **settings: Any) -> list[list[float]]:
    """Return the learning rates of every update, the groups' in a row."""
    optimizer = torch.optim.SGD(groups())
    schedule = Schedule(config, optimizer, updates_per_epoch=updates)
    found = []
    for epoch in range(config.epochs):
        for step in range(updates):
            schedule.set_lr(epoch, step, **settings)
            found.append([group["lr"] for group in optimizer.param_groups])
    return found


def groups() -> list[dict[str, Any]]:
    """Return a group, one of a lower layer, and one of a discriminator."""
    one = [nn.Parameter(torch.zeros(1)) for _ in range(3)]
    scaled = {"params": [one[1]], "lr": 0.01, "lr_scale": 0.5}
    return [{"params": [one[0]], "lr": 0.01}, scaled, {"params": [one[2]], "lr": 0.25}]


# --- the optimizer ------------------------------------------------------------------------------


def test_sgd_without_flags_is_the_papers_to_the_bit() -> None:
    config, (ours, plain) = make(weight_decay=1e-2), (network(), network())
    train(ours, optimizer_of(config, ours), range(9))
    settings = {"momentum": 0.9, "weight_decay": 1e-2, "nesterov": False, "fused": True}
    train(plain, torch.optim.SGD(plain.parameters(), lr=0.01, **settings), range(9))
    assert all(map(torch.equal, ours.parameters(), plain.parameters()))


@pytest.mark.parametrize(
    "name", mostly_slow(["adamw", *sorted(OPTIMIZERS - {"adamw"}), "lookahead_adamw"])
)
def test_state_of_an_optimizer_continues_to_the_bit(name: str) -> None:
    config, net = make(opt=name, lr=1e-3, weight_decay=0.01), network()
    optimizer = optimizer_of(config, net[:4], net[4:])
    train(net, optimizer, range(5))
    file = io.BytesIO()
    torch.save({"net": net.state_dict(), "optimizer": optimizer.state_dict()}, file)
    train(net, optimizer, range(5, 12))
    file.seek(0)
    state, other = torch.load(file, weights_only=True), network()
    continued = optimizer_of(config, other[:4], other[4:])
    other.load_state_dict(state["net"])
    restore_optimizer(continued, state["optimizer"])
    train(other, continued, range(5, 12))
    assert all(map(torch.equal, net.parameters(), other.parameters()))
    assert not all(map(torch.equal, net.parameters(), network().parameters()))


def test_state_of_another_optimizer_is_not_continued() -> None:
    net = network()
    optimizer = optimizer_of(make(opt="adamw", weight_decay=0.0), net)
    with pytest.raises((ValueError, KeyError)):
        restore_optimizer(optimizer, optimizer_of(make(opt="adamw"), net, net).state_dict())


@pytest.mark.parametrize(("opt", "decays"), [("sgd", [0.5, 0.5]), ("adamw", [0.0, 0.5, 0.0, 0.5])])
def test_biases_and_norms_do_not_decay_but_with_the_papers_sgd(
    opt: str, decays: list[float]
) -> None:
    net, extra = network(), nn.Linear(2, 2)
    found = optimizer_of(make(opt=opt, weight_decay=0.5), net, extra).param_groups
    assert [group["weight_decay"] for group in found] == decays
    for group in found:
        if group["weight_decay"] == 0:
            assert {parameter.ndim for parameter in group["params"]} == {1}
    assert [g["lr"] for g in found] == [0.01] * (len(found) // 2) + [0.25] * (len(found) // 2)


@pytest.mark.parametrize("opt", ["sgd", "adamw"])
def test_layer_decay_gives_the_groups_of_timm(opt: str) -> None:
    backbone = create_classifier("test_vit", num_classes=3).backbone
    config = make(opt=opt, weight_decay=0.5, layer_decay=0.5)
    found = optimizer_of(config, backbone).param_groups
    settings = {"weight_decay": 0.5, "layer_decay": 0.5, "filter_bias_and_bn": opt != "sgd"}
    expected = create_optimizer_v2(backbone, opt, lr=0.01, **settings).param_groups
    if opt == "adamw":
        assert [len(g["params"]) for g in found] == [len(g["params"]) for g in expected]
        assert [g["weight_decay"] for g in found] == [g["weight_decay"] for g in expected]
    scales = {g["lr_scale"] for g in found}
    assert scales == {g["lr_scale"] for g in expected}
    assert max(scales) == 1.0
    assert min(scales) < 0.1


@pytest.mark.parametrize(
    ("values", "flag"),
    [
        ({"opt": "sgd", "opt_betas": (0.9, 0.99)}, "--opt-betas"),
        ({"opt": "adan", "opt_betas": (0.9, 0.99)}, "--opt-betas"),
        ({"opt": "sgd", "opt_eps": 1e-6}, "--opt-eps"),
        ({"opt": "adamw", "momentum": 0.5}, "--momentum"),
    ],
)
def test_parameter_that_an_optimizer_does_not_have_is_named(
    values: dict[str, Any], flag: str
) -> None:
    with pytest.raises(ConfigError, match=f"^{flag} has no effect with --opt {values['opt']}"):
        optimizer_of(make(**values), network())


def test_betas_and_epsilon_reach_the_optimizer() -> None:
    (group,) = optimizer_of(
        make(opt="adamw", opt_betas=(0.8, 0.88), opt_eps=0.5, weight_decay=0.0), network()
    ).param_groups
    assert (group["betas"], group["eps"]) == ((0.8, 0.88), 0.5)


# --- the schedule -------------------------------------------------------------------------------

SCHEDULES: list[dict[str, Any]] = [
    {"sched": "cosine"},
    {"sched": "cosine", "warmup_epochs": 2, "min_lr": 1e-4, "cooldown_epochs": 2},
    {"sched": "poly", "decay_rate": 0.9, "warmup_epochs": 1, "warmup_lr": 1e-3},
    {"sched": "step", "decay_epochs": 2.0, "decay_rate": 0.5},
    {"sched": "step", "decay_epochs": 1.5},
    {"sched": "multistep", "decay_milestones": (7, 3), "warmup_epochs": 2},
]


@pytest.mark.parametrize("on_updates", [False, True])
@pytest.mark.parametrize("settings", SCHEDULES, ids=str)
def test_rate_of_every_update_is_timms(settings: dict[str, Any], on_updates: bool) -> None:
    config, updates = make(**settings, sched_on_updates=on_updates), 7
    named = dict(settings)
    if "decay_milestones" in named:  # in timm a milestone has an effect from m - 1 on
        named["decay_milestones"] = [m + 1 / (updates if on_updates else 1) for m in (3, 7)]
    optimizer = torch.optim.SGD(groups())
    scheduler, _ = create_scheduler_v2(
        optimizer,
        num_epochs=config.epochs - named.pop("cooldown_epochs", 0),
        step_on_epochs=not on_updates,
        updates_per_epoch=updates,
        **named,
    )
    expected, num_updates = [], 0
    for epoch in range(config.epochs):  # as timm's train.py does
        for _ in range(updates):
            expected.append([group["lr"] for group in optimizer.param_groups])
            num_updates += 1
            scheduler.step_update(num_updates=num_updates)
        scheduler.step(epoch + 1)
    assert rates(config, updates=updates) == expected
    assert len({row[0] for row in expected}) > 2


@pytest.mark.parametrize("on_updates", [False, True])
@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"epochs": 18}, [0.01] * 10 + [0.001] * 8),
        ({"epochs": 4, "decay_milestones": (3,), "decay_rate": 0.5}, [0.01] * 3 + [0.005]),
        ({"epochs": 4, "decay_milestones": (3, 1)}, [0.01, 0.001, 0.001, 0.0001]),
        ({"epochs": 3, "sched": "constant"}, [0.01] * 3),
    ],
)
def test_rate_falls_at_the_beginning_of_a_milestone(
    values: dict[str, Any], expected: list[float], on_updates: bool
) -> None:
    config = make(**values, sched_on_updates=on_updates)
    found = [row[0] for row in rates(config, updates=5)]
    assert found == pytest.approx([rate for rate in expected for _ in range(5)], rel=1e-12)


def test_a_pass_with_skipped_views_takes_the_schedule_as_far() -> None:
    config = make(sched="cosine", sched_on_updates=True)
    every = rates(config, updates=8)
    some = rates(config, updates=8, steps_per_epoch=4)
    assert [some[8 * e + step] for e in range(9) for step in range(4)] == every[::2]


def test_layers_and_discriminator_keep_their_part_of_the_rate() -> None:
    config = make(sched="cosine", sched_on_updates=True)
    for student, lower, discriminator in rates(config, updates=3):
        assert lower == pytest.approx(0.5 * student)
        assert discriminator == pytest.approx(25 * student)
