"""`mealv2 slurm distill`: train a student in a batch job, on one node or several."""

from typing import Any

from pipeline import console
from pipeline.config import SlurmDistillConfig
from pipeline.slurm import scripts, submitting
from pipeline.training.run_folder import REPORT_NAME


def run(config: SlurmDistillConfig, check_flags: submitting.CheckFlags) -> dict[str, Any] | str:
    """Submit a training; return the report, or the script with --print. Raises MealError."""
    stage, output = submitting.check_training(config.flags, check_flags)
    report: dict[str, Any] = {"output": str(output), "job": None}
    if (output / REPORT_NAME).exists():
        console.info(f"{output}: the run is finished; nothing to submit")
        return "" if config.print_ else report
    return submitting.submit_training(
        config,
        stage,
        report,
        name="distill",
        about="Trains a student; if restarted, it continues from its checkpoint.",
        command=scripts.command(["mealv2", "distill"], stage.words),
    )
