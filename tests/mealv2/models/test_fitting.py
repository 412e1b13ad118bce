"""mealv2.models.fitting: whose weights fit, what is said about them, and what is refused."""

import io
import itertools
import pickle
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from timm.layers import resample_abs_pos_embed
from torch import Tensor

from mealv2.errors import ConfigError
from mealv2.models import Classifier, create_classifier
from mealv2.models.fitting import load_weights

State = dict[str, Tensor]


def of_timm(name: str = "test_resnet", **settings: Any) -> State:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        state: State = timm.create_model(name, **{"num_classes": 3} | settings).state_dict()
    return state


@pytest.fixture(scope="module")
def state() -> State:
    return of_timm()


def loaded(path: Path, name: str = "test_resnet", **settings: Any) -> Classifier:
    return create_classifier(
        name, **{"num_classes": 3, "img_size": 64, "checkpoint": path} | settings
    )


def saved(content: Any, path: Path) -> Path:
    torch.save(content, path)
    return path


def prefixed(state: State, prefix: str) -> State:
    return {prefix + key: value for key, value in state.items()}


def equal(model: Classifier, state: State) -> bool:
    own = model.backbone.state_dict()
    return own.keys() == state.keys() and all(torch.equal(own[key], state[key]) for key in own)


# --- what others put around and beside the weights ------------------------------------------------

PREFIXES = ("model.", "timm_model.", "ema_model.", "_orig_mod.", "module.")


@pytest.mark.parametrize("nested", list(itertools.product(PREFIXES, PREFIXES)), ids="".join)
def test_prefixes_are_removed_in_any_nesting(
    state: State, tmp_path: Path, nested: tuple[str, str]
) -> None:
    model = timm.create_model("test_resnet", num_classes=3)
    for prefix in ("".join(nested), "module." + "".join(nested)):
        load_weights(model, saved(prefixed(state, prefix), tmp_path / "w.pth"))
        own = model.state_dict()
        assert all(torch.equal(own[key], state[key]) for key in own)
        model.load_state_dict({key: torch.zeros_like(value) for key, value in own.items()})


def test_an_average_beside_the_weights_is_used(state: State, tmp_path: Path) -> None:
    last = {key: value + 1 for key, value in state.items()}
    content = prefixed(last, "model.") | prefixed(state, "ema_model.module.")
    assert equal(loaded(saved(content, tmp_path / "w.pth")), state)


def test_two_models_in_one_file_are_refused_by_their_prefixes(state: State, tmp_path: Path) -> None:
    path = saved(prefixed(state, "model.") | prefixed(state, "net."), tmp_path / "w.pth")
    with pytest.raises(ConfigError, match=r"under 'model\.' and 'net\.'; keep one"):
        loaded(path)


BESIDE: dict[str, Callable[[State], Any]] = {
    "no batch counters": lambda s: {k: v for k, v in s.items() if "num_batches" not in k},
    "SWA": lambda s: {"n_averaged": torch.tensor(3), **prefixed(s, "module.")},
    "thop": lambda s: s | {"total_ops": torch.zeros(1), "conv1.0.total_params": torch.ones(1)},
    "Lightning": lambda s: {"state_dict": prefixed(s, "model."), "hparams": {"lr": 0.1}},
    "NumPy scalar": lambda s: {"state_dict": s, "best": np.float64(77.1), "n": np.int64(3)},
    "NumPy array": lambda s: {"state_dict": s, "history": np.arange(3.0)},
    "a path": lambda s: {"state_dict": s, "args": {"output": Path("runs")}},
}


@pytest.mark.parametrize("content", BESIDE.values(), ids=list(BESIDE))
def test_what_trainers_and_profilers_leave_beside_the_weights_does_not_count(
    state: State, tmp_path: Path, content: Callable[[State], Any]
) -> None:
    assert equal(loaded(saved(content(state), tmp_path / "w.pth")), state)


@pytest.mark.parametrize("name", ["blob", "w.pth", "w.bin"])
def test_safetensors_is_known_by_its_content(state: State, tmp_path: Path, name: str) -> None:
    safetensors.torch.save_file(prefixed(state, "timm_model."), tmp_path / name)
    assert equal(loaded(tmp_path / name), state)


def test_a_file_of_torch_named_safetensors_is_read(state: State, tmp_path: Path) -> None:
    assert equal(loaded(saved(state, tmp_path / "w.safetensors")), state)


NPY = io.BytesIO()
np.save(NPY, np.zeros(4))
OTHER_CONTENT = {
    "Git LFS": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 9\n",
        "a Git LFS pointer, not the weights; fetch them with `git lfs pull`",
    ),
    "page": (b"\n<!DOCTYPE html><html></html>", "a web page, not weights"),
    "index": (b'{"weight_map": {}}', "JSON text, not weights"),
    "gzip": (b"\x1f\x8b\x08\x00", "compressed; unpack it first"),
    "NumPy": (NPY.getvalue(), "a NumPy array, not weights of torch"),
    "Keras": (b"\x89HDF\r\n\x1a\n....", "an HDF5 file"),
}


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
@pytest.mark.parametrize(("data", "what"), OTHER_CONTENT.values(), ids=list(OTHER_CONTENT))
def test_what_is_saved_as_weights_by_mistake_is_named(
    tmp_path: Path, data: bytes, what: str, suffix: str
) -> None:
    path = tmp_path / f"w.{suffix}"
    path.write_bytes(data)
    with pytest.raises(
        ConfigError, match=re.escape(f"cannot read checkpoint {path}: it is {what}")
    ):
        loaded(path)


