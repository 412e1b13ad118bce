"""Load the model that --model and --checkpoint name, for inference."""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mealv2.errors import ConfigError
from mealv2.models import Classifier, Preprocessing, create_classifier, read_metadata
from mealv2.models.factory import is_factory
from mealv2.models.released import find
from mealv2.storage.atomic import write_atomic
from mealv2.storage.json_format import canonical_json
from mealv2.storage.weight_files import find_checkpoint
from pipeline import console
from pipeline.config import DEFAULT_IMG_SIZE, InferenceConfig

# also the full-width forms, which some spreadsheets convert
_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n", "\uff1d", "\uff0b", "\uff0d", "\uff20")


def require_own_code_named(name: str, checkpoint: Path | None) -> None:
    """Raise ConfigError for a model of the user's own code that only a file names.

    A file may come from anywhere: code runs only if the command line names it.
    """
    if is_factory(name):
        raise ConfigError(
            f"{checkpoint} is a model of your own code, {name}, which runs only if you name it: "
            f"give --model {name}"
        )


@dataclass(frozen=True)
class LoadedModel:
    """A model, the side of its centre crop, and what its checkpoint says, if it does.

    ``classes`` are the class names, ``held_out`` the flags that held out its validation images.
    """

    name: str
    model: Classifier
    img_size: int
    classes: list[str] | None
    held_out: list[str] | None


def load(config: InferenceConfig, *, classes: Sequence[str] | None = None) -> LoadedModel:
    """Build the model. Raises ConfigError and MealError as mealv2.models.create_classifier.

    With ``classes``, a checkpoint that was trained on other classes is an error.
    """
    if config.results_file is not None and not config.results_file.parent.is_dir():
        raise ConfigError(f"--results-file: there is no folder {config.results_file.parent}")
    checkpoint = find_checkpoint(config.checkpoint) if config.checkpoint else None
    stored = read_metadata(checkpoint) if checkpoint else {}
    name = config.model or stored.get("architecture")
    if name is None:
        raise ConfigError(f"{checkpoint} does not name its model; give --model")
    if config.model is None:
        require_own_code_named(name, checkpoint)
    released = find(name)
    own_size = stored.get("img_size") or (released.img_size if released else DEFAULT_IMG_SIZE)
    img_size = config.img_size or own_size
    known = stored.get("classes") if classes is None else classes
    preprocessing = None
    if config.mean and config.std:
        preprocessing = Preprocessing(config.mean, config.std)
    model = create_classifier(
        name,
        num_classes=len(known) if checkpoint and known else None,
        pretrained=checkpoint is None,
        checkpoint=checkpoint,
        img_size=img_size,
        classes=classes,
        preprocessing=preprocessing,
    )
    for note in model.notes:
        console.info(note)
    return LoadedModel(name, model, img_size, stored.get("classes"), stored.get("held_out"))


def known_classes(config: InferenceConfig) -> list[str]:
    """Return the class names in the checkpoint, none without one or if it has none."""
    if config.checkpoint is None:
        return []
    return list(read_metadata(find_checkpoint(config.checkpoint)).get("classes") or [])


def write_results(path: Path, report: dict[str, Any], rows: Sequence[dict[str, Any]]) -> None:
    """Write a report as JSON, or its rows as CSV, by the suffix of the file."""
    if path.suffix == ".json":
        data = canonical_json(report)
    else:
        text = io.StringIO()
        writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows({n: spreadsheet_cell(v) for n, v in row.items()} for row in rows)
        data = text.getvalue()
    write_atomic(path, data.encode())


def spreadsheet_cell(value: Any) -> Any:
    """Return a cell of a CSV file that a spreadsheet does not run as a formula.

    OWASP (CSV injection): text that begins with one of these characters gets an apostrophe.
    """
    return f"'{value}" if isinstance(value, str) and value.startswith(_FORMULA) else value
