"""mealv2.label_set.logits: mean logits as a line in the labels' log-probabilities."""

import dataclasses

import numpy as np
import pytest
import torch

from label_sets import KEYS, ensemble_outputs, look_up, make_set, same
from mealv2.codec import encode
from mealv2.errors import LabelSetError
from mealv2.label_set import Appender, Encoding, FittedLogits, LabelSet, Rows
from mealv2.label_set.logits import LINE_SIZE, concat_logits, fit_logits
from mealv2.soft_labels import EncodedLabels, KeptLogits, SoftLabels, keep_logits

RATE = Encoding(50, rate=1e-3, logits=True)


def line_by_hand(
    logits_C: np.ndarray, probs_C: np.ndarray, ids: np.ndarray, recovered_C: np.ndarray
) -> tuple[float, float]:
    """Return slope and offset of the weighted least squares, float64, before rounding."""
    weights = probs_C[ids] ** 0.75
    weights = weights / weights.sum()
    logs, values = np.log(recovered_C[ids]), logits_C[ids]
    from_mean = logs - weights @ logs
    covariance = weights @ (from_mean * (values - weights @ values))
    slope = (covariance + 0.01) / (weights @ from_mean**2 + 0.01)
    return slope, weights @ values - slope * (weights @ logs)


@pytest.mark.parametrize("num_views", [1, 4, 32])
def test_the_line_is_the_least_squares_of_the_reference(num_views):
    probs_NC, logits_NC = ensemble_outputs(3 * num_views, 50, num_views=num_views)
    rows = RATE.encode(probs_NC, logits_NC, num_views=num_views)
    assert rows.labels.shares_models == (num_views > 1)
    kept, recovered_NC = rows.labels.kept(), rows.labels.to_dense().double().numpy()
    for n in range(len(probs_NC)):
        ids = kept.indices_NK[n][kept.is_kept_NK[n]].numpy()
        logits_C = logits_NC[n].double().numpy()
        of_row = logits_C, probs_NC[n].double().numpy(), ids, recovered_NC[n]
        slope, offset = line_by_hand(*of_row)
        stored = int(rows.logits.slopes_N[n])
        assert abs(stored / 64 - np.clip(slope, 0, 255 / 64)) <= 0.5001 / 64
        if 0 < stored < 255:
            mean_log = offset + slope * np.log(recovered_NC[n][ids])  # by the unrounded slope
            found = float(rows.logits.offsets_N[n]) + stored / 64 * np.log(recovered_NC[n][ids])
            assert abs(np.average(found - mean_log, weights=of_row[1][ids] ** 0.75)) < 0.01
        others = np.delete(logits_C, ids)
        np.testing.assert_allclose(rows.logits.rest_N[n], others.mean(), rtol=1e-3, atol=1e-3)


def test_logits_of_one_teacher_are_recovered_up_to_the_error_of_the_label():
    logits_NC = 3 * torch.randn(40, 50, generator=torch.Generator().manual_seed(0))
    probs_NC = torch.softmax(logits_NC, 1)
    exact = SoftLabels.from_dense(probs_NC)
    fitted = fit_logits(logits_NC, probs_NC, exact.kept())
    assert set(fitted.slopes_N.tolist()) == {64}
    assert torch.equal(fitted.rest_N, torch.zeros(40).half()), "all are kept"
    dense_NC = fitted.to_dense(exact.kept(), 50)
    np.testing.assert_allclose(dense_NC, logits_NC, atol=0.01)  # of the offset in float16
    labels = encode(probs_NC, rate=1e-4)
    kept = labels.kept()
    error_NC = fit_logits(logits_NC, probs_NC, kept).to_dense(kept, 50) - logits_NC
    of_label_NC = labels.to_dense().log() - torch.log_softmax(logits_NC, 1)
    is_kept_NC = kept.mask(50)
    assert error_NC[is_kept_NC].std() < 1.2 * of_label_NC[is_kept_NC].std() + 0.01


def test_views_that_share_a_model_take_a_line_each_and_not_the_logits_of_their_classes():
    probs_NC, logits_NC = ensemble_outputs(3 * 32, 50, num_views=32)
    rows = RATE.encode(probs_NC, logits_NC, num_views=32)
    alone = Encoding(50, rate=1e-3).encode(probs_NC, num_views=32)
    blocks = RATE.blocks(rows, 32)
    labels = Encoding(50, rate=1e-3).blocks(alone, 32)
    assert [len(b) for b in blocks] == [len(b) + LINE_SIZE * 32 for b in labels]
    assert all(block.startswith(label) for block, label in zip(blocks, labels, strict=True))
    assert all(block[0] for block in blocks), "a shared model"


