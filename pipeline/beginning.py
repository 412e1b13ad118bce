"""How a run begins: all ranks at the same work, in a new run folder or one that is taken up."""

from pathlib import Path
from typing import Any

from mealv2.errors import MealError
from mealv2.files import canonical_json
from pipeline import checkpoint, logs
from pipeline.config import TrainConfig
from pipeline.ranks import Ranks
from pipeline.run_state import RunState
from pipeline.runtime import seed_rank
from pipeline.work import Work


def insist_on_the_same_work(config: TrainConfig, ranks: Ranks, work: Work) -> None:
    """Raise ConfigError where ranks would train on different things: they would never meet."""
    if not ranks.are_several:
        return
    settings = {
        name: value
        for name, value in config.as_json().items()
        # a machine's own matter, as is where it has its folders
        if name not in ("workers", "device") and not isinstance(getattr(config, name), Path)
    }
    ranks.insist(canonical_json(settings), what="settings")
    labels = {name: v for name, v in (work.labels or {}).items() if name != "path"}
    data = [work.data_sha256, len(work.positions), labels]
    ranks.insist(canonical_json({"work": data}), what="images or labels")


def open_folder(config: TrainConfig, ranks: Ranks, work: Work, state: RunState) -> logs.RunFolder:
    """Make the run folder, or take up the run that is there, with its state; the first rank writes.

    Raises ConfigError for a folder of something else, MealError, DataError or LabelSetError for a
    run that cannot be taken up.
    """
    goes_on = config.resume is not None and checkpoint.exists(config.resume)
    if ranks.text("resume" if goes_on else "new") == "resume":
        assert config.resume is not None
        return _take_up(config.resume, ranks, state)
    if not ranks.is_first:
        seed_rank(config.seed, rank=ranks.rank, step=0)
        return logs.OthersFolder(Path(ranks.text("")))
    folder = logs.RunFolder.create(
        config.resume or config.output,
        config.as_json() | {"auto_resume": False},  # it was for finding this run
        name=f"{work.command}-{config.model}",
        labels=work.labels,
    )
    ranks.text(str(folder.path))
    return folder


def _take_up(run: Path, ranks: Ranks, state: RunState) -> logs.RunFolder:
    """Take up the newest whole checkpoint of the run folder; return the folder."""
    path, kept = _load_newest(run, ranks)
    try:
        state.restore(kept)
    except (KeyError, ValueError, RuntimeError, TypeError) as error:
        reason = str(error).strip().split("\n")[0]
        raise MealError(f"checkpoint {path} is of another run: {reason}") from error
    if not ranks.is_first:
        return logs.OthersFolder(run)
    return logs.RunFolder.reopen(run, epoch=state.place.epoch, step=state.place.total_steps)


def _load_newest(run: Path, ranks: Ranks) -> tuple[Path, dict[str, Any]]:
    """Return the newest whole checkpoint, which the first rank finds, and its state."""
    if not ranks.is_first:
        path = Path(ranks.text(""))
        return path, checkpoint.load(path)
    path, state, damaged = checkpoint.load_newest(run)
    for what in damaged:
        logs.say(f"{what}; going on from the one before, {path.name}")
    ranks.text(str(path))
    return path, state
