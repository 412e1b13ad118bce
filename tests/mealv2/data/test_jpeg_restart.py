"""jpeg_restart: a part cut out of a JPEG by copying bytes decodes to the same pixels, bit by bit.

The files are made by libjpeg-turbo's cjpeg and jpegtran.
"""

import functools
import io
import random
import shutil
import struct
import subprocess
from collections.abc import Iterator

import numpy as np
import pytest
from PIL import Image

from mealv2.data import jpeg_restart
from mealv2.data.jpeg_restart import (
    MAX_KEPT,
    Region,
    is_packed,
    mcus_per_row,
    read_header,
    with_index,
)
from mealv2.data.pixels import decode

pytestmark = pytest.mark.skipif(
    not (shutil.which("jpegtran") and shutil.which("cjpeg")),
    reason="needs jpegtran and cjpeg (Debian: libjpeg-turbo-progs)",
)

# The sampling factors of Y, Cb and Cr, and the MCU they give.
LAYOUTS = {
    "4:4:4": ("1x1,1x1,1x1", 8, 8),
    "4:2:2": ("2x1,1x1,1x1", 16, 8),
    "4:2:0": ("2x2,1x1,1x1", 16, 16),
    "4:4:0": ("1x2,1x1,1x1", 8, 16),
    "4:1:1": ("4x1,1x1,1x1", 32, 8),
    "two kinds of chroma": ("2x2,2x1,1x2", 16, 16),
    "chroma finer than luma": ("1x1,2x2,1x1", 16, 16),
    "gray": ("", 8, 8),
}
SIZES = [(121, 77), (67, 131), (128, 64), (19, 50), (35, 18), (5, 33), (3, 40)]


def region(data: bytes, top: int, left: int, height: int, width: int) -> Region | None:
    """Return a smaller JPEG, and the first pixel of a box in it."""
    file = read_header(data)
    part = None if file is None else file.region(top, left, height, width)
    return None if part is None else Region(part.data, top - part.top, left - part.left)


def run(*command: str, data: bytes) -> bytes:
    return subprocess.run(command, input=data, capture_output=True, check=True).stdout


