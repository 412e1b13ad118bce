"""mealv2.data.hf_sets: data sets of `datasets`, from local builders and its cache, no network."""

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import datasets
import huggingface_hub
import pytest

from conftest import CLASSES, ROOT, Result
from hub import running_hub
from mealv2.data import hf_sets
from mealv2.data.folder import ImageFolder
from mealv2.data.hf_name import HfName, hf_name
from mealv2.data.open import open_source
from mealv2.data.source import fingerprint
from mealv2.errors import ConfigError, DataError
from mealv2.storage import reachable
from stores import silent_server


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache. `datasets` reads its variables when it is imported."""
    folder = tmp_path / "cache"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
    hf_sets._splits.cache_clear()
    yield folder
    hf_sets._splits.cache_clear()


@pytest.fixture
def on_disk(data_dir: Path, tmp_path: Path) -> Path:
    """The images of a tree in a folder of save_to_disk, with two columns of class labels."""
    found = {}
    for split, name in (("train", "train"), ("val", "test")):
        source = ImageFolder(data_dir, split)
        rows = {
            "img": [{"bytes": source.read(p), "path": None} for p in range(len(source))],
            "fine": list(source.labels),
            "coarse": [int(label > 0) for label in source.labels],
        }
        features = datasets.Features(
            {
                "img": datasets.Image(),
                "fine": datasets.ClassLabel(names=list(CLASSES)),
                "coarse": datasets.ClassLabel(names=["ants", "others"]),
            }
        )
        found[name] = datasets.Dataset.from_dict(rows, features=features)
    folder = tmp_path / "disk"
    datasets.DatasetDict(found).save_to_disk(folder)
    return folder


def test_a_folder_gives_the_images_and_classes_of_image_folder(data_dir: Path) -> None:
    for split in ("train", "val"):  # `datasets` calls the second one validation
        expected = ImageFolder(data_dir, split)
        source = open_source(Path(f"hfds/imagefolder:{data_dir}"), split)
        assert source.classes == expected.classes == list(CLASSES)
        found = {(source.labels[p], source.read(p)) for p in range(len(source))}
        assert found == {(expected.labels[p], expected.read(p)) for p in range(len(expected))}
        assert list(source.sizes) == [len(source.read(p)) for p in range(len(source))]


def test_images_in_a_table_are_their_stored_bytes(data_dir: Path, on_disk: Path) -> None:
    expected = ImageFolder(data_dir, "train")
    source = open_source(Path(f"hfds/disk:{on_disk},label=fine"), "train")
    assert [source.read(p) for p in range(36)] == [expected.read(p) for p in range(36)]
    assert list(source.labels) == list(expected.labels)
    assert list(source.sizes) == list(expected.sizes)
    assert (source.keys[0], source.keys[-1]) == ("00", "35")
    coarse = open_source(Path(f"hfds/disk:{on_disk},label=coarse"), "train")
    assert coarse.classes == ["ants", "others"]


def test_keys_and_fingerprint_are_those_of_another_copy(on_disk: Path, tmp_path: Path) -> None:
    """Also of rows that were selected, which `datasets` keeps as a list of positions."""
    copy = datasets.load_from_disk(str(on_disk))
    order = list(range(36))
    mixed = copy["train"].select(order[::-1]).select(order[::-1])
    assert mixed._indices is not None
    datasets.DatasetDict({"train": mixed}).save_to_disk(tmp_path / "other")
    sources = [
        open_source(Path(f"hfds/disk:{folder},label=fine"), "train")
        for folder in (on_disk, tmp_path / "other")
    ]
    assert sources[0].keys == sources[1].keys
    assert fingerprint(sources[0]) == fingerprint(sources[1])
    assert [s.original_hash(3, s.read(3)) for s in sources[:1]] == [
        s.original_hash(3, s.read(3)) for s in sources[1:]
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("hfds/cifar10", HfName("cifar10")),
        (
            "/data/hfds/uoft-cs/cifar100,label=fine_label",
            HfName("uoft-cs/cifar100", label="fine_label"),
        ),
        ("/data/hfds/imagefolder:pics", HfName("imagefolder", Path("/data/pics"))),
        ("/data/hfds/imagefolder:/pics", HfName("imagefolder", Path("/pics"))),
        ("hfds/a/b,config=small,image=img", HfName("a/b", None, "small", "img")),
        ("pictures/hfds", None),
    ],
)
def test_a_name_is_the_same_in_an_absolute_setting(text: str, expected: HfName | None) -> None:
    assert hf_name(Path(text)) == expected


def test_a_folder_of_that_name_is_a_folder(tmp_path: Path) -> None:
    (tmp_path / "hfds" / "pictures").mkdir(parents=True)
    assert hf_name(tmp_path / "hfds" / "pictures") is None


@pytest.mark.parametrize(
    ("name", "split", "message"),
    [
        (
            "hfds/disk:{disk}",
            "train",
            "has 2 columns of type ClassLabel; name one with hfds/NAME,label=",
        ),
        ("hfds/disk:{disk},label=img", "train", "has no column img of type ClassLabel"),
        ("hfds/disk:{disk},label=fine", "val", "has the splits train, test, not val; name another"),
        ("hfds/disk:{disk},label=fine", "x", "has the splits train, test, not x"),
        ("hfds/imagefolder:nowhere", "train", "there is no such folder"),
        ("hfds/ant lab/tiny", "train", "is not USER/NAME of the Hugging Face Hub, or imagefolder"),
        ("hfds/ant-lab/tiny", "train", "is not in the cache of `datasets`; add --download"),
        ("hfds/ant-lab/tiny,config=b", "train", r"tiny \(config b\) is not in the cache"),
    ],
)
def test_what_is_missing_is_named(on_disk: Path, name: str, split: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        open_source(Path(name.format(disk=on_disk)), split)
    assert "\n" not in str(caught.value)
    assert not huggingface_hub.constants.HF_HUB_OFFLINE


def test_a_row_without_image_is_a_bad_image_and_one_without_class_an_error(tmp_path: Path) -> None:
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])}
    )
    for name, label in (("image", 1), ("label", -1)):
        rows = {"image": [None], "label": [label]}
        datasets.Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / name)
    source = open_source(Path(f"hfds/disk:{tmp_path / 'image'}"), "train")
    with pytest.raises(DataError, match="no image in this row"):
        source.read(0)
    with pytest.raises(ConfigError, match="1 of 1 images have no class"):
        open_source(Path(f"hfds/disk:{tmp_path / 'label'}"), "train")


def test_download_without_network_is_one_line(
    run_cli: Callable[..., Result], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(reachable, "RESPONSE_TIMEOUT_S", 0.1)
    words = ["finetune", "--model", "test_resnet", "--no-pretrained", "--output", tmp_path / "run"]
    with silent_server() as url:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", url)
        result = run_cli(*words, "--data-dir", "hfds/ant-lab/tiny", "--download")
    assert result.code == 1
    assert result.stderr == (
        f"mealv2: cannot reach {url}: no response in 0.1 s; check the network\n"
    )
    result = run_cli(*words, "--data-dir", tmp_path, "--download")
    assert result.code == 2
    assert "--download has no effect without --data-dir torch/… or hfds/…" in result.stderr


def test_a_student_is_tuned_on_it(
    run_cli: Callable[..., Result], on_disk: Path, tmp_path: Path
) -> None:
    words = ["finetune", "--model", "test_resnet", "--no-pretrained", "--img-size", 32, "-b", 8]
    words += ["--epochs", 1, "--workers", 0, "--output", tmp_path / "run"]
    words += ["--data-dir", f"hfds/disk:{on_disk},label=fine"]
    result = run_cli(*words)
    assert result.code == 2
    assert "has the splits train, test, not val" in result.stderr
    result = run_cli(*words, "--val-split", "test")
    assert result.code == 0, result.stderr
    assert result.report["num_images"] == 15
    words += ["--val-fraction", "0.25", "--output", tmp_path / "two"]
    result = run_cli(*words, "--val-split", "test")
    assert result.code == 2
    assert "has a split test" in result.stderr
    assert run_cli(*words).report["num_images"] == 9


@pytest.mark.slow
def test_download_of_the_hub_is_read_from_the_cache_afterwards(
    data_dir: Path, on_disk: Path, tmp_path: Path
) -> None:
    """In processes of their own, with the variables of a user; the second one has no hub."""
    card = "---\nconfigs:\n- config_name: default\n  data_files:\n"
    words = ["finetune", "--model", "test_resnet", "--no-pretrained", "--img-size", "32"]
    words += ["-b", "8", "--epochs", "1", "--workers", "0", "--val-split", "test"]
    words += ["--data-dir", "hfds/ant-lab/tiny,label=fine", "--output"]
    with running_hub() as hub:
        hub.add("datasets", "ant-lab/tiny")
        files = hub.files("datasets", "ant-lab/tiny")
        for split, found in datasets.load_from_disk(str(on_disk)).items():
            card += f"  - split: {split}\n    path: data/{split}-*\n"
            buffer = io.BytesIO()
            found.to_parquet(buffer)
            files[f"data/{split}-00000-of-00001.parquet"] = buffer.getvalue()
        files["README.md"] = f"{card}---\n".encode()
        variables = os.environ | hub.environment(tmp_path / "home") | {"OMP_NUM_THREADS": "1"}

        def start(*more: str) -> subprocess.CompletedProcess[str]:
            command = [sys.executable, "-m", "mealv2", *words, *more]
            return subprocess.run(command, env=variables, cwd=ROOT, capture_output=True, text=True)

        missing = start(str(tmp_path / "run"))
        assert missing.returncode == 2
        assert "is not in the cache of `datasets`; add --download" in missing.stderr
        assert hub.requests == []
        first = start(str(tmp_path / "run"), "--download")
    second = start(str(tmp_path / "again"))
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    reports = [json.loads(run.stdout.splitlines()[-1]) for run in (first, second)]
    assert [report["num_images"] for report in reports] == [15, 15]
    assert reports[0]["top1"] == reports[1]["top1"]
