"""A damaged label set gives its own labels or none: what is wrong is named, and it alone made anew.

The damage is real: bits of every file, lengths, names, folders, links, plans and manifests of
others.
"""

import random
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cases import mostly_slow
from conftest import Result
from mealv2.errors import LabelSetError
from mealv2.label_set import Appender, LabelSet, Rows, ShardFile, read_manifest
from mealv2.storage.atomic import TEMPORARY_PREFIX

Run = Callable[..., Result]
Files = Callable[..., dict[str, bytes]]
Annotations = dict[str, Rows]

NUM_FLIPS = 300
NUM_REPAIRED = 40
LENGTHS = (0, 1, 71, 72, 104, 511, 512)  # of nothing, of parts of the head, of a shard's head


def read_all(folder: Path) -> Annotations:
    """Return every label of a set: of each role all views of all images, and the appended rows."""
    annotations = {}
    for split in ("train", "val"):
        labels = LabelSet.open(folder, split=split)
        keys = list(labels.keys())
        addresses = [(key, view) for key in keys for view in range(labels.num_views)]
        for file in labels.appended_files:
            addresses += zip(file.keys(), file.column("views").tolist(), strict=True)
        annotations[split] = labels.rows(
            [key for key, _ in addresses], [view for _, view in addresses]
        )
        assert len(keys) == (36 if split == "train" else 15)
    return annotations


def same(some: Annotations, others: Annotations) -> bool:
    """Return whether labels are equal to the bit, in the same order."""
    return some.keys() == others.keys() and all(
        bytes(some[split].labels.to_dense().numpy())
        == bytes(others[split].labels.to_dense().numpy())
        for split in some
    )


def reads_right_or_not(folder: Path, truth: Annotations) -> str:
    """Return ``right`` or ``refused``; wrong labels, or another error, fail."""
    try:
        annotations = read_all(folder)
    except LabelSetError:
        return "refused"
    assert same(annotations, truth), "wrong labels were returned"
    return "right"


@pytest.fixture(scope="module")
def add_flags(data_dir: Path, teacher_flags: list[str]) -> list[str]:
    """`labels add-views` up to six views, all but the set."""
    flags = ["--data-dir", str(data_dir), "--num-views", "6", "--batch-size", "16"]
    return ["labels", "add-views", *flags, *teacher_flags]


