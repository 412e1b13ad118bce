"""Settings of commands that train a backbone further, or compare two: the paper's section 7."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from pipeline.config.base import NO_SPLIT
from pipeline.config.fields import MAX_SEED, frozen, in_model, in_run, require, without_effect

if TYPE_CHECKING:
    from pipeline.config.training import TrainConfig as _Base
else:  # the defaults of other trainings are those of the class that it is joined with
    from pipeline.config.base import Settings as _Base

LOCAL_DIR = "local-dir:"  # of timm: a model folder


def absolute_starts(starts: Iterable[str] | None) -> tuple[str, ...] | None:
    """Return starts with absolute paths: of a folder or file, and of NAME=CHECKPOINT."""
    return None if starts is None else tuple(map(absolute_start, starts))


def absolute_start(start: str) -> str:
    """Return a start with an absolute path, if it has one: a folder or file with a slash.

    That of a folder without a slash, which can be the name of a model, depends on timm's names.
    """
    if start.startswith(LOCAL_DIR):
        return f"{LOCAL_DIR}{os.path.abspath(start.removeprefix(LOCAL_DIR))}"  # noqa: PTH100
    name, equals, path = start.partition("=")
    if os.sep in start and os.path.exists(start):  # noqa: PTH110  # a name may be too long
        return os.path.abspath(start)  # noqa: PTH100
    return f"{name}={os.path.abspath(path)}" if equals and path else start  # noqa: PTH100


@frozen
class ComparisonConfig(_Base):
    """Settings of a backbone, or of two that are compared, over modes and seeds.

    A part of the config of a training: its other bases have the rest.
    """

    model: str = in_model(
        "",
        "Backbone: a timm or released model name, NAME=CHECKPOINT, the folder of a run or model, "
        "local-dir:PATH, hf-hub:NAME, or your own code, PACKAGE.MODULE:FUNCTION.",
        shown="those of --compare",
        path="starts",
        convert=absolute_start,
        need="one of --model and --compare is required",
    )
    compare: tuple[str, str] | None = in_model(
        None,
        "Two backbones, as for --model: the base and the distilled one; both are trained, and one "
        "table compares them.",
        shown="none",
        path="starts",
        convert=absolute_starts,
    )
    seeds: int = in_run(
        1, "Number of seeds, from --seed on: each is a run of its own.", low=1, high=1000
    )

    def _check_grid(self, flags: str) -> None:
        """Check the settings of several runs, which ``flags`` make."""
        either = "give --model or --compare, not both"
        require(bool(self.model) != (self.compare is not None), either)
        if self.compare is not None:
            names = ("initial_checkpoint", "pretrained")
            without_effect(self, "with --compare, whose models have their own weights", *names)
        if not self.is_grid:
            return
        what = f"with {flags}"
        require(self.output is not None, f"--output is required {what}: a folder of all runs")
        without_effect(self, f"{what}: the same command continues all runs", "resume")
        without_effect(self, f"{what}, which always continue their runs", "auto_resume")
        last = self.seed + self.seeds - 1
        require(last <= MAX_SEED, f"--seed {self.seed} with --seeds {self.seeds} is too large")
        message = "the table needs a validation split, but --val-split is none"
        require(self.val_split != NO_SPLIT, message)

    @property
    def is_grid(self) -> bool:
        """Whether the command trains several runs."""
        return self.seeds > 1 or self.compare is not None or len(self.all_modes) > 1

    @property
    def all_modes(self) -> tuple[str, ...]:
        """The modes of the runs."""
        raise NotImplementedError

    @property
    def sets_file(self) -> Path | None:
        """The file of several data sets, if there is one."""
        return None

    @property
    def caches_features(self) -> bool:
        """Whether the backbone runs once, if its features fit in memory."""
        return False

    def cell(self, *, model: str, mode: Any, **changes: Any) -> Self:
        """Return the settings of one of several runs; its seed and folder are still to be set."""
        raise NotImplementedError
