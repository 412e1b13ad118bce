"""mealv2.fkd: files as FKD's generator and others write them, hostile ones, trees, label types."""

import os
import pickle
import random
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import reference
from mealv2.data.pixels import cut
from mealv2.errors import LabelSetError
from mealv2.fkd import (
    FkdFile,
    find_files,
    kind_of,
    labels_of,
    match_files,
    pack,
    read_file,
    write_file,
)
from mealv2.soft_labels import SoftLabels, top_k
from mealv2.views import packed_boxes, unpacked_view
from official import CROPS, GOLDEN, KINDS

CLASSES = 40


def some_probs(num_rows: int = CROPS, num_classes: int = CLASSES) -> Tensor:
    logits = np.random.default_rng(7).normal(0, 2.5, (num_rows, num_classes))
    return torch.softmax(torch.tensor(logits, dtype=torch.float32), dim=1)


def some_boxes(num_crops: int = CROPS) -> np.ndarray:
    rng = np.random.default_rng(3)
    corners = np.sort(rng.integers(0, 101, (num_crops, 2, 2)), axis=1) / 100
    corners[:, 1] += 0.001  # never empty
    corners /= 1.001
    sizes = corners[:, 1] - corners[:, 0]
    return np.concatenate([corners[:, 0], sizes], axis=1).astype(np.float32)


def some_flips(num_crops: int = CROPS) -> np.ndarray:
    return np.arange(num_crops) % 3 == 1


def packed_as(kind: str) -> np.ndarray:
    """Return the stored labels of an FKD type, written down by hand."""
    probs = some_probs().numpy()
    if kind == "ori":
        return probs
    k = int(kind.partition("_k")[2] or 1)
    ids, values = reference.top_k(probs, k)
    if kind == "hard":
        return ids[:, 0]
    packed = np.stack([ids.astype(np.float32), values], axis=1)
    return packed[:, :, 0] if kind == "smoothing" else packed


def content(kind: str = "marginal_smoothing_k5") -> list[np.ndarray]:
    return [some_boxes(), some_flips(), packed_as(kind)]


BOXES, FLIPS, LABELS = content()


# --- how others write ---------------------------------------------------------------------------


def rezipped(path: Path, edit: Callable[[str, bytes], bytes | None]) -> None:
    """Write the zip again with each member edited; None leaves it out."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            if (edited := edit(name, data)) is not None:
                archive.writestr(name, edited)


def as_arrays(path: Path, values: list[np.ndarray]) -> None:
    torch.save(values, path, pickle_protocol=2)


def as_tensors(path: Path, values: list[np.ndarray]) -> None:
    torch.save([torch.from_numpy(value) for value in values], path)


def as_arrays_and_labels(path: Path, values: list[np.ndarray]) -> None:
    """FKD's generator: boxes and flips as arrays, labels as a tensor."""
    torch.save([values[0], values[1], torch.from_numpy(values[2])], path)


def of_old_numpy(path: Path, values: list[np.ndarray]) -> None:
    as_arrays(path, values)
    rezipped(
        path, lambda _, data: data.replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
    )


def of_new_numpy(path: Path, values: list[np.ndarray]) -> None:
    as_arrays(path, values)
    rezipped(
        path, lambda _, data: data.replace(b"numpy.core.multiarray", b"numpy._core.multiarray")
    )


def of_old_torch(path: Path, values: list[np.ndarray]) -> None:
    as_tensors(path, values)
    kept = ("data.pkl", "version", "data/0", "data/1", "data/2")
    rezipped(path, lambda name, data: data if name.endswith(kept) else None)


def without_zip(path: Path, values: list[np.ndarray]) -> None:
    torch.save(values, path, _use_new_zipfile_serialization=False)


def tensors_without_zip(path: Path, values: list[np.ndarray]) -> None:
    tensors = [torch.from_numpy(value) for value in values]
    torch.save(tensors, path, _use_new_zipfile_serialization=False)


def in_columns(path: Path, values: list[np.ndarray]) -> None:
    torch.save([np.asfortranarray(value) for value in values], path)


