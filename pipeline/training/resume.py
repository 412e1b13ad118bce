"""How a run starts: all ranks with the same inputs, in a new run folder or a resumed one."""

from pathlib import Path
from typing import Any

from mealv2.errors import MealError
from mealv2.storage.json_format import canonical_json
from pipeline import console
from pipeline.config import TrainConfig
from pipeline.runtime.distributed import Ranks
from pipeline.runtime.seeds import seed_rank
from pipeline.training import checkpoint
from pipeline.training.run_folder import ReadOnlyRunFolder, RunFolder, has_checkpoint
from pipeline.training.spec import TrainingSpec
from pipeline.training.state import TrainingState


def require_same_inputs(config: TrainConfig, ranks: Ranks, spec: TrainingSpec) -> None:
    """Raise ConfigError where ranks would train on different things: they would wait forever."""
    if not ranks.is_distributed:
        return
    settings = {
        name: value
        for name, value in config.as_json().items()
        # these may differ between machines, as may the paths of folders
        if name not in ("workers", "device") and not isinstance(getattr(config, name), Path)
    }
    ranks.require_equal(canonical_json(settings), what="settings")
    labels = {name: v for name, v in (spec.labels or {}).items() if name != "path"}
    data = [spec.data_sha256, len(spec.positions), labels]
    ranks.require_equal(canonical_json({"data": data}), what="images or labels")


def open_run(
    config: TrainConfig, ranks: Ranks, spec: TrainingSpec, state: TrainingState
) -> RunFolder:
    """Create the run folder, or resume the run in it with its state; the main rank writes.

    Raises ConfigError for a folder of something else, MealError, DataError or LabelSetError for a
    run that cannot be resumed.
    """
    has_run = config.resume is not None and has_checkpoint(config.resume)
    if ranks.broadcast_text("resume" if has_run else "new") == "resume":
        assert config.resume is not None
        return _resume_run(config.resume, ranks, state)
    return _create_run(config, ranks, spec)


def _create_run(config: TrainConfig, ranks: Ranks, spec: TrainingSpec) -> RunFolder:
    if not ranks.is_main_process:
        seed_rank(config.seed, rank=ranks.rank, step=0)
        return ReadOnlyRunFolder(Path(ranks.broadcast_text("")))
    folder = RunFolder.create(
        config.resume or config.output,
        config.as_json() | {"auto_resume": False},  # the flag only found this folder
        name=f"{spec.command}-{config.model}",
        labels=spec.labels,
    )
    ranks.broadcast_text(str(folder.path))
    return folder


def _resume_run(run: Path, ranks: Ranks, state: TrainingState) -> RunFolder:
    """Restore the newest complete checkpoint of a run folder; return the folder."""
    path, kept = _load_newest(run, ranks)
    try:
        state.restore(kept)
    except (KeyError, ValueError, RuntimeError, TypeError) as error:
        reason = str(error).strip().split("\n")[0]
        raise MealError(f"checkpoint {path} is of another run: {reason}") from error
    if not ranks.is_main_process:
        return ReadOnlyRunFolder(run)
    return RunFolder.reopen(run, epoch=state.progress.epoch, step=state.progress.total_steps)


def _load_newest(run: Path, ranks: Ranks) -> tuple[Path, dict[str, Any]]:
    """Return the newest complete checkpoint, which the main rank finds, and its state."""
    if not ranks.is_main_process:
        path = Path(ranks.broadcast_text(""))
        return path, checkpoint.load(path)
    path, state, damaged = checkpoint.load_newest(run)
    for problem in damaged:
        console.info(f"{problem}; resuming from the one before, {path.name}")
    ranks.broadcast_text(str(path))
    return path, state
