"""mealv2.models.factory: students and teachers of the user's own code, and of model folders."""

import json
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from cases import mostly_slow
from mealv2.errors import ConfigError
from mealv2.models import create_classifier, read_metadata
from mealv2.models.factory import is_factory

CODE = """
import torch
from torch import nn

def small(num_classes=5, width=4):
    return nn.Sequential(
        nn.Conv2d(3, width, 3, stride=2), nn.BatchNorm2d(width), nn.ReLU(),
        nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(16 * width, num_classes),
    )

def fixed():
    return small(3)

def seen(num_classes, img_size, pretrained):
    model = small(num_classes)
    model.seen = (num_classes, img_size, pretrained)
    return model

def fails(num_classes):
    raise RuntimeError("the disk is on fire")

def text(num_classes):
    return "model"

def pictures(num_classes):
    return nn.Identity()

class Late(nn.Module):
    def forward(self, images):
        if self.training:
            from own_scale import SCALE
            images = images * SCALE
        return images.mean(dim=(2, 3))

def late(num_classes):
    return Late()

number = 3
"""


@pytest.fixture
def own_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The name of a module in the current folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    package = tmp_path / "own_models"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "nets.py").write_text(CODE)
    (package / "broken.py").write_text("import a_module_that_is_missing\n")
    yield "own_models.nets"
    for name in [name for name in sys.modules if name.split(".")[0] == "own_models"]:
        del sys.modules[name]


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("pkg.module:factory", True),
        ("models:net", True),
        ("resnet18.a1_in1k", False),
        ("local-dir:runs", False),
        ("hf-hub:user/model", False),
        ("models:net@sha256:12345678", False),
        ("a/b:c", False),
        ("models:", False),
        (":net", False),
        ("1a:b", False),
    ],
)
def test_a_function_is_named_as_module_and_function(name: str, found: bool) -> None:
    assert is_factory(name) is found


def test_a_function_gets_what_it_takes_and_its_model_is_normalised(own_code: str) -> None:
    model = create_classifier(f"{own_code}:seen", num_classes=7, img_size=32, pretrained=True)
    assert model.backbone.seen == (7, 32, True)
    assert (model.num_classes, model.tag) == (7, "own_models.nets:seen")
    assert model.preprocessing.mean == (0.485, 0.456, 0.406)
    images = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8)
    model.eval()
    expected = model.backbone((images / 255 - model.mean_13) / model.std_13)
    assert torch.allclose(model(images), expected)
    assert create_classifier(f"{own_code}:small", num_classes=None).num_classes == 5


def test_a_forward_pass_may_import_a_neighbour(own_code: str, tmp_path: Path) -> None:
    (tmp_path / "own_scale.py").write_text("SCALE = 2.0\n")
    path = list(sys.path)
    for _ in range(2):
        model = create_classifier(f"{own_code}:late", num_classes=3, img_size=32)
    assert sys.path == [*path, str(tmp_path)]  # the last one: it hides no module of others
    images_BCHW = torch.rand(2, 3, 32, 32)
    model.eval()
    expected_BC = 2 * model.backbone(images_BCHW)
    model.train()
    assert torch.allclose(model.backbone(images_BCHW), expected_BC)
    del sys.modules["own_scale"]


