"""mealv2.fkd's batch files: as SRe2L writes them, damaged and hostile ones, the order of images."""

import os
import random
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sre2l
import torch

from mealv2.errors import LabelSetError
from mealv2.fkd import BatchFile, read_batch, sampled_order, write_batch

IMAGES, CLASSES = 6, 5
RNG = np.random.default_rng(0)
LOGITS = torch.tensor(RNG.normal(0, 4, (IMAGES, CLASSES))).half()
FLIPS = torch.tensor(RNG.integers(0, 2, IMAGES) == 1)
BOXES = torch.tensor([[0.25, 0.5, 0.5, 0.25], [0, 0, 1, 1]] * 3)
PLAIN = [BOXES, FLIPS, None, None, None, LOGITS]
ITSELF = [BOXES, FLIPS, torch.arange(IMAGES), 1.0, [0, 0, 0, 0], LOGITS]
CUTMIX_OF_NONE = [np.int64(3), np.int64(7), np.int64(3), np.int64(9)]  # np.clip returns these
NO_BOX = [BOXES, FLIPS, torch.arange(IMAGES).flip(0), 0.9999, CUTMIX_OF_NONE, LOGITS]


def is_same(found: BatchFile) -> bool:
    pairs = ((found.boxes, BOXES), (found.flips, FLIPS), (found.logits, LOGITS))
    return all(np.array_equal(a, b.numpy()) for a, b in pairs)


@pytest.mark.parametrize("content", [PLAIN, ITSELF, NO_BOX])
def test_files_are_what_sre2l_wrote(tmp_path: Path, content: list[Any]) -> None:
    torch.save(content, tmp_path / "batch_0.tar")
    found = read_batch(tmp_path / "batch_0.tar")
    assert is_same(found)
    assert found.logits.dtype == np.float16


def test_what_is_written_is_what_torch_reads(tmp_path: Path) -> None:
    path = tmp_path / "batch_0.tar"
    write_batch(path, BOXES.double().numpy(), FLIPS.numpy(), LOGITS.float())
    boxes, flips, partners, weight, box, logits = torch.load(path)
    assert torch.equal(boxes, BOXES)
    assert torch.equal(flips, FLIPS)
    assert torch.equal(logits, LOGITS)
    assert (partners.tolist(), weight, box) == (list(range(IMAGES)), 1.0, [0, 0, 0, 0])
    assert is_same(read_batch(path))


def replaced(place: int, value: object) -> list[object]:
    return [value if n == place else item for n, item in enumerate(PLAIN)]


def spoilt(place: int, index: object, value: float) -> list[object]:
    tensor = PLAIN[place].clone()
    tensor[index] = value
    return replaced(place, tensor)


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (PLAIN[:5], "it has 5 items, not 6"),
        ([BOXES, FLIPS, LOGITS], "it has 3 items, not 6"),
        (tuple(PLAIN), "it is not a list"),
        ({"boxes": BOXES}, "opcode SETITEM"),
        (replaced(0, None), "its boxes, flips or logits are not tensors"),
        (replaced(5, 3.0), "its boxes, flips or logits are not tensors"),
        (replaced(1, "text"), "it does not hold numbers"),
        (replaced(2, {}), "it does not hold numbers"),
        (replaced(0, BOXES[:5]), "boxes are float32 of shape"),
        (replaced(0, BOXES[:, :3]), "boxes are float32 of shape"),
        (replaced(0, BOXES.double()), "boxes are float64"),
        (replaced(1, FLIPS[:5]), "flips are bool of shape"),
        (replaced(1, FLIPS.long()), "flips are int64"),
        (replaced(5, LOGITS[:, 0]), "logits are float16 of shape"),
        (replaced(5, LOGITS.double()), "logits are float64"),
        (replaced(5, LOGITS.long()), "logits are int64"),
        (replaced(5, LOGITS[:0]), "cannot have its shape"),
        (spoilt(5, (1, 2), np.nan), "a logit is not finite"),
        (spoilt(5, (1, 2), np.inf), "a logit is not finite"),
        (spoilt(0, (4, 2), np.nan), "box 4 is not inside"),
        (spoilt(0, (4, 2), 0.9), "box 4 is not inside"),
        (spoilt(0, (4, 2), 0.0), "box 4 is not inside"),
        (spoilt(0, (4, 0), -0.1), "box 4 is not inside"),
        (replaced(1, torch.rand(IMAGES, 7)), "have Cutout"),
        (replaced(3, 0.5), "a mixing weight or box, but no partners"),
        ([*ITSELF[:2], torch.tensor([0, 0, 1, 2, 3, 4]), 0.5, None, LOGITS], "not an order"),
        ([*ITSELF[:2], torch.arange(IMAGES).float(), 0.5, None, LOGITS], "not an order"),
        ([*ITSELF[:3], None, None, LOGITS], "its mixing weight is None"),
        ([*ITSELF[:3], float("nan"), None, LOGITS], "its mixing weight is nan"),
        ([*ITSELF[:4], [0, 0, 0, 0.5], LOGITS], "its CutMix box is not four numbers"),
        ([*NO_BOX[:4], [0, 0, 1, 1], LOGITS], r"mixed by CutMix \(lambda 1\)"),
        ([*NO_BOX[:3], 0.5, None, LOGITS], r"mixed by MixUp \(lambda 0.5\)"),
    ],
)
def test_other_content_is_refused_with_path_and_reason(
    tmp_path: Path, content: object, named: str
) -> None:
    path = tmp_path / "batch_0.tar"
    torch.save(content, path)
    with pytest.raises(LabelSetError, match=named) as caught:
        read_batch(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_without_checksums_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "batch_0.tar"
    torch.save(PLAIN, path, _use_new_zipfile_serialization=False)
    with pytest.raises(LabelSetError, match="of torch 1"):
        read_batch(path)


def rezipped(data: bytes, edit: Callable[[bytes], bytes], path: Path) -> None:
    """Write a file with its pickle edited and its checksums right."""
    path.write_bytes(data)
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, edit(content) if name.endswith("data.pkl") else content)


