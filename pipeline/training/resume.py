"""How a run starts: all ranks with the same inputs, in a new run folder or a resumed one."""

import re
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from mealv2.errors import ConfigError, MealError
from mealv2.models import Classifier, Preprocessing
from mealv2.models.factory import is_factory
from mealv2.storage.json_format import canonical_json
from pipeline import console
from pipeline.config import FREE_ON_RESUME, TrainConfig, current_names, flag
from pipeline.runtime.distributed import Ranks
from pipeline.runtime.seeds import seed_rank
from pipeline.training import checkpoint, image_list
from pipeline.training.result import best_step
from pipeline.training.run_folder import (
    ReadOnlyRunFolder,
    RunFolder,
    has_checkpoint,
    prepare_folder,
)
from pipeline.training.run_lock import run_lock
from pipeline.training.spec import TrainingSpec, build_student
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
    config: TrainConfig,
    ranks: Ranks,
    spec: TrainingSpec,
    state: TrainingState,
    stack: ExitStack,
) -> RunFolder:
    """Create the run folder, or resume the run in it with its state; the main rank writes.

    ``stack`` holds the lock of the folder. Raises ConfigError for a folder of something else or a
    run that another process trains, MealError, DataError or LabelSetError for a run that cannot be
    resumed.
    """
    has_run = config.resume is not None and has_checkpoint(config.resume)
    if ranks.broadcast_text("resume" if has_run else "new") == "resume":
        assert config.resume is not None
        return _resume_run(config.resume, config, ranks, state, stack)
    return _create_run(config, ranks, spec, stack)


def _create_run(
    config: TrainConfig, ranks: Ranks, spec: TrainingSpec, stack: ExitStack
) -> RunFolder:
    if not ranks.is_main_process:
        seed_rank(config.seed, rank=ranks.rank, step=0)
        return ReadOnlyRunFolder(Path(ranks.broadcast_text("")))
    model = re.sub(r"[^\w.+-]+", "-", config.model)  # a path, or a function
    path = prepare_folder(config.resume or config.output, name=f"{spec.command}-{model}")
    lock = stack.enter_context(run_lock(path, log=console.info))
    folder = RunFolder.create(path, config.as_json(), lock=lock, labels=spec.labels)
    image_list.write(folder.path, spec.source)
    ranks.broadcast_text(str(folder.path))
    return folder


def _resume_run(
    run: Path, config: TrainConfig, ranks: Ranks, state: TrainingState, stack: ExitStack
) -> RunFolder:
    """Restore the newest complete checkpoint of a run folder; return the folder."""
    lock = stack.enter_context(run_lock(run, log=console.info)) if ranks.is_main_process else None
    path, kept = _load_newest(run, ranks)
    try:
        state.restore(kept)
        changed = changed_settings(kept["args"], config)
    except (KeyError, ValueError, RuntimeError, TypeError, AttributeError, IndexError) as error:
        reason = str(error).strip().split("\n")[0]
        raise MealError(f"checkpoint {path} is of another run: {reason}") from error
    folder: RunFolder = ReadOnlyRunFolder(run)
    if ranks.is_main_process:
        progress = state.progress
        folder = RunFolder.reopen(run, epoch=progress.epoch, step=progress.total_steps, lock=lock)
        if folder.num_damaged:
            lines = console.count(folder.num_damaged, "damaged line")
            console.info(f"{folder.metrics_path}: {lines} removed")
    if ranks.broadcast_text("changed" if changed else ""):  # paths may differ between machines
        _save_changes(folder, config, ranks, state, changed)
    return folder


def load_newest_weights(run: Path, ranks: Ranks, student: Classifier) -> None:
    """Load the student's weights in the newest complete checkpoint of a run; all ranks call this.

    Raises MealError for a run without a complete checkpoint, or of another student.
    """
    path, kept = _load_newest(run, ranks)
    try:
        student.backbone.load_state_dict(kept["state_dict"])
    except (KeyError, RuntimeError, TypeError, AttributeError) as error:
        reason = str(error).strip().split("\n")[0]
        raise MealError(f"checkpoint {path} is of another run: {reason}") from error


