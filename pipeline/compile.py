"""torch.compile for batches of one size, with the eager network as the fallback.

The call is compiled, not the module, so that checkpoints do not change.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mealv2.models.ensemble import TeacherEnsemble
from mealv2.models.onnx_file import OnnxClassifier
from pipeline import console
from pipeline.config import CompileMode

_WITH_CUDA_GRAPHS = ("reduce-overhead", "max-autotune")


@dataclass
class Compiler:
    """Mode and batch size of compiled networks; ``is_usable`` until a compilation fails."""

    mode: CompileMode
    batch_size: int
    is_usable: bool = True

    def compiled(self, network: nn.Module, *, begins_step: bool = True) -> "Compiled":
        """Return the callable to use instead of a network.

        ``begins_step``: CUDA graphs may reuse the memory of earlier outputs.
        """
        marks = begins_step and self.mode in _WITH_CUDA_GRAPHS
        return Compiled(network, self, marks=marks)

    def give_up(self, error: RuntimeError) -> None:
        """Report why this machine cannot compile; once, for all networks."""
        self.is_usable = False
        cause = getattr(error, "inner_exception", error)  # torch wraps errors of its back end
        lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
        reason = lines[0] if lines else type(cause).__name__
        console.info(f"--torchcompile: this machine cannot compile ({reason}); running without it")


class Compiled:
    """Calls a network through torch.compile for full batches, and eagerly for others.

    The choice depends on the batch alone, so that a resumed run gives the same bits. If this
    machine cannot compile, all calls are eager.
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
        """Compile with the first full batch, which shows whether this machine can compile."""
        try:
            # dynamic=False: a graph for any batch size is slower and excludes CUDA graphs
            call: Callable[[Tensor], Tensor] = torch.compile(
                self._network, mode=self._compiler.mode, dynamic=False
            )
            logits_BC = call(images_BCHW)
        except torch.OutOfMemoryError:
            raise
        except (
            RuntimeError
        ) as error:  # no compiler or no Triton; an error of the network is raised again below
            self._compiler.give_up(error)
            return self(images_BCHW)
        self._call = call
        return logits_BC


def compile_teachers(ensemble: TeacherEnsemble, *, mode: CompileMode, batch_size: int) -> None:
    """Make an ensemble run its teachers through torch.compile, one graph each, but ONNX files."""
    compiler = Compiler(mode, batch_size)
    modules = enumerate(ensemble.teachers)
    numbers = [n for n, teacher in modules if not isinstance(teacher, OnnxClassifier)]
    for number in numbers:
        begins_step = number == numbers[0]
        network = ensemble.teachers[number]
        ensemble.calls[number] = compiler.compiled(network, begins_step=begins_step)
