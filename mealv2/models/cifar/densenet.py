"""DenseNets of three dense blocks for small images, of timm's blocks."""

import re
from collections.abc import Sequence
from typing import Any

import torch
from timm.layers.norm_act import BatchNormAct2d
from timm.models.densenet import DenseBlock, DenseTransition
from torch import Tensor, nn

from mealv2.models.cifar.network import Block, CifarNetwork, LayerGroups, conv_stem

_BOTTLENECK = 4  # a layer's 1 x 1 convolution has 4 times as many channels as it adds
_POOL_SIZE = 2  # MEAL classifies a map of 2 x 2, so 4 times the channels


class CifarDenseNet(CifarNetwork):
    """A 3 x 3 stem, three dense blocks with transitions between them, norm, a 2 x 2 map classified.

    Blocks: the output of the second transition, and of the third dense block before its norm.
    Keys are timm's and torchvision's: ``features.conv0 features.denseblock1.denselayer1.norm1
    features.transition1.conv features.norm5 classifier``. The original's are assumed to be
    ``conv1 dense1.0.bn1 trans1.conv bn linear``, and its dense layers to put new channels before
    old ones: ``adapt_state`` brings them to timm's order, old before new.
    """

    original_keys = (
        (r"^conv1\.", "features.conv0."),
        (r"^bn\.", "features.norm5."),
        (r"^linear\.", "classifier."),
        (r"^trans(\d)\.bn\.", r"features.transition\1.norm."),
        (r"^trans(\d)\.conv\.", r"features.transition\1.conv."),
    )
    layer_groups = LayerGroups(  # as timm's DenseNet
        stem=r"^features\.conv0",
        stages=r"^features\.(?:denseblock|transition)(\d+)",
        blocks=(
            (r"^features\.denseblock(\d+)\.denselayer(\d+)", None),
            (r"^features\.transition(\d+)", (99999,)),  # timm: after the layers before it
        ),
    )

    def __init__(
        self,
        depths: Sequence[int],
        growth: int,
        *,
        num_classes: int = 10,
        in_chans: int = 3,
        drop_rate: float = 0.0,
    ) -> None:
        channels = 2 * growth
        features = nn.Sequential()
        features.add_module("conv0", conv_stem(in_chans, channels))
        starts: dict[int, int] = {}  # channels before the first layer of each block
        for number, depth in enumerate(depths, start=1):
            starts[number] = channels
            dense = DenseBlock(depth, channels, bn_size=_BOTTLENECK, growth_rate=growth)
            features.add_module(f"denseblock{number}", dense)
            channels += depth * growth
            if number < len(depths):
                transition = DenseTransition(channels, channels // 2)
                features.add_module(f"transition{number}", transition)
                channels //= 2
        features.add_module("norm5", BatchNormAct2d(channels))
        super().__init__(
            {"features": features},
            [
                Block("features.transition2", starts[3], 4, 5000),
                Block("features.denseblock3", channels, 4, 1000),
            ],
            order=[f"features.{name}" for name, _ in features.named_children()],
            head="classifier",
            num_features=channels,
            num_classes=num_classes,
            pool_size=_POOL_SIZE,
            drop_rate=drop_rate,
        )
        self._growth, self._starts = growth, starts

    def _adapt_tensor(self, key: str, value: Any) -> tuple[str, Any]:
        name, value = super()._adapt_tensor(key, value)
        block = len(self._starts)  # the norm and the classifier are after the last
        if found := re.match(r"^dense(\d+)\.(\d+)\.(bn|conv)(\d)\.(.+)", key):
            number, layer, kind, which, rest = found.groups()
            layer_name = f"features.denseblock{number}.denselayer{int(layer) + 1}"
            name = f"{layer_name}.{'norm' if kind == 'bn' else 'conv'}{which}.{rest}"
            if which == "2" or int(number) not in self._starts:
                return name, value  # its input is not a concatenation
            block = int(number)
        elif found := re.match(r"^trans(\d+)\.", key):
            block = int(found[1])
        elif not key.startswith(("bn.", "linear.weight")):
            return name, value
        if not isinstance(value, Tensor) or value.ndim == 0 or block not in self._starts:
            return name, value
        return name, self._old_first(value, self._starts[block], key == "linear.weight")

    def _old_first(self, tensor: Tensor, start: int, is_head: bool) -> Tensor:
        """Return a tensor whose concatenated channels are old before new, from new before old.

        ``start`` is the number of channels before the first layer. The channels are the first
        dimension of a vector, the second of a weight; of the classifier, four columns each.
        """
        dim = 0 if tensor.ndim == 1 else 1
        each = _POOL_SIZE**2 if is_head else 1
        new, first = self._growth * each, start * each
        num_layers, rest = divmod(tensor.shape[dim] - first, new)
        if num_layers < 0 or rest:
            return tensor  # of another network: its shape does not fit
        pieces = torch.split(tensor, [new] * num_layers + [first], dim=dim)
        return torch.cat(pieces[::-1], dim=dim)


def densenet(**settings: Any) -> CifarDenseNet:
    """Return the original's densenet_cifar: 8, 24 and 24 layers that add 40 channels each.

    transition2, denseblock3 and the logits; the original's sizes are 5000,1000,10.
    """
    return CifarDenseNet((8, 24, 24), 40, **settings)


def densenet121(**settings: Any) -> CifarDenseNet:
    """Return the original's densenet121, the first three of four blocks: 6, 12 and 24 layers of 32.

    transition2, denseblock3 and the logits; the original's sizes are 5000,1000,10.
    """
    return CifarDenseNet((6, 12, 24), 32, **settings)
