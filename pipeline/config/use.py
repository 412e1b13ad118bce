"""Settings of what comes after training, and of the demo."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mealv2.errors import ConfigError
from mealv2.locations import Location
from pipeline.config.base import (
    DATA_DIR,
    DEFAULT_IMG_SIZE,
    Caching,
    Cutting,
    Machine,
    Reading,
    Settings,
)
from pipeline.config.fields import at_least, check_normalisation, positional, required, setting


@dataclass(frozen=True, kw_only=True)
class ReadyModel(Cutting, Machine):
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
        at_least(self, 1, "batch_size")
        if self.img_size is not None:
            at_least(self, 1, "img_size")
        if self.model is None and self.checkpoint is None:
            raise ConfigError("give --model, --checkpoint, or both")
        check_normalisation(self)
        if self.results_file is not None and self.results_file.suffix not in (".json", ".csv"):
            raise ConfigError(f"--results-file must end in .json or .csv, got {self.results_file}")


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(Caching, ReadyModel):
    """Accuracy of a checkpoint or a timm model on a split."""

    data_dir: Location = required(DATA_DIR)
    val_split: str = setting("val", "Part of --data-dir to evaluate on.")
    results_file: Path | None = setting(
        None, "Write accuracy per class here, as .json or .csv.", shown="not written"
    )


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
        at_least(self, 1, "topk")


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


@dataclass(frozen=True, kw_only=True)
class DemoConfig(Reading):
    """The whole story on scikit-learn's handwritten digits, a few minutes on a CPU."""

    output: Path = setting(
        Path("demo"), "Folder for data, labels and runs; finished parts are kept."
    )
    seeds: int = setting(1, "Students to train, each against its hard-label control.")
    workers: int = setting(0, "Threads that read and decode images; 0: none beside the main one.")

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 1, "seeds")
