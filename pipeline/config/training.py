"""Settings of every training run, and of `mealv2 finetune`."""

import ast
import math
from pathlib import Path
from typing import Any, ClassVar, Literal

from mealv2.errors import ConfigError
from mealv2.storage.urls import Location
from pipeline.config.base import (
    DATA_DIR,
    DEFAULT_IMG_SIZE,
    MAX_EPOCHS,
    NO_SPLIT,
    RECIPE,
    SIDE,
    CompileMode,
    HeldOutConfig,
    NormalisationConfig,
    RuntimeConfig,
)
from pipeline.config.fields import (
    MAX_SEED,
    REQUIRED,
    frozen,
    in_data,
    in_hardware,
    in_img_size,
    in_loss,
    in_model,
    in_optimisation,
    in_run,
    in_views,
    require,
    split_commas,
    without_effect,
)
from pipeline.config.mixing import MixingConfig
from pipeline.config.optimisation import SCHED_ON_UPDATES, WEIGHT_DECAY
from pipeline.config.views import ViewsConfig

# What may differ from the run when it is resumed (docs/how-to/resume.md has the table):
# settings of the machine, the log and the folder, which no checkpoint is compared with;
FREE_ON_RESUME = frozenset(
    {"resume", "output", "auto_resume", "dry_run", "workers", "device", "log_interval"}
    | {"log_weights", "log_tensorboard", "log_wandb", "log_trackio", "wandb_project"}
    | {"recovery_interval", "checkpoint_hist", "cache_dir", "cache_size", "strict", "check_images"}
    | {"download", "cache_images", "cache_features", "feature_dir"}
)
# and settings that the command line may change: paths, because contents are compared by their
# hashes, and choices that leave what the run has learned as it is.
CHANGEABLE_ON_RESUME = frozenset(
    {"epochs", "data_dir", "extra_data", "labels", "teacher", "initial_checkpoint", "on_bad_image"}
    | {"val_interval", "grad_accum_steps", "sync_bn", "early_stopping"}
)
SELECT = "Epoch whose model is the result: the last, or that of the best top-1 on --val-split."
# Arguments of timm's models that have flags of their own.
_FLAG_OF = {
    "pretrained": "--pretrained",
    "checkpoint_path": "--initial-checkpoint",
    "num_classes": "the classes of --data-dir",
    "img_size": "--img-size",
    "drop_rate": "--drop",
    "drop_path_rate": "--drop-path",
}


