"""What several lines share: images, networks with random weights, simulated labels."""

import math
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
from pipeline.bench.synthetic_images import ImageStats, mean_pixels, write_image_folder
from pipeline.config import DEFAULT_RATE, BenchConfig
from pipeline.loading.sources import show_summary
from pipeline.runtime.device import Runtime
from pipeline.timing import Turn

NUM_CLASSES = 1000
OWN_IMAGES, DRAWN_IMAGES = "--data-dir", "drawn pictures"
NUM_VIEWS = 16  # stored per image, and cut from one decode in stage one
_CPU_BATCH, _GPU_BATCH, _SMALL_GPU_BATCH = 8, 256, 128
_SMALL_GPU = 40e9  # bytes
_CALIBRATION_VIEWS = 4
# Logits of the simulated labels: about 40 bytes a view, the most probable class at 0.6.
_LOGIT_STD, _MAX_PEAK = 6.0, 12.0


@dataclass(frozen=True)
class Images:
    """A split on disk, the positions to read, and the statistics of these images.

    ``name`` distinguishes them from others of the same run; it is empty without others.
    """

    name: str
    root: Path
    split: str
    source: ImageSource
    positions: list[int]
    stats: ImageStats


class BenchContext:
    """Creates images, networks and labels when a line first needs them."""

    def __init__(self, config: BenchConfig, runtime: Runtime, folder: Path) -> None:
        self.config = config
        self.runtime = runtime
        self.device = runtime.device
        self.folder = folder

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
        """The images to read: synthetic ones, or the user's own."""
        config = self.config
        if config.data_dir is None:
            return self.drawn
        root, split = config.data_dir, config.train_split
        source = open_source(root, split)
        show_summary(source, strict=config.strict)
        stride = max(1, len(source) // config.num_images)
        positions = list(range(0, len(source), stride))[: config.num_images]
        mean_bytes = sum(source.sizes[p] for p in positions) / len(positions)
        pixels = mean_pixels(source.read(p) for p in positions)
        stats = ImageStats(len(positions), mean_bytes, pixels)
        return Images(OWN_IMAGES, root, split, source, positions, stats)

    @cached_property
    def drawn(self) -> Images:
        """The synthetic images, as many as are read of the user's own."""
        own = self.config.data_dir is not None
        number = len(self.images.positions) if own else self.config.num_images
        root, split = self.folder / "images", "train"
        console.info(f"drawing {number} pictures")
        stats = write_image_folder(root / split, num_images=number)
        source = open_source(root, split)
        name = DRAWN_IMAGES if own else ""
        return Images(name, root, split, source, list(range(len(source))), stats)

    @property
    def all_images(self) -> list[Images]:
        """The images of the lines on reading: the user's own beside synthetic ones."""
        return [self.images] if self.config.data_dir is None else [self.images, self.drawn]

    @cached_property
    def ensemble(self) -> TeacherEnsemble:
        """The teachers, with random weights."""
        return self.create_ensemble(self.config.teacher, self.config.img_size)

    def create_ensemble(self, names: Sequence[str], img_size: int) -> TeacherEnsemble:
        """Return calibrated models with random weights, on the device."""
        teachers = [
            create_classifier(name, num_classes=NUM_CLASSES, img_size=img_size) for name in names
        ]
        for teacher in teachers:
            calibrate(teacher, img_size)
        return self.runtime.to_device(TeacherEnsemble(teachers))

    def network(self, name: str) -> Classifier:
        """Build a model of 1,000 classes with random weights."""
        return create_classifier(name, num_classes=NUM_CLASSES, img_size=self.config.img_size)

    @cached_property
    def encoding(self) -> Encoding:
        """The default encoding of labels."""
        return Encoding(NUM_CLASSES, rate=DEFAULT_RATE)

    @cached_property
    def labels(self) -> LabelSet:
        """A label set of the images."""
        folder, keys = self.folder / "labels", self.images.source.keys
        rows = simulated_rows(self.encoding, len(keys), NUM_VIEWS)
        write_labels(folder, self.encoding, keys, rows)
        return LabelSet.open(folder)

    def cpu_note(self, turns: dict[str, list[Turn]], what: str, against: str) -> dict[str, float]:
        """Return the ratio by CPU time if networks compute on the CPU."""
        return by_cpu_time(turns, what, against) if self.device.type == "cpu" else {}

    def random_images(self, num_views: int, img_size: int | None = None) -> Tensor:
        """Return random pixels on the device, uint8 B x 3 x H x W, channels last."""
        size = img_size or self.config.img_size
        generator = torch.Generator().manual_seed(0)
        pixels = torch.randint(
            0, 256, (num_views, size, size, 3), dtype=torch.uint8, generator=generator
        )
        return pixels.permute(0, 3, 1, 2).to(self.device)


@torch.no_grad()
def calibrate(model: nn.Module, img_size: int) -> None:
    """Set the running statistics of a network with random weights to those of noise.

    With its initial statistics, a residual network of 150 layers overflows: its values double block
    by block.
    """
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
    size = min(img_size, 64) if norms else img_size
    model.train()
    if norms:
        model(torch.rand(_CALIBRATION_VIEWS, 3, size, size))
    model.eval()
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum


def simulated_rows(encoding: Encoding, num_images: int, num_views: int, *, seed: int = 0) -> Rows:
    """Return labels with random probabilities: one likely class, some rivals, a long tail.

    The views of an image have its likely class, its rivals in part, and a peak of their own.
    """
    generator = torch.Generator().manual_seed(seed)
    parts = []
    images = max(1, 4096 // num_views)
    for start in range(0, num_images, images):
        num = min(images, num_images - start)
        shape = (num, num_views, encoding.num_classes)
        logits_IVC = _LOGIT_STD * math.sqrt(0.5) * torch.randn(shape, generator=generator)
        logits_IVC += (
            _LOGIT_STD
            * math.sqrt(0.5)
            * torch.randn((num, 1, encoding.num_classes), generator=generator)
        )
        classes_I = torch.randint(0, encoding.num_classes, (num,), generator=generator)
        peaks_IV = _MAX_PEAK * torch.rand(shape[:2], generator=generator)
        logits_IVC[torch.arange(num), :, classes_I] += peaks_IV
        logits_NC = logits_IVC.flatten(0, 1)
        probs_NC = torch.softmax(logits_NC, dim=1)
        parts.append(encoding.encode(probs_NC, logits_NC, num_views=num_views))
    return Rows.concat(parts)


def make_plan(
    encoding: Encoding, *, num_images: int, num_views: int, shard_size: int, img_size: int = 224
) -> dict[str, Any]:
    """Return a plan with the fields that writing and reading labels need."""
    views = {**RECIPE, "seed": 0}
    return {
        "format": label_set.FORMAT,
        "format_version": label_set.FORMAT_VERSION,
        "classes": [f"class {number}" for number in range(encoding.num_classes)],
        "img_size": img_size,
        "labels": encoding.plan(),
        "shard_size": shard_size,
        "roles": {"train": {"num_images": num_images, "num_views": num_views, "views": views}},
    }


def write_labels(folder: Path, encoding: Encoding, keys: Sequence[str], rows: Rows) -> None:
    """Write a label set of one shard; ``rows`` are the labels of all views, image by image."""
    num_images, num_views = len(keys), len(rows.labels) // len(keys)
    plan = make_plan(encoding, num_images=num_images, num_views=num_views, shard_size=num_images)
    label_set.claim(folder, plan)
    blocks = encoding.blocks(rows, num_views)
    path = folder / label_set.shard_name("train", 0)
    shard = Shard(json_sha256(plan), "train", 0, 0, num_views, list(keys), blocks)
    label_set.write_shard(path, shard)
    block = {
        "views": [0, num_views],
        "shards": [label_set.describe_file(path, num_images=num_images)],
    }
    label_set.write_manifest(folder, plan, roles={"train": {"skipped": {}, "blocks": [block]}})
