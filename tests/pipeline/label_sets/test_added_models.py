"""Added views whose blocks use the models of the first views: made, read, derived, damaged."""

import pickle
import runpy
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from range_server import range_server

import reference
import stored
from conftest import ROOT, Result
from mealv2.errors import LabelSetError
from mealv2.label_set import (
    LabelSet,
    ShardFile,
    WebSet,
    describe_file,
    read_manifest,
    write_manifest,
)
from mealv2.label_set.shard import write_shard
from mealv2.storage.cache import Cache

Run = Callable[..., Result]
Make = Callable[..., Path]
Copy = Callable[[Path], Path]

FIRST, LAST = 24, 29
FLAGS = ("--rate", 0.0005, "--num-views", FIRST)


def added_files(folder: Path, views: range) -> list[ShardFile]:
    """Return the shards of a block of added views."""
    names = sorted(folder.glob(f"train-*-views-{views.start}-{views.stop - 1}.h5"))
    return [ShardFile(path) for path in names]


def bound_blocks(folder: Path, views: range) -> list[tuple[str, bytes]]:
    """Return (key, block) where the block uses the model of the image's first block."""
    starts = [0] if len(views) == 1 else [9, 10]
    blocks = [item for file in added_files(folder, views) for item in file.blocks()]
    return [(key.decode(), bytes(block)) for key, block, _ in blocks if block[0] in starts]


@pytest.fixture
def add(data_dir: Path, teach_flags: list[object]) -> Callable[..., list[object]]:
    """A function: the words that add views; flags given after these win."""

    def words(folder: Path, num_views: int, *flags: object) -> list[object]:
        given = ["--data-dir", data_dir, "--num-views", num_views, "--batch-size", 16]
        return ["labels", "add-views", folder, *given, *teach_flags, *flags]

    return words


