"""Train on hard labels: teachers, the start of a student, or the control of an experiment."""

from typing import Any

from mealv2.targets import HardLabels
from mealv2.task import HardLabelTask
from mealv2.views import DrawnViews
from pipeline.config import FinetuneConfig
from pipeline.loading.small_images import propose_crop
from pipeline.loading.sources import held_out_of, open_images, open_split, warn_single_class
from pipeline.runtime.device import Runtime, distributed_runtime
from pipeline.runtime.seeds import seed_everything
from pipeline.training.evaluator import Evaluator
from pipeline.training.image_list import with_deleted
from pipeline.training.loop import train
from pipeline.training.spec import TrainingSpec, create_student, mixing_of


def run(config: FinetuneConfig) -> dict[str, Any]:
    """Fine-tune and return the report. Raises as training.loop.train."""
    with distributed_runtime(config) as runtime:
        return _finetune(config, runtime)


def _finetune(config: FinetuneConfig, runtime: Runtime) -> dict[str, Any]:
    held_out = held_out_of(config, train_split=config.train_split)
    source = open_images(config, config.data_dir, config.train_split, held_out=held_out)
    source = with_deleted(config, source)
    warn_single_class(source)
    classes = list(source.classes)
    val = open_split(config, config.data_dir, config.val_split, train=source, held_out=held_out)
    seed_everything(config.seed)
    student = create_student(config, classes=classes, img_size=config.img_size)
    if config.resume is None:
        propose_crop(config, source, config.data_dir)
    spec = TrainingSpec(
        command="finetune",
        task=HardLabelTask(student, smoothing=config.smoothing),
        student=student,
        source=source,
        positions=list(range(len(source))),
        targets=HardLabels(source.labels, num_views=config.num_views, seed=config.seed),
        img_size=config.img_size,
        views=DrawnViews(config.view_seed, config.view_recipe),
        resize=config.resize,
        mixing=mixing_of(config),
        evaluator=None
        if val is None
        else Evaluator(val, runtime, config, img_size=config.img_size, resize=config.resize),
    )
    return train(config, runtime, spec)
