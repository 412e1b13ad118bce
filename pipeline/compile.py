"""Networks compiled by torch.compile, for batches of one size; as they are where nothing compiles.

What is called is compiled, never the module: what a checkpoint keeps does not change.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mealv2.models.ensemble import TeacherEnsemble
from pipeline import console
from pipeline.config import CompileMode

_WITH_CUDA_GRAPHS = ("reduce-overhead", "max-autotune")


@dataclass
class Compiler:
    """How networks are compiled, for batches of ``batch_size``; ``is_usable`` until it was
    tried.
    """

    mode: CompileMode
    batch_size: int
    is_usable: bool = True

    def compiled(self, network: nn.Module, *, begins_step: bool = True) -> "Compiled":
        """Return what to call in a network's place.

        ``begins_step``: what was answered before is no longer needed, and CUDA graphs may use its
        memory again.
        """
        marks = begins_step and self.mode in _WITH_CUDA_GRAPHS
        return Compiled(network, self, marks=marks)

    def give_up(self, error: RuntimeError) -> None:
        """Say why nothing compiles here; once, for all networks."""
        self.is_usable = False
        cause = getattr(error, "inner_exception", error)  # torch wraps what its back end raises
        lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
        reason = lines[0] if lines else type(cause).__name__
        console.info(f"--torchcompile: this machine cannot compile ({reason}); computing without")


class Compiled:
    """Calls a network through torch.compile where a batch has the full size, else as it is.

    Which of the two depends on the batch alone, so that a run that is stopped anywhere goes on in
    the same bits. Where nothing compiles the network is called as it is.
    """

    def __init__(self, network: nn.Module, compiler: Compiler, *, marks: bool) -> None:
        self._network = network
        self._compiler = compiler
        self._marks = marks
        self._call: Callable[[Tensor], Tensor] | None = None

    def __call__(self, images_BCHW: Tensor) -> Tensor:
        if not self._compiler.is_usable or len(images_BCHW) != self._compiler.batch_size:
            logits_BC: Tensor = self._network(images_BCHW)
            return logits_BC
        if self._marks:
            torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
        return self._first(images_BCHW) if self._call is None else self._call(images_BCHW)

    def _first(self, images_BCHW: Tensor) -> Tensor:
        """Answer the first full batch: it says whether this machine can compile."""
        try:
            # one shape: a graph for any batch size is a slower one, and no CUDA graph
            mode = self._compiler.mode
            call: Callable[[Tensor], Tensor] = torch.compile(
                self._network, mode=mode, dynamic=False
            )
            logits_BC = call(images_BCHW)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # no compiler, no Triton; what is the network's comes again
            self._compiler.give_up(error)
            return self(images_BCHW)
        self._call = call
        return logits_BC


def compile_teachers(ensemble: TeacherEnsemble, *, mode: CompileMode, batch_size: int) -> None:
    """Let an ensemble ask its teachers through torch.compile, each on its own."""
    compiler = Compiler(mode, batch_size)
    ensemble.calls = [
        compiler.compiled(teacher, begins_step=number == 0)
        for number, teacher in enumerate(ensemble.teachers)
    ]