@pytest.fixture(scope="module")
def added_set(
    done: Run,
    make_set: Make,
    data_dir: Path,
    teach_flags: list[object],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A set of 24 views to which 1 and then 4 were added. Not to be changed by a test."""
    folder = tmp_path_factory.mktemp("added") / "set"
    shutil.copytree(make_set(*FLAGS), folder)
    for num_views in (FIRST + 1, LAST):
        words = ["--data-dir", data_dir, "--num-views", num_views, "--batch-size", 16]
        done("labels", "add-views", folder, *words, *teach_flags)
    return folder


def assert_same_labels(folder: Path, expected: Path) -> None:
    found, wanted = stored.dense_of(folder), stored.dense_of(expected)
    assert found.keys() == wanted.keys()
    for address, row in wanted.items():
        np.testing.assert_allclose(found[address], row, rtol=1e-5, atol=0)


# --- made and read --------------------------------------------------------------------------------


@pytest.mark.parametrize("views", [range(FIRST, FIRST + 1), range(FIRST + 1, LAST)])
def test_labels_are_those_of_the_description(added_set: Path, views: range) -> None:
    bound = bound_blocks(added_set, views)
    assert len(bound) > 10
    first = {
        key: bytes(block)
        for path in added_set.glob("train-?????.h5")
        for key, block, _ in ShardFile(path).blocks()
    }
    labels = LabelSet.open(added_set)
    for key, block in bound:
        own = reference.with_own_model(
            block, len(views), first[key.encode()], FIRST, labels.num_classes
        )
        expected = reference.decode_shared_block(own, len(views), labels.num_classes)
        found = labels.soft_labels([key] * len(views), list(views)).to_dense()
        np.testing.assert_allclose(found.numpy(), expected, rtol=2e-5, atol=0)


def test_the_labels_are_close_to_those_of_a_set_that_had_them_from_the_start(
    added_set: Path, make_set: Make
) -> None:
    ours = stored.dense_of(added_set)
    theirs = stored.dense_of(make_set("--rate", 0.0005, "--num-views", LAST))
    assert ours.keys() == theirs.keys()
    assert max(np.abs(ours[place] - theirs[place]).max() for place in ours) < 0.1


def test_the_reader_of_the_documentation_agrees(added_set: Path) -> None:
    found = runpy.run_path(str(ROOT / "docs/reference/reference_reader.py"))["label_set"](added_set)
    dense = stored.dense_of(added_set)
    rows = dict(found)
    assert rows.keys() == dense.keys()
    np.testing.assert_allclose(list(rows.values()), [dense[a] for a in rows], atol=1e-6)


def test_verify_and_relabel_find_nothing(
    done: Run, added_set: Path, data_dir: Path, teach_flags: list[object]
) -> None:
    done("labels", "verify", added_set)
    words = ["--data-dir", data_dir, "--relabel", 100, *teach_flags]
    found = done("labels", "verify", added_set, *words).report["relabelled"]
    assert found["identical"] > 0.95


def test_damaged_shards_of_any_job_are_made_again_with_the_same_bytes(
    done: Run, added_set: Path, copied: Copy, add: Callable[..., list[object]]
) -> None:
    folder = copied(added_set)
    before = {name: digest for name, (digest, _) in stored.files_of(folder).items()}
    (folder / f"train-00001-views-{FIRST + 1}-{LAST - 1}.h5").write_bytes(b"damaged")
    for path in folder.glob(f"train-*-views-{FIRST}-{FIRST}.h5"):
        path.unlink()
    for job in (0, 1):
        flags = ["--num-jobs", 2, "--job-index", job, "--batch-size", 7]
        done(*add(folder, LAST, *flags))
    done(*add(folder, LAST))
    after = {name: digest for name, (digest, _) in stored.files_of(folder).items()}
    assert {n: d for n, d in after.items() if n != "manifest.json"} == {
        n: d for n, d in before.items() if n != "manifest.json"
    }


def test_an_open_set_is_read_by_another_process_and_in_any_order(added_set: Path) -> None:
    labels = pickle.loads(pickle.dumps(LabelSet.open(added_set)))  # noqa: S301 - our own
    dense = stored.dense_of(added_set)
    addresses = [address for n, address in enumerate(dense) if n % 7 == 3][::-1]
    found = labels.soft_labels([k for k, _ in addresses], [v for _, v in addresses]).to_dense()
    expected = torch.from_numpy(np.stack([dense[address] for address in addresses]))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)


def test_a_web_set_fetches_the_first_block_too_and_keeps_it(
    added_set: Path, tmp_path: Path
) -> None:
    views = range(FIRST, FIRST + 1)
    keys = [key for key, _ in bound_blocks(added_set, views)][:5]
    expected = LabelSet.open(added_set).soft_labels(keys, [FIRST] * 5).to_dense()
    with range_server(added_set) as server:
        labels = LabelSet.open(WebSet(server.url, Cache(tmp_path / "cache", 10**9)))
        for _ in range(2):
            found = labels.soft_labels(keys, [FIRST] * 5).to_dense()
            torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
        assert sum("-views-" in path for path in map(str, server.requests)) > 0


@pytest.mark.parametrize("command", ["info", "show", "status"])
def test_commands_that_print_a_set_read_it(done: Run, added_set: Path, command: str) -> None:
    key, _ = bound_blocks(added_set, range(FIRST, FIRST + 1))[0]
    done("labels", command, added_set, *([key] if command == "show" else []))


# --- sets made from it ----------------------------------------------------------------------------


def test_a_copy_in_the_same_encoding_has_the_same_blocks(
    done: Run, added_set: Path, tmp_path: Path
) -> None:
    done("labels", "convert", added_set, "--output", tmp_path / "out")
    done("labels", "verify", tmp_path / "out")
    assert stored.rows_of(tmp_path / "out") == stored.rows_of(added_set)
    views = range(FIRST, FIRST + 1)
    assert bound_blocks(tmp_path / "out", views) == bound_blocks(added_set, views)


@pytest.mark.parametrize("flags", [("--rate", 0.002), ("--topk", "all")])
def test_another_encoding_is_made_of_the_distributions(
    done: Run, added_set: Path, tmp_path: Path, flags: tuple[object, ...]
) -> None:
    done("labels", "convert", added_set, *flags, "--output", tmp_path / "out")
    done("labels", "verify", tmp_path / "out")
    found, wanted = stored.dense_of(tmp_path / "out"), stored.dense_of(added_set)
    assert max(np.abs(found[place] - wanted[place]).max() for place in wanted) < 0.1
    assert not any("first_sha256" in ShardFile(p).header for p in (tmp_path / "out").glob("*.h5"))


def test_parts_and_their_union_have_the_same_labels(
    done: Run, added_set: Path, tmp_path: Path
) -> None:
    done("labels", "split", added_set, "--parts", 3, "--output", tmp_path)
    parts = [tmp_path / f"part-{number}" for number in range(3)]
    found: dict[stored.Address, bytes] = {}
    for part in parts:
        done("labels", "verify", part)
        found |= stored.rows_of(part)
    assert found == stored.rows_of(added_set)
    done("labels", "merge", *parts[::-1], "--output", tmp_path / "out")
    done("labels", "verify", tmp_path / "out")
    assert stored.rows_of(tmp_path / "out") == found
    # the same command keeps complete shards, and makes a damaged one again
    (damaged, *_) = (tmp_path / "out").glob(f"train-*-views-{FIRST}-{FIRST}.h5")
    data = damaged.read_bytes()
    damaged.write_bytes(data[:-1])
    done("labels", "merge", *parts[::-1], "--output", tmp_path / "out")
    assert damaged.read_bytes() == data


def test_the_mean_of_two_sets_is_that_of_their_labels(
    done: Run,
    make_set: Make,
    teacher_dirs: dict[str, Path],
    data_dir: Path,
    teach_flags: list[object],
    tmp_path: Path,
) -> None:
    folders = []
    for name, path in teacher_dirs.items():
        folders.append(tmp_path / name)
        shutil.copytree(make_set(*FLAGS, teachers=[name]), folders[-1])
        words = ["--data-dir", data_dir, "--num-views", FIRST + 1, "--batch-size", 16]
        done("labels", "add-views", folders[-1], *words, "--teacher", f"{name}={path}")
    assert bound_blocks(folders[0], range(FIRST, FIRST + 1))
    flags = ["--topk", "all", "--label-dtype", "float32"]
    done("labels", "merge", *folders, *flags, "--output", tmp_path / "out")
    first, second, mean = map(stored.dense_of, [*folders, tmp_path / "out"])
    for place, row in mean.items():
        np.testing.assert_allclose(row, (first[place] + second[place]) / 2, atol=1e-5)


@pytest.mark.parametrize("to", ["parquet", "webdataset", "fkd", "sre2l"])
def test_an_export_has_the_added_views(
    done: Run, added_set: Path, data_dir: Path, tmp_path: Path, to: str
) -> None:
    words = ["labels", "export", added_set, "--to", to, "--output", tmp_path / "out"]
    flags: dict[str, list[object]] = {
        "webdataset": ["--data-dir", data_dir],
        "fkd": ["--label-type", "marginal_smoothing_k2"],
        "sre2l": ["--data-dir", data_dir, "-b", 8],
    }
    report = done(*words, *flags.get(to, [])).report
    assert report["views"] == 36 * LAST
    if to == "parquet":
        parquet = pytest.importorskip("pyarrow.parquet")
        dense = stored.dense_of(added_set)
        for path in sorted((tmp_path / "out").glob("*.parquet")):
            for row in parquet.read_table(path).to_pylist():
                expected = dense[row["key"], row["view"]]
                np.testing.assert_allclose(row["probs"], expected[row["classes"]], rtol=1e-5)


# --- damage ---------------------------------------------------------------------------------------


def test_a_damaged_first_block_is_an_error_of_the_added_views(
    run_cli: Run, added_set: Path, copied: Copy
) -> None:
    folder = copied(added_set)
    views = range(FIRST, FIRST + 1)
    key, _ = bound_blocks(folder, views)[0]
    labels = LabelSet.open(folder)
    path = folder / "train-00000.h5"
    file = ShardFile(path)
    begin = int(np.r_[0, file.column("label_ends")][file.keys().index(key)])
    data = bytearray(path.read_bytes())
    data[file.labels_at + begin + 9] ^= 16
    path.write_bytes(data)
    with pytest.raises(LabelSetError, match="CRC-32"):
        LabelSet.open(folder).soft_labels([key], [FIRST])
    assert labels.holds(key, FIRST)
    verified = run_cli("labels", "verify", folder)
    assert (verified.code, "1 of" in verified.stderr) == (3, True)


def test_other_first_views_are_an_error_and_the_added_ones_are_made_again(
    done: Run, run_cli: Run, added_set: Path, copied: Copy, add: Callable[..., list[object]]
) -> None:
    folder = copied(added_set)
    # as another machine might have made it: intact, but not the bytes that were there
    path = folder / "train-00000.h5"
    shard = ShardFile(path).shard()
    write_shard(path, replace(shard, blocks=[*shard.blocks[1:], shard.blocks[0]]), replace=True)
    manifest = read_manifest(folder)
    entries = manifest["roles"]["train"]["blocks"][0]["shards"]
    entries[0] = describe_file(path, num_images=entries[0]["images"])
    write_manifest(folder, manifest["plan"], roles=manifest["roles"], versions=manifest["versions"])
    with pytest.raises(LabelSetError, match="other first views"):
        LabelSet.open(folder)
    assert run_cli("labels", "verify", folder).code == 3
    assert "add-views" in run_cli("labels", "status", folder).stderr.splitlines()[-1]
    assert done(*add(folder, LAST)).report["shards_made"] == 2
    done("labels", "verify", folder)


def test_a_shard_that_does_not_name_the_first_one_has_no_models(
    added_set: Path, copied: Copy
) -> None:
    folder = copied(added_set)
    views = range(FIRST, FIRST + 1)
    key, _ = bound_blocks(folder, views)[0]
    manifest = read_manifest(folder)
    for entry in manifest["roles"]["train"]["blocks"][1]["shards"]:
        shard = ShardFile(folder / entry["name"]).shard()
        write_shard(folder / entry["name"], replace(shard, first_sha256=None), replace=True)
        entry |= describe_file(folder / entry["name"], num_images=entry["images"])
    write_manifest(folder, manifest["plan"], roles=manifest["roles"], versions=manifest["versions"])
    with pytest.raises(LabelSetError, match="head"):
        LabelSet.open(folder).soft_labels([key], [FIRST])


def test_every_flipped_bit_of_an_added_block_is_an_error(added_set: Path, copied: Copy) -> None:
    folder = copied(added_set)
    views = range(FIRST, FIRST + 1)
    key, block = bound_blocks(folder, views)[0]
    path = folder / f"train-00000-views-{FIRST}-{FIRST}.h5"
    file = ShardFile(path)
    at = file.labels_at + int(np.r_[0, file.column("label_ends")][file.keys().index(key)])
    data = path.read_bytes()
    assert data[at : at + len(block)] == block
    for bit in range(8 * len(block)):
        flipped = bytearray(data)
        flipped[at + bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        with pytest.raises(LabelSetError, match="CRC-32"):
            LabelSet.open(folder).soft_labels([key], [FIRST])


@pytest.mark.slow
def test_no_flipped_bit_of_any_file_gives_another_label(added_set: Path, copied: Copy) -> None:
    folder = copied(added_set)
    dense = stored.dense_of(folder)
    addresses = list(dense)[::3]
    keys, views = [key for key, _ in addresses], [view for _, view in addresses]
    expected = np.stack([dense[address] for address in addresses])
    random = np.random.default_rng(0)
    paths = [*sorted(folder.glob("*.h5")), folder / "manifest.json"]
    refused = 0
    for number in range(300):
        path = paths[number % len(paths)]
        data = path.read_bytes()
        flipped = bytearray(data)
        bit = int(random.integers(8 * len(data)))
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        try:
            found = LabelSet.open(folder).soft_labels(keys, views).to_dense().numpy()
        except LabelSetError:
            refused += 1
        else:
            np.testing.assert_allclose(found, expected, rtol=1e-5, atol=0)
        path.write_bytes(data)
    assert 50 < refused < 300
    print(f"\n300 flipped bits in {len(paths)} files: {refused} refused, 0 wrong labels")
