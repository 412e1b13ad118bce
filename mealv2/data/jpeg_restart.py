"""Cut a smaller JPEG around a box out of a JPEG with restart markers, by copying bytes.

The bits between two restart markers (an interval of several MCUs, JPEG's smallest coded units) can
be decoded on their own. If intervals tile the rows of MCUs, as in the files of `mealv2 pack`, those
that cover a box are a JPEG with a new width and height.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

MAX_KEPT = 0.9  # share of the intervals above which a cut costs as much as it saves
_BLOCK = 8  # pixels on a side of a transform

_BASELINE = 0xC0
_ANY_FRAME = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_HUFFMAN_FRAMES = (_BASELINE, 0xC1, 0xC2)  # 0xC2 is progressive
_DHT, _SOI, _EOI, _SOS, _DQT, _DRI = 0xC4, b"\xff\xd8", b"\xff\xd9", 0xDA, 0xDB, 0xDD
# JFIF's and Adobe's segments define the colour space.
_COPIED = (_DQT, _DHT, _DRI, 0xE0, 0xEE)
_SKIPPED = frozenset({*range(0xE1, 0xEE), 0xEF, 0xFE})  # EXIF, colour profiles, comments
_JFIF = 0xE0
_INDEX, _INDEX_NAME = 0xE9, b"mealv2 restart\0"  # an application's segment, and its first bytes
_MAX_SEGMENT_SIZE = 0xFFFF
_FULL_SPECTRUM = b"\x00\x3f\x00"  # all coefficients at full precision: not progressive
# One of these in the first bytes: perhaps a file that can be cut. The second is a restart interval.
PACKED_MARKS = (_INDEX_NAME, b"\xff\xdd\x00\x04")
PACKED_MARKS_END = 4096


class Region(NamedTuple):
    """A JPEG of a part of an image that starts at (top, left)."""

    data: bytes
    top: int
    left: int


@dataclass(frozen=True, slots=True)
class Frame:
    """The size of a JPEG and of its MCUs in pixels, and the ids of its components."""

    width: int
    height: int
    mcu_width: int
    mcu_height: int
    components: bytes

    @property
    def mcus_per_row(self) -> int:
        return -(-self.width // self.mcu_width)

    @property
    def mcu_rows(self) -> int:
        return -(-self.height // self.mcu_height)


@dataclass(frozen=True, slots=True)
class RestartFile:
    """A file that can be cut according to its header.

    ``interval`` is in MCUs; ``scan`` is the offset of the coded bits; ``header`` are the segments
    that a cut copies, with height and width at ``size_at``; ``lengths``, from the index if there is
    one, are the bytes of each interval.
    """

    data: bytes
    frame: Frame
    interval: int
    scan: int
    header: bytes
    size_at: int
    lengths: np.ndarray | None

    @property
    def num_intervals(self) -> int:
        """Intervals of the full image."""
        return self.frame.mcus_per_row // self.interval * self.frame.mcu_rows

    def region(self, top: int, left: int, height: int, width: int) -> Region | None:
        """Return a JPEG that decodes to exactly the part of the image around a box.

        None for a box that is not inside the image, for a part that is nearly the full image, and
        for unexpected markers: decode the full file then. Never raises.
        """
        frame = self.frame
        if min(top, left, height - 1, width - 1) < 0 or not self.data.endswith(_EOI):
            return None
        if top + height > frame.height or left + width > frame.width:
            return None
        # in intervals, which are one MCU row high
        x0, x1 = _with_margin(left, left + width, frame.width, frame.mcu_width)
        y0, y1 = _with_margin(top, top + height, frame.height, frame.mcu_height)
        step = self.interval * frame.mcu_width
        columns = range(x0 // step, -(-x1 // step))
        rows = range(y0 // frame.mcu_height, -(-y1 // frame.mcu_height))
        if len(columns) * len(rows) > MAX_KEPT * self.num_intervals:
            return None
        if (marks := self._marks()) is None:
            return None
        part_top, part_left = rows.start * frame.mcu_height, columns.start * step
        size = (
            min(rows.stop * frame.mcu_height, frame.height) - part_top,
            min(columns.stop * step, frame.width) - part_left,
        )
        header = bytearray(self.header)
        struct.pack_into(">HH", header, self.size_at, *size)
        num_columns = frame.mcus_per_row // self.interval
        firsts = range(rows.start * num_columns, rows.stop * num_columns, num_columns)
        part = _copied(self.data, header, self.scan, marks, firsts, columns)
        return None if part is None else Region(part, part_top, part_left)

    def _marks(self) -> np.ndarray | None:
        """Return the offsets of the markers after the intervals, by the index or by a search."""
        if self.lengths is None or len(self.lengths) != self.num_intervals:
            return _search(self.data, self.scan, self.num_intervals)
        marks: np.ndarray = (self.lengths + np.int64(2)).cumsum() - 2
        return marks if marks[-1] == len(self.data) - self.scan - 2 else None


def is_packed(data: bytes) -> bool:
    """Return whether a file can be cut according to its header."""
    return read_header(data) is not None


def with_index(data: bytes) -> bytes:
    """Return a file that can be cut with an index of its intervals, which saves a search.

    Other files are returned unchanged, as are those with more or longer intervals than fit into an
    index: about 32,000, of up to 65,535 bytes.
    """
    data = _without_index(data)
    file = read_header(data)
    marks = None if file is None else _search(data, file.scan, file.num_intervals)
    if marks is None:
        return data
    lengths = np.diff(marks, prepend=-2) - 2
    size = 2 + len(_INDEX_NAME) + 2 * len(lengths)
    if size > _MAX_SEGMENT_SIZE or lengths.max() > 0xFFFF:
        return data
    segment = (
        struct.pack(">BBH", 0xFF, _INDEX, size) + _INDEX_NAME + lengths.astype("<u2").tobytes()
    )
    # JFIF: its segment must be the first
    insert_at = next((end for marker, _, end in _segments(data) if marker == _JFIF), len(_SOI))
    return data[:insert_at] + segment + data[insert_at:]


def _without_index(data: bytes) -> bytes:
    for marker, at, end in _segments(data):
        if marker == _INDEX and data.startswith(_INDEX_NAME, at + 4):
            return _without_index(data[:at] + data[end:])
    return data


def mcus_per_row(data: bytes) -> int | None:
    """Return the MCUs of a row of a JPEG whose components are coded together.

    None for anything but an 8-bit Huffman-coded JPEG of 1 or 3 components.
    """
    for marker, at, end in _segments(data):
        if marker in _ANY_FRAME:
            frame = _frame(data, at, end) if marker in _HUFFMAN_FRAMES else None
            return None if frame is None else frame.mcus_per_row
    return None


def _with_margin(begin: int, end: int, size: int, mcu_size: int) -> tuple[int, int]:
    """Widen a range of pixels to those whose subsampled chroma they depend on."""
    if mcu_size == _BLOCK:
        return begin, end
    # libjpeg: a pixel's chroma is interpolated from its own sample and the next one, 2 pixels away,
    # but not in images of 2 samples (4 pixels): a narrow part at the far edge is widened
    return max(0, min(begin - 2, size - 5)), min(end + 2, size)


def _segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """Yield (marker, offset, end) of the segments up to the first scan's.

    Stops early at an incomplete segment.
    """
    size = len(data)
    at = 2
    if not data.startswith(_SOI):
        return
    while at + 4 <= size and data[at] == 0xFF:
        marker = data[at + 1]
        if marker == 0xFF:  # a fill byte
            at += 1
            continue
        length = data[at + 2] << 8 | data[at + 3]
        end = at + 2 + length
        if length < 2 or end > size:
            return
        yield marker, at, end
        if marker == _SOS:
            return
        at = end


def read_header(data: bytes) -> RestartFile | None:
    """Read the header of a file that can be cut; None for any other. Never raises."""
    frame: Frame | None = None
    lengths: np.ndarray | None = None
    interval = size_at = begin = skipped = 0
    copied = []
    for marker, at, end in _segments(data):
        if marker in _SKIPPED:
            if marker == _INDEX and data.startswith(_INDEX_NAME, at + 4):
                first = at + 4 + len(_INDEX_NAME)
                lengths = np.frombuffer(data, "<u2", (end - first) // 2, first)
            copied.append(data[begin:at])
            skipped += end - at
            begin = end
        elif marker == _BASELINE and frame is None:
            frame = _frame(data, at, end)
            size_at = at + 5 - skipped
            if frame is None:
                return None
        elif marker == _DRI and end - at == 6:
            interval = data[at + 4] << 8 | data[at + 5]
        elif marker == _SOS and frame is not None and interval:
            if frame.mcus_per_row % interval or not _is_only_scan(data[at:end], frame):
                return None
            header = b"".join([*copied, data[begin:end]])
            return RestartFile(data, frame, interval, end, header, size_at, lengths)
        elif marker not in _COPIED or marker == _DRI:
            return None
    return None


def _frame(data: bytes, at: int, end: int) -> Frame | None:
    """Read a frame's segment; None unless it has 8 bits and 1 or 3 components."""
    if end - at < 10:
        return None
    precision, height, width, count = struct.unpack_from(">BHHB", data, at + 4)
    if precision != 8 or count not in (1, 3) or end - at != 10 + 3 * count or not height * width:
        return None
    factors = data[at + 11 : end : 3]
    across, down = [factor >> 4 for factor in factors], [factor & 15 for factor in factors]
    if not all(1 <= factor <= 4 for factor in (*across, *down)):
        return None
    # a component that is coded alone has MCUs of one block, for any factors
    x, y = (max(across), max(down)) if count == 3 else (1, 1)
    return Frame(width, height, x * _BLOCK, y * _BLOCK, data[at + 10 : end : 3])


