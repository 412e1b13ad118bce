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
from mealv2.data.folder import is_flat, key_of, split_folder
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
from pipeline.timing import Turn, take_turns

BATCH_SIZE = 128
_NUM_PASSES = 2  # over the images in a turn, with one view of each
_FEW_VIEWS = 4
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_BASELINE, _WEBDATASET = "ImageFolder + DataLoader", "webdataset"
_LOADER_LINES = ("loader-1", "loader-packed", "loader-4", "loader-16")
_TAR_SHARDS = 4  # two for each of two processes: webdataset gives each whole shards

Workload = Callable[[], int]


def measure(bench: BenchContext) -> list[Line]:
    """Return the lines whose baseline is ImageFolder with torchvision's transforms.

    Own and synthetic images take turns in the same rounds.
    """
    names = [n for n in bench.config.chosen if n in _LOADER_LINES]
    workloads: dict[str, Workload] = {}
    not_measured = []
    for images in bench.all_images:
        workloads[_turn(_BASELINE, images)] = image_folder(bench, images)
        for name in names:
            try:
                workloads[_turn(name, images)] = own_workload(bench, images, name)
            except NotMeasuredError as error:
                not_measured.append(Line(name, why=str(error), pictures=images.name))
    if len(workloads) == len(bench.all_images):
        return not_measured
    turns = take_turns(workloads, rounds=bench.config.rounds, device=torch.device("cpu"))
    measured = [
        _line(bench, turns, name, images, _BASELINE)
        for name in names
        for images in bench.all_images
        if _turn(name, images) in turns
    ]
    return not_measured + measured


def _turn(name: str, images: Images) -> str:
    return f"{name}, {images.name}" if images.name else name


def _line(
    bench: BenchContext, turns: dict[str, list[Turn]], name: str, images: Images, baseline: str
) -> Line:
    """Return a line from the turns of a workload and of its baseline on the same images."""
    what, against = _turn(name, images), _turn(baseline, images)
    notes = {"workers": bench.config.workers, **by_cpu_time(turns, what, against)}
    both = {key: turns[key] for key in (what, against)}
    return Line(name, ratios(turns, what, against), both, notes, pictures=images.name)


def image_folder(bench: BenchContext, images: Images) -> Workload:
    """Return a turn of torchvision's recipe: float32 batches, normalised in the workers."""
    folder = split_folder(images.root, images.split)
    if not folder.is_dir() or is_flat(folder):
        raise NotMeasuredError("torchvision's ImageFolder needs folders of images by class")
    dataset = ImageFolder(str(folder), transform=transforms(bench.config.img_size))
    wanted = {images.source.keys[p] for p in images.positions}
    found = [key_of(Path(path), folder) for path, _ in dataset.samples]
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


def own_workload(bench: BenchContext, images: Images, name: str) -> Workload:
    """Return a turn of our loader, as the line of that name measures it."""
    source, positions = images.source, images.positions
    if name == "loader-packed":
        source = packed_source(images, bench.folder / "packed" / _folder_name(images))
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


def _folder_name(images: Images) -> str:
    return images.name.strip("-").replace(" ", "-") or "images"


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
    """Return the line on tar shards of the same images, for each kind of images."""
    workloads: dict[str, Workload] = {}
    for images in bench.all_images:
        tar_root = bench.folder / "tar" / _folder_name(images)
        paths = write_tars(images, tar_root / "train")
        requests = single_views(range(len(images.positions)))
        source = open_source(tar_root, "train")
        workloads[_turn("loader-tar", images)] = own_loader(bench, source, requests)
        workloads[_turn(_WEBDATASET, images)] = webdataset(bench, paths)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # webdataset does not close its files
        turns = take_turns(workloads, rounds=bench.config.rounds, device=torch.device("cpu"))
        workloads.clear()
        gc.collect()
    return [_line(bench, turns, "loader-tar", i, _WEBDATASET) for i in bench.all_images]


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
