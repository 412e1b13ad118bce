"""mealv2.models.cifar: sizes, blocks, heads and names of the networks; timm's ways to use them."""

import copy
from typing import Any

import pytest
import timm
import torch
from timm.models import group_parameters
from torch import Tensor, nn

from mealv2.errors import ConfigError
from mealv2.models import create_classifier
from mealv2.models.cifar import NAMES, CifarNetwork

# parameters with 10 classes, and the shape of each block of a 32 x 32 image
NETWORKS: dict[str, tuple[int, list[tuple[int, ...]]]] = {
    "cifar_vgg19_bn": (20_040_522, [(64, 16, 16), (128, 8, 8), (256, 4, 4), (512, 2, 2)]),
    "cifar_resnet18": (11_173_962, [(64, 32, 32), (128, 16, 16), (256, 8, 8), (512, 4, 4)]),
    "cifar_preactresnet18": (11_171_146, [(64, 32, 32), (128, 16, 16), (256, 8, 8), (512, 4, 4)]),
    "cifar_dpn92": (34_236_634, [(320, 32, 32), (672, 16, 16), (1528, 8, 8), (2560, 4, 4)]),
    "cifar_resnext29_2x64d": (9_128_778, [(256, 32, 32), (512, 16, 16), (1024, 8, 8)]),
    "cifar_densenet": (10_961_010, [(580, 8, 8), (1540, 8, 8)]),
    "cifar_densenet121": (4_302_602, [(256, 8, 8), (1024, 8, 8)]),
    "cifar_googlenet": (6_166_250, [(480, 16, 16), (832, 8, 8)]),
    "cifar_mobilenet": (3_217_226, [(32, 32, 32), (1024, 2, 2)]),
}
OUT_DIMS = {
    "cifar_resnext29_2x64d": (1000, 500, 200, 10),
    "cifar_densenet": (5000, 1000, 10),
    "cifar_densenet121": (5000, 1000, 10),
    "cifar_googlenet": (5000, 1000, 10),
    "cifar_mobilenet": (500, 200, 10),
}


def on_meta(name: str, **settings: Any) -> CifarNetwork:
    with torch.device("meta"):
        model = timm.create_model(name, **settings)
    assert isinstance(model, CifarNetwork)
    return model


def images(num_images: int, size: int, device: str = "cpu") -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(num_images, 3, size, size, generator=generator).to(device)


def test_all_names_are_listed() -> None:
    assert set(NAMES) == NETWORKS.keys()
    assert timm.list_models(module="cifar") == sorted(NAMES)