@pytest.mark.parametrize(
    ("name", "named"),
    [
        ("own_models.nets:large", "has no function large"),
        ("own_models.nets:number", "has no function number"),
        ("own_models.other:net", "no module own_models.other in .* PACKAGE.MODULE:FUNCTION"),
        ("no_such_package:net", "no module no_such_package in"),
        ("own_models.broken:net", "cannot be imported: No module named 'a_module_that_is_missing'"),
        ("own_models.nets:fails", "cannot be built: the disk is on fire"),
        ("own_models.nets:text", "returns a str, no module"),
        ("own_models.nets:pictures", r"gives \(2, 3, 32, 32\) for 2 images"),
        ("own_models.nets:fixed", "gives 3 logits, 4 classes are needed"),
    ],
)
def test_a_function_that_makes_no_classifier_is_named(own_code: str, name: str, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        create_classifier(name, num_classes=4, img_size=32)


def test_own_code_is_trained_resumed_evaluated_and_exported(
    own_code: str,
    data_dir: Path,
    labels_dir: Path,
    done: Callable[..., Any],
    run_cli: Callable[..., Any],
    weights: Callable[[Path], dict[str, bytes]],
    tmp_path: Path,
) -> None:
    name = f"{own_code}:small"
    flags = ("distill", "--data-dir", data_dir, "--labels", labels_dir, "--model", name)
    more = ("--batch-size", 12, "--workers", 0, "--no-pretrained")
    done(*flags, *more, "--decay-rate", 1, "--epochs", 2, "--output", "whole")
    done(*flags, *more, "--decay-rate", 1, "--epochs", 1, "--output", "part")
    done("distill", "--resume", "part", "--epochs", 2)
    assert weights(tmp_path / "part") == weights(tmp_path / "whole")
    stored = read_metadata(tmp_path / "whole" / "student")
    assert stored["architecture"] == name

    evaluate = ("evaluate", "--data-dir", data_dir, "--checkpoint", "whole", "--json")
    report = done(*evaluate, "--model", name).report
    assert report["model"] == name
    refused = run_cli(*evaluate)
    assert refused.code == 2
    assert f"give --model {name}" in refused.stderr

    export = ("export", "whole", "--to", "torchscript", "--output", "own.pt")
    refused = run_cli(*export)
    assert refused.code == 2
    assert f"give --model {name}" in refused.stderr
    assert not Path("own.pt").exists()
    refused = run_cli("export", "whole", "--to", "timm", "--model", name)
    assert refused.code == 2
    assert "use --to onnx" in refused.stderr
    refused = run_cli("push", "whole", "hf://ant-lab/own", "--dry-run")
    assert refused.code == 2
    assert "is a model of your own code" in refused.stderr
    refused = run_cli(*export, "--model", f"{own_code}:fixed")
    assert "whole" in refused.stderr
    assert refused.code == 2
    assert done(*export, "--model", name).report["bytes"] > 0


def test_the_next_commands_of_a_run_of_own_code_run_as_they_are_printed(
    own_code: str, data_dir: Path, done: Callable[..., Any]
) -> None:
    name = f"{own_code}:small"
    flags = ("--data-dir", data_dir, "--model", name, "--no-pretrained", "--img-size", 32)
    more = ("--epochs", 1, "--batch-size", 12, "--workers", 0, "--output", "run")
    lines = done("finetune", *flags, *more).stderr.split("next: ")[1].splitlines()
    evaluate, export = (shlex.split(line)[1:] for line in lines)
    assert done(*evaluate, "--json", "--workers", 0).report["model"] == name
    assert export == ["export", "run", "--to", "onnx", "--model", name]
    pytest.importorskip("onnxruntime", reason="extra onnx")
    assert done(*export).report["bytes"] > 0


def test_own_code_is_a_teacher(
    own_code: str, data_dir: Path, done: Callable[..., Any], run_cli: Callable[..., Any]
) -> None:
    flags = ("--data-dir", data_dir, "--img-size", 32, "--num-views", 1, "--workers", 0)
    start = ("finetune", *flags[:4], "--model", f"{own_code}:small", "--no-pretrained")
    done(*start, "--epochs", 1, "--batch-size", 12, "--workers", 0, "--output", "teacher")
    done("precompute", *flags, "--teacher", f"{own_code}:small=teacher", "--output", "labels")
    plan = json.loads(Path("labels/plan.json").read_text())
    (teacher,) = plan["teachers"]
    assert teacher["model"] == f"{own_code}:small"
    online = ("distill", "--data-dir", data_dir, "--labels", "labels", "--missing", "teach")
    refused = run_cli(*online, "--model", "test_resnet", "--no-pretrained", "--output", "run")
    assert refused.code == 2
    assert f"--teacher {own_code}:small=RUN" in refused.stderr, "code that only a file names"


@pytest.mark.parametrize("source", mostly_slow(["local-dir", "relative"]))
def test_a_model_folder_is_named_as_timm_does(
    source: str,
    teacher_dirs: dict[str, Path],
    data_dir: Path,
    done: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    folder = teacher_dirs["test_efficientnet"]
    monkeypatch.chdir(folder.parent)
    name = f"local-dir:{folder if source == 'local-dir' else folder.name}"
    model = create_classifier(name, num_classes=3, pretrained=True, img_size=32)
    same = create_classifier("test_efficientnet", num_classes=3, checkpoint=folder, img_size=32)
    assert model.preprocessing == same.preprocessing
    assert model.tag == "test_efficientnet"
    images = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8)
    assert torch.equal(model.eval()(images), same.eval()(images))
    run = tmp_path / "run"
    flags = ("--data-dir", data_dir, "--img-size", 32, "--workers", 0, "--batch-size", 12)
    done("finetune", *flags, "--model", name, "--epochs", 1, "--output", run)
    done("evaluate", "--data-dir", data_dir, "--checkpoint", run, "--workers", 0)


def test_a_model_folder_that_is_missing_is_named() -> None:
    with pytest.raises(ConfigError, match=r"local-dir:nowhere cannot be read.*config\.json"):
        create_classifier("local-dir:nowhere", num_classes=3)
