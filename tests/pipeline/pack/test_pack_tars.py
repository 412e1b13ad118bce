"""mealv2 pack --to tar: the same images in shards, the same bytes whatever comes in between."""

import os
import shutil
import signal
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import webdataset
from packs import final, one_line

from conftest import Result
from mealv2.data.folder import ImageFolder
from mealv2.data.open import open_source
from mealv2.data.pack_index import Pack, PackedTar
from mealv2.data.source import fingerprint
from mealv2.data.tar import TarShards
from mealv2.data.tar_index import index_path, read_index
from mealv2.errors import DataError
from mealv2.storage.atomic import TEMPORARY_PREFIX, file_sha256
from pictures import flip
from warm import warm_process

Run = Callable[..., Result]
Files = Callable[..., dict[str, bytes]]

PER_SHARD = 10


def flags(data_dir: Path, out: Path, *more: object) -> list[object]:
    words = ["pack", "--to", "tar", "--data-dir", data_dir, "--output", out]
    return [*words, "--images-per-shard", PER_SHARD, *more]


@pytest.fixture(scope="module")
def packed_dir(done: Run, data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tree as tar files. Not to be changed."""
    out = tmp_path_factory.mktemp("packed") / "out"
    done(*flags(data_dir, out))
    return out


@pytest.fixture
def own_pack(packed_dir: Path, tmp_path: Path) -> Path:
    """A copy of the tar files that a test may change."""
    return Path(shutil.copytree(packed_dir, tmp_path / "own-pack"))


# --- the same images ------------------------------------------------------------------------------


def test_a_tree_in_tar_files_has_the_same_images_classes_and_fingerprint(
    data_dir: Path, packed_dir: Path
) -> None:
    for split in ("train", "val"):
        data, packed = ImageFolder(data_dir, split), open_source(packed_dir, split)
        assert isinstance(packed, TarShards)
        assert packed.classes == data.classes
        assert fingerprint(packed) == fingerprint(data)
        position_of = {key: p for p, key in enumerate(data.keys)}
        for position, key in enumerate(packed.keys):
            assert packed.read(position) == data.read(position_of[key])
        starts = packed.shard_starts
        assert starts == list(range(0, len(data), PER_SHARD))


def test_images_of_a_shard_are_of_all_classes(packed_dir: Path) -> None:
    source = open_source(packed_dir, "train")
    for first in range(0, 30, PER_SHARD):
        assert set(source.labels[first : first + PER_SHARD]) == {0, 1, 2}


def test_the_report_and_the_list_say_what_there_is(
    done: Run, data_dir: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    report = done(*flags(data_dir, out, "--split", "val")).report
    files = sorted(out.glob("*.tar"))
    assert [path.name for path in files] == ["val-000000.tar", "val-000001.tar"]
    assert report["splits"] == ["val"]
    assert (report["images"], report["shards"], report["made_now"]) == (15, 2, 2)
    assert report["bytes"] == sum(path.stat().st_size for path in files)
    pack = Pack.read(out / "val.pack.json")
    assert pack is not None
    assert pack.files == {
        path.name: PackedTar(path.stat().st_size, file_sha256(path)) for path in files
    }


@pytest.mark.parametrize("workers", [1, 7])
def test_the_bytes_are_the_same_whatever_the_workers(
    done: Run, data_dir: Path, packed_dir: Path, tmp_path: Path, contents: Files, workers: int
) -> None:
    done(*flags(data_dir, tmp_path / "out", "--workers", workers))
    assert contents(tmp_path / "out") == contents(packed_dir)


def test_webdatasets_own_reader_reads_them(data_dir: Path, packed_dir: Path) -> None:
    source = ImageFolder(data_dir, "train")
    wanted = {key: (source.read(p), source.labels[p]) for p, key in enumerate(source.keys)}
    urls = [str(path) for path in sorted(packed_dir.glob("train-*.tar"))]
    found = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # it leaves its files open
        for sample in webdataset.WebDataset(urls, shardshuffle=False):
            image = sample.get("jpg") or sample["png"]
            found[sample["key"].decode()] = (image, int(sample["cls"]))
            assert sample["__key__"] == sample["key"].decode().rpartition(".")[0]
    assert found == wanted


def test_label_sets_of_the_tree_fit_its_tar_files(
    done: Run, labels_dir: Path, packed_dir: Path, distill_flags: list[str], tmp_path: Path
) -> None:
    report = done("labels", "verify", labels_dir, "--data-dir", packed_dir).report
    assert report["data"] == "the same"
    done(*distill_flags, "--data-dir", packed_dir, "--epochs", 1, "--output", tmp_path / "run")


@pytest.mark.skipif(
    shutil.which("jpegtran") is None, reason="needs jpegtran (Debian: libjpeg-turbo-progs)"
)
def test_tar_files_of_a_packed_tree_are_the_original_data_in_packed_files(
    done: Run, run_cli: Run, data_dir: Path, labels_dir: Path, packed_dir: Path, tmp_path: Path
) -> None:
    tree, out = tmp_path / "tree", tmp_path / "out"
    done("pack", "--data-dir", data_dir, "--output", tree)
    done(*flags(tree, out))
    assert done("labels", "verify", labels_dir, "--data-dir", out).report["data"] == "the same"
    source, packed = open_source(out, "train"), ImageFolder(tree, "train")
    assert list(source.sizes) != list(source.stored_sizes)
    position_of = {key: p for p, key in enumerate(packed.keys)}
    assert all(source.read(p) == packed.read(position_of[key]) for p, key in enumerate(source.keys))
    one_line(run_cli(*flags(data_dir, out)), 2, "before or after `mealv2 pack` re-packed them")


def test_tar_files_are_packed_into_others_in_the_same_order(
    done: Run, packed_dir: Path, tmp_path: Path
) -> None:
    words = ["--split", "train", "--images-per-shard", 36]
    done(*flags(packed_dir, tmp_path / "out", *words))
    one, many = (open_source(folder, "train") for folder in (tmp_path / "out", packed_dir))
    assert one.keys == many.keys
    assert [one.read(p) for p in range(36)] == [many.read(p) for p in range(36)]


# --- stopped and gone on --------------------------------------------------------------------------


@pytest.mark.slow
def test_killed_at_any_time_it_ends_in_the_same_bytes(
    done: Run, data_dir: Path, packed_dir: Path, tmp_path: Path, contents: Files
) -> None:
    if not Path("/proc/self/task").exists():
        pytest.skip("needs /proc, to know that a process has one thread")
    reference = contents(packed_dir)
    words = [str(word) for word in flags(data_dir, tmp_path, "--workers", 2)]
    kills, unfinished = 0, 0
    with warm_process(tmp_path, [*words, "--output", tmp_path / "first"]) as warm:
        out = tmp_path / "timed"
        num_events = len(warm.done(*words, "--output", out, out=out)["events"])
        assert contents(out) == reference
        out = tmp_path / "out"
        for event in [0, 1, 2, 4, *range(7, num_events, max(1, num_events // 16))]:
            job = {"args": [*words, "--output", str(out)], "out": str(out), "kill_at_event": event}
            kills += warm.run(job)[0]["code"] == -signal.SIGKILL
            left = final(contents(out))
            different = {name for name, data in left.items() if data != reference[name]}
            assert different <= {"train.pack.json", "val.pack.json"}, "nothing torn"
            if "train.pack.json" in different:
                unfinished += 1
                with pytest.raises(DataError, match="only partly packed; run the same"):
                    open_source(out, "train")
    assert kills >= 8
    assert unfinished >= 4
    done(*words, "--output", out)
    assert final(contents(out)) == reference


def test_a_disk_that_is_full_leaves_no_torn_file_and_the_same_command_goes_on(
    run_cli: Run,
    done: Run,
    data_dir: Path,
    packed_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    contents: Files,
) -> None:
    written = 0
    write = webdataset.TarWriter.write

    def add(self: webdataset.TarWriter, sample: dict[str, Any]) -> None:
        nonlocal written
        written += 1
        if written == 14:
            raise OSError(28, os.strerror(28))
        write(self, sample)

    words = flags(data_dir, tmp_path / "out")
    with monkeypatch.context() as patched:
        patched.setattr(webdataset.TarWriter, "write", add)
        one_line(run_cli(*words), 1, "No space left on device; free some disk space")
    left = contents(tmp_path / "out")
    assert [name for name in left if name.endswith(".tar")] == ["train-000000.tar"]
    assert not any(TEMPORARY_PREFIX in name for name in left)
    assert done(*words).report["made_now"] == 5
    assert contents(tmp_path / "out") == contents(packed_dir)


def test_a_finished_pack_is_left_alone_and_one_with_holes_is_mended(
    done: Run, own_pack: Path, data_dir: Path, packed_dir: Path, contents: Files
) -> None:
    times = {p: p.stat().st_mtime_ns for p in own_pack.iterdir()}
    assert done(*flags(data_dir, own_pack)).report["made_now"] == 0
    assert {p: p.stat().st_mtime_ns for p in own_pack.iterdir()} == times
    (own_pack / "train-000000.tar").unlink()
    index_path(own_pack / "train-000001.tar").unlink()
    index_path(own_pack / "train-000002.tar").write_bytes(b"torn")
    with (own_pack / "val-000000.tar").open("ab") as file:
        file.write(bytes(512))
    assert done(*flags(data_dir, own_pack)).report["made_now"] == 4
    assert contents(own_pack) == contents(packed_dir)


def test_a_damaged_shard_of_an_unfinished_pack_is_made_again(
    done: Run, own_pack: Path, data_dir: Path, packed_dir: Path, contents: Files
) -> None:
    pack = Pack.read(own_pack / "train.pack.json")
    assert pack is not None
    (own_pack / "train.pack.json").write_bytes(replace(pack, files=None).to_bytes())
    path = own_pack / "train-000002.tar"
    data = bytearray(path.read_bytes())
    data[5000] ^= 1
    path.write_bytes(data)
    assert done(*flags(data_dir, own_pack)).report["made_now"] == 1
    assert contents(own_pack) == contents(packed_dir)


# --- what is noticed ------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["replaced", "lost", "more", "index"])
def test_tar_files_that_are_not_those_of_the_pack_are_named(
    run_cli: Run, own_pack: Path, labels_dir: Path, what: str
) -> None:
    path = own_pack / "train-000001.tar"
    if what == "replaced":
        with path.open("ab") as file:
            file.write(bytes(512))
        said = ["bytes", "run the same `mealv2 pack` again"]
    elif what == "lost":
        path.unlink()
        said = ["is missing", "run the same `mealv2 pack` again"]
    elif what == "more":
        path = Path(shutil.copy(path, own_pack / "train-000009.tar"))
        said = ["was not made by `mealv2 pack`"]
    else:
        path = index_path(path)
        path.write_bytes(path.read_bytes()[:-200])
        said = ["its SHA-256 does not match", "remove it to work without an index"]
    one_line(run_cli("labels", "verify", labels_dir, "--data-dir", own_pack), 1, str(path), *said)


def test_a_pattern_takes_some_of_the_tar_files_and_no_index(own_pack: Path) -> None:
    (own_pack / "train-000001.tar").unlink()
    index_path(own_pack / "train-000001.tar").unlink()
    for pattern in ("train-{000000,000002}.tar", "train-*[02].tar*"):
        assert len(open_source(own_pack / pattern, "train")) == 20


@pytest.mark.parametrize("what", ["replaced", "more", "unfinished"])
def test_a_pattern_compares_its_files_with_the_list_of_the_pack(what: str, own_pack: Path) -> None:
    path, pattern = own_pack / "train-000001.tar", own_pack / "train-*[019].tar"
    assert len(open_source(pattern, "train")) == 20
    if what == "replaced":
        with path.open("ab") as file:
            file.write(bytes(512))
    elif what == "more":
        shutil.copy(path, own_pack / "train-000009.tar")
    else:
        pack = Pack.read(own_pack / "train.pack.json")
        assert pack is not None
        (own_pack / "train.pack.json").write_bytes(replace(pack, files=None).to_bytes())
    said = {
        "replaced": "packed: it was replaced",
        "more": "was not made by",
        "unfinished": "partly",
    }
    with pytest.raises(DataError, match=said[what]):
        open_source(pattern, "train")


@pytest.mark.parametrize("old", ["0", "tar"])
def test_a_changed_index_is_one_line(
    run_cli: Run, own_pack: Path, labels_dir: Path, old: str
) -> None:
    path = own_pack / "train.pack.json"
    path.write_text(path.read_text().replace(old, "1"))
    one_line(run_cli("labels", "verify", labels_dir, "--data-dir", own_pack), 1, str(path))


# --- refused before anything is written -----------------------------------------------------------


def refused(run_cli: Run, contents: Files, out: Path, words: list[object], *said: str) -> None:
    before = contents(out)
    one_line(run_cli(*words), 2, *said)
    assert contents(out) == before


def test_other_settings_and_other_images_are_refused_by_name(
    run_cli: Run, own_pack: Path, own_data: Path, contents: Files
) -> None:
    words = flags(own_data, own_pack, "--images-per-shard", 11)
    refused(run_cli, contents, own_pack, words, "with images_per_shard 10, which is 11")
    (own_data / "train/ants/00.jpg").unlink()
    said = "other images than", "an earlier version of them"
    refused(run_cli, contents, own_pack, flags(own_data, own_pack), *said)
    shutil.rmtree(own_data / "train/ants")
    shutil.rmtree(own_data / "val/ants")
    refused(run_cli, contents, own_pack, flags(own_data, own_pack), "lists other classes than")


@pytest.mark.parametrize("state", ["complete", "missing", "unfinished"])
def test_other_pictures_of_the_same_names_and_sizes_are_refused(
    state: str, run_cli: Run, own_pack: Path, own_data: Path, contents: Files
) -> None:
    path = own_pack / "train-000000.tar"
    index = read_index(path)
    assert index is not None
    flip(own_data / "train" / index.images.keys[3], at=-1)
    if state == "missing":
        path.unlink()
    elif state == "unfinished":
        pack = Pack.read(own_pack / "train.pack.json")
        assert pack is not None
        (own_pack / "train.pack.json").write_bytes(replace(pack, files=None).to_bytes())
    said = "was packed from other pictures" if state == "missing" else index.images.keys[3]
    refused(run_cli, contents, own_pack, flags(own_data, own_pack), str(path), said)


def test_a_folder_of_something_else_is_refused(
    run_cli: Run, data_dir: Path, own_pack: Path, tmp_path: Path, contents: Files
) -> None:
    (own_pack / "notes.txt").write_text("mine")
    refused(run_cli, contents, own_pack, flags(data_dir, own_pack), "notes.txt is not from")
    (own_pack / "notes.txt").unlink()
    (own_pack / "test-000000.tar").write_text("mine")
    refused(run_cli, contents, own_pack, flags(data_dir, own_pack), "test-000000.tar is not")
    words = flags(data_dir, data_dir / "tars")
    one_line(run_cli(*words), 2, "contain one another")
    assert not (data_dir / "tars").exists()


def test_splits_of_other_classes_are_refused(run_cli: Run, own_data: Path, tmp_path: Path) -> None:
    shutil.rmtree(own_data / "val/ants")
    one_line(run_cli(*flags(own_data, tmp_path / "out")), 2, "have different classes", "--split")
    assert not (tmp_path / "out").exists()


def test_a_class_name_of_several_lines_is_refused(
    run_cli: Run, own_data: Path, tmp_path: Path
) -> None:
    for split in ("train", "val"):
        (own_data / split / "ants").rename(own_data / split / "a\nb")
    one_line(run_cli(*flags(own_data, tmp_path / "out")), 2, "contains a line break")


def test_an_image_that_changes_or_goes_while_it_is_packed_stops_it(
    run_cli: Run, own_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = ImageFolder.read

    def longer(self: ImageFolder, position: int) -> bytes:
        return read(self, position) + b"\0" * (position == 5)

    with monkeypatch.context() as patched:
        patched.setattr(ImageFolder, "read", longer)
        one_line(run_cli(*flags(own_data, tmp_path / "out")), 1, "changed while it was packed")
    path = own_data / "train/ants/gone.jpg"
    path.symlink_to("nowhere")
    one_line(run_cli(*flags(own_data, tmp_path / "new")), 1, str(path), "replace it or remove it")


def test_images_per_shard_needs_tar_files(run_cli: Run, data_dir: Path, tmp_path: Path) -> None:
    words = ["pack", "--data-dir", data_dir, "--output", tmp_path / "out", "--images-per-shard", 7]
    one_line(run_cli(*words), 2, "--images-per-shard has no effect without --to tar")


def test_names_that_webdataset_would_cut_keep_their_keys(
    done: Run, draw_tree: Callable[..., Path], tmp_path: Path
) -> None:
    tree = draw_tree(tmp_path / "data", num_train=2, num_val=1)
    folder = tree / "train" / "ants"
    shutil.copy(folder / "00.jpg", folder / "01.b.jpg")
    shutil.copy(folder / "00.jpg", folder / "01.c.JPEG")
    shutil.copy(folder / "00.jpg", folder / "00.png")
    done(*flags(tree, tmp_path / "out"))
    assert fingerprint(open_source(tmp_path / "out", "train")) == fingerprint(
        ImageFolder(tree, "train")
    )
    assert read_index(tmp_path / "out" / "train-000000.tar") is not None
