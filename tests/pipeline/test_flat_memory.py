"""Stage two's data path over a million labelled rows: memory does not grow with what was read.

The rows are 8 views each of 125,000 images, in two sampler of four views: what is held of an image
is held from the beginning, so that more images would take longer and show no more. The pictures
are of 8 x 8 pixels, 286 bytes each; everything else is what a real run reads through.
"""

import io
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from label_sets import plan_of
from mealv2.batches import BatchSampler
from mealv2.data.loader import read_views
from mealv2.data.open import open_source
from mealv2.data.source import ImageSource
from mealv2.data.view_reader import ViewReader
from mealv2.label_set import (
    Encoding,
    LabelSet,
    Shard,
    claim,
    describe_file,
    shard_name,
    write_manifest,
    write_shard,
)
from mealv2.storage.json_format import json_sha256
from mealv2.targets import StoredLabels
from pipeline.config import DistillConfig
from tars import write_packed

NUM_IMAGES, NUM_VIEWS, PER_SHARD, CLASSES = 125_000, 8, 2500, 10
BATCH_SIZE, WIDTH = 512, 4
GROWTH_MB = 16.0  # of the second half over the first; a row that is kept takes 0.1 kB and more


def resident_mb() -> float:
    """Return the memory of this process that is not only reserved."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 1e6


def class_of(number: int, view: int) -> int:
    """Return the class that the label of a view says, so that a wrong row is noticed."""
    return (number * 7 + view * 3) % CLASSES


def write_images(folder: Path) -> None:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (9, 90, 200)).save(file, "JPEG", quality=20, optimize=True)
    image = file.getvalue()
    (folder / "classes.txt").write_text("".join(f"class {c}\n" for c in range(CLASSES)))
    for shard in range(NUM_IMAGES // PER_SHARD):
        path = folder / f"train-{shard:06d}.tar"
        keys = [f"n{n % 1000:08d}/n{n:08d}.JPEG" for n in range(NUM_IMAGES)[shard * PER_SHARD :]]
        keys = keys[:PER_SHARD]
        write_packed(path, [(key, 0, image) for key in keys])


def write_labels(folder: Path, source: ImageSource) -> None:
    """Write a label set with a shard for each tar file."""
    encoding = Encoding(CLASSES, topk=2)
    plan = plan_of(encoding, NUM_VIEWS, classes=[f"class {c}" for c in range(CLASSES)])
    claim(folder, plan)
    listed = []
    for number, first in enumerate(source.shard_starts or []):
        keys = list(source.keys[first : first + PER_SHARD])
        likely = [class_of(number_of(key), view) for key in keys for view in range(NUM_VIEWS)]
        logits_NC = 5.0 * torch.nn.functional.one_hot(torch.tensor(likely), CLASSES)
        rows = encoding.encode(torch.softmax(logits_NC, dim=1), num_views=NUM_VIEWS)
        blocks = encoding.blocks(rows, NUM_VIEWS)
        path = folder / shard_name("train", number)
        write_shard(path, Shard(json_sha256(plan), "train", number, 0, NUM_VIEWS, keys, blocks))
        listed.append(describe_file(path, num_images=len(keys)))
    block = {"views": [0, NUM_VIEWS], "shards": listed}
    split = {"blocks": [block], "skipped": {}, "num_images": NUM_IMAGES}
    write_manifest(folder, plan, roles={"train": split})


def number_of(key: str) -> int:
    return int(key[-13:-5])


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A folder that is gone when the test ends: its 400 MB are not to be kept."""
    yield tmp_path
    shutil.rmtree(tmp_path)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc to see memory")
def test_memory_is_flat_over_a_million_labelled_rows(folder: Path) -> None:
    write_images(folder)
    source = open_source(folder, "train")
    write_labels(folder / "labels", source)
    labels = LabelSet.open(folder / "labels")
    config = DistillConfig(
        data_dir=folder,
        labels=folder / "labels",
        model="m",
        epochs=NUM_VIEWS,
        batch_size=BATCH_SIZE,
        views_per_image=WIDTH,
    )
    targets = StoredLabels(labels, source.keys, source.labels, seed=0)
    sampler = BatchSampler(config, source, range(len(source)), targets)
    reader = ViewReader(source, img_size=8, views=labels.views())

    num_rows, seen = 0, np.zeros(NUM_IMAGES, dtype=np.int64)
    held: list[float] = []
    for pixels in read_views(reader, sampler.batches_from(0), workers=2):
        output = targets.batch(pixels.positions, pixels.views, pixels.images_BCHW)
        assert output.soft_labels is not None
        names = zip(pixels.positions, pixels.views, strict=True)
        likely = [class_of(number_of(source.keys[p]), view) for p, view in names]
        assert output.soft_labels.argmax().tolist() == likely
        np.add.at(seen, pixels.positions, 1 << np.multiply(8, pixels.views))
        num_rows += len(pixels.positions)
        held.append(resident_mb())

    assert num_rows == 1_000_000
    assert set(seen.tolist()) == {0x0101010101010101}, "every view of every image once"
    first, second = held[: len(held) // 2], held[len(held) // 2 :]
    print(f"memory: up to {max(first):.0f} MB, then {max(second):.0f} MB")
    assert max(second) - max(first) < GROWTH_MB
