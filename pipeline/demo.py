"""The whole story on real images that come with a library: scikit-learn's handwritten digits.

A driver: it runs the stages one after another and shows what they came to (docs/adr/0005). Stages
that are finished are kept, so that a second call goes on where the first one stopped.
"""

import math
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
from PIL import Image

from mealv2.errors import ConfigError
from mealv2.storage.json_format import read_json
from pipeline import console, distill, finetune, precompute
from pipeline.config import (
    DemoConfig,
    DistillConfig,
    FinetuneConfig,
    PrecomputeConfig,
    current_names,
)
from pipeline.runtime.device import use_one_thread
from pipeline.training.run_folder import REPORT_NAME, has_checkpoint

# The setting of the story; docs/tutorial/demo.md says how it was found.
IMG_SIZE = 32
SPLITS = {"teacher-train": 1000, "train": 150}  # disjoint; the rest, 647 scans, is val
TEACHERS = ("resnet10t", "test_resnet")
TEACHER_EPOCHS = 60
TEACHER_BATCH_SIZE = 32
STUDENT = "test_efficientnet"
START_EPOCHS = 60
START_LR = 0.05
EPOCHS = 200
LR = 0.03
DISCRIMINATOR_LR = 1e-4
BATCH_SIZE = 16

_PARTS = ("teachers", "labels", "student start", "hard-label control", "distilled")


@dataclass
class DemoRun:
    """The reports of every stage, by part, and the seconds that this call spent on each."""

    config: DemoConfig
    data: Path
    reports: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def train(self, part: str, settings: FinetuneConfig | DistillConfig) -> Path:
        """Do a training run, go on with it, or take the report it left; return its folder."""
        assert settings.output is not None
        folder = settings.output
        console.info(f"\n== {part}: {folder}")
        began = time.monotonic()
        report = _finished(folder, settings)
        if report is None:
            if has_checkpoint(folder):
                settings = replace(settings, resume=folder)
            if isinstance(settings, DistillConfig):
                report = distill.run(settings)
            else:
                report = finetune.run(settings)
            self._count(part, began)
        self.reports.setdefault(part, []).append(report)
        return folder

    def label(self, settings: PrecomputeConfig) -> None:
        """Do stage one, as far as it is not done."""
        console.info(f"\n== labels: {settings.output}")
        began = time.monotonic()
        # all of it, also where the environment says that this is one of several jobs
        report = precompute.run(replace(settings, job_index=0, num_jobs=1))
        if report["shards_made"]:
            self._count("labels", began)
        self.reports["labels"] = [report]

    def figures(self, part: str, name: str) -> list[float]:
        """Return one figure of every run of a part."""
        return [report[name] for report in self.reports[part]]

    def _count(self, part: str, began: float) -> None:
        self.seconds[part] = self.seconds.get(part, 0.0) + time.monotonic() - began


def run(config: DemoConfig) -> dict[str, Any]:
    """Tell the story; return its figures. Raises MealError and OSError."""
    use_one_thread()
    demo = DemoRun(config, write_digits(config.output / "data"))
    hardware: dict[str, Any] = {"device": config.device, "workers": config.workers}
    base: dict[str, Any] = {
        "data_dir": demo.data,
        "val_interval": 10,
        "log_interval": 10,
        **hardware,
    }

    teachers = [
        demo.train(
            "teachers",
            FinetuneConfig(
                **base,
                model=name,
                train_split="teacher-train",
                pretrained=False,
                img_size=IMG_SIZE,
                epochs=TEACHER_EPOCHS,
                batch_size=TEACHER_BATCH_SIZE,
                lr=START_LR,
                weight_decay=5e-4,
                output=config.output / f"teacher-{name}",
            ),
        )
        for name in TEACHERS
    ]
    labels = config.output / "labels"
    demo.label(
        PrecomputeConfig(
            data_dir=demo.data,
            output=labels,
            teacher=tuple(f"{n}={f}" for n, f in zip(TEACHERS, teachers, strict=True)),
            num_views=EPOCHS,
            img_size=IMG_SIZE,
            topk="all",  # of ten classes there is nothing to leave out
            **hardware,
        )
    )
    for seed in range(config.seeds):
        folder = config.output / f"seed-{seed}"
        start = demo.train(
            "student start",
            FinetuneConfig(
                **base,
                model=STUDENT,
                pretrained=False,
                img_size=IMG_SIZE,
                epochs=START_EPOCHS,
                batch_size=BATCH_SIZE,
                lr=START_LR,
                seed=seed,
                output=folder / "start",
            ),
        )
        # the two arms see the same views in the same order and differ in who labels them
        arm = {**base, "model": STUDENT, "initial_checkpoint": start, "epochs": EPOCHS, "lr": LR}
        arm |= {"seed": seed, "weight_decay": 0.0, "batch_size": BATCH_SIZE}
        demo.train(
            "hard-label control",
            FinetuneConfig(
                **arm, img_size=IMG_SIZE, num_views=EPOCHS, output=folder / "hard-labels"
            ),
        )
        demo.train(
            "distilled",
            DistillConfig(
                **arm,
                labels=labels,
                discriminator_lr=DISCRIMINATOR_LR,
                output=folder / "distilled",
            ),
        )
    report = _report(demo)
    console.info("\n" + _table(demo, report))
    return report


