"""Write batch scripts into the folder that their jobs fill, and submit them with sbatch."""

import itertools
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mealv2.errors import ConfigError, MealError
from mealv2.storage.atomic import SCRIPTS_NAME, write_atomic
from mealv2.storage.json_format import canonical_json, read_json
from mealv2.storage.urls import Location, file_name
from pipeline import console
from pipeline.config import SlurmJob, SlurmTraining, StageCommand, flag
from pipeline.slurm import scripts

CheckFlags = Callable[[Iterable[str]], StageCommand]  # flags of a command; raises ConfigError
_JOBS = ("array", "finish", "job")  # the keys of job numbers in a report
_MAX_TASKS = 1000  # the default of Slurm's MaxArraySize is 1001


@dataclass(frozen=True)
class Submission:
    """The files of one submission: slurm/NAME-NUMBER.SUFFIX in the folder that the jobs fill."""

    folder: Path
    number: int

    def path(self, name: str, suffix: str = "sbatch") -> Path:
        """Return the path of a file of this submission."""
        return self.folder / f"{name}-{self.number}.{suffix}"

    @property
    def log_folder(self) -> str:
        """The folder as Slurm's --output needs it."""
        return scripts.directive_path(self.folder)


def next_submission(output: Location) -> Submission:
    """Return the next submission for a folder; files of earlier ones stay.

    The files for a URL are in a local folder named after the last part of the URL.
    """
    path = file_name(output.rstrip("/")) if isinstance(output, str) else output
    folder = Path(os.path.abspath(path)) / SCRIPTS_NAME  # noqa: PTH100  # as config.plain
    numbers = itertools.count(1)
    return next(Submission(folder, n) for n in numbers if not any(folder.glob(f"*-{n}.*")))


def sbatch_command(config: SlurmJob, script: Path, *, after: str | None = None) -> list[str]:
    """Return the command that submits a script; ``after`` is a dependency that replaces --after."""
    waits = after or (f"afterok:{':'.join(config.after)}" if config.after else None)
    # without kill-on-invalid-dep, a job whose dependency failed would wait forever
    flags = [f"--dependency={waits}", "--kill-on-invalid-dep=yes"] if waits else []
    return ["sbatch", "--parsable", *flags, str(script)]


def printable(texts: list[tuple[list[str], str]]) -> str:
    """Return scripts and the commands that submit them as one text."""
    return "\n".join(f"# ==== {shlex.join(words)}\n{text}" for words, text in texts).rstrip("\n")


def write_script(path: Path, text: str) -> None:
    """Write a new file of a submission. Raises MealError if it exists, OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not write_atomic(path, text.encode(), replace=False):
        raise MealError(f"{path} was written by another submission just now; try again")


def queued_jobs(submission: Submission) -> list[str]:
    """Return the jobs of earlier submissions for a folder that wait or run, from squeue."""
    reports = [read_json(path) for path in sorted(submission.folder.glob("jobs-*.json"))]
    jobs = [str(report[name]) for report in reports for name in _JOBS if report.get(name)]
    if not jobs or shutil.which("squeue") is None:
        return []
    words = ["squeue", "--noheader", "--format=%F", f"--jobs={','.join(jobs)}"]
    # squeue fails for jobs that have left its memory
    ran = subprocess.run(words, capture_output=True, text=True, check=False)
    return sorted(set(ran.stdout.split()))


def submit(words: list[str], *, submitted: dict[str, Any] | None = None) -> int:
    """Run sbatch; return the number of the job. Raises MealError.

    ``submitted`` has the jobs submitted before, for the error message.
    """
    before = [
        f"{name} is job {job}" for name, job in (submitted or {}).items() if name in _JOBS and job
    ]
    kept = "; ".join([f"the script is kept: {words[-1]}", *before])
    if shutil.which(words[0]) is None:
        raise MealError(f"{words[0]} is not installed; {kept}; submit it on a machine with Slurm")
    ran = subprocess.run(words, capture_output=True, text=True, check=False)
    output = [
        re.sub(r"^\S*sbatch: (error: )?", "", line.strip()) for line in ran.stderr.splitlines()
    ]
    if ran.returncode:
        why = "; ".join(filter(None, output)) or "no reason given"
        limit = f" (--array {_MAX_TASKS} at most, unless the site allows more)"
        raise MealError(f"sbatch failed: {why}{limit if ' array' in why else ''}; {kept}")
    for line in output:
        console.info(line)
    return int(ran.stdout.strip().splitlines()[-1].split(";")[0])


def write_report(submission: Submission, report: Mapping[str, Any]) -> None:
    """Write the numbers of the submitted jobs beside their scripts."""
    write_atomic(submission.path("jobs", "json"), canonical_json(dict(report)).encode())


def submit_training(
    config: SlurmTraining,
    stage: StageCommand,
    report: dict[str, Any],
    *,
    name: str,
    about: str,
    command: str,
    array: str | None = None,
    settings: str = "",
) -> dict[str, Any] | str:
    """Submit a training that fills report["output"], or return the script with --print.

    ``array`` and ``settings`` are the tasks of an array and the shell that chooses their settings.
    Raises MealError, also if an earlier job for the same folder waits or runs.
    """
    labels = getattr(stage.config, "labels", None)
    if isinstance(labels, Path) and not labels.exists() and not config.after:
        console.info(
            f"--labels {labels} does not exist yet; with --after JOB, the training waits for the "
            "job that makes it"
        )
    output = Path(report["output"])
    submission = next_submission(output)
    requested = {
        "job-name": scripts.job_name(name, output),
        "array": array,
        **scripts.training_resources(config),
        "output": f"{submission.log_folder}/{name}-{'%A_%a' if array else '%j'}.out",
    }
    job = '"${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"' if array else '"$SLURM_JOB_ID"'
    text = scripts.head(config, about, requested) + settings
    text += scripts.training(config, command, job=job, folder=submission.folder)
    words = sbatch_command(config, submission.path(name))
    if config.print_:
        return printable([(words, text)])
    if jobs := " ".join(queued_jobs(submission)):
        raise MealError(
            f"job {jobs} for {output} is waiting or running; wait for it, or stop it with "
            f"`scancel {jobs}`"
        )
    write_script(submission.path(name), text)
    report["job"] = submit(words)
    write_report(submission, report)
    return report


def check_supported(stage: StageCommand, *names: str) -> None:
    """Raise ConfigError for a flag that has no effect in a batch job."""
    for name in names:
        if name in stage.options:
            raise ConfigError(f"{flag(name)} has no effect with `mealv2 slurm`; leave it out")


def check_training(flags: Iterable[str], check_flags: CheckFlags) -> tuple[StageCommand, Path]:
    """Return a training that resumes by itself, and its absolute --output; raises ConfigError."""
    words = list(flags)
    given = {word.partition("=")[0] for word in words}
    if "--resume" in given:
        raise ConfigError("--resume: the job resumes by itself; give the run as --output")
    # without --output, the checks of distill itself come first
    stage = check_flags([*words, "--auto-resume"] if "--output" in given else words)
    check_supported(stage, "dry_run")
    if "output" not in stage.options:
        raise ConfigError("--output is required: a requeued job resumes from it")
    return stage, Path(stage.options["output"][-1])
