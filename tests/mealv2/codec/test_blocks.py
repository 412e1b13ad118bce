"""mealv2.codec: blocks whose views share a model: their readers, any bits, cost, order of views."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pytest
import torch
from any_bits import are_valid
from torch import Tensor

import reference
from cases import mostly_slow
from image_views import views_of_images
from mealv2.codec.block import MAX_LISTED, Model, block_bytes, coded, low_nibbles, packed
from mealv2.codec.encoder import BITS_OF_CLASS, divergence, encode_each_view
from mealv2.codec.residual_codes import RUN_LENGTHS, VALUE_LENGTHS
from mealv2.codec.residuals import (
    CONTEXTS,
    EXP,
    LOG,
    MAX_CODE,
    OTHERS,
    RUNS,
    VALUES,
    contexts_of,
)
from mealv2.codec.shared_encoder import encode_shared
from mealv2.errors import LabelSetError
from mealv2.losses import similarity_loss
from mealv2.soft_labels import EncodedLabels, encode


class Case(NamedTuple):
    """Rows of views, and the rate that they are encoded with."""

    num_classes: int
    num_views: int
    rate: float
    scale: float = 3.0
    num_images: int = 3

    def probs(self, seed: int = 0) -> Tensor:
        return views_of_images(
            self.num_images, self.num_views, self.num_classes, scale=self.scale, seed=seed
        )


CASES = {
    "ten classes": Case(10, 16, 1e-3),
    "two classes": Case(2, 32, 1e-4, scale=1.0),
    "50 classes, 3 views": Case(50, 3, 1e-3),
    "50 classes, 180 views": Case(50, 180, 1e-3),
    "1000 classes, 2 views": Case(1000, 2, 1e-2, scale=4.0),
    "1000 classes, 16 views": Case(1000, 16, 1e-3),
    "sharp": Case(1000, 16, 1e-3, scale=12.0),
    "flat": Case(1000, 16, 1e-4, scale=0.3),
    "lengths of two bytes": Case(1000, 16, 1e-5),
    "1000 classes, 180 views": Case(1000, 180, 1e-3, num_images=1),
    "30000 classes": Case(30_000, 3, 1e-2, scale=5.0, num_images=2),
    "30000 classes, 16 views": Case(30_000, 16, 1e-2, scale=6.0, num_images=1),
}


def shared_blocks(probs_NC: Tensor, num_views: int, rate: float) -> list[bytes]:
    """Return blocks with a shared model, whether or not records would be smaller."""
    probs_IVC = probs_NC.double().unflatten(0, (-1, num_views))
    probs_IVC = probs_IVC / probs_IVC.sum(2, keepdim=True)
    blocks: dict[int, bytes] = {}
    negentropy_IV = torch.xlogy(probs_IVC, probs_IVC).sum(2)
    for found in encode_shared(probs_IVC, negentropy_IV, rate / BITS_OF_CLASS):
        blocks |= dict(zip(found.images_I.tolist(), found.blocks, strict=True))
    return [blocks[image] for image in range(len(probs_IVC))]


def shared(case: Case, seed: int = 0) -> EncodedLabels:
    blocks = shared_blocks(case.probs(seed), case.num_views, case.rate)
    return EncodedLabels.of_blocks(blocks, case.num_views, case.num_classes)


def reference_dense(blocks: Sequence[bytes], num_views: int, num_classes: int) -> np.ndarray:
    decoded = [reference.decode_shared_block(block, num_views, num_classes) for block in blocks]
    return np.concatenate(decoded)


def head_of(block: bytes) -> tuple[int, int, int]:
    """Return (components, listed classes, bytes of a length)."""
    return block[0], int.from_bytes(block[1:3], "little"), block[3]


# --- the block and its readers --------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_the_decoder_agrees_with_the_reference(name):
    case = CASES[name]
    labels = shared(case)
    labels.check()
    dense = labels.to_dense()
    expected = reference_dense(labels.blocks(case.num_views), case.num_views, case.num_classes)
    np.testing.assert_allclose(dense.numpy(), expected, rtol=2e-5, atol=0)
    assert dense.dtype == torch.float32
    assert float(dense.min()) > 0.0
    np.testing.assert_allclose(dense.double().sum(1).numpy(), 1.0, atol=1e-6)


def test_the_cases_have_every_form_of_a_block():
    blocks = {name: shared(case).blocks(case.num_views) for name, case in CASES.items()}
    heads = {name: [head_of(block) for block in found] for name, found in blocks.items()}
    assert any(size == 2 for _, _, size in heads["lengths of two bytes"])
    assert any(size == 1 for _, _, size in heads["1000 classes, 16 views"])
    sizes = [(m, CASES[name].num_classes) for name, found in heads.items() for _, m, _ in found]
    assert {int(low_nibbles(*size)) for size in sizes} >= {0, 1}
    assert {r for found in heads.values() for r, _, _ in found} >= {1, 2, 3, 4, 5}


def test_a_block_written_by_hand():
    # one component, two classes of ten, two views; the first residual: run 0, value 1 of all others
    run, value = (
        (codes.words_XS[OTHERS, 0], codes.lengths_XS[OTHERS, 0]) for codes in (RUNS, VALUES)
    )
    length = int(run[1] + value[1])
    bits = int(run[0]) | int(value[0]) << int(run[1])
    head = bytes([1, 2, 0, 1])  # R, M, bytes of a length
    weights = bytes([32, 4])  # low 32 / 32 = 1, step 4 / 256
    lengths = bytes([length, 0])
    # weights 0 and 2; codes 0, 3 and 9; gaps 4 and 2: classes 4 and 7
    nibbles = [0, 2, 0, 3, 9, 4, 2, 15]
    packed = bytes(a | b << 4 for a, b in zip(nibbles[::2], nibbles[1::2], strict=True))
    block = head + weights + lengths + packed + bits.to_bytes(-(-length // 8), "little")
    labels = EncodedLabels.of_blocks([block], 2, 10)
    labels.check()
    levels = np.array([[0, 3.0, 9.0 - 102 / 256], [0, 3 * 264 / 256, 9 * 264 / 256]])
    masses = np.exp(-levels)
    expected = np.repeat(masses[:, 2:], 10, axis=1)
    expected[:, [4, 7]] = masses[:, :2]
    expected /= expected.sum(1, keepdims=True)
    np.testing.assert_allclose(labels.to_dense().numpy(), expected, rtol=1e-6)
    np.testing.assert_allclose(reference_dense([block], 2, 10), expected, rtol=1e-12)


def contexts(levels_NK: np.ndarray, sizes_NK: np.ndarray, is_others_NK: np.ndarray) -> np.ndarray:
    """Return the context of each entry, int64; ``sizes_NK`` is 0 for padding, after the entries."""
    is_entry_NK = sizes_NK > 0
    lowest_N1 = np.where(is_entry_NK, levels_NK, np.iinfo(np.int64).max).min(axis=1, keepdims=True)
    coarse_NK = (levels_NK - lowest_N1) >> 4
    weights_NK = EXP[np.minimum(coarse_NK, len(EXP) - 1) * is_entry_NK]
    total_N1 = (weights_NK * sizes_NK).sum(axis=1, keepdims=True)
    coarse_NK += np.searchsorted(LOG, total_N1, side="right") - 1
    contexts_NK: np.ndarray = np.minimum(coarse_NK >> 3, CONTEXTS - 1)
    contexts_NK[is_others_NK] = OTHERS
    return contexts_NK


def random_block(
    random: np.random.Generator,
    num_classes: int,
    num_views: int,
    num_listed: int,
    *,
    density: float = 0.2,
) -> bytes:
    """Return a block as the encoder writes it, of any model and any residuals."""
    num_components = int(random.integers(1, 9))
    num_entries = num_listed + (num_listed < num_classes)
    codes_RK = random.integers(0, 16, (num_components, num_entries))
    model = Model(
        np.sort(random.permutation(num_classes)[:num_listed]),
        codes_RK,
        random.integers(-20, 40, num_components),
        random.integers(1, 20, num_components),
        random.integers(0, 16, (num_views, num_components)),
    )
    weights_VR = 8 * model.lows_R + model.steps_R * model.nibbles_VR
    sizes_VK = np.ones((num_views, num_entries), np.int64)
    is_others_VK = np.zeros_like(sizes_VK, dtype=bool)
    if num_listed < num_classes:
        sizes_VK[:, -1], is_others_VK[:, -1] = num_classes - num_listed, True
    residuals_VK = random.integers(-8, 9, (num_views, num_entries))
    residuals_VK *= random.random((num_views, num_entries)) < density
    contexts_VK = contexts(weights_VR @ codes_RK, sizes_VK, is_others_VK)
    written = coded(residuals_VK, contexts_VK, sizes_VK)
    (stream,) = packed(written, num_views)
    return block_bytes(model, written.lengths_N, stream, num_classes)


@pytest.mark.parametrize(
    ("num_classes", "num_listed"),
    [(2, 1), (2, 2), (10, 1), (10, 9), (10, 10), (300, 300), (400, 3), (1000, 250), (1000, 3),
     (30_000, 1), (30_000, 500), (1_000_000, 2), (1_000_000, 512)],
)  # fmt: skip
def test_blocks_of_any_model_and_residuals_are_read_as_described(num_classes, num_listed):
    random = np.random.default_rng(num_classes + num_listed)
    for density in (0.0, 0.01, 0.2, 1.0):  # runs of hundreds of entries; a residual for each
        num_views = int(random.integers(2, 5))
        block = random_block(random, num_classes, num_views, num_listed, density=density)
        labels = EncodedLabels.of_blocks([block], num_views, num_classes)
        labels.check()
        dense = labels.to_dense().numpy()
        expected = reference_dense([block], num_views, num_classes)
        np.testing.assert_allclose(dense, expected, rtol=2e-5, atol=0)
        assert dense.min() > 0.0


def test_the_likeliest_class_may_be_one_that_is_not_listed():
    random = np.random.default_rng(6)
    is_listed = []
    for num_classes, num_listed in [(10, 9), (10, 3), (50, 5), (2, 1), (5, 5)] * 4:
        block = random_block(random, num_classes, 4, num_listed)
        labels = EncodedLabels.of_blocks([block], 4, num_classes)
        dense, best = labels.to_dense(), labels.argmax()
        assert torch.equal(dense.gather(1, best[:, None])[:, 0], dense.amax(1))
        kept = labels.kept()
        is_listed += ((kept.indices_NK == best[:, None]) & kept.is_kept_NK).any(1).tolist()
    assert {*is_listed} == {False, True}


def test_many_random_blocks_are_decoded_together_as_each_alone():
    random = np.random.default_rng(5)
    blocks = [random_block(random, 1000, 3, int(random.integers(1, 200))) for _ in range(30)]
    dense = EncodedLabels.of_blocks(blocks, 3, 1000).to_dense()
    alone = [EncodedLabels.of_blocks([block], 3, 1000).to_dense() for block in blocks]
    torch.testing.assert_close(dense, torch.cat(alone), rtol=1e-6, atol=0)


def test_a_view_by_itself_is_the_same_as_among_others():
    case = CASES["1000 classes, 16 views"]
    labels = shared(case)
    dense = labels.to_dense()
    random = np.random.default_rng(0)
    for _ in range(10):
        rows = random.integers(len(labels), size=5).tolist()
        torch.testing.assert_close(labels[rows].to_dense(), dense[rows], rtol=1e-6, atol=0)
    assert labels[[0]].nbytes == len(labels.blocks(16)[0])


def test_blocks_of_all_kinds_are_decoded_at_once():
    probs = views_of_images(4, 4, 50, seed=3)
    kinds = [
        encode_each_view(probs, 1e-2, None, 4),
        EncodedLabels.of_blocks(shared_blocks(probs, 4, 1e-2), 4, 50),
        encode(probs, rate=1e-2),
        EncodedLabels.of_blocks(shared_blocks(probs[:14], 7, 1e-3), 7, 50),
    ]
    joined = EncodedLabels.concat(kinds)
    expected = torch.cat([part.to_dense() for part in kinds])
    order = torch.randperm(len(joined), generator=torch.Generator().manual_seed(0))
    for labels in (joined[order], EncodedLabels.from_bytes(joined[order].to_bytes())):
        torch.testing.assert_close(labels.to_dense(), expected[order], rtol=1e-6, atol=0)


# --- any bits -------------------------------------------------------------------------------------


def read(block: bytes, num_views: int, num_classes: int) -> bool:
    """Return whether the strict check passes; a block is refused, or its rows are distributions."""
    return are_valid(EncodedLabels.of_blocks([block], num_views, num_classes))


@pytest.mark.parametrize("num_classes", [2, 10, 50, 1000, 30_000])
def test_any_bytes_after_a_head_are_refused_or_give_distributions(num_classes):
    random = np.random.default_rng(num_classes)
    valid = 0
    for _ in range(300):
        num_views = int(random.integers(2, 9))
        num_listed = int(random.integers(1, min(num_classes, 40) + 1))
        num_components = int(random.integers(1, 9))
        head = bytes([num_components, num_listed, 0, 1])
        lengths = random.integers(0, 60, num_views).astype(np.uint8).tobytes()
        weights = random.integers(0, 256, 2 * num_components).astype(np.uint8).tobytes()
        num_entries = num_listed + (num_listed < num_classes)
        num_nibbles = num_components * (num_views + num_entries)
        if num_listed < num_classes:
            num_nibbles += num_listed * (1 + int(low_nibbles(num_listed, num_classes)))
        nibbles = random.integers(0, 15, num_nibbles + num_nibbles % 2)
        body = (nibbles[::2] | nibbles[1::2] << 4).astype(np.uint8).tobytes()
        stream = random.bytes(-(-sum(lengths) // 8))
        block = head + weights + lengths + body + stream
        read(block, num_views, num_classes)
        labels = EncodedLabels.of_blocks([block], num_views, num_classes)
        valid += not refuses(labels)
        read(head + random.bytes(int(random.integers(0, 200))), num_views, num_classes)
    assert valid > 10


def refuses(labels: EncodedLabels) -> bool:
    try:
        labels.to_dense()
    except LabelSetError:
        return True
    return False


@pytest.mark.parametrize(
    ("num_classes", "num_views", "num_listed"), [(10, 3, 10), (50, 3, 8), (1000, 2, 12)]
)
def test_every_flipped_bit_of_a_block_is_refused_or_gives_distributions(
    num_classes, num_views, num_listed
):
    block = random_block(np.random.default_rng(0), num_classes, num_views, num_listed)
    assert read(block, num_views, num_classes)
    passed = []
    for bit in range(8 * len(block)):
        flipped = bytearray(block)
        flipped[bit // 8] ^= 1 << bit % 8
        if flipped[0] and read(bytes(flipped), num_views, num_classes):
            passed.append(bytes(flipped))
    assert 0 < len(passed) < 8 * len(block)
    # what the strict check passes is a block by its description too
    for found in passed:
        dense = EncodedLabels.of_blocks([found], num_views, num_classes).to_dense().numpy()
        expected = reference_dense([found], num_views, num_classes)
        np.testing.assert_allclose(dense, expected, rtol=2e-5, atol=0)


@pytest.mark.parametrize("name", ["ten classes", "1000 classes, 2 views"])
def test_a_block_cut_short_is_refused_or_gives_distributions(name):
    case = CASES[name]
    (block, *_) = shared(case).blocks(case.num_views)
    for size in range(len(block)):
        for data in (block[:size], block[:size] + block[size + 1 :], block + block[:size]):
            if data[:1] != b"\0" and data != block:
                assert (
                    not read(data, case.num_views, case.num_classes) or len(data) >= len(block) - 1
                )


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({0: 9}, "head"),
        ({0: 255}, "head"),
        ({1: 0, 2: 0}, "head"),
        ({2: 3}, "head"),
        ({3: 0}, "head"),
        ({3: 3}, "head"),
    ],
)
def test_a_head_that_is_not_valid_is_refused(change, reason):
    case = CASES["1000 classes, 2 views"]
    block = bytearray(shared(case).blocks(2)[0])
    for at, value in change.items():
        block[at] = value
    with pytest.raises(LabelSetError, match=reason):
        EncodedLabels.of_blocks([bytes(block)], 2, 1000).to_dense()


# --- what the encoder chooses ---------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ten classes", "50 classes, 3 views", "1000 classes, 16 views"])
def test_the_order_of_the_views_does_not_matter(name):
    case = CASES[name]
    probs = case.probs()
    generator = torch.Generator().manual_seed(1)
    order_V = torch.randperm(case.num_views, generator=generator)
    order_N = (case.num_views * torch.arange(case.num_images)[:, None] + order_V).flatten()
    labels = encode(probs, rate=case.rate, num_views=case.num_views)
    permuted = encode(probs[order_N], rate=case.rate, num_views=case.num_views)
    assert labels.nbytes == permuted.nbytes
    torch.testing.assert_close(permuted.to_dense(), labels.to_dense()[order_N], rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", ["ten classes", "50 classes, 3 views", "1000 classes, 16 views"])
def test_images_in_other_batches_give_the_same_bytes(name, monkeypatch):
    case = CASES[name]._replace(num_images=6)
    probs, num_views = case.probs(), case.num_views
    how = {"rate": case.rate, "num_views": num_views}
    blocks = encode(probs, **how).blocks(num_views)
    assert any(block[0] for block in blocks)
    for size in (1, 4):
        parts = [encode(part, **how) for part in probs.split(size * num_views)]
        assert [block for part in parts for block in part.blocks(num_views)] == blocks
    monkeypatch.setattr("mealv2.codec.encoder._CHUNK", 2 * num_views * case.num_classes)
    monkeypatch.setattr("mealv2.codec.shared_encoder._CPU_CHUNK", 1)
    assert encode(probs, **how).blocks(num_views) == blocks
    assert encode(probs.T.contiguous().T, **how).blocks(num_views) == blocks
    monkeypatch.undo()
    monkeypatch.setattr("mealv2.codec.shared_encoder._CPU_GROUPS", (128,))  # as on a GPU
    assert encode(probs, **how).blocks(num_views) == blocks


@pytest.mark.parametrize("name", CASES)
def test_the_cost_is_never_above_that_of_records(name):
    case = CASES[name]
    probs, num_views = case.probs(), case.num_views
    exact = probs.double() / probs.double().sum(1, keepdim=True)
    costs = []
    for labels in (
        encode(probs, rate=case.rate, num_views=num_views),
        encode_each_view(probs, case.rate, None, num_views),
    ):
        bits = 8.0 * labels.nbytes / len(labels)
        costs.append(divergence(exact, labels).mean() + case.rate / BITS_OF_CLASS * bits)
    assert costs[0] <= costs[1] * (1 + 1e-9)


@pytest.mark.parametrize("num_views", [1, 2, 4])
def test_views_that_have_nothing_in_common_have_records_and_at_most_one_byte_more(num_views):
    probs = views_of_images(12, 1, 1000, scale=4.0)
    by_itself = encode(probs, rate=1e-2)
    labels = encode(probs, rate=1e-2, num_views=num_views)
    blocks = labels.blocks(num_views)
    assert labels.nbytes == by_itself.nbytes + len(blocks) * (num_views > 1)
    if num_views > 1:
        assert all(block[0] == 0 for block in blocks)
    assert torch.equal(labels.argmax(), by_itself.argmax())


def test_views_with_a_planted_model_take_far_fewer_bytes_at_less_divergence():
    probs = views_of_images(4, 32, 1000, scale=2.5, noise=0.0, rank=2)
    exact = probs.double() / probs.double().sum(1, keepdim=True)
    labels = encode(probs, rate=2e-3, num_views=32)
    records = encode_each_view(probs, 2e-3, None, 32)
    assert labels.nbytes < 0.6 * records.nbytes
    assert float(divergence(exact, labels).mean()) < float(divergence(exact, records).mean())


def test_no_more_classes_are_listed_than_a_block_can_have():
    probs = views_of_images(1, 16, 3000, scale=0.1)
    blocks = shared_blocks(probs, 16, 1e-7)
    assert head_of(blocks[0])[1] == MAX_LISTED
    EncodedLabels.of_blocks(blocks, 16, 3000).check()


@pytest.mark.parametrize(("rate", "topk"), [(None, 3), (1e-3, None)])
def test_with_topk_or_by_themselves_views_have_records(rate, topk):
    probs = CASES["1000 classes, 16 views"].probs()
    labels = encode_each_view(probs, rate, topk, 16)
    assert {block[0] for block in labels.blocks(16)} == {0}
    if topk is not None:
        assert labels.blocks(16) == encode(probs, topk=topk, num_views=16).blocks(16)
    records = labels.records()
    alone = encode(probs, rate=rate, topk=topk)
    assert records.counts_R.tolist() == alone.records().counts_R.tolist()


@pytest.mark.parametrize("num_views", [0, -1, 5])
def test_views_that_do_not_divide_the_rows_raise_value_error(num_views):
    with pytest.raises(ValueError, match=f"6 rows are not images of {num_views} views"):
        encode(views_of_images(6, 1, 10), rate=1e-2, num_views=num_views)


def test_rows_that_are_not_all_views_of_their_blocks_are_not_blocks():
    labels = shared(CASES["50 classes, 3 views"])
    assert len(labels.blocks(3)) == 3
    for rows in ([0, 1, 3], [1, 0, 2], [0, 1, 2, 6, 7, 7], [3, 3, 3]):
        with pytest.raises(ValueError, match="not blocks of 3 views"):
            labels[rows].blocks(3)
    with pytest.raises(ValueError, match="not blocks of 1 views"):
        labels.blocks(1)
    with pytest.raises(ValueError, match="not images of 2 views"):
        labels.blocks(2)
    with pytest.raises(LabelSetError):
        labels.counts_of_blocks()


# --- the loss -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", mostly_slow(CASES, fast=8))
@pytest.mark.parametrize("scale", [0.1, 3.0, 30.0])
def test_the_loss_and_its_gradient_equal_those_of_the_dense_rows(name, scale):
    case = CASES[name]
    labels = shared(case)
    generator = torch.Generator().manual_seed(0)
    logits = scale * torch.randn(len(labels), case.num_classes, generator=generator)
    compressed, dense = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    loss, of_dense = similarity_loss(compressed, labels), similarity_loss(dense, labels.to_dense())
    loss.backward()
    of_dense.backward()
    assert loss.item() == pytest.approx(of_dense.item(), rel=1e-6, abs=1e-6)
    torch.testing.assert_close(compressed.grad, dense.grad, rtol=1e-5, atol=1e-6)


def test_twenty_steps_from_blocks_are_those_from_dense_rows() -> None:
    case = CASES["1000 classes, 16 views"]
    labels = shared(case)
    images_NF = torch.randn(len(labels), 16, generator=torch.Generator().manual_seed(3))

    def losses(*, dense: bool) -> list[float]:
        torch.manual_seed(4)
        student = torch.nn.Linear(16, case.num_classes)
        optimizer = torch.optim.SGD(student.parameters(), lr=0.5, momentum=0.9)
        found = []
        for step in range(20):
            rows_B = torch.arange(step, len(labels), 3)
            targets = labels[rows_B].to_dense() if dense else labels[rows_B]
            loss = similarity_loss(student(images_NF[rows_B]), targets)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            found.append(float(loss.detach()))
        return found

    compressed = losses(dense=False)
    assert compressed == pytest.approx(losses(dense=True), rel=1e-6)
    assert compressed[-1] < 0.9 * compressed[0], "or nothing is learned"


# --- contexts and codes ---------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_contexts_are_the_same_in_numpy_and_torch(seed):
    random = np.random.default_rng(seed)
    counts_N = random.integers(1, 60, 300)
    slots_K = np.arange(61)
    levels_NK = random.integers(-(10 ** random.integers(1, 7)), 5000, (300, 61))
    has_others_N = random.random(300) < 0.7
    is_others_NK = (slots_K == counts_N[:, None]) & has_others_N[:, None]
    sizes_NK = (slots_K < counts_N[:, None]) + is_others_NK * random.integers(1, 10**6, (300, 1))
    found_NK = contexts(levels_NK, sizes_NK, is_others_NK)
    of_torch = contexts_of(*map(torch.from_numpy, (levels_NK, sizes_NK, is_others_NK)))
    is_entry_NK = sizes_NK > 0
    assert np.array_equal(found_NK[is_entry_NK], of_torch.numpy()[is_entry_NK])
    for levels, sizes, row, k, has_others in zip(
        levels_NK, sizes_NK, found_NK, counts_N, has_others_N, strict=True
    ):
        num = int(k) + int(has_others)
        num_others = int(sizes[num - 1]) if has_others else 0
        expected = reference.entry_contexts(levels[:num].tolist(), num_others)
        assert row[:num].tolist() == expected
    assert set(np.unique(found_NK[is_entry_NK])) >= {0, 1, CONTEXTS - 1, OTHERS}


@pytest.mark.parametrize("rows", [RUN_LENGTHS, VALUE_LENGTHS])
def test_the_codes_are_complete_prefix_codes(rows):
    for row, codes in ((row, reference.prefix_codes(row)) for row in rows):
        assert sum(2.0 ** -len(code) for code in codes) == 1.0
        assert len(codes) == len(row)
        assert max(map(len, codes)) <= MAX_CODE
        ordered = sorted(codes)
        assert not any(b.startswith(a) for a, b in zip(ordered, ordered[1:], strict=False))
    assert len(rows) == CONTEXTS + 1


@pytest.mark.parametrize(("codes", "rows"), [(RUNS, RUN_LENGTHS), (VALUES, VALUE_LENGTHS)])
def test_the_codes_are_those_of_the_description(codes, rows):
    for context, row in enumerate(rows):
        for code, symbol in reference.prefix_codes(row).items():
            word = int(code[::-1], 2)  # the first bit of a code is stored lowest
            assert codes.words_XS[context, symbol] == word
            assert codes.lengths_XS[context, symbol] == len(code)
            step = 1 << len(code)
            assert (codes.symbols_XW[context, word::step] == symbol).all()
            assert (codes.sizes_XW[context, word::step] == len(code)).all()


def test_the_tables_are_the_same_with_any_exponential_function():
    # nearest integers, all farther from a half than a libm errs in float64: 1 in the last place
    scale = np.longdouble(1 << 24)
    for sign, table in ((-1, EXP[:-1]), (1, LOG)):
        exact = scale * np.exp(sign * np.arange(len(table)).astype(np.longdouble) / 16)
        assert (table == np.floor(exact + np.longdouble(0.5))).all()
        to_border = np.abs(exact - np.floor(exact) - np.longdouble(0.5))
        assert float(to_border.min()) > 1e-3
        assert float((to_border / exact).min()) > 2 * np.finfo(np.float64).eps
    assert EXP[-1] == 0
