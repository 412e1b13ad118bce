"""What the lines share: images, networks with random weights, labels like a big ensemble's."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mealv2 import label_set
from mealv2.data.open import open_source
from mealv2.data.source import ImageSource
from mealv2.label_set import Encoding, LabelSet, Rows, Shard
from mealv2.models import Classifier, create_classifier
from mealv2.models.ensemble import TeacherEnsemble
from mealv2.storage.json_format import json_sha256
from mealv2.views import RECIPE
from pipeline import console
from pipeline.bench.lines import by_cpu_time
from pipeline.bench.synthetic_images import Drawn, draw_tree, mean_pixels
from pipeline.config import DEFAULT_RATE, BenchConfig
from pipeline.runtime.device import Runtime
from pipeline.timing import Turn

NUM_CLASSES = 1000
NUM_VIEWS = 16  # stored of an image, and cut from one decode in stage one
_CPU_BATCH, _GPU_BATCH, _SMALL_GPU_BATCH = 8, 256, 128
_SMALL_GPU = 40e9  # bytes
_CALIBRATED_ON = 4  # views
# Of the logits of drawn labels: about 40 bytes a view, the likeliest class at 0.6.
_SPREAD, _PEAK = 6.0, 12.0


@dataclass(frozen=True)
class Images:
    """A split on disk, the images of it that are read, and what they are like."""

    root: Path
    split: str
    source: ImageSource
    positions: list[int]
    described: Drawn


class BenchContext:
    """Makes, once and when a line first asks, what several lines measure with."""

    def __init__(self, config: BenchConfig, runtime: Runtime, folder: Path) -> None:
        self.config = config
        self.runtime = runtime
        self.folder = folder

    @property
    def device(self) -> torch.device:
        """Where networks compute."""
        return self.runtime.device

    @cached_property
    def batch_size(self) -> int:
        """Views per step and per forward pass."""
        if self.config.batch_size is not None:
            return self.config.batch_size
        if self.device.type != "cuda":
            return _CPU_BATCH
        memory = torch.cuda.get_device_properties(self.device).total_memory
        return _SMALL_GPU_BATCH if memory < _SMALL_GPU else _GPU_BATCH

    @cached_property
    def images(self) -> Images:
        """The images that are read: drawn now, or the user's own."""
        config = self.config
        if config.data_dir is None:
            console.info(f"drawing {config.num_images} pictures")
            drawn = draw_tree(self.folder / "images" / "train", num_images=config.num_images)
            source = open_source(self.folder / "images", "train")
            return Images(self.folder / "images", "train", source, list(range(len(source))), drawn)
        source = open_source(config.data_dir, config.train_split)
        step = max(1, len(source) // config.num_images)
        positions = list(range(0, len(source), step))[: config.num_images]
        num_bytes = sum(source.sizes[p] for p in positions) / len(positions)
        pixels = mean_pixels(source.read(p) for p in positions)
        described = Drawn(len(positions), num_bytes, pixels)
        return Images(config.data_dir, config.train_split, source, positions, described)

    @cached_property
    def ensemble(self) -> TeacherEnsemble:
        """The teachers, with random weights."""
        teachers = [self.network(name) for name in self.config.teacher]
        for teacher in teachers:
            calibrate(teacher, self.config.img_size)
        return self.runtime.to_device(TeacherEnsemble(teachers))

    def network(self, name: str) -> Classifier:
        """Build a model of 1,000 classes with random weights."""
        return create_classifier(name, num_classes=NUM_CLASSES, img_size=self.config.img_size)

    @cached_property
    def encoding(self) -> Encoding:
        """How labels are kept unless told otherwise."""
        return Encoding(NUM_CLASSES, rate=DEFAULT_RATE)

    @cached_property
    def labels(self) -> LabelSet:
        """A label set of the images."""
        folder = self.folder / "labels"
        write_labels(folder, self.encoding, self.images.source.keys, num_views=NUM_VIEWS)
        return LabelSet.open(folder)

    def cpu_note(self, turns: dict[str, list[Turn]], what: str, against: str) -> dict[str, float]:
        """Return the ratio by CPU time where networks compute there."""
        return by_cpu_time(turns, what, against) if self.device.type == "cpu" else {}

    def resident(self, num_views: int) -> Tensor:
        """Return random pixels of so many views, on the device as the loop has them."""
        size = self.config.img_size
        generator = torch.Generator().manual_seed(0)
        pixels = torch.randint(
            0, 256, (num_views, size, size, 3), dtype=torch.uint8, generator=generator
        )
        return pixels.permute(0, 3, 1, 2).to(self.device)


@torch.no_grad()
def calibrate(model: nn.Module, img_size: int) -> None:
    """Give a network with random weights the batch statistics of noise, so that nothing overflows.

    A residual network of 150 layers with those it is born with doubles its values block by block.
    """
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
    size = min(img_size, 64) if norms else img_size
    model.train()
    if norms:
        model(torch.rand(_CALIBRATED_ON, 3, size, size))
    model.eval()
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum


def drawn_rows(encoding: Encoding, num_rows: int, *, seed: int = 0) -> Rows:
    """Return labels of drawn probabilities: a likely class, some rivals, a long tail."""
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for start in range(0, num_rows, 4096):
        num = min(4096, num_rows - start)
        logits_NC = _SPREAD * torch.randn(num, encoding.num_classes, generator=generator)
        classes_N = torch.randint(0, encoding.num_classes, (num,), generator=generator)
        logits_NC[torch.arange(num), classes_N] += _PEAK * torch.rand(num, generator=generator)
        parts.append(encoding.encode(torch.softmax(logits_NC, dim=1), logits_NC))
    return Rows.concat(parts)


def plan_of(encoding: Encoding, *, num_views: int, img_size: int) -> dict[str, Any]:
    """Return a plan with what the writer and the reader of labels ask it for."""
    return {
        "format": label_set.FORMAT,
        "format_version": label_set.FORMAT_VERSION,
        "classes": [f"class {number}" for number in range(encoding.num_classes)],
        "img_size": img_size,
        "labels": encoding.plan(),
        "roles": {"train": {"num_views": num_views, "views": {**RECIPE, "seed": 0}}},
    }


def write_labels(folder: Path, encoding: Encoding, keys: Sequence[str], *, num_views: int) -> None:
    """Write a label set of drawn labels, in one shard."""
    plan = plan_of(encoding, num_views=num_views, img_size=224)
    label_set.claim(folder, plan)
    blocks = encoding.blocks(drawn_rows(encoding, len(keys) * num_views), num_views)
    path = folder / label_set.shard_name("train", 0)
    shard = Shard(json_sha256(plan), "train", 0, 0, num_views, list(keys), blocks)
    label_set.write_shard(path, shard)
    described = label_set.describe_file(path, num_images=len(keys))
    block = {"views": [0, num_views], "shards": [described]}
    label_set.write_manifest(folder, plan, roles={"train": {"skipped": {}, "blocks": [block]}})
