"""VGG-19 with batch norm for small images, of torchvision's layers."""

from typing import Any

from torch import nn
from torchvision.models.vgg import make_layers

from mealv2.models.cifar.network import Block, CifarNetwork, LayerGroups, conv_stem

# widths of the convolutions, "M" a max-pool: Simonyan and Zisserman, configuration E
_VGG19: list[Any] = [
    *(64, 64, "M", 128, 128, "M", 256, 256, 256, 256, "M"),
    *(512, 512, 512, 512, "M", 512, 512, 512, 512, "M"),
]


class CifarVGG(CifarNetwork):
    """torchvision's VGG features, pooled, and one linear layer in place of three.

    Blocks: the outputs of the first four max-pools. Keys: ``features.N`` as in torchvision,
    ``classifier``. The original's are assumed to be the same. Images need 32 pixels or more.
    """

    layer_groups = LayerGroups(  # as timm's VGG
        stem=r"^features\.0",
        stages=r"^features\.(\d+)",
        blocks=r"^features\.(\d+)",
    )

    def __init__(self, *, num_classes: int = 10, in_chans: int = 3, drop_rate: float = 0.0) -> None:
        features = make_layers(_VGG19, batch_norm=True)
        features[0] = conv_stem(in_chans, 64, bias=True)
        pools = [n for n, layer in enumerate(features) if isinstance(layer, nn.MaxPool2d)]
        sizes = ((64, 2, 5000), (128, 4, 1000), (256, 8, 500), (512, 16, 200))
        super().__init__(
            {"features": features},
            [Block(f"features.{n}", *size) for n, size in zip(pools[:4], sizes, strict=True)],
            order=[f"features.{n}" for n in range(len(features))],
            head="classifier",
            num_features=512,
            num_classes=num_classes,
            drop_rate=drop_rate,
        )


def vgg19_bn(**settings: Any) -> CifarVGG:
    """Return VGG-19: its first four max-pools and the logits, 5000,1000,500,200,10.

    The original's vgg19 and vgg19_BN are both this network.
    """
    return CifarVGG(**settings)