def as_parts_of_larger_tensors(path: Path, values: list[np.ndarray]) -> None:
    """FKD's generator: one image of a batch, after a permute, with the storage of the batch."""
    batch = [torch.stack([torch.zeros_like(t), t], 1) for t in map(torch.from_numpy, values)]
    torch.save([tensor.transpose(0, 1)[1] for tensor in batch], path)


WRITERS = [
    as_arrays,
    as_tensors,
    as_arrays_and_labels,
    of_old_numpy,
    of_new_numpy,
    of_old_torch,
    without_zip,
    tensors_without_zip,
    in_columns,
    as_parts_of_larger_tensors,
]


def same(found: FkdFile, values: list[np.ndarray]) -> bool:
    pairs = zip((found.boxes, found.flips, found.labels), values, strict=True)
    return all(a.dtype == b.dtype and np.array_equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize("kind", KINDS)
def test_files_of_all_writers_and_kinds_are_read(
    tmp_path: Path, write: Callable[[Path, list[np.ndarray]], None], kind: str
) -> None:
    path = tmp_path / "n01_10026.tar"
    write(path, content(kind))
    found = read_file(path)
    assert same(found, content(kind))

    dense = found.soft_labels(CLASSES, kind).to_dense()
    expected = reference.fkd_recovery(packed_as(kind), kind.partition("_k")[0], CLASSES)
    np.testing.assert_allclose(dense.numpy(), expected, rtol=2e-5, atol=1e-9)


@pytest.mark.parametrize("write", WRITERS)
def test_what_is_read_is_what_torch_reads(
    tmp_path: Path, write: Callable[[Path, list[np.ndarray]], None]
) -> None:
    path = tmp_path / "x.tar"
    write(path, content())
    found = read_file(path)
    theirs = torch.load(path, map_location="cpu", weights_only=False)
    assert same(found, [np.asarray(value) for value in theirs])


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize("kind", KINDS)
def test_float16_files_lose_only_what_float16_loses(
    tmp_path: Path, write: Callable[[Path, list[np.ndarray]], None], kind: str
) -> None:
    boxes, flips, labels = content(kind)
    halves = [boxes.astype(np.float16), flips, labels.astype(np.float16)]
    write(tmp_path / "x.tar", halves)
    found = read_file(tmp_path / "x.tar")
    assert same(found, [halves[0].astype(np.float32), flips, halves[2]])
    dense = found.soft_labels(CLASSES, kind).to_dense().numpy()
    expected = reference.fkd_recovery(labels, kind.partition("_k")[0], CLASSES)
    np.testing.assert_allclose(dense, expected, rtol=0, atol=3e-3)


def test_float16_ids_are_refused_above_2049_classes() -> None:
    packed = np.array([[[2048, 3], [0.5, 0.25]]], dtype=np.float16)
    assert labels_of(packed, "marginal_smoothing", 2049).indices_NK.tolist() == [[2048, 3]]
    with pytest.raises(LabelSetError, match="float16 cannot tell 2050 classes apart"):
        labels_of(packed, "marginal_smoothing", 2050)


def test_boxes_in_float16_may_reach_over_the_edge_by_their_rounding(tmp_path: Path) -> None:
    for side in range(1, 2000, 7):
        starts = np.arange(side)
        parts = np.stack([starts, starts, side - starts, side - starts], 1) / side
        values = [parts.astype(np.float16), np.zeros(side, bool), np.zeros(side, np.int64)]
        as_arrays(tmp_path / "x.tar", values)
        assert len(read_file(tmp_path / "x.tar").boxes) == side


@pytest.mark.parametrize(
    ("kind", "packed"),
    [
        ("hard", "hard_int"),
        ("smoothing", "smoothing"),
        ("marginal_smoothing_k5", "marginal_smoothing_k5"),
        ("marginal_smoothing_k10", "marginal_smoothing_k10"),
        ("marginal_renorm", "marginal_renorm_k5"),
    ],
)
def test_files_of_the_official_labels_recover_the_official_distributions(
    tmp_path: Path, kind: str, packed: str
) -> None:
    as_arrays(tmp_path / "x.tar", [BOXES, FLIPS, GOLDEN[f"R_packed_{packed}"]])
    dense = read_file(tmp_path / "x.tar").soft_labels(1000, kind).to_dense()
    expected = GOLDEN[f"R_dense_{packed.removesuffix('_int')}"]
    np.testing.assert_allclose(dense.numpy(), expected, rtol=1e-3, atol=1e-6)


def test_boxes_of_a_file_cut_the_official_crops_within_one_level(tmp_path: Path) -> None:
    boxes, image = GOLDEN["C_coords_ijhw_rel"].astype(np.float32), GOLDEN["C_image_u8"]
    as_arrays(tmp_path / "x.tar", [boxes, FLIPS[: len(boxes)], np.zeros(len(boxes), np.int64)])
    packed = packed_boxes(read_file(tmp_path / "x.tar").boxes)
    height, width = image.shape[:2]
    for number in (1, 2):  # box 0 lies on half pixels, which the generator never writes
        view = unpacked_view(packed[number], False, width=width, height=height)
        crop = cut(image, view, 16, resize="pil").astype(int)
        assert np.abs(crop - GOLDEN["C_crops_u8"][number]).max() <= 1


# --- what is refused ----------------------------------------------------------------------------


def test_crops_without_a_label_are_left_out(tmp_path: Path) -> None:
    boxes, flips, labels = content()
    as_arrays(tmp_path / "x.tar", [boxes, flips, labels[:4]])
    assert same(read_file(tmp_path / "x.tar"), [boxes[:4], flips[:4], labels[:4]])


def with_value(array: np.ndarray, value: float, *place: int) -> np.ndarray:
    changed = array.copy()
    changed[place] = value
    return changed


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ([BOXES, FLIPS], "not a list of boxes, flips and labels"),
        ([BOXES, FLIPS, LABELS, LABELS], "not a list of boxes, flips and labels"),
        ({"boxes": BOXES}, "opcode SETITEM, which no label file has"),
        ([BOXES, FLIPS, 3], "does not hold arrays"),
        ([BOXES, FLIPS, "text"], "does not hold arrays"),
        ([BOXES.reshape(-1), FLIPS, LABELS], r"boxes are float32 of shape \(24,\)"),
        ([BOXES[:, :3], FLIPS, LABELS], r"boxes are float32 of shape \(6, 3\)"),
        ([BOXES.astype(int), FLIPS, LABELS], "boxes are int64"),
        ([BOXES, FLIPS[:5], LABELS], "flips are bool of shape"),
        ([BOXES, FLIPS.astype(float), LABELS], "flips are float64"),
        ([BOXES, FLIPS, np.concatenate([LABELS, LABELS])], "12 labels for 6 boxes"),
        ([BOXES, FLIPS, torch.tensor(3.0)], "0 labels for 6 boxes"),
        ([with_value(BOXES, np.nan, 2, 1), FLIPS, LABELS], "box 2 is not inside"),
        ([with_value(BOXES, -0.01, 3, 0), FLIPS, LABELS], "box 3 is not inside"),
        ([with_value(BOXES, 1.01, 3, 2), FLIPS, LABELS], "box 3 is not inside"),
        ([with_value(BOXES, 0.0, 4, 3), FLIPS, LABELS], "box 4 is not inside"),
        ([with_value(BOXES, 0.0, 5, 2), FLIPS, LABELS], "box 5 is not inside"),
        ([np.array([[0.6, 0, 0.401, 1]] * 6, "f4"), FLIPS, LABELS], "box 0 is not inside"),
        ([np.array([[0, 0.6, 1, 0.401]] * 6, "f4"), FLIPS, LABELS], "box 0 is not inside"),
        ([with_value(BOXES, np.inf, 0, 3), FLIPS, LABELS], "box 0 is not inside"),
        ([BOXES, FLIPS, with_value(LABELS, np.nan, 0, 1, 2)], "a label is not finite"),
        ([BOXES, FLIPS, with_value(LABELS, np.inf, 0, 0, 2)], "a label is not finite"),
        ([BOXES, FLIPS, LABELS.astype(object)], "cannot read label file"),
        ([BOXES, FLIPS, np.array(["a"] * 6)], "elements are not numbers"),
        ([BOXES, FLIPS, LABELS.reshape(6, 2, 5, 1)], "cannot have its shape"),
        ([BOXES, FLIPS, LABELS[:0]], "cannot read label file"),
    ],
)
def test_other_content_is_refused_with_path_and_reason(
    tmp_path: Path, values: object, said: str
) -> None:
    torch.save(values, tmp_path / "x.tar", pickle_protocol=2)
    with pytest.raises(LabelSetError, match=said) as caught:
        read_file(tmp_path / "x.tar")
    assert str(tmp_path / "x.tar") in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("place", "value", "said"),
    [
        ((1, 0, 2), 3.5, "class 3.5, not an integer"),
        ((1, 0, 2), 40.0, "class 40 of 40"),
        ((1, 0, 2), -1.0, "class -1 of 40"),
        ((1, 0, 2), float(LABELS[1, 0, 0]), "a class twice"),
        ((1, 1, 2), -0.1, "not probabilities"),
        ((1, 1, 2), 1.1, "not probabilities"),
    ],
)
def test_labels_that_are_none_are_refused_with_path_and_reason(
    tmp_path: Path, place: tuple[int, ...], value: float, said: str
) -> None:
    as_arrays(tmp_path / "x.tar", [BOXES, FLIPS, with_value(LABELS, value, *place)])
    found = read_file(tmp_path / "x.tar")
    with pytest.raises(LabelSetError, match=said) as caught:
        found.soft_labels(CLASSES)
    assert str(tmp_path / "x.tar") in str(caught.value)


