"""pipeline.training.trackers: what TensorBoard, W&B and trackio have after real runs, read back."""

import importlib
import json
import shutil
import sqlite3
import struct
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from conftest import Result, Spawned
from pipeline.config import FinetuneConfig
from pipeline.training import trackers
from pipeline.training.run_folder import RunFolder

Run = Callable[..., Result]
Events = Callable[[Path, str], list[dict[str, Any]]]
NETWORK = ("socket.connect", "socket.getaddrinfo")


def scalars(run: Path) -> dict[str, dict[int, list[float]]]:
    """Return what TensorBoard shows of a run: the values by name and step."""
    module = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="extra tensorboard"
    )
    found = module.EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0})
    found.Reload()
    values: dict[str, dict[int, list[float]]] = {}
    for name in found.Tags()["scalars"]:
        for event in found.Scalars(name):
            values.setdefault(name, {}).setdefault(event.step, []).append(event.value)
    return values


def same(events: list[dict[str, Any]], shown: dict[int, list[float]], name: str) -> bool:
    """Return whether a figure of metrics.jsonl was shown once at every step."""
    expected = {event["step"]: [pytest.approx(event[name], rel=1e-6)] for event in events}
    return bool(shown == expected)


def test_tensorboard_has_the_figures_of_the_log(
    done: Run, distill_flags: list[str], run: Path, events: Events
) -> None:
    pytest.importorskip("tensorboard", reason="extra tensorboard")
    done(*distill_flags, "--log-tensorboard", "--output", run)
    shown = scalars(run)
    for name in ("loss", "similarity_loss", "lr", "discriminator_loss"):
        assert same(events(run, "train"), shown[f"train/{name}"], name)
    for event, step in zip(events(run, "validation"), (0, 5, 10), strict=True):
        for name in ("top1", "agreement", "cross_entropy"):
            assert shown[f"val/{name}"][step] == [pytest.approx(event[name], rel=1e-6)]
    assert [shown["epoch/epoch"][step] for step in (5, 10)] == [[1.0], [2.0]]


def test_tensorboard_of_a_resumed_run_has_every_step_once(
    done: Run, finetune_flags: list[str], run: Path, tmp_path: Path, events: Events
) -> None:
    """As after kill -9: what came after the first epoch was logged, and runs again."""
    pytest.importorskip("tensorboard", reason="extra tensorboard")
    done(*finetune_flags, "--log-tensorboard", "--output", run)
    (run / "report.json").unlink()
    (run / "checkpoints" / "step-00000006.pt").unlink()
    done("finetune", "--resume", run)
    assert len(list((run / "tensorboard").iterdir())) == 2
    shown = scalars(run)
    assert [event["step"] for event in events(run, "train")] == list(range(1, 7))
    assert same(events(run, "train"), shown["train/loss"], "loss")
    assert shown["val/top1"].keys() == {0, 3, 6}
    assert all(len(values) == 1 for values in shown["val/top1"].values())


def test_a_run_without_trackers_imports_none_and_logs_the_same(
    done: Run, finetune_flags: list[str], run: Path, tmp_path: Path
) -> None:
    pytest.importorskip("tensorboard", reason="extra tensorboard")
    done(*finetune_flags, "--output", run)
    assert not {"tensorboard", "wandb", "trackers.json"} & {path.name for path in run.iterdir()}
    done(*finetune_flags, "--log-tensorboard", "--output", tmp_path / "logged")
    names = [path / "summary.csv" for path in (run, tmp_path / "logged")]
    assert names[0].read_text() == names[1].read_text()


# --- W&B and trackio ----------------------------------------------------------------------------


@pytest.fixture
def connections() -> list[tuple[Any, ...]]:
    """The addresses that this process looks up or connects to, but for sockets of this machine."""
    seen: list[tuple[Any, ...]] = []

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event not in NETWORK:
            return
        address = args[1] if event == "socket.connect" else args[:2]
        if isinstance(address, tuple) and address[0] not in ("127.0.0.1", "localhost", "::1"):
            seen.append((event, address))

    sys.addaudithook(hook)  # stays; the list does not
    return seen


def _wandb_records(path: Path) -> Iterator[bytes]:
    """Yield the records of a .wandb file: LevelDB's log format after a header of 7 bytes."""
    data, position, record = path.read_bytes(), 7, b""
    while position + 7 <= len(data):
        if (left := 32768 - position % 32768) < 7:
            position += left  # padding at the end of a block
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        record += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield record
            record = b""


