"""The arrays in a file of torch.save, read as data: its pickle is never executed.

The standard library's disassembler yields the opcodes. Names stay text and calls stay descriptions;
only plain arrays are built, from bytes in the file. Nothing is imported or called, and memory is
bounded by the file's size. (torch.load with weights_only=True and NumPy's names allowed allocates
2 GiB for a file of 1.4 kB, and all threads share its list of allowed names.)
"""

import io
import math
import pickletools
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mealv2.errors import LabelSetError
from mealv2.storage.regular_files import read_regular

# torch has a storage class for each element type
_STORAGES = {
    "torch HalfStorage": "f2",
    "torch FloatStorage": "f4",
    "torch DoubleStorage": "f8",
    "torch BoolStorage": "b1",
    "torch ByteStorage": "u1",
    "torch CharStorage": "i1",
    "torch ShortStorage": "i2",
    "torch IntStorage": "i4",
    "torch LongStorage": "i8",
}
_NUMPY_TYPES = ("f2", "f4", "f8", "b1", "u1", "i1", "i2", "i4", "i8")
_TENSOR = "torch._utils _rebuild_tensor_v2"
_NDARRAYS = ("numpy.core.multiarray _reconstruct", "numpy._core.multiarray _reconstruct")
_DTYPE = "numpy dtype"
_SCALARS = ("numpy.core.multiarray scalar", "numpy._core.multiarray scalar")
_ENCODE = "_codecs encode"  # protocol 2 stores bytes as text, encoded as latin1
_NAMES = {_TENSOR, *_NDARRAYS, *_SCALARS, _DTYPE, _ENCODE}
_NAMES |= {"numpy ndarray", "collections OrderedDict"}
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # torch: before 1.6, files were not zips
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}


@dataclass(eq=False)
class _Call:
    """A call of REDUCE, and the state that BUILD sets on the result."""

    function: object
    args: object
    state: object = None


@dataclass(eq=False)
class _Storage:
    """The storage of a tensor: its key, element type and size."""

    key: str
    dtype: str
    num_elements: int


def read_arrays(path: Path) -> list[np.ndarray]:
    """Return the three arrays or tensors of a list that torch.save wrote, as NumPy arrays.

    Reads protocol 2, torch's default, from a zip (and compares its checksums) or in the format
    before torch 1.6. Raises OSError, and LabelSetError for any other file.
    """

    def arrays(data: bytes) -> list[np.ndarray]:
        value, stored = _from_zip(data) if data[:2] == b"PK" else _from_legacy(data)
        if not isinstance(value, list | tuple) or len(value) != 3:
            raise ValueError("it is not a list of boxes, flips and labels")
        return [_array(item, stored) for item in value]

    return _read(path, arrays)


def read_list(path: Path, num_items: int) -> list[Any]:
    """Return a list that torch.save wrote: its arrays and tensors as NumPy arrays.

    Other items may be None, numbers, or lists of numbers. Reads only zips, which have checksums;
    raises as ``read_arrays``.
    """

    def items(data: bytes) -> list[Any]:
        if data[:2] != b"PK":
            raise ValueError("it is not a file of torch.save of torch 1.6 or later")
        value, stored = _from_zip(data)
        if not isinstance(value, list):
            raise ValueError("it is not a list")
        if len(value) != num_items:  # before the copies: items may share a tensor
            raise ValueError(f"it has {len(value)} items, not {num_items}")
        return [_item(item, stored) for item in value]

    return _read(path, items)


def _read(path: Path, parse: Callable[[bytes], list[Any]]) -> list[Any]:
    data = read_regular(path)
    try:
        return parse(data)
    except (ValueError, NotImplementedError, zipfile.BadZipFile) as error:
        why = " ".join(str(error).split())[:200]
    except (LookupError, TypeError, AttributeError, EOFError, OverflowError, RuntimeError, Warning):
        why = "it is damaged"  # zipfile, pickletools and the parser raise these
    raise LabelSetError(f"cannot read label file {path}: {why}; download or make it again")


