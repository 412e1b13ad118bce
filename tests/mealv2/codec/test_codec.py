"""mealv2.codec: the record of a view by itself: its readers, what it keeps, damage, the loss."""

import hashlib
import struct
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

import reference
from image_views import views_of_images
from mealv2.codec.record import anchors_of, check_rows, decode_rows, dense_rows, id_bits, num_bytes
from mealv2.codec.record_encoder import _keys, _largest
from mealv2.errors import LabelSetError
from mealv2.losses import similarity_loss
from mealv2.soft_labels import EncodedLabels, encode

quickly = settings(max_examples=60, deadline=None, derandomize=True, database=None)

DEGENERATE = ["one-hot", "uniform", "two peaks", "float16 zeros", "subnormal", "no tail"]


def degenerate(kind: str, num_classes: int) -> Tensor:
    """Return one row, float32 or float16."""
    row = torch.zeros(num_classes)
    if kind == "one-hot":
        row[num_classes // 2] = 1.0
    elif kind == "uniform":
        row[:] = 1.0 / num_classes
    elif kind == "two peaks":
        row[[0, num_classes - 1]] = 0.5
    elif kind == "float16 zeros":
        row = torch.softmax(-3.0 * torch.arange(num_classes).float(), 0).half()
    elif kind == "subnormal":
        row[:] = 1e-44
        row[0] = 1.0
    else:
        row[: (num_classes + 1) // 2] = 2.0 / (num_classes + 1)
    return row[None]


def distributions(num_rows: int, num_classes: int, scale: float = 2.0, seed: int = 0) -> Tensor:
    """Rows of probabilities, float32; a higher scale makes more confident ones."""
    generator = torch.Generator().manual_seed(seed)
    scales = scale * torch.rand(num_rows, 1, generator=generator)
    logits = scales * torch.randn(num_rows, num_classes, generator=generator)
    return torch.softmax(logits.double(), 1).float()


@st.composite
def probabilities(draw: st.DrawFn, most: int = 5000) -> Tensor:
    num_classes = draw(st.integers(2, most))
    if draw(st.booleans()):
        return degenerate(draw(st.sampled_from(DEGENERATE)), num_classes)
    scale = draw(st.sampled_from([0.0, 0.5, 2.0, 5.0, 40.0]))
    probs = distributions(draw(st.integers(1, 5)), num_classes, scale, draw(st.integers(0, 999)))
    return probs.to(draw(st.sampled_from([torch.float32, torch.float16, torch.float64])))


@st.composite
def encoded(draw: st.DrawFn, most: int = 5000) -> tuple[Tensor, EncodedLabels]:
    """Return (probabilities, the same encoded in some way)."""
    probs = draw(probabilities(most))
    if draw(st.booleans()):
        rate = draw(st.sampled_from([1e-6, 1e-4, 1e-3, 1e-2, 1.0]))
        return probs, encode(probs, rate=rate)
    return probs, encode(probs, topk=draw(st.integers(1, probs.shape[1])))


def counts_of(labels: EncodedLabels) -> np.ndarray:
    """Return the number of classes that each view keeps."""
    return labels.records().counts_R


def bytes_of(labels: EncodedLabels) -> list[bytes]:
    """Return the record of each view."""
    found, data = labels.records(), labels.data_P.tobytes()
    places = zip(found.at_R.tolist(), found.sizes_R.tolist(), strict=True)
    return [data[at : at + size] for at, size in places]


def columns_of(labels: EncodedLabels) -> tuple[np.ndarray, np.ndarray]:
    """Return the counts and the records, contiguous, as ``decode_rows`` takes them."""
    return counts_of(labels), np.frombuffer(b"".join(bytes_of(labels)), np.uint8)


def numpy_dense(labels: EncodedLabels) -> np.ndarray:
    return dense_rows(*columns_of(labels), labels.num_classes)


def reference_dense(labels: EncodedLabels) -> np.ndarray:
    rows = zip(bytes_of(labels), counts_of(labels).tolist(), strict=True)
    return np.array([reference.decode_record(row, k, labels.num_classes) for row, k in rows])


def of_records(
    records: Sequence[bytes], counts: Sequence[int], num_classes: int, count_size: int = 1
) -> EncodedLabels:
    """Return labels of views by themselves: a block is a count and a record."""
    rows = zip(counts, records, strict=True)
    blocks = [count.to_bytes(count_size, "little") + record for count, record in rows]
    return EncodedLabels.of_blocks(blocks, 1, num_classes, count_size=count_size)


def divergence(probs: Tensor, labels: EncodedLabels) -> Tensor:
    """KL(p || recovered), N, float64."""
    probs = probs.double()
    return (torch.xlogy(probs, probs) - probs * labels.to_dense().double().log()).sum(1)


# --- the record and its readers -------------------------------------------------------------------


@quickly
@given(encoded())
def test_both_decoders_agree_with_the_reference(case):
    _, labels = case
    expected = reference_dense(labels)
    np.testing.assert_allclose(labels.to_dense().numpy(), expected, rtol=2e-5, atol=0)
    np.testing.assert_allclose(numpy_dense(labels), expected, rtol=2e-5, atol=0)


@quickly
@given(encoded())
def test_recovered_rows_are_positive_and_sum_to_1(case):
    probs, labels = case
    for dense in (labels.to_dense().numpy(), numpy_dense(labels)):
        assert dense.shape == probs.shape
        assert dense.dtype == np.float32
        assert dense.min() > 0.0
        np.testing.assert_allclose(dense.sum(1, dtype=np.float64), 1.0, atol=1e-6)


@quickly
@given(encoded())
def test_the_kept_classes_are_the_likeliest_in_order_equal_ones_by_id(case):
    probs, labels = case
    kept = labels.kept()
    order, _ = reference.top_k(probs.float().numpy(), probs.shape[1])
    for row, (count, ids) in enumerate(zip(counts_of(labels), kept.indices_NK, strict=True)):
        assert ids[:count].tolist() == order[row, :count].tolist()


def test_minus_zero_is_zero():
    labels = encode(torch.tensor([[0.6, -0.0, 0.4, 0.0]]), topk=4)
    assert labels.kept().indices_NK.tolist() == [[0, 2, 1, 3]]


@pytest.mark.parametrize("kind", DEGENERATE)
@pytest.mark.parametrize("num_classes", [2, 3, 255, 1000, 1_000_000])
@pytest.mark.parametrize("how", [{"rate": 1e-3}, {"topk": 1}, {"topk": 2}])
def test_degenerate_rows_come_back(kind, num_classes, how):
    row = degenerate(kind, num_classes)
    labels = encode(row, **how)
    dense = labels.to_dense()
    assert float(dense.min()) > 0.0
    assert float(dense.double().sum()) == pytest.approx(1.0, abs=1e-6)
    np.testing.assert_allclose(dense.numpy(), reference_dense(labels), rtol=2e-5)
    exact = torch.full((1, num_classes), 1.0 / num_classes)
    if kind == "one-hot":
        assert float(dense[0, num_classes // 2]) == pytest.approx(1.0, abs=1e-4)
    if kind == "two peaks" and how != {"topk": 1}:
        np.testing.assert_allclose(dense[0, [0, num_classes - 1]].numpy(), 0.5, atol=1e-4)
    if kind == "uniform":
        assert float((torch.xlogy(exact, exact) - exact * dense.log()).sum()) < 0.01


def test_a_million_classes_and_more_than_255_kept():
    probs = distributions(3, 1_000_000, 8.0)
    for labels in (encode(probs, rate=1e-4), encode(probs, topk=3000)):
        np.testing.assert_allclose(
            labels.to_dense().numpy(), reference_dense(labels), rtol=3e-5, atol=0
        )
    assert encode(probs, topk=3000).count_size == 2
    assert encode(probs, topk=1).nbytes == 3 * (1 + -(-(6 + 20) // 8))


@pytest.mark.parametrize(
    ("k", "num_classes", "size"),
    [
        (1, 1000, 2),  # 6 + 10 bits
        (2, 1000, 4),  # 6 + 5 + 20
        (5, 1000, 10),  # 6 + 5 + 3 * 4 + 50 = 73
        (26, 1000, 38),  # 6 + 5 + 8 * 4 + 260 = 303
        (26, 1025, 42),  # 11 bits an id: 329
        (2, 2, 1),  # 5 + 2: no tail
    ],
)
def test_sizes_are_what_the_record_says(k, num_classes, size):
    labels = encode(distributions(7, num_classes), topk=k)
    assert labels.records().sizes_R.tolist() == [size] * 7
    assert labels.nbytes == 7 * (size + 1)
    assert [len(block) for block in labels.blocks(1)] == [size + 1] * 7


def test_a_record_written_by_hand():
    # C = 10, k = 2: tail code 1 (6 bits), curve code 3 (5 bits), ids 7 and 4 (4 bits each)
    number = 1 | 3 << 6 | 7 << 11 | 4 << 15
    labels = of_records([number.to_bytes(3, "little")], [2], 10)
    weights = np.full(10, np.exp(-12 / 16))  # 6 + 6
    weights[[7, 4]] = 1.0, np.exp(-6 / 16)
    np.testing.assert_allclose(labels.to_dense()[0].numpy(), weights / weights.sum(), rtol=1e-6)


def records(
    counts: list[int], num_classes: int, seed: int, twice: int | None = None
) -> EncodedLabels:
    """Random codes and classes; row ``twice`` names its first class a second time."""
    random = np.random.default_rng(seed)
    written = []
    for row, k in enumerate(counts):
        ids = random.permutation(num_classes)[:k]
        ids[k - 1] = ids[0] if row == twice else ids[k - 1]
        number = sum(int(c) << id_bits(num_classes) * i for i, c in enumerate(ids))
        num_anchors = int(anchors_of(np.array(k)))
        widths = [6] * (k < num_classes) + [5, *[4] * num_anchors][:num_anchors]
        for width in reversed(widths):
            number = number << width | int(random.integers(1 << width))
        written.append(number.to_bytes(int(num_bytes(np.array(k), num_classes)), "little"))
    return of_records(written, counts, num_classes, count_size=2)


@pytest.mark.parametrize("num_classes", [2, 3, 10, 300, 5000])
def test_any_bits_of_a_record_mean_the_same_to_all_readers(num_classes):
    random = np.random.default_rng(num_classes)
    counts = random.integers(1, min(num_classes, 400) + 1, 100).tolist()
    labels = records([*counts, *counts[:20], 1, min(num_classes, 255)], num_classes, 1)
    check_rows(*columns_of(labels), num_classes)
    expected = reference_dense(labels)
    np.testing.assert_allclose(numpy_dense(labels), expected, rtol=2e-5, atol=0)
    np.testing.assert_allclose(labels.to_dense().numpy(), expected, rtol=2e-5, atol=0)


def test_levels_beyond_the_lowest_are_the_lowest_in_every_row():
    # k = 40, 10 anchors: 192 + 9 * 112 levels, cut at 1024; the other row with this k has 0
    ids = sum(i << 10 * i for i in range(40)) << 6 + 5 + 4 * 9
    rows = [number.to_bytes(56, "little") for number in (ids, ids | (1 << 47) - 1)]
    labels = of_records(rows, [40, 40], 1000)
    expected = reference_dense(labels)
    assert expected[1, 39] / expected[1, 0] == pytest.approx(np.exp(-64))
    np.testing.assert_allclose(numpy_dense(labels), expected, rtol=2e-5, atol=0)
    np.testing.assert_allclose(labels.to_dense().numpy(), expected, rtol=2e-5, atol=0)


def test_rows_are_read_the_same_in_chunks_of_any_size(monkeypatch):
    labels = records(np.random.default_rng(0).integers(1, 60, 200).tolist(), 1000, 2)
    counts, payload = columns_of(labels)
    whole = decode_rows(counts, payload, 1000)
    for size in (1, 100, 1000):
        monkeypatch.setattr("mealv2.codec.record._CHUNK_BYTES", size)
        parts = decode_rows(counts, payload, 1000)
        np.testing.assert_array_equal(parts.indices_E, whole.indices_E)
        np.testing.assert_allclose(parts.probs_E, whole.probs_E, rtol=2e-5)
        np.testing.assert_allclose(parts.tail_N, whole.tail_N, rtol=2e-5)


# --- which classes are kept -----------------------------------------------------------------------


def test_the_encoder_writes_the_bytes_it_always_wrote():
    # whole numbers with many ties, so that no library's softmax has a say
    values = torch.arange(600 * 300).reshape(600, 300) * 7919 % 104729 % 97
    steep = torch.arange(600)[:, None] % 12
    probs = torch.ldexp(torch.ones(600, 300), -(values * steep) // 40) * (1 + values % 3)
    for how, digest in DIGESTS.items():
        labels = encode(probs, **dict([how]))
        counts, payload = columns_of(labels)
        size = labels.count_size
        head = struct.pack("<8sIBxxxQ", b"MEALREC1", labels.num_classes, size, len(labels))
        data = head + counts.astype(f"<u{size}").tobytes() + payload.tobytes()
        assert hashlib.sha256(data).hexdigest()[:16] == digest


DIGESTS = {
    ("rate", 1e-2): "4e9c10223fb9760b",
    ("rate", 1e-4): "546482f9c19b51fc",
    ("topk", 1): "751388080c020299",
    ("topk", 300): "b05a2b78650799ab",
}


@pytest.mark.parametrize("k", [1, 7, 300])
def test_numpy_and_torch_find_the_same_largest(k):
    keys, _ = _keys((distributions(50, 300) * 1000).round() + 1)
    expected = keys.topk(k, dim=1).values
    assert torch.equal(_largest(keys.clone(), k), expected)


@quickly
@given(probabilities(most=120), st.sampled_from([1e-5, 1e-3, 1e-2, 0.1, 1.0]))
def test_no_other_k_has_a_lower_cost(probs, rate):
    labels = encode(probs, rate=rate)
    for count, row in zip(counts_of(labels).tolist(), probs.float().numpy(), strict=True):
        best, costs = reference.best_count(row, rate)
        assert costs[count - 1] <= costs[best - 1] + 1e-9


@pytest.mark.parametrize("rate", [1e-5, 1e-4, 1e-3])
@pytest.mark.parametrize("scale", [1.0, 3.0, 10.0])
def test_the_best_k_is_found_beyond_the_first_look(rate, scale):
    probs = distributions(12, 400, scale)
    counts = counts_of(encode(probs, rate=rate)).tolist()
    best = [reference.best_count(row.numpy(), rate) for row in probs]
    for count, (_, costs) in zip(counts, best, strict=True):
        assert costs[count - 1] <= costs[:255].min() + 1e-9
    if (scale, rate) == (10.0, 1e-4):
        assert min(counts) < 64 < max(counts)  # rows of both kinds in one batch


@pytest.mark.parametrize("num_classes", [10, 100, 1000])
def test_a_lower_rate_never_takes_fewer_bytes_nor_recovers_worse(num_classes):
    probs = distributions(300, num_classes, 6.0)
    runs = [encode(probs, rate=rate) for rate in (0.1, 0.03, 0.01, 3e-3, 1e-3, 3e-4, 1e-4)]
    sizes = [labels.nbytes for labels in runs]
    losses = [float(divergence(probs, labels).mean()) for labels in runs]
    assert sizes == sorted(sizes)
    assert losses == sorted(losses, reverse=True)
    assert sizes[0] < sizes[-1]
    assert all((counts_of(a) <= counts_of(b)).all() for a, b in zip(runs, runs[1:], strict=False))


def test_what_the_quantised_curve_adds_to_the_cut_is_small():
    probs = distributions(300, 1000, 6.0)
    labels = encode(probs, rate=1e-3)
    cut = [
        reference.best_count(row[:].numpy(), 1e-3)[1][k - 1] - 1e-3 * k
        for row, k in zip(probs[:40], counts_of(labels)[:40].tolist(), strict=True)
    ]
    added = divergence(probs[:40], labels[:40]).mean() - np.mean(cut)
    assert 0.0 <= float(added) < 0.003


# --- rows, batches, bytes -------------------------------------------------------------------------


@quickly
@given(encoded(most=300), st.randoms(use_true_random=False))
def test_encoding_is_the_same_for_any_batch_split(case, random):
    probs, labels = case
    num_rows = len(probs)
    cut = random.randint(0, num_rows)
    kept = counts_of(labels).tolist()
    how = {"topk": kept[0]} if len(set(kept)) == 1 else {"rate": 1e-3}
    whole = encode(probs, **how)
    parts = [encode(probs[:cut], **how), encode(probs[cut:].clone(), **how)]
    assert EncodedLabels.concat(parts).to_bytes() == whole.to_bytes()
    rows = [encode(probs[i : i + 1], **how) for i in range(num_rows)]
    assert EncodedLabels.concat(rows).to_bytes() == whole.to_bytes()


@pytest.mark.slow
def test_a_large_batch_is_the_same_row_by_row(monkeypatch):
    probs = distributions(200, 300, 4.0)
    whole = encode(probs, rate=2e-4)
    assert counts_of(whole).min() <= 64 < counts_of(whole).max()
    rows = [encode(row[None], rate=2e-4) for row in probs]
    assert EncodedLabels.concat(rows).to_bytes() == whole.to_bytes()
    monkeypatch.setattr("mealv2.codec.encoder._CHUNK", 7 * 300)
    assert encode(probs, rate=2e-4).to_bytes() == whole.to_bytes()
    monkeypatch.setattr("mealv2.codec.record_encoder._BLOCK", 3 * 300)
    assert encode(probs, rate=2e-4).to_bytes() == whole.to_bytes()
    assert encode(probs.T.contiguous().T, rate=2e-4).to_bytes() == whole.to_bytes()


@quickly
@given(encoded(most=300), st.randoms(use_true_random=False))
def test_rows_are_picked_as_from_the_dense_rows(case, random):
    _, labels = case
    dense, n = labels.to_dense(), len(labels)
    order = [random.randrange(-n, n) for _ in range(random.randint(0, 8))]
    picks = [slice(None), slice(1, None, 2), slice(None, None, 3), slice(0, 0), order, n - 1, -1]
    for pick in picks:
        rows = labels[pick]
        expected = dense[torch.tensor(pick, dtype=torch.int64)] if pick is order else dense[pick]
        expected = expected.reshape(-1, dense.shape[1])
        assert len(rows) == len(expected)
        torch.testing.assert_close(rows.to_dense(), expected, rtol=1e-5, atol=0)
    mask = torch.tensor([random.random() < 0.5 for _ in range(n)])
    torch.testing.assert_close(labels[mask].to_dense(), dense[mask], rtol=1e-5, atol=0)


def test_an_index_out_of_range_raises_index_error():
    labels = encode(distributions(3, 10), topk=2)
    for pick in (3, -4, [0, 3]):
        with pytest.raises(IndexError):
            labels[pick]
    assert len(list(labels)) == 3


@quickly
@given(encoded())
def test_bytes_and_back_is_bit_equal(case):
    _, labels = case
    data = labels.to_bytes()
    assert len(data) == 32 + len(labels) * 40 + labels.nbytes  # a block a row
    back = EncodedLabels.from_bytes(data)
    assert back.to_bytes() == data
    assert back.blocks(1) == labels.blocks(1)
    assert (back.num_classes, back.count_size) == (labels.num_classes, labels.count_size)


@pytest.mark.parametrize("how", [{"rate": 1e-3}, {"topk": 5}])
def test_no_rows_are_rows_too(how):
    none = encode(torch.zeros(0, 10), **how)
    assert len(none) == none.nbytes == 0
    assert none.to_dense().shape == (0, 10)
    assert numpy_dense(none).shape == (0, 10)
    assert len(EncodedLabels.from_bytes(none.to_bytes())) == 0
    assert len(none[:]) == 0
    some = encode(torch.softmax(torch.randn(2, 10), 1), **how)
    assert len(EncodedLabels.concat([none, some])) == 2


@pytest.mark.parametrize(
    ("how", "named"),
    [
        ({}, "either"),
        ({"rate": 0.1, "topk": 1}, "either"),
        ({"rate": 0.0}, "rate"),
        ({"rate": float("nan")}, "rate"),
        ({"rate": float("inf")}, "rate"),
        ({"topk": 0}, "topk"),
        ({"topk": 11}, "topk"),
    ],
)
def test_settings_out_of_range_raise_value_error(how, named):
    with pytest.raises(ValueError, match=named):
        encode(distributions(2, 10), **how)


@pytest.mark.parametrize(
    "probs",
    [
        torch.tensor([[0.5, float("nan")]]),
        torch.tensor([[0.5, float("inf")]]),
        torch.tensor([[1.5, -0.5]]),
        torch.tensor([[0.5, 0.5], [0.0, 0.0]]),
        torch.tensor([[1, 0]]),
        torch.tensor([0.5, 0.5]),
        torch.ones(2, 1),
        torch.ones(0, 1_000_001),
    ],
)
def test_what_is_no_distribution_raises_value_error(probs):
    with pytest.raises(ValueError, match=r"distribution|float|classes"):
        encode(probs, topk=1)


def test_labels_of_different_classes_cannot_be_joined():
    with pytest.raises(ValueError, match="cannot concatenate"):
        EncodedLabels.concat([encode(distributions(2, c), topk=1) for c in (9, 10)])


def test_labels_move_to_a_device_whole():
    labels = encode(distributions(3, 10), topk=4)
    assert {part.device.type for part in labels.kept()} == {"cpu"}
    moved = labels.to(torch.device("meta"))
    assert {part.device.type for part in moved.kept()} == {"meta"}
    assert moved.to_dense().device.type == moved[[0]].to_dense().device.type == "meta"
    assert len(moved) == 3


# --- damage ---------------------------------------------------------------------------------------


GOOD = b"\2" + (1 | 3 << 6 | 7 << 11 | 4 << 15).to_bytes(3, "little")
TWO = b"\0\2\2" + 2 * GOOD[1:]  # both views of an image


def by_hand(
    *blocks: bytes,
    num_classes: int = 10,
    num_blocks: int | None = None,
    rows: int | None = None,
    views: Sequence[int] | None = None,
    ends: Sequence[int] | None = None,
    places: Sequence[tuple[int, int]] | None = None,
    models: Sequence[int] | None = None,
) -> bytes:
    """Return labels as bytes, by default with the first view of each block as rows."""
    ends = np.cumsum([len(block) for block in blocks]).tolist() if ends is None else ends
    views = [1] * len(blocks) if views is None else views
    places = [(block, 0) for block in range(len(blocks))] if places is None else places
    num_blocks = len(blocks) if num_blocks is None else num_blocks
    num_rows = len(places) if rows is None else rows
    head = struct.pack("<8sIBxxxQQ", b"MEALBLK3", num_classes, 1, num_blocks, num_rows)
    models = range(len(blocks)) if models is None else models
    numbers = [*ends, *views, *models, *(b for b, _ in places), *(v for _, v in places)]
    return head + struct.pack(f"<{len(numbers)}Q", *numbers) + b"".join(blocks)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "truncated"),
        (b"MEALREC1" + by_hand(GOOD)[8:], "version"),
        (by_hand(GOOD)[:15] + b"\1" + by_hand(GOOD)[16:], "version"),
        (by_hand(GOOD)[:12] + b"\3" + by_hand(GOOD)[13:], "a count has"),
        (by_hand(GOOD, rows=1 << 63), "truncated"),
        (by_hand(GOOD, num_blocks=1 << 63), "truncated"),
        (by_hand(GOOD, num_classes=1), "keep|classes"),
        (by_hand(GOOD, num_classes=4_000_000_000), "classes|match"),
        (by_hand(GOOD, ends=[3]), "fit"),
        (by_hand(GOOD, ends=[5]), "fit"),
        (by_hand(GOOD, GOOD, ends=[4, 4]), "fit"),
        (by_hand(GOOD, GOOD, ends=[(1 << 64) - 4, 8]), "fit"),
        (by_hand(GOOD, views=[0]), "fit"),
        (by_hand(GOOD, places=[(1, 0)]), "fit"),
        (by_hand(GOOD, places=[(0, 1)]), "fit"),
        (by_hand(GOOD, places=[(0, 1 << 63)]), "fit"),
        (by_hand(TWO, views=[2], places=[(0, 2)]), "fit"),
        (by_hand(TWO[:-1], views=[2]), "does not match its counts"),
        (by_hand(TWO[:2], views=[2]), "shorter than its counts"),
        (by_hand(TWO, views=[3]), "keep"),
        (by_hand(b"\0"), "models"),
        (by_hand(GOOD, models=[1]), "fit"),
        (by_hand(GOOD, GOOD, models=[0, 0]), "models"),
        (by_hand(GOOD, b"\0\0\0", models=[0, 0]), "head"),
        (by_hand(b"\13" + GOOD[1:]), "keep"),
        (by_hand(GOOD[:3]), "does not match its counts"),
        (by_hand(GOOD + b"\0"), "does not match its counts"),
        (by_hand(GOOD[:3] + bytes([GOOD[3] | 128])), "after its end"),
        (by_hand(b"\2" + (1 | 10 << 11).to_bytes(3, "little")), "above 9"),
        (by_hand(b"\2" + (1 | 7 << 11 | 7 << 15).to_bytes(3, "little")), "twice"),
    ],
)
def test_malformed_bytes_are_refused_with_the_reason(data, reason):
    assert len(EncodedLabels.from_bytes(by_hand(GOOD, TWO, views=[1, 2]))) == 2
    with pytest.raises(LabelSetError, match=reason):
        EncodedLabels.from_bytes(data)


@pytest.mark.parametrize("num_classes", [0, 1, 1_000_001])
def test_bytes_without_labels_are_refused_for_classes_out_of_range(num_classes):
    data = EncodedLabels.of_blocks([], 1, 10).to_bytes()
    with pytest.raises(LabelSetError, match="classes must be 2 to 1000000"):
        EncodedLabels.from_bytes(data[:8] + num_classes.to_bytes(4, "little") + data[12:])


@pytest.mark.parametrize("id_", [10, 15])
def test_a_class_that_does_not_exist_is_not_read(id_):
    labels = EncodedLabels.of_blocks([b"\2" + (1 | id_ << 11).to_bytes(3, "little")], 1, 10)
    with pytest.raises(LabelSetError, match="above 9"):
        labels.argmax()


def test_a_fault_is_found_in_any_chunk_of_rows(monkeypatch):
    monkeypatch.setattr("mealv2.codec.record._CHUNK_BYTES", 10)  # three rows
    EncodedLabels.from_bytes(by_hand(*[GOOD] * 20))
    for row in range(20):
        blocks = [GOOD] * 20
        blocks[row] = GOOD[:3] + bytes([GOOD[3] | 128])
        with pytest.raises(LabelSetError, match="after its end"):
            EncodedLabels.from_bytes(by_hand(*blocks))


def test_a_class_named_twice_is_found_in_any_row():
    counts = [2, 30, 5, 5, 30, 100, 2, 300]
    for row in range(len(counts)):
        labels = records(counts, 1000, 3, twice=row)
        with pytest.raises(LabelSetError, match="twice"):
            labels.check()


@pytest.mark.slow
def test_10000_mutations_are_refused_or_give_valid_labels():
    random = np.random.default_rng(0)
    sets = [
        encode(distributions(3, num_classes, 5.0), **how).to_bytes()
        for num_classes in (2, 10, 1000, 5000)
        for how in ({"rate": 1e-3}, {"topk": 2})
    ]
    sets.append(encode(distributions(2, 5000), topk=300).to_bytes())
    sets += [
        encode(views_of_images(2, 8, num_classes), rate=1e-3, num_views=8).to_bytes()
        for num_classes in (50, 1000, 5000)
    ]
    outcomes = {"refused": 0, "valid": 0}
    for _ in range(10_000):
        data = mutated(sets[random.integers(len(sets))], random)
        try:
            labels = EncodedLabels.from_bytes(data)
        except LabelSetError:
            outcomes["refused"] += 1
            continue
        outcomes["valid"] += 1
        assert labels.to_bytes() == data
        if labels.num_classes <= 5000:
            dense = labels.to_dense().double()
            assert bool((dense > 0).all())
            assert bool(((dense.sum(1) - 1.0).abs() < 1e-6).all())
    assert min(outcomes.values()) > 1000, outcomes


def mutated(data: bytes, random: np.random.Generator) -> bytes:
    """Flip a bit, overwrite a few bytes, cut, or put something in; not always in the records."""
    changed = bytearray(data)
    kind = random.integers(5)
    where = int(random.integers(len(changed)))
    if kind <= 1:
        changed[where] ^= 1 << int(random.integers(8))
    elif kind == 2:
        values = random.choice([0, 1, 2, 127, 128, 255], random.integers(1, 5))
        changed[where : where + len(values)] = bytes(values.tolist())
    elif kind == 3:
        del changed[where : where + int(random.integers(1, 9))]
    else:
        changed[where:where] = random.bytes(int(random.integers(1, 9)))
    return bytes(changed)


# --- the loss -------------------------------------------------------------------------------------


@quickly
@given(
    encoded(most=1200),
    st.sampled_from([0.1, 3.0, 30.0]),
    st.sampled_from([0.0, 1000.0]),
    st.integers(0, 999),
)
@example((None, encode(degenerate("one-hot", 1_000_000), rate=1e-3)), 1.0, 0.0, 0)
def test_the_loss_equals_the_dense_loss(case, scale, offset, seed):
    _, labels = case
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(len(labels), labels.num_classes, generator=generator) + offset
    logits_1, logits_2 = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    loss, dense_loss = (
        similarity_loss(logits_1, labels),
        similarity_loss(logits_2, labels.to_dense()),
    )
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(dense_loss.item(), rel=1e-6, abs=1e-6)
    (loss.backward(), dense_loss.backward())
    torch.testing.assert_close(logits_1.grad, logits_2.grad, rtol=1e-6, atol=1e-6)


def test_the_loss_and_its_gradient_agree_with_float64():
    labels = encode(distributions(6, 50, 5.0), rate=1e-3)
    assert len(set(counts_of(labels).tolist())) > 2
    logits = 4.0 * torch.randn(6, 50, generator=torch.Generator().manual_seed(3))
    logits.requires_grad_()
    loss = similarity_loss(logits, labels)
    loss.backward()
    value, grad = reference.similarity(logits.detach().numpy(), reference_dense(labels))
    assert loss.item() == pytest.approx(value, abs=1e-6)
    np.testing.assert_allclose(logits.grad.numpy(), grad, atol=1e-6)


def test_the_loss_takes_half_logits_and_refuses_other_shapes():
    labels = encode(distributions(4, 20), topk=3)
    logits = torch.randn(4, 20, generator=torch.Generator().manual_seed(0))
    half = similarity_loss(logits.bfloat16(), labels)
    assert half.dtype == torch.float32
    assert float(half) == pytest.approx(float(similarity_loss(logits, labels)), abs=0.05)
    for wrong in (logits[:3], logits[:, :19]):
        with pytest.raises(ValueError, match="4 x 20"):
            similarity_loss(wrong, labels)


def test_the_loss_never_expands_the_labels(monkeypatch):
    labels = encode(distributions(4, 20), topk=3)
    monkeypatch.setattr(EncodedLabels, "to_dense", None)
    assert torch.isfinite(similarity_loss(torch.zeros(4, 20), labels))