def test_a_missing_file_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_file(tmp_path / "x.tar")


@pytest.mark.parametrize("write", [as_arrays, as_tensors, without_zip])
def test_every_truncation_is_refused(
    tmp_path: Path, write: Callable[[Path, list[np.ndarray]], None]
) -> None:
    path = tmp_path / "x.tar"
    write(path, [BOXES[:2], FLIPS[:2], LABELS[:2]])
    data = path.read_bytes()
    for size in range(0, len(data), 3):
        path.write_bytes(data[:size])
        with pytest.raises(LabelSetError, match="cannot read label file"):
            read_file(path)


def mutated(data: bytes, rng: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 8))):
        place = rng.randrange(len(changed))
        match rng.randrange(5):
            case 0:
                changed[place] ^= 1 << rng.randrange(8)
            case 1:
                changed[place] = rng.choice((0, 255, rng.randrange(256)))
            case 2:
                del changed[place : place + rng.randrange(1, 64)]
            case 3:
                changed[place:place] = rng.randbytes(rng.randrange(1, 64))
            case 4:
                start = rng.randrange(len(changed))
                changed[place : place + 16] = changed[start : start + 16]
    return bytes(changed)


@pytest.mark.parametrize("write", [as_arrays, as_tensors])
def test_a_mutated_file_is_refused_or_has_the_same_content(
    tmp_path: Path, write: Callable[[Path, list[np.ndarray]], None]
) -> None:
    path, rng = tmp_path / "x.tar", random.Random(0)
    write(path, content())
    data, refused = path.read_bytes(), 0
    for _ in range(500):
        path.write_bytes(mutated(data, rng))
        try:
            assert same(read_file(path), content())
        except LabelSetError:
            refused += 1
    assert refused > 250


