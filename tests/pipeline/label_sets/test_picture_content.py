"""A picture is its bytes: labels belong to the content of the images, not to names and sizes."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import xxhash
from PIL import Image

from conftest import Result
from mealv2.data.content_hash import combined_sha256, content_hash, content_line
from mealv2.data.folder import ImageFolder
from mealv2.data.open import open_source
from mealv2.label_set import LabelSet, read_manifest
from mealv2.storage.cache import Cache
from mealv2.storage.json_format import parse_json
from pictures import flip
from stored import without_hashes
from stores import web_server

needs_jpegtran = pytest.mark.skipif(
    shutil.which("jpegtran") is None, reason="needs jpegtran (Debian: libjpeg-turbo-progs)"
)

Run = Callable[..., Result]
Make = Callable[..., Path]
NOT_LABELLED = "not the picture that was labelled"
KEY = "bees/03.jpg"


def flip_image(path: Path, image: bytes) -> None:
    """Change one bit of an image inside a larger file."""
    data = path.read_bytes()
    assert data.count(image) == 1
    flip(path, data.index(image) + len(image) // 2)


@pytest.fixture(scope="session")
def labels(make_set: Make) -> Path:
    """A label set of the tree; not to be changed."""
    return make_set("--topk", 2)


@pytest.fixture
def distil(run_cli: Run, labels: Path, student_dir: Path, tmp_path: Path) -> Run:
    """A function: distil for one epoch from the label set on some images."""

    def call(data_dir: object, *flags: object, epochs: int = 1) -> Result:
        words: list[object] = ["distill", "--data-dir", data_dir, "--labels", labels]
        words += ["--model", "test_resnet", "--initial-checkpoint", student_dir, "--workers", 0]
        words += ["--batch-size", 12, "--epochs", epochs, "--output", tmp_path / "run"]
        return run_cli(*words, "--device", "cpu", *flags)

    return call


# --- what is stored -------------------------------------------------------------------------------


def test_the_hash_is_xxh3_of_64_bits() -> None:
    """Golden: the value of no byte in XXH3's own tests; others would make every set useless."""
    assert content_hash(b"") == 0x2D06800538D394C2
    assert content_hash(b"mealv2") == xxhash.xxh3_64_intdigest(b"mealv2", seed=0)


def test_a_label_set_has_the_hash_of_every_image(labels: Path, data_dir: Path) -> None:
    splits = read_manifest(labels)["roles"]
    for split in ("train", "val"):
        source = open_source(data_dir, split)
        expected = {key: content_hash(source.read(p)) for p, key in enumerate(source.keys)}
        found: dict[str, int] = {}
        for file in LabelSet.open(labels, split=split).blocks[0][1]:
            found |= file.content_hashes()
        assert found == expected
        assert splits[split]["content"] == {
            "algorithm": "xxh3-64",
            "images": len(source),
            "sha256": combined_sha256(content_line(*item) for item in expected.items()),
        }


def test_a_skipped_image_keeps_the_hash_of_its_bytes(
    done: Run, label: Callable[..., list[object]], own_data: Path, tmp_path: Path, run_cli: Run
) -> None:
    bad = own_data / "train" / "ants" / "02.png"
    bad.write_bytes(b"not an image")
    flags = ["--data-dir", own_data, "--on-bad-image", "skip", "--output", tmp_path / "set"]
    done(*label(*flags))
    words = ["labels", "verify", tmp_path / "set", "--data-dir", own_data]
    report = done(*words).report
    assert (report["data"], report["images_compared"]) == ("the same", 36 + 15)
    bad.write_bytes(b"not an imagE")
    result = run_cli(*words)
    assert result.code == 3
    assert "ants/02.png" in result.stderr


# --- verify ---------------------------------------------------------------------------------------


def test_verify_compares_the_content_of_all_images(done: Run, labels: Path, data_dir: Path) -> None:
    result = done("labels", "verify", labels, "--data-dir", data_dir)
    size = sum(path.stat().st_size for path in data_dir.rglob("*") if path.is_file())
    assert result.report["data"] == "the same"
    assert result.report["data_compared"] == "content"
    assert result.report["images_compared"] == 36 + 15
    assert result.report["image_bytes_compared"] == size
    assert "compared the content of 36 images" in result.stderr
    assert "/s)" in result.stderr


