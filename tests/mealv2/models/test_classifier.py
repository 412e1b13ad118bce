"""mealv2.models.classifier: names, checkpoints in and out, what does not fit, hashes."""

import os
import time
from collections.abc import Callable
from pathlib import Path

import huggingface_hub.constants
import pytest
import safetensors.torch
import timm
import torch
from torch import Tensor, nn

from mealv2.errors import ConfigError, MealError
from mealv2.models import (
    Classifier,
    Preprocessing,
    create_classifier,
    read_metadata,
    save_classifier,
    weights_sha256,
)
from mealv2.models.fitting import load_weights
from mealv2.models.timm_models import current_name
from mealv2.storage import reachable
from mealv2.storage.json_format import read_json
from mealv2.storage.weight_files import find_checkpoint
from stores import silent_server

CLASSES = ["ant", "bee", "größer Bär", "猫"]


def small_model(name: str = "test_resnet", *, seed: int = 0, **settings: object) -> Classifier:
    """Return a model in eval mode: a checkpoint's, or of weights and batch statistics by seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = create_classifier(name, **{"num_classes": len(CLASSES), **settings})
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d) and "checkpoint" not in settings:
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2.0)
    return model.eval()


@pytest.fixture
def images() -> Tensor:
    return torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def logits(model: nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad():
        return model.eval()(images)


# --- names ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "near"),
    [("resnet5", "resnet50"), ("mobilnetv3_large_100", "mobilenetv3_large_100")],
)
def test_an_unknown_name_suggests_near_ones(name, near):
    with pytest.raises(
        ConfigError, match=rf"unknown model '{name}'; did you mean .*{near}"
    ) as caught:
        create_classifier(name, num_classes=2)
    assert caught.value.exit_code == 2


def test_a_name_near_to_none_is_refused_too():
    with pytest.raises(ConfigError, match=r"unknown model 'xyzzyplugh'; see timm\.list_models"):
        create_classifier("xyzzyplugh", num_classes=2)


def test_an_unknown_tag_is_refused_with_the_tags_there_are():
    with pytest.raises(
        ConfigError, match=r"resnet50 has no weights 'resnet50\.nope'; tags: .*a1_in1k"
    ):
        create_classifier("resnet50.nope", num_classes=2)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("gluon_senet154", "senet154.gluon_in1k"),
        ("gluon_resnet152_v1s", "resnet152s.gluon_in1k"),
        ("tf_efficientnet_b4_ns", "tf_efficientnet_b4.ns_jft_in1k"),
        ("resnet50", "resnet50"),
    ],
)
def test_the_papers_names_mean_todays(old, new):
    assert current_name(old) == new


def test_pretrained_weights_without_a_network_end_in_an_error_with_advice(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    advice = "check the network or the Hugging Face cache, pass a file .*--initial-checkpoint"
    with pytest.raises(MealError, match=f"weights of test_resnet.r160_in1k .*{advice}") as caught:
        create_classifier("test_resnet.r160_in1k", num_classes=4, pretrained=True)
    assert "\n" not in str(caught.value)


@pytest.fixture
def silent_hub(monkeypatch, tmp_path):
    """A hub that accepts connections and never responds, and an empty cache."""
    monkeypatch.setattr(reachable, "RESPONSE_TIMEOUT_S", 0.2)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with silent_server() as url:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", url)
        yield url


def test_a_hub_that_never_responds_is_an_error_in_seconds(silent_hub):
    began = time.monotonic()
    with pytest.raises(MealError) as caught:
        create_classifier("test_resnet.r160_in1k", num_classes=4, pretrained=True)
    assert time.monotonic() - began < 10
    assert str(caught.value).startswith(
        "cannot load the pretrained weights of test_resnet.r160_in1k (cannot reach "
        f"{silent_hub}: no response in 0.2 s, and the cache has no copy); "
    )
    assert not huggingface_hub.constants.HF_HUB_OFFLINE


def test_weights_in_the_cache_need_no_hub(silent_hub, tmp_path):
    repository = tmp_path / "models--timm--test_resnet.r160_in1k"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    state = timm.create_model("test_resnet").state_dict()
    safetensors.torch.save_file(state, snapshot / "model.safetensors")
    began = time.monotonic()
    model = create_classifier("test_resnet.r160_in1k", num_classes=None, pretrained=True)
    assert time.monotonic() - began < 10
    assert all(torch.equal(state[name], t) for name, t in model.backbone.state_dict().items())


# --- normalisation --------------------------------------------------------------------------------


def test_images_are_normalised_with_the_models_own_mean_and_std(images):
    model = small_model("test_efficientnet")
    assert model.preprocessing == Preprocessing((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    mean, std = (
        torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    )
    torch.testing.assert_close(logits(model, images), logits(model.backbone, (images - mean) / std))
    assert small_model("test_resnet").preprocessing.mean == (0.5, 0.5, 0.5)


def test_given_preprocessing_goes_before_the_checkpoints_and_that_before_timms(tmp_path):
    given, of_file = (Preprocessing((m, m, m), (0.3, 0.3, 0.3)) for m in (0.1, 0.2))
    save_classifier(tmp_path, small_model(preprocessing=of_file), classes=CLASSES, img_size=64)
    assert small_model(checkpoint=tmp_path).preprocessing == of_file
    assert small_model(checkpoint=tmp_path, preprocessing=given).preprocessing == given


# --- a model folder -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "test_resnet",
        "test_efficientnet",
        "test_vit",
    ],
)
def test_timm_loads_a_saved_folder_and_gives_equal_outputs(tmp_path, images, name):
    model = small_model(name, img_size=64)
    save_classifier(tmp_path / "student", model, classes=CLASSES, img_size=64)
    loaded = timm.create_model(f"local-dir:{tmp_path / 'student'}", pretrained=True)
    assert torch.equal(logits(loaded, images), logits(model.backbone, images))
    config = timm.data.resolve_data_config(model=loaded)
    assert tuple(config["input_size"]) == (3, 64, 64)
    assert Preprocessing(tuple(config["mean"]), tuple(config["std"])) == model.preprocessing
    assert (config["interpolation"], config["crop_pct"]) == ("bilinear", 224 / 256)
    assert read_json(tmp_path / "student" / "config.json")["label_names"] == CLASSES


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "test_vit"])
def test_a_saved_folder_loads_again_with_equal_outputs(tmp_path, images, name):
    model = small_model(name, img_size=64)
    save_classifier(tmp_path, model, classes=CLASSES, img_size=64)
    for path in (tmp_path, tmp_path / "model.safetensors"):
        loaded = small_model(name, seed=1, img_size=64, checkpoint=path, classes=CLASSES)
        assert torch.equal(logits(loaded, images), logits(model, images))
    assert read_metadata(tmp_path) == {
        "architecture": name,
        "classes": CLASSES,
        "img_size": 64,
        "mean": list(model.preprocessing.mean),
        "std": list(model.preprocessing.std),
        "weights_sha256": weights_sha256(model.backbone),
    }


def test_a_flipped_bit_in_saved_weights_is_noticed(tmp_path, flipped_bit):
    save_classifier(tmp_path, small_model(), classes=CLASSES, img_size=64)
    flipped_bit(tmp_path / "model.safetensors")  # the middle of the file lies in a tensor
    with pytest.raises(ConfigError, match=r"model\.safetensors is damaged"):
        small_model(img_size=64, checkpoint=tmp_path, classes=CLASSES)


def test_saving_the_same_model_again_gives_equal_bytes(tmp_path):
    model, files = small_model(), []
    for _ in range(12):
        save_classifier(tmp_path, model, classes=CLASSES, img_size=64)
        files.append([(tmp_path / n).read_bytes() for n in ("config.json", "model.safetensors")])
    assert all(file == files[0] for file in files)


def test_a_run_folder_means_the_student_in_it(tmp_path):
    save_classifier(tmp_path / "run" / "student", small_model(), classes=CLASSES, img_size=64)
    expected = tmp_path / "run" / "student" / "model.safetensors"
    assert find_checkpoint(tmp_path / "run") == find_checkpoint(expected) == expected
    with pytest.raises(ConfigError, match=r"no checkpoint at .*/elsewhere \(looked for"):
        find_checkpoint(tmp_path / "elsewhere")


# --- checkpoints of others ------------------------------------------------------------------------


def prefixed(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"module.{key}": value for key, value in state.items()}


FORMATS: dict[str, tuple[str, Callable[[dict[str, Tensor], Path], None]]] = {
    "safetensors": ("w.safetensors", safetensors.torch.save_file),
    "a plain state dict": ("w.pth", torch.save),
    "module. prefixes": ("w.pth", lambda state, path: torch.save(prefixed(state), path)),
    "state_dict with module. prefixes": (
        "w.pth.tar",
        lambda state, path: torch.save({"state_dict": prefixed(state), "epoch": 3}, path),
    ),
}


@pytest.mark.parametrize("kind", FORMATS)
def test_weights_load_from(tmp_path, images, kind):
    name, save = FORMATS[kind]
    teacher = small_model(seed=3)
    save(teacher.backbone.state_dict(), tmp_path / name)
    model = small_model(seed=4, checkpoint=tmp_path / name)
    assert torch.equal(logits(model, images), logits(teacher, images))
    assert model.tag == "test_resnet"


class MakesFolder:
    """Unpickled, it makes a folder: code that a pickle may run."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.path),)


