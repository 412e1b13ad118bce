"""Where a thread of Python waits for a device: `.item()`, `bool()`, `.cpu()`, `.tolist()`, …"""

import contextlib
import traceback
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

# Operations whose result, or its size, the host has to know: on a GPU it waits for them.
_WAITING = {
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.nonzero.default,
    torch.ops.aten.masked_select.default,
    torch.ops.aten.repeat_interleave.Tensor,
    torch.ops.aten.bincount.default,
    torch.ops.aten.equal.default,
}
_OF_TORCH = ("inner", "_fn")  # functions between the caller and the recorder
_COPYING = ("cpu", "tolist")  # to the host: of what is there already no operation is seen


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[list[str]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in _WAITING:
            self.note()
        return func(*args, **(kwargs or {}))

    def note(self) -> None:
        names = [frame.name for frame in traceback.extract_stack()[:-2]]
        while names[-1] in _OF_TORCH:
            names.pop()
        self.found.append(names)

    def noting(self, name: str) -> Any:
        method = getattr(torch.Tensor, name)

        def noted(*args: Any, **kwargs: Any) -> Any:
            self.note()
            return method(*args, **kwargs)

        return mock.patch.object(torch.Tensor, name, noted)


@contextlib.contextmanager
def recorded_syncs() -> Iterator[list[list[str]]]:
    """Record every wait of this thread: the names of the functions on its stack."""
    with contextlib.ExitStack() as stack:
        recorder = stack.enter_context(_Recorder())
        for name in _COPYING:
            stack.enter_context(recorder.noting(name))
        yield recorder.found
