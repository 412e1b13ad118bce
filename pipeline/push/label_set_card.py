"""The card of a label set on the Hub: what its labels are, and how to train on them."""

import json
from pathlib import Path
from typing import Any

from mealv2.label_set import Encoding, listed_shards, read_header
from mealv2.label_set.split_size import split_size
from pipeline import console
from pipeline.export.model_card import escaped, table

CARD_NAME = "README.md"

_FRONT_MATTER = """---
tags:
- mealv2
- knowledge-distillation
- soft-labels
- image-classification
task_categories:
- image-classification
viewer: false
{licence}
---
"""
_NO_LICENCE = "# license: choose one; check the terms of the teachers and of the images"


def card(folder: Path, manifest: dict[str, Any], repo: str, licence: str | None) -> str:
    """Return the card, Markdown, of a finished set that becomes the data set USER/NAME."""
    front = _FRONT_MATTER.format(
        licence=f"license: {json.dumps(licence)}" if licence else _NO_LICENCE
    )
    plan = manifest["plan"]
    parts = [
        f"{front}\n# Soft labels of {len(plan['classes'])} classes\n",
        "What an ensemble of teachers said about views of images, to distil students from with "
        "[mealv2](https://arxiv.org/abs/2009.08453). It has no images: the labels are found by "
        "the paths and the contents of yours.\n",
        table(["", ""], _facts(folder, manifest)),
        _accuracy(manifest),
        _usage(repo),
    ]
    return "\n".join(part for part in parts if part)


def _facts(folder: Path, manifest: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the rows on teachers, views, encoding and size."""
    plan, splits = manifest["plan"], manifest["roles"]
    teachers = [str(teacher["model"]) for teacher in plan.get("teachers", [])]
    rows = [("teachers", ", ".join(map(escaped, teachers))), ("image size", _size(plan))]
    for name, split in splits.items():
        shards = listed_shards({name: split})
        size = split_size(split, [read_header(folder / shard["name"]) for shard in shards])
        sizes = f"{console.size_of(size.bytes)}, {size.bytes_per_view:.1f} bytes a label"
        views = console.count(size.views, "view")
        rows.append((f"{name} images", f"{size.images} x {views}, {sizes}"))
        if size.loss:
            rows.append((f"KL of the {name} labels", str(size.loss)))
    rows += [
        ("views", _views(plan)),
        ("encoding", escaped(Encoding.of_plan(plan))),
        ("plan\\_sha256", f"`{manifest['plan_sha256']}`"),
    ]
    return [(name, value) for name, value in rows if value]


def _size(plan: dict[str, Any]) -> str:
    return f"{plan['img_size']} x {plan['img_size']}, {escaped(plan['interpolation'])}"


def _views(plan: dict[str, Any]) -> str:
    """Return the recipe of the training views: its name and parameters."""
    views = dict(plan["roles"].get("train", {}).get("views", {}))
    name = views.pop("name", "")
    hidden = ("hash", "version", "tries", "unit")
    named = [f"{k.replace('_', ' ')} {_short(v)}" for k, v in views.items() if k not in hidden]
    return escaped(", ".join([name, *named]))


def _short(value: Any) -> str:
    if isinstance(value, list):
        return " to ".join(map(_short, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def _accuracy(manifest: dict[str, Any]) -> str:
    """Return the accuracies of the teachers and their ensemble on the validation images."""
    measured = manifest["roles"].get("val", {}).get("accuracy")
    if measured is None:
        return ""
    ensemble = measured["ensemble"] | {"model": "ensemble"}
    rows = [
        (escaped(each["model"]), f"{each['top1']:.2f}", f"{each['top5']:.2f}")
        for each in (*measured["teachers"], ensemble)
    ]
    head = ["on the validation images", "top-1 %", "top-5 %"]
    return f"## Accuracy\n\n{measured['num_images']} images.\n\n{table(head, rows)}"


def _usage(repo: str) -> str:
    return f"""## Use

```sh
mealv2 labels info hf://{repo}
mealv2 distill --data-dir DATA --labels hf://{repo} --model resnet18 --output student
```

`DATA` is the data set whose images were labelled. `mealv2 labels verify` checks every label, and
with `--data-dir DATA` that the images are the same.
"""
