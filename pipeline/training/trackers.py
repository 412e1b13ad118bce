"""Experiment trackers of a run: TensorBoard, W&B and trackio behind one protocol.

They are optional packages, each imported where it is used.
"""

import contextlib
import importlib.util
import json
import secrets
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

from mealv2.errors import ConfigError, MealError
from mealv2.storage.atomic import write_atomic
from mealv2.storage.json_format import canonical_json, read_json
from pipeline.config import TrainConfig, flag
from pipeline.training.run_folder import TRACKERS_NAME, RunFolder

FOLDER_NAME = "tensorboard"
# by the setting: the package, which is also the name of the extra
PACKAGES = {"log_tensorboard": "tensorboard", "log_wandb": "wandb", "log_trackio": "trackio"}


def require_packages(config: TrainConfig) -> None:
    """Raise ConfigError for a tracker whose package is not installed; imports none."""
    for name, package in PACKAGES.items():
        if getattr(config, name) and importlib.util.find_spec(package) is None:
            raise ConfigError(f"{flag(name)} needs {package}: pip install 'mealv2[{package}]'")


class Tracker(Protocol):
    """Where the figures of one run go."""

    def log(self, figures: dict[str, float], *, step: int) -> None:
        """Add named figures at a step."""

    def close(self, *, exit_code: int) -> None:
        """Write what is left; ``exit_code`` is 0 for a run that has finished."""


class Trackers:
    """The trackers of a run, which a resumed run continues; only the main rank has any.

    After ``kill -9`` some steps run again. TensorBoard drops what it has of them, and gets them
    again; the others keep what they have, which is the same.
    """

    def __init__(
        self, config: TrainConfig, folder: RunFolder, stack: ExitStack, *, total_steps: int
    ) -> None:
        """Open the trackers that the config asks for; ``stack`` closes them.

        Raises ConfigError for a missing package, MealError where a tracker cannot start.
        """
        require_packages(config)
        self._trackers: list[tuple[Tracker, dict[str, int]]] = []
        for name, create in _CREATE.items():
            if getattr(config, name):
                tracker = create(config, folder.path, total_steps)
                logged = {} if name == "log_tensorboard" else folder.logged
                self._trackers.append((tracker, logged))
                stack.push(_closing(tracker))

    def log(self, event: str, figures: dict[str, Any], *, step: int, at: int) -> None:
        """Add the numbers among ``figures`` at a step, as the event of that kind at ``at``."""
        numbers = {n: float(v) for n, v in figures.items() if isinstance(v, int | float)}
        for tracker, logged in self._trackers:
            if at > logged.get(event, -1):
                tracker.log(numbers, step=step)


def _closing(tracker: Tracker) -> Callable[..., None]:
    """Return an exit callback that closes a tracker."""

    def close(kind: object, error: BaseException | None, traceback: object) -> None:
        code = 0 if error is None else getattr(error, "exit_code", MealError.exit_code)
        tracker.close(exit_code=code)

    return close


def _run_id(run: Path) -> str:
    """Return the id of a run for trackers, the same when it is resumed."""
    path = run / TRACKERS_NAME
    try:
        return str(read_json(path)["id"])
    except FileNotFoundError:
        found = secrets.token_hex(4)
    except (ValueError, KeyError, TypeError) as error:
        raise MealError(f"{path} is damaged ({error}); remove it to log to a new run") from None
    write_atomic(path, canonical_json({"id": found}).encode())
    return found


# --- one class each -------------------------------------------------------------------------------


class _TensorBoard:
    """Event files in RUN/tensorboard."""

    def __init__(self, config: TrainConfig, run: Path, total_steps: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        folder = run / FOLDER_NAME
        # events of steps that run again are hidden
        purge_step = total_steps + 1 if folder.is_dir() else None
        self._writer = SummaryWriter(str(folder), purge_step=purge_step)
        if purge_step is None:
            text = json.dumps(config.as_json(), indent=1)
            self._writer.add_text("settings", f"```\n{text}\n```")

    def log(self, figures: dict[str, float], *, step: int) -> None:
        for name, value in figures.items():
            self._writer.add_scalar(name, value, step)

    def close(self, *, exit_code: int) -> None:
        self._writer.close()


class _WandB:
    """A run of Weights & Biases; its local files are in RUN/wandb."""

    def __init__(self, config: TrainConfig, run: Path, total_steps: int) -> None:
        import wandb

        try:
            self._run: Any = wandb.init(
                project=config.wandb_project,
                name=run.resolve().name,
                id=_run_id(run),
                resume="allow",
                dir=str(run),
                settings=wandb.Settings(console="off"),  # stdout is for results
            )
        except wandb.Error as error:
            reason = str(error).strip().split("\n")[0]
            raise MealError(
                f"--log-wandb: {reason}; log in with `wandb login`, or set WANDB_MODE=offline"
            ) from error
        config_of_run: Any = self._run.config
        config_of_run.update(config.as_json(), allow_val_change=True)

    def log(self, figures: dict[str, float], *, step: int) -> None:
        self._run.log(figures, step=step)

    def close(self, *, exit_code: int) -> None:
        self._run.finish(exit_code=exit_code)


class _Trackio:
    """A run of trackio: in its database on this machine, unless its settings name a server."""

    def __init__(self, config: TrainConfig, run: Path, total_steps: int) -> None:
        import trackio

        with contextlib.redirect_stdout(sys.stderr):  # it prints; stdout is for results
            self._run: Any = trackio.init(
                project=config.wandb_project,
                name=f"{run.resolve().name}-{_run_id(run)}",
                config=config.as_json(),
                resume="allow",
            )
        self._finish: Callable[[], None] = trackio.finish  # a run's own is repeated at exit

    def log(self, figures: dict[str, float], *, step: int) -> None:
        self._run.log(figures, step=step)

    def close(self, *, exit_code: int) -> None:
        with contextlib.redirect_stdout(sys.stderr):
            self._finish()


_CREATE: dict[str, Callable[[TrainConfig, Path, int], Tracker]] = {
    "log_tensorboard": _TensorBoard,
    "log_wandb": _WandB,
    "log_trackio": _Trackio,
}
