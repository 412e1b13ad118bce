"""The lines on reading images: our loader over torchvision's and webdataset's recipes."""

import gc
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torchvision
import webdataset as wds
from torch.utils.data import DataLoader, RandomSampler, Subset
from torchvision.datasets import ImageFolder

from mealv2.batches import split_batches
from mealv2.data.jpegtran import Jpegtran, packed
from mealv2.data.loader import read_views
from mealv2.data.open import open_source
from mealv2.data.requests import BatchRequest, check_failures
from mealv2.data.source import ImageSource
from mealv2.data.tar_writer import sample, tar_writer
from mealv2.data.view_reader import ViewReader
from mealv2.errors import ConfigError
from mealv2.labelling.plan import batch_requests
from mealv2.views import DrawnViews
from pipeline.bench.context import NUM_VIEWS, BenchContext, Images
from pipeline.bench.lines import Line, NotMeasuredError, by_cpu_time, ratios
from pipeline.timing import take_turns

BATCH_SIZE = 128
_NUM_PASSES = 2  # over the images in a turn, with one view of each
_FEW_VIEWS = 4
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_BASELINE = "ImageFolder + DataLoader"
_TAR_SHARDS = 4  # two for each of two processes: webdataset gives each whole shards

Workload = Callable[[], int]


def measure(bench: BenchContext) -> list[Line]:
    """Return the lines whose baseline is ImageFolder with torchvision's transforms."""
    workloads: dict[str, Workload] = {_BASELINE: image_folder(bench)}
    not_measured = []
    for name in ("loader-1", "loader-packed", "loader-4", "loader-16"):
        if name in bench.config.chosen:
            try:
                workloads[name] = own_workload(bench, name)
            except NotMeasuredError as error:
                not_measured.append(Line(name, why=str(error)))
    if len(workloads) == 1:
        return not_measured
    turns = take_turns(workloads, rounds=bench.config.rounds, device=torch.device("cpu"))
    return not_measured + [
        Line(
            name,
            ratios(turns, name, _BASELINE),
            {key: turns[key] for key in (name, _BASELINE)},
            {"workers": bench.config.workers, **by_cpu_time(turns, name, _BASELINE)},
        )
        for name in workloads
        if name != _BASELINE
    ]


def image_folder(bench: BenchContext) -> Workload:
    """Return a turn of torchvision's recipe: float32 batches, normalised in the workers."""
    images = bench.images
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
        sampler=RandomSampler(subset, num_samples=_NUM_PASSES * len(subset)),
        num_workers=workers,
        persistent_workers=workers > 0,
    )
    return lambda: sum(len(classes_B) for _, classes_B in loader)


def transforms(img_size: int) -> Any:
    """Return torchvision's transforms for training."""
    return torchvision.transforms.Compose(
        [
            torchvision.transforms.RandomResizedCrop(img_size),
            torchvision.transforms.RandomHorizontalFlip(),
            torchvision.transforms.ToTensor(),
            torchvision.transforms.Normalize(_MEAN, _STD),
        ]
    )


def own_workload(bench: BenchContext, name: str) -> Workload:
    """Return a turn of our loader, as the line of that name measures it."""
    source, positions = bench.images.source, bench.images.positions
    if name == "loader-packed":
        source = packed_source(bench.images, bench.folder / "packed")
        return own_loader(bench, source, single_views(range(len(source))))
    if name == "loader-1":
        return own_loader(bench, source, single_views(positions))
    if name == "loader-4":
        rows = [(position, tuple(range(_FEW_VIEWS))) for position in positions]
        return own_loader(bench, source, split_batches(rows, BATCH_SIZE // _FEW_VIEWS))
    half = positions[: max(1, len(positions) // 2)]
    return own_loader(bench, source, batch_requests(half, range(NUM_VIEWS), BATCH_SIZE))


def own_loader(bench: BenchContext, source: ImageSource, requests: list[BatchRequest]) -> Workload:
    """Return a turn of our loader: uint8 batches, as both stages read them."""
    reader = ViewReader(source, img_size=bench.config.img_size, views=DrawnViews(0))
    loader = read_views(reader, requests, workers=bench.config.workers)

    def read() -> int:
        units = 0
        for batch in loader:
            check_failures(source, batch.failed, bench.config.on_bad_image)
            units += len(batch.positions)
        return units

    return read


def single_views(positions: Sequence[int]) -> list[BatchRequest]:
    """Return requests for one view of each image, then another view of each."""
    rows = [(position, (view,)) for view in range(_NUM_PASSES) for position in positions]
    return split_batches(rows, BATCH_SIZE)


def packed_source(images: Images, folder: Path) -> ImageSource:
    """Re-pack the images into a folder, lossless with restart markers; return their source."""
    try:
        program = Jpegtran.find()
    except ConfigError:
        raise NotMeasuredError("needs jpegtran") from None

    def pack(position: int) -> None:
        path = folder / images.split / images.source.keys[position]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(packed(images.source.read(position), program)[0])

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(pack, images.positions))
    return open_source(folder, images.split)


# --- tar shards -----------------------------------------------------------------------------------


def measure_tar(bench: BenchContext) -> list[Line]:
    """Return the line on tar shards of the same images."""
    images = bench.images
    tar_root = bench.folder / "tar"
    paths = write_tars(images, tar_root / "train")
    requests = single_views(range(len(images.positions)))
    workloads = {
        "ours": own_loader(bench, open_source(tar_root, "train"), requests),
        "webdataset": webdataset(bench, paths),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # webdataset does not close its files
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
    """Return a turn of webdataset's pipeline: decode("pil") and torchvision's transforms."""
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
    return lambda: sum(len(classes_B) for _ in range(_NUM_PASSES) for _, classes_B in loader)
