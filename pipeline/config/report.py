"""Settings of the commands that show runs: report, compare, curves."""

from pathlib import Path

from mealv2.storage.urls import Location
from pipeline.config.base import DATA_DIR, ExtraDataConfig, Settings
from pipeline.config.fields import (
    REQUIRED,
    argument,
    frozen,
    in_data,
    in_labels,
    in_results,
    in_run,
    without_effect,
)

_RUN = "Run folders of `mealv2 distill`, `finetune` or `transfer`, finished or not."
_CONTROL = (
    "Run folder with hard labels to compare with, of a seed that a RUN has; repeat it for several."
)
_LABELS = "Label set of the runs: a folder."
_SHOWN_LABELS = "the one that a run names"


@frozen
class RunsConfig(Settings):
    """Settings of commands that read several runs."""

    run: tuple[Path, ...] = argument(_RUN, path="run")
    control: tuple[Path, ...] = in_run((), _CONTROL, shown="none", path="run")


@frozen
class ReportConfig(RunsConfig, ExtraDataConfig):
    """Write a page of figures and tables on runs, their labels and their classes.

    Runs that differ in nothing but the seed are one method, with intervals over its seeds. The
    page opens from the folder, without a server or network.
    """

    example = "mealv2 report runs/my-student --data-dir imagenet --output report"

    labels: Path | None = in_labels(None, _LABELS, shown=_SHOWN_LABELS, path="label set")
    data_dir: Location | None = in_data(
        None, f"{DATA_DIR} For the images of the page.", shown="none", path="data set"
    )
    output: Path = in_results(
        REQUIRED, "Folder of the page; an earlier report there is replaced.", path="new report"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.data_dir is None:
            without_effect(self, "without --data-dir", "extra_data", "class_map", "strict")


@frozen
class CompareConfig(RunsConfig):
    """Print what runs reached: start, last and best epoch, teachers, ensemble, and the gaps."""

    example = "mealv2 compare runs/soft-labels runs/hard-labels"

    labels: Path | None = in_labels(None, _LABELS, shown=_SHOWN_LABELS, path="label set")
    json: bool = in_results(False, "Print one line of JSON instead of text.")


@frozen
class CurvesConfig(Settings):
    """Print the curves of runs as lines of characters: losses, accuracy, agreement."""

    example = "mealv2 curves runs/my-student"

    run: tuple[Path, ...] = argument(_RUN, path="run")
    json: bool = in_results(False, "Print one line of JSON instead of text.")
