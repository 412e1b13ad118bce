"""Hard-label training with the same loop: teachers on own data, a student's start, the control."""

from typing import Any

from mealv2.images import open_source
from mealv2.targets import HardLabels
from mealv2.task import HardLabelTask
from mealv2.views import DrawnViews
from pipeline import runtime, training
from pipeline.config import FinetuneConfig
from pipeline.evaluation import Evaluator, open_split
from pipeline.runtime import Runtime
from pipeline.work import Work, make_student


def run(config: FinetuneConfig) -> dict[str, Any]:
    """Fine-tune; return the report. Raises MealError and OSError, see training.train."""
    with runtime.joined(config) as machine:
        return _finetune(config, machine)


def _finetune(config: FinetuneConfig, machine: Runtime) -> dict[str, Any]:
    source = open_source(config.data_dir, config.split)
    val = open_split(config.data_dir, config.val_split, classes=source.classes)
    runtime.seed_everything(config.seed)
    student = make_student(config, classes=source.classes, img_size=config.img_size)
    work = Work(
        command="finetune",
        task=HardLabelTask(student),
        student=student,
        source=source,
        positions=list(range(len(source))),
        targets=HardLabels(source.labels, num_views=config.num_views, seed=config.seed),
        img_size=config.img_size,
        views=DrawnViews(config.view_seed),
        resize=config.resize,
        evaluator=None
        if val is None
        else Evaluator(val, machine, config, img_size=config.img_size, resize=config.resize),
    )
    return training.train(config, machine, work)