def test_many_items_that_share_a_tensor_are_not_copied(tmp_path: Path) -> None:
    path = tmp_path / "batch_0.tar"
    torch.save([torch.zeros(1 << 20, dtype=torch.uint8)] * 100_000, path)
    tracemalloc.start()
    with pytest.raises(LabelSetError, match="it has 100000 items, not 6"):
        read_batch(path)
    assert tracemalloc.get_traced_memory()[1] < 20 << 20
    tracemalloc.stop()


class Calls:
    """An object whose pickle calls a function."""

    def __init__(self, *reduced: object) -> None:
        self.reduced = reduced

    def __reduce__(self) -> tuple[object, ...]:
        return self.reduced[0], self.reduced[1:]


@pytest.mark.parametrize("place", range(6))
@pytest.mark.parametrize("function", [os.system, eval, open])
def test_a_malicious_pickle_does_nothing(tmp_path: Path, place: int, function: Any) -> None:
    marker, path = tmp_path / "ran", tmp_path / "batch_0.tar"
    arguments = {
        os.system: [f"touch {marker}"],
        eval: [f"open({str(marker)!r}, 'w').close()"],
        open: [str(marker), "w"],
    }[function]
    for content in (replaced(place, Calls(function, *arguments)), Calls(function, *arguments)):
        torch.save(content, path)
        with pytest.raises(LabelSetError, match="which no label file does"):
            read_batch(path)
    assert not marker.exists()


@pytest.mark.parametrize("claimed", [b"\x03", b"\x7f", b"\xff"])
def test_a_claim_of_more_rows_than_there_are_bytes_is_refused(
    tmp_path: Path, claimed: bytes
) -> None:
    path = tmp_path / "batch_0.tar"
    torch.save(PLAIN, path)
    shape = b"K\x06K\x05\x86"  # the logits' (6, 5)
    data = path.read_bytes()
    assert data.count(shape) == 1
    rezipped(data, lambda pickle: pickle.replace(shape, b"K" + claimed + b"K\x05\x86"), path)
    with pytest.raises(LabelSetError, match=r"cannot read|shape"):
        read_batch(path)


@pytest.mark.parametrize("content", [PLAIN, ITSELF, NO_BOX])
def test_a_file_with_flipped_bits_is_refused_or_the_same(
    tmp_path: Path, content: list[Any]
) -> None:
    path, rng = tmp_path / "batch_0.tar", random.Random(0)
    torch.save(content, path)
    data, refused = path.read_bytes(), 0
    for case in range(300):
        changed = bytearray(data)
        for _ in range(1 + case % 3):
            changed[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(changed[: rng.randrange(len(data))] if case % 10 == 0 else changed)
        try:
            assert is_same(read_batch(path))
        except LabelSetError:
            refused += 1
    assert refused > 150


def test_a_changed_pickle_with_right_checksums_is_refused_or_a_valid_batch(tmp_path: Path) -> None:
    path, rng = tmp_path / "batch_0.tar", random.Random(1)
    torch.save(NO_BOX, path)
    data, refused = path.read_bytes(), 0

    def changed(pickle: bytes) -> bytes:
        copy = bytearray(pickle)
        for _ in range(rng.choice((1, 1, 2, 8))):
            copy[rng.randrange(len(copy))] = rng.choice((0, 1, 255, rng.randrange(256)))
        return bytes(copy)

    for _ in range(400):
        rezipped(data, changed, path)
        try:
            found = read_batch(path)
        except LabelSetError:
            refused += 1
        else:
            assert len(found.boxes) == len(found.flips) == len(found.logits)
            assert np.isfinite(found.logits).all()
    assert refused > 200


@pytest.mark.parametrize("num_images", [1, 7, 64, 100_003])
def test_images_are_in_the_order_of_torchs_sampler(num_images: int) -> None:
    batches = sre2l.batches_of(num_images, 32)
    for _, order in zip(range(3), sampled_order(num_images), strict=False):
        assert order.tolist() == [number for batch in next(batches) for number in batch]