def test_a_pickle_with_code_is_refused_and_its_code_is_not_run(tmp_path):
    path, trace = tmp_path / "evil.pth", tmp_path / "ran"
    torch.save({"state_dict": small_model().backbone.state_dict(), "x": MakesFolder(trace)}, path)
    with pytest.raises(ConfigError, match="cannot read checkpoint"):
        create_classifier("test_resnet", num_classes=4, checkpoint=path)
    assert not trace.exists()
    torch.load(path, weights_only=False)  # it would have run otherwise
    assert trace.exists()


@pytest.mark.parametrize("name", ["w.safetensors", "w.pth"])
@pytest.mark.parametrize("data", [b"", b"not weights" * 20], ids=["empty", "text"])
def test_a_damaged_file_is_refused_by_name_in_one_line(tmp_path, name, data):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ConfigError, match=f"cannot read checkpoint .*{name}") as caught:
        create_classifier("test_resnet", num_classes=4, checkpoint=tmp_path / name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "content",
    [[1, 2], {"state_dict": 3}, dict.fromkeys(small_model().backbone.state_dict(), 1)],
    ids=["a list", "a number", "numbers by the right names"],
)
def test_a_file_of_something_else_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(ConfigError, match=r"checkpoint .*w\.pth"):
        create_classifier("test_resnet", num_classes=4, checkpoint=tmp_path / "w.pth")


