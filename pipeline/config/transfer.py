"""Settings of `mealv2 transfer`; the defaults are the paper's (section 7 and appendix A)."""

import dataclasses
from pathlib import Path
from typing import Any, Literal, Self

from mealv2.storage.urls import Location
from pipeline.config.base import DATA_DIR, MAX_EPOCHS
from pipeline.config.comparison import ComparisonConfig
from pipeline.config.fields import (
    frozen,
    in_data,
    in_hardware,
    in_model,
    in_optimisation,
    in_run,
    in_views,
    require,
    without_effect,
)
from pipeline.config.training import FinetuneConfig

TransferMode = Literal["scratch", "fine-tune", "frozen", "all"]
MODES: tuple[TransferMode, ...] = ("scratch", "fine-tune", "frozen")

# The paper: 200 epochs; a learning rate of 0.01, 0.1 for the last layer alone.
TRANSFER_EPOCHS = 200
TRANSFER_LR: dict[str, float] = {"scratch": 0.01, "fine-tune": 0.01, "frozen": 0.1}
STORED_VIEWS = 10  # of an image, with a frozen backbone


@frozen
class TransferConfig(ComparisonConfig, FinetuneConfig):
    """Measure how well a backbone transfers to another classification data set.

    From scratch, fine-tuned, or frozen with a new linear layer: the three parts of the paper's
    Table 6. The defaults are the paper's, but for the schedule, of which it says nothing: a cosine.
    """

    example = "mealv2 transfer --data-dir birds --model resnet50.a1_in1k --mode frozen"

    default_select = "last"

    data_dir: Location | None = in_data(  # type: ignore[assignment]  # with --sets
        None,
        DATA_DIR,
        shown="those of --sets",
        path="data set",
        need="one of --data-dir and --sets is required",
    )
    sets: Path | None = in_data(
        None,
        "File of several data sets, a line NAME DATA_DIR each: trains on each of them and reports "
        "their mean too.",
        shown="none",
        path="file",
    )
    mode: TransferMode = in_model(
        "fine-tune",
        "scratch: random weights. fine-tune: train all weights. frozen: train the last linear "
        "layer only (linear evaluation). all: the three, one after another.",
    )
    select: Literal["last", "best"] | None = in_run(
        None,
        "Epoch whose model is the result: the last, or that of the best top-1 (mAP of images of "
        "several classes) on --val-split.",
        shown="last",
    )
    num_views: int | None = in_views(
        None,
        "Views per image that the epochs take turns with; with --mode frozen the backbone sees "
        "each of them once.",
        shown=f"a new view every epoch; {STORED_VIEWS} with --mode frozen, 1 if no view is random",
        low=1,
    )
    cache_features: Literal["auto", "off"] = in_hardware(
        "auto",
        "With --mode frozen: run the backbone once and keep its features in memory, if they take "
        "at most half of the free memory.",
    )
    feature_dir: Path | None = in_hardware(
        None,
        "With cached features: folder that keeps them for other runs with the same backbone, "
        "images and views, such as those of other seeds.",
        shown="not kept",
        path="new folder",
    )
    epochs: int = in_optimisation(
        TRANSFER_EPOCHS, "Passes over the images.", low=1, high=MAX_EPOCHS
    )
    lr: float | None = in_optimisation(  # type: ignore[assignment]  # __post_init__ sets it
        None,
        "Learning rate.",
        shown="{fine-tune}; {frozen} with --mode frozen".format(**TRANSFER_LR),
        low=0,
    )
    sched: Literal["multistep", "cosine", "poly", "step", "constant"] = in_optimisation(
        "cosine",
        "Learning rate schedule of timm; the paper names none, the cosine is our choice.",
    )

    def __post_init__(self) -> None:
        if self.lr is None and self.mode in TRANSFER_LR:
            object.__setattr__(self, "lr", TRANSFER_LR[self.mode])
        super().__post_init__()
        self._check_start()
        either = "give --data-dir or --sets, not both"
        require((self.data_dir is None) != (self.sets is None), either)
        self._check_grid("--compare, --sets, --seeds or --mode all")
        if self.mode == "frozen":
            names = ("drop", "drop_path", "layer_decay", "sync_bn", "torchcompile")
            without_effect(self, "with --mode frozen, which trains one linear layer", *names)
            message = "--clip-mode agc leaves out the last layer, which --mode frozen trains alone"
            require(self.clip_mode != "agc", message)
        elif self.mode != "all":
            without_effect(self, f"with --mode {self.mode}", "cache_features", "feature_dir")
        if self.cache_features == "off":
            without_effect(self, "with --cache-features off", "feature_dir")
        if self.caches_features:
            cached = "with cached features, which have no pixels: add --cache-features off"
            without_effect(self, cached, "mixup", "cutmix")

    def _check_start(self) -> None:
        if self.mode == "scratch":
            mode = "with --mode scratch, which starts from random weights"
            without_effect(self, mode, "initial_checkpoint")
            require(not self.pretrained, f"--pretrained has no effect {mode}")
            return
        has_weights = self.pretrained is not False or self.initial_checkpoint is not None
        require(
            has_weights,
            f"--mode {self.mode} starts from trained weights: leave out --no-pretrained, or use "
            "--mode scratch",
        )

    def check_lr(self, name: str, lr: float | None) -> None:
        """Check a learning rate; with --mode all each mode has its own, None here."""
        if lr is not None:
            super().check_lr(name, lr)

    @property
    def is_grid(self) -> bool:
        """Whether the command trains several runs."""
        return self.sets is not None or super().is_grid

    @property
    def sets_file(self) -> Path | None:
        """The file of several data sets, if there is one."""
        return self.sets

    @property
    def all_modes(self) -> tuple[TransferMode, ...]:
        """The modes of the runs."""
        return MODES if self.mode == "all" else (self.mode,)

    def cell(
        self, *, model: str, mode: Any, data_dir: Location | None = None, **changes: Any
    ) -> Self:
        """Return the settings of one of several runs; its seed and folder are still to be set."""
        one: dict[str, Any] = {"model": model, "mode": mode, "data_dir": data_dir}
        if mode == "scratch":
            one |= {"initial_checkpoint": None, "pretrained": None}
        if mode != "frozen":
            one |= {"cache_features": "auto", "feature_dir": None}
        return dataclasses.replace(self, **one, **changes, sets=None, compare=None, seeds=1)

    @property
    def from_pretrained(self) -> bool:
        """Whether the student starts from timm's weights."""
        return self.mode != "scratch" and super().from_pretrained

    @property
    def caches_features(self) -> bool:
        """Whether the backbone runs once, if its features fit in memory."""
        return self.mode == "frozen" and self.cache_features == "auto"

    @property
    def num_stored_views(self) -> int | None:
        """Views per image that the epochs take turns with; None for a new one every epoch."""
        if self.num_views is not None or self.mode != "frozen":
            return self.num_views
        return STORED_VIEWS if self.view_recipe.is_random else 1