def write_digits(folder: Path) -> Path:
    """Write the digits as an ImageFolder and return it: 1,000 scans for the teachers, 150 others
    for the students, 647 for validation.

    The 8 x 8 scans are enlarged to 32 x 32 pixels, bicubic, so that a crop of 8 % shows something.
    The split is a fixed permutation. Raises ConfigError without scikit-learn.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise ConfigError("the demo needs scikit-learn: pip install 'mealv2[demo]'") from None
    digits = load_digits()
    order = np.random.RandomState(0).permutation(len(digits.images))
    splits = [name for name, size in SPLITS.items() for _ in range(size)]
    for rank, number in enumerate(order):
        split = splits[rank] if rank < len(splits) else "val"
        path = folder / split / str(digits.target[number]) / f"{number:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        scan = (digits.images[number] * (255 / 16)).round().astype(np.uint8)
        Image.fromarray(scan).resize((IMG_SIZE, IMG_SIZE), Image.Resampling.BICUBIC).save(path)
    return folder


def interval(differences: list[float]) -> tuple[float, float] | None:
    """Return the 95 % interval of the mean (Student's t); None with fewer than two values."""
    from scipy.stats import t  # comes with scikit-learn

    n = len(differences)
    if n < 2:
        return None
    half = float(t.ppf(0.975, n - 1)) * stdev(differences) / math.sqrt(n)
    return mean(differences) - half, mean(differences) + half


def _finished(folder: Path, settings: FinetuneConfig | DistillConfig) -> dict[str, Any] | None:
    """Return the report of a run that is done; raises ConfigError where it is another run."""
    if not has_checkpoint(folder):
        return None
    expected = {**settings.as_json(), "output": None, "resume": None}
    kept = current_names(type(settings), read_json(folder / "config.json"))
    free = ("workers", "device")
    if any(kept.get(name) != value for name, value in expected.items() if name not in free):
        raise ConfigError(f"{folder} holds a run with other settings; give another --output")
    report = folder / REPORT_NAME
    return dict(read_json(report)) if report.exists() else None


def _report(demo: DemoRun) -> dict[str, Any]:
    control = demo.figures("hard-label control", "top1")
    distilled = demo.figures("distilled", "top1")
    differences = [d - c for d, c in zip(distilled, control, strict=True)]
    labels = demo.reports["labels"][0]
    return {
        "output": str(demo.config.output),
        "seeds": demo.config.seeds,
        "teachers": [
            {"model": t["model"], "top1": t["top1"]} for t in labels["accuracy"]["teachers"]
        ],
        "ensemble": labels["accuracy"]["ensemble"]["top1"],
        "start": demo.figures("student start", "top1"),
        "control": control,
        "distilled": distilled,
        "difference": mean(differences),
        "interval_95": interval(differences),
        "label_bytes": labels["bytes"],
        "label_views": labels["views"],
        "seconds": {part: round(s, 1) for part, s in demo.seconds.items()},
    }


def _table(demo: DemoRun, report: dict[str, Any]) -> str:
    """Return the story as a table and a few lines."""
    rows = [["", "top-1 %", "per seed"]]
    for teacher in report["teachers"]:
        rows.append([f"teacher {teacher['model']}", f"{teacher['top1']:.2f}", ""])
    rows.append(["ensemble", f"{report['ensemble']:.2f}", ""])
    for title, name in (
        (f"student {STUDENT} at start", "start"),
        ("hard-label control", "control"),
        ("distilled", "distilled"),
    ):
        each = " ".join(f"{value:.2f}" for value in report[name])
        rows.append([title, f"{mean(report[name]):.2f}", each])
    lines = [console.table(rows), ""]
    between = report["interval_95"]
    spread = (
        f"95 % interval {between[0]:+.2f} to {between[1]:+.2f}, {report['seeds']} seeds"
        if between
        else "one seed says little: --seeds 5 gives an interval"
    )
    lines.append(f"distilled - hard-label control: {report['difference']:+.2f} points ({spread})")
    per_view = report["label_bytes"] / report["label_views"]
    lines.append(
        f"label set: {report['label_views']} views of {SPLITS['train']} images in "
        f"{console.size_of(report['label_bytes'])}, {per_view:.0f} bytes a view"
    )
    times = [
        f"{part} {console.duration(demo.seconds[part])}" if part in demo.seconds else f"{part} kept"
        for part in _PARTS
    ]
    lines.append("time: " + ", ".join(times))
    return "\n".join(lines)