def test_weights_of_another_architecture_are_refused(tmp_path):
    save_classifier(tmp_path, small_model("test_efficientnet"), classes=CLASSES, img_size=64)
    with pytest.raises(
        ConfigError, match=r"another model: 15 of the model.s 92 .*missing .*unknown"
    ):
        small_model("test_resnet", checkpoint=tmp_path)


def test_a_head_of_another_width_is_refused_naming_both_widths(tmp_path):
    save_classifier(tmp_path, small_model(), classes=CLASSES, img_size=64)
    with pytest.raises(ConfigError, match=r"fc\.weight is \(4, 96\), the model has \(7, 96\)"):
        small_model(num_classes=7, checkpoint=tmp_path)


def test_refused_weights_leave_the_model_as_it_was(tmp_path):
    save_classifier(tmp_path, small_model(), classes=CLASSES, img_size=64)
    model = small_model(seed=5, num_classes=7)
    before = weights_sha256(model)
    with pytest.raises(ConfigError):
        load_weights(model.backbone, tmp_path)
    assert weights_sha256(model) == before


@pytest.mark.parametrize(
    ("classes", "reason"),
    [
        (["ant", "bee", "größer Bär", "dog"], "first difference: '猫' / 'dog'"),
        (["bee", "ant", "größer Bär", "猫"], "first difference: 'ant' / 'bee'"),
        (CLASSES[:3], "it has 4, the data 3"),
    ],
    ids=["another name", "another order", "fewer"],
)
def test_weights_of_other_classes_are_refused_naming_the_difference(tmp_path, classes, reason):
    save_classifier(tmp_path, small_model(), classes=CLASSES, img_size=64)
    with pytest.raises(ConfigError, match=f"trained on other classes: .*{reason}"):
        small_model(checkpoint=tmp_path, classes=classes)