def test_the_bytes_of_a_block_by_hand():
    labels = encode(torch.tensor([[0.9, 0.05, 0.05]] * 2), rate=1e-2, num_views=2)
    logits = FittedLogits(
        torch.tensor([64, 3], dtype=torch.uint8),
        torch.tensor([2.0, -1.0]).half(),
        torch.tensor([0.5, 0.25]).half(),
    )
    encoding = Encoding(3, rate=1e-2, logits=True)
    (block,) = encoding.blocks(Rows(labels, logits), 2)
    (alone,) = labels.blocks(2)
    assert block == alone + bytes.fromhex("40 0040 0038 03 00bc 0034")


def test_the_order_of_views_does_not_change_a_view():
    probs_NC, logits_NC = ensemble_outputs(16, 50, num_views=16)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(0))
    rows = RATE.encode(probs_NC, logits_NC, num_views=16)
    turned = RATE.encode(probs_NC[order], logits_NC[order], num_views=16)
    dense, turned_dense = (r.logits.to_dense(r.labels.kept(), 50) for r in (rows, turned))
    np.testing.assert_allclose(turned_dense, dense[order], atol=0.02)
    assert len(RATE.blocks(rows, 16)[0]) == len(RATE.blocks(turned, 16)[0])


# --- masked and extreme classes -------------------------------------------------------------------


def test_a_masked_class_has_a_finite_logit_and_spoils_no_other():
    probs_NC, logits_NC = ensemble_outputs(8, 50, num_views=8)
    masked_NC = logits_NC.clone()
    likeliest = int(probs_NC.mean(0).argmax())
    masked_NC[:, likeliest] = -torch.inf  # of one teacher: the other's probability is left
    never = int(probs_NC.mean(0).argmin())
    masked_NC[:, never] = -torch.inf
    rows = RATE.encode(probs_NC, masked_NC, num_views=8)
    plain = RATE.encode(probs_NC, logits_NC, num_views=8)
    RATE.check(rows)
    kept = rows.labels.kept()
    dense_NC = rows.logits.to_dense(kept, 50)
    assert bool(torch.isfinite(dense_NC).all())
    expected_NC = plain.logits.to_dense(kept, 50)
    assert float((dense_NC - expected_NC).abs().max()) < 10, "not 65504 / 50"
    left = [c for c in range(50) if not bool(kept.mask(50)[0, c]) and c != never]
    np.testing.assert_allclose(rows.logits.rest_N, logits_NC[:, left].mean(1), atol=0.01)


def test_where_no_class_but_the_kept_ones_is_finite_the_others_follow_the_line():
    logits_NC = torch.full((1, 6), -torch.inf)
    logits_NC[0, :2] = torch.tensor([3.0, 1.0])
    probs_NC = torch.softmax(logits_NC, 1)
    encoding = Encoding(6, rate=1e-2, logits=True)
    rows = encoding.encode(probs_NC, logits_NC)
    encoding.check(rows)
    kept = rows.labels.kept()
    assert kept.is_kept_NK.sum() == 2
    dense_NC = rows.logits.to_dense(kept, 6)
    np.testing.assert_allclose(dense_NC[0, :2], [3.0, 1.0], atol=0.1)
    of_line = float(rows.logits.slopes_N[0]) / 64 * float(kept.tail_N.log())
    of_line += float(rows.logits.offsets_N[0])
    np.testing.assert_allclose(dense_NC[0, 2:], of_line, rtol=1e-2)


@pytest.mark.parametrize(
    ("logits", "slope"),
    [
        ([5.0, 5.0, 5.0, 5.0], 64),  # nothing to fit
        ([1e6, -1e6, 0.0, 3e38], 255),  # beyond float16 and the slopes
        ([-9.0, -2.0, -1.0, 0.0], 0),  # falls where the labels rise
    ],
)
def test_extreme_logits_are_stored_as_finite_ones(logits, slope):
    logits_NC = torch.tensor([logits])
    probs_NC = torch.tensor([[0.9, 0.06, 0.03, 0.01]])
    if slope == 64:
        probs_NC = torch.full((1, 4), 0.25)
    elif slope == 255:
        probs_NC = torch.tensor([[0.04, 0.01, 0.05, 0.9]])
    encoding = Encoding(4, rate=1e-9, logits=True)
    rows = encoding.encode(probs_NC, logits_NC)
    encoding.check(rows)
    assert rows.logits.slopes_N.tolist() == [slope]
    assert bool(torch.isfinite(rows.logits.to_dense(rows.labels.kept(), 4)).all())


