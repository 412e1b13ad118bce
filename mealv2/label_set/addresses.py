"""Keys and view numbers as arrays, whatever the caller gives."""

from collections.abc import Sequence

import numpy as np

_NO_VIEW = 1 << 62  # larger than every view of a set


def encoded_keys(keys: Sequence[str]) -> list[bytes]:
    """Return keys in UTF-8; a key with a surrogate becomes bytes that match no stored key."""
    return [key.encode("utf-8", "surrogatepass") for key in keys]


def views_as_int64(views: Sequence[int]) -> np.ndarray:
    """Return views as int64; one that does not fit becomes ``_NO_VIEW`` or -1."""
    try:
        return np.asarray(views, dtype=np.int64).reshape(-1)
    except OverflowError:
        return np.array([max(-1, min(int(view), _NO_VIEW)) for view in views], dtype=np.int64)