# --- hash of the weights --------------------------------------------------------------------------


@pytest.mark.parametrize("bit", [0, 31])
@pytest.mark.parametrize("key", ["conv1.0.weight", "fc.bias", "bn1.running_mean"])
def test_weights_sha256_changes_with_one_bit(key, bit):
    model = small_model()
    before = weights_sha256(model)
    words = model.backbone.state_dict()[key].view(torch.int32).view(-1)
    words[-1] ^= -(2**31) if bit == 31 else 1 << bit
    assert weights_sha256(model) != before
    words[-1] ^= -(2**31) if bit == 31 else 1 << bit
    assert weights_sha256(model) == before


def test_weights_sha256_does_not_depend_on_how_tensors_lie_in_memory():
    model = small_model()
    before = weights_sha256(model)
    assert weights_sha256(model.to(memory_format=torch.channels_last)) == before
    weight = model.backbone.conv1[0].weight
    assert not weight.is_contiguous()


def test_weights_sha256_distinguishes_names_types_and_shapes():
    modules = [
        nn.Linear(2, 3, bias=False),
        nn.Linear(3, 2, bias=False),
        nn.Linear(2, 3, bias=False),
    ]
    for module in modules:
        nn.init.zeros_(module.weight)
    modules[2].half()
    named = nn.ModuleDict({"x": modules[0]})
    assert len({weights_sha256(module) for module in [*modules, named]}) == 4


# --- arguments of the model ---------------------------------------------------------------------


def test_arguments_that_change_the_architecture_are_kept_with_the_weights(tmp_path: Path) -> None:
    model = create_classifier("test_vit", num_classes=3, img_size=32, model_args={"depth": 2})
    save_classifier(tmp_path, model, classes=["a", "b", "c"], img_size=32)
    own = create_classifier("test_vit", num_classes=3, img_size=32, checkpoint=tmp_path)
    of_timm = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    expected = model.backbone.state_dict()
    for found in (own.backbone.state_dict(), of_timm.state_dict()):
        assert len(found) < len(timm.create_model("test_vit").state_dict())
        assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_arguments_of_a_file_name_no_other_file(tmp_path: Path) -> None:
    model = create_classifier("test_vit", num_classes=3, img_size=32)
    model.model_args = {"checkpoint_path": str(tmp_path / "other.pt")}
    save_classifier(tmp_path, model, classes=["a", "b", "c"], img_size=32)
    own = create_classifier("test_vit", num_classes=3, img_size=32, checkpoint=tmp_path)
    assert own.model_args == {}


def test_dropout_rates_reach_the_model_and_are_not_kept() -> None:
    rates = {"drop_rate": 0.25, "drop_path_rate": 0.5}
    model = create_classifier("test_vit", num_classes=3, img_size=32, **rates)
    assert model.backbone.head_drop.p == 0.25
    assert model.backbone.blocks[-1].drop_path1.drop_prob == 0.5
    assert model.model_args == {}
