"""The blocks of a network that MEAL compares: feature maps in order, the logits last."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from mealv2.errors import ConfigError
from mealv2.meal.alignment import Pool, align
from mealv2.models import Classifier

LOGITS = -1  # their position in any network


def block_outputs(network: nn.Module, images_BCHW: Tensor) -> list[Tensor]:
    """Return the feature map of every block, and the logits last.

    ``network`` has a method ``forward_blocks(images_BCHW)`` that returns this list, or is a model
    of timm with ``forward_intermediates``; or a Classifier around one of them, which normalises.
    Raises ConfigError for others.
    """
    if isinstance(network, Classifier):
        images_BCHW, network = network.normalise(images_BCHW), network.backbone
    found: Any = network
    if hasattr(network, "forward_blocks"):
        return list(found.forward_blocks(images_BCHW))
    if not (hasattr(network, "forward_intermediates") and hasattr(network, "forward_head")):
        raise ConfigError(
            f"{type(network).__name__} does not give its blocks: it has neither timm's "
            "forward_intermediates nor a method forward_blocks; use --out-layer -1, the logits"
        )
    features, blocks = found.forward_intermediates(images_BCHW)
    return [*blocks, found.forward_head(features)]


@dataclass(frozen=True)
class BlockLayers:
    """Which blocks are compared, and in what form.

    ``positions`` are those in the list of a network, from the front or, negative, from its end;
    -1 is the logits, as is the last one. ``sizes`` are the lengths to which the blocks at these
    positions are aligned, None for the logits; ``pool`` None compares flattened feature maps.
    """

    positions: tuple[int, ...] = (LOGITS,)
    sizes: tuple[int | None, ...] = (None,)
    pool: Pool | None = "max"

    @property
    def only_logits(self) -> bool:
        """Whether the logits are all that is compared."""
        return self.positions == (LOGITS,)

    def outputs(self, network: Any, images_BCHW: Tensor) -> tuple[list[Tensor], Tensor]:
        """Return the compared blocks of a network, float32 B x D each, and its logits B x C."""
        if self.only_logits:
            logits_BC = network(images_BCHW).float()
            return [logits_BC], logits_BC
        blocks = block_outputs(network, images_BCHW)
        kept = zip(self.positions, self.sizes, strict=True)
        return [self._aligned(blocks, *item) for item in kept], blocks[-1].float()

    def _aligned(self, blocks: Sequence[Tensor], position: int, size: int | None) -> Tensor:
        if is_logits(position, len(blocks)):
            return blocks[-1].float()
        if self.pool is None:
            return blocks[position].float().flatten(1)
        assert size is not None, "a pooled block needs a size"
        return align(blocks[position], size, self.pool)


def is_logits(position: int, length: int) -> bool:
    """Return whether a position is that of the logits in a list of this length."""
    return position in (LOGITS, length - 1)
