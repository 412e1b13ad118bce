"""What the sections on labels share: the label set, its sample, the suspected label errors."""

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from mealv2.data.source import UNLABELLED, ImageSource
from mealv2.errors import MealError
from mealv2.label_set import LabelSet
from mealv2.report.averaged import open_labels
from mealv2.report.label_errors import LabelErrors, find_label_errors
from mealv2.report.sample import LabelSample, sample_labels
from mealv2.storage.urls import Location, shown
from pipeline.config import ExtraDataConfig
from pipeline.loading.sources import open_labelled
from pipeline.report.sections import Inputs

NO_LABELS = (
    "No label set: neither --labels nor a run names one that can be read. Give it with --labels."
)


@dataclass(frozen=True)
class LabelData:
    """A label set, a sample of its training labels, and the hard labels that it puts in doubt.

    ``source`` are the labelled images, None without a data set, or where ``no_images`` says why it
    cannot be read.
    """

    labels: LabelSet
    sample: LabelSample
    errors: LabelErrors
    source: ImageSource | None
    no_images: str | None


def label_data(inputs: Inputs) -> LabelData | None:
    """Return what the sections on labels need, read once; None without a label set."""
    if inputs.labels is None:
        return None
    return _label_data(inputs.labels, inputs.data_dir, inputs.data)


@lru_cache(maxsize=1)
def _label_data(folder: Path, data_dir: Location | None, config: ExtraDataConfig) -> LabelData:
    labels = open_labels(folder)
    source, no_images = None, "The images are not shown: give their data set with --data-dir."
    if data_dir is not None:
        try:
            source = open_labelled(config, data_dir, labels.manifest["plan"], "train")
            no_images = ""
        except (MealError, OSError) as error:
            no_images = f"The images of {shown(data_dir)} are not shown: {error}."
    sample = sample_labels(labels)
    if source is not None and (sample.hard_N == UNLABELLED).all():  # imported labels have none
        hard = dict(zip(source.keys, source.labels, strict=True))
        sample = sample_labels(labels, hard=hard)
    return LabelData(labels, sample, find_label_errors(sample), source, no_images or None)
