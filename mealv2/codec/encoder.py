"""Encoding: select the classes that a view keeps, and fit the curve and the tail."""

import math

import numpy as np
import torch
from torch import Tensor

from mealv2.codec.labels import EncodedLabels, curve_offsets, num_anchors, num_bits, weights
from mealv2.codec.record import (
    ANCHORS,
    CURVE_STEPS,
    FIRST_STEPS,
    LEVELS_PER_NAT,
    LOWEST,
    MAX_CLASSES,
    MAX_KEPT,
    MIN_CLASSES,
    TAIL_BITS,
    TAIL_STEPS,
    id_bits,
)

RATE_MAX_KEPT = 255  # the most classes that ``rate`` keeps: their number fits in a byte

_KEY_ID_BITS = 20  # low bits of a sort key; the probability has the 32 bits above
_LOWEST_KEY = (1 << _KEY_ID_BITS) - 1
_FIRST_LOOK = 64  # classes searched first for the best k
_WIDTHS = (32, 64)  # rows are padded to one of these, or to the longest row
_CHUNK = 1 << 22  # probabilities encoded at once
_BLOCK = 1 << 18  # probabilities sorted at once: their keys fit in a cache


def encode(
    probs_NC: Tensor, *, rate: float | None = None, topk: int | None = None
) -> EncodedLabels:
    """Encode probabilities of any float type, on their device.

    ``rate``: each view keeps the k likeliest classes (1 to 255) with the least
    KL(p || recovered) + rate * k, in nats, where recovered is exact for the kept classes and even
    over the others. ``topk``: each view keeps this number (up to 65,535). The lower id of equal
    probabilities comes first. Rows are normalised. Raises ValueError for neither or both, a value
    out of range, and rows that are not distributions.
    """
    if probs_NC.ndim != 2 or not probs_NC.is_floating_point():
        raise ValueError(f"probabilities must be float, N x C, got {tuple(probs_NC.shape)}")
    num_classes = probs_NC.shape[1]
    if not MIN_CLASSES <= num_classes <= MAX_CLASSES:
        raise ValueError(f"classes must be {MIN_CLASSES} to {MAX_CLASSES}, got {num_classes}")
    if (rate is None) == (topk is None):
        raise ValueError("give either rate or topk")
    if rate is not None and not 0.0 < rate < math.inf:
        raise ValueError(f"rate must be above 0 and finite, got {rate}")
    if topk is not None and not 1 <= topk <= min(num_classes, MAX_KEPT):
        raise ValueError(f"topk must lie in 1..{min(num_classes, MAX_KEPT)}, got {topk}")
    count_size = 1 if topk is None or topk <= RATE_MAX_KEPT else 2
    empty = EncodedLabels(
        torch.zeros(0, dtype=torch.int32, device=probs_NC.device),
        torch.zeros(0, dtype=torch.uint8, device=probs_NC.device),
        num_classes,
        count_size,
    )
    rows = max(1, _CHUNK // num_classes)
    parts = [
        _encode_chunk(chunk_NC, rate, topk, count_size)
        for chunk_NC in (probs_NC[n : n + rows].detach() for n in range(0, len(probs_NC), rows))
    ]
    return EncodedLabels.concat([empty, *parts])


# --- selecting classes ----------------------------------------------------------------------------


def _encode_chunk(
    probs_NC: Tensor, rate: float | None, topk: int | None, count_size: int
) -> EncodedLabels:
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
            parts.append(_write(keys_WK, total_N[rows_W], counts_W, num_classes, count_size))
    return EncodedLabels.concat(parts)[order_N.argsort()]


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


def _write(
    keys_NK: Tensor, total_N: Tensor, counts_N: Tensor, num_classes: int, count_size: int
) -> EncodedLabels:
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
    return EncodedLabels(counts_N.int(), payload_P, num_classes, count_size)


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
