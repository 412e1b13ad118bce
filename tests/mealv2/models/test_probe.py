"""mealv2.models.probe: a size that a model cannot take is one line; the model stays as it was."""

from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch

from mealv2.errors import ConfigError
from mealv2.models import create_classifier, save_classifier
from mealv2.models.probe import check_forward


@pytest.mark.parametrize(
    ("name", "img_size"), [("test_vit", 30), ("efficientformer_l1", 64), ("inception_v3", 16)]
)
def test_a_size_that_a_model_cannot_take_is_named_in_one_line(name: str, img_size: int) -> None:
    with pytest.raises(ConfigError) as caught:
        create_classifier(name, num_classes=3, img_size=img_size)
    message = str(caught.value)
    assert f"model {name} cannot be " in message
    assert f" at --img-size {img_size}: " in message
    assert "\n" not in message
    assert message.rpartition(": ")[2].strip()


def test_an_encoder_without_a_classifier_is_named() -> None:
    backbone = timm.create_model("test_resnet", num_classes=3)
    backbone.fc = torch.nn.Identity()
    with pytest.raises(ConfigError, match=r"encoder is no classifier: .* \(2, 96\), not \(2, 3\)"):
        check_forward(backbone, 64, name="encoder")


def test_the_check_changes_neither_the_model_nor_random_numbers() -> None:
    backbone = timm.create_model("test_resnet", num_classes=3).train()
    backbone.layer1.eval()
    modes = [module.training for module in backbone.modules()]
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    numbers = torch.random.get_rng_state()
    for weights in (None, Path("file")):
        check_forward(backbone, 64, name="test_resnet", weights=weights)
    assert [module.training for module in backbone.modules()] == modes
    assert all(torch.equal(value, before[key]) for key, value in backbone.state_dict().items())
    assert torch.equal(torch.random.get_rng_state(), numbers)


def test_modules_with_several_names_stay_and_can_be_saved(tmp_path: Path) -> None:
    model = create_classifier("coat_tiny", num_classes=3, img_size=64)
    state = model.backbone.state_dict()
    assert not any(value.is_meta for value in state.values())
    pointers = [value.untyped_storage().data_ptr() for value in state.values()]
    assert len(set(pointers)) < len(pointers)  # which safetensors does not write
    save_classifier(tmp_path, model, classes=["a", "b", "c"], img_size=64)
    stored = safetensors.torch.load_file(tmp_path / "model.safetensors")
    assert stored.keys() == state.keys()
    assert all(torch.equal(stored[key], state[key]) for key in state)
