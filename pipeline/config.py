"""Every setting of every stage: frozen dataclasses, the only place with defaults and help texts.

The command line is built from these fields; a run folder keeps them as config.json. No torch here.
"""

import dataclasses
import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

from mealv2.errors import ConfigError

OnBadImage = Literal["fail", "skip"]
NO_SPLIT = "none"

# The paper: the learning rate falls to a tenth at epoch 100 of 180.
PAPER_EPOCHS = 180
PAPER_MILESTONE = 100

DEFAULT_TOPK = 10
DEFAULT_IMG_SIZE = 224
DEFAULT_EMA_DECAY = 0.9998  # timm's


def setting(default: Any, text: str, *, shown: str | None = None) -> Any:
    """A field with its help text; ``shown`` replaces a default that says nothing, such as None."""
    return field(default=default, metadata={"help": text, "shown": shown})


def recipe_setting() -> Any:
    """The field of a stage that a published recipe can fill in."""
    return setting(
        None, "Published recipe for whatever is not given; see `mealv2 recipes`.", shown="none"
    )


def required(text: str) -> Any:
    """A field that must be given."""
    return field(metadata={"help": text, "shown": None})


def positional(text: str) -> Any:
    """A field that must be given, without a flag: the words of the command line say it."""
    return field(metadata={"help": text, "shown": None, "positional": True})


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What every command can do with its settings."""

    def as_json(self) -> dict[str, Any]:
        """Return the settings as JSON values, paths absolute."""
        return {f.name: plain(getattr(self, f.name)) for f in dataclasses.fields(self)}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Self:
        """Build a config from JSON values; raises ConfigError for an unknown or missing name."""
        known = {f.name: f for f in dataclasses.fields(cls)}
        unknown = sorted(values.keys() - known.keys())
        if unknown:
            raise ConfigError(f"unknown setting {unknown[0]!r}; known: {', '.join(sorted(known))}")
        missing = [
            f.name
            for f in known.values()
            if f.default is dataclasses.MISSING and values.get(f.name) in (None, [], ())
        ]
        if missing:
            raise ConfigError(f"{spelling(known[missing[0]])} is required")
        return cls(**{name: _typed(known[name], value) for name, value in values.items()})


@dataclass(frozen=True, kw_only=True)
class Reading(Settings):
    """What every command has that reads images."""

    workers: int = setting(2, "Processes that read and decode images; 0: none beside the main one.")
    device: str = setting("auto", "cpu, cuda, cuda:N or mps; auto: a GPU if there is one.")

    def __post_init__(self) -> None:
        _at_least(self, 0, "workers")


@dataclass(frozen=True, kw_only=True)
class Machine(Reading):
    """How a stage computes."""

    amp: bool = setting(False, "Mixed precision (autocast).")
    amp_dtype: Literal["bfloat16", "float16"] | None = setting(
        None, "Type that --amp computes in.", shown="bfloat16"
    )
    on_bad_image: OnBadImage = setting(
        "fail", "An image that cannot be read: stop there, or leave it out and say so."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.amp_dtype is not None and not self.amp:
            raise ConfigError("--amp-dtype has no effect without --amp")


@dataclass(frozen=True, kw_only=True)
class PrecomputeConfig(Machine):
    """Stage one: label views of a data set with an ensemble of teachers."""

    data_dir: Path = required("Data set: ROOT/SPLIT/CLASS/IMAGE.")
    out: Path = required("Folder of the label set; made if missing, continued if unfinished.")
    teacher: tuple[str, ...] = required(
        "timm model, NAME or NAME=CHECKPOINT; repeat it, or separate several by commas."
    )
    split: str = setting("train", "Folder under --data-dir whose images get --num-views labels.")
    val_split: str = setting(
        "val", "Folder under --data-dir labelled once at the centre crop, for validation; or none."
    )
    num_views: int = setting(16, "Random views (crops and flips) labelled of each image.")
    view_seed: int = setting(0, "Seed of the views.")
    img_size: int = setting(DEFAULT_IMG_SIZE, "Side of a view in pixels.")
    topk: str | None = setting(
        None, "Classes kept per view: a number, or all.", shown="10, or all of fewer classes"
    )
    label_dtype: Literal["float16", "float32"] = setting(
        "float16", "Type the probabilities are stored in."
    )
    shard_size: int = setting(2048, "Images per shard file.")
    batch_size: int = setting(256, "Views per forward pass.")
    recipe: str | None = recipe_setting()
    dry_run: bool = setting(False, "Say rows, bytes and time from a short sample; write nothing.")

    def __post_init__(self) -> None:
        super().__post_init__()
        _at_least(self, 1, "num_views", "img_size", "shard_size", "batch_size")
        _seed(self, "view_seed")
        if not self.teacher:
            raise ConfigError("--teacher is required")
        if self.topk not in (None, "all") and not (self.topk.isdecimal() and int(self.topk) > 0):
            raise ConfigError(f"--topk must be a number of classes or 'all', got {self.topk!r}")

    def kept_classes(self, num_classes: int) -> int:
        """Return how many classes a label keeps; raises ConfigError above the class count."""
        if self.topk is None:
            return min(DEFAULT_TOPK, num_classes)
        k = num_classes if self.topk == "all" else int(self.topk)
        if k > num_classes:
            raise ConfigError(
                f"--topk {k}: the data has only {num_classes} classes; use less, or all"
            )
        return k


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Machine):
    """What every training run needs, whoever labels."""

    data_dir: Path = required("Data set: ROOT/SPLIT/CLASS/IMAGE.")
    model: str = required("Student: a timm model name, with its tag to pin the weights.")
    val_split: str = setting("val", "Folder under --data-dir to validate on; or none.")
    pretrained: bool | None = setting(
        None,
        "Start from timm's pretrained weights.",
        shown="yes, unless --initial-checkpoint is given",
    )
    initial_checkpoint: Path | None = setting(
        None, "Start from this file or run folder instead.", shown="timm's weights"
    )
    epochs: int = setting(PAPER_EPOCHS, "Passes over the images.")
    batch_size: int = setting(512, "Images per step, in total.")
    lr: float = setting(0.01, "Learning rate of SGD.")
    lr_milestones: tuple[int, ...] | None = setting(
        None,
        "Epochs at which the rate is multiplied by --decay-rate; repeat it for several.",
        shown="100/180 of the epochs, the paper's",
    )
    decay_rate: float = setting(0.1, "Factor at each milestone.")
    sched: Literal["step", "cosine"] = setting(
        "step", "Learning rate schedule: milestones (the paper's), or half a cosine to zero."
    )
    momentum: float = setting(0.9, "Momentum of SGD.")
    weight_decay: float = setting(0.0, "Weight decay of SGD; the paper uses none.")
    mean: tuple[float, float, float] | None = setting(
        None, "Per-channel mean the student's input is normalised with.", shown="the model's own"
    )
    std: tuple[float, float, float] | None = setting(
        None, "Per-channel std the student's input is normalised with.", shown="the model's own"
    )
    views_per_image: int = setting(
        1,
        "Views of an image in a batch, cut from one decode (FKD); each counts as an epoch.",
    )
    model_ema: bool = setting(
        False, "Keep a moving average of the student's weights, and make it the result."
    )
    model_ema_decay: float | None = setting(
        None, "Decay of the average at every step.", shown=str(DEFAULT_EMA_DECAY)
    )
    seed: int = setting(0, "Seed of the image order, new weights, dropout.")
    output: Path | None = setting(None, "Run folder to make.", shown="runs/COMMAND-MODEL-TIME")
    resume: Path | None = setting(
        None, "Run folder to continue, with the settings it keeps.", shown="a new run"
    )
    log_interval: int = setting(50, "Steps between log lines.")
    val_interval: int = setting(1, "Epochs between validations; the last epoch always has one.")
    checkpoint_every: int | None = setting(
        None, "Steps between checkpoints; the end of an epoch has one too.", shown="an epoch"
    )
    checkpoint_hist: int = setting(2, "Checkpoints kept, the newest.")

    def __post_init__(self) -> None:
        super().__post_init__()
        _at_least(self, 1, "epochs", "batch_size", "log_interval", "checkpoint_hist")
        _at_least(self, 1, "val_interval", "views_per_image")
        _at_least(self, 0, "lr", "momentum", "weight_decay", "decay_rate")
        if self.checkpoint_every is not None:
            _at_least(self, 1, "checkpoint_every")
        if self.views_per_image > self.batch_size:
            raise ConfigError(
                f"--views-per-image {self.views_per_image} does not fit into --batch-size "
                f"{self.batch_size}"
            )
        if self.sched == "cosine":
            _without_effect(self, "with --sched cosine", "lr_milestones", "decay_rate")
        if not self.model_ema:
            _without_effect(self, "without --model-ema", "model_ema_decay")
        elif self.model_ema_decay is not None:
            _between(self, 0, 1, "model_ema_decay")
        _seed(self, "seed")
        if self.pretrained and self.initial_checkpoint:
            raise ConfigError("--pretrained and --initial-checkpoint exclude each other")
        _normalisation(self)
        for milestone in self.lr_milestones or ():
            if not 0 < milestone < self.epochs:
                raise ConfigError(
                    f"--lr-milestones {milestone} has no effect in {self.epochs} epochs"
                )

    @property
    def from_pretrained(self) -> bool:
        """Whether the student starts from timm's weights."""
        return self.initial_checkpoint is None if self.pretrained is None else self.pretrained

    def lr_factor(self, epoch: int) -> float:
        """Return what the learning rates are multiplied by in an epoch (counted from 0)."""
        if self.sched == "cosine":  # official FKD_train.py: lr / 2 (1 + cos(pi e / epochs))
            return 0.5 * (1.0 + math.cos(math.pi * epoch / self.epochs))
        milestones = self.lr_milestones
        if milestones is None:
            milestones = (round(self.epochs * PAPER_MILESTONE / PAPER_EPOCHS),)
        return self.decay_rate ** sum(epoch >= milestone for milestone in milestones)


