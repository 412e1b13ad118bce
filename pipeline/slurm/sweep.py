"""`mealv2 slurm sweep`: students of several settings from one label set, by an array."""

import itertools
import shlex
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mealv2.errors import ConfigError
from pipeline import console
from pipeline.config import SlurmSweepConfig, StageCommand
from pipeline.config.slurm import Choice
from pipeline.slurm import scripts, submitting
from pipeline.slurm.distill import OWN_OPTIONS
from pipeline.training.run_folder import REPORT_NAME

Checked = Callable[[Iterable[str]], StageCommand]


@dataclass(frozen=True)
class Student:
    """A student of a sweep: its task, its folder, and its command."""

    task: int
    folder: Path
    stage: StageCommand


def run(config: SlurmSweepConfig, checked: Checked) -> dict[str, Any] | str:
    """Submit the students that are not finished; return the report, or the script with --print.

    Raises MealError: nothing is submitted unless the settings of every student make a config.
    """
    varied = config.choices
    students = _students(config, list(itertools.product(*varied)), checked)
    out = students[0].folder.parent
    submitting.warn_missing_labels(config, students[0].stage)
    todo = [s for s in students if not (s.folder / REPORT_NAME).exists()]
    folders = {str(student.task): str(student.folder) for student in todo}
    report = {"output": str(out), "job": None, "students": len(students), "tasks": folders}
    if not todo:
        console.info(f"{out}: every student is finished; nothing to submit")
        return "" if config.print_ else report
    this = submitting.next_round(out)
    names = {choices[0].field for choices in varied} | {"output"}
    text = _script(config, todo, names, this)
    return submitting.hand_in(config, this, "sweep", text, report)


def _script(
    config: SlurmSweepConfig, todo: list[Student], varied: set[str], this: submitting.Round
) -> str:
    """Return the script: which task is which student, then the command that all share."""
    head = scripts.head(
        config,
        "Trains students, a task each, from one label set.",
        {
            "job-name": scripts.job_name("sweep", this.folder.parent),
            "array": ",".join(str(student.task) for student in todo),
            **scripts.training_resources(config),
            "output": f"{this.log}/sweep-%A_%a.out",
        },
    )
    cases = [f"  {s.task}) student=({_own(s.stage, varied)}) ;;" for s in todo]
    which = "\n".join(
        ['case "$SLURM_ARRAY_TASK_ID" in', *cases, '  *) echo "no such student" >&2; exit 2 ;;']
    )
    shared = [
        w for name, words in todo[0].stage.options.items() if name not in varied for w in words
    ]
    stage = scripts.command(["mealv2", "distill"], shared, ['"${student[@]}"'])
    job = '"${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"'
    return f"{head}{which}\nesac\n\n{scripts.training(config, stage, job=job, folder=this.folder)}"


def _own(stage: StageCommand, varied: set[str]) -> str:
    return shlex.join(w for name, words in stage.options.items() if name in varied for w in words)


def _students(
    config: SlurmSweepConfig, chosen: list[tuple[Choice, ...]], checked: Checked
) -> list[Student]:
    """Return the students, their commands checked; raises ConfigError."""
    students: list[Student] = []
    for task, choices in enumerate(chosen):
        words = [*submitting.training_words(config.flags), *(w for c in choices for w in c.words)]
        stage = checked(words)
        submitting.check_supported(stage, *OWN_OPTIONS)
        name = ",".join(choice.name for choice in choices)
        folder = submitting.run_folder(stage) / name
        if any(folder == student.folder for student in students):
            raise ConfigError(f"--vary makes two students of the same name, {name}")
        students.append(Student(task, folder, checked([*words, "--output", str(folder)])))
    return students
