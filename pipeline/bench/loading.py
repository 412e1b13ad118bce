"""The lines on reading images: our loader beside torchvision's and webdataset's recipes."""

import gc
import warnings
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import webdataset as wds
from torch.utils.data import DataLoader, RandomSampler, Subset
from torchvision import transforms as of_torchvision
from torchvision.datasets import ImageFolder

from mealv2.data.jpegtran import Jpegtran, packed
from mealv2.data.open import open_source
from mealv2.data.source import ImageSource
from mealv2.data.tar_writer import sample, tar_writer
from mealv2.errors import ConfigError
from mealv2.views import DrawnViews
from pipeline.bench.lines import Line, NotMeasuredError, by_cpu_time, ratios
from pipeline.bench.room import NUM_VIEWS, BenchContext, Images
from pipeline.labelling.plan import batch_requests
from pipeline.loading.loader import Batch, ViewReader, read_views
from pipeline.loading.requests import BatchRequest, check_failures
from pipeline.timing import take_turns
from pipeline.training.batches import split_batches

BATCH_SIZE = 128
_PASSES = 2  # over the images in a turn, of what shows an image once
_FEW_VIEWS = 4
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_BASELINE = "ImageFolder + DataLoader"
_TAR_SHARDS = 4  # two for each of two processes, which is how webdataset shares them out

Workload = Callable[[], int]


def measure(bench: BenchContext, wanted: Sequence[str]) -> list[Line]:
    """Return the lines whose baseline is ImageFolder with torchvision's transforms."""
    images = bench.images
    workloads: dict[str, Workload] = {}
    left_out = []
    for name in wanted:
        try:
            workloads[name] = _OWN_LOADER[name](bench, images)
        except NotMeasuredError as error:
            left_out.append(Line(name, why=str(error)))
    if not workloads:
        return left_out
    workloads = {_BASELINE: image_folder(bench, images), **workloads}
    turns = take_turns(workloads, rounds=bench.config.rounds, device=torch.device("cpu"))
    measured = [
        Line(
            name,
            ratios(turns, name, _BASELINE),
            {key: turns[key] for key in (name, _BASELINE)},
            {"workers": bench.config.workers, **by_cpu_time(turns, name, _BASELINE)},
        )
        for name in workloads
        if name != _BASELINE
    ]
    return measured + left_out


def image_folder(bench: BenchContext, images: Images) -> Workload:
    """Return a turn of torchvision's recipe: float32 batches, normalised in the workers."""
    folder = images.root / images.split
    if not folder.is_dir():
        raise NotMeasuredError("torchvision's ImageFolder needs a folder of images")
    dataset = ImageFolder(str(folder), transform=transforms(bench.config.img_size))
    wanted = {images.source.keys[p] for p in images.positions}
    found = [Path(path).relative_to(folder).as_posix() for path, _ in dataset.samples]
    subset = Subset(dataset, [n for n, key in enumerate(found) if key in wanted])
    workers = bench.config.workers
    loader: DataLoader[Any] = DataLoader(
        subset,
        batch_size=BATCH_SIZE,
        sampler=RandomSampler(subset, num_samples=_PASSES * len(subset)),
        num_workers=workers,
        persistent_workers=workers > 0,
    )
    return lambda: sum(len(classes_B) for _, classes_B in loader)


def transforms(img_size: int) -> Any:
    """Return torchvision's transforms for training."""
    return of_torchvision.Compose(
        [
            of_torchvision.RandomResizedCrop(img_size),
            of_torchvision.RandomHorizontalFlip(),
            of_torchvision.ToTensor(),
            of_torchvision.Normalize(_MEAN, _STD),
        ]
    )


def own_loader(bench: BenchContext, source: ImageSource, requests: list[BatchRequest]) -> Workload:
    """Return a turn of our loader: uint8 batches, as both stages get them."""
    reader = ViewReader(source, img_size=bench.config.img_size, views=DrawnViews(0))
    loader = read_views(reader, requests, workers=bench.config.workers)
    return lambda: sum(map(_num_read(bench, source), loader))


def _num_read(bench: BenchContext, source: ImageSource) -> Callable[[Batch], int]:
    def count(pixels: Batch) -> int:
        check_failures(source, pixels.failed, bench.config.on_bad_image)
        return len(pixels.positions)

    return count