def _wandb_history(run: Path) -> list[tuple[str, dict[str, Any]]]:
    """Return (id, figures) of every row in the files of W&B, oldest file first."""
    from wandb.proto import wandb_internal_pb2

    rows, name = [], ""
    for path in sorted(run.glob("wandb/offline-run-*/*.wandb")):
        for data in _wandb_records(path):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            if record.HasField("run"):
                name = record.run.run_id
            if record.HasField("history"):
                row = {i.key or "/".join(i.nested_key): i.value_json for i in record.history.item}
                rows.append((name, {key: json.loads(value) for key, value in row.items()}))
    return rows


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # W&B's own
def test_wandb_offline_has_every_step_once_in_one_run_and_connects_to_nothing(
    done: Run,
    finetune_flags: list[str],
    run: Path,
    events: Events,
    connections: list[Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("wandb", reason="extra wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    first = done(*finetune_flags, "--log-wandb", "--wandb-project", "digits", "--output", run)
    assert len(first.stdout.splitlines()) == 1
    (run / "report.json").unlink()
    (run / "checkpoints" / "step-00000006.pt").unlink()
    done("finetune", "--resume", run)
    rows = _wandb_history(run)
    assert {name for name, _ in rows} == {json.loads((run / "trackers.json").read_text())["id"]}
    losses = {row["_step"]: row["train/loss"] for _, row in rows if "train/loss" in row}
    assert losses == {event["step"]: event["loss"] for event in events(run, "train")}
    assert sum("train/loss" in row for _, row in rows) == 6
    assert [row["val/top1"] for _, row in rows if "val/top1" in row] == [
        event["top1"] for event in events(run, "validation")
    ]
    assert connections == []


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # trackio's own
def test_trackio_has_every_step_once_in_one_run_and_connects_to_nothing(
    done: Run,
    spawn: Callable[..., Spawned],
    finetune_flags: list[str],
    run: Path,
    events: Events,
    connections: list[Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # read at its import
    pytest.importorskip("trackio", reason="extra trackio")
    first = spawn(*finetune_flags, "--log-trackio", "--output", run).result()
    assert first.code == 0, first.stderr
    assert len(first.stdout.splitlines()) == 1, "trackio's lines are on stderr"
    (run / "report.json").unlink()
    (run / "checkpoints" / "step-00000006.pt").unlink()
    done("finetune", "--resume", run)
    (database,) = importlib.import_module("trackio.utils").TRACKIO_DIR.glob("mealv2*.db")
    with sqlite3.connect(database) as connection:
        found = connection.execute("select run_name, step, metrics from metrics order by step")
        rows = [(name, step, json.loads(metrics)) for name, step, metrics in found]
    connection.close()
    ident = json.loads((run / "trackers.json").read_text())["id"]
    assert {name for name, _, _ in rows} == {f"run-{ident}"}
    losses = [(step, row["train/loss"]) for _, step, row in rows if "train/loss" in row]
    assert losses == [(event["step"], event["loss"]) for event in events(run, "train")]
    assert connections == []


# --- what a user can get wrong ------------------------------------------------------------------


@pytest.mark.parametrize(("setting", "package"), trackers.PACKAGES.items())
def test_a_missing_package_is_one_line_with_the_command_before_torch_is_imported(
    run_cli: Run,
    finetune_flags: list[str],
    run: Path,
    monkeypatch: pytest.MonkeyPatch,
    setting: str,
    package: str,
) -> None:
    find_spec = importlib.util.find_spec

    def without(name: str, *args: Any) -> Any:
        return None if name == package else find_spec(name, *args)

    monkeypatch.setattr(importlib.util, "find_spec", without)
    monkeypatch.setattr("pipeline.finetune.run", lambda config: pytest.fail("it was started"))
    option = f"--{setting.replace('_', '-')}"
    result = run_cli(*finetune_flags, option, "--output", run)
    assert (result.code, result.stdout) == (2, "")
    assert result.stderr == f"mealv2: {option} needs {package}: pip install 'mealv2[{package}]'\n"
    assert not run.exists()


def test_the_id_of_a_run_stays_and_a_damaged_one_is_named(
    run_cli: Run, finetune_flags: list[str], tmp_path: Path
) -> None:
    ident = trackers._run_id(tmp_path)
    assert trackers._run_id(tmp_path) == ident
    (tmp_path / "trackers.json").write_text("{")
    with pytest.raises(trackers.MealError, match=r"trackers\.json is damaged .*remove it"):
        trackers._run_id(tmp_path)
    config = FinetuneConfig(data_dir=tmp_path, model="test_resnet", log_wandb=True)
    assert config.wandb_project == "mealv2"
    shutil.rmtree(tmp_path)


def test_a_folder_that_is_used_again_is_a_new_run_for_trackers(tmp_path: Path) -> None:
    """The first attempt died before a checkpoint; what it logged is not part of the run."""
    RunFolder.create(tmp_path, {})
    first = trackers._run_id(tmp_path)
    RunFolder.create(tmp_path, {})
    second = trackers._run_id(tmp_path)
    assert second != first
    RunFolder.reopen(tmp_path, epoch=0, step=1)
    assert trackers._run_id(tmp_path) == second, "a resumed run continues"


def test_project_without_a_tracker_of_projects_is_an_error(
    run_cli: Run, finetune_flags: list[str]
) -> None:
    result = run_cli(*finetune_flags, "--wandb-project", "digits")
    assert result.code == 2
    assert "--wandb-project has no effect without --log-wandb or --log-trackio" in result.stderr


def test_a_resumed_run_without_its_tracker_has_no_project(
    config_of: Run, run_cli: Run, tmp_path: Path
) -> None:
    values = {"data_dir": "/d", "model": "m", "log_wandb": True, "wandb_project": "digits"}
    (tmp_path / "config.json").write_text(json.dumps(values))
    resume = ("finetune", "--resume", tmp_path)
    assert config_of(*resume).wandb_project == "digits"
    assert config_of(*resume, "--no-log-wandb", "--log-trackio").wandb_project == "digits"
    found = config_of(*resume, "--no-log-wandb")
    assert (found.log_wandb, found.wandb_project) == (False, "mealv2")
    refused = run_cli(*resume, "--no-log-wandb", "--wandb-project", "digits")
    assert refused.code == 2
    assert "--wandb-project has no effect without" in refused.stderr