@functools.cache
def pixels_of(width: int, height: int) -> bytes:
    """A PPM with edges in every colour: chroma that a neighbour's would show in."""
    rng = np.random.default_rng(width * 1000 + height)
    blocks = rng.integers(0, 256, (-(-height // 3), -(-width // 3), 3), dtype=np.uint8)
    pixels = blocks.repeat(3, axis=0).repeat(3, axis=1)[:height, :width]
    return b"P6 %d %d 255\n" % (width, height) + pixels.tobytes()


@functools.cache
def plain(layout: str, width: int, height: int, *more: str) -> bytes:
    sampling = LAYOUTS[layout][0]
    kind = ("-sample", sampling) if sampling else ("-grayscale",)
    return run("cjpeg", "-quality", "85", *kind, *more, data=pixels_of(width, height))


def restarted(data: bytes, interval: int, *more: str) -> bytes:
    return run("jpegtran", "-copy", "all", *more, "-restart", f"{interval}B", data=data)


@functools.cache
def packed(layout: str, width: int, height: int, interval: int) -> bytes:
    return restarted(plain(layout, width, height), interval)


def boxes(width: int, height: int) -> Iterator[tuple[int, int, int, int]]:
    """Yield (top, left, height, width): corners, edges, lines, single pixels, anywhere."""
    rng = random.Random(width * height)
    for top in {0, height // 2, height - 1}:
        for left in {0, width // 2, width - 1}:
            yield top, left, 1, 1
    yield 0, 0, height, 1
    yield 0, width - 1, height, 1
    yield 0, 0, 1, width
    yield height - 1, 0, 1, width
    for _ in range(12):
        box_height, box_width = rng.randint(1, height), rng.randint(1, width)
        yield (
            rng.randint(0, height - box_height),
            rng.randint(0, width - box_width),
            box_height,
            box_width,
        )


def pixels(data: bytes, top: int, left: int, height: int, width: int) -> np.ndarray:
    return decode(data)[top : top + height, left : left + width]


# --- the same pixels ----------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_box_of_every_layout_decodes_to_the_same_bits(layout: str) -> None:
    cuts = 0
    for width, height in SIZES:
        per_row = -(-width // LAYOUTS[layout][1])
        whole = decode(plain(layout, width, height))
        for interval in {1, 4, 8, per_row}:
            data = packed(layout, width, height, interval)
            assert mcus_per_row(data) == per_row
            assert is_packed(data) == (per_row % interval == 0)
            for top, left, box_height, box_width in boxes(width, height):
                part = region(data, top, left, box_height, box_width)
                if part is None:
                    continue
                cuts += 1
                place = (part.top, part.left, box_height, box_width)
                expected = whole[top : top + box_height, left : left + box_width]
                np.testing.assert_array_equal(pixels(part.data, *place), expected)
                assert len(part.data) < len(data)
    assert cuts > 150


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_part_has_no_more_than_the_intervals_that_decide_the_box(layout: str) -> None:
    _, mcu_width, mcu_height = LAYOUTS[layout]
    data = packed(layout, 121, 77, 1)
    # the pixels around it decide chroma that has fewer samples, those of other MCUs not
    top, left = mcu_height + 2, 2 * mcu_width + 2
    part = region(data, top, left, mcu_height - 4, mcu_width - 4)
    assert part is not None
    assert (part.top, part.left) == (2, 2)
    assert decode(part.data).shape[1::-1] == (min(mcu_width, 121 - 2 * mcu_width), mcu_height)


def test_a_box_at_the_seam_of_fine_chroma_takes_the_next_intervals_too() -> None:
    part = region(packed("4:2:0", 121, 77, 1), 16, 16, 8, 8)
    assert part is not None
    assert (part.top, part.left) == (16, 16)
    part = region(packed("4:4:4", 121, 77, 1), 16, 16, 8, 8)
    assert part is not None
    assert (part.top, part.left) == (0, 0)


def test_a_part_is_of_the_files_kind_and_can_be_cut_again() -> None:
    data = packed("4:2:0", 121, 77, 1)
    part = region(data, 40, 50, 20, 40)
    assert part is not None
    assert is_packed(part.data)
    again = region(part.data, part.top + 10, part.left + 20, 2, 2)
    assert again is not None
    np.testing.assert_array_equal(
        pixels(again.data, again.top, again.left, 2, 2), pixels(data, 50, 70, 2, 2)
    )


def test_more_than_65536_intervals_are_numbered_rightly() -> None:
    data = packed("gray", 2200, 2200, 1)
    part = region(data, 2000, 100, 150, 2000)
    assert part is not None
    np.testing.assert_array_equal(
        pixels(part.data, part.top, part.left, 150, 2000), pixels(data, 2000, 100, 150, 2000)
    )


def test_gray_with_sampling_factors_has_blocks_for_mcus_all_the_same() -> None:
    data = bytearray(packed("gray", 121, 77, 4))
    at = data.index(b"\xff\xc0")
    assert data[at + 11] == 0x11
    data[at + 11] = 0x22
    whole = bytes(data)
    part = region(whole, 30, 50, 20, 20)
    assert part is not None
    np.testing.assert_array_equal(
        pixels(part.data, part.top, part.left, 20, 20), pixels(whole, 30, 50, 20, 20)
    )


def test_colours_that_adobes_marker_names_stay_the_same() -> None:
    data = restarted(plain("4:4:4", 121, 77, "-rgb"), 4)
    assert b"Adobe" in data
    part = region(data, 30, 50, 20, 20)
    assert part is not None
    np.testing.assert_array_equal(
        pixels(part.data, part.top, part.left, 20, 20), pixels(data, 30, 50, 20, 20)
    )


def test_exif_profiles_and_comments_are_not_copied() -> None:
    image = Image.open(io.BytesIO(plain("4:2:0", 121, 77)))
    exif = Image.Exif()
    exif[0x010E] = "a description " * 500
    file = io.BytesIO()
    image.save(file, "JPEG", exif=exif, icc_profile=b"p" * 5000, comment=b"c" * 5000, quality=85)
    data = restarted(file.getvalue(), 4)
    assert len(data) > 17_000
    part = region(data, 0, 0, 20, 20)
    assert part is not None
    assert len(part.data) < 4000
    np.testing.assert_array_equal(
        pixels(part.data, part.top, part.left, 20, 20), pixels(data, 0, 0, 20, 20)
    )


# --- what is not cut ----------------------------------------------------------------------------

BOX = (20, 20, 10, 10)


def test_the_file_of_these_tests_can_be_cut() -> None:
    assert region(packed("4:2:0", 121, 77, 4), *BOX) is not None


def test_a_box_that_is_nearly_the_whole_is_not_cut() -> None:
    data = packed("4:4:4", 160, 160, 1)  # 20 x 20 MCUs
    rows = int(20 * MAX_KEPT)
    assert region(data, 0, 0, 8 * rows, 160) is not None
    assert region(data, 0, 0, 8 * rows + 1, 160) is None
    assert region(data, 0, 0, 160, 160) is None


@pytest.mark.parametrize(
    "box",
    [(-1, 0, 9, 9), (0, -1, 9, 9), (70, 0, 9, 9), (0, 115, 9, 9), (0, 0, 0, 9), (0, 0, 9, 0)],
)
def test_a_box_that_is_not_inside_the_image_is_not_cut(box: tuple[int, int, int, int]) -> None:
    assert region(packed("4:2:0", 121, 77, 4), *box) is None


def test_files_of_other_kinds_are_not_cut() -> None:
    original = plain("4:2:0", 121, 77)
    for data in (
        original,
        restarted(original, 3),
        restarted(original, 16),
        restarted(original, 4, "-progressive"),
        run("cjpeg", "-restart", "4B", "-progressive", data=pixels_of(121, 77)),
        b"",
        b"\xff",
        b"\xff\xd8",
        b"\xff\xd8\xff\xd9",
        b"RIFF",
    ):
        assert not is_packed(data)
        assert region(data, *BOX) is None
    file = io.BytesIO()
    Image.new("CMYK", (121, 77)).save(file, "JPEG")
    assert mcus_per_row(file.getvalue()) is None
    assert region(restarted(file.getvalue(), 4), *BOX) is None


def test_mcus_of_a_row_are_known_of_progressive_files_too() -> None:
    assert mcus_per_row(plain("4:2:0", 121, 77, "-progressive")) == 8
    assert mcus_per_row(b"") is None


def marks_of(data: bytes) -> list[int]:
    """Return the places of restart markers."""
    scan = data.index(b"\xff\xda")
    return [n for n in range(scan, len(data)) if data[n] == 0xFF and 0xD0 <= data[n + 1] < 0xD8]


@pytest.mark.parametrize(
    "damage",
    [
        "one lost",
        "eight lost",
        "one more",
        "eight more",
        "out of order",
        "another marker",
        "filling",
        "two scans",
        "bytes behind",
        "no end",
        "half",
    ],
)
def test_markers_that_are_not_as_expected_are_not_cut(damage: str) -> None:
    data = bytearray(packed("4:4:4", 121, 77, 4))
    marks = marks_of(bytes(data))
    assert len(marks) == 10 * 4 - 1
    if damage == "one lost":
        del data[marks[-1] : marks[-1] + 2]
    elif damage == "eight lost":
        del data[marks[-8] : marks[-1] + 2]
    elif damage == "one more":
        data[-2:-2] = b"\xff\xd7"
    elif damage == "eight more":
        data[-2:-2] = b"".join(b"\xff" + bytes([0xD0 + (39 + n) % 8]) for n in range(8))
    elif damage == "out of order":
        data[marks[30] + 1] ^= 1
    elif damage == "another marker":
        data[marks[38] + 1] = 0xDA
    elif damage == "filling":
        data.insert(marks[38], 0xFF)
    elif damage == "two scans":
        data[-2:-2] = b"\xff\xda\x00\x03\x00"
    elif damage == "bytes behind":
        data += b"\0"
    elif damage == "no end":
        del data[-2:]
    elif damage == "half":
        del data[len(data) // 2 :]
    assert region(bytes(data), *BOX) is None


@pytest.mark.parametrize(
    ("marker", "offset", "value"),
    [
        (b"\xff\xc0", 1, b"\xc1"),
        (b"\xff\xc0", 1, b"\xc9"),
        (b"\xff\xc0", 4, b"\x0c"),  # 12 bits
        (b"\xff\xc0", 5, b"\x00\x00"),  # the height comes later
        (b"\xff\xc0", 7, b"\x00\x00"),
        (b"\xff\xc0", 9, b"\x04"),
        (b"\xff\xc0", 11, b"\x02"),
        (b"\xff\xc0", 11, b"\x52"),
        (b"\xff\xdd", 3, b"\x06"),
        (b"\xff\xdd", 4, b"\x00\x00"),
        (b"\xff\xdd", 1, b"\xcc"),  # arithmetic coding
        (b"\xff\xda", 4, b"\x01"),
        (b"\xff\xda", 5, b"\x02"),
        (b"\xff\xda", 11, b"\x01"),
        (b"\xff\xda", 12, b"\x00"),
        (b"\xff\xda", 13, b"\x01"),
    ],
)
def test_a_header_that_says_something_else_is_not_cut(
    marker: bytes, offset: int, value: bytes
) -> None:
    data = packed("4:2:0", 121, 77, 4)
    at = data.index(marker) + offset
    changed = data[:at] + value + data[at + len(value) :]
    assert changed != data
    assert not is_packed(changed)
    assert region(changed, *BOX) is None


@pytest.mark.parametrize(
    ("marker", "length", "payload"),
    [
        (b"\xff\xda", 14, b"\x03\x01\x00\x02\x11\x03\x11\x00\x00\x3f\x00\x3f\x00"),
        (b"\xff\xdd", 5, b"\x00\x04\x00"),
        (b"\xff\xdd", 3, b"\x04"),
        (b"\xff\xdb", 0, b""),
    ],
)
def test_a_segment_of_another_length_is_not_cut(marker: bytes, length: int, payload: bytes) -> None:
    data = packed("4:2:0", 121, 77, 4)
    at = data.index(marker)
    old_end = at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    changed = data[: at + 2] + length.to_bytes(2, "big") + payload + data[old_end:]
    assert not is_packed(changed)
    assert region(changed, *BOX) is None


def test_a_frame_that_ends_too_early_is_none() -> None:
    assert mcus_per_row(b"\xff\xd8\xff\xc0\x00\x04\x08\x00") is None


def test_two_frames_are_not_cut_and_the_last_interval_counts() -> None:
    data = packed("4:2:0", 121, 77, 4)
    at = data.index(b"\xff\xc0")
    frame = data[at : at + 19]
    assert region(data[:at] + frame + data[at:], *BOX) is None
    at = data.index(b"\xff\xdd")
    other = b"\xff\xdd\x00\x04\x00\x02"
    assert region(data[:at] + other + data[at:], *BOX) is not None
    assert region(data[: at + 6] + other + data[at + 6 :], *BOX) is None


def test_filling_between_segments_does_no_harm() -> None:
    data = packed("4:2:0", 121, 77, 4)
    at = data.index(b"\xff\xc0")
    filled = data[:at] + b"\xff\xff" + data[at:]
    part = region(filled, *BOX)
    assert part is not None
    np.testing.assert_array_equal(
        pixels(part.data, part.top, part.left, 10, 10), pixels(data, *BOX)
    )


# --- damaged ------------------------------------------------------------------------------------


def damaged(data: bytes, rng: random.Random) -> bytes:
    """Return a file with something wrong, mostly in its header."""
    end = data.index(b"\xff\xda") + 20 if rng.random() < 0.7 else len(data)
    broken = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 5))):
        at = rng.randrange(min(end, len(broken)))
        what = rng.randrange(5)
        if what == 0:
            broken[at] ^= 1 << rng.randrange(8)
        elif what == 1:
            broken[at] = rng.choice((0, 1, 2, 0x7F, 0xC0, 0xD0, 0xD9, 0xDA, 0xDD, 0xFE, 0xFF))
        elif what == 2:
            broken[at:at] = rng.randbytes(rng.choice((1, 2, 8)))
        elif what == 3:
            del broken[at : at + rng.choice((1, 2, 8))]
        elif len(broken) > 2:
            struct.pack_into(">H", broken, min(at, len(broken) - 2), rng.choice((0, 1, 65535)))
        if not broken:
            return b""
    return bytes(broken[: rng.randrange(len(broken))]) if rng.random() < 0.1 else bytes(broken)


def test_damaged_files_never_raise() -> None:
    rng = random.Random(2026)
    whole = [packed(layout, 121, 77, 4) for layout in ("4:2:0", "4:4:4", "gray", "4:1:1")]
    outcomes = {"cut": 0, "refused": 0}
    for _ in range(6000):
        data = damaged(rng.choice(whole), rng)
        box = (rng.randrange(70), rng.randrange(100), rng.randint(1, 60), rng.randint(1, 60))
        part = region(data, *box)
        assert isinstance(is_packed(data), bool)
        mcus_per_row(data)
        outcomes["refused" if part is None else "cut"] += 1
        if part is not None:
            assert part.data.startswith(b"\xff\xd8")
            assert part.data.endswith(b"\xff\xd9")
            assert part.top >= 0 <= part.left
            assert len(part.data) < len(data)
    assert min(outcomes.values()) > 300, outcomes


# --- the index --------------------------------------------------------------------------------


@pytest.fixture
def indexed() -> bytes:
    """A file of 16 x 12 intervals, with an index of them."""
    file = io.BytesIO()
    rng = np.random.default_rng(5)
    pixels = rng.integers(0, 256, (96, 256, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, "JPEG", subsampling=0, restart_marker_blocks=2)
    data = with_index(file.getvalue())
    assert len(data) == len(file.getvalue()) + 4 + len(b"mealv2 restart\0") + 2 * 16 * 12
    assert np.array_equal(decode(data), decode(file.getvalue()))
    return data


def parts(data: bytes) -> list[bytes | None]:
    """Cut some boxes, the corners among them."""
    boxes = [(0, 0, 20, 30), (76, 226, 20, 30), (40, 100, 1, 1), (8, 0, 8, 256), (3, 17, 50, 99)]
    found = [region(data, *box) for box in boxes]
    return [None if part is None else part.data for part in found]


def test_parts_by_an_index_are_those_by_a_search(
    indexed: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = indexed.replace(b"mealv2 restart\0", b"somebody else\0\0")
    searched = parts(plain)
    assert None not in searched
    monkeypatch.delattr(jpeg_restart, "_search")
    assert parts(indexed) == searched
    assert not any(b"mealv2" in (part or b"") for part in parts(indexed))


def test_an_index_is_made_again_and_only_for_what_can_be_cut(indexed: bytes) -> None:
    assert with_index(indexed) == indexed
    # the lengths of another file
    place = indexed.index(b"mealv2 restart\0") + 15
    stale = indexed[:place] + bytes(384) + indexed[place + 384 :]
    assert with_index(stale) == indexed
    file = io.BytesIO()
    Image.new("RGB", (64, 64)).save(file, "JPEG")
    assert with_index(file.getvalue()) == file.getvalue()
    assert with_index(b"no JPEG") == b"no JPEG"


def test_an_index_goes_behind_jfifs_segment(indexed: bytes) -> None:
    assert indexed[2:4] == b"\xff\xe0"
    length = int.from_bytes(indexed[4:6], "big")
    assert indexed[4 + length : 6 + length] == b"\xff\xe9"


def test_an_index_that_lies_is_found_out(indexed: bytes) -> None:
    place = indexed.index(b"mealv2 restart\0") + 15
    right = parts(indexed)
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(300):
        changed = bytearray(indexed)
        one, two = (place + 2 * int(n) for n in rng.choice(192, 2, replace=False))
        by = int(rng.integers(1, 4))
        # so that the sum is still right
        for at, delta in ((one, by), (two, -by)):
            length = int.from_bytes(changed[at : at + 2], "little") + delta
            changed[at : at + 2] = (length & 0xFFFF).to_bytes(2, "little")
        for found, expected in zip(parts(bytes(changed)), right, strict=True):
            assert found in (None, expected)
            refused += found is None
    assert refused > 100


def test_an_index_of_another_length_is_not_used(indexed: bytes) -> None:
    at = indexed.index(b"\xff\xe9")
    size = int.from_bytes(indexed[at + 2 : at + 4], "big")
    for cut in (0, 1, 2, 384):
        shorter = (
            indexed[: at + 2]
            + (size - cut).to_bytes(2, "big")
            + indexed[at + 4 : at + 2 + size - cut]
            + indexed[at + 2 + size :]
        )
        assert parts(shorter) == parts(indexed)
