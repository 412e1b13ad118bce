"""mealv2.models.cifar: files of the original's layout give what a reference in float64 gives."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor
from torch.nn import functional

from mealv2.errors import ConfigError
from mealv2.models import create_classifier
from mealv2.models.cifar import MEAN, STD, CifarNetwork
from mealv2.models.fitting import load_weights

State = dict[str, Tensor]


class Reference:
    """Layers by their key in a file, in float64; weights are drawn when first asked for.

    The structure and the keys are those of kuangliu/pytorch-cifar, written again from its facts.
    """

    def __init__(self) -> None:
        self.state: State = {}
        self.generator = torch.Generator().manual_seed(0)

    def tensor(self, key: str, *shape: int, mean: float = 0.0, std: float = 0.1) -> Tensor:
        if key not in self.state:
            self.state[key] = mean + std * torch.randn(*shape, generator=self.generator)
        return self.state[key].double()

    def conv(
        self, x: Tensor, key: str, out: int, size: int = 1, *, bias: bool = False, **settings: Any
    ) -> Tensor:
        fan_in = x.shape[1] // settings.get("groups", 1) * size**2
        shape = (out, x.shape[1] // settings.get("groups", 1), size, size)
        weight = self.tensor(f"{key}.weight", *shape, std=math.sqrt(2 / fan_in))
        b = self.tensor(f"{key}.bias", out) if bias else None
        return functional.conv2d(x, weight, b, padding=size // 2, **settings)

    def bn(self, x: Tensor, key: str) -> Tensor:
        c = x.shape[1]
        weight = self.tensor(f"{key}.weight", c, mean=1.0)
        bias = self.tensor(f"{key}.bias", c)
        mean = self.tensor(f"{key}.running_mean", c)
        if f"{key}.running_var" not in self.state:
            self.state[f"{key}.running_var"] = 0.5 + torch.rand(c, generator=self.generator)
        self.state[f"{key}.num_batches_tracked"] = torch.tensor(7)
        scale = weight / (self.state[f"{key}.running_var"].double() + 1e-5).sqrt()
        column = (1, -1, 1, 1)
        return (x - mean.view(column)) * scale.view(column) + bias.view(column)

    def linear(self, x: Tensor, key: str) -> Tensor:
        weight = self.tensor(f"{key}.weight", 10, x.shape[1])
        return x @ weight.T + self.tensor(f"{key}.bias", 10)


def relu(x: Tensor) -> Tensor:
    return x.clamp(min=0)


def mean(x: Tensor) -> Tensor:
    return x.mean(dim=(2, 3))


def vgg(r: Reference, x: Tensor) -> list[Tensor]:
    blocks, place = [], 0
    for width, depth in ((64, 2), (128, 2), (256, 4), (512, 4), (512, 4)):
        for _ in range(depth):
            x = r.conv(x, f"features.{place}", width, 3, bias=True)
            x = relu(r.bn(x, f"features.{place + 1}"))
            place += 3
        x = functional.max_pool2d(x, 2)
        blocks.append(x)
        place += 1
    return [*blocks[:4], r.linear(x.flatten(1), "classifier")]


def resnet(r: Reference, x: Tensor) -> list[Tensor]:
    x, blocks = relu(r.bn(r.conv(x, "conv1", 64, 3), "bn1")), []
    for layer, width in enumerate((64, 128, 256, 512), start=1):
        for index in range(2):
            key, stride = f"layer{layer}.{index}", 2 if layer > 1 and index == 0 else 1
            y = relu(r.bn(r.conv(x, f"{key}.conv1", width, 3, stride=stride), f"{key}.bn1"))
            y = r.bn(r.conv(y, f"{key}.conv2", width, 3), f"{key}.bn2")
            if stride == 2:
                x = r.conv(x, f"{key}.shortcut.0", width, stride=2)
                x = r.bn(x, f"{key}.shortcut.1")
            x = relu(x + y)
        blocks.append(x)
    return [*blocks, r.linear(mean(x), "linear")]


def preact(r: Reference, x: Tensor) -> list[Tensor]:
    x, blocks = r.conv(x, "conv1", 64, 3), []
    for layer, width in enumerate((64, 128, 256, 512), start=1):
        for index in range(2):
            key, stride = f"layer{layer}.{index}", 2 if layer > 1 and index == 0 else 1
            y = relu(r.bn(x, f"{key}.bn1"))
            if stride == 2:
                x = r.conv(y, f"{key}.shortcut.0", width, stride=2)
            y = r.conv(y, f"{key}.conv1", width, 3, stride=stride)
            x = x + r.conv(relu(r.bn(y, f"{key}.bn2")), f"{key}.conv2", width, 3)
        blocks.append(x)
    return [*blocks, r.linear(mean(x), "linear")]


def resnext(r: Reference, x: Tensor) -> list[Tensor]:
    x, blocks = relu(r.bn(r.conv(x, "conv1", 64), "bn1")), []
    for layer, width in enumerate((128, 256, 512), start=1):
        for index in range(3):
            key, stride = f"layer{layer}.{index}", 2 if layer > 1 and index == 0 else 1
            y = relu(r.bn(r.conv(x, f"{key}.conv1", width), f"{key}.bn1"))
            y = r.conv(y, f"{key}.conv2", width, 3, stride=stride, groups=2)
            y = r.conv(relu(r.bn(y, f"{key}.bn2")), f"{key}.conv3", 2 * width)
            y = r.bn(y, f"{key}.bn3")
            if index == 0:
                x = r.conv(x, f"{key}.shortcut.0", 2 * width, stride=stride)
                x = r.bn(x, f"{key}.shortcut.1")
            x = relu(x + y)
        blocks.append(x)
    return [*blocks, r.linear(mean(x), "linear")]


def dpn(r: Reference, x: Tensor) -> list[Tensor]:
    x, blocks = relu(r.bn(r.conv(x, "conv1", 64, 3), "bn1")), []
    stages = ((96, 256, 16, 3), (192, 512, 32, 4), (384, 1024, 24, 20), (768, 2048, 128, 3))
    for layer, (width, d, dense, depth) in enumerate(stages, start=1):
        for index in range(depth):
            key, stride = f"layer{layer}.{index}", 2 if layer > 1 and index == 0 else 1
            y = relu(r.bn(r.conv(x, f"{key}.conv1", width), f"{key}.bn1"))
            y = r.conv(y, f"{key}.conv2", width, 3, stride=stride, groups=32)
            y = r.conv(relu(r.bn(y, f"{key}.bn2")), f"{key}.conv3", d + dense)
            y = r.bn(y, f"{key}.bn3")
            if index == 0:
                x = r.conv(x, f"{key}.shortcut.0", d + dense, stride=stride)
                x = r.bn(x, f"{key}.shortcut.1")
            x = relu(torch.cat([x[:, :d] + y[:, :d], x[:, d:], y[:, d:]], dim=1))
        blocks.append(x)
    return [*blocks, r.linear(mean(x), "linear")]


def densenet(depths: tuple[int, ...], growth: int) -> Callable[[Reference, Tensor], list[Tensor]]:
    def blocks_of(r: Reference, x: Tensor) -> list[Tensor]:
        x, blocks = r.conv(x, "conv1", 2 * growth, 3), []
        for number, depth in enumerate(depths, start=1):
            pieces = [x]
            for index in range(depth):
                key = f"dense{number}.{index}"
                y = r.conv(relu(r.bn(x, f"{key}.bn1")), f"{key}.conv1", 4 * growth)
                y = r.conv(relu(r.bn(y, f"{key}.bn2")), f"{key}.conv2", growth, 3)
                x = torch.cat([y, x], dim=1)  # new channels first
                pieces.append(y)
            if number < len(depths):
                key = f"trans{number}"
                x = r.conv(relu(r.bn(x, f"{key}.bn")), f"{key}.conv", x.shape[1] // 2)
                x = functional.avg_pool2d(x, 2)
                blocks.append(x)
        last = relu(r.bn(x, "bn"))
        rows = functional.avg_pool2d(last, last.shape[-1] // 2).flatten(1)
        # timm's dense blocks give the same channels, old ones first
        return [blocks[1], torch.cat(pieces, dim=1), r.linear(rows, "linear")]

    return blocks_of


INCEPTIONS = {
    "a3": (64, 96, 128, 16, 32, 32),
    "b3": (128, 128, 192, 32, 96, 64),
    "a4": (192, 96, 208, 16, 48, 64),
    "b4": (160, 112, 224, 24, 64, 64),
    "c4": (128, 128, 256, 24, 64, 64),
    "d4": (112, 144, 288, 32, 64, 64),
    "e4": (256, 160, 320, 32, 128, 128),
    "a5": (256, 160, 320, 32, 128, 128),
    "b5": (384, 192, 384, 48, 128, 128),
}


def googlenet(r: Reference, x: Tensor) -> list[Tensor]:
    def unit(x: Tensor, key: str, place: int, out: int, size: int = 1) -> Tensor:
        y = r.conv(x, f"{key}.{place}", out, size, bias=True)
        return relu(r.bn(y, f"{key}.{place + 1}"))

    x, blocks = unit(x, "pre_layers", 0, 192, 3), []
    for name, (n1, n3r, n3, n5r, n5, pooled) in INCEPTIONS.items():
        y1 = unit(x, f"{name}.b1", 0, n1)
        y2 = unit(unit(x, f"{name}.b2", 0, n3r), f"{name}.b2", 3, n3, 3)
        y3 = unit(unit(x, f"{name}.b3", 0, n5r), f"{name}.b3", 3, n5, 3)
        y3 = unit(y3, f"{name}.b3", 6, n5, 3)
        y4 = unit(functional.max_pool2d(x, 3, 1, padding=1), f"{name}.b4", 1, pooled)
        x = torch.cat([y1, y2, y3, y4], dim=1)
        if name in ("b3", "e4"):
            x = functional.max_pool2d(x, 3, 2, padding=1)
            blocks.append(x)
    return [*blocks, r.linear(mean(x), "linear")]


def mobilenet(r: Reference, x: Tensor) -> list[Tensor]:
    x = stem = relu(r.bn(r.conv(x, "conv1", 32, 3), "bn1"))
    widths = (64, 128, 128, 256, 256, *[512] * 6, 1024, 1024)
    for index, width in enumerate(widths):
        key, stride = f"layers.{index}", 2 if index in (1, 3, 5, 11) else 1
        y = r.conv(x, f"{key}.conv1", x.shape[1], 3, stride=stride, groups=x.shape[1])
        y = relu(r.bn(y, f"{key}.bn1"))
        x = relu(r.bn(r.conv(y, f"{key}.conv2", width), f"{key}.bn2"))
    return [stem, x, r.linear(mean(x), "linear")]


REFERENCES = {
    "cifar_vgg19_bn": vgg,
    "cifar_resnet18": resnet,
    "cifar_preactresnet18": preact,
    "cifar_dpn92": dpn,
    "cifar_resnext29_2x64d": resnext,
    "cifar_densenet": densenet((8, 24, 24), 40),
    "cifar_densenet121": densenet((6, 12, 24), 32),
    "cifar_googlenet": googlenet,
    "cifar_mobilenet": mobilenet,
}
NAMES = [
    pytest.param(name, marks=[] if name == "cifar_mobilenet" else pytest.mark.slow)
    for name in REFERENCES
]


def images(size: int = 32) -> Tensor:
    return torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(1)).double()


def saved(state: State, path: Path) -> Path:
    """Write a file as the original's training does: DataParallel, accuracy, epoch."""
    net = {f"module.{key}": value for key, value in state.items()}
    torch.save({"net": net, "acc": 93.51, "epoch": 12}, path)
    return path