def test_a_mutated_pickle_never_does_worse_than_be_refused(tmp_path: Path) -> None:
    """Behind the checksums: the file before torch 1.6 has none."""
    path, rng = tmp_path / "x.tar", random.Random(1)
    refused = 0
    for write in (without_zip, tensors_without_zip):
        write(path, content())
        data = path.read_bytes()
        for _ in range(500):
            path.write_bytes(mutated(data, rng))
            try:
                read_file(path)
            except LabelSetError:
                refused += 1
    assert refused > 100


class Calls:
    """An object whose pickle calls a function, and sets a state on what comes back."""

    def __init__(self, function: Callable[..., object], *args: object, state: object = None):
        self.reduced = (function, args) if state is None else (function, args, state)

    def __reduce__(self) -> tuple[object, ...]:
        return self.reduced


_reconstruct = np.zeros(0).__reduce__()[0]  # where NumPy has it depends on its version


def array_of_state(*state: object) -> Calls:
    return Calls(_reconstruct, np.ndarray, (0,), b"b", state=(1, *state))


@pytest.mark.parametrize("in_zip", [True, False])
@pytest.mark.parametrize("where", ["alone", "in the list", "in an array's state", "as an argument"])
@pytest.mark.parametrize("how", ["system", "eval", "exec", "open"])
def test_a_malicious_pickle_does_nothing(
    tmp_path: Path, how: str, where: str, in_zip: bool
) -> None:
    marker, path = tmp_path / "ran", tmp_path / "x.tar"
    code = f"open({str(marker)!r}, 'w').close()"
    attack = {
        "system": Calls(os.system, f"touch {marker}"),
        "eval": Calls(eval, code),
        "exec": Calls(exec, code),
        "open": Calls(open, str(marker), "w"),
    }[how]
    values: object = {
        "alone": attack,
        "in the list": [BOXES, FLIPS, attack],
        "in an array's state": [BOXES, FLIPS, array_of_state(attack, np.dtype("f4"), False, b"")],
        "as an argument": [BOXES, FLIPS, Calls(np.dtype, attack)],
    }[where]
    torch.save(values, path, _use_new_zipfile_serialization=in_zip)
    with pytest.raises(LabelSetError, match=r"it names '.*', which no label file does"):
        read_file(path)
    assert not marker.exists()


