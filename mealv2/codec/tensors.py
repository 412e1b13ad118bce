"""The record of one encoded label in torch: its size, its fields, its reader, on any device.

mealv2.codec.record says what the fields mean.
"""

from typing import NamedTuple

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


class Kept(NamedTuple):
    """Decoded labels, padded to the longest row: the classes kept, and what every other class has.

    ``indices_NK`` int64 and ``probs_NK`` float32 are 0 where ``is_kept_NK`` is false; ``tail_N``
    float32 is the probability of each single class not kept.
    """

    indices_NK: Tensor
    probs_NK: Tensor
    is_kept_NK: Tensor
    tail_N: Tensor


def decode(counts_N: Tensor, payload_P: Tensor, num_classes: int) -> Kept:
    """Decode records that lie one after another, on their device."""
    counts_N = counts_N.long()
    device = counts_N.device
    longest = int(counts_N.max()) if len(counts_N) else 1
    rank_K = torch.arange(1, longest + 1, device=device)
    is_kept_NK = rank_K <= counts_N[:, None]
    data = torch.cat([payload_P, payload_P.new_zeros(4)])
    bits_N = num_bits(counts_N, num_classes)
    sizes_N = (bits_N + 7) >> 3
    begin_N = 8 * (sizes_N.cumsum(0) - sizes_N)

    width = id_bits(num_classes)
    at_NK = (begin_N + bits_N - width * counts_N)[:, None] + width * (rank_K - 1)
    indices_NK = _fields(data, torch.where(is_kept_NK, at_NK, 0), width) * is_kept_NK

    has_tail_N = counts_N < num_classes
    tail_steps = torch.from_numpy(TAIL_STEPS).to(device)
    tail_N = tail_steps[_fields(data, begin_N, TAIL_BITS)] * has_tail_N
    levels_NA = _levels(data, begin_N + TAIL_BITS * has_tail_N, counts_N)
    tail_N = (levels_NA[:, -1] + tail_N).clamp_max(LOWEST)

    weights_NK = weights(levels_NA.float(), counts_N, is_kept_NK)
    tail_N = (tail_N.float() / -LEVELS_PER_NAT).exp() * has_tail_N
    total_N = weights_NK.sum(dim=1) + (num_classes - counts_N) * tail_N
    return Kept(indices_NK, weights_NK / total_N[:, None], is_kept_NK, tail_N / total_N)


def _levels(data: Tensor, at_N: Tensor, counts_N: Tensor) -> Tensor:
    """Return the levels of rank 1 and of every anchor, whole numbers, N x (1 + A)."""
    num_anchors_N = num_anchors(counts_N)
    longest = int(num_anchors_N.max()) if len(counts_N) else 0
    steps = [torch.zeros_like(counts_N)]
    for slot, offset in enumerate(curve_offsets(longest, at_N.device).tolist()):
        table = torch.from_numpy(FIRST_STEPS if slot == 0 else CURVE_STEPS).to(at_N.device)
        has_N = num_anchors_N > slot
        at_slot_N = torch.where(has_N, at_N + offset, 0)
        codes_N = _fields(data, at_slot_N, CURVE_BITS if slot else FIRST_BITS)
        steps.append(table[codes_N] * has_N)
    return torch.stack(steps, 1).cumsum(1).clamp_max(LOWEST)


def weights(levels_NA: Tensor, counts_N: Tensor, is_kept_NK: Tensor) -> Tensor:
    """Return p / p_1 of the kept ranks, 0 elsewhere; in the type of the levels."""
    rank_K = torch.arange(1, is_kept_NK.shape[1] + 1, device=counts_N.device)
    anchors = torch.from_numpy(ANCHORS).to(counts_N.device)
    slot_K = torch.bucketize(rank_K, anchors)  # of the anchor at or above a rank
    from_K = torch.cat([anchors.new_ones(1), anchors])[slot_K].to(levels_NA.dtype)
    to_NK = torch.minimum(anchors[slot_K], counts_N[:, None]).to(levels_NA.dtype)
    # level = low + (high - low) ln(rank / from) / ln(to / from), between the anchors around a rank
    inner_NK = is_kept_NK & (rank_K > 1)
    span_NK = torch.where(inner_NK, to_NK.log() - from_K.log(), 1.0)
    part_NK = torch.where(inner_NK, rank_K.to(levels_NA.dtype).log() - from_K.log(), 0.0) / span_NK
    last = levels_NA.shape[1] - 1
    low_NK, high_NK = (
        levels_NA[:, slot_K.clamp_max(last)],
        levels_NA[:, (slot_K + 1).clamp_max(last)],
    )
    levels_NK = low_NK + (high_NK - low_NK) * part_NK
    return (levels_NK / -LEVELS_PER_NAT).exp() * is_kept_NK


def num_anchors(counts_N: Tensor) -> Tensor:
    anchors = torch.from_numpy(ANCHORS).to(counts_N.device)
    return torch.bucketize(counts_N.long(), anchors) + (counts_N > 1)


def num_bits(counts_N: Tensor, num_classes: int) -> Tensor:
    num_anchors_N = num_anchors(counts_N)
    curve_N = CURVE_BITS * num_anchors_N + (FIRST_BITS - CURVE_BITS) * (num_anchors_N > 0)
    return TAIL_BITS * (counts_N < num_classes) + curve_N + id_bits(num_classes) * counts_N.long()


def curve_offsets(num_anchors: int, device: torch.device) -> Tensor:
    """Return where each code of a curve begins, in bits from the first."""
    slot_A = torch.arange(num_anchors, device=device)
    return CURVE_BITS * slot_A + (FIRST_BITS - CURVE_BITS) * (slot_A > 0)


def _fields(data: Tensor, at: Tensor, width: int) -> Tensor:
    """Return fields of up to 20 bits that begin at these bits of padded bytes, int64."""
    byte = at >> 3
    word = data[byte].long()
    for i in range(1, (width + 14) // 8):
        word |= data[byte + i].long() << (8 * i)
    return (word >> (at & 7)) & ((1 << width) - 1)


def pack(at_F: Tensor, values_F: Tensor, num_bytes: int) -> Tensor:
    """Return bytes with the fields' bits set from these bits on; fields do not overlap."""
    words_F = values_F << (at_F & 7)
    payload_P = torch.zeros(num_bytes + 4, dtype=torch.int32, device=at_F.device)
    for i in range(4):  # 20 bits of an id and 7 before it lie in four bytes; sums are ors
        payload_P.index_add_(0, (at_F >> 3) + i, ((words_F >> (8 * i)) & 255).int())
    return payload_P[:num_bytes].to(torch.uint8)
