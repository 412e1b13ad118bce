"""Settings of the commands that use a trained model, and of the demo."""

import re
from functools import partial
from pathlib import Path
from typing import Literal

from mealv2.storage.urls import Location
from pipeline.config.base import (
    DATA_DIR,
    DEFAULT_IMG_SIZE,
    CropConfig,
    HeldOutConfig,
    NormalisationConfig,
    ReaderConfig,
    RuntimeConfig,
    Settings,
    StrictConfig,
)
from pipeline.config.fields import (
    MAX_SEED,
    MAX_WORKERS,
    REQUIRED,
    argument,
    frozen,
    in_data,
    in_hardware,
    in_img_size,
    in_model,
    in_results,
    in_run,
    require,
    without_effect,
)

MAX_DEMO_PROCS = 4  # by default: each has a copy of torch in memory
HUB = "hf://"
_WORD = "[A-Za-z0-9_](?:[A-Za-z0-9_.-]{0,94}[A-Za-z0-9_])?"  # as huggingface_hub checks it
_HUB = re.compile(f"{HUB}{_WORD}/{_WORD}")
_MODEL = "one of --model and --checkpoint is required"
_results = partial(in_results, None, shown="not written", path="new file")


@frozen
class InferenceConfig(CropConfig, NormalisationConfig, RuntimeConfig):
    """Settings of commands that run a trained model."""

    model: str | None = in_model(
        None,
        "timm or released model name, or PACKAGE.MODULE:FUNCTION.",
        shown="as the checkpoint names it",
        need=_MODEL,
    )
    checkpoint: Path | None = in_model(
        None,
        "Weights to load: a file, a run folder or a model folder.",
        shown="the model's own",
        path="weights",
        need=_MODEL,
    )
    img_size: int | None = in_img_size(
        None,
        "Side of the centre crop in pixels.",
        shown=f"the size the checkpoint was trained at, or {DEFAULT_IMG_SIZE}",
    )
    batch_size: int = in_hardware(256, "Images per forward pass.", low=1)
    results_file: Path | None = _results("File for the results, .json or .csv.")
    json: bool = in_results(False, "Print the results as one line of JSON instead of text.")

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.model or self.checkpoint, "give --model, --checkpoint, or both")
        is_known = self.results_file is None or self.results_file.suffix in (".json", ".csv")
        require(is_known, f"--results-file must end in .json or .csv, got {self.results_file}")