def rebuild_student(
    config: TrainConfig, ranks: Ranks, *, name: str, classes: list[str], img_size: int
) -> Classifier:
    """Build the student of a run to resume without the files that it started from; all ranks call.

    ``name`` is that of ``--model``, without a path. The weights are random, as far as ``name`` is
    that of a model; a checkpoint names only models of timm. Raises MealError for a run without a
    complete checkpoint, or of own code that ``name`` is not.
    """
    assert config.resume is not None, "the caller has seen the checkpoint"
    path, kept = _load_newest(config.resume, ranks)
    try:
        tag, (mean, std) = kept["arch"], kept["preprocessing"]
        model_args = kept.get("model_args", {})  # absent from older checkpoints
    except (KeyError, ValueError) as error:
        raise MealError(f"checkpoint {path} is of another run: {error}") from None
    if is_factory(tag) and tag != name:
        raise MealError(f"checkpoint {path} is of {tag}, the run in {config.resume} of {name}")
    student = build_student(
        config,
        name if ":" in name else tag.split(".")[0],
        classes=classes,
        img_size=img_size,
        preprocessing=Preprocessing(tuple(mean), tuple(std)),
        model_args=model_args,
    )
    student.tag = tag
    return student


def changed_settings(saved: dict[str, Any], config: TrainConfig) -> dict[str, tuple[Any, Any]]:
    """Return the settings that differ from the checkpoint's: the value there, and the new one."""
    saved, new = current_names(type(config), saved), config.as_json()
    names = sorted((new.keys() & saved.keys()) - FREE_ON_RESUME)
    return {name: (saved[name], new[name]) for name in names if saved[name] != new[name]}


def _save_changes(
    folder: RunFolder,
    config: TrainConfig,
    ranks: Ranks,
    state: TrainingState,
    changed: dict[str, tuple[Any, Any]],
) -> None:
    """Make changed settings those of the run: in its checkpoint, then in config.json."""
    _require_same_pass(config, state, changed)
    for name, (before, now) in changed.items():
        console.info(f"{flag(name)} was {before}, is {now}")
    if "epochs" in changed:
        _log_schedule(config, state)
    if changed.keys() & {"epochs", "early_stopping"}:
        folder.remove_report()
    kept = state.as_dict()
    if ranks.is_main_process:
        step = state.progress.total_steps
        keep, best = config.checkpoint_hist, best_step(config, state)
        checkpoint.save(folder.path, kept, step=step, keep=keep, best=best)
    folder.write_config(config.as_json())


def _require_same_pass(
    config: TrainConfig, state: TrainingState, changed: dict[str, tuple[Any, Any]]
) -> None:
    """Raise ConfigError if the pass in which the run stopped would get another length."""
    before, now = changed.get("epochs", (config.epochs, config.epochs))
    lengths = {min(config.views_per_image, num - state.progress.epoch) for num in (before, now)}
    if state.progress.step and len(lengths) > 1:
        raise ConfigError(
            f"--epochs {now}: the run stopped in its last pass, which has fewer than "
            f"--views-per-image {config.views_per_image} views; finish its {before} epochs first"
        )


def _log_schedule(config: TrainConfig, state: TrainingState) -> None:
    """Report how the learning rate continues in a lengthened run."""
    epoch = state.progress.epoch
    schedules = {
        "multistep": f"milestones stay at epoch {', '.join(map(str, config.milestones))}",
        "step": f"the learning rate still falls every {config.decay_epochs} epochs",
        "constant": "the learning rate stays",
    }
    ends = f"the {config.sched} now ends after {config.epochs - config.cooldown_epochs} epochs"
    state.schedule.set_lr(epoch)
    console.info(
        f"{schedules.get(config.sched, ends)}; from epoch {epoch + 1} on the learning rate is "
        f"{state.lr:.4g}"
    )


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
