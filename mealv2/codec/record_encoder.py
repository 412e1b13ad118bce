"""Encode views by themselves: select the classes to keep, fit the curve and the tail."""

import math
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mealv2.codec.record import (
    ANCHORS,
    CURVE_BITS,
    CURVE_STEPS,
    FIRST_BITS,
    FIRST_STEPS,
    LEVELS_PER_NAT,
    LOWEST,
    TAIL_BITS,
    TAIL_STEPS,
    id_bits,
)

RATE_MAX_KEPT = 255  # the most classes that ``rate`` keeps: their number fits in a byte

_KEY_ID_BITS = 20  # low bits of a sort key; the probability has the 32 bits above
_LOWEST_KEY = (1 << _KEY_ID_BITS) - 1
_FIRST_LOOK = 64  # classes searched first for the best k
_WIDTHS = (32, 64)  # rows are padded to one of these, or to the longest row
_BLOCK = 1 << 18  # probabilities sorted at once: their keys fit in a cache


class EncodedRecords(NamedTuple):
    """Records of N views in order: ``counts_N`` int32 classes kept, ``payload_P`` uint8."""

    counts_N: Tensor
    payload_P: Tensor

    def rows(self, order_N: Tensor, num_classes: int) -> "EncodedRecords":
        """Return records by index."""
        sizes_N = (num_bits(self.counts_N, num_classes) + 7) >> 3
        ends_N, sizes_R = sizes_N.cumsum(0), sizes_N[order_N]
        # byte b of a row in the result is byte b + shift of the payload
        source_P = torch.repeat_interleave(ends_N[order_N] - sizes_R.cumsum(0), sizes_R)
        source_P += torch.arange(len(source_P), device=source_P.device)
        return EncodedRecords(self.counts_N[order_N], self.payload_P[source_P])


# --- selecting classes ----------------------------------------------------------------------------


