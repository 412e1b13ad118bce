"""pipeline.labelling.jobs and workers: jobs divide the shards, and it is one process's set."""

import os
import select
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import Result, Spawned
from mealv2.errors import ConfigError
from mealv2.label_set import Shard, planned_shards, read_plan, read_shard, write_shard
from mealv2.labelling import shards
from mealv2.labelling.annotator import Annotations, Annotator
from mealv2.labelling.plan import LabelSplit
from mealv2.storage.atomic import file_stamp
from pipeline.labelling.jobs import Job
from pipeline.runtime import env

Run = Callable[..., Result]
Files = Callable[..., dict[str, bytes]]

VARIABLES = ["RANK", "WORLD_SIZE", "LOCAL_RANK"]
VARIABLES += [f"SLURM_ARRAY_TASK_{name}" for name in ("ID", "MIN", "MAX", "STEP", "COUNT")]


@pytest.fixture(autouse=True)
def _no_job(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever runs the tests is no job."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "labels"


def job_flags(index: int, count: int) -> list[object]:
    return ["--job-index", index, "--num-jobs", count]


# --- which job it is ------------------------------------------------------------------------------


@given(
    names=st.lists(st.uuids().map(str), unique=True, max_size=60),
    count=st.integers(1, 70),
    is_listed=st.booleans(),
)
def test_shares_of_any_number_of_jobs_are_disjoint_and_all_together(
    names: list[str], count: int, is_listed: bool
) -> None:
    listed = tuple(names[1::3]) if is_listed else None
    parts = [Job(index, count, listed).select(names) for index in range(count)]
    together = [name for part in parts for name in part]
    assert sorted(together) == sorted(names if listed is None else listed)
    assert len(set(together)) == len(together)
    sizes = [len(part) for part in parts]
    assert max(sizes) - min(sizes) <= 1


def in_array(monkeypatch: pytest.MonkeyPatch, **values: object) -> None:
    for name, value in values.items():
        monkeypatch.setenv(f"SLURM_ARRAY_TASK_{name}", str(value))


@given(first=st.integers(0, 900), step=st.integers(1, 40), count=st.integers(1, 30))
@settings(max_examples=30)
def test_tasks_of_an_array_are_counted_from_0_wherever_it_begins(
    first: int, step: int, count: int
) -> None:
    with pytest.MonkeyPatch.context() as patched:
        # Slurm says of one task, or of a list, that its step is 1
        array_step = step if count > 1 else 1
        in_array(patched, MIN=first, MAX=first + step * (count - 1), STEP=array_step, COUNT=count)
        found = []
        for index in range(first, first + step * count, step):
            in_array(patched, ID=index)
            found.append(env.job())
    assert found == [(number, count, "SLURM_ARRAY_TASK_ID") for number in range(count)]


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"ID": 5, "MIN": 1, "MAX": 9, "STEP": 1, "COUNT": 3}, "3 tasks from 1 to 9 in steps of 1"),
        ({"ID": 1, "MIN": 1, "MAX": 9, "STEP": 1, "COUNT": 3}, "not evenly spaced"),
        ({"ID": 4, "MIN": 0, "MAX": 6, "STEP": 3, "COUNT": 3}, "the number of task 4 is unknown"),
        ({"ID": 9, "MIN": 0, "MAX": 6, "STEP": 3, "COUNT": 3}, "the number of task 9 is unknown"),
        ({"ID": 4}, "SLURM_ARRAY_TASK_MIN is 'not set'"),
        ({"ID": 4, "MIN": 0, "MAX": "x", "STEP": 1, "COUNT": 9}, "SLURM_ARRAY_TASK_MAX is 'x'"),
    ],
)
def test_an_array_that_is_not_regular_is_refused_naming_the_flags(
    monkeypatch: pytest.MonkeyPatch, values: dict[str, object], named: str
) -> None:
    in_array(monkeypatch, **values)
    with pytest.raises(ConfigError, match=named) as caught:
        env.job()
    assert str(caught.value).endswith("give --job-index and --num-jobs")