@dataclass(frozen=True, kw_only=True)
class DistillConfig(TrainConfig):
    """Stage two: train a student and a discriminator from a label set, from teachers online, or
    both. Defaults are the paper's.
    """

    labels: Path | None = setting(
        None, "Label set that `mealv2 precompute` made.", shown="none; then --online"
    )
    online: bool = setting(
        False,
        "No label set: ask the --teacher models at every step, about views that never repeat.",
    )
    teacher: tuple[str, ...] = setting(
        (),
        "timm model, NAME or NAME=CHECKPOINT, for --online and --missing teach; repeat it, or "
        "separate several by commas.",
        shown="with --missing teach, those the label set names",
    )
    missing: Literal["fail", "skip", "teach"] = setting(
        "fail", "Views the label set lacks: stop, leave them out, or ask its teachers."
    )
    reuse_views: bool | None = setting(
        None,
        "Stored views come round again; else view e is used in epoch e, stored or not.",
        shown="yes, unless --missing teach",
    )
    write_back: bool = setting(
        False, "Append what the teachers answered to the label set, for the next job."
    )
    split: str | None = setting(
        None, "With --online: folder under --data-dir to train on.", shown="train"
    )
    img_size: int | None = setting(
        None, "With --online: side of a view in pixels.", shown=str(DEFAULT_IMG_SIZE)
    )
    view_seed: int | None = setting(None, "With --online: seed of the views.", shown="0")
    discriminator: Literal["paper", "official", "adversarial", "off"] = setting(
        "paper",
        "The paper's (one sigmoid), the official code's (two outputs, last ReLU), the paper's "
        "behind a gradient reversal, or none.",
    )
    discriminator_lr: float | None = setting(
        None, "Learning rate of the discriminator, with the same schedule.", shown="--lr"
    )
    discriminator_weight: float = setting(1.0, "Weight of the discriminator loss.")
    discriminator_input: Literal["logits", "log-probs", "probs"] | None = setting(
        None,
        "What the discriminator is shown of both sides.",
        shown="logits with --online, else log-probs through the set's top-k",
    )
    cutmix_target: Literal["teachers", "mixed-labels"] | None = setting(
        None,
        "CutMix: the teachers label the mixed image (with --online), or labels mix by area.",
        shown="no CutMix",
    )
    cutmix_beta: float | None = setting(None, "CutMix: lambda is Beta(b, b).", shown="1.0")
    cutmix_prob: float | None = setting(None, "CutMix: share of batches mixed.", shown="1.0")
    label_temperature: float = setting(
        1.0, "Take labels to q^(1/T): softer above 1. The paper has 1."
    )
    hard_label_weight: float = setting(
        0.0, "Weight w of the class ids: (1 - w) soft + w hard. The paper has 0."
    )
    recipe: str | None = recipe_setting()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.online == (self.labels is not None):
            raise ConfigError("give --labels DIR, or --online with --teacher; not both")
        if self.online:
            if not self.teacher:
                raise ConfigError("--online needs --teacher")
            _without_effect(self, "with --online", "missing", "reuse_views", "write_back")
        else:
            _without_effect(self, "with --labels", "split", "img_size", "view_seed")
        if not self.online and self.missing != "teach":
            _without_effect(self, "without --online or --missing teach", "teacher", "write_back")
        self._check_discriminator()
        self._check_extras()

    def _check_discriminator(self) -> None:
        _at_least(self, 0, "discriminator_weight")
        if self.discriminator_lr is not None:
            _at_least(self, 0, "discriminator_lr")
        if self.discriminator == "off":
            _without_effect(
                self,
                "with --discriminator off",
                "discriminator_lr",
                "discriminator_weight",
                "discriminator_input",
            )
        if self.discriminator_input == "logits" and not self.online:
            raise ConfigError("--discriminator-input logits needs --online: labels hold none")

    def _check_extras(self) -> None:
        if self.img_size is not None:
            _at_least(self, 1, "img_size")
        if self.view_seed is not None:
            _seed(self, "view_seed")
        if not 0 < self.label_temperature < math.inf:
            raise ConfigError(
                f"--label-temperature must be positive and finite, got {self.label_temperature}"
            )
        _between(self, 0, 1, "hard_label_weight")
        if self.cutmix_target is None:
            _without_effect(self, "without --cutmix-target", "cutmix_beta", "cutmix_prob")
        if self.cutmix_beta is not None and not 0 < self.cutmix_beta < math.inf:
            raise ConfigError(f"--cutmix-beta must be positive and finite, got {self.cutmix_beta}")
        if self.cutmix_prob is not None:
            _between(self, 0, 1, "cutmix_prob")
        if self.cutmix_target == "teachers" and not self.online:
            raise ConfigError(
                "--cutmix-target teachers needs --online: stored labels are of unmixed images; "
                "mixed-labels works from a label set"
            )

    @property
    def reuses_views(self) -> bool:
        """Whether stored views come round again."""
        return self.missing != "teach" if self.reuse_views is None else self.reuse_views


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(TrainConfig):
    """Hard-label training: teachers on own data, a student's start, a control run."""

    split: str = setting("train", "Folder under --data-dir to train on.")
    img_size: int = setting(DEFAULT_IMG_SIZE, "Side of a view in pixels.")
    num_views: int | None = setting(
        None,
        "Use the views, in the order, that `distill` uses from a label set of so many.",
        shown="a new view every epoch",
    )
    view_seed: int = setting(0, "Seed of the views.")
    epochs: int = setting(30, "Passes over the images.")
    batch_size: int = setting(128, "Images per step, in total.")
    weight_decay: float = setting(1e-4, "Weight decay of SGD.")

    def __post_init__(self) -> None:
        super().__post_init__()
        _at_least(self, 1, "img_size")
        if self.num_views is not None:
            _at_least(self, 1, "num_views")
        _seed(self, "view_seed")


