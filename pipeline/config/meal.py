"""Settings of `mealv2 distill --method meal`: MEAL, the method before MEAL V2."""

import math
from functools import partial
from typing import Literal

from pipeline.config.base import Settings
from pipeline.config.fields import flag, frozen, in_labels, in_loss, require, without_effect

MEAL_SETTINGS = (
    *("teacher_selection", "teacher_mode", "block_loss", "gamma", "eta", "out_layer"),
    *("out_dims", "pool", "align"),
)
_LOGITS = (-1,)
_numbers = partial(in_loss, commas=True)


@frozen
class MealConfig(Settings):
    """Settings of MEAL: which teacher, which blocks, which losses."""

    method: Literal["mealv2", "meal"] = in_loss(
        "mealv2",
        "MEAL V2: the mean of all teachers. MEAL: one teacher a batch, compared block by block; "
        "options that begin with MEAL are for it.",
    )
    teacher_selection: Literal["random", "round-robin", "all"] = in_labels(
        "random",
        "MEAL: the teacher of a batch, drawn with --seed, in turn, or the mean of the losses to "
        "all.",
    )
    teacher_mode: Literal["eval", "train"] = in_labels(
        "eval", "MEAL: teachers use their statistics, or those of the batch as in its code."
    )
    out_layer: tuple[int, ...] = _numbers(
        _LOGITS,
        "MEAL: positions of the compared blocks, separated by commas, from 0 or from the end; -1 "
        "is the logits.",
        shown="-1",
    )
    align: bool = in_loss(
        True, "MEAL: pool blocks to --out-dims values, or compare flattened feature maps."
    )
    out_dims: tuple[int, ...] = _numbers(
        (),
        "MEAL: values of each aligned block, in the order of --out-layer; without the logits.",
        shown="5000,1000,500,200, or the student's own",
    )
    pool: Literal["avg", "max"] = in_loss("max", "MEAL: how blocks are aligned.")
    block_loss: Literal["ce", "l1", "l2", "l1_soft", "l2_soft"] = in_loss(
        "ce", "MEAL: loss of a block: cross-entropy or distance; ce and _soft of the softmaxes."
    )
    gamma: tuple[float, ...] = _numbers(
        (1.0,),
        "MEAL: weight of the loss of each block in the order of --out-layer, or one for all.",
        shown="1",
    )
    eta: tuple[float, ...] = _numbers(
        (1.0,), "MEAL: the same of each block's discriminator.", shown="1"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.method != "meal":
            without_effect(self, f"with --method {self.method}", *MEAL_SETTINGS)
            return
        self._check_blocks()
        if self.out_layer == _LOGITS:
            without_effect(self, "with --out-layer -1", "align", "out_dims", "pool")
        if not self.align:
            without_effect(self, "with --no-align", "out_dims", "pool")

    def _check_blocks(self) -> None:
        num = len(self.out_layer)
        require(len(set(self.out_layer)) == num, "--out-layer names a position twice")
        for name in ("gamma", "eta"):
            values = getattr(self, name)
            message = f"{flag(name)} has {len(values)} values, --out-layer {num} positions"
            require(len(values) in (1, num), message)
            is_right = all(0 <= value < math.inf for value in values)
            require(is_right, f"{flag(name)} must be at least 0 and finite: {values}")
        message = f"--out-dims has {len(self.out_dims)} values, --out-layer {num} positions"
        require(len(self.out_dims) in (0, num - 1, num), message)
        message = f"--out-dims must be at least 2: {self.out_dims}"
        require(all(size >= 2 for size in self.out_dims), message)

    def of_blocks(self, name: Literal["gamma", "eta"]) -> tuple[float, ...]:
        """Return the weight of each compared block."""
        values: tuple[float, ...] = getattr(self, name)
        return values * len(self.out_layer) if len(values) == 1 else values
