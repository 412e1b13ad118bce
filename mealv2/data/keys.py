"""Many keys in little memory: their bytes in one buffer, and where each ends."""

from collections.abc import Iterator, Sequence
from operator import eq
from typing import overload

import numpy as np


class Keys(Sequence[str]):
    """A sequence of strings in a third of the memory of a list; each access decodes one."""

    def __init__(self, data: bytes, ends_N: np.ndarray) -> None:
        self._data = data
        self._ends_N = ends_N

    @classmethod
    def of(cls, keys: Sequence[str]) -> "Keys":
        """Return a compact copy of strings."""
        encoded = [key.encode() for key in keys]
        return cls(b"".join(encoded), np.cumsum([len(key) for key in encoded], dtype=np.int64))

    @classmethod
    def concat(cls, parts: Sequence["Keys"]) -> "Keys":
        """Return the strings of all parts, in order."""
        begins = np.cumsum([0, *(len(part._data) for part in parts)])
        ends = [part._ends_N + begin for part, begin in zip(parts, begins[:-1], strict=True)]
        return cls(b"".join(part._data for part in parts), np.concatenate(ends))

    def __len__(self) -> int:
        return len(self._ends_N)

    def __iter__(self) -> Iterator[str]:
        begin = 0
        for end in map(int, self._ends_N):
            yield self._data[begin:end].decode()
            begin = end

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        index = range(len(self))[index]  # raises IndexError
        begin = self._ends_N[index - 1] if index else 0
        return self._data[begin : self._ends_N[index]].decode()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and len(self) == len(other) and all(map(eq, self, other))