def test_the_malicious_pickles_of_these_tests_would_run(tmp_path: Path) -> None:
    torch.save([BOXES, Calls(os.system, f"touch {tmp_path / 'ran'}")], tmp_path / "x.tar")
    torch.load(tmp_path / "x.tar", weights_only=False)
    assert (tmp_path / "ran").exists()


def test_a_pickle_and_an_archive_are_no_label_files(tmp_path: Path) -> None:
    (tmp_path / "pickle.tar").write_bytes(pickle.dumps(content(), protocol=2))
    (tmp_path / "empty.tar").touch()
    (tmp_path / "zeros.tar").write_bytes(bytes(10240))
    with zipfile.ZipFile(tmp_path / "zip.tar", "w") as archive:
        archive.writestr("a/b.txt", "text")
    torch.save(content(), tmp_path / "protocol4.tar", pickle_protocol=4)
    for path in tmp_path.iterdir():
        with pytest.raises(LabelSetError, match="cannot read label file"):
            read_file(path)


def peak_memory(path: Path) -> int:
    """Return the bytes that refusing a file takes at most."""
    tracemalloc.start()
    try:
        with pytest.raises(LabelSetError):
            read_file(path)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def doubled(levels: int) -> tuple[object, ...]:
    """Return a tuple of 2 ** levels leaves that takes a few bytes a level to store."""
    value: tuple[object, ...] = ()
    for _ in range(levels):
        value = (value, value)
    return value


F4 = np.dtype("f4")
BIG = np.zeros(50_000, np.float32)


@pytest.mark.parametrize(
    "labels",
    [
        Calls(_reconstruct, np.ndarray, (2**31,), b"b"),
        Calls(bytearray, 2**31),
        Calls(torch.Tensor, 2**29),
        array_of_state((2**31,), F4, False, b"abcd"),
        array_of_state((2**62, 4, 4), F4, False, b"abcd"),
        array_of_state((-1, 1), F4, False, b"abcd"),
        array_of_state((1,) * 100_000, F4, False, b"abcd"),
        array_of_state((10**400,) * 2000, F4, False, b"abcd"),
        array_of_state(doubled(60), F4, False, b"abcd"),
        array_of_state((1,), doubled(60), False, b"abcd"),
        array_of_state((1,), F4, False, doubled(60)),
        doubled(60),
        Calls(np.dtype, doubled(60)),
        torch.zeros(1).expand(2**20, 2),
    ],
)
def test_a_forged_array_takes_no_memory_and_no_time(tmp_path: Path, labels: object) -> None:
    torch.save([BOXES, FLIPS, labels], tmp_path / "x.tar", pickle_protocol=2)
    assert peak_memory(tmp_path / "x.tar") < 100 * (tmp_path / "x.tar").stat().st_size


