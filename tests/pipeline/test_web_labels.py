"""Commands with a label set on a web server: the results of the folder, without a full copy."""

import csv
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from range_server import RangeServer, range_server

from conftest import Result
from mealv2.dataset import SoftLabelDataset
from mealv2.label_set import LabelSet, ShardFile, web_set
from mealv2.label_set.shard import HEAD_SIZE
from mealv2.targets import StoredLabels

Run = Callable[..., Result]


@pytest.fixture
def server(labels_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[RangeServer]:
    # the shards are so small that their labels would come with the index
    monkeypatch.setattr(web_set, "_FIRST", HEAD_SIZE)
    monkeypatch.setattr(web_set, "_INDEX_OF_IMAGE", 0)
    with range_server(labels_dir) as server:
        yield server


@pytest.fixture
def cache(tmp_path: Path) -> list[Any]:
    return ["--cache-dir", tmp_path / "cache"]


def test_training_on_the_labels_of_a_web_server_is_training_on_those_of_a_folder(
    server: RangeServer,
    labels_dir: Path,
    distill_flags: list[str],
    cache: list[Any],
    tmp_path: Path,
    done: Run,
    weights: Callable[[Path], dict[str, bytes]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    read_ahead, rows_ahead = StoredLabels.read_ahead, list[int]()

    def counted(self: StoredLabels, positions: list[int], views: list[int]) -> None:
        rows_ahead.append(len(positions))
        read_ahead(self, positions, views)

    monkeypatch.setattr(StoredLabels, "read_ahead", counted)
    done(*distill_flags, "--output", tmp_path / "folder")
    rows_ahead.clear()
    place = distill_flags.index("--labels") + 1
    flags = [*distill_flags[:place], server.url, *distill_flags[place + 1 :]]

    result = done(*flags, *cache, "--output", tmp_path / "web")

    assert "fetched the index of 6 shards from http://127.0.0.1:" in result.stderr
    assert sum(rows_ahead) == 2 * len(LabelSet.open(labels_dir))
    sent = server.ranges_of()
    assert all(wanted for _, wanted in sent)  # no request for a whole shard
    assert len(sent) == len(set(sent))  # the second epoch has its blocks in the cache
    runs = [tmp_path / name for name in ("web", "folder")]
    losses = [
        [
            row["train_loss"]
            for row in csv.DictReader((run / "summary.csv").read_text().splitlines())
        ]
        for run in runs
    ]
    assert losses[0] == losses[1]
    assert weights(runs[0]) == weights(runs[1])
    assert json.loads((runs[0] / "labels.json").read_text())["path"] == server.url


def test_commands_that_read_a_label_set(
    server: RangeServer, labels_dir: Path, data_dir: Path, cache: list[Any], run_cli: Run, done: Run
) -> None:
    info = done("labels", "info", server.url, *cache).report
    assert info == done("labels", "info", labels_dir).report | {"labels": server.url}
    key = next(path for path in (data_dir / "train").rglob("*") if path.is_file())
    shown = ["labels", "show", server.url, key.relative_to(data_dir / "train"), "--json"]
    of_folder = ["labels", "show", labels_dir, *shown[3:]]
    assert done(*shown, *cache).report == done(*of_folder).report | {"labels": server.url}
    # these read every byte
    for command in ("verify", "status"):
        report = done("labels", command, server.url, *cache).report
        assert report == done("labels", command, labels_dir).report | {"labels": server.url}


def test_verify_finds_damage_at_the_server(
    labels_dir: Path,
    cache: list[Any],
    flipped_bit: Callable[..., None],
    tmp_path: Path,
    run_cli: Run,
) -> None:
    folder = shutil.copytree(labels_dir, tmp_path / "set")
    path = folder / "train-00001.h5"
    flipped_bit(path, ShardFile(path).labels_at + 5)
    with range_server(folder) as server:
        result = run_cli("labels", "verify", server.url, *cache)
        assert result.code == 3
        assert "train-00001.h5: has another SHA-256 (the labels of 1 image: " in result.stderr
        assert f"{server.url}: 1 of 7 files damaged or missing (train-00001.h5)" in result.stderr


def test_commands_that_write_refuse_a_web_server(
    server: RangeServer,
    distill_flags: list[str],
    precompute_flags: list[str],
    teacher_flags: list[str],
    data_dir: Path,
    tmp_path: Path,
    run_cli: Run,
) -> None:
    place = distill_flags.index("--labels") + 1
    flags = [*distill_flags[:place], server.url, *distill_flags[place + 1 :]]
    flags += ["--missing", "teach", "--write-back", *teacher_flags]
    commands = {
        "--write-back needs a local label set, not a URL": [*flags, "--output", tmp_path / "run"],
        "a web server takes no files, a label set there is only read": [
            *precompute_flags,
            "--output",
            server.url,
        ],
        "'LABELS': must be a local path, not a URL": [
            *("labels", "add-views", server.url, "--num-views", 9, "--data-dir", data_dir)
        ],
    }
    pipe = [*flags[: -len(teacher_flags) - 3], "--labels", "pipe:cat labels"]
    commands["a program has no label set; give a folder"] = [*pipe, "--output", tmp_path / "run"]
    for message, words in commands.items():
        result = run_cli(*words)
        assert result.code == 2
        assert message in result.stderr
    assert server.requests == []


def test_a_dataset_takes_the_url(
    server: RangeServer,
    labels_dir: Path,
    data_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))  # of the cache
    found, expected = (
        SoftLabelDataset(labels, data_dir, label="probs")[5, 2]
        for labels in (server.url, labels_dir)
    )
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
