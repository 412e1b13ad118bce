"""ResNet-18, ResNeXt-29 and PreAct-ResNet-18 for small images, of timm's blocks."""

from collections.abc import Sequence
from typing import Any

from timm.layers.create_conv2d import create_conv2d
from timm.layers.norm_act import BatchNormAct2d
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from timm.models.resnetv2 import ResNetV2
from torch import nn

from mealv2.models.cifar.network import Block, CifarNetwork, LayerGroups, conv_stem


class CifarResNet(CifarNetwork):
    """timm's ResNet with another stem: a convolution of stride 1, no pooling.

    Keys are timm's, and so torchvision's: ``conv1 bn1 layer1.0.conv1 layer2.0.downsample.0 fc``.
    The original's are assumed to differ in ``shortcut`` (downsample) and ``linear`` (fc).
    """

    original_keys = ((r"\.shortcut\.", ".downsample."), (r"^linear\.", "fc."))
    layer_groups = LayerGroups(  # as timm's ResNet
        stem=r"^conv1|bn1",
        stages=r"^layer(\d+)",
        blocks=r"^layer(\d+)\.(\d+)",
    )

    def __init__(
        self,
        block: Any,  # timm's class
        layers: Sequence[int],
        *,
        channels: Sequence[int],
        out_dims: Sequence[int],
        stem_size: int,
        num_classes: int = 10,
        in_chans: int = 3,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        cardinality: int = 1,
        base_width: int = 64,
    ) -> None:
        of_timm = ResNet(
            block,
            tuple(layers),
            num_classes=0,
            channels=tuple(channels),
            cardinality=cardinality,
            base_width=base_width,
            drop_path_rate=drop_path_rate,
        )
        names = [f"layer{number + 1}" for number in range(len(layers))]
        parts = {name: getattr(of_timm, name) for name in ("bn1", "act1", *names)}
        widths = [channel * block.expansion for channel in channels]
        super().__init__(
            {"conv1": conv_stem(in_chans, 64, size=stem_size)} | parts,
            [Block(*each) for each in zip(names, widths, (1, 2, 4, 8), out_dims, strict=False)],
            num_features=widths[-1],
            num_classes=num_classes,
            drop_rate=drop_rate,
        )


def resnet18(**settings: Any) -> CifarResNet:
    """Return ResNet-18: layer1 to layer4 and the logits, the original's 5000,1000,500,200,10."""
    return CifarResNet(
        BasicBlock,
        (2, 2, 2, 2),
        channels=(64, 128, 256, 512),
        out_dims=(5000, 1000, 500, 200),
        stem_size=3,
        **settings,
    )


def resnext29_2x64d(**settings: Any) -> CifarResNet:
    """Return ResNeXt-29, 2 groups of 64 channels: layer1 to layer3 and the logits.

    The original's sizes are 1000,500,200,10. Its stem is a 1 x 1 convolution.
    """
    return CifarResNet(
        Bottleneck,
        (3, 3, 3),
        channels=(64, 128, 256),
        out_dims=(1000, 500, 200),
        stem_size=1,
        cardinality=2,
        base_width=64,
        **settings,
    )


class CifarPreActResNet(CifarNetwork):
    """timm's ResNetV2 of basic blocks with a 3 x 3 stem of stride 1; no norm after the last stage.

    Keys are timm's, ``stem.conv stages.0.blocks.0.norm1 stages.1.blocks.0.downsample.conv``, but
    the classifier is ``fc``, where timm has ``head.fc`` as a 1 x 1 convolution; ``adapt_state``
    accepts it. The original's are assumed to be ``conv1 layer1.0.bn1 layer1.0.conv1
    layer2.0.shortcut.0 linear``.
    """

    original_keys = (
        (r"^conv1\.", "stem.conv."),
        (r"\.bn(\d)\.", r".norm\1."),
        (r"\.shortcut\.0\.", ".downsample.conv."),
        (r"^linear\.|^head\.fc\.", "fc."),
        *((rf"^layer{n + 1}\.(\d+)\.", rf"stages.{n}.blocks.\1.") for n in range(4)),
    )
    layer_groups = LayerGroups(  # as timm's ResNetV2
        stem=r"^stem",
        stages=r"^stages\.(\d+)",
        blocks=r"^stages\.(\d+)\.blocks\.(\d+)",
    )

    def __init__(
        self,
        *,
        num_classes: int = 10,
        in_chans: int = 3,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        channels = (64, 128, 256, 512)
        of_timm = ResNetV2(
            [2, 2, 2, 2],
            channels,
            num_classes=0,
            preact=True,
            basic=True,
            bottle_ratio=1.0,
            norm_layer=BatchNormAct2d,
            conv_layer=create_conv2d,
            drop_path_rate=drop_path_rate,
        )
        stem = nn.Sequential()
        stem.add_module("conv", conv_stem(in_chans, 64))
        names = [f"stages.{number}" for number in range(4)]
        super().__init__(
            {"stem": stem, "stages": of_timm.stages},
            [
                Block(*each)
                for each in zip(names, channels, (1, 2, 4, 8), (5000, 1000, 500, 200), strict=True)
            ],
            order=["stem", *names],
            num_features=512,
            num_classes=num_classes,
            drop_rate=drop_rate,
        )

    def _adapt_tensor(self, key: str, value: Any) -> tuple[str, Any]:
        key, value = super()._adapt_tensor(key, value)
        is_conv = key == "fc.weight" and getattr(value, "ndim", 0) == 4
        return key, value.flatten(1) if is_conv else value


def preactresnet18(**settings: Any) -> CifarPreActResNet:
    """Return PreAct-ResNet-18: its four stages and the logits, 5000,1000,500,200,10."""
    return CifarPreActResNet(**settings)
