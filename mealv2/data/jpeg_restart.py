"""JPEGs with restart markers: a smaller JPEG around a box, cut out by copying bytes.

The bits between two restart markers (an interval of so many MCUs, JPEG's smallest coded units) are
decoded without those before. Where intervals tile the rows of MCUs, as in what `mealv2 pack`
writes, the intervals that cover a box are a JPEG again under a new width and height.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

BLOCK = 8  # pixels of a side that one transform makes
MOST_KEPT = 0.9  # of the intervals: what the cut costs, decoding the rest of a file costs too

_BASELINE = 0xC0
_ANY_FRAME = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_HUFFMAN_FRAMES = (_BASELINE, 0xC1, 0xC2)  # 0xC2 is progressive
_DHT, _SOI, _EOI, _SOS, _DQT, _DRI = 0xC4, b"\xff\xd8", b"\xff\xd9", 0xDA, 0xDB, 0xDD
# Decoders learn from JFIF's and Adobe's segments which colours these are.
_COPIED = (_DQT, _DHT, _DRI, 0xE0, 0xEE)
_LEFT_OUT = frozenset({*range(0xE1, 0xEE), 0xEF, 0xFE})  # EXIF, colour profiles, comments
_RESTARTS = np.tile(np.arange(0xD0, 0xD8, dtype=np.uint8), 4096)
_JFIF = 0xE0
_INDEX, _INDEX_NAME = 0xE9, b"mealv2 restart\0"  # an application's segment, and what begins it
_MOST_OF_SEGMENT = 0xFFFF
_WHOLE_SPECTRUM = b"\x00\x3f\x00"  # all coefficients at full precision: not progressive


@dataclass(frozen=True, slots=True)
class Region:
    """A smaller JPEG, and where in its pixels the box begins."""

    data: bytes
    top: int
    left: int


@dataclass(frozen=True, slots=True)
class _Frame:
    """The size of a JPEG in pixels, that of a MCU, and the ids of the components."""

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
    """A file that can be cut, as far as its header says: its frame, MCUs per interval, coded bits.

    ``scan`` is where these begin, ``header`` what a cut copies from before them, ``size_at`` the
    place of height and width in it; ``lengths`` are the bytes of each interval, by an index.
    """

    data: bytes
    frame: _Frame
    interval: int
    scan: int
    header: bytes
    size_at: int
    lengths: np.ndarray | None

    @property
    def width(self) -> int:
        """Pixels of a row."""
        return self.frame.width

    @property
    def height(self) -> int:
        """Rows of pixels."""
        return self.frame.height

    @property
    def num_intervals(self) -> int:
        """Intervals of the whole image."""
        return self.frame.mcus_per_row // self.interval * self.frame.mcu_rows

    def region(self, top: int, left: int, height: int, width: int) -> Region | None:
        """Return a JPEG that decodes to a part of the image with a box in it; see ``region``."""
        frame = self.frame
        if min(top, left, height - 1, width - 1) < 0 or not self.data.endswith(_EOI):
            return None
        if top + height > frame.height or left + width > frame.width:
            return None
        # the part in intervals, which are one MCU row high
        x0, x1 = _with_margin(left, left + width, frame.width, frame.mcu_width)
        y0, y1 = _with_margin(top, top + height, frame.height, frame.mcu_height)
        step = self.interval * frame.mcu_width
        columns = slice(x0 // step, -(-x1 // step))
        rows = slice(y0 // frame.mcu_height, -(-y1 // frame.mcu_height))
        num_kept = (columns.stop - columns.start) * (rows.stop - rows.start)
        if num_kept > MOST_KEPT * self.num_intervals:
            return None
        marks = self._marks()
        if marks is None:
            return None
        part_top, part_left = rows.start * frame.mcu_height, columns.start * step
        size = (
            min(rows.stop * frame.mcu_height, frame.height) - part_top,
            min(columns.stop * step, frame.width) - part_left,
        )
        header = bytearray(self.header)
        struct.pack_into(">HH", header, self.size_at, *size)
        marks_RC = marks.reshape(-1, frame.mcus_per_row // self.interval)
        part = _copied(self.data, header, self.scan, marks_RC, rows, columns)
        return None if part is None else Region(part, top - part_top, left - part_left)

    def _marks(self) -> np.ndarray | None:
        """Return the places of the markers behind the intervals, by the index or by a search."""
        if self.lengths is None or len(self.lengths) != self.num_intervals:
            return _search(self.data, self.scan, self.num_intervals)
        marks: np.ndarray = (self.lengths + np.int64(2)).cumsum() - 2
        return marks if marks[-1] == len(self.data) - self.scan - 2 else None


def region(data: bytes, top: int, left: int, height: int, width: int) -> Region | None:
    """Return a JPEG that decodes to a part of the image with a box in it, the same to the bit.

    None where there is nothing to gain (the part would be nearly the whole), where the box is not
    inside the image, and for whatever is not a whole baseline file of 1 or 3 components in one
    scan whose restart interval divides the row of MCUs: decode all of it then. Never raises.
    """
    file = opened(data)
    return None if file is None else file.region(top, left, height, width)


def is_packed(data: bytes) -> bool:
    """Return whether a file's header is that of one which ``region`` can cut."""
    return opened(data) is not None


