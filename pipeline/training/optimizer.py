"""The optimizer of a run, from timm, and its learning rate in every step, by timm's schedules."""

from typing import Any

import torch
from timm.optim import (  # type: ignore[attr-defined]
    create_optimizer_v2,
    get_optimizer_info,
    param_groups_layer_decay,
    param_groups_weight_decay,
)
from timm.scheduler import create_scheduler_v2  # type: ignore[attr-defined]
from torch import nn

from mealv2.errors import ConfigError
from pipeline.config import TrainConfig, TransferDetectionConfig
from pipeline.training.spec import TrainingSpec

_PAPER = "sgd"  # with plain momentum, and weight decay of all weights


def create_optimizer(
    config: TrainConfig, spec: TrainingSpec, device: torch.device
) -> torch.optim.Optimizer:
    """Return --opt over the student and the extra modules (paper: one joint optimizer).

    The student's parameter groups are timm's. Each extra module has groups, and a learning rate, of
    its own. Raises ConfigError for a parameter that the optimizer does not have.
    """
    is_paper = config.opt == _PAPER
    groups = _student_groups(config, spec.student.backbone)
    for module, lr in spec.extra.values():
        own = param_groups_weight_decay(
            module, weight_decay=config.weight_decay, weight_decay_exclude_1d=not is_paper
        )
        groups += [group | {"lr": lr} for group in own]
    options = _options(config)
    if is_paper:
        options |= {"nesterov": False, "fused": is_fused(device)}  # timm: its sgd is Nesterov's
    return create_optimizer_v2(
        groups, config.opt, lr=config.lr, momentum=config.momentum, **options
    )


def _student_groups(config: TrainConfig, backbone: nn.Module) -> list[dict[str, Any]]:
    """Return the student's parameter groups as timm makes them; of sgd one, with all weights."""
    is_paper = config.opt == _PAPER
    kept: set[str] = set() if is_paper else getattr(backbone, "no_weight_decay", set)()
    settings: dict[str, Any] = {
        "weight_decay": config.weight_decay,
        "weight_decay_exclude_1d": not is_paper,
        "no_weight_decay_list": kept,
    }
    if config.layer_decay is None:
        return list(param_groups_weight_decay(backbone, **settings))
    return list(param_groups_layer_decay(backbone, layer_decay=config.layer_decay, **settings))


def _options(config: TrainConfig) -> dict[str, Any]:
    """Return the optimizer's parameters that are given."""
    name = config.opt.split("_")[-1]
    try:
        known = get_optimizer_info(name)
    except ValueError as error:
        raise ConfigError(f"--opt {config.opt} needs a newer timm: {error}") from error
    options: dict[str, Any] = {}
    if config.opt_betas is not None:
        if not known.has_betas or known.num_betas != len(config.opt_betas):
            raise ConfigError(f"--opt-betas has no effect with --opt {config.opt}")
        options["betas"] = config.opt_betas
    if config.opt_eps is not None:
        if not known.has_eps:
            raise ConfigError(f"--opt-eps has no effect with --opt {config.opt}")
        options["eps"] = config.opt_eps
    default = type(config).__dataclass_fields__["momentum"].default
    if config.momentum != default and not known.has_momentum:
        raise ConfigError(f"--momentum has no effect with --opt {config.opt}")
    return options


