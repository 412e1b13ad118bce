"""The parts of the demo: the settings of every training run and label set.

docs/tutorial/demo.md describes how the settings were found.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mealv2.errors import ConfigError
from mealv2.label_set import MANIFEST_NAME
from mealv2.storage.json_format import read_json
from pipeline.config import (
    DemoConfig,
    DistillConfig,
    FinetuneConfig,
    PrecomputeConfig,
    current_names,
)
from pipeline.config.base import MAX_EPOCHS
from pipeline.demo.pictures import UNLABELLED
from pipeline.training.run_folder import REPORT_NAME, has_checkpoint

IMG_SIZE = 32
# crops that keep a digit readable; a mirrored digit is not a digit
VIEWS: dict[str, Any] = {"scale": (0.4, 1.0), "hflip": 0.0}
TEACHERS = ("test_resnet", "test_byobnet")
TEACHER: dict[str, Any] = {
    "epochs": 10,
    "batch_size": 64,
    "lr": 0.05,
    "sched": "cosine",
    "warmup_epochs": 1,
    "weight_decay": 5e-4,
}
STUDENT = "test_efficientnet"
BATCH_SIZE = 20
START_EPOCHS = 30
START_LR = 0.05
EPOCHS = 80  # of the labelled pictures, each of a view of its own
LONGER = 3  # times the epochs of the control, in a control without a label set's views
EXTRA_EPOCHS = 7  # of the labelled and the unlabelled ones: no more steps than EPOCHS
LR = 0.03
DISCRIMINATOR_LR = 1e-4
CHOSEN_ON, FIRST_FRESH = 0, 3  # the seed that chose all this; from which on seeds chose nothing

LABELS, EXTRA_LABELS = "labels", "labels-extra"
START, HARD, HARD_LONGER = "start", "hard-labels", "hard-labels-longer"
SOFT, EXTRA = "soft-labels", "soft-labels-extra"
_TITLES = {
    START: "start",
    HARD: "hard labels",
    HARD_LONGER: f"hard labels, {LONGER} times the steps",
    SOFT: "soft labels",
    EXTRA: "soft labels, with unlabelled pictures",
}

PartConfig = FinetuneConfig | DistillConfig | PrecomputeConfig


@dataclass(frozen=True)
class Part:
    """One command of the demo: its folder below --output, and the parts that come before it."""

    name: str
    title: str
    config: PartConfig
    needs: tuple[str, ...] = ()


def plan_parts(config: DemoConfig) -> list[Part]:
    """Return all parts, in an order in which they can run."""
    return [*_teachers(config), *_label_sets(config), *_students(config)]


def run_name(seed: int, arm: str) -> str:
    """Return the name of a student's part."""
    return f"seed-{seed}/{arm}"


def teacher_name(model: str) -> str:
    """Return the name of a teacher's part."""
    return f"teacher-{model}"


def _teachers(config: DemoConfig) -> Iterator[Part]:
    for model in TEACHERS:
        name = teacher_name(model)
        settings = _training(config, name) | VIEWS | TEACHER
        settings |= {"model": model, "train_split": "teacher-train", "img_size": IMG_SIZE}
        made = FinetuneConfig(pretrained=False, **settings)
        yield Part(name, f"teacher {model}", made)


def _label_sets(config: DemoConfig) -> Iterator[Part]:
    needs = tuple(map(teacher_name, TEACHERS))
    unlabelled = (config.data / UNLABELLED,)
    for name, title, num_views, extra_data in (
        (EXTRA_LABELS, "labels, with unlabelled pictures", EXTRA_EPOCHS, unlabelled),
        (LABELS, "labels", EPOCHS, ()),
    ):
        settings = _common(config, name) | VIEWS
        made = PrecomputeConfig(
            teacher=tuple(f"{m}={config.output / teacher_name(m)}" for m in TEACHERS),
            num_views=num_views,
            extra_data=extra_data,
            img_size=IMG_SIZE,
            topk="all",  # ten classes are few enough to store
            job_index=0,  # one job, whatever the environment is
            num_jobs=1,
            **settings,
        )
        yield Part(name, title, made, needs)


