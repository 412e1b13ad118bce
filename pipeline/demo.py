"""Run both stages on scikit-learn's handwritten digits and compare with hard labels.

It drives the other commands (docs/adr/0005). A second call keeps finished runs and resumes others.
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

# docs/tutorial/demo.md describes how these settings were found.
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
    """The reports of all runs by part, and the seconds that this call spent on each part."""

    config: DemoConfig
    data: Path
    reports: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def finetune(self, part: str, name: str, **settings: Any) -> Path:
        """Train on hard labels in the folder ``name``; see ``_train``."""
        settings = {"img_size": IMG_SIZE, **settings}
        return self._train(part, FinetuneConfig(**self._common(name), **settings))

    def distill(self, part: str, name: str, **settings: Any) -> Path:
        """Distil in the folder ``name``; see ``_train``."""
        return self._train(part, DistillConfig(**self._common(name), **settings))

    def _common(self, name: str) -> dict[str, Any]:
        config = self.config
        hardware = {"device": config.device, "workers": config.workers}
        intervals = {"val_interval": 10, "log_interval": 10}
        # the arms are compared on one schedule, after the same number of steps
        equal = {"select": "last", "sched_on_updates": False}
        where = {"data_dir": self.data, "output": config.output / name}
        return {**where, **equal, **intervals, **hardware}

    def _train(self, part: str, settings: FinetuneConfig | DistillConfig) -> Path:
        """Start or resume a run, or take the report of a finished one; return its folder."""
        folder = settings.output
        assert folder is not None
        console.info(f"\n== {part}: {folder}")
        start_s = time.monotonic()
        report = _finished(folder, settings)
        if report is None:
            if has_checkpoint(folder):
                settings = replace(settings, resume=folder)
            if isinstance(settings, DistillConfig):
                report = distill.run(settings)
            else:
                report = finetune.run(settings)
            self._add_seconds(part, start_s)
        self.reports.setdefault(part, []).append(report)
        return folder

    def label(self, teachers: list[Path]) -> Path:
        """Create the missing labels of stage one; return the label set."""
        folder = self.config.output / "labels"
        console.info(f"\n== labels: {folder}")
        start_s = time.monotonic()
        settings = PrecomputeConfig(
            data_dir=self.data,
            output=folder,
            teacher=tuple(f"{n}={f}" for n, f in zip(TEACHERS, teachers, strict=True)),
            num_views=EPOCHS,
            img_size=IMG_SIZE,
            topk="all",  # ten classes are few enough to store
            device=self.config.device,
            workers=self.config.workers,
            job_index=0,  # one job, whatever the environment is
            num_jobs=1,
        )
        report = precompute.run(settings)
        if report["shards_made"]:
            self._add_seconds("labels", start_s)
        self.reports["labels"] = [report]
        return folder

    def figures(self, part: str, name: str) -> list[float]:
        """Return one figure of every run of a part."""
        return [report[name] for report in self.reports[part]]

    def _add_seconds(self, part: str, start_s: float) -> None:
        self.seconds[part] = self.seconds.get(part, 0.0) + time.monotonic() - start_s


def run(config: DemoConfig) -> dict[str, Any]:
    """Run the demo; print and return its figures. Raises MealError and OSError."""
    use_one_thread()
    demo = DemoRun(config, write_digits(config.output / "data"))
    teachers = [
        demo.finetune(
            "teachers",
            f"teacher-{name}",
            model=name,
            train_split="teacher-train",
            pretrained=False,
            epochs=TEACHER_EPOCHS,
            batch_size=TEACHER_BATCH_SIZE,
            lr=START_LR,
            weight_decay=5e-4,
        )
        for name in TEACHERS
    ]
    labels = demo.label(teachers)
    for seed in range(config.seeds):
        common = {"model": STUDENT, "seed": seed, "batch_size": BATCH_SIZE}
        start = demo.finetune(
            "student start",
            f"seed-{seed}/start",
            **common,
            pretrained=False,
            epochs=START_EPOCHS,
            lr=START_LR,
        )
        # both arms see the same views in the same order; only the labels differ
        common |= {"initial_checkpoint": start, "epochs": EPOCHS, "lr": LR, "weight_decay": 0.0}
        demo.finetune("hard-label control", f"seed-{seed}/hard-labels", **common, num_views=EPOCHS)
        demo.distill(
            "distilled",
            f"seed-{seed}/distilled",
            **common,
            labels=labels,
            discriminator_lr=DISCRIMINATOR_LR,
        )
    report = _report(demo)
    console.info("\n" + _table(demo, report))
    return report


def write_digits(folder: Path) -> Path:
    """Write the digits as an ImageFolder: 1,000 for the teachers, 150 others to train, 647 val.

    The 8 x 8 scans are resized to 32 x 32 pixels, bicubic, so that a crop of 8 % shows something.
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
    """Return the report of a finished run; raises ConfigError if its settings differ."""
    if not has_checkpoint(folder):
        return None
    expected = {**settings.as_json(), "output": None, "resume": None}
    kept = current_names(type(settings), read_json(folder / "config.json"))
    free = ("workers", "device")
    if any(kept.get(name) != value for name, value in expected.items() if name not in free):
        raise ConfigError(f"{folder} has a run with other settings; give another --output")
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
    """Return the figures as a table and a few lines."""
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
        else "one seed proves little: --seeds 5 gives an interval"
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
