"""The rates of this machine as GPU-hours for ImageNet, by stage and recipe."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from mealv2 import recipes
from mealv2.models import create_classifier
from pipeline import console
from pipeline.bench.context import NUM_CLASSES, BenchContext
from pipeline.bench.steps import train_step, workload
from pipeline.timing import repeated, timed, times_for

IMAGES = 1_281_167
VIEWS = (30, 180)
_TURN_S = 2.0


def gpu_hours(bench: BenchContext) -> dict[str, Any]:
    """Measure the student and teachers of every recipe; print and return GPU-hours."""
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
        view_h = IMAGES / rates[teachers, size] / 3600  # to label one view of each image
        stored_h = epochs * IMAGES / rates[step] / 3600
        rows.append(
            {
                "recipe": name,
                "student": step[0],
                "img_size": size,
                "epochs": epochs,
                **{f"stage_one_{v}_views_h": round(v * view_h, 1) for v in VIEWS},
                "stage_two_h": round(stored_h, 1),
                "online_h": round(stored_h + epochs * view_h, 1),
            }
        )
    head = ["ImageNet, GPU-hours", "epochs", *(f"stage one, {v} views" for v in VIEWS)]
    cells = [[row["recipe"], *(str(value) for value in list(row.values())[3:])] for row in rows]
    console.info(console.table([[*head, "stage two", "online"], *cells]))
    return {"images": IMAGES, "precision": bench.runtime.precision, "recipes": rows}


def teachers_rate(bench: BenchContext, names: Sequence[str], img_size: int) -> float:
    """Return the views per second that an ensemble labels."""
    ensemble = bench.create_ensemble(names, img_size)

    def forward(batch_size: int) -> Callable[[], int]:
        images_BCHW = bench.random_images(batch_size, img_size)

        def work() -> int:
            with torch.inference_mode(), bench.runtime.autocast():
                ensemble(images_BCHW)
            return batch_size

        return work

    return rate_of(bench, forward)


def step_rate(bench: BenchContext, name: str, img_size: int) -> float:
    """Return the images per second that a student trains on, with stored labels."""
    student = create_classifier(name, num_classes=NUM_CLASSES, img_size=img_size)
    step = train_step(bench, student, "stored", img_size=img_size)
    return rate_of(bench, lambda batch_size: workload(bench, step, batch_size))


def rate_of(bench: BenchContext, create: Callable[[int], Callable[[], int]]) -> float:
    """Return the views per second of the workload that ``create`` returns for a batch size.

    The batch is the largest that fits into memory: that of the config, or a half, a quarter, ...
    """
    batch_size = bench.batch_size
    while True:
        try:
            work = create(batch_size)
            times = times_for(work, bench.device, seconds=_TURN_S)
            return timed(repeated(work, times), bench.device).rate
        except torch.cuda.OutOfMemoryError:
            batch_size //= 2
            if batch_size < 2:
                raise
            torch.cuda.empty_cache()
