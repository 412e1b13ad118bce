"""Residuals: what a view adds to the levels that its image's components give, and their bits.

Levels are integers in 1/256 nat: -256 ln p plus a constant. The probability that the components
give an entry, in half nats, is its context. A context has a step, and two prefix codes: of the
number of entries without a residual before the next one with, and of that residual in steps. All
of it is integer arithmetic, so that every reader finds the same contexts.
"""

from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mealv2.codec.residual_codes import RUN_LENGTHS, VALUE_LENGTHS

LEVELS_PER_NAT = 256
CONTEXTS = 19  # of half a nat each: -ln p from 0, the last also for all below
OTHERS = CONTEXTS  # the context of the entry of all classes not listed
LONGEST_RUN = 31  # a run of so many is followed by another run
LARGEST = 8  # steps of a residual
MAX_CODE = 11  # bits of the longest code
# steps in levels: finer where a class is likely, so that all are equally harmful
STEPS = np.array([26, 34, 43, 55, 71, 91, 117, 150, *[166] * 11, 102], np.int64)
# exp(-i / 16) and exp(i / 16) in units of 2^-24
EXP = np.floor((1 << 24) * np.exp(-np.arange(273) / 16.0) + 0.5).astype(np.int64)
EXP[-1] = 0  # and all beyond
LOG = np.floor((1 << 24) * np.exp(np.arange(240) / 16.0) + 0.5).astype(np.int64)

_Array = np.ndarray[Any, Any]


def contexts_of(levels: Tensor, sizes: Tensor, is_others: Tensor) -> Tensor:
    """Return the context of each entry, tensors ... x K of int64, on their device.

    ``sizes`` is 0 for padding, after the entries.
    """
    exp, log = _table("exp", levels.device), _table("log", levels.device)
    is_entry = sizes > 0
    lowest = torch.where(is_entry, levels, 1 << 40).amin(-1, keepdim=True)
    coarse = (levels - lowest) >> 4
    weights = exp[coarse.clamp_max(len(EXP) - 1) * is_entry]
    total = (weights * sizes).sum(-1, keepdim=True)
    found = (coarse + torch.bucketize(total, log, right=True) - 1) >> 3
    found = found.clamp(0, CONTEXTS - 1)  # below 0 only padding
    return torch.where(is_others, OTHERS, found)


@lru_cache
def _table(name: str, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        if name == "steps":
            return torch.from_numpy(STEPS).to(device).double() / LEVELS_PER_NAT
        if name == "bits":
            return torch.from_numpy(expected_bits()).to(device)
        return torch.from_numpy({"exp": EXP, "log": LOG}[name]).to(device)


# --- codes ----------------------------------------------------------------------------------------


class Codes(NamedTuple):
    """A prefix code for each context: ``words_XS`` (lowest bit first) and ``lengths_XS``.

    ``symbols_XW`` and ``sizes_XW``: the symbol and the length of the code that the next MAX_CODE
    bits begin with.
    """

    words_XS: _Array
    lengths_XS: _Array
    symbols_XW: _Array
    sizes_XW: _Array


def canonical(lengths_XS: _Array) -> Codes:
    """Return the canonical codes of lengths, contexts x symbols.

    Shorter codes come first, equal ones by symbol; the first bit of a code is its highest. A
    record stores the first bit first.
    """
    words_XS = np.zeros_like(lengths_XS)
    shape = (len(lengths_XS), 1 << MAX_CODE)
    symbols_XW, sizes_XW = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    for context, row in enumerate(lengths_XS):
        word = 0
        for size in range(1, MAX_CODE + 1):
            word <<= 1
            for symbol in np.flatnonzero(row == size):
                code = int(f"{word:0{size}b}"[::-1], 2)
                words_XS[context, symbol] = code
                symbols_XW[context, code :: 1 << size] = symbol
                sizes_XW[context, code :: 1 << size] = size
                word += 1
    return Codes(words_XS, lengths_XS, symbols_XW, sizes_XW)


RUNS, VALUES = (
    canonical(np.array([[int(digit, 16) for digit in row] for row in rows]))
    for rows in (RUN_LENGTHS, VALUE_LENGTHS)
)
# symbols of values: 1, -1, 2, -2, …
VALUE_OF = np.array([sign * size for size in range(1, LARGEST + 1) for sign in (1, -1)])


def expected_bits() -> _Array:
    """Return about how many bits a residual of -LARGEST … LARGEST adds, contexts x values."""
    share_X = 2.0 ** -RUNS.lengths_XS[:, 0].astype(np.float64)  # of entries that have a residual
    bits = np.empty((CONTEXTS + 1, 2 * LARGEST + 1))
    bits[:, VALUE_OF + LARGEST] = RUNS.lengths_XS[:, :1] + VALUES.lengths_XS
    bits[:, LARGEST] = -np.log2(1.0 - np.minimum(share_X, 0.9))
    return bits


def choose(
    probs: Tensor, model: Tensor, contexts: Tensor, slope: float, bits: Tensor | None = None
) -> Tensor:
    """Return residuals of about the least KL + slope * bits, int64, for tensors ... x K.

    ``model`` is the distribution that the components give. KL is the sum over entries of
    p ln(p / q) - p + q while q sums to 1, so entries are chosen one by one; then again, because
    the residuals change the sum.
    """
    device = probs.device
    bits = _table("bits", device) if bits is None else bits
    cheapest = torch.cat([bits[:, :LARGEST], bits[:, LARGEST + 1 :]], 1).amin(1)
    least_gains = (slope * (cheapest - bits[:, LARGEST])).take(contexts)
    ratios = (probs.clamp_min(1e-30) / model.clamp_min(1e-30)).log()
    total = torch.ones_like(probs[..., :1])
    chosen = torch.zeros_like(contexts)
    for _ in range(3):
        scaled = model / total
        # no residual gains more than the exact probability
        gains = scaled - probs + probs * (ratios + total.log())
        some = (gains > least_gains).nonzero(as_tuple=True)
        step_E = _table("steps", device)[contexts[some]]
        found = probs[some], scaled[some], contexts[some], step_E
        values_E = _cheapest(*found, slope, bits)
        chosen = torch.zeros_like(contexts).index_put_(some, values_E)
        added_E = model[some] * ((step_E * values_E).exp() - 1.0)
        total = torch.zeros_like(model).index_put_(some, added_E).sum(-1, keepdim=True)
        total += model.sum(-1, keepdim=True)
    return chosen


def _cheapest(
    probs_E: Tensor, model_E: Tensor, contexts_E: Tensor, step_E: Tensor, slope: float, bits: Tensor
) -> Tensor:
    """Return the residual of each entry with the least KL + slope * bits."""
    ratios_E = (probs_E.clamp_min(1e-30) / model_E.clamp_min(1e-30)).log()
    nearest_E = (ratios_E / step_E).round().clamp(-LARGEST, LARGEST)
    best_E = model_E + slope * bits[contexts_E, LARGEST]
    chosen_E = torch.zeros_like(contexts_E)
    for smaller in (0, 1, 2):  # the nearest value, and those closer to 0
        value_E = nearest_E.sign() * (nearest_E.abs() - smaller).clamp_min(0.0)
        cost_E = model_E * (step_E * value_E).exp() - probs_E * step_E * value_E
        cost_E = cost_E + slope * bits[contexts_E, value_E.long() + LARGEST]
        is_better_E = cost_E < best_E
        best_E = torch.where(is_better_E, cost_E, best_E)
        chosen_E = torch.where(is_better_E, value_E.long(), chosen_E)
    return chosen_E
