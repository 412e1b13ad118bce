"""benchmarks/same_numbers.py and step_files.py: what their lines depend on, and that they run."""

import os
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from benchmarks import same_numbers, step_files

ROOT = Path(__file__).resolve().parents[2]


def run(script: str, *words: str) -> str:
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / script), *words],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


# --- same_numbers.py ----------------------------------------------------------------------------


@pytest.fixture
def label_set(tmp_path: Path) -> Path:
    folder = tmp_path / "set"
    (folder / "train").mkdir(parents=True)
    (folder / "manifest.json").write_bytes(b"{}")
    write_shard(folder / "train" / "0.h5", labels=[1, 2, 3])
    return folder


def write_shard(path: Path, **columns: list[int]) -> None:
    with h5py.File(path, "w") as file:
        for name, values in columns.items():
            file[name] = np.array(values, np.uint8)


def test_a_label_set_digest_depends_on_each_name_and_byte_and_on_no_path(label_set: Path) -> None:
    first = same_numbers.label_set_digests(label_set)
    moved = label_set.rename(label_set.with_name("other"))
    assert same_numbers.label_set_digests(moved) == first

    write_shard(moved / "train" / "0.h5", labels=[1, 2, 4])
    changed = same_numbers.label_set_digests(moved)
    assert {name for name in first if changed[name] != first[name]} == {"shards", "columns"}
    write_shard(moved / "train" / "0.h5", labels=[1, 2, 3], content_hashes=[5], header=[6])
    changed = same_numbers.label_set_digests(moved)
    assert {name for name in first if changed[name] != first[name]} == {"shards"}
    (moved / "train" / "0.h5").rename(moved / "train" / "1.h5")
    assert same_numbers.label_set_digests(moved)["shards"] != first["shards"]
    (moved / "manifest.json").write_bytes(b"[]")
    assert same_numbers.label_set_digests(moved)["manifest"] != first["manifest"]


def test_a_weights_digest_depends_on_the_last_bit_the_name_and_the_shape() -> None:
    weights = torch.ones(2, 3)
    last_bit = weights.clone()
    last_bit[1, 2] = torch.nextafter(torch.tensor(1.0), torch.tensor(2.0))
    found = [{"w": weights}, {"w": last_bit}, {"v": weights}, {"w": weights.reshape(3, 2)}]
    assert len({same_numbers.weights_digest(tensors) for tensors in found}) == 4


def test_figures_and_checkpoints_depend_on_values_and_on_no_name() -> None:
    table = "epoch,train_loss,val_top1\n1,0.5,\n2,0.25,50.0\n"
    renamed = "val_accuracy,epoch,loss\n,1,0.5\n50.0,2,0.25\n"
    assert same_numbers.figures_digest(table) == same_numbers.figures_digest(renamed)
    assert same_numbers.figures_digest(table) != same_numbers.figures_digest(
        table.replace("0.25", "0.2500001")
    )

    newer = "epoch,train_loss,val_top1,val_ece\n1,0.5,,\n2,0.25,50.0,3.5\n"
    assert same_numbers.figures_digest(table) == same_numbers.figures_digest(newer)

    state = {"student": {"w": torch.ones(2)}, "momentum": [torch.zeros(3)], "step": 4}
    other = {"optimizer": [{"m": torch.zeros(3)}], "model": (torch.ones(2),)}
    assert same_numbers.nameless_digest(state) == same_numbers.nameless_digest(other)
    state["student"] = {"w": torch.tensor([1.0, 1.0000001])}
    assert same_numbers.nameless_digest(state) != same_numbers.nameless_digest(other)


@pytest.mark.slow
def test_same_numbers_prints_the_same_lines_again_and_equal_runs_have_equal_lines() -> None:
    cases = ["--only", "labels-codec", "stored", "stored-resumed"]
    printed = run("same_numbers.py", *cases)
    assert run("same_numbers.py", *cases) == printed
    labels, stored, resumed = (line.split() for line in printed.splitlines())
    assert labels[:2] == ["labels-codec", "shards"]
    assert (stored[0], resumed[0]) == ("stored", "stored-resumed")
    assert stored[1:] == resumed[1:]


# --- step_files.py ------------------------------------------------------------------------------

LOOP = """
def loop(steps, read, loss):
    for number in range(steps):
        loss(read(number))
"""
READ = """
def read(number):
    return helper(number) if number == 0 else inner(number)
def inner(number):
    return number
"""
HELPER = "def helper(number):\n    return number\n"
LOSS = "def loss(number):\n    return after(number)\ndef after(number):\n    return number\n"


@pytest.fixture
def project(tmp_path: Path) -> Callable[..., None]:
    """A function that runs some steps of a project of four files."""
    found: dict[str, types.FunctionType] = {}
    for name, text in {"loop": LOOP, "read": READ, "helper": HELPER, "loss": LOSS}.items():
        path = tmp_path / "pipeline" / f"{name}.py"
        exec(compile(text, str(path), "exec"), found)
    return lambda steps: found["loop"](steps, found["read"], found["loss"])


@pytest.mark.parametrize(
    ("step", "files"),
    [
        (1, {"read.py": 1, "helper.py": 1, "loop.py": 0, "loss.py": 1}),
        (2, {"read.py": 1, "loop.py": 0, "loss.py": 1}),
    ],
)
def test_files_of_one_step_are_counted_with_the_calls_that_enter_them(
    project: Callable[..., None], tmp_path: Path, step: int, files: dict[str, int]
) -> None:
    recorder = step_files.Recorder(tmp_path, start="read", end="loss", step=step)
    before = sys.getprofile()
    sys.setprofile(recorder)
    try:
        project(3)
    finally:
        sys.setprofile(before)
    assert recorder.is_done
    expected = {f"pipeline/{name}": count for name, count in files.items()}
    assert list(recorder.entries.items()) == list(expected.items())


@pytest.mark.slow
def test_step_files_finds_the_step_of_this_project() -> None:
    head, *files = run("step_files.py").splitlines()
    assert head.startswith(f"{len(files)} files run ")
    assert len(files) > 5