@pytest.mark.parametrize(
    ("values", "found"),
    [
        ({}, (0, 1, "")),
        ({"RANK": 0, "WORLD_SIZE": 1}, (0, 1, "")),
        ({"RANK": 3, "WORLD_SIZE": 8}, (3, 8, "RANK")),
    ],
)
def test_ranks_are_jobs(
    monkeypatch: pytest.MonkeyPatch, values: dict[str, int], found: tuple[int, int, str]
) -> None:
    for name, value in values.items():
        monkeypatch.setenv(name, str(value))
    assert env.job() == found


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"RANK": "3"}, "WORLD_SIZE is 'not set'"),
        ({"WORLD_SIZE": "3"}, "RANK is 'not set'"),
        ({"RANK": "3", "WORLD_SIZE": "3"}, "RANK is 3 of WORLD_SIZE 3"),
        ({"RANK": "-1", "WORLD_SIZE": "3"}, "RANK is '-1'"),
    ],
)
def test_ranks_that_do_not_fit_are_refused(
    monkeypatch: pytest.MonkeyPatch, values: dict[str, str], named: str
) -> None:
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=named):
        env.job()


def test_ranks_in_an_array_are_refused_for_nobody_knows_what_to_multiply(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    in_array(monkeypatch, ID=1, MIN=0, MAX=3, STEP=1, COUNT=4)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert env.job() == (1, 4, "SLURM_ARRAY_TASK_ID")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="RANK is 0 of WORLD_SIZE 2 in a Slurm array"):
        env.job()


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--job-index", 1], "give both --job-index and --num-jobs"),
        (["--num-jobs", 2], "give both --job-index and --num-jobs"),
        (job_flags(2, 2), "--job-index 2 is out of range: the last of 2 jobs has index 1"),
        (job_flags(-1, 2), "--job-index -1"),
        (job_flags(0, 0), "--num-jobs must be at least 1"),
        (["--num-procs", 0], "--num-procs must be at least 1"),
        ([*job_flags(0, 2), "--dry-run"], "--job-index has no effect with --dry-run"),
        (["--num-procs", 2, "--dry-run"], "--num-procs has no effect with --dry-run"),
    ],
)
def test_flags_that_do_not_fit_are_one_line(
    run_cli: Run, precompute_flags: list[str], out: Path, flags: list[object], named: str
) -> None:
    result = run_cli(*precompute_flags, *flags, "--output", out)
    assert (result.code, len(result.stderr.splitlines())) == (2, 1)
    assert named in result.stderr
    assert not out.exists()


# --- a set that was made by jobs ------------------------------------------------------------------


