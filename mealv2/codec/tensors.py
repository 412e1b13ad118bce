"""The record of one encoded label in torch: its size, its fields, its reader, on any device.

mealv2.codec.record says what the fields mean.
"""

from functools import lru_cache
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from mealv2.codec.record import (
    ANCHORS,
    CURVE_BITS,
    CURVE_STEPS,
    FIRST_BITS,
    FIRST_STEPS,
    LEVELS_PER_NAT,
    LOWEST,
    STEPS,
    TAIL_BITS,
    anchors_of,
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

    def spread(self, values_NK: Tensor, others_N: Tensor, num_classes: int) -> Tensor:
        """Return N x C: ``values_NK`` at the kept classes, ``others_N`` at all other classes."""
        # the padding goes to an extra last column: a boolean mask would wait for the device
        spread_NC = others_N[:, None].repeat(1, num_classes + 1)
        indices_NK = torch.where(self.is_kept_NK, self.indices_NK, num_classes)
        return spread_NC.scatter_(1, indices_NK, values_NK)[:, :num_classes]

    def mask(self, num_classes: int) -> Tensor:
        """Return whether each class is kept, bool N x C."""
        zeros_N = torch.zeros_like(self.tail_N)
        return self.spread(self.is_kept_NK.to(zeros_N.dtype), zeros_N, num_classes) > 0


def decode(
    counts_N: Tensor, payload_P: Tensor, num_classes: int, *, longest: int | None = None
) -> Kept:
    """Decode records that lie one after another, on their device.

    Waits for it once, but not where the greatest count is given.
    """
    counts_N = counts_N.int()
    if longest is None:
        longest = int(counts_N.max()) if len(counts_N) else 1
    rank_K = torch.arange(1, longest + 1, dtype=torch.int32, device=counts_N.device)
    is_kept_NK = rank_K <= counts_N[:, None]
    bits_N = num_bits(counts_N, num_classes)
    sizes_N = (bits_N + 7) >> 3
    begin_N = sizes_N.cumsum(0) - sizes_N
    width = id_bits(num_classes)
    # what the longest row has is read of all, and dropped: also behind the last
    words_P = _words(payload_P, padding=16 + (width * longest >> 3))

    ids_at_N = (bits_N - width * counts_N).int()
    ids_at_NK = ids_at_N[:, None] + width * (rank_K - 1)
    indices_NK = _fields(words_P, begin_N, ids_at_NK, (1 << width) - 1) * is_kept_NK

    has_tail_N = counts_N < num_classes
    levels_NA, tail_N = _levels(words_P, begin_N, counts_N, has_tail_N, longest)
    weights_NK = weights(levels_NA, counts_N, is_kept_NK)
    tail_N = (tail_N / -LEVELS_PER_NAT).exp() * has_tail_N
    total_N = weights_NK.sum(dim=1) + (num_classes - counts_N) * tail_N
    weights_NK /= total_N[:, None]
    return Kept(indices_NK.long(), weights_NK, is_kept_NK, tail_N / total_N)


def _levels(
    words_P: Tensor, begin_N: Tensor, counts_N: Tensor, has_tail_N: Tensor, longest: int
) -> tuple[Tensor, Tensor]:
    """Return levels, whole float32: of rank 1 and every anchor N x (1 + A), of the tail N."""
    device = counts_N.device
    max_levels = int(anchors_of(np.array(longest)))
    slot_A = torch.arange(max_levels, dtype=torch.int32, device=device)
    at_NA = TAIL_BITS * has_tail_N.int()[:, None] + curve_offsets(max_levels, device).int()
    is_first_A = slot_A == 0
    masks_A = torch.where(is_first_A, (1 << FIRST_BITS) - 1, (1 << CURVE_BITS) - 1)
    tables_A = torch.where(is_first_A, 0, len(FIRST_STEPS))
    codes_NA = _fields(words_P, begin_N, at_NA, masks_A.int()) + tables_A
    table = _table("steps", device)
    steps_NA = table[codes_NA] * (slot_A < num_anchors(counts_N)[:, None])
    levels_NA = pad(steps_NA, (1, 0)).cumsum(1).clamp_max(LOWEST)
    tails_N = (words_P[begin_N] & (1 << TAIL_BITS) - 1) + (len(FIRST_STEPS) + len(CURVE_STEPS))
    return levels_NA, (levels_NA[:, -1] + table[tails_N]).clamp_max(LOWEST)


def weights(levels_NA: Tensor, counts_N: Tensor, is_kept_NK: Tensor) -> Tensor:
    """Return p / p_1 of the kept ranks, 0 elsewhere; in the type of the levels."""
    if levels_NA.shape[1] == 1:
        return is_kept_NK.to(levels_NA.dtype)
    # level = low + (high - low) ln(rank / from) / ln(to / from), between the anchors around a rank
    device, dtype = counts_N.device, levels_NA.dtype
    to_A = _table("anchors", device)[: levels_NA.shape[1] - 1]
    from_A = torch.cat([to_A.new_ones(1), to_A[:-1]])
    span_NA = (torch.minimum(to_A, counts_N[:, None]).to(dtype) / from_A).log()
    slope_NA = levels_NA.diff(dim=1) / torch.where(span_NA > 0, span_NA, 1.0)
    rank_K = torch.arange(1, is_kept_NK.shape[1] + 1, device=device)
    slot_K = torch.bucketize(rank_K, to_A)  # of the anchor at or above a rank
    part_K = (rank_K.to(dtype) / from_A[slot_K]).log()
    levels_NK = (
        slope_NA.index_select(1, slot_K).mul_(part_K).add_(levels_NA.index_select(1, slot_K))
    )
    return levels_NK.mul_(-1.0 / LEVELS_PER_NAT).exp_().mul_(is_kept_NK)


def num_anchors(counts_N: Tensor) -> Tensor:
    anchors = _table("anchors", counts_N.device)
    return torch.bucketize(counts_N.long(), anchors) + (counts_N > 1)


@lru_cache
def _table(name: Literal["anchors", "steps"], device: torch.device) -> Tensor:
    """Return a table of the codec on a device: to copy it there anew would wait for the device."""
    with torch.inference_mode(False):  # it is used outside too
        return torch.from_numpy({"anchors": ANCHORS, "steps": STEPS}[name]).to(device)


def num_bits(counts_N: Tensor, num_classes: int) -> Tensor:
    num_anchors_N = num_anchors(counts_N)
    curve_N = CURVE_BITS * num_anchors_N + (FIRST_BITS - CURVE_BITS) * (num_anchors_N > 0)
    return TAIL_BITS * (counts_N < num_classes) + curve_N + id_bits(num_classes) * counts_N.long()


def curve_offsets(num_anchors: int, device: torch.device) -> Tensor:
    """Return where each code of a curve begins, in bits from the first."""
    slot_A = torch.arange(num_anchors, device=device)
    return CURVE_BITS * slot_A + (FIRST_BITS - CURVE_BITS) * (slot_A > 0)


def _words(payload_P: Tensor, *, padding: int) -> Tensor:
    """Return the 32 bits from each byte on, int32, and zeros behind the end."""
    data = pad(payload_P, (0, padding + 3)).int()
    words_P = data[:-3] | data[1:-2] << 8
    words_P |= data[2:-1] << 16
    words_P |= data[3:] << 24
    return words_P


def _fields(words_P: Tensor, begin_N: Tensor, at_NF: Tensor, mask: Tensor | int) -> Tensor:
    """Return fields of up to 20 bits, int32, so many bits behind the first bytes of the records."""
    byte_NF = begin_N[:, None] + (at_NF >> 3)
    # on a CPU ten times as fast as words_P[byte_NF]
    words_NF = words_P.index_select(0, byte_NF.flatten()).view_as(byte_NF)
    return (words_NF >> (at_NF & 7)) & mask


def pack(at_F: Tensor, values_F: Tensor, num_bytes: int) -> Tensor:
    """Return bytes with the fields' bits set from these bits on; fields do not overlap."""
    words_F = values_F << (at_F & 7)
    payload_P = torch.zeros(num_bytes + 4, dtype=torch.int32, device=at_F.device)
    for i in range(4):  # 20 bits of an id and 7 before it lie in four bytes; sums are ors
        payload_P.index_add_(0, (at_F >> 3) + i, ((words_F >> (8 * i)) & 255).int())
    return payload_P[:num_bytes].to(torch.uint8)
