"""MEAL V2 as a library: label views with teachers once, then distil students from the labels.

The names in ``__all__`` are public; each is imported when it is first used, so that the command
line starts without torch. More is in the submodules (``mealv2.views``, ``mealv2.codec``, …).
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from mealv2.version import __version__

if TYPE_CHECKING:
    from mealv2.data.folder import UnorderedSource
    from mealv2.data.source import ImageSource
    from mealv2.dataset import EpochBatchSampler, SoftLabelDataset, collate
    from mealv2.errors import MealError
    from mealv2.label_set import LabelSet
    from mealv2.labelling.annotate import annotate
    from mealv2.losses import discriminator_loss, similarity_loss
    from mealv2.models import Classifier, create_classifier, save_classifier
    from mealv2.models.discriminator import Discriminator
    from mealv2.report.run import Run, open_run
    from mealv2.task import DistillTask
    from mealv2.timm_task import SoftLabelTask

__all__ = [
    "Classifier",
    "Discriminator",
    "DistillTask",
    "EpochBatchSampler",
    "ImageSource",
    "LabelSet",
    "MealError",
    "Run",
    "SoftLabelDataset",
    "SoftLabelTask",
    "UnorderedSource",
    "__version__",
    "annotate",
    "collate",
    "create_classifier",
    "discriminator_loss",
    "open_run",
    "save_classifier",
    "similarity_loss",
]

_MODULES = {
    "mealv2.data.folder": ("UnorderedSource",),
    "mealv2.data.source": ("ImageSource",),
    "mealv2.dataset": ("EpochBatchSampler", "SoftLabelDataset", "collate"),
    "mealv2.errors": ("MealError",),
    "mealv2.label_set": ("LabelSet",),
    "mealv2.labelling.annotate": ("annotate",),
    "mealv2.losses": ("discriminator_loss", "similarity_loss"),
    "mealv2.models": ("Classifier", "create_classifier", "save_classifier"),
    "mealv2.models.discriminator": ("Discriminator",),
    "mealv2.report.run": ("Run", "open_run"),
    "mealv2.task": ("DistillTask",),
    "mealv2.timm_task": ("SoftLabelTask",),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    """Import a public name at its first use (PEP 562)."""
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_MODULE_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
