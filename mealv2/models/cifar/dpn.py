"""DPN-92 for small images: dual path blocks in conv-norm order, which neither library has."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from mealv2.models.cifar.network import Block, CifarNetwork, LayerGroups, conv_stem

_GROUPS = 32
_STAGES = (  # width of the bottleneck, of the residual path, of the dense path; blocks; stride
    (96, 256, 16, 3, 1),
    (192, 512, 32, 4, 2),
    (384, 1024, 24, 20, 2),
    (768, 2048, 128, 3, 2),
)


class DualPathBlock(nn.Module):
    """A bottleneck whose first channels are added to its input and whose last are appended.

    timm's block of this name normalises before each convolution and projects to two dense widths;
    this one normalises after it and projects to one, so that the parameter counts differ.
    """

    def __init__(
        self, in_channels: int, width: int, residual: int, dense: int, *, stride: int, project: bool
    ) -> None:
        super().__init__()
        out_channels = residual + dense
        self.residual = residual
        self.conv1 = nn.Conv2d(in_channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1, groups=_GROUPS, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.shortcut = nn.Sequential()
        if project:
            self.shortcut.append(nn.Conv2d(in_channels, out_channels, 1, stride, bias=False))
            self.shortcut.append(nn.BatchNorm2d(out_channels))

    def forward(self, maps_BCHW: Tensor) -> Tensor:
        new_BCHW = functional.relu(self.bn1(self.conv1(maps_BCHW)))
        new_BCHW = functional.relu(self.bn2(self.conv2(new_BCHW)))
        new_BCHW = self.bn3(self.conv3(new_BCHW))
        old_BCHW = self.shortcut(maps_BCHW)
        r = self.residual
        paths = (old_BCHW[:, :r] + new_BCHW[:, :r], old_BCHW[:, r:], new_BCHW[:, r:])
        return functional.relu(torch.cat(paths, dim=1))


class CifarDPN(CifarNetwork):
    """Dual path network: a 3 x 3 stem, four stages, and a linear classifier.

    Keys are those assumed of the original: ``conv1 bn1 layer1.0.conv1 layer1.0.shortcut.0 linear``.
    """

    layer_groups = LayerGroups(
        stem=r"^conv1|bn1",
        stages=r"^layer(\d+)",
        blocks=r"^layer(\d+)\.(\d+)",
    )

    def __init__(
        self,
        stages: Sequence[tuple[int, int, int, int, int]],
        out_dims: Sequence[int],
        *,
        num_classes: int = 10,
        in_chans: int = 3,
        drop_rate: float = 0.0,
    ) -> None:
        parts: dict[str, nn.Module] = {
            "conv1": conv_stem(in_chans, 64),
            "bn1": nn.BatchNorm2d(64),
            "act1": nn.ReLU(inplace=True),
        }
        blocks, channels, reduction = [], 64, 1
        for number, (width, residual, dense, depth, stride) in enumerate(stages, start=1):
            layer, reduction = nn.Sequential(), reduction * stride
            for index in range(depth):
                settings = {"stride": 1 if index else stride, "project": not index}
                layer.append(DualPathBlock(channels, width, residual, dense, **settings))  # type: ignore[arg-type]
                channels = residual + (index + 2) * dense
            parts[f"layer{number}"] = layer
            blocks.append(Block(f"layer{number}", channels, reduction, out_dims[number - 1]))
        super().__init__(
            parts,
            blocks,
            head="linear",
            num_features=channels,
            num_classes=num_classes,
            drop_rate=drop_rate,
        )


def dpn92(num_classes: int = 10, in_chans: int = 3, drop_rate: float = 0.0) -> CifarDPN:
    """Return DPN-92: layer1 to layer4 and the logits, 5000,1000,500,200,10.

    The original pools all four blocks to the first of these sizes, 5000. That is an error there
    and is not copied: each block has its own size.
    """
    return CifarDPN(
        _STAGES,
        (5000, 1000, 500, 200),
        num_classes=num_classes,
        in_chans=in_chans,
        drop_rate=drop_rate,
    )
