"""SRe2L's label files, written and read as its code does: independent of mealv2.

Facts: VILA-Lab/SRe2L, SRe2L/relabel/{generate_soft_label,utils_fkd}.py and validate/ (8d00cba).
"""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import BatchSampler, RandomSampler, TensorDataset
from torchvision.datasets import ImageFolder

Address = tuple[str, int]  # of an image, relative to its split, and an epoch


@dataclass(frozen=True)
class View:
    """A view that was labelled: (top, left, height, width) in pixels, flip, logits."""

    box: tuple[int, int, int, int]
    flip: bool
    logits: np.ndarray


def batches_of(num_images: int, batch_size: int, **flags: Any) -> Iterator[list[int]]:
    """Yield the batches of one epoch after the other, as a DataLoader with seed 42 does."""
    generator = torch.Generator()
    generator.manual_seed(42)
    sampler = RandomSampler(TensorDataset(torch.arange(num_images)), generator=generator)
    batches = BatchSampler(sampler, batch_size=batch_size, **{"drop_last": False, **flags})
    while True:
        yield list(batches)


def _a_view(rng: np.random.Generator, size: tuple[int, int], target: int, classes: int) -> View:
    width, height = size
    h, w = int(rng.integers(1, height + 1)), int(rng.integers(1, width + 1))
    top, left = int(rng.integers(0, height - h + 1)), int(rng.integers(0, width - w + 1))
    logits = rng.normal(0, 4, classes)
    logits[target] += 8
    return View((top, left, h, w), bool(rng.integers(2)), logits.astype(np.float16))


def relabel(
    split: Path,
    folder: Path,
    *,
    epochs: int = 3,
    batch_size: int = 8,
    classes: int = 3,
    dtype: torch.dtype = torch.float16,
    mixed: list[Any] | None = None,
    kept: float | None = None,
) -> dict[Address, View]:
    """Write labels of a made-up teacher as SRe2L's relabel step does; return them.

    ``mixed`` replaces the mix index, lambda and box. ``kept`` is LPLD's: only this part of the
    batches, without the incomplete ones, and the file of their images.
    """
    images = ImageFolder(str(split))
    rng = np.random.default_rng(0)
    labels: dict[Address, View] = {}
    listed: dict[str, list[int]] = {}
    orders = batches_of(len(images), batch_size, drop_last=kept is not None)
    num_batches = len(images) // batch_size
    left = math.inf if kept is None else int(epochs * num_batches * kept)
    for epoch in range(epochs):
        for number, batch in enumerate(next(orders)):
            if left == 0:
                break
            left -= 1
            views = []
            for index in batch:
                path, target = images.samples[index]
                views.append(_a_view(rng, images.loader(path).size, target, classes))
                labels[Path(path).relative_to(split).as_posix(), epoch] = views[-1]
            listed.setdefault(str(epoch), []).extend(batch)
            sizes = [images.loader(images.samples[index][0]).size for index in batch]
            coords = [
                torch.FloatTensor(
                    (v.box[0] / height, v.box[1] / width, v.box[2] / height, v.box[3] / width)
                )
                for v, (width, height) in zip(views, sizes, strict=True)
            ]
            path = folder / f"epoch_{epoch}" / f"batch_{number}.tar"
            path.parent.mkdir(parents=True, exist_ok=True)
            flips = torch.tensor([view.flip for view in views])
            logits = torch.tensor(np.stack([view.logits for view in views])).to(dtype)
            mix = [None, None, None] if mixed is None else mixed
            torch.save([torch.stack(coords), flips, *mix, logits], path)
    if kept is not None:
        (folder / "sampler_indices_epoch.json").write_text(json.dumps(listed))
    return labels


def load(folder: str, split: Path, *, batch_size: int, epochs: int) -> dict[Address, View]:
    """Return the views as SRe2L's training sees them; fails where its loader does.

    ``folder`` ends in a slash: the loader joins text.
    """
    assert folder.endswith("/")
    names = sorted(
        (path.name for path in Path(folder + "epoch_0").iterdir()),
        key=lambda name: int(name.split("_")[1].split(".tar")[0]),
    )
    first, last = (torch.load(Path(folder, "epoch_0", name)) for name in (names[0], names[-1]))
    if len(first[1]) != batch_size or epochs > len(list(Path(folder).iterdir())):
        raise ValueError("--batch-size or --epochs")
    num_images = batch_size * (len(names) - 1) + len(last[1])
    file_of_first_image = [
        {batch[0]: number for number, batch in enumerate(batches)}
        for _, batches in zip(range(epochs), batches_of(num_images, batch_size), strict=False)
    ]
    images = ImageFolder(str(split))
    found: dict[Address, View] = {}
    training = batches_of(len(images), batch_size)
    for epoch in range(epochs):
        for batch in next(training):
            number = file_of_first_image[epoch][batch[0]]
            path = Path(folder, f"epoch_{epoch}", f"batch_{number}.tar")
            coords, flips, partners, weight, box, logits = torch.load(path)
            _check_no_mixing(partners.cpu(), weight, box, batch=len(batch))
            for row, index in enumerate(batch):
                image_path = images.samples[index][0]
                width, height = images.loader(image_path).size
                top, left, h, w = (
                    coords[row][0].item() * height,
                    coords[row][1].item() * width,
                    coords[row][2].item() * height,
                    coords[row][3].item() * width,
                )
                # torchvision's crop of a PIL image: PIL rounds its corners
                corners = [round(x) for x in (left, top, left + w, top + h)]
                pixels = (corners[1], corners[0], corners[3] - corners[1], corners[2] - corners[0])
                key = Path(image_path).relative_to(split).as_posix()
                found[key, epoch] = View(pixels, bool(flips[row]), logits[row].numpy())
    return found


def _check_no_mixing(partners: torch.Tensor, weight: float, box: list[int], *, batch: int) -> None:
    """Check that MixUp and CutMix, as the training applies them, leave images as they are."""
    images = torch.rand(batch, 3, 4, 4)
    assert torch.equal(weight * images + (1 - weight) * images[partners], images)
    mixed = images.clone()
    a, b, c, d = box
    mixed[:, :, a:c, b:d] = mixed[partners][:, :, a:c, b:d]
    assert torch.equal(mixed, images)