def test_jobs_one_after_another_and_finish_give_the_set_of_one_process(
    done: Run,
    precompute_flags: list[str],
    labels_dir: Path,
    out: Path,
    contents: Files,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    names = [*(f"val-{n:05d}.h5" for n in range(2)), *(f"train-{n:05d}.h5" for n in range(4))]
    first = done(*precompute_flags, *job_flags(1, 3), "--output", out)
    assert {path.name for path in out.glob("*.h5")} == set(names[1::3])
    assert {name: first.report[name] for name in ("job_index", "num_jobs", "shards")} == {
        "job_index": 1,
        "num_jobs": 3,
        "shards": 2,
    }
    assert "job 1 of 3, counted from 0 (--job-index)" in first.stderr
    in_array(monkeypatch, ID=5, MIN=5, MAX=11, STEP=3, COUNT=3)
    second = done(*precompute_flags, "--output", out)
    assert "job 0 of 3, counted from 0 (SLURM_ARRAY_TASK_ID)" in second.stderr
    assert second.report["shards_made"] == 2
    last = done(*precompute_flags, *job_flags(2, 3), "--output", out)
    assert last.report["failed"] == {}
    assert not (out / "manifest.json").exists()
    assert f"`mealv2 labels finish {out}`" in last.stderr
    assert [shard.name for shard in planned_shards(read_plan(out))] == names

    done("labels", "finish", out, "--batch-size", 16)
    assert contents(out) == contents(labels_dir)
    # a job looks at its own shards alone, and a finished set stays as it is
    again = done(*precompute_flags, *job_flags(1, 2), "--output", out)
    assert (again.report["shards"], again.report["shards_made"]) == (3, 0)
    assert contents(out) == contents(labels_dir)


def test_a_job_opens_no_shard_of_others(
    done: Run, precompute_flags: list[str], labels_dir: Path, out: Path, contents: Files
) -> None:
    shutil.copytree(labels_dir, out)
    (out / "manifest.json").unlink()
    (out / "train-00001.h5").write_bytes(b"damaged")  # number 3 of all
    result = done(*precompute_flags, *job_flags(0, 2), "--output", out)
    assert result.report["shards_made"] == 0
    assert "train-00001.h5" not in result.stderr
    assert (out / "train-00001.h5").read_bytes() == b"damaged"


def test_a_job_that_another_process_speaks_for_does_not_say_what_is_next(
    run_cli: Run,
    precompute_flags: list[str],
    out: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    flags = [*precompute_flags, *job_flags(0, 6), "--output", out]
    assert "after the last job: `mealv2 labels finish" in run_cli(*flags).stderr
    added = env.child_environment(2).items() - os.environ.items()
    for name, value in added:
        monkeypatch.setenv(name, value)

    result = run_cli(*flags)

    assert result.code == 0
    assert "this process makes 1 of 6 shards" in result.stderr
    for not_its in ("job", "finish", "again"):
        assert not_its not in result.stderr


def test_a_list_of_shards_is_divided_and_no_other_shard_is_made(
    done: Run, precompute_flags: list[str], labels_dir: Path, out: Path, tmp_path: Path
) -> None:
    listed = tmp_path / "list.txt"
    listed.write_text("train-00003.h5\n\n  val-00001.h5\ntrain-00003.h5\ntrain-00000.h5\n")
    flags = [*precompute_flags, "--shard-list", listed, "--output", out]
    report = done(*flags, *job_flags(0, 2)).report
    assert {path.name for path in out.glob("*.h5")} == {"train-00003.h5", "train-00000.h5"}
    assert report["shards"] == 2
    # without --job-index it is job 0 of 1, of a part all the same
    assert done(*flags).report["shards_made"] == 1
    assert {path.name for path in out.iterdir()} == {
        "plan.json",
        *("train-00003.h5", "train-00000.h5", "val-00001.h5"),
    }


@pytest.mark.parametrize("text", ["train-00004.h5\n", "train-00000-views-4-5.h5", "../x"])
def test_a_list_with_an_unknown_name_is_refused(
    run_cli: Run, precompute_flags: list[str], out: Path, tmp_path: Path, text: str
) -> None:
    listed = tmp_path / "list.txt"
    listed.write_text(f"train-00000.h5\n{text}")
    result = run_cli(*precompute_flags, "--shard-list", listed, "--output", out)
    assert result.code == 2
    assert f"--shard-list names {text.strip()!r}" in result.stderr.splitlines()[-1]
    assert not list(out.glob("*.h5"))


def test_a_list_that_is_not_there_is_one_line(
    run_cli: Run, precompute_flags: list[str], out: Path, tmp_path: Path
) -> None:
    flags = ["--shard-list", tmp_path / "none.txt", "--output", out]
    result = run_cli(*precompute_flags, *flags)
    assert (result.code, len(result.stderr.splitlines())) == (2, 1)
    assert "none.txt" in result.stderr


def test_jobs_add_views_and_finish_lists_them(
    done: Run,
    data_dir: Path,
    teacher_flags: list[str],
    labels_dir: Path,
    out: Path,
    tmp_path: Path,
    contents: Files,
) -> None:
    words = ["--data-dir", data_dir, "--num-views", 6, "--batch-size", 16, "--workers", 0]
    alone = shutil.copytree(labels_dir, tmp_path / "alone")
    done("labels", "add-views", alone, *words, *teacher_flags)

    shutil.copytree(labels_dir, out)
    for index in (1, 0):
        result = done("labels", "add-views", out, *words, *teacher_flags, *job_flags(index, 2))
        assert (result.report["shards"], result.report["shards_made"]) == (2, 2)
    assert contents(out, "manifest.json") == contents(labels_dir, "manifest.json")
    done("labels", "finish", out)
    assert contents(out) == contents(alone)


# --- shards that fail -----------------------------------------------------------------------------


def test_shards_that_fail_are_named_and_the_rest_go_on(
    run_cli: Run,
    done: Run,
    precompute_flags: list[str],
    labels_dir: Path,
    own_data: Path,
    out: Path,
    contents: Files,
) -> None:
    picture = own_data / "train" / "bees" / "03.jpg"
    original = picture.read_bytes()
    picture.write_bytes(b"no image".ljust(len(original), b"\0"))
    (out / "train-00003.h5").mkdir(parents=True)
    (out / "plan.json").write_bytes((labels_dir / "plan.json").read_bytes())
    flags = [*precompute_flags, "--data-dir", own_data, *job_flags(0, 1), "--output", out]
    names = sorted(path.name for path in labels_dir.glob("*.h5"))
    listed = out.with_name("list.txt")
    listed.write_text("\n".join(names))

    result = run_cli(*flags, "--shard-list", listed)
    assert result.code == 1
    assert result.report["failed"].keys() == {"train-00001.h5", "train-00003.h5"}
    assert "bees/03.jpg" in result.report["failed"]["train-00001.h5"]
    assert "Is a directory" in result.report["failed"]["train-00003.h5"]
    assert result.report["shards_made"] == 4
    messages = result.stderr.splitlines()
    assert messages[-1].startswith("mealv2: 2 of 6 shards failed, first train-00001.h5 (")
    assert sum("continuing with the other shards" in line for line in messages) == 2
    complete_shards = {n: d for n, d in contents(labels_dir, "*.h5").items() if n[-4] not in "13"}
    assert {n: contents(out)[n] for n in complete_shards} == complete_shards

    picture.write_bytes(original)
    (out / "train-00003.h5").rmdir()
    assert done(*flags).report["shards_made"] == 2
    assert contents(out) == contents(labels_dir)


@pytest.mark.parametrize(
    "error", [RuntimeError("CUDA error: out of memory\nmore"), OSError(5, "x")]
)
def test_an_error_of_the_device_or_of_a_file_fails_its_shard_alone(
    run_cli: Run,
    precompute_flags: list[str],
    out: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
) -> None:
    annotate, calls = Annotator.annotate, iter(range(99))

    def failing(self: Annotator, *args: Any, **settings: Any) -> Annotations:
        if next(calls) == 1:
            raise error
        return annotate(self, *args, **settings)

    monkeypatch.setattr(Annotator, "annotate", failing)
    result = run_cli(
        *precompute_flags, *job_flags(0, 2), "--output", out
    )  # val-0, train-0, train-2
    assert result.code == 1
    assert list(result.report["failed"]) == ["train-00000.h5"]
    assert "\n" not in result.report["failed"]["train-00000.h5"]
    assert {path.name for path in out.glob("*.h5")} == {"val-00000.h5", "train-00002.h5"}
    assert len(read_shard(out / "train-00002.h5").keys) == 10


@pytest.mark.parametrize("error", [TypeError("a bug"), NotImplementedError("no kernel")])
def test_an_error_of_the_program_ends_the_job(
    run_cli: Run,
    precompute_flags: list[str],
    out: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
) -> None:
    def failing(self: Annotator, *args: Any, **settings: Any) -> Annotations:
        raise error

    monkeypatch.setattr(Annotator, "annotate", failing)
    with pytest.raises(type(error), match=str(error)):
        run_cli(*precompute_flags, *job_flags(0, 2), "--output", out)


def test_two_jobs_at_one_damaged_shard_leave_the_first_complete_one(
    done: Run,
    precompute_flags: list[str],
    labels_dir: Path,
    out: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shutil.copytree(labels_dir, out)
    damaged = out / "train-00001.h5"
    damaged.write_bytes(damaged.read_bytes()[:-7])
    seen, make, taken = file_stamp(damaged), shards.make_shard, []
    others = replace(read_shard(labels_dir / "train-00001.h5"), counts={"of another job": [1]})

    def late(split: LabelSplit, number: int, *arguments: Any) -> Shard:
        assert write_shard(out / split.planned[number].name, others, damaged=seen)
        taken.append(damaged.stat().st_ino)
        return make(split, number, *arguments)

    monkeypatch.setattr(shards, "make_shard", late)
    report = done(*precompute_flags, *job_flags(1, 2), "--output", out).report
    assert report["shards_made"] == 1
    assert taken == [damaged.stat().st_ino]
    assert read_shard(damaged).counts == {"of another job": [1]}


# --- real processes -------------------------------------------------------------------------------


LONG = ["--num-views", "240", "--shard-size", "2"]  # 8 shards of val, 18 of train


@pytest.fixture(scope="module")
def alone(done: Run, precompute_flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The long set, by one process."""
    folder = tmp_path_factory.mktemp("alone") / "labels"
    done(*precompute_flags, *LONG, "--output", folder)
    return folder


@pytest.mark.slow
def test_three_jobs_at_once_one_of_them_killed_give_the_bytes_of_one_process(
    spawn: Callable[..., Spawned],
    done: Run,
    precompute_flags: list[str],
    out: Path,
    alone: Path,
    contents: Files,
) -> None:
    flags = [*precompute_flags, *LONG, "--output", out]
    jobs = [spawn(*flags, *job_flags(index, 3)) for index in range(3)]
    twin = spawn(*flags, *job_flags(0, 3))  # two nodes that do not know of each other
    jobs[1].until(lambda: (out / "train-00002.h5").exists())  # number 10 of all: its own
    jobs[1].signal(signal.SIGKILL)
    assert jobs[1].result().code == -signal.SIGKILL
    assert [job.result().code for job in (jobs[0], jobs[2], twin)] == [0, 0, 0]
    assert not (out / "manifest.json").exists()
    missing = contents(alone, "*.h5").keys() - contents(out, "*.h5").keys()
    assert missing, "it was killed too late to show anything"

    result = done(*flags, *job_flags(1, 3))
    assert result.report["shards_made"] == len(missing)
    done("labels", "finish", out, "--batch-size", 16)
    final = {n: d for n, d in contents(out).items() if not n.startswith(".tmp-")}
    assert final == contents(alone)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_job_as_any_process(
    spawn: Callable[..., Spawned],
    precompute_flags: list[str],
    out: Path,
    number: signal.Signals,
) -> None:
    flags = ["--num-views", 4000, "--shard-size", 2, *job_flags(0, 2), "--output", out]
    job = spawn(*precompute_flags, *flags)
    job.until(lambda: list(out.glob("*.h5")))
    job.signal(number)
    result = job.result()
    assert result.code == (4 if number is signal.SIGINT else -signal.SIGTERM)
    assert "saving and stopping" not in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.slow
def test_processes_of_one_command_give_the_set_of_one(
    done: Run,
    precompute_flags: list[str],
    labels_dir: Path,
    out: Path,
    contents: Files,
) -> None:
    result = done(*precompute_flags, "--num-procs", 2, "--output", out)
    assert contents(out) == contents(labels_dir)
    messages = result.stderr
    for number in (0, 1):
        assert f"[{number}] this process makes 3 of 6 shards" in messages
    for not_theirs in ("--job-index", "labels finish", "again"):
        assert not_theirs not in messages
    assert result.report["shards_made"] == 6
    assert "teachers on the validation split" in result.stderr
    again = done(*precompute_flags, "--output", out).report
    assert {n: again[n] for n in ("images", "views", "bytes", "accuracy")} == {
        n: result.report[n] for n in ("images", "views", "bytes", "accuracy")
    }


def test_cores_are_shared_by_processes_unless_the_user_says(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    cores = len(os.sched_getaffinity(0))
    assert env.child_environment(1)["OMP_NUM_THREADS"] == str(cores)
    assert env.child_environment(1000)["OMP_NUM_THREADS"] == "1"
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert env.child_environment(2)["OMP_NUM_THREADS"] == "7"


@pytest.mark.slow
def test_processes_refuse_as_one_does(
    run_cli: Run, precompute_flags: list[str], labels_dir: Path, contents: Files
) -> None:
    before = contents(labels_dir)
    flags = ["--num-procs", 2, "--view-seed", 8, "--output", labels_dir]
    result = run_cli(*precompute_flags, *flags)
    assert result.code == 3
    assert "2 of 2 processes failed (process 0: exit code 3, " in result.stderr.splitlines()[-1]
    assert "holds another label set" in result.stderr
    assert contents(labels_dir) == before


def children_of(pid: int) -> list[int]:
    """Return the processes that a process started."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == pid and fields[0] != "Z":
            found.append(int(path.parent.name))
    return sorted(found)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
def test_a_process_that_is_killed_is_named_and_the_same_command_goes_on(
    spawn: Callable[..., Spawned],
    done: Run,
    precompute_flags: list[str],
    out: Path,
    alone: Path,
    contents: Files,
) -> None:
    flags = [*precompute_flags, *LONG, "--num-procs", "2", "--output", out]
    engine = spawn(*flags)
    engine.until(lambda: len(list(out.glob("train-*.h5"))) > 1)
    os.kill(children_of(engine.process.pid)[1], signal.SIGKILL)
    result = engine.result()
    assert result.code == 1
    assert "1 of 2 processes failed (process 1: SIGKILL)" in result.stderr.splitlines()[-1]
    assert not (out / "manifest.json").exists()
    done(*flags)
    final = {n: d for n, d in contents(out).items() if not n.startswith(".tmp-")}
    assert final == contents(alone)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGHUP])
def test_processes_end_with_their_parent_and_leave_no_temporary_folder(
    spawn: Callable[..., Spawned],
    precompute_flags: list[str],
    out: Path,
    number: signal.Signals,
) -> None:
    flags = ["--num-views", 4000, "--shard-size", 2, "--num-procs", 2, "--output", out]
    engine = spawn(*precompute_flags, *flags)
    engine.until(lambda: list(out.glob("*.h5")))
    children = [os.pidfd_open(pid) for pid in children_of(engine.process.pid)]
    assert len(children) == 2
    os.kill(engine.process.pid, number)  # it alone
    assert engine.process.wait(timeout=60) == -number
    for child in children:
        assert select.select([child], [], [], 60)[0], "it outlives its parent"
        os.close(child)
    folder = engine.folder
    assert not [path for path in folder.iterdir() if path.name not in ("stderr.txt", "stdout.txt")]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_handed_on_to_every_process(
    spawn: Callable[..., Spawned], precompute_flags: list[str], out: Path, number: signal.Signals
) -> None:
    flags = ["--num-views", 4000, "--shard-size", 2, "--num-procs", 2, "--output", out]
    engine = spawn(*precompute_flags, *flags)
    engine.until(lambda: list(out.glob("*.h5")))
    children = children_of(engine.process.pid)
    assert len(children) == 2
    os.kill(engine.process.pid, number)  # it alone
    result = engine.result()
    assert result.code == (4 if number is signal.SIGINT else -signal.SIGTERM)
    assert not [pid for pid in children if Path(f"/proc/{pid}").exists()]
    assert "Traceback" not in result.stderr
    advice = [line for line in result.stderr.splitlines() if "again" in line]
    assert advice == [
        "mealv2: 2 processes stopped; complete shards are kept: run the same command again to "
        "continue"
    ]
