"""What a real Slurm makes of scripts: names, refusals, the documentation's files, the network."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from conftest import Result
from pipeline.config import SlurmDistillConfig
from pipeline.slurm import scripts, submitting

pytestmark = pytest.mark.cluster
Run = Callable[..., Result]
ROOT = Path(submitting.__file__).resolve().parents[2]
NAMES = [
    'it\'s a "set"',
    "50%j of $(touch touched) `id` #x; touch touched &",
    "ünï {a} [b] * ?",
    "#SBATCH --hold",
]


@pytest.fixture
def user(cluster: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The cluster, seen from this process."""
    for key, value in cluster.env.items():
        monkeypatch.setenv(key, value)
    return cluster


@pytest.mark.parametrize("name", NAMES)
def test_what_is_in_a_name_is_not_code_and_logs_lie_where_the_name_says(
    user: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    config = SlurmDistillConfig(flags=("x",), sbatch_arg=(f"--comment={name}",))
    this = submitting.next_submission(tmp_path / name)
    asked = {
        "job-name": scripts.job_name("distill", tmp_path / name),
        "output": f"{this.log_folder}/distill-%j.out",
    }
    words = [name, f"{name}\n#SBATCH --hold\n", str(tmp_path / name)]
    show = scripts.single_process(scripts.command(["printf", "%s|"], words))
    submitting.write_script(this.path("distill"), scripts.head(config, "Shows.", asked) + show)

    job = submitting.submit(submitting.sbatch_command(config, this.path("distill")))
    user.until_ended(job)

    log = tmp_path / name / "slurm" / f"distill-{job}.out"
    assert log.read_text() == "".join(f"{word}|" for word in words)
    assert f"Comment={name} " in user.run("scontrol", "-o", "show", "job", job)
    assert sorted(path.name for path in tmp_path.iterdir()) == [name]


@pytest.mark.parametrize(
    ("flags", "why"),
    [
        (["--partition", "nowhere"], "invalid partition"),
        (["--sbatch-arg=--array=0-5000"], "--array 1000 at most"),
        (["--sbatch-arg=--never-heard-of"], "never-heard-of"),
    ],
)
def test_what_slurm_refuses_is_one_line_with_the_script_that_is_kept(
    user: Any, run_cli: Run, distill_flags: list[str], tmp_path: Path, flags: list[str], why: str
) -> None:
    command = ["distill", *flags, *distill_flags[1:], "--output", tmp_path / "run"]
    said = run_cli("slurm", *command)
    assert (said.code, said.stdout) == (1, "")
    line = said.stderr.splitlines()[-1]
    assert line.startswith("mealv2: sbatch failed: ")
    assert why in line
    kept = re.search(r"the script is kept: (\S+)", line)
    assert kept is not None
    assert Path(kept[1]).read_text().startswith("#!/bin/bash\n")


def test_a_second_job_for_the_same_run_is_refused(
    user: Any, run_cli: Run, distill_flags: list[str], tmp_path: Path
) -> None:
    command = ["distill", "--sbatch-arg=--hold", *distill_flags[1:], "--output", tmp_path / "run"]
    job = run_cli("slurm", *command).report["job"]
    again = run_cli("slurm", *command)
    assert (again.code, again.stdout) == (1, "")
    assert f"job {job} for {tmp_path / 'run'} is waiting or running" in again.stderr
    user.run("scancel", job)
    user.until_ended(job)
    assert run_cli("slurm", *command).report["job"] == job + 1


def blocks(language: str) -> list[str]:
    """Return the fenced blocks of a language in the guide on Slurm."""
    text = (ROOT / "docs" / "how-to" / "slurm.md").read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


def test_the_files_that_the_document_gives_label_and_train_one_after_another(
    cluster: Any,
    data_dir: Path,
    teacher_dirs: dict[str, Path],
    student_dir: Path,
    done: Run,
    tmp_path: Path,
) -> None:
    label, train, chain, _ = blocks("bash")
    (tmp_path / "pictures").symlink_to(data_dir)
    for name, model in {"teacher-1": teacher_dirs["test_resnet"], "start": student_dir}.items():
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "student").symlink_to(model)
    quick = {
        "resnet50": "test_resnet",
        "resnet18": "test_resnet",
        "--num-views 30": "--num-views 2 --img-size 32 --workers 0",
        "--array=0-15": "--array=0-1",
        "--auto-resume": "--auto-resume --epochs 1 --workers 0",
    }
    for name, text in {"label": label, "train": train}.items():
        for there, here in quick.items():
            text = text.replace(there, here)
        (tmp_path / f"{name}.sbatch").write_text(text)
    (tmp_path / "bin").mkdir()
    for name, module in {"mealv2": "mealv2", "torchrun": "torch.distributed.run"}.items():
        (tmp_path / "bin" / name).write_text(f'#!/bin/sh\nexec {sys.executable} -m {module} "$@"\n')
        (tmp_path / "bin" / name).chmod(0o755)

    env = {**cluster.env, "PATH": f"{tmp_path / 'bin'}:{cluster.env['PATH']}"}
    ran = subprocess.run(
        ["bash", "-e", "-c", chain],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
        check=True,
    )
    job = int(ran.stdout.split()[-1])
    cluster.until_ended(job)

    assert cluster.task(job).state == "COMPLETED"
    assert done("labels", "verify", tmp_path / "labels").code == 0
    report = json.loads((tmp_path / "runs" / "student" / "report.json").read_text())
    assert report["teacher_forwards"] == 0
