"""mealv2.codec: blocks of views that use the model of an earlier block of their image."""

from typing import NamedTuple

import numpy as np
import pytest
import torch
from any_bits import are_valid
from torch import Tensor

import reference
from image_views import views_of_images
from mealv2.codec import encoder
from mealv2.codec.encoder import BITS_OF_CLASS, divergence, encode_each_view
from mealv2.errors import LabelSetError
from mealv2.soft_labels import EncodedLabels, encode


class Case(NamedTuple):
    """The views of the first block, those added, and the rate of both."""

    num_classes: int
    first_views: int
    num_views: int
    rate: float = 1e-3
    scale: float = 3.0
    num_images: int = 4

    def probs(self) -> tuple[Tensor, Tensor]:
        """Return the rows of the first views, and of those added."""
        total = self.first_views + self.num_views
        probs_NC = views_of_images(self.num_images, total, self.num_classes, scale=self.scale)
        probs_IVC = probs_NC.unflatten(0, (-1, total))
        first_IVC, added_IVC = probs_IVC.split([self.first_views, self.num_views], dim=1)
        return first_IVC.flatten(0, 1), added_IVC.flatten(0, 1)


CASES = {
    "1 view": Case(1000, 16, 1),
    "2 views": Case(1000, 16, 2),
    "3 views": Case(50, 9, 3, num_images=8),
    "8 views": Case(1000, 16, 8),
    "1 view of ten classes": Case(10, 16, 1, num_images=8),
    "two classes": Case(2, 32, 4, rate=1e-4, scale=1.0, num_images=8),
    "1 view of 30000 classes": Case(30_000, 16, 1, rate=1e-2, scale=6.0, num_images=2),
    "lengths of two bytes": Case(1000, 32, 2, rate=1e-4),
}


class Encoded(NamedTuple):
    """The first block of each image, a row of each, and the labels of the added views."""

    first_blocks: list[bytes]
    first: EncodedLabels
    labels: EncodedLabels


def added(case: Case) -> Encoded:
    first_NC, added_NC = case.probs()
    first = encode(first_NC, rate=case.rate, num_views=case.first_views)
    of_images = first[:: case.first_views]
    labels = encode(added_NC, rate=case.rate, num_views=case.num_views, first=of_images)
    return Encoded(first.blocks(case.first_views), of_images, labels)


def blocks_with_marks(case: Case, found: Encoded) -> list[tuple[bytes, bytes]]:
    """Return (block, first block) of the images whose added views use the first block's model."""
    is_marked = found.labels.uses_others()[: case.num_images].tolist()
    blocks = found.labels.blocks(case.num_views)
    pairs = zip(blocks, found.first_blocks, is_marked, strict=True)
    return [(block, first) for block, first, is_used in pairs if is_used]


# --- the block and its readers --------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_the_decoder_agrees_with_the_reference(name):
    case = CASES[name]
    found = added(case)
    assert len(blocks_with_marks(case, found)) > 0
    found.labels.check()
    found.labels.check(most=2)
    dense = found.labels.to_dense()
    assert float(dense.min()) > 0.0
    dense_IVC = dense.double().unflatten(0, (-1, case.num_views)).numpy()
    np.testing.assert_allclose(dense_IVC.sum(2), 1.0, atol=1e-6)
    blocks = found.labels.blocks(case.num_views)
    is_marked = found.labels.uses_others()
    for image, (block, first) in enumerate(zip(blocks, found.first_blocks, strict=True)):
        if is_marked[image]:
            sizes = case.num_views, case.num_classes
            own = reference.with_own_model(
                block, case.num_views, first, case.first_views, case.num_classes
            )
            expected = reference.decode_shared_block(own, *sizes)
            np.testing.assert_allclose(dense_IVC[image], expected, rtol=2e-5, atol=0)


