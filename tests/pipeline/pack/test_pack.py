"""mealv2 pack: the same pixels, the same labels, whatever comes in between."""

import io
import itertools
import os
import shutil
import signal
import subprocess
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from packs import final, one_line
from PIL import Image

from conftest import Result
from mealv2.data import jpegtran
from mealv2.data.folder import ImageFolder
from mealv2.data.jpeg_restart import is_packed, read_header
from mealv2.data.pack_index import INDEX_NAME, Pack, PackedImage, PackedTar
from mealv2.data.pixels import decode
from mealv2.data.source import fingerprint
from mealv2.errors import DataError
from mealv2.storage.atomic import write_atomic
from mealv2.storage.json_format import sealed_json
from pictures import flip
from pipeline.pack import common, folder
from tars import tar_tree
from warm import warm_process

Run = Callable[..., Result]
Files = Callable[..., dict[str, bytes]]

needs_jpegtran = pytest.mark.skipif(
    shutil.which("jpegtran") is None, reason="needs jpegtran (Debian: libjpeg-turbo-progs)"
)


@pytest.fixture(scope="module")
def packed_dir(done: Run, data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tree, packed. Not to be changed."""
    if shutil.which("jpegtran") is None:
        pytest.skip("needs jpegtran (Debian: libjpeg-turbo-progs)")
    out = tmp_path_factory.mktemp("packed") / "out"
    done("pack", "--data-dir", data_dir, "--output", out)
    return out


@pytest.fixture
def own_pack(packed_dir: Path, tmp_path: Path) -> Path:
    """A copy of the packed tree that a test may change."""
    return Path(shutil.copytree(packed_dir, tmp_path / "own-pack"))


def jpeg(image: Image.Image, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", **options)
    return file.getvalue()


def noise(width: int, height: int) -> Image.Image:
    pixels = np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


# --- the same images ----------------------------------------------------------------------------


def test_a_packed_tree_has_the_same_keys_classes_pixels_and_fingerprint(
    data_dir: Path, packed_dir: Path
) -> None:
    for split in ("train", "val"):
        data, packed = ImageFolder(data_dir, split), ImageFolder(packed_dir, split)
        assert packed.keys == data.keys
        assert packed.labels == data.labels
        assert packed.classes == data.classes
        assert packed.sizes == data.sizes
        assert fingerprint(packed) == fingerprint(data)
        for position, key in enumerate(data.keys):
            before, after = data.read(position), packed.read(position)
            assert decode(after).tobytes() == decode(before).tobytes()
            assert (before != after) == is_packed(after) == key.endswith("jpg")
            if key.endswith("jpg"):
                file = read_header(after)
                assert file is not None
                assert file.region(9, 9, 2, 2) is not None


def test_the_report_counts_images_bytes_and_reasons(
    done: Run, data_dir: Path, tmp_path: Path
) -> None:
    if shutil.which("jpegtran") is None:
        pytest.skip("needs jpegtran (Debian: libjpeg-turbo-progs)")
    out = tmp_path / "out"
    report = done("pack", "--data-dir", data_dir, "--output", out, "--split", "val").report
    files = [p for p in out.rglob("*.*") if p.name != INDEX_NAME]
    assert report["splits"] == ["val"]
    assert (report["images"], report["packed"], report["made_now"]) == (15, 12, 15)
    assert report["kept"] == {"not a JPEG": 3}
    assert report["bytes_before"] == sum(ImageFolder(data_dir, "val").sizes)
    assert report["bytes_after"] == sum(p.stat().st_size for p in files)
    assert report["seconds"] >= 0
    assert done("pack", "--data-dir", data_dir, "--output", out).report["splits"] == [
        "train",
        "val",
    ]


def test_labels_of_the_originals_are_labels_of_the_packed_and_the_other_way_round(
    done: Run,
    packed_dir: Path,
    data_dir: Path,
    labels_dir: Path,
    teacher_flags: list[str],
    precompute_flags: list[str],
    distill_flags: list[str],
    tmp_path: Path,
    contents: Files,
) -> None:
    report = done("labels", "verify", labels_dir, "--data-dir", packed_dir).report
    assert report["data"] == "the same"
    asked = ["--relabel", 20, "--workers", 0, *teacher_flags]
    again = done("labels", "verify", labels_dir, "--data-dir", packed_dir, *asked).report
    assert again["relabelled"]["views"] == 20
    assert again["relabelled"]["top1_agreement"] == 100
    done(*distill_flags, "--data-dir", packed_dir, "--epochs", 1, "--output", tmp_path / "run")
    done(*precompute_flags, "--data-dir", packed_dir, "--output", tmp_path / "labels")
    assert contents(tmp_path / "labels") == contents(labels_dir)
    done("labels", "verify", tmp_path / "labels", "--data-dir", data_dir)


@needs_jpegtran
def test_each_kind_of_file_is_packed_or_copied_for_its_reason(
    done: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = noise(97, 50)
    whole = jpeg(image)
    files = {
        "baseline.jpg": whole,
        "progressive.JPEG": jpeg(image, progressive=True),
        "gray.jpeg": jpeg(image.convert("L")),
        "exif.jpg": jpeg(image, exif=b"Exif\0\0" + bytes(300), comment=b"kept"),
        "cmyk.jpg": jpeg(image.convert("CMYK")),
        "cut short.jpg": whole[: len(whole) // 2],
        "empty.jpg": b"",
        "text.jpg": b"no image",
        "other/图像.png": b"",
        "behind.jpg": whole + b"something behind the end",
    }
    file = io.BytesIO()
    image.save(file, "PNG")
    files["other/图像.png"] = files["a png.jpg"] = file.getvalue()
    for name, data in files.items():
        path = tmp_path / "data" / "train" / "ants" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    result = done("pack", "--data-dir", tmp_path / "data", "--output", tmp_path / "out")
    pack = Pack.read(tmp_path / "out" / "train" / INDEX_NAME)
    assert pack is not None
    kept = {key: image.kept for key, image in pack.images().items() if image.kept}
    assert kept == {
        "ants/cmyk.jpg": jpegtran.OTHER_KIND,
        "ants/cut short.jpg": jpegtran.UNREADABLE,
        "ants/empty.jpg": jpegtran.UNREADABLE,
        "ants/text.jpg": jpegtran.UNREADABLE,
        "ants/other/图像.png": jpegtran.NOT_A_JPEG,
        "ants/a png.jpg": jpegtran.NOT_A_JPEG,
    }
    assert result.report["packed"] == 5
    assert result.stderr.count("cannot be decoded, copied unchanged") == 3
    for name, data in files.items():
        there = (tmp_path / "out" / "train" / "ants" / name).read_bytes()
        assert is_packed(there) == (f"ants/{name}" not in kept)
        assert (there == data) == (f"ants/{name}" in kept)
        if is_packed(there):
            assert decode(there).tobytes() == decode(data).tobytes()
    assert b"kept" in (tmp_path / "out" / "train" / "ants" / "exif.jpg").read_bytes()


@needs_jpegtran
@pytest.mark.parametrize("wrong", ["other pixels", "no image", "not packed", "refuses"])
def test_a_jpegtran_that_does_something_else_makes_no_file(
    done: Run, own_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: str
) -> None:
    right = jpegtran.Jpegtran.restarted
    name = min(own_data.glob("val/ants/*.jpg"))
    other = jpeg(noise(*decode(name.read_bytes()).shape[1::-1]))

    def restarted(self: jpegtran.Jpegtran, data: bytes, interval: int) -> bytes | None:
        if data != name.read_bytes():
            return right(self, data, interval)
        packed = right(self, data if wrong == "no image" else other, interval) or b""
        return {
            "other pixels": packed,
            "no image": packed[: len(packed) // 2],
            "not packed": data,
            "refuses": None,
        }[wrong]

    monkeypatch.setattr(jpegtran.Jpegtran, "restarted", restarted)
    result = done("pack", "--data-dir", own_data, "--output", tmp_path / "out", "--split", "val")
    copy = tmp_path / "out" / name.relative_to(own_data)
    assert copy.read_bytes() == name.read_bytes()
    reason = jpegtran.DIFFERENT if wrong in ("other pixels", "no image") else jpegtran.REFUSED
    assert result.report["kept"] == {jpegtran.NOT_A_JPEG: 3, reason: 1}


@pytest.mark.parametrize(
    ("per_row", "interval"), [(1, 1), (63, 3), (64, 4), (15, 3), (10, 5), (47, 1), (6, 3), (20, 4)]
)
def test_the_interval_divides_the_row_and_is_about_4(per_row: int, interval: int) -> None:
    assert jpegtran.interval_of(per_row) == interval


# --- stopped and gone on ------------------------------------------------------------------------


@pytest.mark.slow
def test_killed_at_any_time_it_ends_in_the_same_bytes(
    done: Run, data_dir: Path, packed_dir: Path, tmp_path: Path, contents: Files
) -> None:
    if not Path("/proc/self/task").exists():
        pytest.skip("needs /proc, to know that a process has one thread")
    reference = contents(packed_dir)
    flags = ["pack", "--data-dir", str(data_dir), "--workers", "2"]
    kills, unfinished = 0, 0
    with warm_process(tmp_path, [*flags, "--output", tmp_path / "first"]) as warm:
        out = tmp_path / "timed"
        num_events = len(warm.done(*flags, "--output", out, out=out)["events"])
        assert contents(out) == reference
        out = tmp_path / "out"
        for event in [0, 1, 2, 4, *range(8, num_events, num_events // 12)]:
            job = {"args": [*flags, "--output", str(out)], "out": str(out), "kill_at_event": event}
            kills += warm.run(job)[0]["code"] == -signal.SIGKILL
            left = final(contents(out))
            # nothing torn; only the index is there before it is finished
            different = {name for name, data in left.items() if data != reference[name]}
            assert different <= {f"train/{INDEX_NAME}", f"val/{INDEX_NAME}"}
            if f"train/{INDEX_NAME}" in different:
                unfinished += 1
                with pytest.raises(DataError, match="only partly packed; run the same"):
                    ImageFolder(out, "train")
    assert kills >= 8
    assert unfinished >= 4
    report = done(*flags, "--output", out).report
    assert report["made_now"] < 51
    assert final(contents(out)) == reference


def test_ctrl_c_ends_with_4_and_the_same_command_goes_on(
    run_cli: Run,
    done: Run,
    data_dir: Path,
    packed_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    contents: Files,
) -> None:
    written: list[Path] = []
    numbers = itertools.count(1)

    def write(path: Path, data: bytes) -> bool:
        written.append(path)
        if next(numbers) == 10:  # two threads may be here at once
            os.kill(os.getpid(), signal.SIGINT)
        return write_atomic(path, data)

    flags = ["pack", "--data-dir", data_dir, "--output", tmp_path / "out", "--workers", 2]
    with monkeypatch.context() as patched:
        patched.setattr(folder, "write_atomic", write)
        result = run_cli(*flags)
    assert result.code == 4
    assert result.stderr.count("mealv2: ") == 1
    assert result.stderr.endswith("run the same command again to continue\n")
    assert 10 <= len(written) < 40
    there = len(list((tmp_path / "out").rglob("*.jpg")))
    report = done(*flags).report
    # what is a JPEG and there is not made again
    assert report["made_now"] == 51 - there
    assert contents(tmp_path / "out") == contents(packed_dir)


def test_nothing_is_begun_once_the_reader_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[int] = []
    release = threading.Event()
    shutdown = ThreadPoolExecutor.shutdown

    def work(item: int) -> int:
        begun.append(item)
        assert item == 0 or release.wait(60)
        return item

    def shut(pool: ThreadPoolExecutor, *, cancel_futures: bool = False) -> None:
        shutdown(pool, wait=False, cancel_futures=cancel_futures)
        release.set()
        shutdown(pool)

    monkeypatch.setattr(ThreadPoolExecutor, "shutdown", shut)
    results = common.in_threads(work, range(100), workers=1)
    assert next(results) == 0
    results.close()  # type: ignore[attr-defined]
    assert set(begun) <= {0, 1}


def test_a_finished_pack_is_left_alone_and_one_with_holes_is_mended(
    done: Run, own_pack: Path, data_dir: Path, packed_dir: Path, contents: Files
) -> None:
    flags = ["pack", "--data-dir", data_dir, "--output", own_pack]
    times = {p: p.stat().st_mtime_ns for p in own_pack.rglob("*.*")}
    report = done(*flags).report
    assert report["made_now"] == 0
    assert report["kept"] == {"not a JPEG": 15}
    assert {p: p.stat().st_mtime_ns for p in own_pack.rglob("*.*")} == times
    (own_pack / "train/ants/00.jpg").unlink()
    (own_pack / "train/bees/02.png").write_bytes(b"torn")
    assert done(*flags).report["made_now"] == 2
    assert contents(own_pack) == contents(packed_dir)


def test_half_a_file_of_an_unfinished_pack_is_made_again(
    done: Run, own_pack: Path, data_dir: Path, packed_dir: Path, contents: Files
) -> None:
    pack = Pack.read(own_pack / "train" / INDEX_NAME)
    assert pack is not None
    (own_pack / "train" / INDEX_NAME).write_bytes(replace(pack, files=None).to_bytes())
    torn = own_pack / "train/ants/00.jpg"
    torn.write_bytes(torn.read_bytes()[:-300])
    original = own_pack / "train/ants/01.jpg"
    original.write_bytes((data_dir / "train/ants/01.jpg").read_bytes())
    others = own_pack / "train/ants/03.jpg"
    others.write_bytes((own_pack / "train/ants/04.jpg").read_bytes())
    report = done("pack", "--data-dir", data_dir, "--output", own_pack).report
    assert report["made_now"] == 3 + 12  # and the PNGs, which say nothing of themselves
    assert contents(own_pack) == contents(packed_dir)


# --- what the index notices ---------------------------------------------------------------------


@pytest.mark.parametrize("what", ["replaced", "lost", "more"])
def test_files_that_are_not_those_of_the_index_are_named(
    run_cli: Run, own_pack: Path, labels_dir: Path, what: str
) -> None:
    path = own_pack / "train" / "bees" / "03.jpg"
    if what == "replaced":
        path.write_bytes(path.read_bytes() + b"\0")
        said = ["bytes", "run the same `mealv2 pack` again"]
    elif what == "lost":
        path.unlink()
        said = ["is missing", "run the same `mealv2 pack` again"]
    else:
        path = shutil.copy(path, path.with_name("more.jpg"))
        said = ["was not made by `mealv2 pack`"]
    one_line(run_cli("labels", "verify", labels_dir, "--data-dir", own_pack), 1, str(path), *said)


def sealed(**change: Any) -> str:
    value = {"data_sha256": "0", "settings": {"jpegtran": "j"}, "files": {}, **change}
    return sealed_json(("mealv2-pack", 1), value).decode()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        "null",
        "[" * 100_000,
        '{"format":"mealv2-pack","format_version":1}',
        sealed(format="x"),
        *(sealed(settings=value) for value in (1, None)),
        *(sealed(files=value) for value in ([], {"a": 1}, {"a": [1]}, {"a": [1, 2, 3]})),
        *(sealed(files={"a": row}) for row in ([1.0, 2], ["1", 2], [None, 2])),
    ],
)
def test_a_damaged_index_is_one_line(
    run_cli: Run, data_dir: Path, own_data: Path, text: str
) -> None:
    (own_data / "train" / INDEX_NAME).write_text(text)
    result = run_cli("finetune", "--data-dir", own_data, "--model", "test_resnet", "--epochs", 1)
    one_line(result, 1, str(own_data / "train" / INDEX_NAME))


def test_an_index_of_a_later_version_is_named(tmp_path: Path) -> None:
    data = sealed_json(("mealv2-pack", 2), {"data_sha256": "0", "settings": {}, "files": {}})
    with pytest.raises(DataError, match="has format version 2; this mealv2 reads version 1"):
        Pack.of_bytes(data, "here")


@pytest.mark.parametrize(
    "files",
    [
        None,
        {"ü/1.jpg": PackedImage(3, 2, 1, 2**64 - 1), "a/1.jpg": PackedImage(0, 0, 5, 5, "why")},
        {"train-000000.tar": PackedTar(512, "0f")},
    ],
)
def test_an_index_is_read_as_it_was_written(tmp_path: Path, files: Any) -> None:
    pack = Pack("0f", {"jpegtran": "j 1", "images_per_shard": 3}, files)
    (tmp_path / INDEX_NAME).write_bytes(pack.to_bytes())
    assert Pack.read(tmp_path / INDEX_NAME) == pack
    assert Pack.read(tmp_path / "nowhere") is None


def test_no_byte_of_an_index_can_change_unnoticed() -> None:
    data = Pack("0f", {"jpegtran": "j"}, {"a/1.jpg": PackedImage(3, 2, 1, 2)}).to_bytes()
    for place, bit in itertools.product(range(len(data)), (1, 16, 128)):
        changed = bytearray(data)
        changed[place] ^= bit
        with pytest.raises(DataError, match=r"^here "):
            Pack.of_bytes(bytes(changed), "here")


# --- refused before anything is written ---------------------------------------------------------


def test_without_jpegtran_it_says_what_to_install(
    run_cli: Run, data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    result = run_cli("pack", "--data-dir", data_dir, "--output", tmp_path / "out")
    one_line(result, 2, "jpegtran", "libjpeg-turbo-progs")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("script", ["exit 1", "cat", "echo odd"])
def test_a_program_that_is_no_jpegtran_is_refused(
    run_cli: Run, data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str
) -> None:
    program = tmp_path / "jpegtran"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    result = run_cli("pack", "--data-dir", data_dir, "--output", tmp_path / "out")
    one_line(result, 2, str(program), "does not put restart markers")
    assert not (tmp_path / "out").exists()


@needs_jpegtran
def test_a_jpegtran_that_is_killed_stops_the_run(
    run_cli: Run, data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = subprocess.run

    def killed(command: list[str], **options: Any) -> Any:
        if "4B" in command or "-version" in command:  # asked for its version, and by the first try
            return real(command, **options)
        return real(["sh", "-c", "kill -9 $$"], **options)

    monkeypatch.setattr(subprocess, "run", killed)
    result = run_cli("pack", "--data-dir", data_dir, "--output", tmp_path / "out")
    one_line(result, 1, "killed by signal 9", "run the same command again")
    pack = Pack.read(tmp_path / "out" / "train" / INDEX_NAME)
    assert pack is not None
    assert pack.files is None


@needs_jpegtran
@pytest.mark.parametrize("place", ["data", "data/packed", "data/train/packed", "."])
def test_out_and_data_may_not_lie_in_one_another(
    run_cli: Run, own_data: Path, place: str, contents: Files
) -> None:
    own_data = own_data.rename(own_data.with_name("data"))
    before = contents(own_data.parent)
    result = run_cli("pack", "--data-dir", own_data, "--output", own_data.parent / place)
    one_line(result, 2, "contain one another")
    assert contents(own_data.parent) == before


@needs_jpegtran
@pytest.mark.parametrize("there", ["notes.txt", "train/ants/1.jpg", "train/notes.txt", "more/x"])
def test_out_with_something_else_is_refused(
    run_cli: Run, data_dir: Path, tmp_path: Path, there: str, contents: Files
) -> None:
    path = tmp_path / "out" / there
    path.parent.mkdir(parents=True)
    path.write_text("mine")
    result = run_cli("pack", "--data-dir", data_dir, "--output", tmp_path / "out")
    one_line(result, 2, "is not empty", there.split("/")[0])
    assert contents(tmp_path / "out") == {there: b"mine"}


@needs_jpegtran
def test_out_that_is_a_file_is_refused(run_cli: Run, data_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    one_line(run_cli("pack", "--data-dir", data_dir, "--output", tmp_path / "out"), 2, "is a file")


def test_a_pack_of_other_images_or_by_another_jpegtran_is_refused(
    run_cli: Run, own_pack: Path, data_dir: Path, own_data: Path, contents: Files
) -> None:
    before = contents(own_pack)
    (own_data / "train" / "ants" / "00.jpg").write_bytes(b"another")
    result = run_cli("pack", "--data-dir", own_data, "--output", own_pack)
    one_line(result, 2, "holds other images", str(own_pack / "train"))
    assert contents(own_pack) == before
    shutil.copytree(data_dir, own_data, dirs_exist_ok=True)
    flip(own_data / "train" / "ants" / "00.jpg", at=-1)  # the size and the pixels stay
    result = run_cli("pack", "--data-dir", own_data, "--output", own_pack)
    one_line(result, 2, "was packed from another picture than", "train/ants/00.jpg of now")
    assert contents(own_pack) == before
    pack = Pack.read(own_pack / "val" / INDEX_NAME)
    assert pack is not None
    other = replace(pack, settings={"jpegtran": "another 1.0"})
    (own_pack / "val" / INDEX_NAME).write_bytes(other.to_bytes())
    result = run_cli("pack", "--data-dir", own_data, "--output", own_pack, "--split", "val")
    one_line(result, 2, "was packed with jpegtran another 1.0, which is ")


@needs_jpegtran
@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--split", "tset"], "no folder"),
        (["--split", "../val"], "--split '../val'"),
        (["--split", "/"], "--split '/'"),
        (["--split", "."], "--split '.'"),
        (["--split", ""], "--split ''"),
        (["--split", "train/ants"], "--split 'train/ants'"),
        (["--split", ".hidden"], "--split '.hidden'"),
        (["--workers", "0"], "--workers must be at least 1"),
        (["--wrokers", "2"], "--workers"),
        (["--data-dir", "/nowhere"], "/nowhere"),
    ],
)
def test_wrong_flags_are_one_line_and_nothing_is_written(
    run_cli: Run, data_dir: Path, tmp_path: Path, flags: list[str], named: str
) -> None:
    out = tmp_path / "out"
    one_line(run_cli("pack", "--data-dir", data_dir, "--output", out, *flags), 2, named)
    assert not out.exists()


@needs_jpegtran
def test_a_folder_of_classes_without_splits_is_named(
    run_cli: Run, data_dir: Path, tmp_path: Path
) -> None:
    result = run_cli("pack", "--data-dir", data_dir / "train", "--output", tmp_path / "out")
    one_line(result, 2, "has class folders", "ROOT/SPLIT/CLASS/IMAGE")


@needs_jpegtran
def test_a_file_that_cannot_be_read_at_all_stops_it(
    run_cli: Run, own_data: Path, tmp_path: Path
) -> None:
    path = own_data / "train" / "ants" / "gone.jpg"
    path.symlink_to("nowhere")
    result = run_cli("pack", "--data-dir", own_data, "--output", tmp_path / "out")
    one_line(result, 1, str(path), "replace it or remove it")


# --- tar files into a tree ----------------------------------------------------------------------


@needs_jpegtran
def test_tar_files_that_can_be_a_tree_become_one(done: Run, data_dir: Path, tmp_path: Path) -> None:
    tars, out = tar_tree(data_dir, tmp_path / "tars", keys=True), tmp_path / "out"
    done("pack", "--data-dir", tars, "--split", "val", "--output", out)
    assert fingerprint(ImageFolder(out, "val")) == fingerprint(ImageFolder(data_dir, "val"))


@needs_jpegtran
@pytest.mark.parametrize("what", ["keys", "classes", "no split"])
def test_tar_files_that_cannot_be_a_tree_are_refused_before_anything_is_written(
    run_cli: Run, data_dir: Path, tmp_path: Path, what: str
) -> None:
    tars, out = tar_tree(data_dir, tmp_path / "tars", keys=what != "keys"), tmp_path / "out"
    if what == "classes":
        names = (tars / "classes.txt").read_text()
        (tars / "classes.txt").write_text(f"{names}zebra\n")
    split = [] if what == "no split" else ["--split", "train"]
    result = run_cli("pack", "--data-dir", tars, *split, "--output", out)
    named = {
        "keys": ["is not ants/…/IMAGE.jpg", "--to tar"],
        "classes": ["needs an image of each", "--to tar"],
        "no split": ["has tar files and no class folders", "--split train"],
    }[what]
    one_line(result, 2, *named)
    assert not out.exists()