def _students(config: DemoConfig) -> Iterator[Part]:
    """Yield the start of each seed, and its four arms.

    HARD and SOFT see the same views in the same order; only the labels differ.
    """
    for seed in config.all_seeds:
        yield _hard(config, seed, START, epochs=START_EPOCHS, lr=START_LR, pretrained=False)
        longer = {"epochs": LONGER * EPOCHS, "num_views": LONGER * EPOCHS}
        yield _hard(config, seed, HARD_LONGER, **longer, **_from_start(config, seed))
        control = {"epochs": EPOCHS, "num_views": EPOCHS, **_from_start(config, seed)}
        yield _hard(config, seed, HARD, **control)
        unlabelled = (config.data / UNLABELLED,)
        yield _soft(config, seed, EXTRA, EXTRA_LABELS, epochs=EXTRA_EPOCHS, extra_data=unlabelled)
        yield _soft(config, seed, SOFT, LABELS, epochs=EPOCHS)


def _hard(config: DemoConfig, seed: int, arm: str, **settings: Any) -> Part:
    """Return a student's training on class labels."""
    settings |= {"train_split": "train", "img_size": IMG_SIZE, **VIEWS}
    made = FinetuneConfig(**_student(config, seed, arm), **settings)
    return Part(*_names(seed, arm), made, () if arm == START else (run_name(seed, START),))


def _soft(config: DemoConfig, seed: int, arm: str, labels: str, **settings: Any) -> Part:
    """Return a student's training on a label set."""
    settings |= {"labels": config.output / labels, "discriminator_lr": DISCRIMINATOR_LR}
    settings |= _from_start(config, seed)
    made = DistillConfig(**_student(config, seed, arm), **settings)
    return Part(*_names(seed, arm), made, (run_name(seed, START), labels))


def _from_start(config: DemoConfig, seed: int) -> dict[str, Any]:
    start = config.output / run_name(seed, START)
    return {"initial_checkpoint": start, "lr": LR, "weight_decay": 0.0}


def _names(seed: int, arm: str) -> tuple[str, str]:
    return run_name(seed, arm), f"seed {seed}, {_TITLES[arm]}"


def _student(config: DemoConfig, seed: int, arm: str) -> dict[str, Any]:
    common = {"model": STUDENT, "seed": seed, "batch_size": BATCH_SIZE}
    # for the report: percentiles of a layer after each epoch, a few milliseconds
    return _training(config, run_name(seed, arm)) | common | {"log_weights": ("auto",)}


def _training(config: DemoConfig, name: str) -> dict[str, Any]:
    # the arms are compared on one schedule, after the last step
    equal = {"select": "last", "sched_on_updates": False}
    return _common(config, name) | equal | {"val_interval": MAX_EPOCHS, "log_interval": 10}


def _common(config: DemoConfig, name: str) -> dict[str, Any]:
    where = {"data_dir": config.data, "output": config.output / name}
    return where | {"device": config.device, "workers": config.workers}


def kept_report(part: Part) -> dict[str, Any] | None:
    """Return the report of a finished training run, None for another part.

    Raises ConfigError if the folder has a run with other settings.
    """
    folder = _started_run(part.config)
    if folder is None:
        return None
    expected = {**part.config.as_json(), "output": None, "resume": None}
    kept = current_names(type(part.config), read_json(folder / "config.json"))
    free = ("workers", "device")
    if any(kept.get(name) != value for name, value in expected.items() if name not in free):
        raise ConfigError(f"{folder} has a run with other settings; give another --output")
    report = folder / REPORT_NAME
    return dict(read_json(report)) if report.exists() else None


def is_labelled(part: Part) -> bool:
    """Return whether a part is a finished label set; precompute checks it, and reports on it."""
    if not isinstance(part.config, PrecomputeConfig):
        return False
    return Path(part.config.output, MANIFEST_NAME).exists()


def resumed(config: PartConfig) -> PartConfig:
    """Return the settings that continue what is in the folder of a part."""
    if isinstance(config, PrecomputeConfig):  # it continues by itself
        return config
    return replace(config, resume=_started_run(config))


def _started_run(config: PartConfig) -> Path | None:
    """Return the folder of a training run that has a checkpoint."""
    if isinstance(config, PrecomputeConfig) or config.output is None:
        return None
    return config.output if has_checkpoint(config.output) else None
