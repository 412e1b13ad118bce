"""Settings of optimizer and learning rate: timm's flags; without them, the paper's values."""

import difflib
from collections.abc import Mapping
from typing import Any, Literal

from pipeline.config.base import (
    DEFAULT_EMA_DECAY,
    MAX_EPOCHS,
    PAPER_EPOCHS,
    PAPER_MILESTONE,
    Settings,
)
from pipeline.config.fields import frozen, in_optimisation, require, without_effect

# timm's optimizers with a state that a resumed run continues to the bit; a test compares the list
# with timm's. `lookahead_NAME` wraps each.
_NAMES = """
    adabelief adadelta adafactor adafactorbv adafactorbvc adagrad adam adamax adamc adamp adamuon
    adamw adamwlegacy adan adanw adopt adoptc adoptw cadafactor cadafactorbv cadafactorbvc cadamc
    cadamp cadamw cadan cadanw cadopt cadoptc cadoptw clamb clambw claprop clion clionc cmars
    cnadamc cnadamw crmsproptf csgdc csgdp csgdw lamb lambc lambcd lambcw lambw
    laprop lapropc larc lars lion lionc madgrad madgradw mars momentum muon nadam nadamc nadamlegacy
    nadamuon nadamw nesterov nesterovw nlarc nlars nmuon novograd novogradc novogradw radabelief
    radam radamlegacy radamw rmsprop rmsproptf rmsproptfc rmsproptfw sgd sgdc sgdp sgdw
"""
OPTIMIZERS = frozenset(_NAMES.split())
_LOOKAHEAD = "lookahead_"
# The optimizers of timm that are left out, by the beginning of their names.
_LEFT_OUT = {
    "adahessian": "needs second derivatives, which the training step does not compute",
    "fused": "needs NVIDIA's apex, whose state is not known to resume exactly",
    "kron": "needs opt_einsum, and minutes to compile its kernels at every start",
    "bnb": "needs bitsandbytes, whose 8-bit state is not known to resume exactly",
}
WEIGHT_DECAY = "Weight decay; of sgd on all weights, else not on biases and norms, as in timm."
SCHED_ON_UPDATES = "Change the learning rate after every step, not after every epoch."


def _current_sched(values: Mapping[str, Any]) -> Any:
    """Return today's name of a schedule: before, `step` was the one with milestones."""
    is_old = values["sched"] == "step" and values.get("decay_epochs") is None
    return "multistep" if is_old else values["sched"]


