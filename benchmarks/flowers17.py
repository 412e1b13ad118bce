"""17 Flowers with ImageNet weights: few labelled pictures, and the rest without labels.

    python benchmarks/efficientnet_lite_weights.py --output weights
    python benchmarks/flowers17.py flowers17 --weights weights --output flowers17-runs --quick
    python benchmarks/flowers17.py flowers17 --weights weights --output flowers17-runs

Teachers are EfficientNet-Lite1 and Lite2, the student is Lite0. `flowers17` is the data set as
ROOT/{train,val}/CLASS/IMAGE with 60 and 20 pictures of a class. Seed s takes the labelled pictures
s * N to s * N + N - 1 of a class, in the order of a hash of their names. Runs continue where they
were stopped.
"""

import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import experiment_tables as tables
from benchmarks import experiments
from benchmarks.experiments import Config, Row
from benchmarks.subsets import Part, write_subset
from pipeline.config import DistillConfig, FinetuneConfig, PrecomputeConfig

STUDENT = "tf_efficientnet_lite0"
Method = Callable[[int, int], list[Config]]  # labelled pictures of a class, seed
TEACHERS = ("tf_efficientnet_lite1", "tf_efficientnet_lite2")


class Scale(NamedTuple):
    """Sizes of the experiment: pictures of a class, models, side of a view, epochs."""

    num_train: int = 60
    num_val: int = 20
    student: str = STUDENT
    teachers: Sequence[str] = TEACHERS
    img_size: int = 128
    larger_size: int = 160  # of the views of some teachers
    num_views: int = 3
    distill_epochs: int = 3
    # of fine-tuning, by the number of labelled pictures of a class
    epochs: Sequence[tuple[int, int]] = ((5, 15), (10, 8), (30, 5), (60, 3))
    labelled: Sequence[int] = (5, 10)


