"""Top-1 of the published weights that the recipes use, on ImageNet's validation images."""

from dataclasses import dataclass

PAPER = "paper, Table 5"
TIMM = "timm's results-imagenet.csv"


@dataclass(frozen=True)
class Accuracy:
    """Top-1 in percent, who measured it, and at how many pixels."""

    top1: float
    source: str
    img_size: int = 224


# timm resizes with each model's own filter (bicubic for most) and crop; we, like the official code,
# bilinear to 256/224 of the side: such figures differ by some tenths.
ACCURACIES = {
    "senet154.gluon_in1k": Accuracy(81.38, PAPER),
    "resnet152s.gluon_in1k": Accuracy(80.86, PAPER),
    "tf_efficientnet_b4.ns_jft_in1k": Accuracy(85.16, TIMM, 380),
    "tf_efficientnet_b4.aa_in1k": Accuracy(83.04, TIMM, 380),
    "resnet50.ram_in1k": Accuracy(79.03, TIMM),
    "resnet50.tv_in1k": Accuracy(76.16, TIMM),
    "resnet18.tv_in1k": Accuracy(69.75, TIMM),
    "tf_mobilenetv3_small_075.in1k": Accuracy(65.71, TIMM),
    "tf_mobilenetv3_small_100.in1k": Accuracy(67.92, TIMM),
    "tf_mobilenetv3_large_100.in1k": Accuracy(75.51, TIMM),
    "tf_efficientnet_b0.aa_in1k": Accuracy(76.88, TIMM),
    "efficientnet_b0.ra_in1k": Accuracy(77.70, TIMM),
}
