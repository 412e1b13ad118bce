"""mealv2.models.detector: RetinaNet on timm's features, with what is frozen and what is trained."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torchvision.ops import FrozenBatchNorm2d

from mealv2.errors import ConfigError
from mealv2.models import create_classifier, save_classifier
from mealv2.models.detector import Detector, Thresholds, load_detector, save_detector

SIZES = [(48, 64), (40, 56)]


def detector(name: str = "test_resnet", **settings: Any) -> Detector:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        start = create_classifier(name, num_classes=5)
        return Detector(start, num_classes=3, channels=16, **settings)


def images() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (2, 3, 48, 64), dtype=torch.uint8, generator=generator)


def targets() -> list[dict[str, Tensor]]:
    return [
        {"boxes": torch.tensor([[4.0, 6.0, 36.0, 38.0]]), "labels": torch.tensor([2])},
        {"boxes": torch.tensor([[0.0, 0.0, 30.0, 40.0]]), "labels": torch.tensor([0])},
    ]


def loss_of(model: Detector) -> Tensor:
    losses = model.train()(images(), SIZES, targets())
    total: Tensor = losses["classification"] + losses["bbox_regression"]
    return total


STAGE_1 = {
    "test_resnet": ("conv1.", "bn1.", "layer1."),
    "resnet18": ("conv1.", "bn1.", "layer1."),
    "convnext_atto": ("stem_", "stages_0."),
    "test_efficientnet": ("conv_stem.", "bn1.", "blocks.0.", "blocks.1."),
}


@pytest.mark.parametrize("freezes", [True, False])
@pytest.mark.parametrize("name", STAGE_1)
def test_the_frozen_stage_has_no_gradient_and_does_not_change(name: str, freezes: bool) -> None:
    model = detector(name, freezes_first_stage=freezes)
    body: Any = model.backbone.backbone.body
    before = {n: value.clone() for n, value in model.backbone.state_dict().items()}
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.1, weight_decay=0.1)
    loss_of(model).backward()
    for parameter, value in body.named_parameters():
        is_frozen = freezes and parameter.startswith(STAGE_1[name])
        assert (value.grad is None) == is_frozen, parameter
    optimizer.step()
    weights = {n for n, _ in model.backbone.named_parameters()}
    changed = {n for n, value in model.backbone.state_dict().items() if not value.equal(before[n])}
    first = {n for n in weights if n.removeprefix("backbone.body.").startswith(STAGE_1[name])}
    assert first
    assert changed == (weights - first if freezes else weights)


def test_batch_normalisation_is_frozen_in_training_too() -> None:
    model = detector()
    frozen = [m for m in model.modules() if isinstance(m, FrozenBatchNorm2d)]
    assert len(frozen) > 5
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in model.modules())
    assert not any(list(m.parameters()) for m in frozen)


@pytest.mark.parametrize("name", ["test_resnet", "convnext_atto", "densenet121"])
def test_features_are_those_of_the_start(name: str) -> None:
    start = create_classifier(name, num_classes=5).eval()
    model = Detector(start, num_classes=3, channels=16).eval()
    body: Any = model.backbone.backbone.body
    inputs_BCHW = torch.rand(1, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = start.backbone.forward_intermediates(  # type: ignore[operator]
            inputs_BCHW, intermediates_only=True, norm=False
        )
        found = body(inputs_BCHW)
    for feature in found:
        same = [f for f in expected if f.shape == feature.shape]
        assert any(torch.allclose(f, feature, atol=1e-4) for f in same)


def test_the_pyramid_has_strides_8_to_128_and_p6_comes_from_c5() -> None:
    model = detector()
    pyramid: Any = model.backbone.backbone
    found = pyramid(torch.zeros(1, 3, 256, 384))
    assert [tuple(f.shape[2:]) for f in found.values()] == [
        *((32, 48), (16, 24), (8, 12), (4, 6), (2, 3))
    ]
    assert pyramid.fpn.extra_blocks.p6.in_channels == 96  # of C5
    start = create_classifier("test_efficientnet", num_classes=5)
    same = Detector(start, num_classes=3, channels=64)  # as many as in C5
    assert not same.backbone.backbone.fpn.extra_blocks.use_P5  # type: ignore[union-attr]


def test_anchors_are_detectron2s_rounded() -> None:
    anchors: Any = detector().backbone.anchor_generator
    sides = [round(32 * 2 ** (k / 3), 3) for k in range(3)]
    assert [round(side, 3) for side in anchors.sizes[0]] == sides == [32.0, 40.317, 50.797]
    assert anchors.aspect_ratios[0] == (0.5, 1.0, 2.0)
    assert len(anchors.sizes) == 5


def test_black_around_an_image_has_no_effect() -> None:
    model = detector().train()
    wide_BCHW = torch.zeros(2, 3, 96, 96, dtype=torch.uint8)
    wide_BCHW[:, :, :48, :64] = images()
    for image, (height, width) in zip(wide_BCHW, SIZES, strict=True):
        image[:, height:] = image[:, :, width:] = 255
    found = model(wide_BCHW, SIZES, targets())
    expected = model(images(), SIZES, targets())
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_micro_batches_add_up_to_the_batch() -> None:
    model = detector().train()
    alone = [model(images()[i : i + 1], SIZES[:1], targets()[i : i + 1]) for i in range(2)]
    both = model(images(), SIZES[:1] * 2, targets())
    for name in both:
        mean = (alone[0][name] + alone[1][name]) / 2
        assert torch.allclose(both[name], mean, rtol=1e-5)


def test_an_image_without_objects_has_a_loss_of_background_only() -> None:
    model = detector().train()
    empty = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
    losses = model(images()[:1], SIZES[:1], [empty])
    assert losses["bbox_regression"].item() == 0.0
    assert losses["classification"].item() > 0.0


def test_thresholds_limit_the_detections() -> None:
    kept = Thresholds(score=0.0, nms=0.5, detections=7)
    with torch.no_grad():
        found = detector(thresholds=kept).eval()(images(), SIZES)
    assert [len(f["boxes"]) for f in found] == [7, 7]
    for f, (height, width) in zip(found, SIZES, strict=True):
        assert float(f["boxes"].min()) >= 0
        assert float(f["boxes"][:, 2].max()) <= width
        assert float(f["boxes"][:, 3].max()) <= height
    none = detector(thresholds=Thresholds(score=0.05)).eval()(images(), SIZES)
    assert [len(f["boxes"]) for f in none] == [0, 0]  # a new head gives 0.01


def test_a_saved_detector_is_loaded_with_the_same_detections(tmp_path: Path) -> None:
    kept = Thresholds(score=0.0)
    model = detector(thresholds=kept).eval()
    save_detector(tmp_path, model, classes=["a", "b", "c"], img_size=64)
    loaded = load_detector(tmp_path, thresholds=kept)
    for one, two in zip(model(images(), SIZES), loaded(images(), SIZES), strict=True):
        assert all(torch.equal(one[name], two[name]) for name in one)


def test_classifiers_and_detectors_are_not_taken_for_each_other(tmp_path: Path) -> None:
    model = detector()
    save_detector(tmp_path / "detector", model, classes=["a", "b", "c"], img_size=64)
    with pytest.raises(ConfigError, match="is a detector of `mealv2 transfer-detection`"):
        create_classifier("test_resnet", num_classes=3, checkpoint=tmp_path / "detector")
    start = create_classifier("test_resnet", num_classes=3)
    save_classifier(tmp_path / "model", start, classes=["a", "b", "c"], img_size=64)
    with pytest.raises(ConfigError, match="is not a detector"):
        load_detector(tmp_path / "model")


def test_a_model_without_a_pyramid_is_an_error_that_names_its_strides() -> None:
    with pytest.raises(ConfigError, match=r"test_vit has no features of strides 8, 16 and 32"):
        detector("test_vit")
