"""Make mealv2/codec/residual_codes.py: the prefix codes of residuals, counted on real rows.

    python benchmarks/residual_codes.py rows.npz … > mealv2/codec/residual_codes.py

Each file has an array ``probs``, images x views x classes. The codes and the choice of residuals
depend on each other: they are made in turn, from codes of equal lengths.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mealv2.codec import residuals
from mealv2.codec.block import symbols
from mealv2.codec.residuals import CONTEXTS, LONGEST_RUN, MAX_CODE, VALUE_OF, canonical
from mealv2.codec.shared_encoder import models, quantise

SLOPES, ROUNDS = (0.00008, 0.00016), 5
SMOOTHING = 0.5  # of every count
HEADER = '''"""Lengths of the prefix codes of residuals, in bits: a hex digit for each symbol.

A line is a context, the last that of all others. Made by benchmarks/residual_codes.py.
"""

'''

_Array = np.ndarray[Any, Any]


def code_lengths(counts_S: _Array) -> _Array:
    """Return the lengths of the best prefix code of at most MAX_CODE bits (package-merge)."""
    singles = sorted((count, (symbol,)) for symbol, count in enumerate(counts_S.tolist()))
    merged: list[tuple[float, tuple[int, ...]]] = []
    for _ in range(MAX_CODE):
        items = sorted([*singles, *merged], key=lambda item: item[0])
        pairs = zip(items[::2], items[1::2], strict=False)
        merged = [(a[0] + b[0], a[1] + b[1]) for a, b in pairs]
    lengths_S = np.zeros(len(counts_S), np.int64)
    for _, members in merged[: len(counts_S) - 1]:
        np.add.at(lengths_S, list(members), 1)
    return lengths_S


def count(
    row_files: Sequence[_Array],
    bits: torch.Tensor | None = None,
    slopes: Sequence[float] = SLOPES,
) -> tuple[_Array, _Array]:
    """Return how often each run and each value occurs, contexts x symbols.

    ``bits``: what each residual costs where they are chosen; by default of the codes in use.
    """
    runs_XS = np.zeros((CONTEXTS + 1, LONGEST_RUN + 1))
    values_XS = np.zeros((CONTEXTS + 1, len(VALUE_OF)))
    for probs_IVC in row_files:
        rows = torch.from_numpy(probs_IVC).double()
        rows = rows / rows.sum(-1, keepdim=True)
        for slope in slopes:
            for modelled in models(rows, torch.xlogy(rows, rows).sum(2), slope):
                found = quantise(modelled, slope, bits)
                sizes_IK = modelled.entries.sizes_IK.long()
                sizes_IVK = sizes_IK[:, None].expand(found.residuals_IVK.shape)
                parts = (found.residuals_IVK, found.contexts_IVK, sizes_IVK)
                is_value_F, context_F, symbol_F, _ = symbols(
                    *(part.flatten(0, 1).numpy() for part in parts)
                )
                np.add.at(values_XS, (context_F[is_value_F], symbol_F[is_value_F]), 1)
                np.add.at(runs_XS, (context_F[~is_value_F], symbol_F[~is_value_F]), 1)
    return runs_XS, values_XS


def main(words: Sequence[str] | None = None) -> None:
    """Print the module."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("rows", type=Path, nargs="+", help=".npz with probs, images x views x C")
    given = parser.parse_args(words)
    row_files = [np.load(path, allow_pickle=False)["probs"] for path in given.rows]
    run_lengths = np.full((CONTEXTS + 1, LONGEST_RUN + 1), 5)
    value_lengths = np.full((CONTEXTS + 1, len(VALUE_OF)), 4)
    for _ in range(ROUNDS):
        residuals.RUNS, residuals.VALUES = canonical(run_lengths), canonical(value_lengths)
        bits = torch.from_numpy(residuals.expected_bits())
        runs_XS, values_XS = count(row_files, bits)
        run_lengths = np.stack([code_lengths(counts_S) for counts_S in runs_XS + SMOOTHING])
        value_lengths = np.stack([code_lengths(counts_S) for counts_S in values_XS + SMOOTHING])
    print(HEADER, end="")
    for name, lengths_XS in (("RUN_LENGTHS", run_lengths), ("VALUE_LENGTHS", value_lengths)):
        lines = ["".join(f"{length:x}" for length in row) for row in lengths_XS]
        print(f"{name} = [", *(f'    "{line}",' for line in lines), "]", sep="\n")


if __name__ == "__main__":
    main()