@pytest.fixture(scope="module")
def whole(
    done: Run,
    labels_dir: Path,
    add_flags: list[str],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A finished set of four views and two that were added, with appended rows. Not to change."""
    out = tmp_path_factory.mktemp("whole") / "set"
    shutil.copytree(labels_dir, out)
    done(*add_flags, out)
    labels = LabelSet.open(out)
    keys = list(labels.keys())[::5]
    appender = Appender(labels)
    appender.add(keys, [9] * len(keys), labels.rows(keys, [1] * len(keys)))
    assert appender.flush() is not None
    return out


@pytest.fixture(scope="module")
def truth(whole: Path) -> Annotations:
    """All its labels."""
    return read_all(whole)


@pytest.fixture(scope="module")
def other(done: Run, precompute_flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished set of the same images, files and names, from another seed of views."""
    out = tmp_path_factory.mktemp("other") / "set"
    done(*precompute_flags, "--view-seed", 8, "--output", out)
    return out


@pytest.fixture
def damaged(whole: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(whole, tmp_path / "damaged"))


@pytest.fixture
def repair(
    run_cli: Run, precompute_flags: list[str], add_flags: list[str]
) -> Callable[[Path, str], Result]:
    """A function: run what makes a file of a set again."""

    def run(folder: Path, name: str) -> Result:
        if "-views-" in name:
            return run_cli(*add_flags, folder)
        if "-more-" in name:
            (folder / name).unlink()
        return run_cli(*precompute_flags, "--output", folder)

    return run


def check_verify(run_cli: Run, folder: Path, *names: str) -> Result:
    """Check that verify ends with 3 and one line that names files."""
    result = run_cli("labels", "verify", folder)
    assert result.code == 3, result.stderr
    lines = [line for line in result.stderr.splitlines() if line.startswith("mealv2: ")]
    assert lines == result.stderr.splitlines()[-1:]
    assert all(name in lines[0] for name in names), (names, lines)
    return result


def stamps(folder: Path) -> dict[str, tuple[int, int]]:
    """Return inode and time of change of every shard."""
    found = {path.name: path.stat() for path in folder.glob("*.h5")}
    return {name: (stat.st_ino, stat.st_mtime_ns) for name, stat in found.items()}


# --- single bits ----------------------------------------------------------------------------------


def flips(files: dict[str, bytes], count: int, *, seed: int) -> Iterator[tuple[str, int, bytes]]:
    """Yield (file, bit, its bytes with that bit flipped), every file as often as another."""
    rng = random.Random(seed)
    names = sorted(files)
    for number in range(count):
        name = names[number % len(names)]
        bit = rng.randrange(8 * len(files[name]))
        data = bytearray(files[name])
        data[bit // 8] ^= 1 << bit % 8
        yield name, bit, bytes(data)


@pytest.mark.slow
def test_no_flipped_bit_gives_a_wrong_label_and_verify_names_the_file(
    run_cli: Run,
    whole: Path,
    truth: Annotations,
    damaged: Path,
    contents: Files,
    capsys: pytest.CaptureFixture[str],
) -> None:
    files = contents(whole)
    read: Counter[str] = Counter()
    for name, bit, data in flips(files, NUM_FLIPS, seed=2024):
        (damaged / name).write_bytes(data)
        try:
            read[reads_right_or_not(damaged, truth)] += 1
            check_verify(run_cli, damaged, name)
        except AssertionError as error:
            raise AssertionError(f"bit {bit} of {name}: {error}") from error
        (damaged / name).write_bytes(files[name])
    with capsys.disabled():
        print(f"\n{NUM_FLIPS} flipped bits in {len(files)} files: {dict(read)}, 0 wrong labels")
    assert read["right"], "some bits are of HDF5's own, or of plan.json"
    assert read["refused"]


@pytest.mark.slow
def test_what_a_flipped_bit_damaged_is_made_again_and_only_that(
    done: Run, repair: Callable[..., Result], whole: Path, damaged: Path, contents: Files
) -> None:
    files = contents(whole)
    for name, bit, data in flips(files, NUM_REPAIRED, seed=2025):
        (damaged / name).write_bytes(data)
        before = stamps(damaged)
        result = repair(damaged, name)
        assert result.code == 0, (name, bit, result.stderr)
        is_shard = name.endswith(".h5") and "-more-" not in name
        assert result.report["shards_made"] == is_shard, (name, bit)
        expected = {n: d for n, d in files.items() if n != name or "-more-" not in name}
        assert contents(damaged) == expected, (name, bit)
        after = stamps(damaged)
        assert {n for n in after if after[n] != before[n]} == ({name} if is_shard else set())
        done("labels", "verify", damaged)
        (damaged / name).write_bytes(files[name])


@pytest.mark.parametrize("name", ["train-00001.h5", "train-00001-views-4-5.h5"])
def test_a_bit_that_only_hdf5_reads_is_made_right_again(
    run_cli: Run,
    repair: Callable[..., Result],
    whole: Path,
    damaged: Path,
    contents: Files,
    truth: Annotations,
    name: str,
) -> None:
    path = damaged / name
    data = bytearray(path.read_bytes())
    data[512 + 8] ^= 1  # the version of HDF5's superblock
    path.write_bytes(bytes(data))
    assert reads_right_or_not(damaged, truth) == "right"
    check_verify(run_cli, damaged, name)
    assert repair(damaged, name).report["shards_made"] == 1
    assert contents(damaged) == contents(whole)


# --- whole files ----------------------------------------------------------------------------------


def test_no_truncated_file_gives_a_wrong_label_and_verify_names_it(
    run_cli: Run, whole: Path, truth: Annotations, damaged: Path, contents: Files
) -> None:
    rng = random.Random(2026)
    for name, data in contents(whole).items():
        lengths = [n for n in LENGTHS if n < len(data)]
        lengths += [rng.randrange(len(data)), len(data) - 1]
        if name.endswith(".h5"):
            header = ShardFile(whole / name).header
            lengths += [header["columns"][c]["offset"] for c in ("labels", "keys", "crc32")]
        for length in lengths:
            (damaged / name).write_bytes(data[:length])
            what = reads_right_or_not(damaged, truth)
            assert what == ("right" if name == "plan.json" else "refused"), (name, length)
            check_verify(run_cli, damaged, name)
        (damaged / name).write_bytes(data)


@pytest.mark.parametrize("length", [0, 1, 511, 512, -1])
def test_truncated_files_are_made_again_and_only_they(
    repair: Callable[..., Result], whole: Path, damaged: Path, contents: Files, length: int
) -> None:
    files = contents(whole)
    for name in ("manifest.json", "plan.json", "val-00000.h5", "train-00003-views-4-5.h5"):
        (damaged / name).write_bytes(files[name][:length])
        assert repair(damaged, name).report["shards_made"] == name.endswith(".h5")
        assert contents(damaged) == files


def _remove(folder: Path, other: Path) -> None:
    (folder / "train-00002.h5").unlink()


def _swap(folder: Path, other: Path) -> None:
    (folder / "train-00001.h5").rename(folder / "aside")
    (folder / "train-00002.h5").rename(folder / "train-00001.h5")
    (folder / "aside").rename(folder / "train-00002.h5")


def _take_others_shard(folder: Path, other: Path) -> None:
    shutil.copy(other / "train-00002.h5", folder)


def _take_the_other_role(folder: Path, other: Path) -> None:
    shutil.copy(folder / "val-00000.h5", folder / "train-00002.h5")


def _take_added_views(folder: Path, other: Path) -> None:
    shutil.copy(folder / "train-00002-views-4-5.h5", folder / "train-00002.h5")


def _link_to_itself(folder: Path, other: Path) -> None:
    (folder / "train-00002.h5").unlink()
    (folder / "train-00002.h5").symlink_to("train-00002.h5")


def _link_to_nothing(folder: Path, other: Path) -> None:
    (folder / "train-00002.h5").unlink()
    (folder / "train-00002.h5").symlink_to("nowhere")


@pytest.mark.parametrize(
    ("harm", "names"),
    [
        (_remove, ["train-00002.h5"]),
        (_swap, ["train-00001.h5", "train-00002.h5"]),
        (_take_others_shard, ["train-00002.h5"]),
        (_take_the_other_role, ["train-00002.h5"]),
        (_take_added_views, ["train-00002.h5"]),
        (_link_to_itself, ["train-00002.h5"]),
        (_link_to_nothing, ["train-00002.h5"]),
    ],
)
@pytest.mark.parametrize("manifest", mostly_slow(["there", "lost"]))
def test_a_shard_that_is_not_its_own_is_refused_and_it_alone_made_again(
    run_cli: Run,
    repair: Callable[..., Result],
    whole: Path,
    other: Path,
    damaged: Path,
    truth: Annotations,
    contents: Files,
    harm: Callable[[Path, Path], None],
    names: list[str],
    manifest: str,
) -> None:
    harm(damaged, other)
    if manifest == "lost":
        (damaged / "manifest.json").unlink()
    assert reads_right_or_not(damaged, truth) == "refused"
    check_verify(run_cli, damaged, *(names if manifest == "there" else []))
    assert repair(damaged, names[0]).report["shards_made"] == len(names)
    assert contents(damaged) == contents(whole)


@pytest.mark.parametrize(
    "name",
    ["train-00002.h5", "val-00000.h5", "manifest.json", "plan.json", "train-00000-views-4-5.h5"],
)
def test_a_folder_in_a_files_place_is_named_and_left_there(
    run_cli: Run,
    repair: Callable[..., Result],
    damaged: Path,
    truth: Annotations,
    whole: Path,
    contents: Files,
    name: str,
) -> None:
    (damaged / name).unlink()
    (damaged / name).mkdir()
    (damaged / name / "mine").write_text("mine")
    what = reads_right_or_not(damaged, truth)
    assert what == ("right" if name == "plan.json" else "refused")
    check_verify(run_cli, damaged, name)
    result = repair(damaged, name)
    assert result.code == 1
    last = result.stderr.splitlines()[-1]
    assert last.startswith(f"mealv2: Is a directory: {damaged / name}; a file is needed there")
    assert (damaged / name / "mine").read_text() == "mine"

    shutil.rmtree(damaged / name)
    assert repair(damaged, name).code == 0
    assert contents(damaged) == contents(whole)


def test_a_file_that_is_no_files_of_the_set_is_left_alone(
    done: Run, precompute_flags: list[str], damaged: Path, truth: Annotations, contents: Files
) -> None:
    for name in ("notes.txt", "train-00099.h5", "train-0x.h5", f"{TEMPORARY_PREFIX}train-00000.h5"):
        (damaged / name).write_text("not yours")
    before = contents(damaged)
    assert reads_right_or_not(damaged, truth) == "right"
    done("labels", "verify", damaged)
    assert done(*precompute_flags, "--output", damaged).report["shards_made"] == 0
    assert contents(damaged) == before


def test_appended_rows_of_another_set_are_refused_by_name(
    run_cli: Run, damaged: Path, other: Path
) -> None:
    labels = LabelSet.open(other)
    keys = list(labels.keys())[:2]
    appender = Appender(labels)
    appender.add(keys, [9, 9], labels.rows(keys, [0, 0]))
    path = appender.flush()
    assert path is not None
    path.rename(damaged / path.name)
    with pytest.raises(LabelSetError, match=f"{path.name} holds rows of another label set"):
        LabelSet.open(damaged)
    check_verify(run_cli, damaged, path.name)


# --- manifests and plans --------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["lost", "of another set", "linked to itself", "of before"])
def test_a_manifest_is_written_anew_from_the_files(
    run_cli: Run,
    done: Run,
    precompute_flags: list[str],
    damaged: Path,
    other: Path,
    labels_dir: Path,
    whole: Path,
    truth: Annotations,
    contents: Files,
    kind: str,
) -> None:
    path = damaged / "manifest.json"
    path.unlink()
    if kind == "linked to itself":
        path.symlink_to("manifest.json")
    elif kind != "lost":
        shutil.copy((other if kind == "of another set" else labels_dir) / "manifest.json", path)
    if kind == "of before":  # before views were added: a set of its own, which is whole
        labels = LabelSet.open(damaged)
        assert labels.num_views == 4
        done("labels", "verify", damaged)
    else:
        assert reads_right_or_not(damaged, truth) == "refused"
        check_verify(run_cli, damaged)
    assert done(*precompute_flags, "--output", damaged).report["shards_made"] == 0
    assert contents(damaged) == contents(whole)


@pytest.mark.parametrize("manifest", ["there", "lost"])
@pytest.mark.parametrize(
    "kind", ["lost", "damaged", "changed", "of another set", "linked to itself"]
)
def test_a_plan_is_written_anew_where_manifest_or_shards_know_it(
    run_cli: Run,
    done: Run,
    precompute_flags: list[str],
    damaged: Path,
    other: Path,
    whole: Path,
    truth: Annotations,
    contents: Files,
    kind: str,
    manifest: str,
) -> None:
    path = damaged / "plan.json"
    text = path.read_text()
    path.unlink()
    if kind == "damaged":
        path.write_text(text[:100])
    elif kind == "changed":
        path.write_text(text.replace('"img_size": 32', '"img_size": 33'))
    elif kind == "of another set":
        shutil.copy(other / "plan.json", path)
    elif kind == "linked to itself":
        path.symlink_to("plan.json")
    if manifest == "lost":
        (damaged / "manifest.json").unlink()
    else:
        assert reads_right_or_not(damaged, truth) == "right"
        check_verify(run_cli, damaged, "plan.json")
    assert done(*precompute_flags, "--output", damaged).report["shards_made"] == 0
    assert contents(damaged) == contents(whole)


@pytest.mark.parametrize("temporaries", [["plan.json"], ["manifest.json"], ["train-00002.h5"]])
def test_a_stray_file_of_another_set_never_lets_that_set_take_the_folder(
    run_cli: Run,
    precompute_flags: list[str],
    damaged: Path,
    other: Path,
    contents: Files,
    temporaries: list[str],
) -> None:
    for name in temporaries:
        shutil.copy(other / name, damaged)
    before = contents(damaged)
    for manifest in ("there", "lost"):
        if manifest == "lost":
            (damaged / "manifest.json").unlink()
            before.pop("manifest.json")
        result = run_cli(*precompute_flags, "--view-seed", 8, "--output", damaged)
        assert result.code == 3
        assert "holds another label set: " in result.stderr.splitlines()[-1]
        assert contents(damaged) == before


# --- added views ----------------------------------------------------------------------------------


def test_added_views_are_made_again_only_where_they_are_damaged(
    done: Run, run_cli: Run, add_flags: list[str], damaged: Path, whole: Path, contents: Files
) -> None:
    assert done(*add_flags, damaged).report["shards_made"] == 0
    result = run_cli(*add_flags, "--num-views", "5", damaged)
    assert result.code == 2
    assert "has 6 already" in result.stderr
    (damaged / "train-00000-views-4-5.h5").unlink()
    report = done(*add_flags, damaged).report
    assert (report["shards_made"], report["added"], report["bytes"]) == (1, [6, 6], 0)
    assert contents(damaged) == contents(whole)


def test_added_views_that_precompute_left_out_are_taken_up_again(
    done: Run,
    precompute_flags: list[str],
    add_flags: list[str],
    damaged: Path,
    whole: Path,
    contents: Files,
) -> None:
    path = damaged / "train-00001-views-4-5.h5"
    path.write_bytes(path.read_bytes()[:1000])
    left_out = done(*precompute_flags, "--output", damaged)
    assert "not listed: views 4 to 5; those from 4 on are not complete" in left_out.stderr
    assert LabelSet.open(damaged).num_views == 4
    report = done(*add_flags, "--num-views", "8", damaged).report
    assert (report["shards_made"], report["added"]) == (1 + 4, [4, 8])
    blocks = read_manifest(damaged)["roles"]["train"]["blocks"]
    assert [block["views"] for block in blocks] == [[0, 4], [4, 6], [6, 8]]
    assert contents(damaged, "*-4-5.h5") == contents(whole, "*-4-5.h5")


def test_a_derived_set_keeps_the_views_that_were_added_to_it(
    done: Run, whole: Path, add_flags: list[str], tmp_path: Path, contents: Files
) -> None:
    convert = ["labels", "convert", whole, "--topk", "all", "--output", tmp_path / "all"]
    done(*convert)
    done(*add_flags, "--num-views", "7", tmp_path / "all")
    before = contents(tmp_path / "all")
    assert LabelSet.open(tmp_path / "all").num_views == 7
    done(*convert)
    assert contents(tmp_path / "all") == before
    path = tmp_path / "all" / "train-00001.h5"
    data = bytearray(path.read_bytes())
    data[512 + 8] ^= 1
    path.write_bytes(bytes(data))
    done(*convert)
    assert contents(tmp_path / "all") == before
