"""mealv2.models.weights: others' layouts give the same tensors; a pickle runs nothing."""

import argparse
import os
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import Tensor

from mealv2.errors import ConfigError
from mealv2.models.fitting import load_weights
from mealv2.models.weights import read_state

State = dict[str, Tensor]


@pytest.fixture(scope="module")
def state() -> State:
    """Real keys, with a features. part as VGG has it, and values that tell tensors apart."""
    with torch.device("meta"):
        keys = list(timm.create_model("vgg11_bn").state_dict())
    return {key: torch.full((2,), float(i)) for i, key in enumerate(keys)}


def prefixed(state: State, prefix: str) -> State:
    return {prefix + key: value for key, value in state.items()}


def of_vgg(state: State) -> State:
    """The official code wraps only the features of a VGG in DataParallel."""
    return {key.replace("features.", "features.module.", 1): v for key, v in state.items()}


def other(state: State) -> State:
    return {key: value + 1 for key, value in state.items()}


LAYOUTS: dict[str, Callable[[State], Any]] = {
    "plain": lambda s: s,
    "OrderedDict": OrderedDict,
    "module.": lambda s: prefixed(s, "module."),
    "features.module.": of_vgg,
    "module.features.module.": lambda s: prefixed(of_vgg(s), "module."),
    "_orig_mod.": lambda s: prefixed(s, "_orig_mod."),
    "_orig_mod.module.": lambda s: prefixed(s, "_orig_mod.module."),
    "module._orig_mod.": lambda s: prefixed(s, "module._orig_mod."),
    "state_dict": lambda s: {"state_dict": s, "epoch": 3, "best": 71.5},
    "state_dict, module.": lambda s: {"arch": "vgg", "state_dict": prefixed(s, "module.")},
    "model_state_dict": lambda s: {"model_state_dict": s, "optimizer": {"state": {}}},
    "model": lambda s: {"model": s, "optimizer": {"state": {}}, "lr": torch.tensor(0.1)},
    "net": lambda s: {"net": prefixed(s, "module."), "acc": 93.1},
    "net beside the model's name": lambda s: {"net": s, "model": "vgg11_bn"},
    "the average before the last": lambda s: {"state_dict": other(s), "state_dict_ema": s},
    "model_ema": lambda s: {"model": other(s), "model_ema": s},
    "no average": lambda s: {"state_dict": s, "state_dict_ema": None},
    "one in another": lambda s: {"state_dict": {"model": prefixed(s, "module.")}},
    "timm's training checkpoint": lambda s: {
        "epoch": 2,
        "arch": "vgg11_bn",
        "state_dict": s,
        "args": argparse.Namespace(model="vgg11_bn", lr=0.1, mean=[0.5], amp=None),
        "metric": 71.5,
    },
}


@pytest.mark.parametrize("name", ["w.pth", "model_state_07.pytar", "w.pth.tar"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_plain_tensors(
    state: State, tmp_path: Path, layout: str, name: str
) -> None:
    assert any(key.startswith("features.") for key in state)
    torch.save(LAYOUTS[layout](state), tmp_path / name)
    found = read_state(tmp_path / name)
    assert list(found) == list(state)
    assert all(torch.equal(found[key], state[key]) for key in state)


def test_the_format_before_torch_1_6_is_read(state: State, tmp_path: Path) -> None:
    torch.save(prefixed(state, "module."), tmp_path / "w.pth", _use_new_zipfile_serialization=False)
    assert list(read_state(tmp_path / "w.pth")) == list(state)


class MakesFolder:
    """Unpickled, it makes a folder: code that a pickle may run."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.path),)


EVIL: dict[str, Callable[[State, MakesFolder], Any]] = {
    "alone": lambda _, code: code,
    "beside the weights": lambda s, code: {"state_dict": s, "x": code},
    "as a tensor": lambda s, code: {**s, "fc.weight": code},
    "in a NumPy array": lambda s, code: {"state_dict": s, "x": np.array([code, 1], dtype=object)},
    "in timm's flags": lambda s, code: {"state_dict": s, "args": argparse.Namespace(x=code)},
}


@pytest.mark.parametrize("is_zip", [True, False])
@pytest.mark.parametrize("place", EVIL)
def test_a_pickle_with_code_is_refused_in_one_line_and_runs_nothing(
    state: State, tmp_path: Path, place: str, is_zip: bool
) -> None:
    path, trace = tmp_path / "w.pth", tmp_path / "ran"
    content = EVIL[place](state, MakesFolder(trace))
    torch.save(content, path, _use_new_zipfile_serialization=is_zip)
    with pytest.raises(ConfigError, match=r"w\.pth: it contains posix\.mkdir, which is never") as e:
        read_state(path)
    assert "\n" not in str(e.value)
    assert not trace.exists()
    torch.load(path, weights_only=False)  # it would have run otherwise
    assert trace.exists()


def test_a_whole_model_is_refused_with_advice(tmp_path: Path) -> None:
    torch.save(torch.nn.Linear(2, 2), tmp_path / "w.pth")
    with pytest.raises(ConfigError, match=r"linear\.Linear, which .*; save only its state_dict"):
        read_state(tmp_path / "w.pth")


@pytest.mark.parametrize("kept", [0, 10, 0.5, 0.99])
def test_a_torn_file_is_refused(state: State, tmp_path: Path, kept: float) -> None:
    path = tmp_path / "w.pth"
    torch.save(state, path)
    data = path.read_bytes()
    path.write_bytes(data[: int(kept if kept >= 1 else kept * len(data))])
    with pytest.raises(ConfigError, match=r"w\.pth: it is (damaged or has no weights$|empty)"):
        read_state(path)


def test_only_a_head_of_another_width_may_stay_new(tmp_path: Path) -> None:
    theirs, model = (timm.create_model("test_resnet", num_classes=n) for n in (5, 3))
    torch.save(theirs.state_dict(), tmp_path / "w.pth")
    head = model.fc.weight.clone()
    with pytest.raises(ConfigError, match=r"fc\.weight is \(5, 96\), the model has \(3, 96\)"):
        load_weights(model, tmp_path / "w.pth")
    load_weights(model, tmp_path / "w.pth", new_head=True)
    assert torch.equal(model.fc.weight, head)
    assert torch.equal(model.conv1[0].weight, theirs.conv1[0].weight)

    state = theirs.state_dict()
    state["bn1.weight"] = torch.ones(7)
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(ConfigError, match=r"bn1\.weight is \(7,\), the model"):
        load_weights(model, tmp_path / "w.pth", new_head=True)