def test_exchanged_pictures_of_one_size_are_found_but_not_by_quick(
    run_cli: Run, label: Callable[..., list[object]], own_data: Path, tmp_path: Path, done: Run
) -> None:
    paths = [own_data / "train" / name for name in ("ants/x.bmp", "bees/x.bmp")]
    for number, path in enumerate(paths):
        pixels = np.random.default_rng(number).integers(0, 256, (40, 50, 3), np.uint8)
        Image.fromarray(pixels).save(path)
    done(*label("--data-dir", own_data, "--output", tmp_path / "set"))
    one, two = (path.read_bytes() for path in paths)
    assert len(one) == len(two)
    paths[0].write_bytes(two)
    paths[1].write_bytes(one)
    words = ["labels", "verify", tmp_path / "set", "--data-dir", own_data]
    result = run_cli(*words)
    assert result.code == 3
    assert "2 of 38 images" in result.stderr
    assert "ants/x.bmp, bees/x.bmp" in result.stderr
    quick = done(*words, "--quick")
    assert quick.report["data_compared"] == "names and sizes"
    assert quick.report["images_compared"] == 0
    assert "compared names and sizes only" in quick.stderr


def test_a_set_without_hashes_says_so(
    done: Run, labels: Path, data_dir: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(labels, tmp_path / "set"))
    without_hashes(folder)
    result = done("labels", "verify", folder, "--data-dir", data_dir)
    assert result.report["data_compared"] == "names and sizes"
    assert "has no content hashes" in result.stderr


# --- training -------------------------------------------------------------------------------------


def test_distill_stops_at_a_picture_that_was_not_labelled(distil: Run, own_data: Path) -> None:
    flip(own_data / "train" / KEY)
    result = distil(own_data)
    assert result.code == 3
    assert KEY in result.stderr
    assert NOT_LABELLED in result.stderr


def test_distill_skips_and_counts_such_pictures(
    distil: Run, own_data: Path, tmp_path: Path
) -> None:
    flip(own_data / "train" / KEY)
    flip(own_data / "val" / "ants" / "01.jpg")
    result = distil(own_data, "--on-bad-image", "skip")
    assert result.code == 0, result.stderr
    head, row = (tmp_path / "run" / "summary.csv").read_text().splitlines()[:2]
    assert dict(zip(head.split(","), row.split(","), strict=True))["train_images_skipped"] == "1"


def test_validation_images_are_compared_too(distil: Run, own_data: Path) -> None:
    flip(own_data / "val" / "ants" / "01.jpg")
    result = distil(own_data)
    assert result.code == 3
    assert "ants/01.jpg" in result.stderr


def test_never_compares_names_and_sizes_only(distil: Run, own_data: Path) -> None:
    flip(own_data / "train" / KEY, at=-1)  # after the picture's end: it decodes as before
    assert distil(own_data, "--check-images", "never").code == 0


