"""pipeline.labelling.teachers: what --teacher means, and which ensembles are refused."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from conftest import Result
from mealv2.errors import ConfigError
from mealv2.models import read_metadata
from pipeline.config import split_teachers
from pipeline.labelling import teachers
from pipeline.runtime.device import Runtime

CPU = Runtime(torch.device("cpu"), None)
CLASSES = ["ants", "bees", "cats"]


def build(*specs: str) -> tuple[torch.nn.Module, list[dict[str, object]]]:
    return teachers.build(specs, classes=CLASSES, img_size=32, runtime=CPU)


def test_repeated_flags_and_comma_lists_are_the_same(teacher_dirs: dict[str, Path]) -> None:
    specs = [f"{name}={path}" for name, path in teacher_dirs.items()]
    files = [(name, path / "model.safetensors") for name, path in teacher_dirs.items()]
    assert teachers.parse(specs) == files
    assert teachers.parse([", ".join(specs)]) == files


@pytest.mark.parametrize("name", ["seed=0,lr=0.01", "a,b", "test_resnet=x,y"])
def test_a_comma_in_a_path_that_exists_is_part_of_it(
    teacher_dirs: dict[str, Path], tmp_path: Path, name: str
) -> None:
    folder = tmp_path / "sweep" / name  # `mealv2 slurm sweep` makes such folders
    shutil.copytree(teacher_dirs["test_resnet"], folder)
    file = folder / "model.safetensors"
    spec, other = f"test_resnet={folder}", teacher_dirs["test_efficientnet"]
    assert teachers.parse([spec]) == [("test_resnet", file)]
    listed = teachers.parse([f"resnet50, {spec},test_efficientnet={other},resnet18"])
    found = [("resnet50", None), ("test_resnet", file)]
    found += [("test_efficientnet", other / "model.safetensors"), ("resnet18", None)]
    assert listed == found
    again = split_teachers(split_teachers([f"{spec},resnet50"]))
    assert again == (spec, "resnet50")


def test_name_alone_means_the_weights_of_timm() -> None:
    assert teachers.parse(["senet154.gluon_in1k,resnet50"]) == [
        ("senet154.gluon_in1k", None),
        ("resnet50", None),
    ]


@pytest.mark.parametrize("spec", ["", "a,,b", "=x", "a=", ","])
def test_spec_that_names_nothing_is_refused(spec: str) -> None:
    with pytest.raises(ConfigError, match="NAME or NAME=CHECKPOINT"):
        teachers.parse([spec])


def test_missing_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=str(tmp_path / "nowhere")):
        teachers.parse([f"test_resnet={tmp_path / 'nowhere'}"])


def test_teachers_are_described_by_tag_hash_and_normalisation(
    teacher_dirs: dict[str, Path],
) -> None:
    ensemble, described = build(*(f"{n}={p}" for n, p in teacher_dirs.items()))
    assert not ensemble.training
    assert [t["model"] for t in described] == ["test_resnet", "test_efficientnet"]
    assert described[0]["mean"] == [0.5, 0.5, 0.5]
    assert described[1]["std"] == [0.229, 0.224, 0.225]
    hashes = [str(t["weights_sha256"]) for t in described]
    assert len(set(hashes)) == 2
    assert all(len(digest) == 64 for digest in hashes)


def test_hash_tells_the_weights_apart(make_model: Callable[..., Path]) -> None:
    folders = [make_model("test_resnet", seed=seed) for seed in (3, 3, 4)]
    first, same, other = (build(f"test_resnet={f}")[1][0]["weights_sha256"] for f in folders)
    assert first == same
    assert first != other


def test_the_same_checkpoint_twice_is_refused(teacher_dirs: dict[str, Path]) -> None:
    spec = f"test_resnet={teacher_dirs['test_resnet']}"
    with pytest.raises(ConfigError, match="same weights"):
        build(spec, spec)


def test_two_files_with_the_same_weights_are_refused(make_model: Callable[..., Path]) -> None:
    specs = [f"test_resnet={make_model('test_resnet', seed=5)}" for _ in range(2)]
    with pytest.raises(ConfigError, match="same weights"):
        build(*specs)


@pytest.mark.parametrize(
    "classes",
    [("ants", "bees"), ("ants", "bees", "cats", "dogs"), ("ants", "cats", "bees")],
    ids=["fewer", "more", "other order"],
)
def test_teacher_of_other_classes_is_refused(
    make_model: Callable[..., Path], classes: tuple[str, ...]
) -> None:
    folder = make_model("test_resnet", classes=classes)
    with pytest.raises(ConfigError, match="class"):
        build(f"test_resnet={folder}")


def test_checkpoint_of_another_architecture_is_refused(teacher_dirs: dict[str, Path]) -> None:
    with pytest.raises(ConfigError, match="another model"):
        build(f"test_resnet={teacher_dirs['test_efficientnet']}")


def test_teacher_made_by_finetune_brings_its_normalisation(
    done: Callable[..., Result], finetune_flags: list[str], tmp_path: Path
) -> None:
    normalisation = ["--mean", 0.4, 0.5, 0.6, "--std", 0.2, 0.3, 0.4]
    done(*finetune_flags, "--epochs", 1, "--output", tmp_path / "run", *normalisation)
    _, described = build(f"test_resnet={tmp_path / 'run'}")
    assert (described[0]["mean"], described[0]["std"]) == ([0.4, 0.5, 0.6], [0.2, 0.3, 0.4])
    assert read_metadata(tmp_path / "run")["classes"] == CLASSES
