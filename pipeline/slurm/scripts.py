"""Text of batch scripts: directives for Slurm, then readable shell.

Text from the command line is quoted in shell and is one printable line in directives.
"""

import re
import shlex
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from mealv2.errors import ConfigError
from pipeline.config import MAX_RESTARTS, SlurmJob, SlurmTraining

PYTHON = [sys.executable, "-m"]

# A job of several processes is a step. After a preemption it saves and ends, and this shell
# requeues the job. It does not if it gets a SIGTERM too: then the user cancelled the job, its time
# limit was reached, or Slurm requeues it.
_BEGIN_STEP = """\
terminated=
trap 'terminated=1' TERM
job={job}
restarts=${{SLURM_RESTART_COUNT:-0}}
refused={folder}/refused-"$job.$restarts"
"""
_AFTER_STEP = """\
step=$!
wait "$step"
code=$?
while kill -0 "$step" 2>/dev/null; do  # a signal to this shell ends wait early
  wait "$step"
  code=$?
done

# Requeue the job after a preemption, a killed process or a lost node; it continues from its
# checkpoint. Do not if this shell got a SIGTERM: the job was cancelled or reached its time limit.
# Nor after exit code 2 or 3, written to a file: a wrong command or label set would fail again.
state=$(squeue --noheader --jobs="$job" --format=%T)
echo "the step ended with $code; SIGTERM: ${{terminated:-0}}; job $state" >&2
if [ "$code" -ne 0 ] && [ -s "$refused" ]; then
  read -r code <"$refused"
elif [ "$code" -ne 0 ] && [ -z "$terminated" ] && [ "$state" = RUNNING ]; then
  [ "$restarts" -ge {most} ] || {{ scontrol requeue "$job" && sleep 60; }}  # ends this shell
fi
exit "$code"
"""


def directive_path(path: Path) -> str:
    """Return a path as a directive needs it; raises ConfigError for one that Slurm cannot use."""
    text = str(path)
    if not text.isprintable() or "\\" in text:
        raise ConfigError(
            f"{text!r} cannot be a folder of batch jobs: Slurm cannot write log files there; use "
            "another name"
        )
    return text.replace("%", "%%")


def job_name(kind: str, folder: Path) -> str:
    """Return the name of a job in the queue, without special characters of a shell."""
    return re.sub(r"[^A-Za-z0-9._=,+-]", "-", f"{kind}-{folder.name}")


def head(config: SlurmJob, about: str, requested: dict[str, object]) -> str:
    """Return the head of a script: a comment, directives, and the lines of --setup.

    ``requested`` are more options of sbatch; those that are None are left out.
    """
    requested = {
        **requested,
        "time": config.time,
        "partition": config.partition,
        "account": config.account,
        "qos": config.qos,
        "constraint": config.constraint,
        "mem": config.mem,
    }
    given = [f"--{name}={value}" for name, value in requested.items() if value is not None]
    flags = [*given, "--requeue", "--open-mode=append", *config.sbatch_arg]
    lines = [f"#SBATCH {shlex.quote(word)}" for word in flags]
    return "\n".join(["#!/bin/bash", f"# {about}", *lines, "", *config.setup, ""]).lstrip()


def node_resources(config: SlurmJob) -> dict[str, object]:
    """Return the options of sbatch for the CPUs and GPUs of each node."""
    return {"cpus-per-task": config.cpus_per_task, "gpus-per-node": config.gpus or None}


def training_resources(config: SlurmTraining) -> dict[str, object]:
    """Return the options of sbatch for a training: one torchrun agent on each node."""
    return {"nodes": config.nodes, "ntasks-per-node": 1, **node_resources(config)}


def command(start: Sequence[str], words: Iterable[str], raw: Iterable[str] = ()) -> str:
    """Return a command with one option per line; ``raw`` are more lines of shell."""
    lines = [" ".join(map(shlex.quote, start))]
    for word in words:
        if word.startswith("--"):
            lines.append(shlex.quote(word))
        else:
            lines[-1] += f" {shlex.quote(word)}"
    return " \\\n  ".join([*lines, *raw])


def single_process(start: str) -> str:
    """Return the end of a script that runs one process."""
    # Slurm requeues a preempted job only if a signal ends it: so the process replaces the shell,
    # without srun, a trap, or an exit code of the shell.
    return f"exec {start}\n"


def training(config: SlurmTraining, stage: str, *, job: str, folder: Path) -> str:
    """Return the end of a script that trains; ``stage`` is the shell after ``python -m``.

    ``job`` is the number of the job as shell, ``folder`` the folder of the scripts.
    """
    if config.nodes * config.procs == 1:
        return single_process(f"{command(PYTHON, [])} {stage}")
    step = [
        "srun --kill-on-bad-exit=1 --wait=60"
        + (f" --cpus-per-task={config.cpus_per_task}" if config.cpus_per_task else ""),
        f'env MEALV2_REFUSED="$refused" {command([*PYTHON, "torch.distributed.run"], [])}',
        f"--nnodes={config.nodes} --nproc-per-node={config.procs} {_rendezvous(config.nodes)}",
        f"-m {stage} &",
    ]
    begin = _BEGIN_STEP.format(job=job, folder=shlex.quote(str(folder)))
    if config.nodes > 1:
        begin += 'head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)\n'
    return begin + " \\\n  ".join(step) + "\n" + _AFTER_STEP.format(most=config.max_requeues)


def _rendezvous(nodes: int) -> str:
    """Return the options of torchrun for the rendezvous and the restarts of its processes."""
    if nodes == 1:
        return f"--standalone --max-restarts={MAX_RESTARTS}"
    # the agents of several nodes count restarts separately and get out of step: requeue instead
    return (
        "--max-restarts=0 --rdzv-backend=c10d \\\n"
        '  --rdzv-id="$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}" '
        '--rdzv-endpoint="$head:$((20000 + SLURM_JOB_ID % 10000))"'
    )