def test_the_cases_have_every_form_of_a_block():
    starts = set()
    for case in CASES.values():
        starts |= {block[0] for block, _ in blocks_with_marks(case, added(case))}
    assert starts == {0, 9, 10}


@pytest.mark.parametrize("name", ["3 views", "1 view"])
def test_rows_in_any_order_and_as_bytes_are_the_same(name):
    found = added(CASES[name])
    dense = found.labels.to_dense()
    order = torch.randperm(len(dense), generator=torch.Generator().manual_seed(0))[:5]
    joined = EncodedLabels.concat([found.first, found.labels, found.labels[order]])
    parts = [found.first.to_dense(), dense, dense[order]]
    for labels in (joined, EncodedLabels.from_bytes(joined.to_bytes())):
        torch.testing.assert_close(labels.to_dense(), torch.cat(parts), rtol=1e-5, atol=0)
    alone = EncodedLabels.from_bytes(found.labels[order].to_bytes())
    torch.testing.assert_close(alone.to_dense(), dense[order], rtol=1e-5, atol=0)
    # a block is selected with its model, and counted without
    (marked, *_) = found.labels.uses_others().nonzero()[0].tolist()
    num_views = CASES[name].num_views
    one = found.labels[marked * num_views]
    assert len(one.at_B) == 2
    assert one.nbytes == len(found.labels.blocks(num_views)[marked])
    assert len(one.to_bytes()) > one.nbytes


def test_blocks_that_are_read_again_get_their_models_again():
    case = CASES["3 views"]
    found = added(case)
    blocks = found.labels.blocks(case.num_views)
    read = EncodedLabels.of_blocks(blocks, case.num_views, case.num_classes)
    users = read.uses_others().nonzero()[0]
    assert len(users) > 0
    again = read.using(found.first[users])
    torch.testing.assert_close(again.to_dense(), found.labels.to_dense(), rtol=1e-6, atol=0)
    with pytest.raises(LabelSetError, match="models of"):
        read.using(found.first[users[1:]])
    with pytest.raises(LabelSetError, match="head"):
        read.kept()


# --- the encoder ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_the_cost_is_never_above_that_of_a_block_of_its_own(name):
    case = CASES[name]
    _, added_NC = case.probs()
    found = added(case)
    own = encode(added_NC, rate=case.rate, num_views=case.num_views)
    p_NC = added_NC.double() / added_NC.double().sum(1, keepdim=True)
    costs = []
    for labels in (own, found.labels):
        sizes_I = torch.tensor([len(block) for block in labels.blocks(case.num_views)])
        kl_I = divergence(p_NC, labels).view(-1, case.num_views).mean(1)
        costs.append(kl_I + case.rate / BITS_OF_CLASS * 8.0 * sizes_I / case.num_views)
    assert (costs[1] <= costs[0] + 1e-9).all()
    assert costs[1].sum() < costs[0].sum()


def test_added_views_of_a_planted_model_take_half_the_bytes_at_less_divergence():
    case = Case(1000, 32, 1, num_images=8)
    _, added_NC = case.probs()
    found = added(case)
    own = encode(added_NC, rate=case.rate)
    p_NC = added_NC.double() / added_NC.double().sum(1, keepdim=True)
    assert found.labels.nbytes < 0.6 * own.nbytes
    assert divergence(p_NC, found.labels).mean() < divergence(p_NC, own).mean()


def test_images_in_other_batches_give_the_same_bytes(monkeypatch):
    case = CASES["8 views"]
    _, added_NC = case.probs()
    found = added(case)
    blocks = found.labels.blocks(case.num_views)
    monkeypatch.setattr(encoder, "_CHUNK", 8 * 1000)  # an image at once
    assert added(case).labels.blocks(case.num_views) == blocks
    alone = [
        encode(added_NC[8 * n : 8 * n + 8], rate=case.rate, num_views=8, first=found.first[n])
        for n in range(case.num_images)
    ]
    assert [block for labels in alone for block in labels.blocks(8)] == blocks


