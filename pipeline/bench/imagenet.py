"""What the rates of this machine mean for ImageNet: hours of one GPU, by stage and recipe."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from mealv2 import recipes
from mealv2.models import create_classifier
from mealv2.models.discriminator import Discriminator
from mealv2.models.ensemble import TeacherEnsemble
from mealv2.soft_labels import SoftLabels
from mealv2.targets import BatchTargets
from mealv2.task import DistillTask
from pipeline import console
from pipeline.bench.room import NUM_CLASSES, BenchContext, calibrate
from pipeline.timing import repeated, timed, times_for

IMAGES = 1_281_167
VIEWS = (30, 180)
_TURN_S = 2.0


def gpu_hours(bench: BenchContext) -> dict[str, Any]:
    """Measure every student and every ensemble of the recipes; say and return GPU-hours."""
    console.info("measuring the students and teachers of every recipe")
    rates: dict[Any, float] = {}
    rows = []
    for name in recipes.names():
        recipe = recipes.load(name)
        size = int(recipe.teachers.get("img_size", bench.config.img_size))
        teachers = tuple(recipe.teachers.get("teacher", ()))
        epochs = int(recipe.distill["epochs"])
        step = (recipe.distill["model"], size)
        if step not in rates:
            rates[step] = step_rate(bench, *step)
        if (teachers, size) not in rates:
            rates[teachers, size] = teachers_rate(bench, teachers, size)
        teacher_rate = rates[teachers, size]
        stored = epochs * IMAGES / rates[step] / 3600
        online = stored + epochs * IMAGES / teacher_rate / 3600
        rows.append(
            {
                "recipe": name,
                "student": step[0],
                "img_size": size,
                "epochs": epochs,
                **{
                    f"stage_one_{v}_views_h": round(v * IMAGES / teacher_rate / 3600, 1)
                    for v in VIEWS
                },
                "stage_two_h": round(stored, 1),
                "online_h": round(online, 1),
            }
        )
    _print_table(rows)
    return {"images": IMAGES, "precision": bench.runtime.precision, "recipes": rows}


def teachers_rate(bench: BenchContext, names: Sequence[str], img_size: int) -> float:
    """Return views a second that an ensemble answers."""
    models = []
    for name in names:
        models.append(create_classifier(name, num_classes=NUM_CLASSES, img_size=img_size))
        calibrate(models[-1], img_size)
    ensemble = bench.runtime.to_device(TeacherEnsemble(models))

    def student_logits(images_BCHW: torch.Tensor) -> None:
        with torch.inference_mode(), bench.runtime.autocast():
            ensemble(images_BCHW)

    return _rate(bench, student_logits, img_size)


def step_rate(bench: BenchContext, name: str, img_size: int) -> float:
    """Return images a second that a student learns from, labels and images on the device."""
    student = create_classifier(name, num_classes=NUM_CLASSES, img_size=img_size)
    task = bench.runtime.to_device(
        DistillTask(student, Discriminator(NUM_CLASSES, "paper"))
    ).train()
    optimizer = torch.optim.SGD(task.parameters(), lr=1e-4, momentum=0.9, fused=True)

    def step(images_BCHW: torch.Tensor) -> None:
        even = torch.full((len(images_BCHW), NUM_CLASSES), 1.0 / NUM_CLASSES, device=bench.device)
        with bench.runtime.autocast():
            loss = task(images_BCHW, BatchTargets(SoftLabels.from_dense(even)))["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return _rate(bench, step, img_size)


def _rate(
    bench: BenchContext, student_logits: Callable[[torch.Tensor], None], img_size: int
) -> float:
    """Return views a second of the largest batch that fits, up to the room's."""
    batch_size = bench.batch_size
    while True:
        try:
            return _rate_of(bench, student_logits, (batch_size, img_size, img_size, 3))
        except torch.cuda.OutOfMemoryError:
            batch_size //= 2
            if batch_size < 2:
                raise
            torch.cuda.empty_cache()


def _rate_of(
    bench: BenchContext, student_logits: Callable[[torch.Tensor], None], shape: tuple[int, ...]
) -> float:
    pixels = torch.randint(0, 256, shape, dtype=torch.uint8)
    images_BCHW = pixels.permute(0, 3, 1, 2).to(bench.device)

    def work() -> int:
        student_logits(images_BCHW)
        return len(images_BCHW)

    times = times_for(work, bench.device, seconds=_TURN_S)
    return timed(repeated(work, times), bench.device).rate


def _print_table(rows: list[dict[str, Any]]) -> None:
    head = ["ImageNet, GPU-hours", "epochs", *(f"stage one, {v} views" for v in VIEWS)]
    cells = [[row["recipe"], *(str(row[name]) for name in list(row)[3:])] for row in rows]
    console.info(console.table([[*head, "stage two", "online"], *cells]))