def test_a_torchscript_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "w.pt"
    path.write_bytes(zip_of("w/constants.pkl", "w/data.pkl"))
    with pytest.raises(ConfigError, match="a TorchScript model; save its state_dict"):
        loaded(path)
    path.write_bytes(zip_of("readme.txt"))
    with pytest.raises(ConfigError, match=r"torch.save did not write \(first: readme.txt\)"):
        loaded(path)


def zip_of(*names: str) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name in names:
            archive.writestr(name, pickle.dumps(0))
    return file.getvalue()


# --- head and sizes -------------------------------------------------------------------------------


def test_a_start_with_other_classes_gets_a_new_head_and_says_so(tmp_path: Path) -> None:
    path = saved(of_timm(num_classes=1000), tmp_path / "w.pth")
    model = loaded(path, new_head=True)
    assert model.notes[1:] == [
        f"{path}: new head for 3 classes, the file's has 1000 classes",
    ]
    theirs = torch.load(path)
    for key, value in model.backbone.state_dict().items():
        assert key.startswith("fc.") or torch.equal(value, theirs[key])
    with pytest.raises(ConfigError, match=r"fc\.weight is \(1000, 96\), the model has \(3, 96\)"):
        loaded(path)


def test_a_start_without_a_head_gets_one(tmp_path: Path) -> None:
    path = saved(of_timm(num_classes=0), tmp_path / "w.pth")
    assert f"{path}: new head for 3 classes, the file has none" in loaded(path, new_head=True).notes
    with pytest.raises(ConfigError, match=r"2 are missing \(first: fc\.bias\)"):
        loaded(path)


def test_a_head_of_the_same_width_is_kept(state: State, tmp_path: Path) -> None:
    model = loaded(saved(state, tmp_path / "w.pth"), new_head=True)
    assert equal(model, state)
    assert len(model.notes) == 1  # its SHA-256


def test_a_few_tensors_without_a_place_are_named(state: State, tmp_path: Path) -> None:
    path = saved(state | {"projection.weight": torch.ones(2, 2)}, tmp_path / "w.pth")
    notes = loaded(path, new_head=True).notes
    said = f"{path}: 1 tensor without a place in the model not used (projection.weight)"
    assert said in notes
    with pytest.raises(ConfigError, match=r"1 of the file's \d+ are unknown"):
        loaded(path)


@pytest.mark.parametrize("name", ["test_efficientnet", "test_vit", "resnet18"])
def test_another_architecture_is_refused_by_the_share_that_fits(tmp_path: Path, name: str) -> None:
    path = saved(of_timm(name, num_classes=1000), tmp_path / "w.pth")
    with pytest.raises(ConfigError) as caught:
        loaded(path, new_head=True)
    found = re.fullmatch(
        rf"checkpoint {path} is of another model: (\d+) of the model's (\d+) tensors fit, .*; "
        "needed: all of the model's but its head, and 90% of the file's",
        str(caught.value),
    )
    assert found
    assert int(found[1]) < int(found[2]) / 2


@pytest.mark.parametrize("new_head", [True, False])
def test_position_embeddings_are_resampled_by_timm(tmp_path: Path, new_head: bool) -> None:
    theirs = of_timm("test_vit", img_size=160)
    path = saved(theirs, tmp_path / "w.pth")
    model = loaded(path, "test_vit", img_size=96, new_head=new_head)
    said = f"{path}: timm resampled pos_embed from another image size, (1, 101, 64) to (1, 37, 64)"
    assert said in model.notes
    own = model.backbone.state_dict()
    expected = resample_abs_pos_embed(theirs["pos_embed"], new_size=(6, 6), num_prefix_tokens=1)
    torch.testing.assert_close(own["pos_embed"], expected)
    assert all(torch.equal(own[key], theirs[key]) for key in own if key != "pos_embed")


def test_a_new_head_and_another_size_at_once(tmp_path: Path) -> None:
    path = saved(of_timm("test_vit", img_size=160, num_classes=7), tmp_path / "w.pth")
    notes = loaded(path, "test_vit", img_size=96, new_head=True).notes
    assert ["resampled" in note or "new head" in note for note in notes] == [False, True, True]


# --- a file without content -----------------------------------------------------------------------


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_a_file_of_the_right_shapes_with_one_value_is_refused(
    state: State, tmp_path: Path, value: float
) -> None:
    path = saved({k: torch.full_like(v, value) for k, v in state.items()}, tmp_path / "w.pth")
    for new_head in (True, False):
        with pytest.raises(ConfigError, match="every one of its weight tensors is constant"):
            loaded(path, new_head=new_head)


def test_weights_whose_outputs_do_not_depend_on_the_image_are_refused(
    state: State, tmp_path: Path
) -> None:
    first = next(key for key, value in state.items() if value.ndim == 4)
    dead = state | {first: torch.zeros_like(state[first])}
    with pytest.raises(ConfigError, match="outputs do not depend on the image"):
        loaded(saved(dead, tmp_path / "w.pth"))


def test_weights_that_are_no_numbers_are_refused(state: State, tmp_path: Path) -> None:
    bad = state | {"bn1.weight": torch.full_like(state["bn1.weight"], float("nan"))}
    with pytest.raises(ConfigError, match="outputs are not finite numbers"):
        loaded(saved(bad, tmp_path / "w.pth"))