def test_many_names_for_one_array_take_no_memory(tmp_path: Path) -> None:
    torch.save([BIG] * 100_000, tmp_path / "x.tar", pickle_protocol=2)
    assert peak_memory(tmp_path / "x.tar") < 100 * (tmp_path / "x.tar").stat().st_size


def edit_pickle(old: bytes, new: bytes) -> Callable[[str, bytes], bytes]:
    def edit(name: str, data: bytes) -> bytes:
        if not name.endswith("data.pkl"):
            return data
        assert old in data
        return data.replace(old, new)

    return edit


DOUBLED = b")" + 60 * b"q\xf0h\xf0\x86"  # a tuple of 2 ** 60 leaves


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (edit_pickle(b"ctorch\nFloatStorage\n", DOUBLED), "not that of a label file"),
        (edit_pickle(b"X\1\0\0\0002", DOUBLED), "not that of a label file"),
        (edit_pickle(b"K\x3ct", b"J\xff\xff\xff\x7ft"), "bytes are too many or too few"),
        (edit_pickle(b"K\x3ct", b"K\x3bt"), "bytes are too many or too few"),
        (edit_pickle(b"K\x06K\x02K\x05\x87", b"K\x07K\x02K\x05\x87"), "cannot have its shape"),
        (edit_pickle(b"K\x00K\x06K\x02", b"K\x01K\x06K\x02"), "exceeds its bytes"),
        (edit_pickle(b"K\nK\x05K\x01\x87", b"K\nK\x06K\x01\x87"), "exceeds its bytes"),
        (edit_pickle(b"K\nK\x05K\x01\x87", b"K\nJ\xff\xff\xff\xffK\x01\x87"), "exceeds its bytes"),
        (edit_pickle(b"FloatStorage", b"CoatStorage_"), "names 'torch CoatStorage_'"),
        (lambda name, data: data[:-4] if name.endswith("data/2") else data, "too many or too few"),
        (lambda name, data: None if name.endswith("data/2") else data, "it is damaged"),
        (lambda name, data: None if name.endswith("data.pkl") else data, "cannot read label file"),
        (lambda name, data: b"big" if name.endswith("byteorder") else data, "big-endian"),
    ],
)
def test_a_forged_tensor_is_refused(
    tmp_path: Path, edit: Callable[[str, bytes], bytes | None], said: str
) -> None:
    as_tensors(tmp_path / "x.tar", content())
    rezipped(tmp_path / "x.tar", edit)
    with pytest.raises(LabelSetError, match=said):
        read_file(tmp_path / "x.tar")


def test_a_zip_that_names_its_bytes_twice_is_refused(tmp_path: Path) -> None:
    as_tensors(tmp_path / "x.tar", content())
    with zipfile.ZipFile(tmp_path / "x.tar", "a") as archive:
        archive.writestr("x/data/last", bytes(1000))
        archive.filelist.extend(archive.filelist[-1:] * 100)
    with pytest.raises(LabelSetError, match="more than its size"):
        read_file(tmp_path / "x.tar")


