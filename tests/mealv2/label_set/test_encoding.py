"""mealv2.label_set.encoding: rows to the bytes of blocks and back, in every form."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import reference
from cases import mostly_slow
from label_sets import ENCODINGS, encoded, ensemble_outputs, plan_of, same
from mealv2.errors import LabelSetError
from mealv2.label_set import Encoding, Rows
from mealv2.label_set.logits import LINE_SIZE
from mealv2.soft_labels import EncodedLabels, KeptLogits, SoftLabels

quickly = settings(max_examples=80, deadline=None, derandomize=True, database=None)
MOST = 400_000  # probabilities of a case

num_classes_ = st.one_of(
    st.integers(2, 40), st.sampled_from([255, 256, 257, 1000, 65_535, 65_536, 65_537, 70_000])
)


@st.composite
def encodings(draw: st.DrawFn) -> Encoding:
    """Draw any form, of 2 to 70,000 classes."""
    num_classes = draw(num_classes_)
    logits = draw(st.booleans())
    form = draw(st.sampled_from(["rate", "curve", "float16", "float32", "dense"]))
    if form == "rate":
        return Encoding(num_classes, rate=draw(st.sampled_from([1e-4, 1e-2])), logits=logits)
    if form == "dense":
        kind = draw(st.sampled_from(["float16", "float32"]))
        return Encoding(num_classes, kind, topk=num_classes, logits=logits)
    topk = min(num_classes, draw(st.sampled_from([1, 2, 3, 5, 16, 255, 256, 257, 300, 1500])))
    return Encoding(num_classes, form, topk=topk, logits=logits)


@st.composite
def cases(draw: st.DrawFn) -> tuple[Encoding, int, Rows]:
    """Draw (an encoding, V, the rows of up to four images with V views each)."""
    encoding = draw(encodings())
    most = max(1, MOST // encoding.num_classes)
    num_views = draw(st.one_of(st.integers(1, 300), st.integers(1, 4)))
    num_views = min(num_views, most)
    num_images = min(draw(st.integers(0, 4)), most // num_views)
    rows = encoded(
        encoding, num_images * num_views, num_views=num_views, seed=draw(st.integers(0, 999))
    )
    return encoding, num_views, rows


def joined(blocks: list[bytes]) -> tuple[np.ndarray, np.ndarray]:
    """Return blocks as a reader has them: their bytes, and where each ends."""
    sizes = np.array([len(block) for block in blocks], dtype=np.int64)
    return np.frombuffer(b"".join(blocks), np.uint8), np.cumsum(sizes)


def reference_views(encoding: Encoding, block: bytes, num_views: int) -> list[reference.BlockView]:
    return reference.read_block(
        block,
        form=encoding.form,
        num_classes=encoding.num_classes,
        num_views=num_views,
        topk=encoding.topk,
        logits=encoding.logits,
    )


# --- there and back -------------------------------------------------------------------------------


@quickly
@given(cases())
def test_all_rows_of_the_blocks_are_the_rows_that_were_written(case):
    encoding, num_views, rows = case
    blocks = encoding.blocks(rows, num_views)
    assert len(blocks) == len(rows.labels) // num_views
    read = encoding.all_rows_of(*joined(blocks), num_views)
    assert same(read, rows)
    encoding.check(read)
    assert encoding.blocks(read, num_views) == blocks


@quickly
@given(cases(), st.randoms(use_true_random=False))
def test_one_view_of_each_block_is_the_row_that_was_written(case, random):
    encoding, num_views, rows = case
    blocks = encoding.blocks(rows, num_views)
    picked = [random.randrange(len(blocks)) for _ in range(6)] if blocks else []
    views = [random.randrange(num_views) for _ in picked]
    data, ends = joined([blocks[image] for image in picked])
    read = encoding.rows_of(data, ends, num_views, np.array(views, dtype=np.int64))
    wanted = [image * num_views + view for image, view in zip(picked, views, strict=True)]
    assert same(read, rows.rows(torch.tensor(wanted, dtype=torch.int64)))


@quickly
@given(cases())
def test_the_reference_reads_the_same_from_the_bytes(case):
    encoding, num_views, rows = case
    views = [
        view
        for block in encoding.blocks(rows, num_views)
        for view in reference_views(encoding, block, num_views)
    ]
    dense_NC = rows.labels.to_dense().numpy()
    assert len(views) == len(dense_NC)
    for view, row in zip(views, dense_NC, strict=True):
        np.testing.assert_allclose(row, view.probs_C, rtol=2e-4, atol=1e-12)
    if encoding.logits:
        assert rows.logits is not None
        logits_NC = rows.logits.to_dense(rows.labels.kept(), encoding.num_classes)
        exactly = {"rtol": 2e-4, "atol": 2e-4} if encoding.has_fitted_logits else {"rtol": 0}
        for view, row in zip(views, logits_NC.numpy(), strict=True):
            np.testing.assert_allclose(row, view.logits_C, **exactly)
    else:
        assert all(view.logits_C is None for view in views)


@pytest.mark.parametrize(
    "encoding",
    mostly_slow(
        [
            Encoding(1_000_000, rate=1e-2, logits=True),
            Encoding(1_000_000, topk=65_535),
            Encoding(1_000_000, "float16", topk=1000, logits=True),
            Encoding(1_000_000, "float32", topk=1_000_000),
        ]
    ),
    ids=str,
)
def test_a_million_classes(encoding):
    rows = encoded(encoding, 4, num_views=2)
    blocks = encoding.blocks(rows, 2)
    assert same(encoding.all_rows_of(*joined(blocks), 2), rows)
    encoding.check(rows)
    (first, _) = reference_views(encoding, blocks[1], 2)
    np.testing.assert_allclose(rows.labels.to_dense()[2], first.probs_C, rtol=5e-4, atol=1e-12)


@pytest.mark.parametrize("name", ENCODINGS)
def test_no_rows_are_rows_too(name):
    encoding = ENCODINGS[name]
    empty = encoded(encoding, 0)
    assert encoding.blocks(empty, 7) == []
    none = np.zeros(0, np.uint8), np.zeros(0, np.int64), 7
    for read in (encoding.rows_of(*none, np.zeros(0, np.int64)), encoding.all_rows_of(*none)):
        assert len(read.labels) == 0
        assert read.labels.to_dense().shape == (0, encoding.num_classes)
        assert same(read, empty)
        if read.logits is not None:
            dense_NC = read.logits.to_dense(read.labels.kept(), encoding.num_classes)
            assert dense_NC.shape == (0, encoding.num_classes)
        encoding.check(read)
        some = encoded(encoding, 3)
        assert same(Rows.concat([read, some, empty]), some)
        assert same(some.rows(torch.zeros(0, dtype=torch.int64)), empty)


def test_the_bytes_of_a_block_by_hand():
    labels = SoftLabels(
        torch.tensor([[4, 1], [0, 2]]),
        torch.tensor([[0.5, 0.25], [1.0, 0.0]]).half(),
        torch.tensor([0.25, 0.0]).half(),
        5,
    )
    logits = KeptLogits(torch.tensor([[2.0, 1.0], [8.0, -8.0]]).half(), torch.tensor([0.5, -1.0]))
    encoding = Encoding(5, "float16", topk=2, logits=True)
    (block,) = encoding.blocks(Rows(labels, logits), 2)
    half = {0.0: "0000", 0.25: "0034", 0.5: "0038", 1.0: "003c", 2.0: "0040", -1.0: "00bc"}
    half |= {8.0: "0048", -8.0: "00c8"}
    # three bits an id: 4 + (1 << 3), 0 + (2 << 3)
    expected = ["0c", half[0.5], half[0.25], half[0.25], "10", half[1.0], half[0.0], half[0.0]]
    expected += [half[v] for v in (2.0, 1.0, 0.5, 8.0, -8.0, -1.0)]
    assert block.hex() == "".join(expected)


def test_a_count_takes_two_bytes_where_topk_exceeds_255():
    for topk, count in ((255, "ff"), (256, "0001"), (300, "2c01")):
        encoding = Encoding(400, topk=topk)
        (block,) = encoding.blocks(encoded(encoding, 2, num_views=2), 2)
        assert block.hex().startswith("00" + count * 2)
        assert encoding.count_size == len(count) // 2


def test_arrays_of_any_strides_give_the_same_block():
    encoding = Encoding(50, "float16", topk=3, logits=True)
    rows = encoded(encoding, 4)
    labels, logits = rows.labels, rows.logits
    turned = Rows(
        dataclasses.replace(
            labels,
            indices_NK=labels.indices_NK.T.contiguous().T,
            probs_NK=labels.probs_NK.T.contiguous().T,
            rest_N=labels.rest_N.repeat_interleave(2)[::2],
        ),
        KeptLogits(logits.values_NK.T.contiguous().T, logits.rest_N),
    )
    assert not turned.labels.probs_NK.is_contiguous()
    assert encoding.blocks(turned, 2) == encoding.blocks(rows, 2)
    dense = Encoding(6, "float32", topk=6)
    probs_NC, _ = ensemble_outputs(4, 6)
    turned = dense.encode(probs_NC.T.contiguous().T)
    assert dense.blocks(turned, 2) == dense.blocks(dense.encode(probs_NC), 2)


def test_what_was_read_is_the_callers_to_change():
    for encoding in ENCODINGS.values():
        data, ends = joined(encoding.blocks(encoded(encoding, 4, num_views=2), 2))
        before = data.tobytes()
        read = encoding.all_rows_of(data, ends, 2)
        for tensor in read.labels.kept():
            if tensor.is_contiguous():  # the ids of dense labels are one row, repeated
                tensor.zero_()
        if read.logits is not None:
            read.logits.rest_N.zero_()
        assert data.tobytes() == before


# --- damage ---------------------------------------------------------------------------------------


def read_both_ways(encoding: Encoding, block: bytes, num_views: int) -> None:
    """Read a block between two good ones, in both ways; both must say the same of it."""
    good = encoding.blocks(encoded(encoding, 2 * num_views, num_views=num_views), num_views)
    data, ends = joined([good[0], block, good[1]])
    with pytest.raises(LabelSetError) as first:
        encoding.rows_of(data, ends, num_views, np.zeros(3, np.int64))
    with pytest.raises(LabelSetError) as second:
        encoding.all_rows_of(data, ends, num_views).labels.kept()
    assert str(first.value) == str(second.value)
    raise first.value


@pytest.mark.parametrize("name", ENCODINGS)
@pytest.mark.parametrize("num_views", [1, 3])
def test_a_block_of_another_length_is_refused(name, num_views):
    encoding = ENCODINGS[name]
    rows = encoded(encoding, num_views, num_views=num_views, seed=1)
    (block,) = encoding.blocks(rows, num_views)
    for wrong in (block[:-1], block + b"\0", b"", block[:1], block[: len(block) // 2], block * 2):
        with pytest.raises(LabelSetError, match=r"a block (does not|is shorter|is empty|has a)"):
            read_both_ways(encoding, wrong, num_views)


@pytest.mark.parametrize(
    ("encoding", "counts"),
    [
        (Encoding(50, rate=1e-2), b"\0\1"),
        (Encoding(50, rate=1e-2), b"\1\x33"),
        (Encoding(50, rate=1e-2, logits=True), b"\1\xff"),
        (Encoding(400, topk=300), b"\x2c\1\0\0"),
        (Encoding(400, topk=300), b"\x2c\1\x91\1"),
        (Encoding(70_000, topk=300), b"\0\0\xff\xff"),
    ],
)
def test_a_count_of_no_class_or_of_more_than_there_are_is_refused(encoding, counts):
    lines = bytes(2 * LINE_SIZE * encoding.has_fitted_logits)
    for padding in (0, 10, 5000):
        with pytest.raises(LabelSetError, match=rf"must keep 1 to {encoding.num_classes} classes"):
            read_both_ways(encoding, b"\0" + counts + b"\0" * padding + lines, 2)


@quickly
@given(st.sampled_from(sorted(ENCODINGS)), st.integers(1, 4), st.binary(max_size=80), st.data())
def test_any_bytes_are_refused_or_give_distributions(name, num_views, noise, data):
    encoding = ENCODINGS[name]
    rows = encoded(encoding, num_views, num_views=num_views)
    block = bytearray(encoding.blocks(rows, num_views)[0])
    at = data.draw(st.integers(0, len(block)))
    block[at : at + len(noise)] = noise
    try:
        rows = encoding.all_rows_of(*joined([bytes(block)]), num_views)
        encoding.check(rows)
    except LabelSetError:
        return
    dense_NC = rows.labels.to_dense()
    assert bool((dense_NC >= 0).all())
    np.testing.assert_allclose(dense_NC.sum(dim=1).numpy(), 1.0, rtol=1e-4)


def spoiled(name: str, **parts: object) -> Rows:
    rows = encoded(ENCODINGS[name], 4)
    return Rows(dataclasses.replace(rows.labels, **parts), rows.logits)


HALF = torch.tensor([[0.5, 0.25, 0.125]] * 4).half()


@pytest.mark.parametrize(
    ("name", "rows", "reason"),
    [
        ("float16", spoiled("float16", probs_NK=-HALF), "negative"),
        ("float16", spoiled("float16", probs_NK=HALF * torch.nan), "not finite"),
        ("float16", spoiled("float16", rest_N=torch.full((4,), torch.inf)), "not finite"),
        ("float16", spoiled("float16", indices_NK=torch.tensor([[1, 2, 1]] * 4)), "twice"),
        ("float16", spoiled("float16", indices_NK=torch.tensor([[1, 2, 50]] * 4)), "unknown class"),
        ("float16", spoiled("float16", probs_NK=0 * HALF, rest_N=torch.zeros(4)), "no mass"),
        ("dense float16", spoiled("dense float16", probs_NK=torch.zeros(4, 6)), "no mass"),
        ("curve", encoded(Encoding(50, topk=5), 4), "does not keep 4 classes"),
        (
            "rate",
            Rows(EncodedLabels.of_blocks([b"\3" + bytes(5)], 1, 50)),
            "class twice",
        ),
    ],
)
def test_rows_that_no_encoder_writes_are_found(name, rows, reason):
    with pytest.raises(LabelSetError, match=reason):
        ENCODINGS[name].check(rows)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_logits_that_are_not_finite_are_found(value):
    encoding = ENCODINGS["float32, logits"]
    rows = encoded(encoding, 4)
    for part in ("values_NK", "rest_N"):
        spoiled_part = getattr(rows.logits, part).clone()
        spoiled_part[2] = value
        with pytest.raises(LabelSetError, match="not finite"):
            encoding.check(
                Rows(rows.labels, dataclasses.replace(rows.logits, **{part: spoiled_part}))
            )


# --- logits ---------------------------------------------------------------------------------------


def test_a_masked_class_does_not_spoil_the_mean_of_the_others():
    logits = torch.tensor([[3.0, 2.0, 1.0, -torch.inf, 70_000.0]])
    encoding = Encoding(5, "float32", topk=5, logits=True)
    rows = encoding.encode(torch.softmax(logits, 1), logits)
    assert rows.logits.values_NK.tolist() == [[3.0, 2.0, 1.0, -65504.0, 65504.0]]
    rows = Encoding(5, "float16", topk=2, logits=True).encode(torch.softmax(logits, 1), logits)
    assert bool(torch.isfinite(rows.logits.rest_N).all())


def test_an_encoding_with_logits_needs_them_and_one_without_leaves_them_out():
    probs_NC, logits_NC = ensemble_outputs(3, 50)
    with pytest.raises(ValueError, match="stores logits"):
        ENCODINGS["rate, logits"].encode(probs_NC)
    assert ENCODINGS["rate"].encode(probs_NC, logits_NC).logits is None


# --- plans ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ENCODINGS)
def test_a_plan_gives_the_encoding_back(name):
    assert Encoding.of_plan(plan_of(ENCODINGS[name])) == ENCODINGS[name]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"form": "float64"}, "form"),
        ({"form": ["curve"]}, "form"),
        ({"tail": "uniform"}, "tail"),
        ({"rate": 0.1}, "either a topk or"),
        ({"topk": None}, "topk"),
        ({"topk": 0}, r"1\.\.50"),
        ({"topk": 51}, r"1\.\.50"),
        ({"topk": 3.0}, "topk must be an integer"),
        ({"topk": "3"}, "topk must be an integer"),
        ({"topk": True}, "topk must be an integer"),
        ({"logits": "no"}, "true, false or a line"),
        ({"logits": "line"}, "true, false or a line"),
    ],
)
def test_a_plan_of_labels_that_no_encoder_makes_is_refused(changes, named):
    kept = {**ENCODINGS["curve"].plan(), **changes}
    with pytest.raises(LabelSetError, match=f"cannot read the labels of this set: .*{named}"):
        Encoding.of_plan(plan_of(ENCODINGS["curve"], labels=kept))


@pytest.mark.parametrize(
    ("logits", "named"), [(True, "its logits have an earlier form"), ("lines", "or a line")]
)
def test_other_forms_of_logits_with_a_rate_are_refused(logits, named):
    plan = ENCODINGS["rate, logits"].plan()
    assert plan["logits"] == "line"
    with pytest.raises(LabelSetError, match=f"cannot read the labels of this set: .*{named}"):
        Encoding.of_plan(plan_of(ENCODINGS["rate"], labels=plan | {"logits": logits}))


@pytest.mark.parametrize("labels", [None, [], {}, "curve", {"form": "curve"}])
def test_a_plan_without_labels_is_refused(labels):
    with pytest.raises(LabelSetError, match="cannot read the labels of this set"):
        Encoding.of_plan(plan_of(ENCODINGS["curve"], labels=labels))
    plan = plan_of(ENCODINGS["curve"])
    del plan["labels"]
    with pytest.raises(LabelSetError, match="cannot read the labels of this set"):
        Encoding.of_plan(plan)


@pytest.mark.parametrize("rate", [0, -1.0, float("inf"), float("nan"), "0.1"])
def test_a_rate_that_no_encoder_takes_is_refused(rate):
    kept = {**ENCODINGS["rate"].plan(), "rate": rate}
    with pytest.raises(LabelSetError, match="cannot read the labels of this set"):
        Encoding.of_plan(plan_of(ENCODINGS["rate"], labels=kept))


@pytest.mark.parametrize("form", ["float16", "float32"])
def test_a_rate_is_of_the_curve_alone(form):
    for rate in (0.0, 0.1):
        with pytest.raises(ValueError, match="either a topk or, in the form curve, a rate"):
            Encoding(50, form, rate=rate)


@pytest.mark.parametrize(
    ("encoding", "text"),
    [
        (Encoding(50, rate=0.01), "rate 0.01"),
        (Encoding(50, topk=3, logits=True), "top-3, curve, with logits"),
        (Encoding(50, "float16", topk=3), "top-3, float16"),
        (Encoding(50, "float32", topk=50), "all classes, float32"),
        (Encoding(50, topk=50), "top-50, curve"),
    ],
)
def test_an_encoding_says_what_it_is(encoding, text):
    assert str(encoding) == text
