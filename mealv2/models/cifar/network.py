"""A network for small images as a chain of parts, which gives the outputs of its blocks too."""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

from torch import Tensor, nn
from torch.nn import functional


class Block(NamedTuple):
    """A part whose output is a block: its name, channels, stride, and size in the original.

    ``out_dim`` is the number of values to which the original pools the block (its --out_dims).
    """

    name: str
    num_channels: int
    stride: int
    out_dim: int


class LayerGroups(NamedTuple):
    """Parameter names of the stem and of the coarse and fine layers after it, as timm wants them.

    Regular expressions; several of one kind have the number of the layer, or None, beside them.
    """

    stem: str
    stages: str
    blocks: str | Sequence[tuple[str, tuple[int, ...] | None]]


class CifarNetwork(nn.Module):
    """Parts that run one after the other, average pooling, and a linear classifier.

    ``parts`` become submodules under the names of the library they are from. ``order`` has the
    names of what runs, by default every part; a name may be that of a part of a part.
    ``forward_blocks`` returns the outputs of ``blocks`` and the logits. ``pool_size`` is the side
    of the average-pooled map that is classified. All weights are drawn as PyTorch's layers do.
    """

    # regular expressions from the keys of the original's files to ours
    original_keys: ClassVar[Sequence[tuple[str, str]]] = ()
    layer_groups: ClassVar[LayerGroups]

    def __init__(
        self,
        parts: Mapping[str, nn.Module],
        blocks: Sequence[Block],
        *,
        num_features: int,
        num_classes: int,
        head: str = "fc",
        order: Sequence[str] | None = None,
        pool_size: int = 1,
        drop_rate: float = 0.0,
    ) -> None:
        super().__init__()
        self.block_info = tuple(blocks)
        self.num_features = num_features
        self.head_hidden_size = num_features * pool_size**2
        self.num_classes = num_classes
        self.drop_rate = drop_rate
        self._order = tuple(parts if order is None else order)
        self._head = head
        for name, part in parts.items():
            self.add_module(name, part)
        self.global_pool = nn.AdaptiveAvgPool2d(pool_size)
        self.add_module(head, self._classifier(num_classes))
        for module in self.modules():
            if callable(reset := getattr(module, "reset_parameters", None)):
                reset()

    # --- forward ----------------------------------------------------------------------------------

    def forward(self, images_BCHW: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(images_BCHW))

    def forward_features(self, images_BCHW: Tensor) -> Tensor:
        """Return the last feature map, B x Ch x H x W."""
        maps_BCHW = images_BCHW
        for _, part in self._steps():
            maps_BCHW = part(maps_BCHW)
        return maps_BCHW

    def forward_head(self, maps_BCHW: Tensor, pre_logits: bool = False) -> Tensor:
        """Return the logits of the last feature map, or the row that is classified."""
        rows_BF = self.global_pool(maps_BCHW).flatten(1)
        rows_BF = functional.dropout(rows_BF, p=self.drop_rate, training=self.training)
        return rows_BF if pre_logits else self.get_classifier()(rows_BF)

    def forward_blocks(self, images_BCHW: Tensor) -> list[Tensor]:
        """Return the feature map of each block, B x Ch x H x W, and the logits B x C last.

        The maps are neither pooled nor aligned. One forward pass.
        """
        names = {block.name for block in self.block_info}
        maps_BCHW, found = images_BCHW, []
        for name, part in self._steps():
            maps_BCHW = part(maps_BCHW)
            if name in names:
                found.append(maps_BCHW)
        return [*found, self.forward_head(maps_BCHW)]

    def _steps(self) -> Iterator[tuple[str, nn.Module]]:
        return ((name, self.get_submodule(name)) for name in self._order)

    # --- blocks -----------------------------------------------------------------------------------

    @property
    def num_blocks(self) -> int:
        """The number of tensors that ``forward_blocks`` returns, the logits included."""
        return len(self.block_info) + 1

    @property
    def default_out_dims(self) -> tuple[int, ...]:
        """The original's size of each output of ``forward_blocks``; the logits keep theirs."""
        return (*(block.out_dim for block in self.block_info), self.num_classes)

    @property
    def feature_info(self) -> list[dict[str, Any]]:
        """The blocks as timm describes them, for ``features_only``."""
        return [
            {"module": block.name, "num_chs": block.num_channels, "reduction": block.stride}
            for block in self.block_info
        ]

    # --- what timm's models have ------------------------------------------------------------------

    def get_classifier(self) -> nn.Module:
        """Return the linear classifier."""
        return self.get_submodule(self._head)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier by a new one for ``num_classes`` classes; 0 gives features."""
        if global_pool not in (None, "avg"):
            raise ValueError(f"the pooling of this network is avg, not {global_pool!r}")
        like = next(self.parameters())
        self.num_classes = num_classes
        head = self._classifier(num_classes).to(like.device, like.dtype).train(self.training)
        self.add_module(self._head, head)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return regular expressions of the stem and the blocks, for timm's layer groups."""
        groups = self.layer_groups
        return {"stem": groups.stem, "blocks": groups.stages if coarse else groups.blocks}

    def _classifier(self, num_classes: int) -> nn.Module:
        return nn.Linear(self.head_hidden_size, num_classes) if num_classes else nn.Identity()

    # --- the original's files ---------------------------------------------------------------------

    def adapt_state(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """Return a state under this network's keys: its own, or one of the original's files.

        Those keys are assumed to be the ones of kuangliu/pytorch-cifar (MIT), from which MEAL's
        networks derive, without DataParallel's ``module.``. Keys of neither kind stay as they are.
        """
        own = self.state_dict().keys()
        return dict(
            (key, value) if key in own else self._adapt_tensor(key, value)
            for key, value in state.items()
        )

    def _adapt_tensor(self, key: str, value: Any) -> tuple[str, Any]:
        """Return the key and the value of a tensor of the original's."""
        for pattern, replacement in self.original_keys:
            key = re.sub(pattern, replacement, key)
        return key, value


def conv_stem(in_chans: int, num_channels: int, *, bias: bool = False, size: int = 3) -> nn.Conv2d:
    """Return the first convolution of a network for small images: stride 1."""
    return nn.Conv2d(in_chans, num_channels, size, padding=size // 2, bias=bias)