@frozen
class OptimisationConfig(Settings):
    """Settings of optimizer and learning rate."""

    epochs: int = in_optimisation(PAPER_EPOCHS, "Passes over the images.", low=1, high=MAX_EPOCHS)
    batch_size: int = in_optimisation(512, "Images per step, over all processes.", low=1)
    grad_accum_steps: int = in_optimisation(
        1, "Micro-batches per step and process; more of them need less GPU memory.", low=1
    )
    opt: str = in_optimisation(
        "sgd", "Optimizer, by timm's name; sgd has plain momentum, as in the paper."
    )
    lr: float = in_optimisation(0.01, "Learning rate.", low=0)
    momentum: float = in_optimisation(
        0.9, "Momentum, for optimizers that have this parameter.", low=0
    )
    weight_decay: float = in_optimisation(0.0, WEIGHT_DECAY, low=0)
    opt_betas: tuple[float, float] | None = in_optimisation(
        None, "Betas of the optimizer.", shown="the optimizer's"
    )
    opt_eps: float | None = in_optimisation(
        None, "Epsilon of the optimizer.", shown="the optimizer's", low=0
    )
    layer_decay: float | None = in_optimisation(
        None,
        "Factor of the learning rate from each layer to the one below.",
        shown="none",
        above=0,
        high=1,
    )
    clip_grad: float | None = in_optimisation(
        None, "Limit of the student's gradient.", shown="none", above=0
    )
    clip_mode: Literal["norm", "value", "agc"] | None = in_optimisation(
        None, "What --clip-grad limits, as in timm.", shown="norm"
    )
    sched: Literal["multistep", "cosine", "poly", "step", "constant"] = in_optimisation(
        "multistep",
        "Learning rate schedule of timm: falls at the milestones (the paper's), along half a "
        "cosine, a polynomial, every --decay-epochs, or never.",
        current=_current_sched,
    )
    decay_milestones: tuple[int, ...] | None = in_optimisation(
        None,
        "Epoch at which the learning rate is multiplied by --decay-rate; repeat it for several.",
        shown="at 100/180 of --epochs, as in the paper",
        alias="lr_milestones",
    )
    decay_epochs: float | None = in_optimisation(
        None, "With --sched step: epochs between the falls.", shown="none", above=0
    )
    decay_rate: float = in_optimisation(
        0.1, "Factor of the learning rate at a fall; of poly, the power.", low=0
    )
    warmup_epochs: int = in_optimisation(
        0, "Epochs in which the learning rate rises from --warmup-lr to --lr.", low=0
    )
    warmup_lr: float = in_optimisation(1e-5, "First learning rate of --warmup-epochs.", low=0)
    min_lr: float = in_optimisation(0.0, "Learning rate at the end of cosine and poly.", low=0)
    cooldown_epochs: int = in_optimisation(
        0, "How many of --epochs, the last, train at --min-lr.", low=0
    )
    sched_on_updates: bool = in_optimisation(False, SCHED_ON_UPDATES)
    model_ema: bool = in_optimisation(
        False, "Average the student's weights over the steps and save the average as the model."
    )
    model_ema_decay: float | None = in_optimisation(
        None, "Decay per step, rising from 0 to this.", shown=str(DEFAULT_EMA_DECAY), low=0, high=1
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_optimizer(self.opt)
        self._check_schedule()
        for beta in self.opt_betas or ():
            require(0 <= beta < 1, f"--opt-betas must be at least 0 and below 1: {beta}")
        if self.clip_grad is None:
            without_effect(self, "without --clip-grad", "clip_mode")
        if not self.model_ema:
            without_effect(self, "without --model-ema", "model_ema_decay")

    def _check_schedule(self) -> None:
        if self.sched != "multistep":
            without_effect(self, f"with --sched {self.sched}", "decay_milestones")
        if self.sched != "step":
            without_effect(self, f"with --sched {self.sched}", "decay_epochs")
        if self.sched not in ("multistep", "step", "poly"):
            without_effect(self, f"with --sched {self.sched}", "decay_rate")
        if self.sched not in ("cosine", "poly"):
            without_effect(self, f"with --sched {self.sched}", "min_lr", "cooldown_epochs")
        if not self.warmup_epochs:
            without_effect(self, "without --warmup-epochs", "warmup_lr")
        for milestone in self.decay_milestones or ():
            message = f"--decay-milestones {milestone} has no effect in {self.epochs} epochs"
            require(0 < milestone < self.epochs, message)
        for name in ("warmup", "cooldown"):
            value = getattr(self, f"{name}_epochs")
            message = f"--{name}-epochs {value} leaves nothing of --epochs {self.epochs}"
            require(value < self.epochs, message)
        require(
            self.warmup_epochs + self.cooldown_epochs < self.epochs,
            f"--warmup-epochs {self.warmup_epochs} and --cooldown-epochs {self.cooldown_epochs} "
            f"leave nothing of --epochs {self.epochs} to --sched {self.sched}",
        )
        self.check_lr("lr", self.lr)

    def check_lr(self, name: str, lr: float) -> None:
        """Raise ConfigError for a learning rate below the one at the end of the schedule."""
        flag = name.replace("_", "-")
        require(lr >= self.min_lr, f"--{flag} {lr:g} is below --min-lr {self.min_lr:g}")

    @property
    def milestones(self) -> tuple[int, ...]:
        """The epochs, ascending, at which the learning rate falls with --sched multistep."""
        return tuple(sorted(self.decay_milestones or (paper_milestone(self.epochs),)))


def check_optimizer(name: str) -> None:
    """Raise ConfigError for an optimizer that timm does not have, or that cannot be resumed."""
    base = name.removeprefix(_LOOKAHEAD)
    for beginning, reason in _LEFT_OUT.items():
        require(not base.startswith(beginning), f"--opt {name} cannot be used: it {reason}")
    near = difflib.get_close_matches(base, sorted(OPTIMIZERS), n=4)
    hint = f"did you mean {', '.join(near)}?" if near else "timm.optim.list_optimizers() has them"
    require(base in OPTIMIZERS, f"--opt {name} is unknown; {hint}")


def paper_milestone(epochs: int) -> int:
    """Return the epoch at which the paper's schedule drops the learning rate: 100 of 180."""
    return round(epochs * PAPER_MILESTONE / PAPER_EPOCHS)
