"""A label set that is killed, full or shared by two writers ends in the same bytes: real signals,
real processes, real small file systems.
"""

import gc
import math
import os
import random
import shutil
import signal
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from packs import final

from cases import mostly_slow
from conftest import Result, Spawned
from mealv2.label_set import Appender, LabelSet
from mealv2.storage.atomic import TEMPORARY_PREFIX
from warm import Warm, warm_process

Run = Callable[..., Result]
Files = Callable[..., dict[str, bytes]]

NUM_KILLS = 200
NUM_COLD_KILLS = 12
SMALL = ["--shard-size", "5"]  # 3 shards of val, 8 of train


@pytest.fixture(scope="module")
def flags(precompute_flags: list[str]) -> list[str]:
    """Stage one in 11 shards, all but --output."""
    return [*precompute_flags, *SMALL]


@pytest.fixture(scope="module")
def reference(
    done: Run, flags: list[str], tmp_path_factory: pytest.TempPathFactory, contents: Files
) -> dict[str, bytes]:
    """The files of a run that nothing disturbed."""
    out = tmp_path_factory.mktemp("undisturbed") / "set"
    done(*flags, "--output", out)
    files = contents(out)
    assert len(files) == 13
    return files


@pytest.fixture(scope="module")
def warm(flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Warm]:
    """A process that has imported everything."""
    if not Path("/proc/self/task").exists():
        pytest.skip("needs /proc, to know that a process has one thread")
    folder = tmp_path_factory.mktemp("warm")
    with warm_process(folder, [*flags, "--output", folder / "first"]) as process:
        yield process


def phase(files: dict[str, bytes], reference: dict[str, bytes]) -> str:
    """Return how far a killed run came, by what it left."""
    shards = [name for name in files if name.endswith(".h5")]
    if "plan.json" not in files:
        return "before the claim"
    if "manifest.json" in files:
        return "after the manifest"
    if not shards:
        return "before the first shard"
    return "between shards" if len(shards) < len(reference) - 2 else "before the manifest"


def temporaries(folder: Path) -> dict[str, int]:
    """Return the temporary files of a folder, and how many names each has."""
    return {path.name: path.stat().st_nlink for path in folder.glob(f"{TEMPORARY_PREFIX}*")}


# --- killed ---------------------------------------------------------------------------------------