def with_index(data: bytes) -> bytes:
    """Return a file that ``region`` can cut with an index of its intervals, which spares a search.

    The same bytes for any other file, and for one with more or longer intervals than an index has
    room for: 32,000 or so, of up to 65,535 bytes.
    """
    data = _without_index(data)
    file = opened(data)
    marks = None if file is None else _search(data, file.scan, file.num_intervals)
    if marks is None:
        return data
    lengths = np.diff(marks, prepend=-2) - 2
    size = 2 + len(_INDEX_NAME) + 2 * len(lengths)
    if size > _MOST_OF_SEGMENT or lengths.max() > 0xFFFF:
        return data
    segment = (
        struct.pack(">BBH", 0xFF, _INDEX, size) + _INDEX_NAME + lengths.astype("<u2").tobytes()
    )
    # JFIF: its segment is the first
    insert_at = next((end for marker, _, end in _segments(data) if marker == _JFIF), len(_SOI))
    return data[:insert_at] + segment + data[insert_at:]


def _without_index(data: bytes) -> bytes:
    for marker, at, end in _segments(data):
        if marker == _INDEX and data.startswith(_INDEX_NAME, at + 4):
            return _without_index(data[:at] + data[end:])
    return data


def mcus_per_row(data: bytes) -> int | None:
    """Return how many MCUs a row of a JPEG has when its components are coded together.

    None for what is no 8-bit Huffman-coded JPEG of 1 or 3 components.
    """
    for marker, at, end in _segments(data):
        if marker in _ANY_FRAME:
            frame = _frame(data, at, end) if marker in _HUFFMAN_FRAMES else None
            return None if frame is None else frame.mcus_per_row
    return None


def _with_margin(begin: int, end: int, size: int, mcu_size: int) -> tuple[int, int]:
    """Widen a range of pixels to what decides them where chroma has fewer samples."""
    if mcu_size == BLOCK:
        return begin, end
    # libjpeg: a pixel's chroma is interpolated from its own sample and the next one, 2 pixels off,
    # but not in images of 2 samples (4 pixels): a narrow part at the far edge is made wider
    return max(0, min(begin - 2, size - 5)), min(end + 2, size)


def _segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """Yield (marker, place of its 0xFF, end) of the segments up to the first scan's.

    Ends early at whatever is not a whole segment.
    """
    size = len(data)
    at = 2
    if not data.startswith(_SOI):
        return
    while at + 4 <= size and data[at] == 0xFF:
        marker = data[at + 1]
        if marker == 0xFF:  # a byte of filling
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