@pytest.mark.parametrize("num_zeros", [0, 2**26])
def test_a_compressed_zip_is_refused(tmp_path: Path, num_zeros: int) -> None:
    as_tensors(tmp_path / "x.tar", content())
    with zipfile.ZipFile(tmp_path / "x.tar") as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    members["x/data/bomb"] = bytes(num_zeros)
    with zipfile.ZipFile(tmp_path / "x.tar", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    assert peak_memory(tmp_path / "x.tar") < 2**22


# --- label types --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_the_kind_of_stored_labels_shows_in_their_shape(kind: str) -> None:
    packed = packed_as(kind)
    assert kind_of(packed, CLASSES, kind) == kind
    assert kind_of(packed, CLASSES, kind.partition("_k")[0]) == kind
    assert kind_of(packed, CLASSES) == kind.replace("renorm", "smoothing")
    assert kind_of(packed.astype(np.float16), CLASSES, kind) == kind


@pytest.mark.parametrize(
    ("packed", "label_type", "said"),
    [
        (
            LABELS,
            "marginal_smoothing_k10",
            r"labels are float32 of shape \(6, 2, 5\), which does not match marg",
        ),
        (LABELS, "ori", "which does not match ori"),
        (LABELS, "soft", "unknown FKD label type 'soft'"),
        (LABELS, "marginal_smoothing_kx", "unknown FKD label type"),
        (LABELS, "hard_k5", "unknown FKD label type"),
        (LABELS[:, :1], None, "not match any FKD type"),
        (LABELS[:, 0], None, "not match any FKD type"),
        (LABELS.astype(np.int64), None, "not match any FKD type"),
        (FLIPS, None, "not match any FKD type"),
        (np.zeros((), np.float32), None, "not match any FKD type"),
    ],
)
def test_arrays_of_no_kind_are_refused(
    packed: np.ndarray, label_type: str | None, said: str
) -> None:
    with pytest.raises(LabelSetError, match=said):
        kind_of(packed, CLASSES, label_type)


def test_two_classes_need_the_name_of_their_type() -> None:
    packed = np.array([[0.0, 1.0], [1.0, 0.7]], np.float32)
    with pytest.raises(LabelSetError, match="name the label type"):
        kind_of(packed, 2)
    assert kind_of(packed, 2, "ori") == "ori"
    assert kind_of(packed, 2, "smoothing") == "smoothing"


@pytest.mark.parametrize("kind", KINDS)
def test_pack_stores_what_the_rules_say(kind: str) -> None:
    packed = pack(top_k(some_probs(), CLASSES), kind)
    assert packed.dtype == (torch.int64 if kind == "hard" else torch.float32)
    np.testing.assert_allclose(packed.numpy(), packed_as(kind), rtol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_pack_undoes_labels_of(kind: str) -> None:
    labels = labels_of(packed_as(kind), kind, CLASSES)
    np.testing.assert_allclose(pack(labels, kind).numpy(), packed_as(kind), rtol=1e-6)


@pytest.mark.parametrize("name", ["smoothing", "marginal_smoothing_k5", "marginal_smoothing_k10"])
def test_pack_stores_what_the_official_generator_stores(name: str) -> None:
    labels = top_k(torch.from_numpy(GOLDEN["R_probs"]), 1000)
    assert np.array_equal(pack(labels, name).numpy(), GOLDEN[f"R_packed_{name}"])
    assert np.array_equal(pack(labels, "hard").numpy(), GOLDEN["R_packed_hard_int"])
    assert np.array_equal(
        pack(labels, "marginal_renorm_k5").numpy(), GOLDEN["R_packed_marginal_renorm_k5"]
    )


def test_pack_keeps_the_first_of_equal_classes() -> None:
    labels = SoftLabels(
        torch.tensor([[7, 3, 5]]), torch.tensor([[0.2, 0.3, 0.3]]), torch.tensor([0.2]), 9
    )
    assert pack(labels, "marginal_smoothing_k2")[0, 0].tolist() == [3, 5]


@pytest.mark.parametrize("label_type", ["marginal_smoothing_k6", "marginal_renorm", "soft"])
def test_pack_refuses_what_the_labels_do_not_hold(label_type: str) -> None:
    with pytest.raises(LabelSetError, match=label_type):
        pack(top_k(some_probs(), 5), label_type)


# --- writing ------------------------------------------------------------------------------------


def as_fkd_reads(path: Path, crop: int) -> tuple[list[float], bool, Tensor]:
    """Take one crop as train_FKD.py does: torch.load with its defaults, then indices."""
    coords, flip_status, output = torch.load(path, map_location=torch.device("cpu"))
    order = torch.randperm(len(output), generator=torch.Generator().manual_seed(crop))
    sides = [coords[order[0]][i].item() for i in range(4)]
    return sides, bool(flip_status[order[0]] == True), output[order[0]].detach()  # noqa: E712


@pytest.mark.parametrize("kind", KINDS)
def test_written_files_are_read_by_fkd_and_by_us(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "x.tar"
    labels = pack(top_k(some_probs(), CLASSES), kind)
    write_file(path, BOXES, FLIPS, labels)

    found = read_file(path)
    assert same(found, [BOXES, FLIPS, labels.numpy()])
    seen = [as_fkd_reads(path, crop) for crop in range(20)]
    rows = list(zip(BOXES.tolist(), FLIPS.tolist(), labels, strict=True))
    for sides, flip, label in seen:
        row = rows[BOXES.tolist().index(sides)]
        assert flip == row[1]
        assert torch.equal(label, row[2])
        assert label.dtype == labels.dtype
    assert len({tuple(sides) for sides, _, _ in seen}) > 2
    assert list(tmp_path.iterdir()) == [path]


def test_what_cannot_be_read_is_not_written(tmp_path: Path) -> None:
    labels = torch.from_numpy(LABELS)
    for boxes in (BOXES[:3], BOXES * 2, BOXES.astype(int)):
        with pytest.raises(ValueError, match=r"boxes|box "):
            write_file(tmp_path / "x.tar", boxes, FLIPS[: len(boxes)], labels)
    assert list(tmp_path.iterdir()) == []


# --- trees --------------------------------------------------------------------------------------

KEYS = ["n01/a_1.JPEG", "n01/b.jpg", "n02/a_1.JPEG", "n02/c.old.png"]
NAMES = ["n01/a_1", "n01/b", "n02/a_1", "n02/c"]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name in NAMES:
        path = tmp_path / "labels" / "imagenet" / "train" / f"{name}.tar"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return tmp_path / "labels"


@pytest.mark.parametrize("level", ["", "imagenet", "imagenet/train"])
def test_label_files_are_found_from_every_level(tree: Path, level: str) -> None:
    (tree / "imagenet" / "train" / "n01" / ".tmp-d.tar").touch()
    (tree / "imagenet" / "train" / "n01" / "readme.txt").touch()
    files = find_files(tree / level)
    assert files == {name: tree / "imagenet" / "train" / f"{name}.tar" for name in NAMES}
    assert list(files) == NAMES


def test_label_files_are_found_in_a_split_of_another_name(tree: Path) -> None:
    (tree / "imagenet" / "train").rename(tree / "mine")
    assert list(find_files(tree / "mine")) == NAMES
    assert list(find_files(tree, split="mine")) == NAMES


def test_missing_and_several_trees_are_refused(tree: Path) -> None:
    (tree / "other" / "train").mkdir(parents=True)
    with pytest.raises(LabelSetError, match=r"several data sets; give one of .*imagenet.*other"):
        find_files(tree)
    with pytest.raises(LabelSetError, match=r"no label files in .*other"):
        find_files(tree / "other")
    with pytest.raises(LabelSetError, match="no label files in"):
        find_files(tree / "nothing")


def test_images_get_the_label_file_of_their_name_up_to_the_first_dot(tree: Path) -> None:
    files = find_files(tree)
    matched = match_files(KEYS, files)
    assert matched.paths == dict(zip(KEYS, files.values(), strict=True))
    assert matched.without_label == matched.without_image == []
    matched.require_all()


def test_names_match_in_whatever_form_of_unicode(tree: Path) -> None:
    (tree / "imagenet" / "train" / "n01" / "u\u0308.tar").touch()
    assert "n01/\u00fc.png" in match_files(["n01/\u00fc.png"], find_files(tree)).paths
    (tree / "imagenet" / "train" / "n01" / "\u00fc.tar").touch()
    with pytest.raises(LabelSetError, match="of the same image"):
        find_files(tree)


def test_what_is_missing_on_either_side_is_listed(tree: Path) -> None:
    matched = match_files(["n02/x.png", "n01/b.jpg", "n02/d.png"], find_files(tree))
    assert list(matched.paths) == ["n01/b.jpg"]
    assert matched.without_label == ["n02/d.png", "n02/x.png"]
    assert matched.without_image == ["n01/a_1", "n02/a_1", "n02/c"]
    said = (
        r"2 of 3 images have no label file \(first: n02/d.png, n02/x.png\); 3 label files have no"
    )
    with pytest.raises(LabelSetError, match=said):
        matched.require_all()


def test_images_that_share_a_label_file_are_refused(tree: Path) -> None:
    with pytest.raises(LabelSetError, match=r"n02/c.old.png and n02/c.new.png share .* n02/c.tar"):
        match_files([*KEYS, "n02/c.new.png"], find_files(tree))