@pytest.mark.slow
def test_killed_two_hundred_times_it_ends_in_the_same_bytes(
    warm: Warm,
    done: Run,
    flags: list[str],
    reference: dict[str, bytes],
    tmp_path: Path,
    contents: Files,
    capsys: pytest.CaptureFixture[str],
) -> None:
    rng = random.Random(2020)
    undisturbed = warm.done(*flags, "--output", tmp_path / "timed", out=tmp_path / "timed")
    seconds, events = undisturbed["seconds"], undisturbed["events"]
    assert "os.link" in " ".join(events), "the timeline says when files are put in place"
    # the first kill of the first sets goes through all that is done to files, so that every phase
    # is hit whatever the machine's speed; all others are at random
    steps = range(0, len(events), len(events) // 30)
    removed = next(n for n, event in enumerate(events) if event.startswith("os.remove"))
    sweep = [0, removed, len(events) - 1, *steps]
    phases: Counter[str] = Counter()
    num_kills = num_sets = 0
    while num_kills < NUM_KILLS:
        out = tmp_path / f"set-{num_sets}"
        first = dict(enumerate(sweep)).get(num_sets)
        num_sets += 1
        code = -signal.SIGKILL
        while code:
            before = temporaries(out)
            job: dict[str, Any] = {"args": [*flags, "--output", str(out)], "out": str(out)}
            if first is not None:
                job["kill_at_event"], first = first, None
            elif num_kills % 2:
                job["kill_at_event"] = rng.randrange(len(events))
            else:
                job["kill_after_s"] = rng.uniform(0, seconds)
            code = warm.run(job)[0]["code"]
            assert code in (0, -signal.SIGKILL), warm.log.with_name("log-0").read_text()
            left = final(contents(out))
            # nothing torn under a final name, at any time
            assert left == {name: reference[name] for name in left}
            if code:
                num_kills += 1
                phases[phase(left, reference)] += 1
                new = {n: links for n, links in temporaries(out).items() if n not in before}
                phases["while a file was written"] += 1 in new.values()
                phases["between link and unlink"] += 2 in new.values()
        assert final(contents(out)) == reference
        assert done("labels", "verify", out).report["sha256"] == "right"
        shutil.rmtree(out)
    with capsys.disabled():
        print(f"\n{num_kills} kills of {num_sets} sets in {seconds:.2f} s each: {dict(phases)}")
    for name in (
        "before the claim",
        "before the first shard",
        "between shards",
        "before the manifest",
        "after the manifest",
        "while a file was written",
        "between link and unlink",
    ):
        assert phases[name], f"no kill {name}"


@pytest.mark.slow
def test_killed_as_a_command_at_any_time_it_ends_in_the_same_bytes(
    spawn: Callable[..., Spawned],
    done: Run,
    flags: list[str],
    reference: dict[str, bytes],
    tmp_path: Path,
    contents: Files,
    capsys: pytest.CaptureFixture[str],
) -> None:
    rng = random.Random(2021)
    phases: Counter[str] = Counter()
    # a command starts for seconds and works for tenths: one kill in four hits the start, the others
    # come soon after a shard
    for number in range(NUM_COLD_KILLS):
        out = tmp_path / f"set-{number // 4}"
        process = spawn(*flags, "--num-views", 200, "--output", out)
        if number % 4 == 0:
            with pytest.raises(subprocess.TimeoutExpired):
                process.process.wait(timeout=rng.uniform(0, 1))
        else:
            there = len(list(out.glob("*.h5")))
            process.until(lambda o=out, n=there: len(list(o.glob("*.h5"))) > n)  # type: ignore[misc]
            with pytest.raises(subprocess.TimeoutExpired):
                process.process.wait(timeout=rng.uniform(0, 0.05))
        process.signal(signal.SIGKILL)
        assert process.result().code == -signal.SIGKILL
        phases[phase(final(contents(out)), reference)] += 1
    expected = tmp_path / "undisturbed"
    done(*flags, "--num-views", 200, "--output", expected)
    for number in range(NUM_COLD_KILLS // 4):
        out = tmp_path / f"set-{number}"
        assert spawn(*flags, "--num-views", 200, "--output", out).result().code == 0
        assert final(contents(out)) == contents(expected)
        done("labels", "verify", out)
    with capsys.disabled():
        print(f"\n{NUM_COLD_KILLS} kills of commands: {dict(phases)}")
    assert phases["between shards"]


@pytest.mark.slow
def test_two_writers_at_once_one_of_them_killed_end_in_the_same_bytes(
    warm: Warm,
    done: Run,
    flags: list[str],
    reference: dict[str, bytes],
    tmp_path: Path,
    contents: Files,
) -> None:
    rng = random.Random(2022)
    seconds = warm.done(*flags, "--output", tmp_path / "timed", out=tmp_path / "timed")["seconds"]
    killed = 0
    for number in range(40):
        out = tmp_path / f"set-{number}"
        job: dict[str, Any] = {"args": [*flags, "--output", str(out)], "out": str(out)}
        other = {**job, "kill_after_s": rng.uniform(0, seconds)} if number % 2 else job
        result, others = warm.run(job, other)
        assert result["code"] == 0, warm.log.with_name("log-0").read_text()
        assert others["code"] in ((0, -signal.SIGKILL) if number % 2 else (0,))
        killed += others["code"] != 0
        files = contents(out)
        assert final(files) == reference
        assert files.keys() == reference.keys() or others["code"]
        done("labels", "verify", out)
    assert killed > 10


# --- disk full: a real, small file system ---------------------------------------------------------


PAGE = 4096


@dataclass
class Disk:
    """A small file system, of whole pages."""

    path: Path

    def mount(self, num_pages: int) -> Path:
        """Make it anew, so large; return its folder."""
        self.unmount()
        self.path.mkdir(exist_ok=True)
        size = f"size={num_pages * PAGE}"
        made = _mount("-t", "tmpfs", "-o", size, "tmpfs", str(self.path))
        if made.returncode:
            pytest.skip(f"may not mount a small file system: {made.stderr.strip()}")
        return self.path

    def remount(self, options: str) -> None:
        """Change its size, or whether it may be written to."""
        assert _mount("-o", f"remount,{options}", str(self.path)).returncode == 0

    def unmount(self) -> None:
        """End it, if it is there."""
        gc.collect()  # what is still mapped keeps it
        if os.path.ismount(self.path):
            subprocess.run(["umount", "--lazy", str(self.path)], check=True)


def _mount(*args: str) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(["mount", *args], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("no mount command here")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    """A small file system; needs the right to mount one."""
    disk = Disk(tmp_path / "small")
    yield disk
    disk.unmount()


def pages_of(files: dict[str, bytes]) -> int:
    """Return the pages that files take."""
    return sum(math.ceil(len(data) / PAGE) for data in files.values())


def check_full(result: Result, place: Path, expected: dict[str, bytes], files: Files) -> str:
    """Check that a command failed for want of room, and lost nothing; return the file it names."""
    assert result.code == 1, result.stderr
    said = [line for line in result.stderr.splitlines() if line.startswith("mealv2: ")]
    assert said == result.stderr.splitlines()[-1:], "one line, the last"
    start, _, rest = said[0].partition(str(place))
    assert start == "mealv2: No space left on device: "
    name, _, advice = rest.partition("; ")
    assert advice == "free some disk space and run the same command again"
    there = files(place)
    assert not [path for path in there if TEMPORARY_PREFIX in path]
    whole = {path: data for path, data in there.items() if Path(path).name != "manifest.json"}
    assert whole == {path: expected[path] for path in whole}, "nothing is torn"
    return name.lstrip("/")


@pytest.mark.slow
def test_full_disk_at_twenty_places_is_one_line_and_the_same_command_goes_on(
    run_cli: Run,
    flags: list[str],
    reference: dict[str, bytes],
    disk: Disk,
    contents: Files,
    capsys: pytest.CaptureFixture[str],
) -> None:
    rng = random.Random(2023)
    total = pages_of(reference)
    sizes = [1, total - 1, *rng.sample(range(2, total - 1), 18)]
    expected = {f"set/{name}": data for name, data in reference.items()}
    named = []
    for size in sizes:
        out = disk.mount(size) / "set"
        named.append(check_full(run_cli(*flags, "--output", out), disk.path, expected, contents))
        disk.remount("size=10m")
        assert run_cli(*flags, "--output", out).code == 0
        assert contents(disk.path) == expected
    with capsys.disabled():
        print(f"\nno room at {dict(Counter(named))}")
    assert {"set/manifest.json", "set/train-00007.h5"} & set(named)
    assert len(set(named)) > 6
    # an empty disk: no room for the plan
    out = disk.mount(1) / "set"
    (disk.path / "all").write_bytes(bytes(PAGE))
    result = run_cli(*flags, "--output", out)
    assert "No space left on device" in result.stderr.splitlines()[-1]
    assert str(out / "plan.json") in result.stderr
    assert contents(disk.path, "set/*") == {}


def test_full_disk_stops_a_job_at_once_and_the_same_job_goes_on(
    run_cli: Run, flags: list[str], reference: dict[str, bytes], disk: Disk, contents: Files
) -> None:
    shards = [f"val-{n:05d}.h5" for n in range(3)] + [f"train-{n:05d}.h5" for n in range(8)]
    job = [*flags, "--job-index", "1", "--num-jobs", "2"]
    expected = {f"set/{name}": reference[name] for name in ["plan.json", *shards[1::2]]}
    out = disk.mount(pages_of(expected) - 1) / "set"
    result = run_cli(*job, "--output", out)
    # the last one alone, for nothing after the first that had no room was tried
    assert check_full(result, disk.path, expected, contents) == f"set/{shards[9]}"
    assert "continuing with the other shards" not in result.stderr

    out = disk.mount(pages_of({"": reference["plan.json"]}) + 1) / "set"
    result = run_cli(*job, "--output", out)
    check_full(result, disk.path, expected, contents)
    assert contents(disk.path).keys() < expected.keys() - {f"set/{shards[9]}"}
    assert result.stdout == ""
    disk.remount("size=10m")
    assert run_cli(*job, "--output", out).code == 0
    assert contents(disk.path) == expected


@pytest.fixture(scope="module")
def own_set(done: Run, flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished set with appended rows."""
    out = tmp_path_factory.mktemp("own") / "set"
    done(*flags, "--output", out)
    append_rows(out)
    return out


def append_rows(folder: Path) -> Path:
    """Append rows of views that a set lacks, as training does; return the file."""
    labels = LabelSet.open(folder)
    keys = list(labels.keys())[::3]
    appender = Appender(labels)
    appender.add(keys, [9] * len(keys), labels.rows(keys, [1] * len(keys)))
    path = appender.flush()
    assert path is not None
    return path


@pytest.fixture(scope="module")
def others_set(
    done: Run,
    flags: list[str],
    make_model: Callable[..., Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A finished set of another teacher, about the same images and views."""
    out = tmp_path_factory.mktemp("other") / "set"
    place = flags.index("--teacher")
    teacher = f"test_vit={make_model('test_vit', seed=5)}"
    done(*flags[:place], "--teacher", teacher, *SMALL, "--output", out)
    return out


COMMANDS: dict[str, list[str]] = {
    "merge": ["merge", "OWN", "OTHERS", "--topk", "2", "--output", "OUT"],
    "convert": ["convert", "OWN", "--topk", "all", "--output", "OUT"],
    "split": ["split", "OWN", "--parts", "3", "--output", "OUT"],
    "add-views": ["add-views", "OUT", "--num-views", "7"],
}


@pytest.mark.parametrize("name", mostly_slow(COMMANDS, fast=3))
def test_full_disk_in_a_labels_command_is_one_line_and_the_same_command_goes_on(
    run_cli: Run,
    done: Run,
    data_dir: Path,
    teacher_flags: list[str],
    own_set: Path,
    others_set: Path,
    disk: Disk,
    tmp_path: Path,
    contents: Files,
    name: str,
) -> None:
    def command(out: Path) -> list[str]:
        folders = {"OWN": str(own_set), "OTHERS": str(others_set), "OUT": str(out)}
        words = [folders.get(word, word) for word in COMMANDS[name]]
        if name == "add-views":
            words += ["--data-dir", str(data_dir), *teacher_flags]
        return ["labels", *words]

    def start(out: Path) -> dict[str, bytes]:
        if name == "add-views":
            shutil.copytree(own_set, out)
        return contents(out)

    first = start(tmp_path / "undisturbed" / "set")
    done(*command(tmp_path / "undisturbed" / "set"))
    expected = contents(tmp_path / "undisturbed")
    begin, total = pages_of(first), pages_of(expected)
    for size in (begin + 1, (begin + total) // 2, total - 1):
        out = disk.mount(size) / "set"
        start(out)
        check_full(run_cli(*command(out)), disk.path, expected, contents)
        if name == "add-views":
            assert LabelSet.open(out).num_views == 4, "until all is there the set is what it was"
        disk.remount("size=10m")
        done(*command(out))
        assert contents(disk.path) == expected


def test_a_folder_that_may_only_be_read_is_read_and_a_command_that_writes_says_so(
    run_cli: Run, done: Run, flags: list[str], own_set: Path, disk: Disk, contents: Files
) -> None:
    out = disk.mount(1000) / "set"
    shutil.copytree(own_set, out)
    before = contents(out)
    disk.remount("ro")
    done("labels", "verify", out)
    for folder, command in ((out, flags), (disk.path / "new", flags)):
        result = run_cli(*command, "--output", folder)
        assert result.code == 1
        assert result.stderr.splitlines()[-1].startswith(f"mealv2: Read-only file system: {folder}")
        assert "Traceback" not in result.stderr
    assert contents(out) == before
