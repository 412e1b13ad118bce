"""The bash script that reproduces a recipe, from a folder of ImageNet to its number."""

import re
from pathlib import Path
from typing import Any

from mealv2.errors import ConfigError
from mealv2.recipes import Recipe, names
from mealv2.recipes.published import ACCURACIES, PAPER

_TEMPLATE = Path(__file__).with_name("reproduce.sh")


def script(recipe: Recipe) -> str:
    """Return the script; it needs bash and `mealv2`, and on several GPUs torchrun.

    Raises ConfigError for a recipe that is not for ImageNet.
    """
    if recipe.name not in names():
        raise ConfigError(
            f"recipe {recipe.name} has no script; its commands are in `mealv2 recipes show "
            f"{recipe.name}`"
        )
    student, teachers = recipe.distill["model"], recipe.teachers["teacher"]
    needs_teachers = recipe.distill.get("cutmix_target") == "teachers"
    values: dict[str, Any] = {
        "NAME": recipe.name,
        "TITLE": recipe.title,
        "PUBLISHED": _published(recipe),
        "SOURCE": recipe.source,
        "SIZE": recipe.teachers["img_size"],
        "VIEWS": recipe.precompute["num_views"],
        "STUDENT": student,
        "TEACHERS": ",".join(teachers),
        "ACCURACIES": "\n".join(map(_case, [*teachers, student])),
        "START": _start(recipe),
        "START_SIZE": ACCURACIES[student].img_size,
        # timm's figures of the teachers at 380 are of another crop
        "TOLERANCE": 1 if all(ACCURACIES[t].source == PAPER for t in teachers) else 2,
        # a label set has no label of a mixed image
        "STORED": " --cutmix-target mixed-labels" if needs_teachers else "",
    }
    template = _TEMPLATE.read_text(encoding="utf-8")
    return re.sub("@([A-Z_]+)@", lambda match: str(values[match[1]]), template)


def _published(recipe: Recipe) -> str:
    """Return the published accuracy as text."""
    figures = {"top-1": recipe.top1, "top-5": recipe.top5}
    known = [f"{name} {value:.2f}" for name, value in figures.items() if value is not None]
    return ", ".join(known) or "the source has no number"


def _case(model: str) -> str:
    known = ACCURACIES[model]
    return f"        {model}) echo {known.top1} ;; # {known.source}"


def _start(recipe: Recipe) -> str:
    if not recipe.distill["pretrained"]:
        return "# The student starts from random weights.\n"
    return 'evaluate student-start "$START_SIZE" "$STUDENT" "$START"\n'
