"""mealv2.models.frozen: only the last linear layer learns; features stand for images."""

import pytest
import torch

from mealv2.errors import ConfigError
from mealv2.models import create_classifier
from mealv2.models.frozen import FrozenClassifier

SIZE = 32

pytestmark = pytest.mark.usefixtures("seeded_weights")


def frozen(name: str = "test_resnet") -> FrozenClassifier:
    return FrozenClassifier(create_classifier(name, num_classes=5, img_size=SIZE), img_size=SIZE)


def images(num: int = 4) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (num, 3, SIZE, SIZE), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize(
    ("name", "head"),
    [
        ("test_resnet", "fc"),
        ("test_efficientnet", "classifier"),
        ("test_vit", "head"),
        ("test_convnext", "head.fc"),
    ],
)
def test_the_last_layer_is_found_and_features_give_the_logits_of_images(
    name: str, head: str
) -> None:
    model = create_classifier(name, num_classes=5, img_size=SIZE).eval()
    with torch.no_grad():
        expected_BC = model(images())
    found = FrozenClassifier(model, img_size=SIZE).train()
    assert found.head_name == head
    features_BD = found.features(images())
    assert features_BD.shape == (4, found.head.in_features)
    with torch.no_grad():
        assert torch.equal(found(images()), expected_BC)
        assert torch.equal(found(features_BD), expected_BC)


def test_gradients_and_batch_statistics_stay_out_of_the_backbone() -> None:
    model = frozen().train()
    before = {name: t.clone() for name, t in model.backbone.state_dict().items()}
    model(images()).sum().backward()
    with_gradient = {name for name, p in model.backbone.named_parameters() if p.grad is not None}
    assert with_gradient == {"fc.weight", "fc.bias"}
    after = model.backbone.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_modes_of_the_model_are_left_as_they_were() -> None:
    model = create_classifier("test_resnet", num_classes=5, img_size=SIZE).train()
    FrozenClassifier(model, img_size=SIZE)
    assert all(module.training for module in model.modules())


def test_a_model_whose_logits_are_no_linear_layers_is_an_error() -> None:
    model = create_classifier("test_resnet", num_classes=5, img_size=SIZE)
    model.backbone.register_forward_hook(lambda _, inputs, output: 2 * output)
    with pytest.raises(ConfigError, match="no last linear layer"):
        FrozenClassifier(model, img_size=SIZE)