def state_of(name: str) -> State:
    reference = Reference()
    REFERENCES[name](reference, images(32 if "vgg" in name else 16))
    return reference.state


@pytest.mark.parametrize("name", NAMES)
def test_a_file_of_the_original_gives_the_references_blocks(name: str, tmp_path: Path) -> None:
    reference = Reference()
    size = 32 if name == "cifar_vgg19_bn" else 16
    expected = REFERENCES[name](reference, images(size))
    model = timm.create_model(name).eval()
    assert isinstance(model, CifarNetwork)
    assert load_weights(model, saved(reference.state, tmp_path / "ckpt.t7")) == []
    with torch.no_grad():
        found = model.double().forward_blocks(images(size))
        logits = model(images(size))
    assert torch.equal(logits, found[-1])
    assert [x.shape for x in found] == [x.shape for x in expected]
    for one, other in zip(found, expected, strict=True):
        scale = float(other.abs().max())
        assert scale > 0
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9 * scale)


# --- whole files, and files that do not fit ---


def test_a_file_becomes_a_classifier_with_the_originals_normalisation(tmp_path: Path) -> None:
    state = state_of("cifar_mobilenet")
    path = saved(state, tmp_path / "ckpt.t7")
    model = create_classifier("cifar_mobilenet", num_classes=None, checkpoint=path, img_size=32)
    assert (model.num_classes, model.preprocessing.mean) == (10, MEAN)
    assert model.preprocessing.std == STD
    again = saved({k: v.clone() for k, v in model.backbone.state_dict().items()}, tmp_path / "own")
    same = create_classifier("cifar_mobilenet", num_classes=10, checkpoint=again)
    assert all(
        torch.equal(a, b)
        for a, b in zip(
            same.backbone.state_dict().values(), model.backbone.state_dict().values(), strict=True
        )
    )


