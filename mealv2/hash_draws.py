"""Random numbers that no library can change: words of BLAKE2b, and exp and ln of doubles."""

import math
from collections.abc import Iterator
from decimal import Context, Decimal
from fractions import Fraction
from hashlib import blake2b

_DIGITS = Context(prec=50)
_LN_2 = 0.6931471805599453
_TWO_64 = 1 << 64
TAYLOR_TERMS = 16  # of exp


def hash_words(purpose: str, key: str, seed: int, index: int) -> Iterator[int]:
    """Yield 64-bit words of BLAKE2b-512(purpose, seed, index, block, key), block by block."""
    if not (0 <= seed < _TWO_64 and 0 <= index < _TWO_64):
        raise ValueError(f"seed and index must lie in [0, 2**64), got {seed} and {index}")
    head = hash_prefix(purpose, seed) + index.to_bytes(8, "little")
    tail = key.encode("utf-8")
    block = 0
    while True:
        digest = blake2b(head + block.to_bytes(8, "little") + tail).digest()
        for start in range(0, 64, 8):
            yield int.from_bytes(digest[start : start + 8], "little")
        block += 1


def hash_prefix(purpose: str, seed: int) -> bytes:
    """Return what is hashed before the index, the number of the block and the key."""
    return f"mealv2/{purpose}/1\0".encode() + seed.to_bytes(8, "little")


def uniform(word: int) -> float:
    """Map a 64-bit word to a double in [0, 1): its upper 53 bits over 2**53."""
    return (word >> 11) * 2.0**-53


def below(count: int, word: int) -> int:
    """Map a 64-bit word to 0..count-1, uniformly to within count / 2**64."""
    return word * count >> 64


def log_of_double(value: float) -> float:
    """Return ln(value) by the series of 2 artanh((m - 1) / (m + 1)), value = m * 2**n.

    To about 2e-16 of max(1, ln), in 2 microseconds; ``log`` takes 100. The last bit of the C
    library's log differs between machines; that of products does not.
    """
    m, n = math.frexp(value)
    if m < 0.75:
        m, n = 2.0 * m, n - 1
    part = (m - 1.0) / (m + 1.0)  # -1/7 to 1/5
    square, total = part * part, 0.0
    for k in range(25, 0, -2):
        total = total * square + 1.0 / k
    return n * _LN_2 + 2.0 * part * total


def log(value: Fraction) -> float:
    """Return the double nearest to ln(value): decimal arithmetic is correctly rounded."""
    quotient = _DIGITS.divide(Decimal(value.numerator), Decimal(value.denominator))
    return float(quotient.ln(_DIGITS))


def exp(x: float) -> float:
    """Return e**x by a Taylor series at x / 2**n, at most 0.3 from 0, and n squares.

    The last bit of the C library's exp differs between machines; that of products does not.
    """
    squares = 0
    while abs(x) > 0.3:
        x, squares = x / 2, squares + 1
    value = 1.0
    for n in range(TAYLOR_TERMS, 0, -1):
        value = 1.0 + x * value / n
    for _ in range(squares):
        value *= value
    return value
