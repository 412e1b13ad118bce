"""Read the symbols of residuals from their bits: many rows at once, in NumPy."""

from typing import Any, NamedTuple

import numpy as np

from mealv2.codec.residuals import (
    CONTEXTS,
    LONGEST_RUN,
    MAX_CODE,
    OTHERS,
    RUNS,
    STEPS,
    VALUE_OF,
    VALUES,
    Codes,
)
from mealv2.errors import LabelSetError

_Array = np.ndarray[Any, Any]

_STEPS_AT_ONCE, _FEW = 6, 24  # values after which finished rows are dropped; then one by one
_WINDOW = (1 << MAX_CODE) - 1
_KEYS = np.array([OTHERS, *range(CONTEXTS)])  # contexts in the order of entries
END = len(_KEYS)  # the key of what follows the entries: nothing is read there
# entries of tables: 4 bits for the size of a code, then 8 for its symbol, then whether it is a
# run that no value follows, as an index beyond the table of values
_SIZE, _SYMBOL, _NO_VALUE = 15, 4, 1 << 16


def _table(codes: Codes) -> _Array:
    """Return the entries for the next MAX_CODE bits, for keys one after another."""
    assert (codes.sizes_XW > 0).all(), "a code is not complete: reading would not end"
    entries_KW = (codes.sizes_XW | codes.symbols_XW << _SYMBOL)[_KEYS]
    table: _Array = np.concatenate([entries_KW.reshape(-1), np.zeros(_WINDOW + 1, np.int64)])
    return table


_RUNS, _VALUES, _STEPS = _table(RUNS), _table(VALUES), STEPS[_KEYS]
_RUNS[_RUNS >> _SYMBOL == LONGEST_RUN] |= _NO_VALUE


class _Symbols(NamedTuple):
    """Runs and values in order: rows, indices of the keys after the run, entries of the tables."""

    row_F: _Array
    at_F: _Array
    run_F: _Array
    value_F: _Array


def read_residuals(
    bytes_AS: _Array,
    skipped_A: _Array,
    lengths_A: _Array,
    keys_E: _Array,
    at_A: _Array,
    *,
    strict: bool,
) -> tuple[_Array, _Array]:
    """Return the indices of keys of entries with a residual, and what it subtracts from a level.

    The residuals of a row are bits of ``bytes_AS`` after those skipped; at least 4 bytes follow
    them. ``keys_E`` uint16 are the keys of entries where their tables begin, END after the last of
    a row: at least LONGEST_RUN of it; those of a row begin at ``at_A``. Raises LabelSetError if
    ``strict`` and the residuals have other bits, or go beyond the entries.
    """
    num_rows, num_words = bytes_AS.shape[0], bytes_AS.shape[1] - 3
    # the 32 bits from each byte on: two codes, from any of its bits
    words_AW = np.ndarray((num_rows, num_words), "<u4", bytes_AS, strides=bytes_AS.strides)
    words_Y = words_AW.astype(np.int64).reshape(-1)
    bit_A = 8 * num_words * np.arange(num_rows) + skipped_A
    symbols = _read(words_Y, keys_E, bit_A, bit_A + lengths_A, at_A)
    if strict:
        _check(symbols, keys_E, lengths_A)
    (real,) = np.nonzero(symbols.value_F)
    at_F = symbols.at_F[real]
    values_F = VALUE_OF[symbols.value_F[real] >> _SYMBOL & 255]
    return at_F, values_F * _STEPS[keys_E[at_F] >> MAX_CODE]


def _read(words_Y: _Array, keys_E: _Array, bit_A: _Array, end_A: _Array, at_A: _Array) -> _Symbols:
    """Return the symbols of rows: bits from ``bit_A`` to ``end_A``, keys from ``at_A`` on."""
    row_A = np.arange(len(bit_A))
    found = []
    while len(row_A) > _FEW:
        for _ in range(_STEPS_AT_ONCE):
            # a run of entries without a residual, then a value
            is_active_A = bit_A < end_A  # what follows is not used
            words_A = words_Y.take(bit_A >> 3, mode="clip") >> (bit_A & 7)
            run_A = _RUNS.take(keys_E.take(at_A) | (words_A & _WINDOW))
            size_A = run_A & _SIZE
            at_A = at_A + (run_A >> _SYMBOL & 255)
            index_A = keys_E.take(at_A) | (words_A >> size_A & _WINDOW) | (run_A & _NO_VALUE)
            value_A = _VALUES.take(index_A, mode="clip")
            found.append((is_active_A, row_A, at_A, run_A, value_A))
            bit_A = bit_A + size_A + (value_A & _SIZE)
            at_A = at_A + (value_A > 0)
        (left,) = np.nonzero((bit_A < end_A) & (keys_E.take(at_A) < END << MAX_CODE))
        row_A, bit_A, end_A, at_A = row_A[left], bit_A[left], end_A[left], at_A[left]
    columns = [np.concatenate(column) for column in zip(*found, strict=True)]
    read = _Symbols(*(column[columns[0]] for column in columns[1:])) if found else None
    rest = _read_one_by_one(words_Y, keys_E, row_A, bit_A, end_A, at_A)
    if read is None:
        return rest
    return _Symbols(*(np.concatenate(pair) for pair in zip(read, rest, strict=True)))


def _read_one_by_one(
    words_Y: _Array, keys_E: _Array, row_A: _Array, bit_A: _Array, end_A: _Array, at_A: _Array
) -> _Symbols:
    """Return the symbols of a few rows: Python is faster than calls for so few."""
    words, keys, runs, values = words_Y.data, keys_E.data, _RUNS.data, _VALUES.data
    found = []
    columns = (column.tolist() for column in (row_A, bit_A, end_A, at_A))
    for row, bit, end, at in zip(*columns, strict=True):
        while bit < end and keys[at] < END << MAX_CODE:
            word = words[bit >> 3] >> (bit & 7)
            run = runs[keys[at] | word & _WINDOW]
            size = run & _SIZE
            at += run >> _SYMBOL & 255
            value = 0
            if not run & _NO_VALUE:
                value = values[keys[at] | word >> size & _WINDOW]
            found.append((row, at, run, value))
            bit += size + (value & _SIZE)
            at += value > 0
    return _Symbols(*np.array(found, np.int64).reshape(-1, 4).T)


def _check(symbols: _Symbols, keys_E: _Array, lengths_A: _Array) -> None:
    """Raise LabelSetError unless the symbols have so many bits and stay within the entries."""
    if (keys_E[symbols.at_F] >= END << MAX_CODE).any():
        raise LabelSetError("residuals of a label go beyond its entries")
    bits_F = (symbols.run_F & _SIZE) + (symbols.value_F & _SIZE)
    if (np.bincount(symbols.row_F, bits_F, len(lengths_A)) != lengths_A).any():
        raise LabelSetError("residuals of a label do not end where its length says")
