"""pipeline.slurm: scripts that say what was asked, and nothing submitted that cannot run.

What a real Slurm makes of them is in tests/cluster.
"""

import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import Result
from mealv2.errors import ConfigError
from pipeline.config import SlurmDistillConfig
from pipeline.slurm import scripts

Run = Callable[..., Result]
Contents = Callable[..., dict[str, bytes]]
TRAIN = ["--data-dir", "pictures", "--labels", "labels", "--model", "resnet18.tv_in1k"]


@pytest.fixture(autouse=True)
def no_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without Slurm, with bash."""
    (tmp_path / "bin").mkdir()
    bash = shutil.which("bash")
    assert bash is not None
    (tmp_path / "bin" / "bash").symlink_to(bash)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.chdir(tmp_path)


def parts(printed: str) -> list[tuple[list[str], str]]:
    """Return the scripts of --print, each with the command that submits it."""
    found = re.split(r"^# ==== (.*)\n", printed, flags=re.MULTILINE)[1:]
    return [(shlex.split(words), text) for words, text in zip(found[::2], found[1::2], strict=True)]


def directives(script: str) -> list[str]:
    """Return what a script asks Slurm for: the lines before the first that is no comment."""
    lines = script.splitlines()
    comments = lines[: next(n for n, line in enumerate(lines) if not line.startswith("#"))]
    return [line.removeprefix("#SBATCH ") for line in comments if line.startswith("#SBATCH ")]


# --- scripts ------------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)  # a process each
@given(st.lists(st.text(st.characters(exclude_characters="\0", codec="utf-8")), min_size=1))
def test_words_reach_the_command_as_they_are_whatever_is_in_them(words: list[str]) -> None:
    script = scripts.command(["printf", r"%s\0"], words)
    ran = subprocess.run(["bash"], input=script.encode(), capture_output=True, check=True)
    assert ran.stdout.decode().split("\0") == [*words, ""]


@pytest.mark.parametrize("name", ["a\nb", "a\\b", "a\u2028b", "tab\t"])
def test_a_folder_that_slurm_cannot_name_logs_in_is_refused(done: Run, name: str) -> None:
    with pytest.raises(ConfigError, match="cannot be a folder of batch jobs"):
        scripts.directive_path(Path(name))


@given(st.text(st.characters(exclude_characters="/\0")))
def test_names_of_jobs_mean_nothing_to_a_shell(name: str) -> None:
    made = scripts.job_name("distill", Path("/runs") / f"x{name}")
    assert re.fullmatch(r"distill-x[A-Za-z0-9._=,+-]*", made)
    assert shlex.quote(made) == made or set(made) & set("=,+")


def test_what_is_asked_for_stands_in_the_script_and_what_it_waits_for_does_not(done: Run) -> None:
    asked = [
        *("--time", "1:00:00", "--partition", "gpu", "--account", "us", "--qos", "low"),
        *("--constraint", "a100&ib", "--mem", "64G", "--cpus-per-task", "8", "--gpus", "4"),
        *("--nodes", "2", "--after", "12", "--after", "13_4", "--setup", "module load cuda"),
        *("--setup", 'echo "it\'s $HOME"', "--sbatch-arg", "--comment=it's a run"),
    ]
    said = done("slurm", "distill", *asked, *TRAIN, "--output", "runs/it's", "--print")

    ((words, script),) = parts(said.stdout)
    asked_for = [shlex.split(line)[0] for line in directives(script)]
    assert asked_for == [
        "--job-name=distill-it-s",
        "--nodes=2",
        "--ntasks-per-node=1",
        "--cpus-per-task=8",
        "--gpus-per-node=4",
        f"--output={Path.cwd()}/runs/it's/slurm/distill-%j.out",
        "--time=1:00:00",
        "--partition=gpu",
        "--account=us",
        "--qos=low",
        "--constraint=a100&ib",
        "--mem=64G",
        "--requeue",
        "--open-mode=append",
        "--comment=it's a run",
    ]
    assert words[:-1] == [
        *("sbatch", "--parsable", "--dependency=afterok:12:13_4", "--kill-on-invalid-dep=yes")
    ]
    assert words[-1] == f"{Path.cwd()}/runs/it's/slurm/distill-1.sbatch"
    assert '\nmodule load cuda\necho "it\'s $HOME"\n' in script
    assert "--nproc-per-node=4" in script
    assert "srun --kill-on-bad-exit=1 --wait=60 --cpus-per-task=8 " in script
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)


def test_one_process_is_the_shell_itself_and_several_are_a_step(done: Run) -> None:
    alone = done("slurm", "distill", *TRAIN, "--output", "run", "--print").stdout
    nodes = done("slurm", "distill", "--nodes", 2, *TRAIN, "--output", "run", "--print").stdout
    procs = done("slurm", "distill", "--gpus", 8, *TRAIN, "--output", "run", "--print").stdout

    assert f"\nexec {sys.executable} -m mealv2 distill \\\n" in alone
    assert "trap" not in alone
    assert "srun" not in alone
    assert "--nnodes=2 --nproc-per-node=1 --max-restarts=0 --rdzv-backend=c10d" in nodes
    assert "--nnodes=1 --nproc-per-node=8 --standalone --max-restarts=3" in procs
    assert all("trap 'terminated=1' TERM" in script for script in (nodes, procs))
    assert all("--auto-resume" in script for script in (alone, nodes, procs))


def test_paths_are_absolute_and_flags_are_those_that_were_given(done: Run) -> None:
    flags = [*TRAIN, "-b", 64, "--mean", 0.1, 0.2, 0.3, "--std", 1, 1, 1, "--no-model-ema"]
    flags += ["--teacher", "a=x,b", "--missing", "teach", "--decay-milestones", 3]
    Path("x").mkdir()  # a comma could belong to the path
    said = done("slurm", "distill", *flags, "--output", "run", "--print").stdout

    here = Path.cwd()
    words = shlex.split(said.partition("distill \\\n")[2].replace("\\\n", ""))
    assert words == [
        *("--data-dir", f"{here}/pictures", "--model", "resnet18.tv_in1k", "--batch-size", "64"),
        *("--decay-milestones", "3", "--no-model-ema", "--output", f"{here}/run", "--auto-resume"),
        *("--labels", f"{here}/labels", "--teacher", f"a={here}/x", "--teacher", "b"),
        *("--missing", "teach", "--mean", "0.1", "0.2", "0.3", "--std", "1.0", "1.0", "1.0"),
    ]


# --- stage one ------------------------------------------------------------------------------------


def test_an_array_and_the_manifest_behind_it_are_printed_and_nothing_is_written(
    done: Run, precompute_flags: list[str], tmp_path: Path
) -> None:
    out = tmp_path / "labels"
    flags = ["--array", 3, "--gpus", 1, *precompute_flags[1:], "--output", out]
    said = done("slurm", "precompute", *flags, "--print")

    (array, finish) = parts(said.stdout)
    assert "--array=0-2" in directives(array[1])
    assert "--gpus-per-node=1" in directives(array[1])
    assert f"exec {sys.executable} -m mealv2 precompute \\\n" in array[1]
    assert '--job-index "$SLURM_ARRAY_TASK_ID" --num-jobs 3' in array[1]
    assert finish[0][2:4] == ["--dependency=afterany:ARRAY", "--kill-on-invalid-dep=yes"]
    assert not any("gpus" in line for line in directives(finish[1]))
    assert f"labels finish {out} \\\n  --batch-size 16\n" in finish[1]
    for _, script in (array, finish):
        subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    assert not out.exists()


def test_the_list_has_what_is_missing_or_damaged_and_the_stage_finds_the_folder_its_own(
    done: Run,
    run_cli: Run,
    precompute_flags: list[str],
    labels_dir: Path,
    contents: Contents,
    tmp_path: Path,
) -> None:
    out = tmp_path / "labels"
    shutil.copytree(labels_dir, out)
    (out / "manifest.json").unlink()
    (out / "train-00002.h5").unlink()
    (out / "train-00000.h5").write_bytes(b"half a file")
    command = ["slurm", "precompute", *precompute_flags[1:], "--output", out]

    refused = run_cli(*command)
    assert refused.code == 1
    assert f"the script is kept: {out}/slurm/precompute-1.sbatch" in refused.stderr
    assert refused.stderr.count("\n") == 1 + refused.stderr.count("checking")
    names = (out / "slurm" / "precompute-1.txt").read_text().split()
    assert names == ["train-00000.h5", "train-00002.h5"]
    assert "--array=0-1\n" in (out / "slurm" / "precompute-1.sbatch").read_text()
    kept = contents(out / "slurm")

    done(*precompute_flags, "--output", out)
    whole = {name: data for name, data in contents(out).items() if not name.startswith("slurm/")}
    assert whole == contents(labels_dir)
    assert contents(out / "slurm") == kept
    again = done(*command)
    assert again.report == {"labels": str(out), "missing": 0, "array": None, "finish": None}
    (out / "manifest.json").unlink()
    printed = parts(done(*command, "--print").stdout)
    assert [Path(words[-1]).name for words, _ in printed] == ["finish-2.sbatch"]


def test_a_set_begins_where_there_is_nothing_but_scripts(
    done: Run, run_cli: Run, precompute_flags: list[str], labels_dir: Path, tmp_path: Path
) -> None:
    out = tmp_path / "labels"
    run_cli("slurm", "precompute", *precompute_flags[1:], "--output", out)
    assert [path.name for path in out.iterdir()] == ["slurm"]
    names = (out / "slurm" / "precompute-1.txt").read_text().split()
    assert names == sorted(
        (path.name for path in labels_dir.glob("*.h5")), key=lambda n: (n[0] != "v", n)
    )
    part = ["--shard-list", out / "slurm" / "precompute-1.txt", "--job-index", 0, "--num-jobs", 1]
    assert done(*precompute_flags, "--output", out, *part).report["shards_made"] == len(names)


# --- stage two ------------------------------------------------------------------------------------


def test_a_run_begins_where_there_are_only_scripts_and_a_finished_one_is_not_submitted(
    done: Run, run_cli: Run, distill_flags: list[str], tmp_path: Path
) -> None:
    command = [*distill_flags, "--output", tmp_path / "run"]
    refused = run_cli("slurm", *command)
    assert refused.code == 1
    assert "sbatch is not installed; the script is kept: " in refused.stderr
    assert refused.stderr.count("\n") == 1

    done(*command, "--auto-resume")
    said = done("slurm", *command)
    assert said.report == {"output": str(tmp_path / "run"), "job": None}
    assert "nothing to submit" in said.stderr
    assert len(list((tmp_path / "run" / "slurm").iterdir())) == 1


def test_what_was_begun_with_other_settings_is_refused_before_it_is_submitted(
    done: Run, run_cli: Run, distill_flags: list[str], tmp_path: Path
) -> None:
    command = [*distill_flags, "--output", tmp_path / "run"]
    done(*command)
    (tmp_path / "run" / "report.json").unlink()
    refused = run_cli("slurm", *command, "--lr", 0.5)
    assert refused.code == 2
    assert "in the run, 0.5 in this command" in refused.stderr
    assert not (tmp_path / "run" / "slurm").exists()


def test_a_sweep_is_a_task_for_each_choice_in_folders_named_after_it(
    done: Run, tmp_path: Path
) -> None:
    vary = ["--vary", "seed=0,1", "--vary", "model-ema=yes,no", "--vary", "model=a b,c"]
    train = [*TRAIN[:4], "--output", "sweep"]
    ((_, script),) = parts(done("slurm", "sweep", *vary, *train, "--print").stdout)

    assert "--array=0,1,2,3,4,5,6,7" in directives(script)
    cases = dict(re.findall(r"^  (\d+)\) student=\((.*)\) ;;$", script, flags=re.MULTILINE))
    assert shlex.split(cases["2"]) == [
        *("--model", "a b", "--no-model-ema", "--seed", "0"),
        *("--output", f"{tmp_path}/sweep/seed=0,model-ema=no,model=a-b"),
    ]
    assert len(set(cases.values())) == 8
    shared = script.partition("distill \\\n")[2]
    assert '"${student[@]}"' in shared
    assert not {"--seed", "--model", "--model-ema", "--output"} & set(shlex.split(shared))
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)


def test_a_recipe_can_be_varied_and_every_student_is_checked(done: Run, run_cli: Run) -> None:
    train = ["--data-dir", "d", "--labels", "l", "--output", "sweep", "--print"]
    ((_, script),) = parts(
        done("slurm", "sweep", "--vary", "recipe=resnet18,efficientnet-b0", *train).stdout
    )
    assert "student=(--output " in script
    assert "--recipe efficientnet-b0" in script
    wrong = run_cli("slurm", "sweep", "--vary", "recipe=resnet18,resnet81", *train)
    assert (wrong.code, "resnet81" in wrong.stderr) == (2, True)


def test_two_students_of_one_name_are_refused(run_cli: Run) -> None:
    said = run_cli("slurm", "sweep", "--vary", "seed=1,1", *TRAIN, "--output", "s", "--print")
    assert (said.code, "two students of the same name" in said.stderr) == (2, True)


def test_processes_on_a_node_are_one_for_each_gpu_unless_said() -> None:
    flags = ("--output", "o")
    assert SlurmDistillConfig(flags=flags).procs == 1
    assert SlurmDistillConfig(flags=flags, gpus=4).procs == 4
    assert SlurmDistillConfig(flags=flags, gpus=4, nproc_per_node=2).procs == 2
