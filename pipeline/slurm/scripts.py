"""Batch scripts as text: what Slurm is asked for, then shell that a person can read and edit.

All that comes from a command line is quoted where it stands in shell, and is one printable line
where it stands in a comment or a directive.
"""

import re
import shlex
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from mealv2.errors import ConfigError
from pipeline.config import MAX_RESTARTS, SlurmJob, SlurmTraining

PYTHON = [sys.executable, "-m"]

# A job of several processes is a step. It hears of a preemption early, saves and ends; what begins
# it again is this shell, unless the shell was told to end too: then the user cancelled the job, its
# time limit came, or Slurm requeues it.
_BEGIN_STEP = """\
told_to_end=
trap 'told_to_end=1' TERM
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

# Begin again from the checkpoint: after a preemption, a killed process, a lost node.
# Not if this shell was told to end: then the job was cancelled, or its time is up.
# Nor if the command was wrong, or its label set (exit codes 2 and 3, left in a file): it still is.
state=$(squeue --noheader --jobs="$job" --format=%T)
echo "the step ended with $code; told to end: ${{told_to_end:-0}}; job $state" >&2
if [ "$code" -ne 0 ] && [ -s "$refused" ]; then
  read -r code <"$refused"
elif [ "$code" -ne 0 ] && [ -z "$told_to_end" ] && [ "$state" = RUNNING ]; then
  [ "$restarts" -ge {most} ] || {{ scontrol requeue "$job" && sleep 60; }}  # that ends this shell
fi
exit "$code"
"""


def directive_path(path: Path) -> str:
    """Return a path as it is in names that Slurm makes; raises ConfigError where it cannot be."""
    text = str(path)
    if not text.isprintable() or "\\" in text:
        raise ConfigError(
            f"{text!r} cannot be a folder of batch jobs: Slurm cannot name files there"
        )
    return text.replace("%", "%%")


def job_name(kind: str, folder: Path) -> str:
    """Return a name to know a job by in the queue, of letters that mean nothing to a shell."""
    return re.sub(r"[^A-Za-z0-9._=,+-]", "-", f"{kind}-{folder.name}")


def head(config: SlurmJob, about: str, requested: dict[str, object]) -> str:
    """Return the beginning of a script: what it is for, what Slurm is asked for, what is set up.

    ``requested`` are options of sbatch beside those that every job has; one that is None is left
    out.
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
    """Return the options of sbatch for what each node of a job gives."""
    return {
        "cpus-per-task": config.cpus_per_task,
        "gpus-per-node": config.gpus or None,
    }


def training_resources(config: SlurmTraining) -> dict[str, object]:
    """Return the options of sbatch for the nodes of a training: one agent on each."""
    nodes = {"nodes": config.nodes, "ntasks-per-node": 1}
    return {**nodes, **node_resources(config)}


def command(start: Sequence[str], words: Iterable[str], raw: Iterable[str] = ()) -> str:
    """Return a command, an option a line; ``raw`` are lines of shell that go in as they are."""
    lines = [" ".join(map(shlex.quote, start))]
    for word in words:
        if word.startswith("--"):
            lines.append(shlex.quote(word))
        else:
            lines[-1] += f" {shlex.quote(word)}"
    return " \\\n  ".join([*lines, *raw])


def alone(start: str) -> str:
    """Return the end of a script whose work is one process."""
    # A preempted job is requeued only if it is still there when its time is up: the shell becomes
    # the worker, which dies of the signal. No srun, no trap, no exit code of its own.
    return f"exec {start}\n"


def training(config: SlurmTraining, stage: str, *, job: str, folder: Path) -> str:
    """Return the end of a script that trains: ``stage`` is the shell after ``python -m``.

    ``job`` is what Slurm calls the job, as shell; ``folder`` is where scripts are kept.
    """
    if config.nodes * config.procs == 1:
        return alone(f"{command(PYTHON, [])} {stage}")
    step = [
        "srun --kill-on-bad-exit=1 --wait=60"
        + (f" --cpus-per-task={config.cpus_per_task}" if config.cpus_per_task else ""),
        f'env MEALV2_REFUSED="$refused" {command([*PYTHON, "torch.distributed.run"], [])}',
        f"--nnodes={config.nodes} --nproc-per-node={config.procs} {_meeting(config.nodes)}",
        f"-m {stage} &",
    ]
    begin = _BEGIN_STEP.format(job=job, folder=shlex.quote(str(folder)))
    if config.nodes > 1:
        begin += 'head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)\n'
    return begin + " \\\n  ".join(step) + "\n" + _AFTER_STEP.format(most=config.max_requeues)


def _meeting(nodes: int) -> str:
    """Return the options of torchrun that say how processes meet, and who begins them again."""
    if nodes == 1:
        return f"--standalone --max-restarts={MAX_RESTARTS}"
    # torchrun on several nodes counts restarts apart and falls out of step: the job begins again
    return (
        "--max-restarts=0 --rdzv-backend=c10d \\\n"
        '  --rdzv-id="$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}" '
        '--rdzv-endpoint="$head:$((20000 + SLURM_JOB_ID % 10000))"'
    )