@pytest.mark.parametrize("name", NETWORKS)
def test_parameters_and_blocks_are_the_originals(name: str) -> None:
    num_parameters, shapes = NETWORKS[name]
    device = "meta" if num_parameters > 2e7 else "cpu"
    with torch.device(device), torch.no_grad():
        model = timm.create_model(name)
        assert isinstance(model, CifarNetwork)
        blocks = model.forward_blocks(images(2, 32, device))
    assert sum(parameter.numel() for parameter in model.parameters()) == num_parameters
    assert [tuple(block.shape) for block in blocks] == [(2, *shape) for shape in [*shapes, (10,)]]
    assert model.num_blocks == len(blocks)
    assert model.default_out_dims == OUT_DIMS.get(name, (5000, 1000, 500, 200, 10))
    info = [(i["num_chs"], 32 // i["reduction"], 32 // i["reduction"]) for i in model.feature_info]
    assert info == shapes


@pytest.mark.parametrize("name", ["cifar_vgg19_bn", "cifar_resnext29_2x64d", "cifar_mobilenet"])
def test_timm_gives_the_same_blocks_as_features(name: str) -> None:
    with torch.device("meta"):
        features = timm.create_model(name, features_only=True)
    maps = features(images(2, 32, "meta"))
    assert [tuple(each.shape[1:]) for each in maps] == NETWORKS[name][1]


@pytest.mark.parametrize("name", NETWORKS)
def test_the_head_can_be_replaced(name: str) -> None:
    model = on_meta(name, num_classes=7)
    maps = torch.ones(2, model.num_features, 4, 4, device="meta")
    assert model.forward_head(maps).shape == (2, 7)
    head = model.get_classifier()
    assert model.pretrained_cfg["classifier"] in dict(model.named_modules())
    assert model.get_submodule(model.pretrained_cfg["classifier"]) is head
    model.reset_classifier(100)
    assert (model.num_classes, model.forward_head(maps).shape) == (100, (2, 100))
    assert model.default_out_dims[-1] == 100
    rows = model.forward_head(maps, pre_logits=True)
    assert rows.shape == (2, model.head_hidden_size)
    model.reset_classifier(0)
    assert model.forward_head(maps).shape == rows.shape
    with pytest.raises(ValueError, match="'max'"):
        model.reset_classifier(3, "max")


@pytest.mark.parametrize("name", NETWORKS)
def test_one_config_serves_stem_and_other_input_channels(name: str) -> None:
    model = on_meta(name, in_chans=1)
    stem = model.get_submodule(model.pretrained_cfg["first_conv"])
    assert isinstance(stem, nn.Conv2d)
    assert (stem.in_channels, stem.stride) == (1, (1, 1))
    assert (stem.bias is not None) == (name in ("cifar_vgg19_bn", "cifar_googlenet"))


@pytest.mark.parametrize("name", NETWORKS)
def test_layer_groups_run_from_the_stem_to_the_head(name: str) -> None:
    model = on_meta(name)
    layers = group_parameters(model, model.group_matcher(), reverse=True)
    names = [key for key, _ in model.named_parameters()]
    assert layers.keys() == set(names)
    assert layers[names[0]] == 0
    assert layers[names[-1]] == max(layers.values()) > 4
    order = [layers[key] for key in names]
    assert order == sorted(order)
    coarse = group_parameters(model, model.group_matcher(coarse=True), reverse=True)
    assert max(coarse.values()) <= max(layers.values())


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_every_parameter_gets_a_gradient_and_no_block_changes_later(name: str) -> None:
    torch.manual_seed(0)
    # eval mode: in train mode batch norm removes what the bias of a convolution adds
    model = timm.create_model(name).double().eval()
    batch = images(2, 32 if name == "cifar_vgg19_bn" else 16).double()
    kept: list[Tensor] = []
    hooks = [
        model.get_submodule(block.name).register_forward_hook(
            lambda _module, _inputs, output: kept.append(output.detach().clone())
        )
        for block in model.block_info
    ]
    *maps, logits = model.forward_blocks(batch)
    for hook in hooks:
        hook.remove()
    assert all(torch.equal(one, two) for one, two in zip(maps, kept, strict=True))
    assert torch.equal(model(batch), logits)
    logits[:, 0].sum().backward()
    without = [
        key
        for key, parameter in model.named_parameters()
        if parameter.grad is None or not bool(parameter.grad.any())
    ]
    assert without == []


def test_dropout_acts_before_the_head_in_train_mode() -> None:
    model = timm.create_model("cifar_mobilenet", drop_rate=0.5)
    maps = torch.ones(1, 1024, 2, 2)
    assert set(model.forward_head(maps, pre_logits=True).unique().tolist()) == {0.0, 2.0}
    assert model.eval().forward_head(maps, pre_logits=True).unique().tolist() == [1.0]


def test_a_seed_gives_the_same_network_and_pytorchs_initial_weights() -> None:
    torch.manual_seed(3)
    one = timm.create_model("cifar_mobilenet")
    torch.manual_seed(3)
    two = timm.create_model("cifar_mobilenet")
    pairs = zip(one.state_dict().values(), two.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert all(
        torch.equal(a, b)
        for a, b in zip(copy.deepcopy(one).parameters(), one.parameters(), strict=True)
    )
    weight = one.get_submodule("blocks.3.0.conv_pw").weight.detach()
    bound = weight[0].numel() ** -0.5  # nn.Conv2d: uniform in +- 1 / sqrt(fan in)
    assert 0.9 * bound < float(weight.abs().max()) <= bound


@pytest.mark.slow
def test_a_network_compiles_in_one_graph() -> None:
    model = timm.create_model("cifar_mobilenet").eval()
    batch = images(2, 32)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        assert torch.equal(compiled(batch), model(batch))


def test_an_unknown_name_suggests_the_right_one() -> None:
    with pytest.raises(ConfigError, match=r"unknown model 'cifar_resnt18'; did you mean cifar_res"):
        create_classifier("cifar_resnt18", num_classes=3)


def test_weights_that_nobody_has_are_an_error_with_the_flags_that_help() -> None:
    with pytest.raises(Exception, match=r"cannot load the pretrained weights.*--no-pretrained"):
        create_classifier("cifar_mobilenet", num_classes=3, pretrained=True)


def test_a_setting_that_a_network_lacks_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"model cifar_dpn92 cannot be built: .*drop_path_rate"):
        create_classifier("cifar_dpn92", num_classes=3, drop_path_rate=0.1)