def encode_records(probs_NC: Tensor, rate: float | None, topk: int | None) -> EncodedRecords:
    """Encode each row by itself, on its device, with the classes of a rate or of a top-k.

    ``rate``: each view keeps the k likeliest classes (1 to 255) with the least
    KL(p || recovered) + rate * k, in nats, where recovered is exact for the kept classes and even
    over the others. The lower id of equal probabilities comes first. Raises ValueError for rows
    that are not distributions.
    """
    num_rows, num_classes = probs_NC.shape
    max_kept = min(num_classes, RATE_MAX_KEPT) if topk is None else topk
    keys_NK = torch.empty((num_rows, max_kept), dtype=torch.int64, device=probs_NC.device)
    total_N = torch.empty(num_rows, dtype=torch.float64, device=probs_NC.device)
    counts_N = torch.full_like(total_N, max_kept, dtype=torch.int64)
    block_rows = max(1, _BLOCK // num_classes) if probs_NC.device.type == "cpu" else num_rows
    for block in (slice(n, n + block_rows) for n in range(0, num_rows, block_rows)):
        keys_BC, total_N[block] = _keys(probs_NC[block])
        if rate is None:
            keys_NK[block] = _largest(keys_BC, max_kept)
        else:
            counts_N[block] = _choose(keys_BC, total_N[block], rate, keys_NK[block])

    # group rows of similar k: each row is padded to the longest of its group
    group_N = torch.bucketize(counts_N, torch.tensor(_WIDTHS, device=counts_N.device))
    order_N = group_N.argsort()
    parts = []
    for rows_W in torch.split_with_sizes(order_N, group_N.bincount().tolist()):
        if len(rows_W):
            counts_W = counts_N[rows_W]
            keys_WK = keys_NK[:, : int(counts_W.max())].index_select(0, rows_W)
            parts.append(_write(keys_WK, total_N[rows_W], counts_W, num_classes))
    both = EncodedRecords(*(torch.cat(column) for column in zip(*parts, strict=True)))
    return both.rows(order_N.argsort(), num_classes)


def _keys(probs_NC: Tensor) -> tuple[Tensor, Tensor]:
    """Return keys that sort as the probabilities, ties by descending id, and the rows' sums."""
    probs_NC = (probs_NC.to(torch.float32) + 0.0).contiguous()  # -0.0 becomes 0.0
    total_N = _row_sum(probs_NC.double())
    if not bool((torch.isfinite(total_N) & (total_N > 0) & (probs_NC.amin(dim=1) >= 0)).all()):
        raise ValueError("a row is not a distribution: not finite, negative, or without mass")
    # probabilities >= 0 sort as their bits; no two keys are equal, so the top k are unique
    ids_C = torch.arange(probs_NC.shape[1], device=probs_NC.device)
    keys_NC = probs_NC.view(torch.int32).long()
    keys_NC <<= _KEY_ID_BITS
    keys_NC |= _LOWEST_KEY - ids_C
    return keys_NC, total_N


def _ids(keys_NK: Tensor) -> Tensor:
    return _LOWEST_KEY - (keys_NK & _LOWEST_KEY)


def _probs(keys_NK: Tensor, total_N: Tensor) -> Tensor:
    """Return the normalised probabilities of sort keys, float64."""
    bits_NK = (keys_NK >> _KEY_ID_BITS).to(torch.int32)
    return bits_NK.view(torch.float32) / total_N[:, None]


def _largest(keys_NC: Tensor, k: int) -> Tensor:
    """Return the k largest keys of each row, descending; reorders the rows on a CPU."""
    if keys_NC.device.type != "cpu":
        return keys_NC.topk(k, dim=1, sorted=True).values
    keys, first = keys_NC.numpy(), keys_NC.shape[1] - k  # several times faster than torch's topk
    if first:
        keys.partition(first, axis=1)
    return torch.from_numpy(np.sort(keys[:, first:], axis=1)).flip(1)


def _choose(keys_NC: Tensor, total_N: Tensor, rate: float, keys_NK: Tensor) -> Tensor:
    """Return the best k of each row; writes at least its k largest keys to ``keys_NK``."""
    num_classes, max_kept = keys_NC.shape[1], keys_NK.shape[1]
    first = min(max_kept, _FIRST_LOOK)
    keys_NK[:, :first] = _largest(keys_NC, first)
    counts_N, is_best_N = _best_counts(_probs(keys_NK[:, :first], total_N), num_classes, rate)
    if first < max_kept:
        (wide_W,) = (~is_best_N).nonzero(as_tuple=True)
        keys_WK = _largest(keys_NC[wide_W], max_kept)
        keys_NK[wide_W] = keys_WK
        counts_N[wide_W] = _best_counts(_probs(keys_WK, total_N[wide_W]), num_classes, rate)[0]
    return counts_N


def _best_counts(probs_NK: Tensor, num_classes: int, rate: float) -> tuple[Tensor, Tensor]:
    """Return the best k among 1..K, and whether no k above K can be better."""
    # KL_k = sum_{j > k} p ln p - R_k ln(R_k / (C - k)),  R_k = 1 - sum_{j <= k} p;
    # KL_k = sum_all p ln p + score_k, where the first term does not depend on k
    num_kept = probs_NK.shape[1]
    k_K = torch.arange(1, num_kept + 1, device=probs_NK.device)
    rest_NK = _rest(probs_NK)
    others_K = (num_classes - k_K).clamp_min(1)
    score_NK = -_times_log(probs_NK, probs_NK).cumsum(1) - _times_log(rest_NK, rest_NK / others_K)
    cost_NK = score_NK + rate * k_K
    cost_N = cost_NK.amin(dim=1)
    counts_N = torch.where(cost_NK <= cost_N[:, None], k_K, num_kept).amin(dim=1)
    # no class beyond K exceeds p_K, so KL_K <= R ln(p_K (C - K) / R); a larger k costs at least
    # rate * (K + 1), because KL >= 0
    rest_N, last_N = rest_NK[:, -1], probs_NK[:, -1]
    kl_N = torch.xlogy(rest_N, last_N * others_K[-1]) - torch.xlogy(rest_N, rest_N)
    best_N = kl_N.clamp_min(0.0) - score_NK[:, -1] + cost_N
    return counts_N, best_N < rate * (num_kept + 1)


def _times_log(values: Tensor, of: Tensor) -> Tensor:
    """Return values * ln(of), 0 for 0; twice as fast as xlogy on a CPU."""
    return of.clamp_min(1e-300).log_().mul_(values)


def _rest(probs_NK: Tensor) -> Tensor:
    """Return the mass beyond each rank."""
    return (1.0 - probs_NK.cumsum(1)).clamp_min(0.0)


def _row_sum(values_NC: Tensor) -> Tensor:
    """Return sums of rows by halving: the same bits in any batch and on any device."""
    while (size := values_NC.shape[1]) > 1:
        half = size // 2
        sums_NC = values_NC[:, :half] + values_NC[:, half : 2 * half]
        values_NC = torch.cat([sums_NC, values_NC[:, -1:]], dim=1) if size % 2 else sums_NC
    return values_NC[:, 0]


# --- writing --------------------------------------------------------------------------------------


def _write(keys_NK: Tensor, total_N: Tensor, counts_N: Tensor, num_classes: int) -> EncodedRecords:
    """Return the records of rows whose k is known."""
    indices_NK, probs_NK = _ids(keys_NK), _probs(keys_NK, total_N)
    device = counts_N.device
    rank_K = torch.arange(1, probs_NK.shape[1] + 1, device=device)
    is_kept_NK = rank_K <= counts_N[:, None]
    curve_NA, levels_NA = _fit_curve(probs_NK, counts_N)
    tail_N = _fit_tail(probs_NK, counts_N, is_kept_NK, levels_NA, num_classes)

    bits_N = num_bits(counts_N, num_classes)
    sizes_N = (bits_N + 7) >> 3
    begin_N = 8 * (sizes_N.cumsum(0) - sizes_N)
    width = id_bits(num_classes)
    has_tail_N = counts_N < num_classes
    curve_at_N = begin_N + TAIL_BITS * has_tail_N
    has_NA = torch.arange(curve_NA.shape[1], device=device) < num_anchors(counts_N)[:, None]
    ids_at_NK = (begin_N + bits_N - width * counts_N)[:, None] + width * (rank_K - 1)
    at_F = torch.cat(
        [
            begin_N[has_tail_N],
            (curve_at_N[:, None] + curve_offsets(curve_NA.shape[1], device))[has_NA],
            ids_at_NK[is_kept_NK],
        ]
    )
    values_F = torch.cat([tail_N[has_tail_N], curve_NA[has_NA], indices_NK[is_kept_NK]])
    payload_P = _pack(at_F, values_F, int(sizes_N.sum()))
    return EncodedRecords(counts_N.int(), payload_P)


def _fit_curve(probs_NK: Tensor, counts_N: Tensor) -> tuple[Tensor, Tensor]:
    """Return codes, N x A, and the decoded levels of rank 1 and the anchors, N x (1 + A).

    Each step is a weighted least-squares line through its ranks that starts at the decoded level,
    so errors do not accumulate: min over d of sum p (level(p) - low - t d)^2.
    """
    probs_NK = probs_NK.clamp_min(probs_NK[:, :1] * math.exp(-LOWEST / LEVELS_PER_NAT))
    exact_NK = LEVELS_PER_NAT * (probs_NK[:, :1].log() - probs_NK.log())
    levels = [torch.zeros_like(counts_N)]
    codes: list[Tensor] = []
    low = 1
    for slot in range(int(num_anchors(counts_N).max())):
        high = min(int(ANCHORS[slot]), probs_NK.shape[1])
        rank_S = torch.arange(low + 1, high + 1, device=probs_NK.device)
        to_N = counts_N.clamp(low + 1, high)
        part_NS = (rank_S.double() / low).log() / (to_N.double() / low).log()[:, None]
        weight_NS = probs_NK[:, low:high] * (rank_S <= to_N[:, None]) * part_NS
        off_NS = exact_NK[:, low:high] - levels[-1][:, None]
        step_N = _row_sum(weight_NS * off_NS) / _row_sum(weight_NS * part_NS)
        table = FIRST_STEPS if slot == 0 else CURVE_STEPS
        code_N, step_N = _nearest(step_N, table)
        reached_N = (levels[-1] + step_N).clamp_max(LOWEST)
        levels.append(torch.where(counts_N > low, reached_N, levels[-1]))
        codes.append(code_N)
        low = high
    codes_NA = torch.stack(codes, 1) if codes else counts_N.new_zeros((len(counts_N), 0))
    return codes_NA, torch.stack(levels, 1)


def _fit_tail(
    probs_NK: Tensor,
    counts_N: Tensor,
    is_kept_NK: Tensor,
    levels_NA: Tensor,
    num_classes: int,
) -> Tensor:
    """Return the tail's codes, which give the classes not kept their mass."""
    # (C - k) w_tail / (W + (C - k) w_tail) = R, with W the decoded weights of the kept classes
    kept_N = _row_sum(weights(levels_NA.double(), counts_N, is_kept_NK))
    rest_NK = _rest(probs_NK)
    rest_N = rest_NK.gather(1, counts_N[:, None] - 1)[:, 0].clamp(1e-30, 1.0 - 1e-9)
    others_N = (num_classes - counts_N).clamp_min(1)
    level_N = -LEVELS_PER_NAT * (rest_N / (1.0 - rest_N) * kept_N / others_N).log()
    code_N, _ = _nearest(level_N - levels_NA[:, -1], TAIL_STEPS)
    return code_N


def weights(levels_NA: Tensor, counts_N: Tensor, is_kept_NK: Tensor) -> Tensor:
    """Return p / p_1 of the kept ranks, 0 elsewhere, in the dtype of the levels."""
    if levels_NA.shape[1] == 1:
        return is_kept_NK.to(levels_NA.dtype)
    # level = low + (high - low) ln(rank / from) / ln(to / from), between the anchors around a rank
    device, dtype = counts_N.device, levels_NA.dtype
    to_A = _anchors(device)[: levels_NA.shape[1] - 1]
    from_A = torch.cat([to_A.new_ones(1), to_A[:-1]])
    span_NA = (torch.minimum(to_A, counts_N[:, None]).to(dtype) / from_A).log()
    slope_NA = levels_NA.diff(dim=1) / torch.where(span_NA > 0, span_NA, 1.0)
    rank_K = torch.arange(1, is_kept_NK.shape[1] + 1, device=device)
    slot_K = torch.bucketize(rank_K, to_A)  # the anchor at or above each rank
    part_K = (rank_K.to(dtype) / from_A[slot_K]).log()
    levels_NK = (
        slope_NA.index_select(1, slot_K).mul_(part_K).add_(levels_NA.index_select(1, slot_K))
    )
    return levels_NK.mul_(-1.0 / LEVELS_PER_NAT).exp_().mul_(is_kept_NK)


def num_anchors(counts_N: Tensor) -> Tensor:
    """Return the number of anchors of curves over these numbers of ranks."""
    anchors = _anchors(counts_N.device)
    return torch.bucketize(counts_N.long(), anchors) + (counts_N > 1)


@lru_cache
def _anchors(device: torch.device) -> Tensor:
    """Return the anchors on a device, copied once: each copy waits for the device."""
    with torch.inference_mode(False):  # the table is also used outside of inference mode
        return torch.from_numpy(ANCHORS).to(device)


def num_bits(counts_N: Tensor, num_classes: int) -> Tensor:
    """Return the bits of each record, without the padding of its last byte."""
    num_anchors_N = num_anchors(counts_N)
    curve_N = CURVE_BITS * num_anchors_N + (FIRST_BITS - CURVE_BITS) * (num_anchors_N > 0)
    return TAIL_BITS * (counts_N < num_classes) + curve_N + id_bits(num_classes) * counts_N.long()


def curve_offsets(num_anchors: int, device: torch.device) -> Tensor:
    """Return the offset of each code of a curve, in bits."""
    slot_A = torch.arange(num_anchors, device=device)
    return CURVE_BITS * slot_A + (FIRST_BITS - CURVE_BITS) * (slot_A > 0)


def _nearest(steps_N: Tensor, table: np.ndarray) -> tuple[Tensor, Tensor]:
    """Return the codes and values of the nearest entries of a table."""
    table_S = torch.from_numpy(table).to(steps_N.device)
    borders = (table_S[1:] + table_S[:-1]).double() / 2.0
    codes_N = torch.bucketize(steps_N.contiguous(), borders)
    return codes_N, table_S[codes_N]


def _pack(at_F: Tensor, values_F: Tensor, num_bytes: int) -> Tensor:
    """Return bytes that hold each field at its bit offset; fields do not overlap."""
    words_F = values_F << (at_F & 7)
    payload_P = torch.zeros(num_bytes + 4, dtype=torch.int32, device=at_F.device)
    for i in range(4):  # a field of 20 bits spans up to four bytes; a sum is an or
        payload_P.index_add_(0, (at_F >> 3) + i, ((words_F >> (8 * i)) & 255).int())
    return payload_P[:num_bytes].to(torch.uint8)
