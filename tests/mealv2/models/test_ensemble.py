"""ensemble: frozen teachers, each with its own normalisation, averaged after softmax."""

from contextlib import suppress

import numpy as np
import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import reference
from mealv2.models import Classifier, Preprocessing
from mealv2.models.ensemble import TeacherEnsemble, combine, unchanged

IMAGENET = Preprocessing((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALF = Preprocessing((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def teacher(name: str, preprocessing: Preprocessing, seed: int) -> Classifier:
    """Return a small timm model with dropout and batch statistics that are not the initial ones."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        backbone = timm.create_model(name, num_classes=5, drop_rate=0.5)
        for module in backbone.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2.0)
    return Classifier(backbone, tag=name, preprocessing=preprocessing)


@pytest.fixture
def teachers() -> list[Classifier]:
    return [teacher("test_resnet", IMAGENET, 1), teacher("test_efficientnet", HALF, 2)]


@pytest.fixture
def images() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (3, 3, 64, 64), dtype=torch.uint8, generator=generator)


def test_each_teacher_sees_its_own_mean_and_std(teachers, images):
    expected = []
    for model in teachers:
        mean, std = (
            torch.tensor(values, dtype=torch.float64).view(3, 1, 1)
            for values in (model.preprocessing.mean, model.preprocessing.std)
        )
        with torch.no_grad():
            expected.append(model.backbone.eval()(((images.double() / 255 - mean) / std).float()))
    logits = TeacherEnsemble(teachers).teacher_logits(images)
    torch.testing.assert_close(logits, torch.stack(expected), rtol=1e-4, atol=1e-5)
    swapped = [
        Classifier(model.backbone, tag="", preprocessing=other.preprocessing)
        for model, other in zip(teachers, reversed(teachers), strict=True)
    ]
    difference = TeacherEnsemble(swapped).teacher_logits(images) - logits
    assert float(difference.abs().amax(dim=(1, 2)).min()) > 0.01


def test_uint8_images_and_floats_in_0_1_give_the_same_answer(teachers, images):
    ensemble = TeacherEnsemble(teachers)
    of_bytes, of_floats = ensemble(images), ensemble(images.float() / 255)
    assert torch.equal(of_bytes.probs_BC, of_floats.probs_BC)
    assert torch.equal(of_bytes.mean_logits_BC, of_floats.mean_logits_BC)


def test_ensemble_stays_in_eval_mode_when_what_holds_it_trains(teachers, images):
    holder = nn.ModuleDict({"ensemble": TeacherEnsemble(teachers), "student": nn.Dropout()})
    before = {name: value.clone() for name, value in holder.state_dict().items()}
    first = holder["ensemble"](images)
    holder.train()
    assert holder["student"].training
    assert not any(module.training for module in holder["ensemble"].modules())
    assert torch.equal(holder["ensemble"](images).probs_BC, first.probs_BC)
    after = holder.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_no_gradient_reaches_teachers_or_images(teachers, images):
    ensemble = TeacherEnsemble(teachers)
    output = ensemble((images.float() / 255).requires_grad_())
    assert not output.probs_BC.requires_grad
    assert not output.mean_logits_BC.requires_grad
    assert not any(parameter.requires_grad for parameter in ensemble.parameters())


def test_probabilities_are_averaged_after_softmax_not_before():
    # teacher 0 is sure of class 0, teacher 1 a little of class 1: the two means disagree
    logits = torch.tensor([[[9.0, 0.0, 0.0]], [[0.0, 2.0, 0.0]]])
    output = combine(logits)
    expected = (torch.softmax(logits[0], 1) + torch.softmax(logits[1], 1)) / 2
    torch.testing.assert_close(output.probs_BC, expected)
    of_mean_logits = torch.softmax(output.mean_logits_BC, 1)
    assert float((output.probs_BC - of_mean_logits).abs().max()) > 0.3
    assert output.mean_logits_BC.tolist() == [[4.5, 1.0, 0.0]]


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(
    st.integers(1, 4),
    st.integers(1, 5),
    st.integers(2, 3000),
    st.sampled_from([0.1, 3.0, 30.0]),
    st.integers(0, 999),
)
def test_combine_agrees_with_float64(num_teachers, batch_size, num_classes, scale, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(num_teachers, batch_size, num_classes, generator=generator)
    probs, mean_logits = reference.ensemble(logits.numpy())
    output = combine(logits)
    assert output.probs_BC.dtype == output.mean_logits_BC.dtype == torch.float32
    np.testing.assert_allclose(output.probs_BC.numpy(), probs, rtol=1e-4, atol=1e-30)
    np.testing.assert_allclose(output.mean_logits_BC.numpy(), mean_logits, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(output.probs_BC.sum(1).numpy(), 1.0, atol=1e-5)


def test_half_precision_logits_are_averaged_in_float32():
    logits = torch.randn(3, 2, 100, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert torch.equal(combine(logits).probs_BC, combine(logits.float()).probs_BC)


def test_an_ensemble_without_teachers_raises_value_error():
    with pytest.raises(ValueError, match="at least one teacher"):
        TeacherEnsemble([])


@pytest.mark.parametrize("move", ["layout", "dtype", "device"])
def test_modules_of_the_caller_are_given_back_as_they_were(
    teachers: list[Classifier], images: Tensor, move: str
) -> None:
    module = teachers[0].train()
    module.backbone.conv1.eval()
    module.backbone.fc.weight.requires_grad_(False)
    module(images).square().mean().backward()
    before = dict(module.named_parameters()) | dict(module.named_buffers())
    values = {name: tensor.detach().clone() for name, tensor in before.items()}
    grads = {name: tensor.grad for name, tensor in before.items()}
    strides = {name: tensor.stride() for name, tensor in before.items()}
    frozen = {name for name, tensor in before.items() if not tensor.requires_grad}
    modes = [part.training for part in module.modules()]
    with suppress(KeyboardInterrupt), unchanged([module, module]):
        ensemble = TeacherEnsemble([module])
        moves = {"layout": {"memory_format": torch.channels_last}, "device": {"device": "meta"}}
        ensemble.to(**moves.get(move, {"dtype": torch.float64}))  # as on a GPU; other parameters
        module.register_forward_pre_hook(lambda *_: None)
        raise KeyboardInterrupt
    after = dict(module.named_parameters()) | dict(module.named_buffers())
    for name, tensor in after.items():
        assert tensor is before[name]  # as an optimizer has it
        assert torch.equal(tensor, values[name])
        assert tensor.stride() == strides[name]
        assert tensor.grad is grads[name]
        if tensor.grad is not None:
            assert (tensor.grad.dtype, tensor.grad.device) == (tensor.dtype, tensor.device)
    assert {name for name, tensor in after.items() if not tensor.requires_grad} == frozen
    assert [part.training for part in module.modules()] == modes
    assert not module._forward_pre_hooks
