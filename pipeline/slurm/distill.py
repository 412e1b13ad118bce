"""`mealv2 slurm distill`: a training as a batch job, on one node or several."""

from collections.abc import Callable, Iterable
from typing import Any

from pipeline import console
from pipeline.config import SlurmDistillConfig, StageCommand
from pipeline.slurm import scripts, submitting
from pipeline.training.run_folder import REPORT_NAME

OWN_OPTIONS = ("dry_run",)


def run(
    config: SlurmDistillConfig, checked: Callable[[Iterable[str]], StageCommand]
) -> dict[str, Any] | str:
    """Submit a training; return the report, or the script with --print. Raises MealError."""
    stage = checked(submitting.training_words(config.flags))
    submitting.check_supported(stage, *OWN_OPTIONS)
    out = submitting.run_folder(stage)
    submitting.warn_missing_labels(config, stage)
    report: dict[str, Any] = {"output": str(out), "job": None}
    if (out / REPORT_NAME).exists():
        console.info(f"{out}: the run came to its end; nothing to submit")
        return "" if config.print_ else report
    this = submitting.next_round(out)
    head = scripts.head(
        config,
        "Trains a student; begun again, it goes on from its checkpoint.",
        {
            "job-name": scripts.job_name("distill", this.folder.parent),
            **scripts.training_resources(config),
            "output": f"{this.log}/distill-%j.out",
        },
    )
    stage_text = scripts.command(["mealv2", "distill"], stage.words)
    text = head + scripts.training(config, stage_text, job='"$SLURM_JOB_ID"', folder=this.folder)
    return submitting.hand_in(config, this, "distill", text, report)
