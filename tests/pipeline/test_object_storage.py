"""Both stages against a real S3 endpoint on loopback: the same labels, nothing lost."""

import contextlib
import csv
import errno
import json
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import s3fs

from cases import mostly_slow
from conftest import Result
from mealv2.data import remote_tar
from mealv2.data.open import open_source
from mealv2.data.remote_tar import RemoteShards, RemoteTar
from mealv2.data.requests import CENTRE
from mealv2.data.source import is_unlabelled
from mealv2.data.tar_index import create_plain_index, index_bytes
from mealv2.data.view_reader import ViewReader
from mealv2.errors import ConfigError, DataError, RemoteError
from mealv2.storage import object_store, transfer
from mealv2.storage.cache import Cache
from mealv2.storage.transfer import File
from pipeline.labelling.store import RemoteStore
from stores import KEYS, Store, cutting_proxy, denying_server, new_store, s3_server, web_server
from tars import tar_tree, write_tar

Run = Callable[..., Result]
Files = Callable[..., dict[str, bytes]]


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    with s3_server() as port:
        yield port


@pytest.fixture
def store(port: int, monkeypatch: pytest.MonkeyPatch) -> Store:
    return new_store(port, monkeypatch)


@pytest.fixture(scope="module")
def tar_dir(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tree as tar shards that label sets of the tree fit."""
    return tar_tree(data_dir, tmp_path_factory.mktemp("tars"), keys=True)


@pytest.fixture
def cache(tmp_path: Path) -> list[Any]:
    return ["--cache-dir", tmp_path / "cache"]


def without_flag(flags: list[Any], name: str) -> list[Any]:
    place = flags.index(name)
    return [*flags[:place], *flags[place + 2 :]]


def with_flag(flags: list[Any], name: str, value: object) -> list[Any]:
    place = flags.index(name)
    return [*flags[: place + 1], value, *flags[place + 2 :]]


def training_flags(flags: list[Any], data: object, labels: object) -> list[Any]:
    return with_flag(with_flag(flags, "--data-dir", data), "--labels", labels)


@pytest.fixture(scope="module")
def here(
    tar_dir: Path,
    precompute_flags: list[Any],
    distill_flags: list[Any],
    tmp_path_factory: pytest.TempPathFactory,
    done: Run,
) -> Path:
    """A label set and a run of the shards in a folder."""
    folder = tmp_path_factory.mktemp("here")
    labelling = without_flag(precompute_flags, "--shard-size")
    done(*with_flag(labelling, "--data-dir", tar_dir), "--output", folder / "labels")
    flags = training_flags(distill_flags, tar_dir, folder / "labels")
    done(*flags, "--output", folder / "run")
    return folder


@pytest.mark.slow
def test_training_from_a_bucket_is_training_from_a_web_server_and_nearly_from_a_folder(
    store: Store,
    tar_dir: Path,
    here: Path,
    distill_flags: list[Any],
    cache: list[Any],
    tmp_path: Path,
    done: Run,
    weights: Files,
) -> None:
    images, labels = store.upload(tar_dir, "images"), store.upload(here / "labels", "labels")

    done(*training_flags(distill_flags, images, labels), *cache, "--output", tmp_path / "run")

    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (config["data_dir"], config["labels"]) == (images, labels)
    kept = json.loads((tmp_path / "run" / "labels.json").read_text())
    assert kept["path"] == labels
    with web_server(tar_dir) as url:
        names = f"{url}/{{train-{{000000..000003}},val-{{000000..000001}}}}.tar"
        flags = training_flags(distill_flags, names, here / "labels")
        done(*flags, *cache, "--output", tmp_path / "web")
    assert weights(tmp_path / "run") == weights(tmp_path / "web")
    # the same batches, whose rows are in the order of the shards: sums in another order
    losses = [
        [float(row["train_loss"]) for row in csv.DictReader(text.splitlines())]
        for text in ((run / "summary.csv").read_text() for run in (tmp_path / "run", here / "run"))
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_labels_made_in_a_bucket_are_those_made_in_a_folder(
    store: Store,
    tar_dir: Path,
    here: Path,
    precompute_flags: list[Any],
    cache: list[Any],
    tmp_path: Path,
    done: Run,
    run_cli: Run,
    contents: Files,
) -> None:
    images, labels = store.upload(tar_dir, "images"), f"{store.url}/labels"
    labelling = with_flag(without_flag(precompute_flags, "--shard-size"), "--data-dir", images)
    labelling += ["--output", labels]
    jobs = ["--num-jobs", 2, "--job-index"]

    first = done(*labelling, *cache, *jobs, 0).report
    status = run_cli("labels", "status", labels, *cache)
    second = done(*labelling, "--cache-dir", tmp_path / "another", *jobs, 1).report
    done("labels", "finish", labels, *cache, "--batch-size", with_batch_size(labelling))

    assert first["shards_made"] + second["shards_made"] == 6
    assert status.code == 1
    assert "3 missing" in status.stderr
    local = contents(here / "labels")
    assert set(store.names("labels")) == set(local)
    assert {name: store.data(f"labels/{name}") for name in local} == local
    assert done("labels", "verify", labels, *cache).report["crc32"] == "right"
    assert done("labels", "info", labels, *cache).report["finished"]
    # one more machine finds all there
    last = done(*labelling, "--cache-dir", tmp_path / "third").report
    assert last["shards_made"] == 0
    assert {name: store.data(f"labels/{name}") for name in local} == local


def test_an_image_of_a_set_in_a_bucket_is_shown(
    store: Store, labels_dir: Path, cache: list[Any], done: Run
) -> None:
    url = store.upload(labels_dir, "labels")
    here, there = (
        done("labels", "show", labels, "bees/01.jpg", "--json", *flags).report
        for labels, flags in ((labels_dir, []), (url, cache))
    )
    assert there == {**here, "labels": url}


def test_a_bucket_is_listed_no_more_than_is_needed(
    store: Store, here: Path, cache: list[Any], done: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each listing is a request for every thousand files; a set may have changed after hours."""
    labels, listed, listing = (
        store.upload(here / "labels", "labels"),
        list[str](),
        object_store.listing,
    )

    def counted(url: str) -> dict[str, File]:
        listed.append(url)
        return listing(url)

    monkeypatch.setattr(object_store, "listing", counted)

    done("labels", "finish", labels, *cache)

    assert listed == [labels]
    remote_store = RemoteStore(labels, Cache(cache[1], 10**9))
    remote_store.fetch_all()
    store.system.rm(f"{labels}/train-00001.h5")
    remote_store.fetch_all()
    assert remote_store.is_missing("train-00001.h5")


def with_batch_size(flags: list[Any]) -> Any:
    return flags[flags.index("--batch-size") + 1]


@pytest.mark.slow
def test_a_shard_that_was_made_but_not_put_is_put_by_the_next_run(
    store: Store,
    tar_dir: Path,
    here: Path,
    precompute_flags: list[Any],
    cache: list[Any],
    done: Run,
    run_cli: Run,
    contents: Files,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(transfer, "RETRY_DELAY_S", 0.0)
    labelling = with_flag(without_flag(precompute_flags, "--shard-size"), "--data-dir", tar_dir)
    labelling += ["--output", f"{store.url}/labels", *cache]

    def may_pass(request: bytes) -> int | None:
        return 0 if request.startswith(b"PUT") and b"train-00001.h5" in request[:200] else None

    with cutting_proxy(store.port, may_pass) as port:
        store.through(port)
        told = one_line(run_cli(*labelling), 1)
    assert "cannot write s3://" in told
    assert "manifest.json" not in store.names("labels")
    store.through(store.port)

    report = done(*labelling).report

    assert report["shards_made"] < 6
    local = contents(here / "labels")
    assert {name: store.data(f"labels/{name}") for name in local} == local


def damaged(data: bytes) -> bytes:
    """Return as many bytes, of which some are others."""
    middle = len(data) // 2
    return data[:middle] + bytes(b ^ 0xFF for b in data[middle : middle + 64]) + data[middle + 64 :]


def test_a_damaged_shard_in_a_bucket_is_made_anew_by_a_machine_that_has_no_copy(
    store: Store,
    tar_dir: Path,
    here: Path,
    precompute_flags: list[Any],
    cache: list[Any],
    done: Run,
    contents: Files,
) -> None:
    local, name = contents(here / "labels"), "train-00001.h5"
    labels = store.upload(here / "labels", "labels")
    store.system.pipe_file(f"{labels}/{name}", damaged(local[name]))
    labelling = with_flag(without_flag(precompute_flags, "--shard-size"), "--data-dir", tar_dir)

    report = done(*labelling, "--output", labels, *cache).report

    assert report["shards_made"] == 1
    assert {name: store.data(f"labels/{name}") for name in local} == local


@pytest.mark.parametrize(
    "size",
    [1000, pytest.param(101 << 20, marks=pytest.mark.slow)],  # which goes in parts if it may
)
def test_of_two_jobs_that_make_a_damaged_shard_anew_the_first_one_wins(
    size: int, store: Store, tmp_path: Path
) -> None:
    url = f"{store.url}/labels"
    store.system.pipe_file(f"{url}/plan.json", b"{}")
    store.system.pipe_file(f"{url}/train-00001.h5", b"damaged")
    stores = [RemoteStore(url, Cache(tmp_path / str(number), 10**9)) for number in range(2)]
    for letter, remote_store in zip((b"a", b"b"), stores, strict=True):
        remote_store.fetch("train-00001.h5")
        assert (remote_store.folder / "train-00001.h5").read_bytes() == b"damaged"
        (remote_store.folder / "train-00001.h5").write_bytes(letter * size)

    were_first = [remote_store.upload("train-00001.h5", damaged=True) for remote_store in stores]

    assert were_first == [True, False]
    assert store.data("labels/train-00001.h5") == b"a" * size
    assert (stores[1].folder / "train-00001.h5").read_bytes() == b"a" * size


def test_a_damaged_shard_that_was_removed_meanwhile_is_put(store: Store, tmp_path: Path) -> None:
    there, new = f"{store.url}/labels/train-00001.h5", tmp_path / "new"
    store.system.pipe_file(there, b"damaged")
    damaged = object_store.info(there)
    new.write_bytes(b"whole")
    store.system.rm(there)

    assert object_store.upload(there, new, damaged=damaged)

    assert store.data("labels/train-00001.h5") == b"whole"


def test_a_damaged_copy_of_a_shard_is_fetched_anew(
    store: Store,
    tar_dir: Path,
    here: Path,
    precompute_flags: list[Any],
    cache: list[Any],
    done: Run,
    contents: Files,
) -> None:
    local, name = contents(here / "labels"), "train-00001.h5"
    labels = store.upload(here / "labels", "labels")
    done("labels", "info", labels, *cache)
    (copy,) = cache[1].rglob(name)
    copy.write_bytes(damaged(local[name]))
    labelling = with_flag(without_flag(precompute_flags, "--shard-size"), "--data-dir", tar_dir)

    report = done(*labelling, "--output", labels, *cache).report

    assert report["shards_made"] == 0
    assert copy.read_bytes() == local[name]


@pytest.fixture
def indexed(store: Store, tar_dir: Path) -> str:
    """The tar shards in a bucket, with their indices."""
    images = store.upload(tar_dir, "images")
    for tar in tar_dir.glob("*.tar"):
        index = create_plain_index(tar)
        store.system.pipe_file(f"{images}/{tar.name}.index", index_bytes(index))
    return images


@pytest.mark.slow
def test_a_shard_of_images_that_cannot_be_fetched_fails_alone_in_a_job(
    store: Store,
    tar_dir: Path,
    indexed: str,
    precompute_flags: list[Any],
    cache: list[Any],
    tmp_path: Path,
    run_cli: Run,
) -> None:
    name = "train-000001.tar"
    store.system.pipe_file(f"{indexed}/{name}", damaged((tar_dir / name).read_bytes()))
    labelling = with_flag(without_flag(precompute_flags, "--shard-size"), "--data-dir", indexed)
    listed = tmp_path / "list.txt"
    listed.write_text("train-00000.h5\ntrain-00001.h5\ntrain-00002.h5\n")

    result = run_cli(*labelling, "--output", tmp_path / "labels", *cache, "--shard-list", listed)

    assert result.code == 1
    assert result.report["failed"].keys() == {"train-00001.h5"}
    assert "is not the file that its index describes" in result.report["failed"]["train-00001.h5"]
    assert result.report["shards_made"] == 2


def test_a_full_disk_of_copies_is_no_bad_image(
    indexed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    far = open_source(indexed, "train", cache=Cache(tmp_path / "cache", 10**9))

    def fetch(url: str, path: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(object_store, "fetch", fetch)
    with pytest.raises(RemoteError, match=r"cannot keep a copy of s3://.*No space left"):
        ViewReader(far, img_size=8).read([(0, (CENTRE,))])


@pytest.mark.slow
def test_a_shard_that_another_machine_made_anew_takes_the_place_of_its_copy(
    store: Store, here: Path, cache: list[Any], done: Run, contents: Files
) -> None:
    """Also one of the same size; then a set that was removed leaves nothing behind here."""
    local, name = contents(here / "labels"), "train-00001.h5"
    labels = store.upload(here / "labels", "labels")
    store.system.pipe_file(f"{labels}/{name}", b"x" * len(local[name]))
    store.system.rm(f"{labels}/manifest.json")
    cache_dir = Path(cache[1])
    with pytest.raises(AssertionError, match="1 damaged"):
        done("labels", "finish", labels, *cache)
    store.system.pipe_file(f"{labels}/{name}", local[name])

    done("labels", "finish", labels, *cache, "--batch-size", 256)

    (copy,) = cache_dir.rglob(name)
    assert copy.read_bytes() == local[name]
    store.system.rm(labels, recursive=True)
    with pytest.raises(AssertionError):
        done("labels", "status", labels, *cache)
    assert not [path for path in copy.parent.iterdir() if path.suffix in (".h5", ".json")]


@pytest.mark.parametrize(
    "pattern",
    mostly_slow(["", "/{split}-{{000000..000009}}.tar", "/{split}-*.tar", "/*.tar"], fast=2),
)
def test_shards_in_a_bucket_are_found(
    pattern: str, store: Store, tar_dir: Path, tmp_path: Path
) -> None:
    images = store.upload(tar_dir, "images")
    for split in ("train", "val"):
        local = open_source(tar_dir, split)
        last = sorted(tar_dir.glob(f"{split}-*.tar"))[-1].stem[-6:]
        url = images + pattern.format(split=split).replace("000009", last)
        far = open_source(url, split, cache=Cache(tmp_path / "cache", 10**9))
        assert (far.keys, list(far.labels), far.classes) == (
            local.keys,
            list(local.labels),
            local.classes,
        )
        order = np.random.default_rng(0).permutation(len(local)).tolist()
        assert [far.read(p) for p in order] == [local.read(p) for p in order]


def flipped(tar: bytes, image: bytes) -> bytes:
    """Return a tar file of as many bytes, with another image in the place of one."""
    assert tar.count(image) == 1
    return tar.replace(image, image[::-1])


@pytest.mark.parametrize("kind", ["s3", "http"])
@pytest.mark.parametrize("with_index", mostly_slow([False, True]))
def test_a_shard_that_was_replaced_is_fetched_and_indexed_anew(
    kind: str, with_index: bool, store: Store, tar_dir: Path, tmp_path: Path
) -> None:
    """Also by one of the same size, of which only the bytes of an image differ."""
    here = tmp_path / "tars"
    here.mkdir()
    tars = sorted(tar_dir.glob("train-*.tar"))[:2]
    for number, tar in enumerate(tars):
        (here / f"train-{number}.tar").write_bytes(tar.read_bytes())
    cache, serving = Cache(tmp_path / "cache", 10**9), contextlib.ExitStack()
    with serving:
        if kind == "s3":
            url = store.upload(here, "images")
        else:
            url = f"{serving.enter_context(web_server(here))}/train-{{0..1}}.tar"

        def there() -> list[tuple[str, bytes]]:
            if with_index:
                for tar in here.glob("*.tar"):
                    index = create_plain_index(tar)
                    tar.with_name(f"{tar.name}.index").write_bytes(index_bytes(index))
            if kind == "s3":
                store.upload(here, "images")
            far = open_source(url, "train", cache=cache)
            return [(key, far.read(p)) for p, key in enumerate(far.keys)]

        before, path = there(), here / "train-1.tar"
        key, image = before[-1]
        path.write_bytes(flipped(path.read_bytes(), image))
        os.utime(path, (1e9, 1e9))  # a web server tells seconds
        after = there()

    assert after == [*before[:-1], (key, image[::-1])]


def test_a_shard_that_is_replaced_while_it_is_read_is_no_bad_image(
    store: Store, tar_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, cache = store.upload(tar_dir, "images"), Cache(tmp_path / "cache", 10**9)
    far = open_source(url, "train", cache=cache)
    image = open_source(tar_dir, "train").read(0)
    for copy in cache.folder.rglob("*.tar"):
        copy.unlink()  # as another process may, that needs the room
    for tar in tar_dir.glob("train-*.tar"):
        data = tar.read_bytes()
        if image in data:
            store.system.pipe_file(f"{url}/{tar.name}", flipped(data, image))

    with pytest.raises(RemoteError, match=r"train-\d+\.tar was replaced while it was read"):
        ViewReader(far, img_size=8).read([(0, (CENTRE,))])


def test_a_damaged_shard_and_what_is_no_tar_file_go_by_their_urls(
    store: Store, tar_dir: Path, tmp_path: Path
) -> None:
    url, cache = store.upload(tar_dir, "images"), Cache(tmp_path / "cache", 10**9)
    name = "train-000001.tar"
    store.system.pipe_file(f"{url}/{name}", (tar_dir / name).read_bytes()[:5000])
    with pytest.raises(DataError, match=f"{url}/{name}") as told:
        open_source(url, "train", cache=cache)
    assert str(cache.folder) not in str(told.value)


def test_a_damaged_index_of_a_copy_is_made_anew(
    store: Store, tar_dir: Path, tmp_path: Path
) -> None:
    url, cache = store.upload(tar_dir, "images"), Cache(tmp_path / "cache", 10**9)
    before = open_source(url, "train", cache=cache)
    for index in cache.folder.rglob("*.index"):
        index.write_bytes(b"nonsense")

    after = open_source(url, "train", cache=cache)

    assert list(after.keys) == list(before.keys)


def test_shards_come_from_a_web_server_or_a_program_too(tar_dir: Path, tmp_path: Path) -> None:
    local = open_source(tar_dir, "train")
    last = sorted(tar_dir.glob("train-*.tar"))[-1].stem[-6:]
    names = f"train-{{000000..{last}}}.tar"
    with web_server(tar_dir) as url:
        for place in (f"{url}/{names}", f"pipe:cat {tar_dir}/{names}"):
            far = open_source(place, "train", cache=Cache(tmp_path / "cache", 10**9))
            assert far.keys == local.keys
            assert [far.read(p) for p in range(len(far))] == [
                local.read(p) for p in range(len(local))
            ]


def test_shards_behind_a_url_may_have_no_class_ids(store: Store, tmp_path: Path) -> None:
    write_tar(tmp_path / "tars" / "train-0.tar", [("1.jpg", b"x"), ("2.jpg", b"yy")])
    url, cache = store.upload(tmp_path / "tars", "images"), Cache(tmp_path / "cache", 10**9)
    for _ in range(2):  # by the headers, and by the index of the copy
        source = open_source(url, "train", cache=cache, names=lambda: ["ants", "bees"])
        assert is_unlabelled(source)
        assert (source.classes, source.read(1)) == (["ants", "bees"], b"yy")
    with pytest.raises(DataError, match=f"sample 1 of {url}/train-0.tar has no class"):
        open_source(url, "train", cache=cache)


@pytest.mark.slow
def test_a_small_cache_is_kept_small_and_enough(
    data_dir: Path, store: Store, tmp_path: Path
) -> None:
    tars = tar_tree(data_dir, tmp_path / "tars", per_shard=2)
    url, size = store.upload(tars, "images"), 21_000
    assert max(path.stat().st_size for path in tars.glob("train-*.tar")) < size
    cache = Cache(tmp_path / "cache", 10 * size)
    far, local = open_source(url, "train", cache=cache), open_source(tars, "train")
    for position in np.random.default_rng(1).permutation(len(local)).tolist():
        assert far.read(position) == local.read(position)
        kept = [p for p in cache.folder.rglob("*.tar*") if p.name[0] != "."]
        assert len(kept) > 5
        assert sum(path.stat().st_size for path in kept) <= cache.limit
    with pytest.raises(ConfigError, match=r"needs 9 of its shards at a time"):
        open_source(url, "train", cache=Cache(tmp_path / "cache", 2 * size))


def test_a_process_that_ends_does_not_fetch_all_that_it_would_have_read(
    indexed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    far = open_source(indexed, "train", cache=Cache(tmp_path / "cache", 10**9))
    assert isinstance(far, RemoteShards)
    far.read(0)
    begun, may_go_on = list[str](), threading.Event()

    def fetch(tar: RemoteTar) -> None:
        begun.append(tar.name)
        assert may_go_on.wait(60)

    monkeypatch.setattr(RemoteTar, "fetch", fetch)
    monkeypatch.setattr(remote_tar, "_MAX_FETCHES", 1)
    far.announce(range(4))
    far.read(0)
    far._threads.shutdown(wait=False)  # as the interpreter does at the end
    may_go_on.set()
    far._threads.shutdown()

    assert len(begun) == 1


# --- what goes wrong --------------------------------------------------------------------------


def one_line(result: Result, code: int) -> str:
    """Return the one line of a command that failed."""
    assert result.code == code, result.stderr
    lines = [line for line in result.stderr.splitlines() if line.startswith("mealv2: ")]
    assert len(lines) == 1, result.stderr
    assert "Traceback" not in result.stderr
    for secret in KEYS.values():
        assert len(secret) < 5 or secret not in result.stderr
    return lines[0]


def test_a_missing_bucket_and_a_missing_set_are_said(
    store: Store,
    tar_dir: Path,
    distill_flags: list[Any],
    cache: list[Any],
    run_cli: Run,
    here: Path,
) -> None:
    images = store.upload(tar_dir, "images")
    flags = training_flags(distill_flags, "s3://no-such-bucket/images", here / "labels")
    assert "there is no bucket no-such-bucket" in one_line(run_cli(*flags, *cache), 2)
    flags = training_flags(distill_flags, f"{store.url}/nothing", here / "labels")
    assert "no tar files of the split train" in one_line(run_cli(*flags, *cache), 2)
    flags = training_flags(distill_flags, images, f"{store.url}/nothing")
    assert "has no label set" in one_line(run_cli(*flags, *cache), 3)


def test_a_damaged_set_in_a_bucket_goes_by_its_url(
    store: Store,
    here: Path,
    tar_dir: Path,
    distill_flags: list[Any],
    cache: list[Any],
    done: Run,
    run_cli: Run,
    contents: Files,
) -> None:
    local, name = contents(here / "labels"), "train-00001.h5"
    labels = store.upload(here / "labels", "labels")
    assert labels in done("labels", "info", labels, *cache).stderr
    flags = training_flags(distill_flags, tar_dir, labels)
    refused = run_cli(*flags, *cache, "--no-reuse-views", "--epochs", 99)
    store.system.pipe_file(f"{labels}/{name}", b"x" * len(local[name]))

    results = [
        run_cli("labels", "status", labels, *cache),
        run_cli("labels", "finish", labels, *cache),
        refused,
    ]
    store.system.pipe_file(f"{labels}/plan.json", b"nonsense")
    store.system.rm(f"{labels}/manifest.json")
    results.append(run_cli("labels", "finish", labels, *cache))

    for result in results:
        assert result.code in (1, 2, 3)
        assert str(cache[1]) not in result.stderr + result.stdout
        assert labels in result.stderr
    assert f"{labels}/{name} is" in results[0].stderr
    assert f"{labels}/{name}" in results[0].report["blocks"][0]["damaged"][name]
    assert f"{labels}/plan.json" in one_line(results[-1], 3)


def test_a_cut_connection_is_tried_again(store: Store, tar_dir: Path, tmp_path: Path) -> None:
    url, local = store.upload(tar_dir, "images"), open_source(tar_dir, "train")
    cut: list[bytes] = []

    def may_pass(request: bytes) -> int | None:
        wanted = request.split(b"\r\n", 1)[0]
        if b"GET" in wanted and b".tar" in wanted and cut.count(wanted) < 2:
            cut.append(wanted)
            return 700  # the head and a little of the body
        return None

    with cutting_proxy(store.port, may_pass) as port:
        store.through(port)
        far = open_source(url, "train", cache=Cache(tmp_path / "cache", 10**9))
        assert [far.read(p) for p in range(len(far))] == [local.read(p) for p in range(len(far))]
    assert len(cut) >= 2


def test_a_connection_that_stays_cut_ends_in_a_line_and_nothing_is_lost(
    store: Store,
    tar_dir: Path,
    here: Path,
    distill_flags: list[Any],
    cache: list[Any],
    tmp_path: Path,
    run_cli: Run,
    done: Run,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(transfer, "RETRY_DELAY_S", 0.0)
    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 1)  # it waits between its own attempts
    images, labels = store.upload(tar_dir, "images"), store.upload(here / "labels", "labels")
    flags = training_flags(distill_flags, images, labels)
    with cutting_proxy(store.port, lambda request: 700 if b".h5" in request else None) as port:
        store.through(port)
        told = one_line(run_cli(*flags, *cache, "--output", tmp_path / "run"), 1)
    assert "cannot read s3://" in told
    assert "run the same command again" in told
    assert not [*(tmp_path / "cache").rglob("*.h5")]
    store.through(store.port)

    assert done(*flags, *cache, "--output", tmp_path / "run").report["epochs"] == 2


def test_wrong_credentials_are_said_and_not_shown(
    tar_dir: Path,
    here: Path,
    distill_flags: list[Any],
    cache: list[Any],
    run_cli: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with denying_server() as port:
        store = Store(port, None, monkeypatch)
        flags = training_flags(distill_flags, "s3://bucket/images", here / "labels")
        told = one_line(run_cli(*flags, *cache), 1)
        assert "check the credentials" in told
        flags = training_flags(distill_flags, tar_dir, "s3://bucket/labels")
        assert "check the credentials" in one_line(run_cli(*flags, *cache), 1)
        assert store.port == port