@pytest.mark.parametrize(("when", "code"), [("first", 0), ("always", 3)])
def test_a_picture_that_changes_during_a_run_is_found_by_always(
    when: str, code: int, distil: Run, own_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, reads = ImageFolder.read, set[int]()

    def changing(self: ImageFolder, position: int) -> bytes:
        data = read(self, position)
        is_second = position in reads
        reads.add(position)
        return data + b"x" if is_second and self.split == "train" else data

    monkeypatch.setattr(ImageFolder, "read", changing)
    flags = ["--check-images", when, "--val-split", "none"]
    assert distil(own_data, *flags, epochs=2).code == code


# --- stage one, continued -------------------------------------------------------------------------


def test_a_resumed_precompute_does_not_mix_two_versions_of_the_pictures(
    run_cli: Run, done: Run, label: Callable[..., list[object]], own_data: Path, tmp_path: Path
) -> None:
    words = [*label("--data-dir", own_data), "--output", tmp_path / "set"]
    done(*words)
    (tmp_path / "set" / "train-00003.h5").unlink()
    flip(own_data / "train" / "ants" / "00.jpg")
    result = run_cli(*words)
    assert result.code == 3
    assert "ants/00.jpg" in result.stderr
    assert not (tmp_path / "set" / "train-00003.h5").exists()
    assert done(*words, "--check-images", "never").report["shards_made"] == 1


def test_a_resumed_precompute_continues_with_the_pictures_of_before(
    done: Run, label: Callable[..., list[object]], own_data: Path, tmp_path: Path
) -> None:
    words = [*label("--data-dir", own_data), "--output", tmp_path / "set"]
    done(*words)
    files = {path.name: path.read_bytes() for path in (tmp_path / "set").iterdir()}
    (tmp_path / "set" / "train-00001.h5").unlink()
    result = done(*words)
    assert "train: 26 images, " in result.stderr
    assert files == {path.name: path.read_bytes() for path in (tmp_path / "set").iterdir()}


def test_added_views_are_of_the_pictures_that_were_labelled(
    run_cli: Run, labels: Path, own_data: Path, tmp_path: Path, teach_flags: list[object]
) -> None:
    folder = Path(shutil.copytree(labels, tmp_path / "set"))
    flip(own_data / "train" / KEY)
    words = ["labels", "add-views", folder, "--data-dir", own_data, "--num-views", 6]
    result = run_cli(*words, *teach_flags)
    assert result.code == 3
    assert KEY in result.stderr
    assert run_cli(*words, *teach_flags, "--on-bad-image", "skip").report["skipped"] == 1


# --- packed trees, tar files, cached copies -------------------------------------------------------


@needs_jpegtran
@pytest.mark.parametrize("to", ["folder", "tar"])
def test_packed_images_are_known_by_their_originals(
    to: str, done: Run, run_cli: Run, labels: Path, data_dir: Path, tmp_path: Path, distil: Run
) -> None:
    packed = tmp_path / "packed"
    done("pack", "--data-dir", data_dir, "--to", to, "--output", packed)
    words = ["labels", "verify", labels, "--data-dir", packed]
    assert done(*words).report["images_compared"] == 36 + 15
    image = open_source(packed, "train").read(5)
    (path,) = [p for p in packed.rglob("*") if p.is_file() and image in p.read_bytes()]
    before = path.read_bytes()
    flip_image(path, image)
    result = run_cli(*words)
    assert result.code == 3
    assert "1 that cannot be read" in result.stderr
    result = distil(packed)
    assert result.code == 1
    assert "was changed since" in result.stderr
    if to == "tar":
        path.unlink()  # as the message says
    done("pack", "--data-dir", data_dir, "--to", to, "--output", packed)
    assert path.read_bytes() == before


@needs_jpegtran
def test_a_pack_of_other_pictures_of_the_same_names_and_sizes_is_found(
    done: Run, run_cli: Run, labels: Path, own_data: Path, tmp_path: Path
) -> None:
    flip(own_data / "train" / KEY)
    for to in ("folder", "tar"):
        done("pack", "--data-dir", own_data, "--to", to, "--output", tmp_path / to)
        result = run_cli("labels", "verify", labels, "--data-dir", tmp_path / to)
        assert result.code == 3
        assert f"(1 with another content): {KEY}" in result.stderr


def test_the_class_names_of_packed_tar_files_are_under_a_checksum(
    done: Run, run_cli: Run, data_dir: Path, tmp_path: Path, labels: Path
) -> None:
    packed = tmp_path / "packed"
    pack = ["pack", "--data-dir", data_dir, "--to", "tar", "--output", packed]
    done(*pack)
    path = packed / "classes.txt"
    names = path.read_text()
    for data_to_read in (packed, f"{packed}/*.tar"):
        words = ["labels", "verify", labels, "--data-dir", data_to_read]
        assert done(*words).code == 0
        path.write_text(names.replace("ants", "antz"))
        result = run_cli(*words)
        assert (result.code, result.stderr.count("\n")) == (1, 1), result.stderr
        assert f"{path} was changed: " in result.stderr
        path.unlink()
        result = run_cli(*words)
        assert f"{path} is missing: " in result.stderr
        done(*pack)
        assert path.read_text() == names


@pytest.mark.parametrize("with_index", [True, False])
def test_a_bit_that_flips_in_a_cached_copy_is_never_used(
    with_index: bool, done: Run, data_dir: Path, tmp_path: Path
) -> None:
    packed = tmp_path / "packed"
    done("pack", "--data-dir", data_dir, "--to", "tar", "--output", packed)
    tars = sorted(packed.glob("train-*.tar"))
    if not with_index:
        for path in packed.glob("*.index"):
            path.unlink()
    with web_server(packed) as url:
        cache = Cache(tmp_path / "cache", 10**9)
        far = open_source(f"{url}/{tars[0].name}", "train", cache=cache)
        images = [far.read(p) for p in range(len(far))]
        (copy,) = cache.folder.rglob("[!.]*.tar")
        flip_image(copy, images[4])
        again = open_source(f"{url}/{tars[0].name}", "train", cache=cache)
        assert [again.read(p) for p in range(len(far))] == images
        flip_image(copy, images[7])  # while it is open
        assert [again.read(p) for p in range(len(far))] == images
        assert copy.read_bytes() == tars[0].read_bytes()


@needs_jpegtran
def test_pack_json_has_both_hashes(done: Run, data_dir: Path, tmp_path: Path) -> None:
    done("pack", "--data-dir", data_dir, "--output", tmp_path / "packed")
    files = parse_json((tmp_path / "packed" / "train" / "pack.json").read_bytes())["files"]
    for key, row in files.items():
        folders = (tmp_path / "packed", data_dir)
        for text, folder in zip(row[2:4], folders, strict=True):
            assert text == f"{content_hash((folder / 'train' / key).read_bytes()):016x}"
