"""Compare the images of a source with those that a label set labels, by content."""

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice

from mealv2.data.content_hash import NOT_LABELLED, KnownHashes
from mealv2.data.requests import announce
from mealv2.data.source import ImageSource
from mealv2.errors import DataError, LabelSetError
from mealv2.messages import info, progress
from mealv2.text import count, first_names, size_of

_MB = 1_000_000
_CHUNK = 64  # images of a thread's task
_MAX_LOGGED = 20  # images that are logged one by one


@dataclass
class Compared:
    """What a comparison found: how many images and bytes were read, and the reasons by key.

    ``different`` are images that are not those that were labelled, ``unreadable`` the others whose
    bytes cannot be read.
    """

    images: int = 0
    bytes: int = 0
    seconds: float = 0.0
    different: dict[str, str] = field(default_factory=dict)
    unreadable: dict[str, str] = field(default_factory=dict)

    def summary(self) -> str:
        """Return the counts and the rate as text."""
        rate = size_of(self.bytes / max(self.seconds, 1e-9))
        images = count(self.images, "image")
        return f"{images}, {size_of(self.bytes)}, {rate}/s"


def compare_images(
    source: ImageSource,
    labelled: KnownHashes,
    positions: Sequence[int],
    *,
    workers: int,
    what: str,
) -> Compared:
    """Read the images at ``positions`` whose content hash is known and compare them.

    Shows a bar. Raises RemoteError.
    """
    known = [position for position in positions if labelled.is_known_N[position]]
    num_bytes = sum(source.stored_sizes[position] for position in known)
    chunks = [known[start : start + _CHUNK] for start in range(0, len(known), _CHUNK)]
    announce(source, [[(position, ()) for position in chunk] for chunk in chunks])
    found, began = Compared(), time.monotonic()

    def compare(chunk: list[int]) -> Compared:
        of_chunk = Compared()
        for position in chunk:
            _compare(source, labelled, position, of_chunk)
        return of_chunk

    with ThreadPoolExecutor(max(1, workers), "mealv2-compare") as pool:
        waiting = iter(chunks)
        running = [pool.submit(compare, chunk) for chunk in islice(waiting, 4 * max(1, workers))]

        def parts() -> Iterator[Compared]:
            while running:
                yield running.pop(0).result()
                running.extend(pool.submit(compare, chunk) for chunk in islice(waiting, 1))

        def megabytes(part: Compared) -> int:
            return found.bytes // _MB - (found.bytes - part.bytes) // _MB

        total = num_bytes // _MB
        for part in progress(parts(), total=total, what=what, unit="MB", size=megabytes):
            found.images += part.images
            found.bytes += part.bytes
            found.different |= part.different
            found.unreadable |= part.unreadable
    found.seconds = time.monotonic() - began
    return found


def _compare(source: ImageSource, labelled: KnownHashes, position: int, found: Compared) -> None:
    """Read and compare one image; add what was found."""
    key = source.keys[position]
    try:
        data = source.read(position)
        found.images += 1
        found.bytes += len(data)
        labelled.check(position, source.original_hash(position, data))
    except (DataError, OSError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        kind = found.different if reason.startswith(NOT_LABELLED) else found.unreadable
        kind[key] = reason


def require_same(
    found: Compared, source: ImageSource, labels: str, *, advice: str, skip_unreadable: bool = False
) -> None:
    """Raise LabelSetError, naming images, if a comparison found others than those labelled."""
    bad = found.different | ({} if skip_unreadable else found.unreadable)
    if not bad:
        return
    for key, reason in list(bad.items())[:_MAX_LOGGED]:
        info(f"{source.name}/{key}: {reason}")
    total = found.images + len(found.unreadable)
    kinds = [f"{len(found.different)} with another content"] * bool(found.different)
    kinds += [f"{len(found.unreadable)} that cannot be read"] * bool(found.unreadable)
    raise LabelSetError(
        f"{len(bad)} of {count(total, 'image')} of {source.name} are not the pictures that "
        f"{labels} labels ({' and '.join(kinds)}): {first_names(sorted(bad))}; {advice}"
    )
