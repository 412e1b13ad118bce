"""The networks of MEAL (version 1) for CIFAR, registered with timm under ``cifar_`` names."""

from collections.abc import Callable
from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model

from mealv2.models.cifar import densenet, dpn, googlenet, mobilenet, resnet, vgg
from mealv2.models.cifar.network import Block, CifarNetwork

__all__ = ["MEAN", "NAMES", "STD", "Block", "CifarNetwork"]  # register_model adds more

MEAN = (0.4914, 0.4822, 0.4465)  # of MEAL's code, on CIFAR-10 images in [0, 1]
STD = (0.2023, 0.1994, 0.2010)


def _config(first_conv: str, classifier: str = "fc") -> dict[str, Any]:
    return {
        "num_classes": 10,
        "input_size": (3, 32, 32),
        "crop_pct": 1.0,
        "interpolation": "bilinear",
        "mean": MEAN,
        "std": STD,
        "first_conv": first_conv,
        "classifier": classifier,
    }


default_cfgs = generate_default_cfgs(
    {
        "cifar_vgg19_bn": _config("features.0", "classifier"),
        "cifar_resnet18": _config("conv1"),
        "cifar_preactresnet18": _config("stem.conv"),
        "cifar_dpn92": _config("conv1", "linear"),
        "cifar_resnext29_2x64d": _config("conv1"),
        "cifar_densenet": _config("features.conv0", "classifier"),
        "cifar_densenet121": _config("features.conv0", "classifier"),
        "cifar_googlenet": _config("conv1.conv"),
        "cifar_mobilenet": _config("conv_stem", "classifier"),
    }
)

NAMES = tuple(default_cfgs)  # what timm knows only after this module was imported


def _build(
    network: Callable[..., CifarNetwork],
    variant: str,
    pretrained: bool,
    settings: dict[str, Any],
    num_maps: int = 4,
) -> CifarNetwork:
    """Build a network through timm, which sets its ``pretrained_cfg``; there are no weights."""
    hooks = {"feature_cls": "hook", "no_rewrite": True, "out_indices": tuple(range(num_maps))}
    built: CifarNetwork = build_model_with_cfg(
        network, variant, pretrained, feature_cfg=hooks, **settings
    )
    return built


def cifar_vgg19_bn(pretrained: bool = False, **settings: Any) -> CifarNetwork:
    """Return VGG-19 with batch norm, 20,040,522 parameters with 10 classes."""
    return _build(vgg.vgg19_bn, "cifar_vgg19_bn", pretrained, settings)


def cifar_resnet18(pretrained: bool = False, **settings: Any) -> CifarNetwork:
    """Return ResNet-18, 11,173,962 parameters."""
    return _build(resnet.resnet18, "cifar_resnet18", pretrained, settings)


def cifar_preactresnet18(pretrained: bool = False, **settings: Any) -> CifarNetwork:
    """Return PreAct-ResNet-18, 11,171,146 parameters."""
    return _build(resnet.preactresnet18, "cifar_preactresnet18", pretrained, settings)


def cifar_dpn92(pretrained: bool = False, **settings: Any) -> CifarNetwork:
    """Return DPN-92, 34,236,634 parameters."""
    return _build(dpn.dpn92, "cifar_dpn92", pretrained, settings)


def cifar_resnext29_2x64d(pretrained: bool = False, **settings: Any) -> CifarNetwork:
    """Return ResNeXt-29 of 2 groups of 64 channels, 9,128,778 parameters."""
    return _build(resnet.resnext29_2x64d, "cifar_resnext29_2x64d", pretrained, settings, 3)


def cifar_densenet(pretrained: bool = False, **settings: Any) -> CifarNetwork:
    """Return DenseNet of 8, 24, 24 layers of 40 channels, 10,961,010 parameters."""
    return _build(densenet.densenet, "cifar_densenet", pretrained, settings, 2)


def cifar_densenet121(pretrained: bool = False, **settings: Any) -> CifarNetwork:
    """Return three blocks of DenseNet-121, 4,302,602 parameters."""
    return _build(densenet.densenet121, "cifar_densenet121", pretrained, settings, 2)


def cifar_googlenet(pretrained: bool = False, **settings: Any) -> CifarNetwork:
    """Return GoogLeNet, 6,166,250 parameters."""
    return _build(googlenet.googlenet, "cifar_googlenet", pretrained, settings, 2)


def cifar_mobilenet(pretrained: bool = False, **settings: Any) -> CifarNetwork:
    """Return MobileNet (version 1), 3,217,226 parameters."""
    return _build(mobilenet.mobilenet, "cifar_mobilenet", pretrained, settings, 2)


# timm lists them under the module "cifar"
for _entry in (
    cifar_vgg19_bn,
    cifar_resnet18,
    cifar_preactresnet18,
    cifar_dpn92,
    cifar_resnext29_2x64d,
    cifar_densenet,
    cifar_densenet121,
    cifar_googlenet,
    cifar_mobilenet,
):
    register_model(_entry)