def restore_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Continue from the state in a checkpoint.

    Raises ValueError or KeyError for the state of another optimizer.
    """
    fused = [group.get("fused") for group in optimizer.param_groups]
    optimizer.load_state_dict(state)
    for group, value in zip(optimizer.param_groups, fused, strict=True):
        if "fused" in group:
            group["fused"] = value  # of this device, not the checkpoint's
    for parameter, kept in optimizer.state.items():
        for name, tensor in kept.items() if isinstance(kept, dict) else ():
            is_weights = isinstance(tensor, torch.Tensor) and tensor.shape == parameter.shape
            if is_weights and tensor.stride() != parameter.stride():
                # the fused kernel expects the layout of the weights and does not check it
                kept[name] = torch.empty_like(parameter, dtype=tensor.dtype).copy_(tensor)


class Schedule:
    """The learning rate of every step, by timm's schedule: a function of how far the run is.

    ``updates_per_epoch`` counts the steps of an epoch in which no view is skipped. With
    ``--sched-on-updates`` the rate changes after every step: it is timm's rate of the same update.
    """

    def __init__(
        self, config: TrainConfig, optimizer: torch.optim.Optimizer, *, updates_per_epoch: float
    ) -> None:
        self._on_updates = config.sched_on_updates
        self._updates = updates_per_epoch
        per_milestone = updates_per_epoch if self._on_updates else 1
        settings: dict[str, Any] = {
            "num_epochs": config.epochs - config.cooldown_epochs,
            # timm: a milestone m has an effect from m - 1 on; here from m on, as in torch
            "decay_milestones": [m + 0.5 / per_milestone for m in config.milestones],
            "decay_epochs": config.decay_epochs,
            "decay_rate": config.decay_rate,
            "warmup_epochs": config.warmup_epochs,
            "warmup_lr": config.warmup_lr,
            "min_lr": config.min_lr,
            "step_on_epochs": not self._on_updates,
            "updates_per_epoch": updates_per_epoch,
        }
        if config.sched == "constant":
            settings |= {"decay_epochs": 1, "decay_rate": 1.0}
        sched = "step" if config.sched == "constant" else config.sched
        self._scheduler, _ = create_scheduler_v2(optimizer, sched, **settings)

    def set_lr(self, epoch: int, step: int = 0, *, steps_per_epoch: float | None = None) -> None:
        """Set the learning rates of step ``step`` of the pass that begins at ``epoch``.

        ``steps_per_epoch`` are those of this pass, where some of its views are skipped.
        """
        if self._on_updates:
            scale = self._updates / (steps_per_epoch or self._updates)
            self._scheduler.step_update(self._updates * epoch + step * scale)
        else:
            self._scheduler.step(epoch)


class StepSchedule(Schedule):
    """The learning rate of a run of --iterations, a function of the step: a warm-up, then falls.

    detectron2's WarmupMultiStepLR: linear from --warmup-factor x lr in step 0 to lr.
    """

    def __init__(
        self,
        config: TransferDetectionConfig,
        optimizer: torch.optim.Optimizer,
        *,
        updates_per_epoch: float,
    ) -> None:
        self._updates = updates_per_epoch
        self._scheduler, _ = create_scheduler_v2(
            optimizer,
            "multistep",
            num_epochs=config.iterations,
            decay_milestones=[step + 0.5 for step in config.decay_steps],  # type: ignore[misc]
            decay_rate=config.decay_rate,
            warmup_epochs=config.warmup_steps,
            warmup_lr=config.lr * config.warmup_factor,
            step_on_epochs=False,
            updates_per_epoch=1,
        )

    def set_lr(self, epoch: int, step: int = 0, *, steps_per_epoch: float | None = None) -> None:
        """Set the learning rates of step ``step`` of the pass ``epoch``."""
        self._scheduler.step_update(round(self._updates * epoch) + step)


def create_schedule(
    config: TrainConfig, optimizer: torch.optim.Optimizer, *, updates_per_epoch: float
) -> Schedule:
    """Return the schedule of a run."""
    if isinstance(config, TransferDetectionConfig):
        return StepSchedule(config, optimizer, updates_per_epoch=updates_per_epoch)
    return Schedule(config, optimizer, updates_per_epoch=updates_per_epoch)


def is_fused(device: torch.device) -> bool | None:
    """Return whether SGD computes in one kernel; None leaves it to torch.

    On a CPU it takes 0.4 to 0.8 of the time of the plain loop. On a GPU it checks float16 gradients
    itself, where the other forms make the host wait for them in every step.
    """
    return True if device.type in ("cpu", "cuda") else None