def opened(data: bytes) -> RestartFile | None:
    """Read the header of a file that can be cut; None for any other. Never raises."""
    frame: _Frame | None = None
    lengths: np.ndarray | None = None
    interval = size_at = begin = left_out = 0
    copied = []
    for marker, at, end in _segments(data):
        if marker in _LEFT_OUT:
            if marker == _INDEX and data.startswith(_INDEX_NAME, at + 4):
                first = at + 4 + len(_INDEX_NAME)
                lengths = np.frombuffer(data, "<u2", (end - first) // 2, first)
            copied.append(data[begin:at])
            left_out += end - at
            begin = end
        elif marker == _BASELINE and frame is None:
            frame = _frame(data, at, end)
            size_at = at + 5 - left_out
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


def _frame(data: bytes, at: int, end: int) -> _Frame | None:
    """Read a frame's segment; None where it is not of 8 bits and 1 or 3 components."""
    if end - at < 10:
        return None
    precision, height, width, count = struct.unpack_from(">BHHB", data, at + 4)
    if precision != 8 or count not in (1, 3) or end - at != 10 + 3 * count or not height * width:
        return None
    factors = data[at + 11 : end : 3]
    across, down = [factor >> 4 for factor in factors], [factor & 15 for factor in factors]
    if not all(1 <= factor <= 4 for factor in (*across, *down)):
        return None
    # a component that is coded alone has MCUs of one block, whatever its factors
    x, y = (max(across), max(down)) if count == 3 else (1, 1)
    return _Frame(width, height, x * BLOCK, y * BLOCK, data[at + 10 : end : 3])


def _is_only_scan(segment: bytes, frame: _Frame) -> bool:
    """Return whether a scan has all components, in the frame's order, and all of their bits."""
    count = len(frame.components)
    return (
        len(segment) == 8 + 2 * count
        and segment[4] == count
        and segment[5 : 5 + 2 * count : 2] == frame.components
        and segment.endswith(_WHOLE_SPECTRUM)
    )


def _search(data: bytes, scan: int, count: int) -> np.ndarray | None:
    """Return the places, from ``scan`` on, of the markers behind the intervals, int64.

    They are numbered from 0 to 7 over and over; the last, of the end of the image, ends ``data``.
    None where there are others, or not so many.
    """
    coded = np.frombuffer(data, np.uint8, -1, scan)
    is_mark = coded[:-1] == 0xFF  # and what follows is not 0, which makes it a byte of data
    is_mark &= coded[1:] != 0
    marks: np.ndarray = is_mark.nonzero()[0]
    if len(marks) != count:
        return None
    is_in_order = (coded[1:].take(marks[:-1]) == _restarts(count - 1)).all()
    return marks if is_in_order else None


def _restarts(count: int) -> np.ndarray:
    """Return the second bytes of so many restart markers, uint8."""
    return _RESTARTS[:count] if count <= len(_RESTARTS) else np.resize(_RESTARTS, count)


def _copied(
    data: bytes, header: bytearray, scan: int, marks_RC: np.ndarray, rows: slice, columns: slice
) -> bytes | None:
    """Join a header and the intervals of some rows and columns, with their markers numbered anew.

    ``marks_RC`` are the places of the markers behind the intervals, from ``scan`` on; None where
    one that is needed is not there.
    """
    kept_RC = marks_RC[rows, columns]
    ends_R = kept_RC[:, -1] + 2
    if columns.start:
        begins_R = marks_RC[rows, columns.start - 1] + 2
        needed = slice(columns.start - 1, columns.stop)
        is_whole = _are_marks(data, scan, marks_RC, rows, needed)
    else:  # behind the last marker of the row above; the first begins with the scan
        begins_R = np.concatenate([[-2], marks_RC[:-1, -1]])[rows] + 2
        above = slice(max(0, rows.start - 1), rows.stop - 1)
        is_whole = _are_marks(data, scan, marks_RC, rows, columns) and _are_marks(
            data, scan, marks_RC, above, slice(marks_RC.shape[1] - 1, None)
        )
    if not is_whole:
        return None
    coded = memoryview(data)[scan:]
    runs = zip(begins_R.tolist(), ends_R.tolist(), strict=True)
    part = bytearray().join([header, *[coded[begin:end] for begin, end in runs]])
    codes_R = (ends_R - begins_R).cumsum() - ends_R + (len(header) + 1)
    offsets = (kept_RC + codes_R[:, None]).ravel()
    np.frombuffer(part, np.uint8)[offsets] = _restarts(len(offsets))
    part[-1] = _EOI[1]
    return bytes(part)


def _are_marks(data: bytes, scan: int, marks_RC: np.ndarray, rows: slice, columns: slice) -> bool:
    """Return whether the markers of some intervals are there, each with its number."""
    coded = np.frombuffer(data, np.uint8, -1, scan)
    places_RC = marks_RC[rows, columns]
    found_RC = coded.take(places_RC + 1)
    is_right_RC = found_RC == _restarts(marks_RC.size).reshape(marks_RC.shape)[rows, columns]
    if places_RC.size and places_RC[-1, -1] == marks_RC[-1, -1]:
        is_right_RC[-1, -1] = found_RC[-1, -1] == _EOI[1]
    return bool(is_right_RC.all() and (coded.take(places_RC) == 0xFF).all())
