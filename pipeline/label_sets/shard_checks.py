"""Check the files of a label set, several at a time: each is read once for all checks."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from mealv2.errors import LabelSetError
from mealv2.label_set import Encoding, ShardFile, first_labels_of
from mealv2.label_set.blocks import key_hashes
from mealv2.storage.regular_files import read_regular
from pipeline import console

T = TypeVar("T")
R = TypeVar("R")
_DECODED = 32  # views of a shard that share a model: its bytes have two checksums anyway
_MEMORY = 1 << 30  # bytes of files that are read at the same time; one is read whatever its size


class Checked(NamedTuple):
    """What a check of a file found: how it differs from its entry, else what is wrong inside.

    ``hashes_N`` are the key hashes of its images.
    """

    difference: str | None
    problem: str | None = None
    hashes_N: np.ndarray = np.empty(0, "<u8")


def check_files(
    folder: Path, entries: Sequence[dict[str, Any]], encoding: Encoding | None, *, workers: int
) -> Iterator[Checked]:
    """Check files against their ``name``, ``bytes`` and ``sha256``, in order, and what they hold.

    Each of ``workers`` threads reads a file; fewer where the files are large. Without an encoding
    the contents are not checked.
    """
    largest = max((entry["bytes"] for entry in entries), default=0)
    check = partial(_check_file, folder, encoding=encoding)
    return in_threads(check, entries, workers=min(workers, _MEMORY // max(largest, 1)))


def in_threads(work: Callable[[T], R], items: Iterable[T], *, workers: int) -> Iterator[R]:
    """Yield ``work(item)`` in order; ``workers`` threads run it, the caller's for less than two."""
    if workers < 2:
        yield from map(work, items)
        return
    pool = ThreadPoolExecutor(workers, "mealv2-verify")
    try:
        waiting = iter(items)
        running = deque(pool.submit(work, item) for item in islice(waiting, 4 * workers))
        while running:
            yield running.popleft().result()
            running.extend(pool.submit(work, item) for item in islice(waiting, 1))
    finally:  # Ctrl-C waits for the files being read, not for those to come
        pool.shutdown(cancel_futures=True)


def _check_file(folder: Path, entry: dict[str, Any], encoding: Encoding | None) -> Checked:
    path = folder / entry["name"]
    try:
        if (size := path.stat().st_size) != entry["bytes"]:
            return Checked(f"has {size} bytes, not {entry['bytes']}")
        data = read_regular(path, max_bytes=size)
    except OSError as error:
        return Checked(f"cannot be read: {error.strerror}")
    # hashing, and much of what NumPy does, lets other threads run
    if sha256(data).hexdigest() != entry["sha256"]:
        return Checked(f"has another SHA-256 ({_damaged_part(path, data)})")
    try:
        file = ShardFile(path, data)
    except LabelSetError:  # the set cannot be opened, and says why
        return Checked(None)
    problem = None if encoding is None else _problem(file, encoding)
    return Checked(None, problem, file.column("key_hashes").copy())


def _damaged_part(path: Path, data: bytes) -> str:
    try:
        damaged = ShardFile(path, data).damaged_keys()
    except LabelSetError as error:
        return str(error).partition(" is damaged: ")[2] or str(error)
    if not damaged:
        return "in neither the labels nor their index"
    return f"the labels of {console.count(len(damaged), 'image')}: {console.first_names(damaged)}"


def _problem(file: ShardFile, encoding: Encoding) -> str | None:
    """Return what is wrong with the labels or the keys of a file whose bytes are right."""
    if bad := file.damaged_keys():
        return f"the labels of {len(bad)} images have another CRC-32: {console.first_names(bad)}"
    keys = file.packed_keys()
    if not np.array_equal(key_hashes(keys), file.column("key_hashes")):
        return "key hashes differ from the hashes of the keys"
    if not file.has_column("views") and len(set(keys)) < len(keys):
        return "contains an image twice"
    try:
        firsts = first_labels_of(file, encoding)
        blocks = file.column("labels"), file.column("label_ends"), file.num_views
        rows = encoding.rows_to_check(*blocks, most=_DECODED).with_models(firsts)
        encoding.check(rows, most=_DECODED)
    except LabelSetError as error:
        return str(error)
    return None
