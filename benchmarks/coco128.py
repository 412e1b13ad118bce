"""Detection on 128 pictures of COCO: a base and a distilled backbone in the form of Table 7.

    python benchmarks/coco128.py coco128.tar --base RUN --distilled RUN --output coco128

PATH is coco128 in YOLO's form, a tar file or its folder: images/SPLIT, labels/SPLIT with a line
CLASS X Y WIDTH HEIGHT for each object (centre and size, relative to the image), and the class names
in config.yaml. It is written in COCO's format into OUTPUT/data, with the most frequent --classes
only, and `mealv2 transfer-detection --compare` trains both backbones in both modes. Finished runs
are kept. Results: docs/benchmarks/coco128.md.
"""

import argparse
import re
import sys
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mealv2.errors import ConfigError
from mealv2.storage.atomic import write_atomic
from mealv2.storage.json_format import canonical_json
from pipeline import transfer_detection
from pipeline.config import TransferDetectionConfig

_NAME = re.compile(r"^\s+(\d+): (.+)$", re.MULTILINE)
_PREFIX = "instances_"


def unpacked(path: Path, output: Path) -> Path:
    """Return the folder of coco128, unpacked into ``output`` if it is a tar file."""
    if path.is_dir():
        return path
    folder = output / "yolo"
    if not (folder / "config.yaml").exists():
        with tarfile.open(path) as archive:
            archive.extractall(folder, filter="data")
    return folder


def boxes_of(path: Path, width: int, height: int) -> Iterator[tuple[int, list[float]]]:
    """Yield class and box, left, top, width, height in pixels, of each line of a label file."""
    for line in path.read_text().splitlines():
        number, x, y, w, h = line.split()
        size = float(w) * width, float(h) * height
        left, top = float(x) * width - size[0] / 2, float(y) * height - size[1] / 2
        yield int(number), [round(side, 2) for side in (left, top, *size)]


def as_coco(folder: Path, target: Path, *, num_classes: int) -> Path:
    """Write coco128 in COCO's format, with its most frequent classes; return the folder."""
    names = {int(n): name for n, name in _NAME.findall((folder / "config.yaml").read_text())}
    splits = sorted(path.name for path in (folder / "images").iterdir())
    found = {split: list(_images(folder, split)) for split in splits}
    counts = Counter(number for _, rows in found[splits[0]] for number, _ in rows)
    kept = {number for number, _ in counts.most_common(num_classes)}
    (target / "annotations").mkdir(parents=True, exist_ok=True)
    for split, images in found.items():
        link = target / split
        if not link.exists():
            link.symlink_to((folder / "images" / split).absolute())
        value = _annotations(images, {n: names[n] for n in sorted(kept)})
        path = target / "annotations" / f"{_PREFIX}{split}.json"
        write_atomic(path, canonical_json(value).encode())
    return target


def _images(
    folder: Path, split: str
) -> Iterator[tuple[dict[str, Any], list[tuple[int, list[float]]]]]:
    """Yield the entry of each image and its classes and boxes; some have no label file."""
    for path in sorted((folder / "images" / split).glob("*.jpg")):
        with Image.open(path) as image:
            width, height = image.size
        entry = {"id": int(path.stem), "file_name": path.name, "width": width, "height": height}
        labels = folder / "labels" / split / f"{path.stem}.txt"
        yield entry, list(boxes_of(labels, width, height)) if labels.exists() else []


def _annotations(
    images: Sequence[tuple[dict[str, Any], list[tuple[int, list[float]]]]], names: dict[int, str]
) -> dict[str, Any]:
    rows = [
        (entry["id"], number, box)
        for entry, found in images
        for number, box in found
        if number in names
    ]
    return {
        "images": [entry for entry, _ in images],
        "categories": [{"id": number + 1, "name": name} for number, name in names.items()],
        "annotations": [
            {
                "id": row,
                "image_id": image_id,
                "category_id": number + 1,
                "bbox": box,
                "area": box[2] * box[3],
                "iscrowd": 0,
            }
            for row, (image_id, number, box) in enumerate(rows, 1)
        ],
    }


def main(words: Sequence[str] | None = None) -> None:
    """Convert the pictures, train, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("path", type=Path)
    parser.add_argument("--base", required=True, help="as --model of mealv2 transfer-detection")
    parser.add_argument("--distilled", required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--classes", type=int, default=3)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--iterations", type=int, default=320)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--img-size", type=int, default=160)
    parser.add_argument("--pyramid-channels", type=int, default=64)
    parser.add_argument("--workers", type=int, default=1)
    given = parser.parse_args(words)
    folder = unpacked(given.path, given.output)
    data = as_coco(folder, given.output / "data", num_classes=given.classes)
    config = TransferDetectionConfig(
        data_dir=data,
        compare=(given.base, given.distilled),
        mode="all",
        seeds=given.seeds,
        output=given.output / "runs",
        iterations=given.iterations,
        batch_size=given.batch_size,
        img_size=given.img_size,
        pyramid_channels=given.pyramid_channels,
        workers=given.workers,
        opt="adamw",
        lr=1e-3,
        val_interval=1000,
        checkpoint_hist=1,
        device="cpu",
    )
    try:
        transfer_detection.run(config)
    except ConfigError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
