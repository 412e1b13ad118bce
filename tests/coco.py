"""Drawn data sets in COCO's format: coloured shapes on grey, for tests of detection."""

import json
import random
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

CATEGORIES = [
    {"id": 3, "name": "rectangle"},
    {"id": 7, "name": "ellipse"},
    {"id": 90, "name": "triangle"},
]
_COLOURS = {3: (220, 40, 40), 7: (40, 60, 220), 90: (40, 190, 60)}


def draw_coco(
    folder: Path,
    *,
    splits: dict[str, int] | None = None,
    sides: tuple[int, int] = (96, 128),
    seed: int = 0,
) -> Path:
    """Write FOLDER/annotations/instances_SPLIT.json and FOLDER/SPLIT; return the folder."""
    (folder / "annotations").mkdir(parents=True)
    for split, number in (splits or {"train": 6, "val": 3}).items():
        draw = random.Random(f"{seed}/{split}")
        (folder / split).mkdir()
        images, annotations = [], []
        for image_id in range(101, 101 + number):
            width, height = draw.randint(*sides), draw.randint(*sides)
            name = f"{image_id:06}.png"
            image = Image.new("RGB", (width, height), (128,) * 3)
            for box, category in _objects(draw, width, height):
                _draw_shape(image, box, category)
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": image_id,
                        "category_id": category,
                        "bbox": list(box),
                        "area": box[2] * box[3],
                        "iscrowd": 0,
                    }
                )
            image.save(folder / split / name)
            entry = {"id": image_id, "file_name": name, "width": width, "height": height}
            images.append(entry)
        write_annotations(folder, split, images, annotations)
    return folder


def write_annotations(
    folder: Path, split: str, images: list[dict[str, Any]], annotations: list[dict[str, Any]]
) -> Path:
    """Write the annotations of a split; return the path."""
    path = folder / "annotations" / f"instances_{split}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    found = {"images": images, "annotations": annotations, "categories": CATEGORIES}
    path.write_text(json.dumps(found))
    return path


def _objects(
    draw: random.Random, width: int, height: int
) -> list[tuple[tuple[int, int, int, int], int]]:
    """Return one object in the left and one in the right half: box and category."""
    found = []
    for half in range(draw.randint(1, 2)):
        w, h = draw.randint(28, width // 2 - 6), draw.randint(28, height - 12)
        left = half * width // 2 + draw.randint(2, width // 2 - w - 2)
        box = (left, draw.randint(2, height - h - 2), w, h)
        found.append((box, draw.choice(list(_COLOURS))))
    return found


def _draw_shape(image: Image.Image, box: tuple[int, int, int, int], category: int) -> None:
    left, top, width, height = box
    right, bottom = left + width - 1, top + height - 1
    pen, colour = ImageDraw.Draw(image), _COLOURS[category]
    if category == 3:
        pen.rectangle((left, top, right, bottom), fill=colour)
    elif category == 7:
        pen.ellipse((left, top, right, bottom), fill=colour)
    else:
        pen.polygon([(left, bottom), (right, bottom), ((left + right) // 2, top)], fill=colour)