@pytest.mark.parametrize("key", ["linear.weight", "layers.3.bn2.running_var", "conv1.weight"])
def test_a_missing_key_is_an_error(key: str, tmp_path: Path) -> None:
    state = state_of("cifar_mobilenet")
    del state[key]
    model = timm.create_model("cifar_mobilenet")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ConfigError, match=r"1 are missing \(first: "):
        load_weights(model, saved(state, tmp_path / "ckpt.t7"))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_an_unexpected_key_is_an_error(tmp_path: Path) -> None:
    state = state_of("cifar_mobilenet") | {"layers.13.conv1.weight": torch.ones(3)}
    with pytest.raises(ConfigError, match=r"1 of the file's \d+ are unknown"):
        load_weights(timm.create_model("cifar_mobilenet"), saved(state, tmp_path / "ckpt.t7"))


def test_another_networks_file_is_an_error(tmp_path: Path) -> None:
    reference = Reference()
    densenet((2, 2, 2), 40)(reference, images(16))  # its channels are no layers of 32
    path = saved(reference.state, tmp_path / "ckpt.t7")
    with pytest.raises(ConfigError, match="is of another model"):
        load_weights(timm.create_model("cifar_densenet121"), path)


def test_a_start_with_other_classes_gets_a_new_head(tmp_path: Path) -> None:
    path = saved(state_of("cifar_mobilenet"), tmp_path / "ckpt.t7")
    model = timm.create_model("cifar_mobilenet", num_classes=3)
    (note,) = load_weights(model, path, new_head=True)
    assert "new head for 3 classes, the file's has 10 classes" in note
    with pytest.raises(ConfigError, match="only --initial-checkpoint gets a new head"):
        load_weights(timm.create_model("cifar_mobilenet", num_classes=3), path)
