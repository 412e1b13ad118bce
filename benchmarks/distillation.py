"""The runs of an experiment: fine-tuned teachers, label sets, starts, students."""

import argparse
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.experiments import COMMON, Config, Row
from benchmarks.mean_logits import MeanLogitsConfig
from benchmarks.subsets import Part, write_subset
from pipeline.config import (
    DistillConfig,
    FinetuneConfig,
    LabelsConvertConfig,
    LabelsMergeConfig,
    PrecomputeConfig,
)

VIEWS = {"crop": "pad"}  # CIFAR's, with flips
DENSE: dict[str, Any] = {"topk": "all", "label_dtype": "float32"}
# training from random weights: teachers, and the start of a student
SCRATCH: dict[str, Any] = {"pretrained": False, "lr": 0.1, "weight_decay": 5e-4}


@dataclass(frozen=True)
class Teacher:
    """A teacher: its folder, its model, and settings of its training."""

    name: str
    model: str
    settings: Mapping[str, Any]


@dataclass(frozen=True)
class Setting:
    """The sizes of an experiment: images per class, pixels, epochs, rates."""

    student: str
    teachers: tuple[Teacher, ...]  # those to train
    img_size: int
    images: int  # per class
    val_images: int
    val_split: str
    teacher_images: int = 0  # those of the student are among them
    epochs: int = 12
    larger_img_size: int = 48  # of the rows with larger views
    teacher_img_size: int = 64  # of teachers that --teacher names
    weak_teacher: str = "test_resnet"
    batch_size: int = 64
    lr: float = 0.03
    teacher_epochs: int = 5
    teacher_lr: float = 0.02  # of teachers that --teacher names
    weak_epochs: int = 2


@dataclass(frozen=True)
class Bench:
    """The folder of an experiment, and the configs of its runs."""

    output: Path
    setting: Setting
    class_map: Path | None = None  # as --class-map

    @property
    def data(self) -> Path:
        """The folder of the images: teacher-train if teachers are trained, train, val."""
        return self.output / "data"

    @property
    def images(self) -> dict[str, Any]:
        """The settings of a run on the images."""
        return {"data_dir": self.data, "class_map": self.class_map}

    def write_images(self, data_dir: Path) -> None:
        """Write the images of the experiment; raises ConfigError as ``write_subset``."""
        s = self.setting
        parts = {"train": Part("train", s.images), "val": Part(s.val_split, s.val_images)}
        if s.teachers:
            parts["teacher-train"] = Part("train", s.teacher_images)
        write_subset(data_dir, self.data, parts)

    # --- teachers and labels ----------------------------------------------------------------------

    def teacher(self, teacher: Teacher) -> FinetuneConfig:
        """Return the run of a teacher, on the images of the teachers."""
        given = {"img_size": self.setting.img_size, "epochs": self.setting.teacher_epochs}
        return FinetuneConfig(
            **self.images,
            output=self.output / "teachers" / teacher.name,
            model=teacher.model,
            train_split="teacher-train",
            batch_size=self.setting.batch_size,
            sched="cosine",
            recovery_interval=50,
            **{**COMMON, "sched_on_updates": True},
            **VIEWS,
            **(given | dict(teacher.settings)),
        )

    def teachers(self) -> list[FinetuneConfig]:
        """Return the runs of the ensemble's teachers."""
        return [self.teacher(each) for each in self.setting.teachers]

    def labels(self, name: str, teachers: Sequence[str], **settings: Any) -> PrecomputeConfig:
        """Return the run of stage one with teachers as --teacher; by default dense float32."""
        s = self.setting
        given = {"img_size": s.img_size, "num_views": s.epochs, **VIEWS, **settings}
        return PrecomputeConfig(
            **self.images,
            output=self.output / "labels" / name,
            teacher=tuple(teachers),
            workers=0,
            job_index=0,  # one job, whatever the environment is
            num_jobs=1,
            **(given if given.keys() & {"rate", "topk"} else given | DENSE),
        )

    def dense(self) -> list[Config]:
        """Return the runs of the label set of all teachers; the labels come last.

        Each teacher labels alone, and the sets are averaged: its own set has a use too.
        """
        teachers = self.teachers()
        alone = [self.labels(f"of-{folder_name(each)}", specs([each])) for each in teachers]
        if len(alone) == 1:
            return [*teachers, *alone]
        folders = tuple(Path(str(each.output)) for each in alone)
        merged = LabelsMergeConfig(sets=folders, output=self.output / "labels" / "dense", **DENSE)
        return [*teachers, *alone, merged]

    def mean_of_logits(self) -> list[Config]:
        """Return the runs of the label set of the mean of the teachers' logits."""
        *alone, _ = self.dense()
        folders = tuple(Path(str(c.output)) for c in alone if isinstance(c, PrecomputeConfig))
        return [*alone, MeanLogitsConfig(folders, self.output / "labels" / "mean-logits")]

    def one_teacher(self, index: int) -> list[Config]:
        """Return the runs of the label set of one teacher."""
        teacher = self.teachers()[index]
        return [teacher, self.labels(f"of-{folder_name(teacher)}", specs([teacher]))]

    def weak(self) -> list[Config]:
        """Return the runs of the label set of the weak teacher."""
        s = self.setting
        settings = {**SCRATCH, "epochs": s.weak_epochs}
        teacher = self.teacher(Teacher("weak", s.weak_teacher, settings))
        return [teacher, self.labels("weak", specs([teacher]))]

    def converted(self, name: str, **encoding: Any) -> list[Config]:
        """Return the runs of the dense label set in another encoding."""
        return self.encoded(self.dense(), name, **encoding)

    def encoded(self, dense: Sequence[Config], name: str, **encoding: Any) -> list[Config]:
        """Return the runs of a label set, the last of ``dense``, in another encoding."""
        folder = self.output / "labels" / name
        convert = LabelsConvertConfig(labels=dense[-1].output, output=folder, **encoding)
        return [*dense, convert]

    def some_views(self, num_views: int) -> list[Config]:
        """Return the runs of the label set with fewer views."""
        teachers = self.teachers()
        return [*teachers, self.labels(f"views-{num_views}", specs(teachers), num_views=num_views)]

    # --- students ---------------------------------------------------------------------------------

    def start(self, seed: int, name: str = "hard", **settings: Any) -> FinetuneConfig:
        """Return the run of a student's start: hard labels, from random weights."""
        s = self.setting
        given = {
            "model": s.student,
            "img_size": s.img_size,
            "epochs": s.epochs,
            "val_interval": s.epochs,
            **SCRATCH,
            **VIEWS,
        }
        return FinetuneConfig(
            **self.images,
            output=self.output / "starts" / name / f"seed-{seed}",
            seed=seed,
            batch_size=s.batch_size,
            **COMMON,
            **(given | settings),
        )

    def soft(
        self, name: str, seed: int, labels: Sequence[Config], start: Config | None, **settings: Any
    ) -> list[Config]:
        """Return the runs of a student on soft labels: ``labels``, its start, and its own.

        ``start`` None is random weights; ``settings`` are those that the row is about.
        """
        made = [*labels] if start is None else [*labels, start]
        given = self._student(name, seed, start) | settings
        if not given.get("online"):
            given["labels"] = labels[-1].output
        return [*made, DistillConfig(**given)]

    def hard(self, name: str, seed: int, start: Config | None, **settings: Any) -> list[Config]:
        """Return the runs of a student on hard labels: the same views in the same order."""
        views = {"num_views": self.setting.epochs, "img_size": self.setting.img_size, **VIEWS}
        given = self._student(name, seed, start) | views | settings
        return [*([] if start is None else [start]), FinetuneConfig(**given)]

    def _student(self, name: str, seed: int, start: Config | None) -> dict[str, Any]:
        s = self.setting
        weights = {"pretrained": False} if start is None else {"initial_checkpoint": start.output}
        return {
            **self.images,
            "output": self.output / "rows" / name / f"seed-{seed}",
            "model": s.student,
            "seed": seed,
            "epochs": s.epochs,
            "batch_size": s.batch_size,
            "lr": s.lr,
            "weight_decay": 0.0,
            "val_interval": s.epochs,
            **weights,
            **COMMON,
        }

    # --- rows -------------------------------------------------------------------------------------

    def soft_row(
        self, name: str, title: str, *, reference: str = "soft", is_quick: bool = False, **s: Any
    ) -> Row:
        """Return a row that changes some settings of the reference: dense labels, hard start."""
        return Row(
            name,
            title,
            lambda seed: self.soft(name, seed, self.dense(), self.start(seed), **s),
            reference=reference,
            is_quick=is_quick,
        )