@dataclass(frozen=True, kw_only=True)
class ReadyModel(Machine):
    """A model that only answers, and how its input is cut and normalised."""

    model: str | None = setting(
        None, "timm or released model name.", shown="what the checkpoint says it is"
    )
    checkpoint: Path | None = setting(
        None, "Weights: a file, a run folder or a model folder.", shown="the model's own"
    )
    img_size: int | None = setting(
        None,
        "Side of the centre crop in pixels.",
        shown=f"what the checkpoint was trained at, or {DEFAULT_IMG_SIZE}",
    )
    batch_size: int = setting(256, "Images per forward pass.")
    mean: tuple[float, float, float] | None = setting(
        None, "Per-channel mean of the normalisation.", shown="the model's own"
    )
    std: tuple[float, float, float] | None = setting(
        None, "Per-channel std of the normalisation.", shown="the model's own"
    )
    results_file: Path | None = setting(
        None, "Write the results here, as .json or .csv.", shown="not written"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        _at_least(self, 1, "batch_size")
        if self.img_size is not None:
            _at_least(self, 1, "img_size")
        if self.model is None and self.checkpoint is None:
            raise ConfigError("give --model, --checkpoint, or both")
        _normalisation(self)
        if self.results_file is not None and self.results_file.suffix not in (".json", ".csv"):
            raise ConfigError(f"--results-file must end in .json or .csv, got {self.results_file}")


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(ReadyModel):
    """Accuracy of a checkpoint or a timm model on a split."""

    data_dir: Path = required("Data set: ROOT/SPLIT/CLASS/IMAGE.")
    val_split: str = setting("val", "Folder under --data-dir to evaluate on.")
    results_file: Path | None = setting(
        None, "Write accuracy per class here, as .json or .csv.", shown="not written"
    )


@dataclass(frozen=True, kw_only=True)
class DemoConfig(Reading):
    """The whole story on scikit-learn's handwritten digits, a few minutes on a CPU."""

    output: Path = setting(
        Path("demo"), "Folder for data, labels and runs; finished parts are kept."
    )
    seeds: int = setting(1, "Students to train, each against its hard-label control.")
    workers: int = setting(0, "Processes that read and decode images; 0: none beside the main one.")

    def __post_init__(self) -> None:
        super().__post_init__()
        _at_least(self, 1, "seeds")


@dataclass(frozen=True, kw_only=True)
class PredictConfig(ReadyModel):
    """What a checkpoint or a timm model says of pictures: the best classes of each."""

    image: tuple[Path, ...] = positional("Picture, or folder of pictures; several are fine.")
    topk: int = setting(5, "Classes to name, the most probable ones.")
    results_file: Path | None = setting(
        None, "Write the answers here, as .json or .csv.", shown="not written"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        _at_least(self, 1, "topk")


@dataclass(frozen=True, kw_only=True)
class ExportConfig(Settings):
    """Hand a trained model to others: timm or torch.hub folder, ONNX or TorchScript file."""

    run: Path = positional("Run folder, or the model folder in it.")
    to: Literal["timm", "onnx", "torchscript", "hub-folder"] = required("What to make of it.")
    out: Path | None = setting(
        None,
        "Folder to make, or file (.onnx, .pt); it must not be there yet.",
        shown="RUN/export/…",
    )

    def __post_init__(self) -> None:
        suffix = {"onnx": ".onnx", "torchscript": ".pt"}.get(self.to)
        if self.out is not None and suffix is not None and self.out.suffix != suffix:
            raise ConfigError(f"--out must end in {suffix} with --to {self.to}, got {self.out}")


def flag(name: str) -> str:
    """Return the command-line spelling of a field."""
    return "--" + name.replace("_", "-")


def spelling(known: "dataclasses.Field[Any]") -> str:
    """Return what the command line calls a field: its flag, or its word in capitals."""
    return known.name.upper() if known.metadata.get("positional") else flag(known.name)


def _default(config: type, name: str) -> Any:
    return next(f.default for f in dataclasses.fields(config) if f.name == name)


def _at_least(config: object, least: float, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if not least <= value < math.inf:  # nan is neither
            raise ConfigError(f"{flag(name)} must be at least {least} and finite, got {value}")


def _between(config: object, least: float, most: float, name: str) -> None:
    if not least <= getattr(config, name) <= most:
        raise ConfigError(
            f"{flag(name)} must lie in [{least}, {most}], got {getattr(config, name)}"
        )


def _without_effect(config: object, mode: str, *names: str) -> None:
    """Raise ConfigError for a setting that was given but does nothing in this mode."""
    for name in names:
        if getattr(config, name) != _default(type(config), name):
            raise ConfigError(f"{flag(name)} has no effect {mode}")


def _normalisation(config: "TrainConfig | ReadyModel") -> None:
    """Check --mean and --std."""
    if (config.mean is None) != (config.std is None):
        raise ConfigError("--mean and --std go together")
    if config.mean is not None and not all(map(math.isfinite, config.mean)):
        raise ConfigError(f"--mean must be finite, got {config.mean}")
    if config.std is not None and not all(0 < value < math.inf for value in config.std):
        raise ConfigError(f"--std must be positive and finite, got {config.std}")


def _seed(config: object, name: str) -> None:
    if not 0 <= getattr(config, name) < 1 << 63:
        raise ConfigError(f"{flag(name)} must lie in [0, 2**63), got {getattr(config, name)}")


def plain(value: Any) -> Any:
    """Return a setting as a JSON value: paths absolute, tuples as lists."""
    if isinstance(value, Path):
        return os.path.abspath(value)  # noqa: PTH100  # without following links
    return [plain(item) for item in value] if isinstance(value, tuple) else value


def _typed(known: "dataclasses.Field[Any]", value: Any) -> Any:
    """Turn a JSON value into a field's type: lists to tuples, text to paths."""
    if isinstance(value, list | tuple):
        if known.type == tuple[Path, ...]:
            value = map(Path, value)
        return tuple(value) or (known.default if known.default is not dataclasses.MISSING else ())
    if value is not None and known.type in (Path, Path | None):
        return Path(value)
    return value
