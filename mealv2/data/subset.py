"""Some of the images of a source, with another split name or other class ids."""

from bisect import bisect_right
from collections.abc import Sequence

from mealv2.data.left_out import LeftOut
from mealv2.data.source import ImageSource, multi_labels_of, where_is


class Subset:
    """The images of a source at ascending positions; an ImageSource.

    With ``classes``, class ids are those of its class names among them. ``note`` is shown beside
    the name in the summary, ``flags`` are the words of a command that make the same choice.
    """

    def __init__(
        self,
        source: ImageSource,
        positions: Sequence[int],
        *,
        split: str,
        classes: Sequence[str] | None = None,
        note: str = "",
        flags: Sequence[str] = (),
    ) -> None:
        self._source = source
        self._positions = positions
        self.name = source.name
        self.split = split
        self.note = note
        self.flags: Sequence[str] = flags or (source.flags if isinstance(source, Subset) else ())
        self.left_out: LeftOut = source.left_out
        self.keys = [source.keys[p] for p in positions]
        self.labels = [source.labels[p] for p in positions]
        self.sizes = [source.sizes[p] for p in positions]
        self.stored_sizes = [source.stored_sizes[p] for p in positions]
        self.classes = list(source.classes)
        several = multi_labels_of(source)
        self.multi_labels = None if several is None else [several[p] for p in positions]
        if classes is not None:
            id_of = {name: class_id for class_id, name in enumerate(classes)}
            ids = [id_of[name] for name in self.classes]
            self.labels = [ids[label] for label in self.labels]
            self.classes = list(classes)
            if self.multi_labels is not None:
                self.multi_labels = [_moved(row, ids, len(classes)) for row in self.multi_labels]
        self.shard_starts, _ = _starts(source.shard_starts, positions)
        self.groups, self._groups = _starts(source.groups, positions)

    def __len__(self) -> int:
        return len(self.keys)

    def announce(self, groups: Sequence[int]) -> None:
        """Receive the numbers of the groups that will be read, in order of first use."""
        self._source.announce([self._groups[group] for group in groups])

    def where(self, position: int) -> str:
        """Return where an image is, for messages."""
        return where_is(self._source, self._positions[position])

    def read(self, position: int) -> bytes:
        """Return the encoded image at ``position``; raises as the source."""
        return self._source.read(self._positions[position])

    def original_hash(self, position: int, data: bytes) -> int:
        """Return the content hash of an image before it was packed."""
        return self._source.original_hash(self._positions[position], data)


def _moved(row: Sequence[int], ids: Sequence[int], num_classes: int) -> list[int]:
    """Return the labels of an image under other class ids; a class that is new is absent (-1)."""
    moved = [-1] * num_classes
    for class_id, label in zip(ids, row, strict=True):
        moved[class_id] = label
    return moved


def _starts(
    starts: Sequence[int] | None, positions: Sequence[int]
) -> tuple[list[int] | None, list[int]]:
    """Return where each group with an image at one of ``positions`` starts among these, and the
    numbers of these groups.
    """
    if starts is None:
        return None, []
    numbers = [bisect_right(starts, position) - 1 for position in positions]
    first = [i for i, number in enumerate(numbers) if i == 0 or number != numbers[i - 1]]
    return first, [numbers[i] for i in first]
