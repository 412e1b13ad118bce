"""mealv2.models.cost: parameters of saved weights."""

from collections.abc import Callable
from pathlib import Path

import pytest

from mealv2.models.cost import model_cost, stored_parameters


@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
def test_parameters_of_saved_weights_are_those_of_the_model(
    make_model: Callable[..., Path], name: str
) -> None:
    known = model_cost(name, num_classes=3, img_size=32)
    assert known is not None
    assert stored_parameters(make_model(name) / "model.safetensors") == known.parameters


def test_weights_that_cannot_be_read_have_no_parameters(tmp_path: Path) -> None:
    assert stored_parameters(tmp_path / "none.safetensors") is None
    (tmp_path / "torn.safetensors").write_bytes(b"\x10")
    assert stored_parameters(tmp_path / "torn.safetensors") is None
