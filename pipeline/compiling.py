"""Networks compiled by torch.compile, for batches of one size; as they are where nothing compiles.

What is called is compiled, never the module: what a checkpoint keeps does not change.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from mealv2.ensemble import TeacherEnsemble
from pipeline import logs
from pipeline.config import CompileMode

_WITH_CUDA_GRAPHS = ("reduce-overhead", "max-autotune")


class Compiled:
    """Calls a network through torch.compile where a batch has the full size, else as it is.

    Which of the two depends on the batch alone, so that a run that is stopped anywhere goes on in
    the same bits. A machine that cannot compile says so once, and the network is called as it is.
    ``begins_step``: what was answered before is no longer needed; CUDA graphs reuse its memory.
    """

    def __init__(
        self, network: nn.Module, *, mode: CompileMode, batch_size: int, begins_step: bool = True
    ) -> None:
        self._network = network
        self._batch_size = batch_size
        self._marks = begins_step and mode in _WITH_CUDA_GRAPHS
        self._has_run = False
        self._compiled: Callable[[Tensor], Tensor] | None
        try:
            # one shape: a graph for any batch size is a slower one, and no CUDA graph
            self._compiled = torch.compile(network, mode=mode, dynamic=False)
        except RuntimeError as error:  # a Python or a system that torch.compile does not know
            self._give_up(error)

    def __call__(self, images_BCHW: Tensor) -> Tensor:
        if self._compiled is None or len(images_BCHW) != self._batch_size:
            logits_BC: Tensor = self._network(images_BCHW)
            return logits_BC
        if self._marks:
            torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
        if self._has_run:
            return self._compiled(images_BCHW)
        try:
            logits_BC = self._compiled(images_BCHW)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # no compiler, no Triton; what is the network's comes again
            self._give_up(error)
            return self(images_BCHW)
        self._has_run = True
        return logits_BC

    def _give_up(self, error: RuntimeError) -> None:
        self._compiled = None
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = lines[0] if lines else type(error).__name__
        logs.say(f"--compile: this machine cannot compile ({reason}); computing without")


def compile_teachers(ensemble: TeacherEnsemble, *, mode: CompileMode, batch_size: int) -> None:
    """Let an ensemble ask its teachers through torch.compile, each on its own."""
    ensemble.calls = [
        Compiled(teacher, mode=mode, batch_size=batch_size, begins_step=number == 0)
        for number, teacher in enumerate(ensemble.teachers)
    ]