@frozen
class TrainConfig(MixingConfig, HeldOutConfig, NormalisationConfig, RuntimeConfig):
    """Settings of every training run."""

    in_ranks = True
    default_select: ClassVar[Literal["last", "best"]] = "last"

    data_dir: Location = in_data(REQUIRED, DATA_DIR, path="data set")
    model: str = in_model(
        REQUIRED,
        "Student: a timm model name (its tag selects the weights), local-dir:PATH, hf-hub:NAME, or "
        "your own code, PACKAGE.MODULE:FUNCTION.",
    )
    pretrained: bool | None = in_model(
        None, "Start from timm's pretrained weights.", shown="yes, without --initial-checkpoint"
    )
    initial_checkpoint: Path | None = in_model(
        None, "Starting weights: file, run folder or model folder.", shown="timm's", path="weights"
    )
    drop: float | None = in_model(None, "Dropout rate.", shown="the model's", low=0, high=1)
    drop_path: float | None = in_model(
        None, "Stochastic depth: rate of dropped paths.", shown="the model's", low=0, high=1
    )
    model_kwargs: tuple[str, ...] = in_model(
        (),
        "Argument KEY=VALUE of timm.create_model for the student; repeat it for several.",
        shown="none",
    )
    sync_bn: bool = in_hardware(
        False, "With torchrun on GPUs: batch normalisation over the images of all processes."
    )
    views_per_image: int = in_views(
        1, "Views per image in a batch, cut from one decode (FKD); each counts as an epoch.", low=1
    )
    torchcompile: CompileMode = in_hardware(
        "off", "Compile the student with torch.compile, in this mode.", alias="compile"
    )
    cache_images: Literal["auto", "off"] = in_hardware(
        "auto",
        "Keep decoded images in memory, if all of a split take less than 2 GiB and a quarter of "
        "the free memory, divided by the processes of the machine.",
    )
    seed: int = in_run(0, "Seed of the image order, new weights and dropout.", low=0, high=MAX_SEED)
    output: Path | None = in_run(
        None, "Run folder to create.", shown="runs/COMMAND-MODEL-TIME", path="new folder"
    )
    resume: Path | None = in_run(None, "Run folder to continue with its settings.", shown="none")
    auto_resume: bool = in_run(
        False,
        "Continue the run in --output if there is one, also if only --epochs is larger.",
    )
    select: Literal["last", "best"] | None = in_run(None, SELECT, shown="last")
    early_stopping: int | None = in_run(
        None,
        "Stop after this many epochs without a better top-1 on --val-split (transfer to several "
        "classes per image: mAP).",
        shown="none",
        low=1,
    )
    log_interval: int = in_run(50, "Steps between log lines.", low=1)
    log_weights: tuple[str, ...] = in_run(
        (),
        "Log percentiles of the weights of this layer of the student every epoch, for `mealv2 "
        "report`: a name such as layer2.3.conv3, or auto for the middle layer; repeat it for "
        "several.",
        shown="none",
        convert=split_commas,
    )
    log_tensorboard: bool = in_run(False, "Log to TensorBoard: event files in RUN/tensorboard.")
    log_wandb: bool = in_run(False, "Log to Weights & Biases.")
    log_trackio: bool = in_run(False, "Log to trackio, on this machine by default.")
    wandb_project: str = in_run("mealv2", "Project of --log-wandb and --log-trackio.")
    val_interval: int = in_run(1, "Epochs between validations; the last epoch has one.", low=1)
    recovery_interval: int | None = in_run(
        None,
        "Steps between checkpoints, besides the one at the end of each epoch.",
        shown="none",
        alias="checkpoint_every",
        low=1,
    )
    checkpoint_hist: int | Literal["all"] = in_run(
        2,
        "Number of newest checkpoints to keep, or all; `--resume RUN --checkpoint-hist 1` removes "
        "old ones of a finished run.",
        alias="keep_checkpoints",
        low=1,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_resume()
        self._check_sizes()
        _ = self.model_args
        if self.val_split == NO_SPLIT:
            message = "--select best needs a validation split, but --val-split is none"
            require(self.select != "best", message)
            without_effect(self, "with --val-split none", "val_interval", "early_stopping")
        if not (self.log_wandb or self.log_trackio):
            without_effect(self, "without --log-wandb or --log-trackio", "wandb_project")
        if self.initial_checkpoint:
            require(not self.pretrained, "give --pretrained or --initial-checkpoint, not both")

    def _check_resume(self) -> None:
        if self.auto_resume:
            require(self.resume is None, "--auto-resume has no effect with --resume")
            require(self.output, "--auto-resume needs --output, the run folder to look for")

    def _check_sizes(self) -> None:
        views, steps, size = self.views_per_image, self.grad_accum_steps, self.batch_size
        require(views <= self.epochs, f"--views-per-image {views} exceeds --epochs {self.epochs}")
        require(views <= size, f"--views-per-image {views} exceeds --batch-size {size}")
        require(steps <= size, f"--grad-accum-steps {steps} exceeds --batch-size {size}")
        require(
            steps == 1 or self.torchcompile in ("off", "default"),
            f"--grad-accum-steps cannot be used with --torchcompile {self.torchcompile}, whose "
            "CUDA graphs can overwrite accumulated gradients; use --torchcompile default",
        )

    @property
    def selects_best(self) -> bool:
        """Whether the result is the best epoch on the validation split."""
        return (self.select or self.default_select) == "best" and self.val_split != NO_SPLIT

    @property
    def max_steps(self) -> int | None:
        """The steps of a run that ends within an epoch; None ends with the last epoch."""
        return None

    @property
    def model_args(self) -> dict[str, Any]:
        """The arguments of timm's model: Python literals, other text as it is."""
        found: dict[str, Any] = {}
        for text in self.model_kwargs:
            name, equals, value = text.partition("=")
            require(name.isidentifier() and equals, f"--model-kwargs {text} is not KEY=VALUE")
            flag_of = _FLAG_OF.get(name)
            require(flag_of is None, f"--model-kwargs {text}: use {flag_of}")
            found[name] = _literal(value, text)
        return found

    @property
    def from_pretrained(self) -> bool:
        """Whether the student starts from timm's weights."""
        return self.initial_checkpoint is None if self.pretrained is None else self.pretrained


def _literal(value: str, text: str) -> Any:
    """Return the Python literal that ``value`` spells, else ``value``; ``text`` is the argument.

    Raises ConfigError for one that no JSON file holds, as the files of a run and its model do.
    """
    try:
        found = ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return value
    except (TypeError, MemoryError, RecursionError) as error:
        reason = str(error) or "it is too deeply nested"
        raise ConfigError(f"--model-kwargs {text[:80]} cannot be read: {reason}") from None
    require(
        _is_json(found),
        f"--model-kwargs {text[:80]} must be a number, text, True, False, None, or a list, tuple "
        "or dict (with text as keys) of these",
    )
    return found


def _is_json(value: Any) -> bool:
    """Return whether JSON holds a value, with a tuple as a list."""
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_json(item) for key, item in value.items())
    if isinstance(value, list | tuple):
        return all(map(_is_json, value))
    if isinstance(value, float):
        return math.isfinite(value)
    return value is None or isinstance(value, bool | int | str)


@frozen
class FinetuneConfig(ViewsConfig, TrainConfig):
    """Train on class labels: a teacher for your data, a student's start, or a control run."""

    example = "mealv2 finetune --data-dir pictures --model resnet18.tv_in1k --epochs 20"

    default_select = "best"

    train_split: str = in_data("train", "Split of --data-dir to train on.", alias="split")
    select: Literal["last", "best"] | None = in_run(
        None, SELECT, shown="best; last with --val-split none"
    )
    img_size: int = in_img_size(DEFAULT_IMG_SIZE, SIDE)
    num_views: int | None = in_views(
        None,
        "Use the views of `distill` with a label set of this many views, in the same order.",
        shown="a new view every epoch",
        low=1,
    )
    view_seed: int = in_views(0, "Seed of the views.", low=0, high=MAX_SEED)
    epochs: int = in_optimisation(30, "Passes over the images.", low=1, high=MAX_EPOCHS)
    batch_size: int = in_optimisation(128, "Images per step, over all processes.", low=1)
    weight_decay: float = in_optimisation(1e-4, WEIGHT_DECAY, low=0)
    smoothing: float = in_loss(0.0, "Label smoothing.", low=0, high=1)
    recipe: str | None = in_run(None, RECIPE, shown="none")
    sched_on_updates: bool = in_optimisation(True, SCHED_ON_UPDATES)