@frozen
class EvaluateConfig(HeldOutConfig, InferenceConfig):
    """Measure the accuracy of a checkpoint or a timm model on a split."""

    example = "mealv2 evaluate --data-dir imagenet --checkpoint runs/my-student"
    trains = False

    data_dir: Location = in_data(REQUIRED, DATA_DIR, path="data set")
    val_split: str = in_data("val", "Split of --data-dir to evaluate on.")
    train_split: str | None = in_data(
        None, "With --val-fraction: split that the images are held out of.", shown="train"
    )
    results_file: Path | None = _results("File for the accuracy per class, .json or .csv.")
    output: Path | None = in_results(
        None,
        "Folder for evaluation.json, per-class.csv and confusion-matrix.csv.",
        shown="not written",
        path="new folder",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.val_fraction is None:
            without_effect(self, "without --val-fraction", "train_split")


@frozen
class PredictConfig(StrictConfig, InferenceConfig):
    """Predict the classes of pictures with a checkpoint or a timm model."""

    example = "mealv2 predict holiday.jpg pictures --checkpoint runs/my-student"

    image: tuple[Path, ...] = argument("Pictures, or folders of pictures.", path="images")
    topk: int = in_results(5, "Number of most probable classes to show.", low=1)


@frozen
class ExportConfig(Settings):
    """Export a trained model: timm or torch.hub folder, ONNX or TorchScript file."""

    example = "mealv2 export runs/my-student --to onnx"

    run: Path = argument("Run folder, or the model folder in it.", path="weights")
    model: str | None = in_model(
        None, "Model of your own code, PACKAGE.MODULE:FUNCTION.", shown="as the checkpoint names it"
    )
    to: Literal["timm", "onnx", "torchscript", "hub-folder"] = in_model(REQUIRED, "Export format.")
    output: Path | None = in_results(
        None,
        "Folder or file (.onnx, .pt) to create.",
        shown="RUN/export/…",
        alias="out",
        path="new folder",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        suffix = {"onnx": ".onnx", "torchscript": ".pt"}.get(self.to)
        if self.output is not None and suffix is not None:
            message = f"--output must end in {suffix} with --to {self.to}, got {self.output}"
            require(self.output.suffix == suffix, message)


@frozen
class PushConfig(Settings):
    """Upload a trained model in timm's format, or a label set, to the Hugging Face Hub.

    The token comes from HF_TOKEN or `hf auth login`.
    """

    example = "mealv2 push runs/my-student hf://USER/NAME --private --space"

    run: Path = argument(
        "Run folder, or the model folder in it; or a label set.", path="weights or label set"
    )
    to: str = argument("Repository on the Hub, hf://USER/NAME; created if missing.")
    private: bool = in_results(False, "Create a private repository; never upload to a public one.")
    space: bool = in_results(False, "Also create a Gradio Space, a web page that runs the model.")
    license: str | None = in_results(
        None,
        "Licence for the card, as the Hub names it, such as mit.",
        shown="none",
    )
    dry_run: bool = in_results(False, "Write the files to --output; upload nothing.")
    output: Path | None = in_results(
        None, "With --dry-run: folder to create.", shown="RUN/export/push", path="new folder"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        is_name = _HUB.fullmatch(self.to) and "--" not in self.to and ".." not in self.to
        message = "TO must be hf://USER/NAME, in letters, digits, '-', '_' and '.'"
        require(is_name and not self.to.endswith(".git"), message)
        is_licence = self.license is None or re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", self.license)
        require(is_licence, f"--license must be an identifier of the Hub: {self.license!r}")
        if not self.dry_run:
            without_effect(self, "without --dry-run", "output")

    @property
    def repo_id(self) -> str:
        """The name of the repository, USER/NAME."""
        return self.to.removeprefix(HUB)


@frozen
class RecipesRecordConfig(Settings):
    """Add a finished run of a recipe to a table of results, beside the published numbers.

    The run must have the settings of its recipe, and ImageNet's number of images and steps.
    """

    example = "mealv2 recipes record runs/resnet18"

    run: Path = argument("Run folder of a finished `mealv2 distill --recipe`.", path="folder")
    output: Path = in_results(
        Path("reproduced.json"),
        "File of the results, created or extended; the table is written beside it, as .md.",
        path="new file",
    )
    variant: bool = in_results(
        False, "Record a run that differs from its recipe, in a table of its own."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        is_json = self.output.suffix == ".json"
        require(is_json, f"--output must end in .json, got {self.output}")


@frozen
class DemoConfig(ReaderConfig):
    """Compare soft with hard labels on 5,000 handwritten digits of MNIST, from a wheel.

    It trains two teachers and, for each seed, a student on class labels and two on soft labels.
    Some minutes on a CPU; it ends with one table.
    """

    example = "mealv2 demo --seeds 5"

    output: Path = in_run(
        Path("demo"),
        "Folder for pictures, labels and runs; finished parts are kept.",
        path="new folder",
    )
    seeds: int = in_run(
        3, "Number of seeds: each gives one student of every kind.", low=1, high=1000
    )
    seed: int = in_run(
        0,
        "First seed; --seed 3 --seeds 10 are the seeds 3 to 12.",
        low=0,
        high=MAX_SEED,
    )
    workers: int = in_hardware(
        0, "Threads that read images; 0: only the main thread.", low=0, high=MAX_WORKERS
    )
    num_procs: int | None = in_hardware(
        None,
        "Processes, each of which runs one part at a time, in one thread.",
        shown=f"one for each core, at most {MAX_DEMO_PROCS}",
        low=1,
        high=64,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        last = self.seed + self.seeds - 1
        require(
            last <= MAX_SEED, f"--seed {self.seed} with --seeds {self.seeds} exceeds {MAX_SEED}"
        )

    @property
    def data(self) -> Path:
        """The folder of the pictures."""
        return self.output / "data"

    @property
    def first_line(self) -> str:
        doing = "looking for finished parts" if self.data.exists() else "writing 5,000 pictures"
        return f"demo in {self.output}: {doing}"

    @property
    def all_seeds(self) -> range:
        """The seeds of the students."""
        return range(self.seed, self.seed + self.seeds)
