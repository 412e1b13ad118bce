"""`mealv2 slurm sweep`: train students of several settings from one label set, as an array."""

import itertools
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mealv2.errors import ConfigError
from pipeline import console
from pipeline.config import SlurmSweepConfig, StageCommand
from pipeline.slurm import scripts, submitting
from pipeline.training.run_folder import REPORT_NAME


@dataclass(frozen=True)
class Student:
    """A student of a sweep: its task, its folder, and its command."""

    task: int
    folder: Path
    stage: StageCommand

    def words(self, names: set[str]) -> list[str]:
        """Return some of the options of its command, as words."""
        options = self.stage.options.items()
        return [word for name, words in options if name in names for word in words]


def run(config: SlurmSweepConfig, check_flags: submitting.CheckFlags) -> dict[str, Any] | str:
    """Submit the students that are not finished; return the report, or the script with --print.

    Raises MealError, before anything is submitted if the settings of a student are wrong.
    """
    students = _students(config, check_flags)
    output = students[0].folder.parent
    todo = [s for s in students if not (s.folder / REPORT_NAME).exists()]
    folders = {str(student.task): str(student.folder) for student in todo}
    report = {"output": str(output), "job": None, "students": len(students), "tasks": folders}
    if not todo:
        console.info(f"{output}: every student is finished; nothing to submit")
        return "" if config.print_ else report
    varied = {choices[0].field for choices in config.choices} | {"output"}
    cases = [f"  {s.task}) student=({shlex.join(s.words(varied))}) ;;" for s in todo]
    unknown = '  *) echo "no such student" >&2; exit 2 ;;'
    shared = todo[0].words(todo[0].stage.options.keys() - varied)
    return submitting.submit_training(
        config,
        todo[0].stage,
        report,
        name="sweep",
        about="Trains students from one label set, one per task.",
        command=scripts.command(["mealv2", "distill"], shared, ['"${student[@]}"']),
        array=",".join(str(student.task) for student in todo),
        settings="\n".join(['case "$SLURM_ARRAY_TASK_ID" in', *cases, unknown, "esac\n\n"]),
    )


def _students(config: SlurmSweepConfig, check_flags: submitting.CheckFlags) -> list[Student]:
    """Return the students with checked commands; raises ConfigError."""
    students: list[Student] = []
    for task, choices in enumerate(itertools.product(*config.choices)):
        words = [*config.flags, *(word for choice in choices for word in choice.words)]
        _, output = submitting.check_training(words, check_flags)
        name = ",".join(choice.name for choice in choices)
        folder = output / name
        if any(folder == student.folder for student in students):
            raise ConfigError(f"--vary makes two students of the same name, {name}")
        stage, _ = submitting.check_training([*words, "--output", str(folder)], check_flags)
        students.append(Student(task, folder, stage))
    return students