class Experiment:
    """The data sets, runs and rows in the folder ``output``."""

    def __init__(self, data_dir: Path, weights: Path | None, output: Path, scale: Scale) -> None:
        self.data_dir = data_dir
        self.weights = weights
        self.output = output
        self.scale = scale

    # --- data -------------------------------------------------------------------------------------

    def labelled(self, number: int, first: int) -> Path:
        """Return a data set with ``number`` labelled pictures of each class."""
        parts = {"train": Part("train", number, first), "val": Part("val", self.scale.num_val)}
        return self._subset(f"labelled-{number}-from-{first}", parts)

    def rest(self, number: int, first: int) -> tuple[Path, ...]:
        """Return the folders of all other training pictures; their class names are not read."""
        end = first + number
        parts = {
            "before": Part("train", first),
            "after": Part("train", self.scale.num_train - end, end),
        }
        parts = {name: part for name, part in parts.items() if part.per_class}
        folder = self._subset(f"without-{number}-from-{first}", parts)
        return tuple(folder / name for name in parts)

    def _subset(self, name: str, parts: dict[str, Part]) -> Path:
        return write_subset(self.data_dir, self.output / "data" / name, parts)

    # --- runs -------------------------------------------------------------------------------------

    def finetune(
        self, name: str, data_dir: Path, model: str, *, seed: int = 0, **settings: Any
    ) -> FinetuneConfig:
        """Return the config of a run with class labels."""
        start = settings.pop("start", self._pretrained(model))
        return FinetuneConfig(
            data_dir=data_dir,
            model=model,
            pretrained=False,
            initial_checkpoint=start,
            output=self.output / name,
            seed=seed,
            **self._training(settings),
        )

    def _pretrained(self, model: str) -> Path | None:
        return None if self.weights is None else self.weights / model

    def _training(self, settings: dict[str, Any]) -> dict[str, Any]:
        common = {
            **experiments.COMMON,
            "img_size": self.scale.img_size,
            "scale": (0.25, 1.0),
            "batch_size": 16,
            "lr": 0.005,
            "sched": "cosine",
            "sched_on_updates": True,
            "val_interval": 1000,
        }
        return common | settings

    def start(self, number: int, seed: int) -> FinetuneConfig:
        """Return the run of the student on a few labelled pictures."""
        data_dir = self.labelled(number, number * seed)
        return self.finetune(
            f"seed-{seed}/hard-{number}",
            data_dir,
            self.scale.student,
            seed=seed,
            epochs=dict(self.scale.epochs)[number],
        )

    def teachers(
        self, name: str, data_dir: Path, number: int, **settings: Any
    ) -> list[FinetuneConfig]:
        """Return the runs of both teachers on ``number`` labelled pictures of a class."""
        epochs = dict(self.scale.epochs)[number]
        return [
            self.finetune(f"{name}/{model}", data_dir, model, epochs=epochs, **settings)
            for model in self.scale.teachers
        ]

    def labels(
        self,
        name: str,
        data_dir: Path,
        teachers: Sequence[FinetuneConfig],
        extra_data: tuple[Path, ...] = (),
    ) -> PrecomputeConfig:
        """Return stage one: soft labels of a data set and pictures without labels."""
        return PrecomputeConfig(
            data_dir=data_dir,
            extra_data=extra_data,
            teacher=tuple(f"{run.model}={run.output}" for run in teachers),
            num_views=self.scale.num_views,
            img_size=self.scale.img_size,
            scale=(0.25, 1.0),
            workers=0,
            output=self.output / name,
        )

    def distill(
        self, name: str, labels: PrecomputeConfig, start: FinetuneConfig, seed: int
    ) -> DistillConfig:
        """Return stage two, from the student of a few labelled pictures."""
        settings = self._training({"epochs": self.scale.distill_epochs})
        for of_labels in ("img_size", "scale"):
            del settings[of_labels]
        return DistillConfig(
            data_dir=labels.data_dir,
            extra_data=labels.extra_data,
            labels=str(labels.output),
            model=self.scale.student,
            pretrained=False,
            initial_checkpoint=start.output,
            output=self.output / name,
            seed=seed,
            **settings,
        )

    # --- rows -------------------------------------------------------------------------------------

    def hard(self, number: int, seed: int) -> list[Config]:
        """Hard labels on the few labelled pictures."""
        return [self.start(number, seed)]

    def hard_longer(self, number: int, seed: int) -> list[Config]:
        """Hard labels on the few labelled pictures, for as many steps more as ``soft``."""
        start = self.start(number, seed)
        epochs = self.scale.distill_epochs * self.scale.num_train // number
        longer = self.finetune(
            f"seed-{seed}/hard-{number}-longer",
            Path(str(start.data_dir)),
            self.scale.student,
            seed=seed,
            start=start.output,
            epochs=epochs,
        )
        return [start, longer]

    def soft(self, number: int, seed: int) -> list[Config]:
        """Soft labels on all pictures; the teachers had the same few labels."""
        return self._soft_of_few("", number, seed)

    def soft_larger(self, number: int, seed: int) -> list[Config]:
        """The same with teachers that see larger views, as their labels do."""
        return self._soft_of_few("-larger", number, seed, img_size=self.scale.larger_size)

    def _soft_of_few(self, suffix: str, number: int, seed: int, **settings: Any) -> list[Config]:
        start = self.start(number, seed)
        data_dir, name = Path(str(start.data_dir)), f"seed-{seed}/teachers-{number}{suffix}"
        teachers = self.teachers(name, data_dir, number, **settings)
        rest = self.rest(number, number * seed)
        labels = self.labels(f"{name}/labels", data_dir, teachers, rest)
        student = self.distill(f"seed-{seed}/soft-{number}{suffix}", labels, start, seed)
        return [start, *teachers, labels, student]

    def hard_all(self, number: int, seed: int) -> list[Config]:
        """Hard labels on all pictures, from the student of a few."""
        start = self.start(number, seed)
        student = self.finetune(
            f"seed-{seed}/hard-{number}-then-all",
            self.labelled(self.scale.num_train, 0),
            self.scale.student,
            seed=seed,
            start=start.output,
            epochs=self.scale.distill_epochs,
        )
        return [start, student]

    def soft_all(self, number: int, seed: int) -> list[Config]:
        """Soft labels on all pictures; the teachers had all labels."""
        start = self.start(number, seed)
        data_dir = self.labelled(self.scale.num_train, 0)
        teachers = self.teachers("teachers-all", data_dir, self.scale.num_train)
        labels = self.labels("teachers-all/labels", data_dir, teachers)
        return [
            start,
            *teachers,
            labels,
            self.distill(f"seed-{seed}/soft-all", labels, start, seed),
        ]

    def soft_apart(self, number: int, seed: int) -> list[Config]:
        """Soft labels on the first half; the teachers had the labels of the second."""
        start = self.start(number, seed)
        half = self.scale.num_train // 2
        teachers = self.teachers("teachers-half", self.labelled(half, half), half)
        labels = self.labels("teachers-half/labels", self.labelled(half, 0), teachers)
        student = self.distill(f"seed-{seed}/soft-apart-{number}", labels, start, seed)
        return [start, *teachers, labels, student]

    def rows(self) -> list[Row]:
        """Return the rows of the table; each name ends with the labelled pictures of a class."""
        few, more = self.scale.labelled
        total, half = self.scale.num_train, self.scale.num_train // 2
        hard = "hard labels on {} a class"
        soft = f"soft labels on {total} a class; teachers had {{}}"
        larger = soft.format(f"the labels of {few}, at {self.scale.larger_size} pixels")
        apart = f"soft labels on {half} a class; teachers had the labels of {half} others"

        def row(
            make: Method, number: int, title: str, reference: str = "", is_quick: bool = True
        ) -> Row:
            name = make.__name__.replace("_", "-")
            return Row(f"{name}-{number}", title, partial(make, number), reference, is_quick)

        return [
            row(self.hard, few, hard.format(few)),
            row(self.hard_longer, few, "the same, as many steps more", f"hard-{few}"),
            row(self.soft_apart, few, apart, f"hard-{few}"),
            row(self.soft_all, few, soft.format("all labels"), f"hard-{few}"),
            row(self.hard_all, few, hard.format(total), f"soft-all-{few}"),
            row(self.soft, few, soft.format(f"the labels of {few}"), f"hard-{few}", False),
            row(self.soft_larger, few, larger, f"hard-{few}", False),
            row(self.hard, more, hard.format(more)),
            row(self.soft_apart, more, apart, f"hard-{more}"),
            row(self.soft, more, soft.format(f"the labels of {more}"), f"hard-{more}", False),
        ]


def main(words: Sequence[str] | None = None) -> None:
    """Make the runs and print the table."""
    parser = tables.parser(__doc__)
    parser.add_argument("--weights", type=Path, required=True, help="folders of ImageNet weights")
    options = parser.parse_args(words)
    experiment = Experiment(options.data_dir, options.weights, options.output, Scale())
    rows = tables.chosen(experiment.rows(), options)
    tables.run_rows(rows, options)


if __name__ == "__main__":
    tables.exit_with_message(main)
