"""The boxes and flips of many views at once: those of ``Views.view``, to the bit.

The same operations in the same order as in views.py and hash_draws.py, on arrays: NumPy rounds
+, -, *, / and sqrt of doubles as Python does.
"""

from collections.abc import Sequence
from hashlib import blake2b

import numpy as np

from mealv2.hash_draws import TAYLOR_TERMS, hash_prefix
from mealv2.view_operations import TRIES
from mealv2.view_recipe import ViewRecipe
from mealv2.views import DrawnViews, Views, log_ratios

_FLIP, _TOP, _LEFT, _FIRST_TRY = range(4)  # the words of a view; each try takes two
_FEW_TRIES = 2  # as many as the first block of eight words has
_BLOCKS = 3  # that all tries need
_LOW_32, _32 = np.uint64(0xFFFF_FFFF), np.uint64(32)


def boxes_of(
    views: Views,
    keys: Sequence[str],
    indices: Sequence[int],
    widths: np.ndarray,
    heights: np.ndarray,
) -> np.ndarray:
    """Return the boxes of N views, int64 N x 5: top, left, height, width and flips.

    Rows are those of ``View.box``, but negative numbers stay negative. ``widths`` and ``heights``
    are those of the images, N each. For views without operations whose crop is not ``center``.
    """
    boxes_N5 = np.empty((len(keys), 5), dtype=np.int64)
    rest: Sequence[int] = range(len(keys))
    if isinstance(views, DrawnViews) and not views.recipe.vflip:
        rest = _fill_drawn(boxes_N5, views, keys, indices, widths, heights)
    for row in rest:
        width, height = int(widths[row]), int(heights[row])
        view = views.view(keys[row], indices[row], width=width, height=height)
        boxes_N5[row] = view.top, view.left, *view.box()[2:]
    return boxes_N5


def _fill_drawn(
    boxes_N5: np.ndarray,
    views: DrawnViews,
    keys: Sequence[str],
    indices: Sequence[int],
    widths: np.ndarray,
    heights: np.ndarray,
) -> Sequence[int]:
    """Fill the boxes of drawn views; return the rows in which no try fits."""
    recipe = views.recipe
    words_NW = _words(views.seed, keys, indices, 1)
    widths, heights = widths.astype(np.int64), heights.astype(np.int64)
    boxes_N5[:, 4] = _uniform(words_NW[:, _FLIP]) < recipe.hflip
    if recipe.crop == "pad":
        boxes_N5[:, 2] = boxes_N5[:, 3] = np.minimum(widths, heights)
        boxes_N5[:, 2:4] -= 2 * recipe.padding
        _fill_corners(boxes_N5, words_NW, widths, heights)
        boxes_N5[:, 0:2] -= recipe.padding
        boxes_N5[:, 2:4] += 2 * recipe.padding
        return ()
    boxes_N5[:, 2:4] = _box_sizes(recipe, words_NW, widths, heights, _FEW_TRIES)
    if rest := _rows_without_box(boxes_N5):
        more_NW = _words(views.seed, [keys[r] for r in rest], [indices[r] for r in rest], _BLOCKS)
        boxes_N5[rest, 2:4] = _box_sizes(recipe, more_NW, widths[rest], heights[rest], TRIES)
    _fill_corners(boxes_N5, words_NW, widths, heights)
    return _rows_without_box(boxes_N5)


def _rows_without_box(boxes_N5: np.ndarray) -> list[int]:
    rows: list[int] = np.flatnonzero(boxes_N5[:, 2] == 0).tolist()
    return rows


def _words(seed: int, keys: Sequence[str], indices: Sequence[int], num_blocks: int) -> np.ndarray:
    """Return the first words of each view, uint64 N x (8 * num_blocks)."""
    if indices and not (min(indices) >= 0 and max(indices) < 1 << 64):
        raise ValueError(f"an index must lie in [0, 2**64), got {min(indices)} to {max(indices)}")
    prefix = hash_prefix("view", seed)
    blocks = [block.to_bytes(8, "little") for block in range(num_blocks)]
    digests = b"".join(
        blake2b(prefix + index.to_bytes(8, "little") + block + key.encode()).digest()
        for key, index in zip(keys, indices, strict=True)
        for block in blocks
    )
    return np.frombuffer(digests, dtype="<u8").reshape(len(keys), 8 * num_blocks)


def _fill_corners(
    boxes_N5: np.ndarray, words_NW: np.ndarray, widths: np.ndarray, heights: np.ndarray
) -> None:
    """Fill top and left of boxes whose height and width are known."""
    boxes_N5[:, 0] = _below(heights - boxes_N5[:, 2] + 1, words_NW[:, _TOP])
    boxes_N5[:, 1] = _below(widths - boxes_N5[:, 3] + 1, words_NW[:, _LEFT])


def _box_sizes(
    recipe: ViewRecipe,
    words_NW: np.ndarray,
    widths: np.ndarray,
    heights: np.ndarray,
    num_tries: int,
) -> np.ndarray:
    """Return the first (height, width) drawn that fits, int64 N x 2; (0, 0) if none does."""
    low, high = recipe.scale
    centre, half = log_ratios(recipe.ratio)
    words_NW = words_NW[:, _FIRST_TRY : _FIRST_TRY + 2 * num_tries]
    uniform_NT2 = _uniform(words_NW).reshape(-1, num_tries, 2)
    area_N1 = (widths * heights).astype(np.float64)[:, None]
    box_area_NT = area_N1 * (low + (high - low) * uniform_NT2[..., 0])
    ratio_NT = _exp(centre + (2.0 * uniform_NT2[..., 1] - 1.0) * half)
    width_NT = np.rint(np.sqrt(box_area_NT * ratio_NT)).astype(np.int64)
    height_NT = np.rint(np.sqrt(box_area_NT / ratio_NT)).astype(np.int64)
    fits_NT = (width_NT > 0) & (width_NT <= widths[:, None])
    fits_NT &= (height_NT > 0) & (height_NT <= heights[:, None])
    rows_N, first_N = np.arange(len(words_NW)), fits_NT.argmax(axis=1)
    sizes_N2 = np.stack([height_NT[rows_N, first_N], width_NT[rows_N, first_N]], axis=1)
    sizes_N2[~fits_NT[rows_N, first_N]] = 0
    return sizes_N2


def _uniform(words: np.ndarray) -> np.ndarray:
    return (words >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _below(counts_N: np.ndarray, words_N: np.ndarray) -> np.ndarray:
    """Return words * counts >> 64 for counts below 2**32."""
    counts_N = counts_N.astype(np.uint64)
    high_N = (words_N >> _32) * counts_N
    low_N = (words_N & _LOW_32) * counts_N >> _32
    found_N: np.ndarray = ((high_N + low_N) >> _32).astype(np.int64)
    return found_N


def _exp(x: np.ndarray) -> np.ndarray:
    x, squares = x.copy(), np.zeros(x.shape, dtype=np.int64)
    while (is_large := np.abs(x) > 0.3).any():
        x[is_large] /= 2
        squares += is_large
    value: np.ndarray = np.ones(x.shape)
    for n in range(TAYLOR_TERMS, 0, -1):  # value = 1 + x * value / n
        value *= x
        value /= n
        value += 1.0
    for done in range(int(squares.max(initial=0))):
        np.multiply(value, value, out=value, where=squares > done)
    return value
