"""MobileNet (version 1) for small images, of timm's blocks."""

import re
from typing import Any

from timm.models.efficientnet import mobilenetv1_100

from mealv2.models.cifar.network import Block, CifarNetwork, LayerGroups, conv_stem

_DEPTHS = (1, 2, 2, 6, 2)  # blocks of each stage


class CifarMobileNet(CifarNetwork):
    """timm's MobileNet-v1 with ReLU in place of ReLU6 and a stem of stride 1.

    Blocks: the stem after its norm and ReLU, and the last stage. Keys are timm's: ``conv_stem bn1
    blocks.0.0.conv_dw blocks.0.0.bn1 blocks.0.0.conv_pw classifier``. The original's are assumed
    to be ``conv1 bn1 layers.0.conv1 layers.0.bn1 layers.0.conv2 linear``.
    """

    original_keys = ((r"^conv1\.", "conv_stem."), (r"^linear\.", "classifier."))
    layer_groups = LayerGroups(  # as timm's EfficientNet
        stem=r"^conv_stem|bn1",
        stages=r"^blocks\.(\d+)",
        blocks=r"^blocks\.(\d+)\.(\d+)",
    )

    def __init__(
        self,
        *,
        num_classes: int = 10,
        in_chans: int = 3,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        of_timm = mobilenetv1_100(num_classes=0, act_layer="relu", drop_path_rate=drop_path_rate)
        stages = [f"blocks.{number}" for number in range(len(_DEPTHS))]
        super().__init__(
            {"conv_stem": conv_stem(in_chans, 32), "bn1": of_timm.bn1, "blocks": of_timm.blocks},
            [Block("bn1", 32, 1, 500), Block(stages[-1], 1024, 16, 200)],
            order=["conv_stem", "bn1", *stages],
            head="classifier",
            num_features=1024,
            num_classes=num_classes,
            drop_rate=drop_rate,
        )

    def _adapt_tensor(self, key: str, value: Any) -> tuple[str, Any]:
        found = re.match(r"^layers\.(\d+)\.(conv|bn)([12])\.(.+)", key)
        if found is None:
            return super()._adapt_tensor(key, value)
        index, kind, which, rest = found.groups()
        stage, block = 0, int(index)
        while stage < len(_DEPTHS) - 1 and block >= _DEPTHS[stage]:
            block, stage = block - _DEPTHS[stage], stage + 1
        layer = f"bn{which}" if kind == "bn" else ("conv_dw", "conv_pw")[int(which) - 1]
        return f"blocks.{stage}.{block}.{layer}.{rest}", value


def mobilenet(**settings: Any) -> CifarMobileNet:
    """Return MobileNet: the stem, the last stage and the logits; the original's are 500,200,10."""
    return CifarMobileNet(**settings)
