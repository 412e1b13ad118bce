"""mealv2.models.cifar: states of timm's and torchvision's networks give the same features."""

from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.resnet import Bottleneck

State = dict[str, Tensor]


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def stirred(model: nn.Module) -> Any:
    """Give the norms of a model values that differ from each other."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.weight, module.bias, module.running_mean):
                assert tensor is not None
                nn.init.normal_(tensor.data, 0.5, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 1.5)  # type: ignore[arg-type]
    return model.eval()


def images(size: int = 16) -> Tensor:
    return torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0))


def ours(name: str, state: State) -> Any:
    model: Any = timm.create_model(name)
    model.load_state_dict(model.adapt_state(state))
    return model.eval()


def close(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5 * float(other.abs().max()))


@torch.no_grad()
def test_resnet18_of_torchvision() -> None:
    theirs = torchvision.models.resnet18(num_classes=10)
    theirs.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    theirs.maxpool = nn.Identity()
    stirred(theirs)
    close(ours("cifar_resnet18", theirs.state_dict())(images()), theirs(images()))


@torch.no_grad()
def test_resnext29_of_torchvision() -> None:
    theirs: Any = torchvision.models.ResNet(
        Bottleneck, [3, 3, 3, 1], num_classes=10, groups=2, width_per_group=64
    )
    theirs.conv1 = nn.Conv2d(3, 64, 1, bias=False)
    theirs.maxpool = theirs.layer4 = nn.Identity()
    theirs.fc = nn.Linear(1024, 10)
    stirred(theirs)
    close(ours("cifar_resnext29_2x64d", theirs.state_dict())(images()), theirs(images()))


@torch.no_grad()
def test_preactresnet18_of_timm_whose_head_is_a_convolution() -> None:
    theirs = timm.create_model("resnetv2_18", num_classes=10)
    theirs.stem = nn.Sequential()
    theirs.stem.add_module("conv", nn.Conv2d(3, 64, 3, padding=1, bias=False))
    theirs.norm = nn.Identity()
    stirred(theirs)
    assert theirs.state_dict()["head.fc.weight"].ndim == 4
    close(ours("cifar_preactresnet18", theirs.state_dict())(images()), theirs(images()))


@pytest.mark.slow
@torch.no_grad()
def test_vgg19_bn_features_of_torchvision() -> None:
    features = stirred(torchvision.models.vgg19_bn(num_classes=1).features)
    state = {f"features.{key}": value for key, value in features.state_dict().items()}
    head = nn.Linear(512, 10)
    state |= {f"classifier.{key}": value for key, value in head.state_dict().items()}
    rows = features(images(32)).flatten(1)
    close(ours("cifar_vgg19_bn", state)(images(32)), head(rows))


@torch.no_grad()
def test_densenet121_blocks_of_torchvision() -> None:
    theirs: Any = torchvision.models.DenseNet(32, (6, 12, 24), 64, num_classes=10)
    theirs.features.conv0 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
    for name in ("norm0", "relu0", "pool0"):
        setattr(theirs.features, name, nn.Identity())
    theirs.classifier = nn.Linear(4 * 1024, 10)
    stirred(theirs)
    model = ours("cifar_densenet121", theirs.state_dict())
    transition, dense, logits = model.forward_blocks(images())
    kept: dict[str, Tensor] = {}
    for name in ("transition2", "denseblock3"):
        theirs.features.get_submodule(name).register_forward_hook(
            lambda _module, _inputs, output, name=name: kept.update({name: output.clone()})
        )
    maps = torch.relu(theirs.features(images()))
    close(transition, kept["transition2"])
    close(dense, kept["denseblock3"])
    close(logits, theirs.classifier(nn.functional.adaptive_avg_pool2d(maps, 2).flatten(1)))


@torch.no_grad()
def test_mobilenet_of_timm() -> None:
    theirs = timm.create_model("mobilenetv1_100", num_classes=10, act_layer="relu")
    theirs.conv_stem.stride = (1, 1)
    stirred(theirs)
    close(ours("cifar_mobilenet", theirs.state_dict())(images()), theirs(images()))


def test_googlenet_has_torchvisions_keys_beside_biases_and_second_convolutions() -> None:
    with torch.device("meta"):
        own = timm.create_model("cifar_googlenet").state_dict()
        theirs = torchvision.models.googlenet(
            weights=None, aux_logits=False, init_weights=False, num_classes=10
        ).state_dict()
    new = {key for key in own if key.endswith("conv.bias") or ".branch3.2." in key}
    same = {key for key in theirs if not key.startswith(("conv1.", "conv2.", "conv3."))}
    assert {key for key in own if not key.startswith("conv1.")} - new == same
    assert all(own[key].shape == theirs[key].shape for key in same)