def _is_only_scan(segment: bytes, frame: Frame) -> bool:
    """Return whether a scan has all components, in the frame's order, and all their bits."""
    count = len(frame.components)
    return (
        len(segment) == 8 + 2 * count
        and segment[4] == count
        and segment[5 : 5 + 2 * count : 2] == frame.components
        and segment.endswith(_FULL_SPECTRUM)
    )


def _search(data: bytes, scan: int, count: int) -> np.ndarray | None:
    """Return the offsets, from ``scan``, of the ``count`` markers after the intervals, int64.

    Their numbers cycle from 0 to 7; the last, the end of the image, ends ``data``. None for any
    other markers.
    """
    coded = np.frombuffer(data, np.uint8, -1, scan)
    is_mark = coded[:-1] == 0xFF
    is_mark &= coded[1:] != 0  # 0xFF00 is a byte of data
    marks: np.ndarray = is_mark.nonzero()[0]
    if len(marks) != count:
        return None
    is_in_order = (coded[1:].take(marks[:-1]) == _codes(np.arange(count - 1))).all()
    return marks if is_in_order else None


def _codes(numbers: np.ndarray) -> np.ndarray:
    """Return the second bytes of restart markers."""
    return (numbers & 7) + 0xD0


def _copied(
    data: bytes, header: bytearray, scan: int, marks: np.ndarray, rows: range, columns: range
) -> bytes | None:
    """Join a header and some intervals, with renumbered markers.

    ``marks`` are the offsets of the markers after all intervals, from ``scan``; ``rows`` are the
    numbers of the first interval of each row, ``columns`` those of intervals in a row. None if a
    marker that is needed is missing.
    """
    # with the interval before the first of each row; -1 is the one before the scan
    numbers_RC = np.array(rows)[:, None] + np.arange(columns.start - 1, columns.stop)
    numbers = numbers_RC.ravel()[int(numbers_RC[0, 0] < 0) :]
    codes = _codes(numbers)
    if numbers[-1] == len(marks) - 1:
        codes[-1] = _EOI[1]
    coded, at = np.frombuffer(data, np.uint8, -1, scan), marks.take(numbers)
    if (coded.take(at) != 0xFF).any() or (coded.take(at + 1) != codes).any():
        return None
    ends_RC = np.append(marks, -2).take(numbers_RC) + 2
    begins_R, ends_R = ends_RC[:, 0], ends_RC[:, -1]
    scan_bytes = memoryview(data)[scan:]
    runs = zip(begins_R.tolist(), ends_R.tolist(), strict=True)
    part = bytearray().join([header, *[scan_bytes[begin:end] for begin, end in runs]])
    shifts_R = (ends_R - begins_R).cumsum() - ends_R + len(header)
    offsets = (ends_RC[:, 1:] - 1 + shifts_R[:, None]).ravel()
    np.frombuffer(part, np.uint8)[offsets] = _codes(np.arange(len(offsets)))
    part[-1] = _EOI[1]
    return bytes(part)
