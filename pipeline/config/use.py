"""Settings of what comes after training, and of the demo."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mealv2.errors import ConfigError
from mealv2.storage.urls import Location
from pipeline.config.base import (
    DATA_DIR,
    DEFAULT_IMG_SIZE,
    CacheConfig,
    CropConfig,
    ReaderConfig,
    RuntimeConfig,
    Settings,
)
from pipeline.config.fields import at_least, check_normalisation, positional, required, setting

_MODEL = "one of --model and --checkpoint is required"


@dataclass(frozen=True, kw_only=True)
class InferenceConfig(CropConfig, RuntimeConfig):
    """A model that is evaluated, and the size and normalisation of its input."""

    model: str | None = setting(
        None,
        "timm or released model name.",
        group="Model",
        shown="the one that the checkpoint names",
        need=_MODEL,
    )
    checkpoint: Path | None = setting(
        None,
        "Weights to evaluate: a file, a run folder or a model folder.",
        group="Model",
        shown="the model's own",
        path="weights",
        need=_MODEL,
    )
    img_size: int | None = setting(
        None,
        "Side of the centre crop in pixels.",
        group="Views",
        shown=f"the size the checkpoint was trained at, or {DEFAULT_IMG_SIZE}",
    )
    batch_size: int = setting(256, "Images per forward pass.", group="Hardware")
    mean: tuple[float, float, float] | None = setting(
        None,
        "Per-channel mean of the input normalisation.",
        group="Model",
        shown="the model's own",
    )
    std: tuple[float, float, float] | None = setting(
        None,
        "Per-channel std of the input normalisation.",
        group="Model",
        shown="the model's own",
    )
    results_file: Path | None = setting(
        None,
        "Write the results here, as .json or .csv.",
        group="Results",
        shown="not written",
        path="new file",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 1, "batch_size")
        if self.img_size is not None:
            at_least(self, 1, "img_size")
        if self.model is None and self.checkpoint is None:
            raise ConfigError("give --model, --checkpoint, or both")
        check_normalisation(self)
        if self.results_file is not None and self.results_file.suffix not in (".json", ".csv"):
            raise ConfigError(f"--results-file must end in .json or .csv, got {self.results_file}")


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(CacheConfig, InferenceConfig):
    """Measure the accuracy of a checkpoint or a timm model on a split."""

    example = "mealv2 evaluate --data-dir imagenet --checkpoint runs/my-student"

    data_dir: Location = required(DATA_DIR, group="Data", path="data set")
    val_split: str = setting("val", "Part of --data-dir to evaluate on.", group="Data")
    results_file: Path | None = setting(
        None,
        "Write the accuracy per class here, as .json or .csv.",
        group="Results",
        shown="not written",
        path="new file",
    )


@dataclass(frozen=True, kw_only=True)
class PredictConfig(InferenceConfig):
    """Predict the best classes of pictures with a checkpoint or a timm model."""

    example = "mealv2 predict holiday.jpg pictures --checkpoint runs/my-student"

    image: tuple[Path, ...] = positional(
        "Picture, or folder of pictures; repeat it for several.", path="images"
    )
    topk: int = setting(5, "Number of most probable classes to name.", group="Results")
    results_file: Path | None = setting(
        None,
        "Write the predictions here, as .json or .csv.",
        group="Results",
        shown="not written",
        path="new file",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 1, "topk")


@dataclass(frozen=True, kw_only=True)
class ExportConfig(Settings):
    """Export a trained model: timm or torch.hub folder, ONNX or TorchScript file."""

    example = "mealv2 export runs/my-student --to onnx"

    run: Path = positional("Run folder, or the model folder in it.", path="weights")
    to: Literal["timm", "onnx", "torchscript", "hub-folder"] = required(
        "Format to export to.", group="Model"
    )
    output: Path | None = setting(
        None,
        "Folder to create, or file (.onnx, .pt); it must not exist.",
        group="Results",
        shown="RUN/export/…",
        aliases=("out",),
        path="new folder",
    )

    def __post_init__(self) -> None:
        suffix = {"onnx": ".onnx", "torchscript": ".pt"}.get(self.to)
        if self.output is not None and suffix is not None and self.output.suffix != suffix:
            raise ConfigError(
                f"--output must end in {suffix} with --to {self.to}, got {self.output}"
            )


@dataclass(frozen=True, kw_only=True)
class DemoConfig(ReaderConfig):
    """Run both stages on scikit-learn's handwritten digits; a few minutes on a CPU."""

    example = "mealv2 demo --seeds 5"

    output: Path = setting(
        Path("demo"),
        "Folder for data, labels and runs; finished parts are kept.",
        group="Run and checkpoints",
        path="new folder",
    )
    seeds: int = setting(
        1,
        "Students to train, each compared with a hard-label control run.",
        group="Run and checkpoints",
    )
    workers: int = setting(
        0, "Threads that read and decode images; 0: only the main thread.", group="Hardware"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 1, "seeds")
