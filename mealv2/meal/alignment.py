"""The alignment of MEAL: a feature map of any shape becomes a vector of a given length."""

from typing import Literal, get_args

from torch import Tensor
from torch.nn import functional as F

Pool = Literal["avg", "max"]
POOLS: tuple[str, ...] = get_args(Pool)


def align(features_BCHW: Tensor, size: int, pool: Pool = "max") -> Tensor:
    """Return feature maps as vectors, float32 B x ``size``; there are no parameters.

    The H W positions in a row are pooled to ``size`` bins, bin j from position floor(j n / size) to
    ceil((j + 1) n / size), then the channels to one: means with ``avg``, maxima with ``max``
    (MEAL's layer fc_out). A size above H W repeats values. Features B x D count as D positions of
    one channel. Raises ValueError for other shapes.
    """
    if features_BCHW.ndim not in (2, 4):
        raise ValueError(f"features have shape B x C x H x W or B x D, not {features_BCHW.ndim}-d")
    features = features_BCHW.float()
    rows_BCN = features[:, None] if features.ndim == 2 else features.flatten(2)
    # the channels first, which changes no result: there are C times fewer values to pool
    if pool == "avg":
        return F.adaptive_avg_pool1d(rows_BCN.mean(dim=1, keepdim=True), size).flatten(1)
    return F.adaptive_max_pool1d(rows_BCN.amax(dim=1, keepdim=True), size).flatten(1)