def _one_view(bench: BenchContext, images: Images) -> Workload:
    return own_loader(bench, images.source, single_views(images.positions))


def single_views(positions: Iterable[int]) -> list[BatchRequest]:
    """Return requests for one view of each image, then another view of each."""
    positions = list(positions)
    rows = [(position, (view,)) for view in range(_PASSES) for position in positions]
    return split_batches(rows, BATCH_SIZE)


def _few_views(bench: BenchContext, images: Images) -> Workload:
    views = tuple(range(_FEW_VIEWS))
    rows = [(position, views) for position in images.positions]
    return own_loader(bench, images.source, split_batches(rows, BATCH_SIZE // _FEW_VIEWS))


def _stage_one_views(bench: BenchContext, images: Images) -> Workload:
    positions = images.positions[: max(1, len(images.positions) // 2)]
    return own_loader(bench, images.source, batch_requests(positions, range(NUM_VIEWS), BATCH_SIZE))


def _packed(bench: BenchContext, images: Images) -> Workload:
    source = packed_source(images, bench.folder / "packed")
    return own_loader(bench, source, single_views(range(len(source))))


def packed_source(images: Images, folder: Path) -> ImageSource:
    """Re-pack the images into a folder, losslessly with restart markers; return their source."""
    try:
        program = Jpegtran.find()
    except ConfigError:
        raise NotMeasuredError("needs jpegtran") from None
    paths = [folder / images.split / images.source.keys[p] for p in images.positions]
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
    files = map(images.source.read, images.positions)
    with ThreadPoolExecutor(4) as threads:
        for path, (data, _) in zip(
            paths, threads.map(lambda d: packed(d, program), files), strict=True
        ):
            path.write_bytes(data)
    return open_source(folder, images.split)


_OWN_LOADER: dict[str, Callable[[BenchContext, Images], Workload]] = {
    "loader-1": _one_view,
    "loader-packed": _packed,
    "loader-4": _few_views,
    "loader-16": _stage_one_views,
}


# --- tar shards -----------------------------------------------------------------------------------


def measure_tar(bench: BenchContext, wanted: Sequence[str]) -> list[Line]:
    """Return the line on tar shards; the same images, in a few shards."""
    images = bench.images
    tar_root = bench.folder / "tar"
    paths = write_tars(images, tar_root / "train")
    source = open_source(tar_root, "train")
    workloads = {
        "ours": own_loader(bench, source, single_views(range(len(images.positions)))),
        "webdataset": webdataset(bench, paths),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # webdataset leaves its files open
        turns = take_turns(workloads, rounds=bench.config.rounds, device=torch.device("cpu"))
        workloads.clear()
        gc.collect()
    notes = {"workers": bench.config.workers, **by_cpu_time(turns, "ours", "webdataset")}
    return [Line("loader-tar", ratios(turns, "ours", "webdataset"), turns, notes)]


def write_tars(images: Images, folder: Path) -> list[str]:
    """Write the images as WebDataset shards; return the paths."""
    folder.mkdir(parents=True)
    paths = []
    for shard in range(_TAR_SHARDS):
        path = folder / f"train-{shard:06d}.tar"
        with path.open("xb") as stream, tar_writer(stream) as writer:
            for position in images.positions[shard::_TAR_SHARDS]:
                name, class_id = f"{position:08d}", images.source.labels[position]
                writer.write(sample(name, f"{name}.jpg", class_id, images.source.read(position)))
        paths.append(str(path))
    return paths


def webdataset(bench: BenchContext, paths: list[str]) -> Workload:
    """Return a turn of webdataset's own pipeline: decode("pil") and torchvision's transforms."""
    workers = bench.config.workers
    dataset = (
        wds.WebDataset(paths, shardshuffle=False, empty_check=False)
        .decode("pil")
        .to_tuple("jpg", "cls")
        .map_tuple(transforms(bench.config.img_size), int)
    )
    loader: DataLoader[Any] = DataLoader(
        dataset, batch_size=BATCH_SIZE, num_workers=workers, persistent_workers=workers > 0
    )
    return lambda: sum(len(classes_B) for _ in range(_PASSES) for _, classes_B in loader)
