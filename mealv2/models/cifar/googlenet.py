"""GoogLeNet for small images, of torchvision's Inception modules."""

import re
from typing import Any

from torch import Tensor, nn
from torchvision.models.googlenet import Inception

from mealv2.models.cifar.network import Block, CifarNetwork, LayerGroups

_INCEPTIONS = {  # Szegedy et al. 2015, table 1: in, 1x1, 3x3 reduce, 3x3, 5x5 reduce, 5x5, pool
    "inception3a": (192, 64, 96, 128, 16, 32, 32),
    "inception3b": (256, 128, 128, 192, 32, 96, 64),
    "inception4a": (480, 192, 96, 208, 16, 48, 64),
    "inception4b": (512, 160, 112, 224, 24, 64, 64),
    "inception4c": (512, 128, 128, 256, 24, 64, 64),
    "inception4d": (512, 112, 144, 288, 32, 64, 64),
    "inception4e": (528, 256, 160, 320, 32, 128, 128),
    "inception5a": (832, 256, 160, 320, 32, 128, 128),
    "inception5b": (832, 384, 192, 384, 48, 128, 128),
}


class ConvBlock(nn.Module):
    """Convolution with bias, batch norm, ReLU; torchvision's BasicConv2d has no bias."""

    def __init__(self, in_channels: int, out_channels: int, **settings: Any) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, **settings)
        self.bn = nn.BatchNorm2d(out_channels)
        self.act = nn.ReLU(inplace=True)

    def forward(self, maps_BCHW: Tensor) -> Tensor:
        return self.act(self.bn(self.conv(maps_BCHW)))  # type: ignore[no-any-return]


class CifarGoogLeNet(CifarNetwork):
    """A 3 x 3 stem of 192 channels, nine Inception modules, a max-pool after the 2nd and the 7th.

    Blocks: the outputs of both max-pools. Keys are torchvision's, ``conv1.conv
    inception3a.branch2.0.bn fc``; the 5 x 5 branch has two 3 x 3 convolutions where torchvision has
    one. The original's are assumed to be ``pre_layers.0 a3.b2.1 linear``.
    """

    original_keys = (
        (r"^pre_layers\.0\.", "conv1.conv."),
        (r"^pre_layers\.1\.", "conv1.bn."),
        (r"^linear\.", "fc."),
    )
    layer_groups = LayerGroups(
        stem=r"^conv1",
        stages=r"^inception(\d)",
        blocks=tuple((rf"^{name}", (number,)) for number, name in enumerate(_INCEPTIONS)),
    )

    def __init__(self, *, num_classes: int = 10, in_chans: int = 3, drop_rate: float = 0.0) -> None:
        parts: dict[str, nn.Module] = {"conv1": ConvBlock(in_chans, 192, kernel_size=3, padding=1)}
        for name, channels in _INCEPTIONS.items():
            parts[name] = Inception(*channels, conv_block=ConvBlock)
            width = channels[5]
            parts[name].branch3.append(ConvBlock(width, width, kernel_size=3, padding=1))  # type: ignore[operator, union-attr]
            if name in ("inception3b", "inception4e"):
                pool = nn.MaxPool2d(3, stride=2, padding=1)
                parts[f"maxpool{name[len('inception')]}"] = pool
        super().__init__(
            parts,
            [Block("maxpool3", 480, 2, 5000), Block("maxpool4", 832, 4, 1000)],
            num_features=1024,
            num_classes=num_classes,
            drop_rate=drop_rate,
        )

    def _adapt_tensor(self, key: str, value: Any) -> tuple[str, Any]:
        found = re.match(r"^([a-e])([345])\.b([1-4])\.(\d+)\.(.+)", key)
        if found is None:
            return super()._adapt_tensor(key, value)
        letter, stage, branch, position, rest = found.groups()
        # a branch is a chain of convolution, norm and ReLU; the last begins with its max-pool
        unit, kind = divmod(int(position) - (branch == "4"), 3)
        number = {"1": "", "4": "1."}.get(branch, f"{unit}.")
        layer = f"inception{stage}{letter}.branch{branch}.{number}{'conv' if kind == 0 else 'bn'}"
        return f"{layer}.{rest}", value


def googlenet(**settings: Any) -> CifarGoogLeNet:
    """Return GoogLeNet: both max-pools and the logits; the original's sizes are 5000,1000,10."""
    return CifarGoogLeNet(**settings)
