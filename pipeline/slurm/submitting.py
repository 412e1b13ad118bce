"""Scripts kept in the folder that they fill, and handed to sbatch."""

import itertools
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from mealv2.errors import ConfigError, MealError
from mealv2.storage.atomic import SCRIPTS_NAME, write_atomic
from mealv2.storage.json_format import canonical_json, read_json
from mealv2.storage.urls import Location, file_name
from pipeline import console
from pipeline.config import SlurmJob, StageCommand, flag
from pipeline.slurm.scripts import directive_path

JOBS = ("array", "finish", "job")  # what a report calls the jobs that were submitted
MOST_TASKS = 1000  # Slurm's MaxArraySize is 1001 where the site does not say otherwise


@dataclass(frozen=True)
class Round:
    """One submission: its files are slurm/WHAT-NUMBER.SUFFIX in the folder that the jobs fill."""

    folder: Path
    number: int

    def path(self, what: str, suffix: str = "sbatch") -> Path:
        """Return where a file of this submission lies."""
        return self.folder / f"{what}-{self.number}.{suffix}"

    @property
    def log(self) -> str:
        """The folder as it is in the names of logs."""
        return directive_path(self.folder)


def next_round(out: Location) -> Round:
    """Return the next submission of a folder; what was submitted before keeps its files.

    Those for a URL are kept in a folder of its last name, here.
    """
    path = file_name(out.rstrip("/")) if isinstance(out, str) else out
    folder = Path(os.path.abspath(path)) / SCRIPTS_NAME  # noqa: PTH100  # as config.plain
    numbers = itertools.count(1)
    return next(Round(folder, n) for n in numbers if not any(folder.glob(f"*-{n}.*")))


def sbatch_words(config: SlurmJob, script: Path, *, after: str | None = None) -> list[str]:
    """Return the command that submits a script: what it waits for is not in the file."""
    waits = after or (f"afterok:{':'.join(config.after)}" if config.after else None)
    words = ["sbatch", "--parsable"]
    if waits:
        # a job that waits for one that failed would wait for ever
        words += [f"--dependency={waits}", "--kill-on-invalid-dep=yes"]
    return [*words, str(script)]


def printed(scripts: list[tuple[list[str], str]]) -> str:
    """Return scripts and the commands that submit them, as one text."""
    return "\n".join(f"# ==== {shlex.join(words)}\n{text}" for words, text in scripts).rstrip("\n")


def keep(path: Path, text: str) -> None:
    """Write a file of a submission; raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not write_atomic(path, text.encode(), replace=False):
        raise MealError(f"{path} was written by another submission just now; try again")


def still_there(this: Round) -> list[str]:
    """Return the jobs of earlier submissions of a folder that wait or run, as Slurm says."""
    kept = [read_json(path) for path in sorted(this.folder.glob("jobs-*.json"))]
    jobs = [str(report[what]) for report in kept for what in JOBS if report.get(what) is not None]
    if not jobs or shutil.which("squeue") is None:
        return []
    words = ["squeue", "--noheader", "--format=%F", f"--jobs={','.join(jobs)}"]
    # jobs that Slurm has forgotten are an error to it
    ran = subprocess.run(words, capture_output=True, text=True, check=False)
    return sorted(set(ran.stdout.split()))


def check_no_queued_job(this: Round) -> None:
    """Raise MealError where an earlier job is at the same folder; two would write one run."""
    jobs = " ".join(still_there(this))
    if jobs:
        raise MealError(
            f"{this.folder.parent} has job {jobs} waiting or at work; let it, or `scancel {jobs}`"
        )


def submit(words: list[str], *, done: Mapping[str, Any] = MappingProxyType({})) -> int:
    """Run sbatch; return the job's number. Raises MealError in one line.

    ``done`` says which jobs were submitted before it, for the message.
    """
    kept = f"the script is kept: {words[-1]}"
    before = [f"{what} is job {done[what]}" for what in JOBS if done.get(what) is not None]
    kept = "; ".join([kept, *before])
    if shutil.which(words[0]) is None:
        raise MealError(f"there is no {words[0]} here; {kept}; submit it where Slurm is")
    ran = subprocess.run(words, capture_output=True, text=True, check=False)
    output = [
        re.sub(r"^\S*sbatch: (error: )?", "", line.strip()) for line in ran.stderr.splitlines()
    ]
    if ran.returncode:
        why = "; ".join(filter(None, output)) or "it did not say why"
        max_jobs = f" (--array {MOST_TASKS} at most, unless the site allows more)"
        raise MealError(f"sbatch refused: {why}{max_jobs if ' array' in why else ''}; {kept}")
    for line in output:
        console.info(line)
    return int(ran.stdout.strip().splitlines()[-1].split(";")[0])


def record(this: Round, report: Mapping[str, Any]) -> None:
    """Keep beside the scripts what was submitted."""
    write_atomic(this.path("jobs", "json"), canonical_json(dict(report)).encode())


def hand_in(
    config: SlurmJob, this: Round, what: str, text: str, report: dict[str, Any]
) -> dict[str, Any] | str:
    """Submit the one script of a submission, or return it with --print; return the report.

    Raises MealError, also where an earlier job is at the same folder.
    """
    words = sbatch_words(config, this.path(what))
    if config.print_:
        return printed([(words, text)])
    check_no_queued_job(this)
    keep(this.path(what), text)
    report["job"] = submit(words)
    record(this, report)
    return report


def check_supported(stage: StageCommand, *names: str) -> None:
    """Raise ConfigError for a flag of the stage that is not the user's in a batch job."""
    for name in names:
        if name in stage.options:
            raise ConfigError(f"{flag(name)} has no effect with `mealv2 slurm`; leave it out")


def training_words(flags: Iterable[str]) -> list[str]:
    """Return the words of a training that goes on where it was ended; raises ConfigError."""
    given = {word.partition("=")[0] for word in flags}
    if "--resume" in given:
        raise ConfigError("--resume: a run that is begun goes on by itself; give it as --output")
    # without --output the stage's own checks come first; then see run_folder
    return [*flags, "--auto-resume"] if "--output" in given else [*flags]


def warn_missing_labels(config: SlurmJob, stage: StageCommand) -> None:
    """Say so where labels are not there, and no job before is to make them."""
    labels = getattr(stage.config, "labels", None)
    if isinstance(labels, Path) and not labels.exists() and not config.after:
        console.info(
            f"--labels {labels}: nothing is there yet; --after JOB waits for who makes them"
        )


def run_folder(stage: StageCommand) -> Path:
    """Return the folder that a training fills, absolute; raises ConfigError where none is named."""
    if "output" not in stage.options:
        raise ConfigError("--output is required: a job that begins again goes on there")
    return Path(stage.options["output"][-1])