# --- damage ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["offsets_N", "rest_N"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_lines_that_are_not_finite_are_found(name, value):
    rows = RATE.encode(*ensemble_outputs(8, 50, num_views=4), num_views=4)
    spoiled = getattr(rows.logits, name).clone()
    spoiled[5] = value
    logits = dataclasses.replace(rows.logits, **{name: spoiled})
    with pytest.raises(LabelSetError, match="a logit is not finite"):
        RATE.check(Rows(rows.labels, logits))


@pytest.mark.parametrize("num_views", [1, 4])
def test_blocks_of_lines_alone_or_of_fewer_bytes_are_refused(num_views):
    size, first = LINE_SIZE * num_views, np.zeros(1, np.int64)
    for length in (0, 1, size - 1, size, size + num_views - 1):
        data, ends = np.zeros(length, np.uint8), np.array([length])
        with pytest.raises(LabelSetError, match="shorter than its number of views"):
            RATE.all_rows_of(data, ends, num_views)
        with pytest.raises(LabelSetError, match="shorter than its number of views"):
            RATE.rows_of(data, ends, num_views, first)


def test_any_flipped_bit_of_a_set_is_found_or_changes_nothing(tmp_path):
    made = make_set(tmp_path / "set", RATE, num_views=16)
    (path, *_) = sorted((tmp_path / "set").glob("train-*.h5"))
    data = path.read_bytes()
    random = np.random.default_rng(0)
    refused = 0
    for bit in random.integers(0, 8 * len(data), 60).tolist():
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        try:
            labels = LabelSet.open(tmp_path / "set")
            assert same(look_up(labels, made.addresses()), made.rows)
        except LabelSetError:
            refused += 1
    assert refused > 20


# --- sets -----------------------------------------------------------------------------------------


def test_appended_rows_and_added_views_have_lines_too(tmp_path):
    made = make_set(tmp_path / "set", RATE, num_views=20, block_ends=(16, 20))
    labels = LabelSet.open(tmp_path / "set")
    probs_NC, logits_NC = ensemble_outputs(2, 50, seed=7)
    rows = RATE.encode(probs_NC, logits_NC)
    appender = Appender(labels)
    appender.add(KEYS[:2], [30, 31], rows)
    appender.flush()
    labels = LabelSet.open(tmp_path / "set")
    addresses = [(KEYS[0], 30), (KEYS[1], 3), (KEYS[1], 31), (KEYS[0], 18)]
    found = look_up(labels, addresses)
    assert isinstance(found.logits, FittedLogits)
    expected = Rows.concat([rows, made.of([addresses[1], addresses[3]])])
    assert same(found, expected.rows(torch.tensor([0, 2, 1, 3])))
    assert same(look_up(labels, made.addresses()), made.rows)


def test_rows_on_a_device_and_in_another_order_are_the_same_rows():
    rows = RATE.encode(*ensemble_outputs(8, 50, num_views=8), num_views=8)
    order = torch.tensor([5, 0, 5, 7])
    some = rows.to(torch.device("cpu")).rows(order)
    dense = rows.logits.to_dense(rows.labels.kept(), 50)
    assert torch.equal(some.logits.to_dense(some.labels.kept(), 50), dense[order])


def test_logits_of_two_forms_are_not_joined():
    rows = RATE.encode(*ensemble_outputs(2, 50))
    values = KeptLogits(torch.zeros(1, 2), torch.zeros(1))
    with pytest.raises(ValueError, match="cannot join KeptLogits and FittedLogits"):
        concat_logits([rows.logits, values])


def test_of_kept_is_what_to_dense_spreads():
    rows = RATE.encode(*ensemble_outputs(6, 50))
    assert isinstance(rows.labels, EncodedLabels)
    kept = rows.labels.kept()
    values = rows.logits.of_kept(kept)
    dense_NC = rows.logits.to_dense(kept, 50)
    again = keep_logits(dense_NC, kept)
    assert torch.equal(values.values_NK, again.values_NK)
    assert not values.values_NK[~kept.is_kept_NK].any()