def test_an_image_whose_first_block_has_records_has_a_block_of_its_own():
    case = CASES["8 views"]
    first_NC, added_NC = case.probs()
    first = encode_each_view(first_NC, case.rate, None, 16)[::16]
    labels = encode(added_NC, rate=case.rate, num_views=8, first=first)
    own = encode(added_NC, rate=case.rate, num_views=8)
    assert labels.blocks(8) == own.blocks(8)
    one = encode(added_NC, rate=case.rate, first=encode(added_NC, rate=case.rate))
    assert not one.uses_others().any()


def test_another_number_of_first_blocks_raises_value_error():
    case = CASES["8 views"]
    found = added(case)
    with pytest.raises(ValueError, match="8 views of 3 images"):
        encode(case.probs()[1], rate=1e-3, num_views=8, first=found.first[:3])


# --- any bits -------------------------------------------------------------------------------------


def read(block: bytes, num_views: int, first: bytes, first_views: int, num_classes: int) -> bool:
    """Return whether the strict check passes; a block is refused, or its rows are distributions."""
    labels = EncodedLabels.of_blocks([block], num_views, num_classes)
    try:
        if labels.uses_others().any():
            labels = labels.using(EncodedLabels.of_blocks([first], first_views, num_classes)[:1])
    except LabelSetError:
        return False
    return are_valid(labels)


@pytest.mark.parametrize("name", ["1 view of ten classes", "3 views"])
def test_flipped_bits_and_cuts_are_refused_or_give_distributions(name):
    case = CASES[name]
    block, first = blocks_with_marks(case, added(case))[0]
    sizes = case.first_views, case.num_classes
    assert read(block, case.num_views, first, *sizes)
    for bit in range(8 * len(block)):
        flipped = bytearray(block)
        flipped[bit // 8] ^= 1 << bit % 8
        is_read = read(bytes(flipped), case.num_views, first, *sizes)
        if is_read and flipped[0] == block[0]:  # then it is a block by its description too
            labels = EncodedLabels.of_blocks([bytes(flipped)], case.num_views, case.num_classes)
            labels = labels.using(EncodedLabels.of_blocks([first], *sizes)[:1])
            own = reference.with_own_model(
                bytes(flipped), case.num_views, first, case.first_views, case.num_classes
            )
            expected = reference.decode_shared_block(own, case.num_views, case.num_classes)
            np.testing.assert_allclose(labels.to_dense().numpy(), expected, rtol=2e-5, atol=0)
    for bit in range(0, 8 * len(first), 3):
        flipped = bytearray(first)
        flipped[bit // 8] ^= 1 << bit % 8
        read(block, case.num_views, bytes(flipped), *sizes)
    for end in range(1, len(block)):
        assert not read(block[:end], case.num_views, first, *sizes)
    for end in range(1, len(first)):
        read(block, case.num_views, first[:end], *sizes)


@pytest.mark.parametrize("num_views", [1, 2, 5])
def test_any_bytes_after_a_first_byte_are_refused_or_give_distributions(num_views):
    case = CASES["3 views"]
    _, first = blocks_with_marks(case, added(case))[0]
    random = np.random.default_rng(num_views)
    for _ in range(300):
        start = bytes([0 if num_views == 1 else int(random.integers(9, 11))])
        data = bytearray(random.bytes(int(random.integers(num_views, 60))))
        data[: 2 * num_views] = bytes(b % 40 for b in data[: 2 * num_views])
        read(start + bytes(data), num_views, first, case.first_views, case.num_classes)


def test_first_labels_of_other_classes_are_refused():
    first = encode(views_of_images(2, 4, 10), rate=1e-3, num_views=4)
    with pytest.raises(ValueError, match="first has 10 classes, and the rows 5"):
        encode(views_of_images(2, 1, 5), rate=1e-3, first=first[::4])