def _from_zip(data: bytes) -> tuple[object, dict[str, bytes]]:
    """Return the value, and the bytes of every storage by its key."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = archive.infolist()
        is_uncompressed = all(member.compress_type == zipfile.ZIP_STORED for member in members)
        if not is_uncompressed or sum(member.file_size for member in members) > len(data):
            raise ValueError("its zip expands to more than its size")
        content = {member.filename: archive.read(member) for member in members}
    (name,) = [name for name in content if name.endswith("/data.pkl")]
    folder = name.removesuffix("data.pkl")
    if content.get(f"{folder}byteorder", b"little") != b"little":
        raise ValueError("it was written on a big-endian machine")
    start = f"{folder}data/"
    stored = {name.removeprefix(start): content[name] for name in content if name.startswith(start)}
    return _description(io.BytesIO(content[name])), stored


def _from_legacy(data: bytes) -> tuple[object, dict[str, bytes]]:
    """Read five pickles (magic, version, machine, the value, storage keys), then the storages."""
    stream = io.BytesIO(data)
    types: dict[str, str] = {}
    if data[:1] != b"\x80" or _description(stream) != _LEGACY_MAGIC:
        raise ValueError("it is not a file of torch.save")
    _version, system_info = _description(stream), _description(stream)
    if not isinstance(system_info, dict) or system_info["little_endian"] is not True:
        raise ValueError("it was written on a big-endian machine")
    value, keys = _description(stream, types), _description(stream)
    stored = {}
    for key in map(_text, keys):  # type: ignore[call-overload]
        num_elements = int.from_bytes(stream.read(8), "little")
        stored[key] = stream.read(min(num_elements * np.dtype(types[key]).itemsize, len(data)))
    return value, stored


def _description(stream: io.BytesIO, types: dict[str, str] | None = None) -> object:
    """Return the value of a pickle, with calls and storages as descriptions.

    Adds the element type of every storage to ``types``, by key. Raises ValueError for an opcode or
    a name that label files do not need.
    """
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[object, Any] = {}

    def pop(start: int) -> list[Any]:
        items = stack[start:]
        del stack[start:]
        return items

    for opcode, arg, _ in pickletools.genops(stream):
        match opcode.name:
            case "PROTO":
                pass
            case "MARK":
                marks.append(len(stack))
            case "BINUNICODE" | "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT":
                stack.append(arg)
            case "NONE" | "NEWTRUE" | "NEWFALSE" | "EMPTY_TUPLE":
                stack.append(_CONSTANTS[opcode.name])
            case "EMPTY_LIST" | "EMPTY_DICT":
                stack.append([] if opcode.name == "EMPTY_LIST" else {})
            case "GLOBAL":
                stack.append(_known(arg))
            case "BINPUT" | "LONG_BINPUT":
                memo[arg] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[arg])
            case "TUPLE":
                stack.append(tuple(pop(marks.pop())))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                stack.append(tuple(pop(-int(opcode.name[-1]))))
            case "APPEND" | "APPENDS":
                items = pop(-1 if opcode.name == "APPEND" else marks.pop())
                stack[-1].extend(items)
            case "SETITEMS":
                items = pop(marks.pop())
                stack[-1].update(zip(map(_text, items[::2]), items[1::2], strict=True))
            case "REDUCE":
                stack.append(_Call(*pop(-2)))
            case "BUILD":
                state = stack.pop()
                stack[-1].state = state
            case "BINPERSID":
                stack.append(_storage(stack.pop(), types))
            case "STOP":
                (value,) = stack
                return value
            case name:
                raise ValueError(f"its pickle has the opcode {name}, which no label file has")
    raise ValueError("its pickle has no end")


def _known(name: Any) -> str:
    if name not in _NAMES and name not in _STORAGES:
        raise ValueError(f"it names {name!r}, which no label file does")
    return str(name)


def _storage(description: Any, types: dict[str, str] | None) -> _Storage:
    _, storage_class, key, _, num_elements, *_ = description
    storage = _Storage(_text(key), _STORAGES[_text(storage_class)], num_elements)
    if types is not None:
        types[storage.key] = storage.dtype
    return storage


def _text(value: object) -> str:
    """Return a string; nested tuples can take forever to hash or print."""
    if not isinstance(value, str):
        raise ValueError("its pickle is not that of a label file")
    return value


def _item(value: object, stored: dict[str, bytes]) -> Any:
    """Return an array, a number or None, or a list of numbers."""
    if isinstance(value, list | tuple):
        return [_number(item) for item in value]
    if isinstance(value, _Call) and value.function not in _SCALARS:
        return _array(value, stored)
    return None if value is None else _number(value)


def _number(value: object) -> int | float:
    match value:
        case bool() | int() | float():
            return value
        case _Call(function=function, args=(dtype, data)) if function in _SCALARS:
            (number,) = np.frombuffer(_bytes(data), _dtype(dtype)).tolist()
            return number  # type: ignore[no-any-return]
    raise ValueError("it does not hold numbers")


def _array(value: object, stored: dict[str, bytes]) -> np.ndarray:
    match value:
        case _Call(function=function, state=(_, shape, dtype, in_columns, data)):
            if function not in _NDARRAYS:
                raise ValueError("it does not hold arrays")
            elements = np.frombuffer(_bytes(data), _dtype(dtype))
            sizes = _sizes(shape, len(elements))
            return elements.reshape(sizes, order="F" if in_columns else "C")
        case _Call(function=function, args=(_Storage() as storage, offset, shape, strides, *_)):
            if function != _TENSOR:
                raise ValueError("it does not hold tensors")
            elements = np.frombuffer(stored[storage.key], np.dtype(storage.dtype).newbyteorder("<"))
            if len(elements) != storage.num_elements:
                raise ValueError("a tensor's bytes are too many or too few")
            return _strided(elements, offset, shape, strides)
    raise ValueError("it does not hold arrays")


def _bytes(value: object) -> bytes:
    match value:
        case _Call(function=function, args=(str() as text, "latin1")) if function == _ENCODE:
            return text.encode("latin1")
    raise ValueError("an array's elements are not bytes")


def _dtype(value: object) -> np.dtype[Any]:
    match value:
        case _Call(function=function, args=(code, *_), state=(_, order, *_)):
            if function == _DTYPE and code in _NUMPY_TYPES and order in ("<", ">", "|"):
                return np.dtype(f"{order}{code}")
    raise ValueError("an array's elements are not numbers")


def _strided(elements: np.ndarray, offset: Any, shape: Any, strides: Any) -> np.ndarray:
    """Return a copy of the tensor with this offset, shape and strides in ``elements``."""
    sizes = _sizes(shape, len(elements))
    last = offset + sum((n - 1) * step for n, step in zip(sizes, strides, strict=True))
    if min(offset, *strides, 0) < 0 or last >= len(elements):
        raise ValueError("a tensor exceeds its bytes")
    steps = [step * elements.itemsize for step in strides]
    return np.lib.stride_tricks.as_strided(elements[offset:], sizes, steps, writeable=False).copy()


def _sizes(shape: Any, num_elements: int) -> tuple[int, ...]:
    """Return a shape as a tuple; raises ValueError if it needs more than ``num_elements``."""
    sizes = tuple(shape)
    is_valid = len(sizes) <= 3 and all(type(n) is int and n > 0 for n in sizes)
    if not is_valid or math.prod(sizes) > num_elements:
        raise ValueError(f"an array of {num_elements} numbers cannot have its shape")
    return sizes
