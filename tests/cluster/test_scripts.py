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
ROOT = Path(submitting.__file__).resolve().parents[2]
NAMES = [
    'it\'s a "set"',
    "50%j of $(touch touched) `id` #x; touch touched &",
    "ünï {a} [b] * ?",
    "#SBATCH --hold",
]


@pytest.mark.parametrize("name", NAMES)
def test_what_is_in_a_name_is_not_code_and_logs_lie_where_the_name_says(
    cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for key, value in cluster.env.items():
        monkeypatch.setenv(key, value)
    config = SlurmDistillConfig(flags=("x",), sbatch_arg=(f"--comment={name}",))
    this = submitting.next_round(tmp_path / name)
    asked = {
        "job-name": scripts.job_name("distill", tmp_path / name),
        "output": f"{this.log}/distill-%j.out",
    }
    words = [name, f"{name}\n#SBATCH --hold\n", str(tmp_path / name)]
    show = scripts.alone(scripts.command(["printf", "%s|"], words))
    submitting.keep(this.path("distill"), scripts.head(config, "Shows.", asked) + show)

    job = submitting.submit(submitting.sbatch_words(config, this.path("distill")))
    cluster.until_ended(job)

    log = tmp_path / name / "slurm" / f"distill-{job}.out"
    assert log.read_text() == "".join(f"{word}|" for word in words)
    assert f"Comment={name} " in cluster.run("scontrol", "-o", "show", "job", job)
    assert sorted(path.name for path in tmp_path.iterdir()) == [name]


@pytest.mark.parametrize(
    ("flags", "why"),
    [
        (["--partition", "nowhere"], "invalid partition"),
        (["--time", "soon"], "--time"),
        (["--sbatch-arg=--array=0-5000"], "--array 1000 at most"),
        (["--sbatch-arg=--never-heard-of"], "never-heard-of"),
    ],
)
def test_what_slurm_refuses_is_one_line_with_the_script_that_is_kept(
    cluster: Any, distill_flags: list[str], tmp_path: Path, flags: list[str], why: str
) -> None:
    command = ["distill", *flags, *distill_flags[1:], "--output", tmp_path / "run"]
    said = cluster.command("slurm", *command)
    assert (said.returncode, said.stdout) == (1, "")
    line = said.stderr.splitlines()[-1]
    assert line.startswith("mealv2: sbatch refused: ")
    assert why in line
    kept = re.search(r"the script is kept: (\S+)", line)
    assert kept is not None
    assert Path(kept[1]).read_text().startswith("#!/bin/bash\n")


def test_a_second_job_for_the_same_run_is_refused(
    cluster: Any, distill_flags: list[str], tmp_path: Path
) -> None:
    command = ["distill", "--sbatch-arg=--hold", *distill_flags[1:], "--output", tmp_path / "run"]
    job = cluster.submit(*command)["job"]
    again = cluster.command("slurm", *command)
    assert again.returncode == 1
    assert f"job {job} waiting or at work" in again.stderr
    cluster.run("scancel", job)
    cluster.until_ended(job)
    assert cluster.submit(*command)["job"] == job + 1


def blocks(language: str) -> list[str]:
    """Return the fenced blocks of a language under the heading Slurm."""
    text = (ROOT / "docs" / "cluster.md").read_text(encoding="utf-8").partition("\n## Slurm\n")[2]
    found = re.split(r"\n## ", text)[0]
    return re.findall(rf"^```{language}\n(.*?)^```$", found, flags=re.MULTILINE | re.DOTALL)


def test_the_files_that_the_document_gives_label_and_train_one_after_another(
    cluster: Any,
    data_dir: Path,
    teacher_dirs: dict[str, Path],
    student_dir: Path,
    done: Callable[..., Result],
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


def listening(cluster: Any) -> list[str]:
    """Return where processes of the cluster listen, as this machine sees its network."""
    lines = subprocess.run(
        ["ss", "-Htulnp"], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    return [
        line for line in lines if any(_is_of(cluster, p) for p in re.findall(r"pid=(\d+)", line))
    ]


def _is_of(cluster: Any, process: str) -> bool:
    """Return whether a process is a daemon of the cluster or runs in one of its jobs."""
    path = Path("/proc", process)
    try:
        command, environment = (path / "cmdline").read_bytes(), (path / "environ").read_bytes()
    except OSError:
        return False
    words = (b"slurmctld", b"slurmd", b"munged")
    return b"SLURMD_NODENAME=" in environment or any(word in command for word in words)


def test_nothing_listens_or_speaks_outside_while_two_nodes_train(
    cluster: Any, distill_flags: list[str], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    flags = [*distill_flags[1:], "--epochs", 200, "--val-interval", 200]
    job = cluster.submit("distill", "--nodes", 2, *flags, "--output", run)["job"]
    cluster.until(lambda: (run / "summary.csv").exists())

    found = listening(cluster)
    if cluster.mode == "net":
        assert found == []
        route = "import socket; socket.create_connection(('192.0.2.1', 80), timeout=5)"
        inside = f"{sys.executable} -c {json.dumps(route)} 2>&1"
        name = tmp_path / "out"
        probe = int(cluster.run("sbatch", "--parsable", f"--output={name}", "--wrap", inside))
        cluster.until_ended(probe)
        assert "Network is unreachable" in name.read_text()
    else:
        daemons = [line for line in found if "slurm" in line]
        assert all(" 127.0.0.1:" in line for line in daemons), daemons
    cluster.run("scancel", job)
    cluster.until_ended(job)