def specs(teachers: Sequence[FinetuneConfig]) -> tuple[str, ...]:
    """Return the values of --teacher for the runs of teachers."""
    return tuple(f"{each.model}={each.output}" for each in teachers)


def folder_name(config: FinetuneConfig) -> str:
    """Return the name of the folder of a run."""
    return Path(str(config.output)).name


def add_flags(parser: argparse.ArgumentParser, setting: Setting) -> None:
    """Add the flags that change a setting; the defaults are those of the published table."""
    parser.add_argument(
        "--teacher",
        action="append",
        metavar="NAME[=WEIGHTS]",
        help="timm models to use as teachers, with timm's weights or a file's",
    )
    for field in dataclasses.fields(Setting):
        if field.type in (int, float):
            kind = int if field.type is int else float
            default = getattr(setting, field.name)
            name = "--" + field.name.replace("_", "-")
            parser.add_argument(name, type=kind, default=default, help=f"default: {default}")


def setting_of(options: argparse.Namespace, setting: Setting, *, trained: bool = True) -> Setting:
    """Return the setting with the flags that were given; ``trained``: --teacher is fine-tuned."""
    names = [f.name for f in dataclasses.fields(Setting) if f.type in (int, float)]
    changed = dataclasses.replace(setting, **{name: getattr(options, name) for name in names})
    if not (options.teacher and trained):
        return changed
    teachers = tuple(fine_tuned(spec, changed) for spec in options.teacher)
    return dataclasses.replace(changed, teachers=teachers)


def fine_tuned(spec: str, setting: Setting) -> Teacher:
    """Return the teacher of NAME, with timm's weights, or NAME=WEIGHTS."""
    model, _, weights = spec.partition("=")
    start = {"initial_checkpoint": Path(weights)} if weights else {"pretrained": True}
    size, lr = setting.teacher_img_size, setting.teacher_lr
    return Teacher(model, model, {"img_size": size, "lr": lr, "weight_decay": 1e-4, **start})
