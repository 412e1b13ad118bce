"""Flip single bits in pictures: what stops `labels verify` and a training; what the checks cost.

    python benchmarks/picture_flips.py --data-dir flowers --flips 300
    python benchmarks/picture_flips.py --data-dir imagenet --costs

The data set is a tree ROOT/{train,val}/CLASS/IMAGE of JPEGs. The first command labels some of its
images and then flips one bit at a time, a random one of a random picture: in the tree, in the tree
packed, in tar files with and without indices, and in the cached copies of such tar files behind a
URL. After each flip it runs `mealv2 labels verify --data-dir`, reads every image as the first epoch
of `distill` does, and, for some flips, runs `distill` itself. The second measures the reading of an
epoch with and without the comparison, hashing beside decoding, and the rate of `labels verify`.

`--quick` does little of each, for the tests.
"""

import argparse
import contextlib
import datetime
import http.server
import io
import random
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import same_numbers as shop
from mealv2.data.content_hash import ImageCheck, KnownHashes, content_hash
from mealv2.data.loader import read_views
from mealv2.data.open import open_source
from mealv2.data.pixels import decode
from mealv2.data.requests import centre_requests, check_failures
from mealv2.data.source import ImageSource
from mealv2.data.view_reader import ViewReader
from mealv2.errors import MealError
from mealv2.label_set import LabelSet
from mealv2.labelling.compare import compare_images
from mealv2.runtime import library_versions
from mealv2.storage.cache import Cache
from mealv2.views import DrawnViews
from pipeline.config import LabelsVerifyConfig
from pipeline.label_sets import verify
from pipeline.labelling.compatibility import image_check, view_reader
from pipeline.runtime.device import use_one_thread

FLAGS = ["--img-size", 64, "--workers", 0, "--device", "cpu", "--batch-size", 16]
SPLITS = ("train", "val")
CACHE_BYTES = 10**9
BATCH = 32
SIZE = 224


@dataclass(frozen=True)
class Case:
    """A data set to flip bits in: its --data-dir, and the folder whose files are changed."""

    name: str
    data_dir: Path | str
    folder: Path
    cache: Cache | None = None


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--flips", type=int, default=300)
    parser.add_argument("--images", type=int, default=60, help="images to take of the data set")
    parser.add_argument("--trainings", type=int, default=10, help="flips with a run of distill")
    parser.add_argument("--costs", action="store_true")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args(words)
    shop.use_tree(shop.ROOT)
    use_one_thread()
    versions = library_versions()
    print(f"{datetime.date.today()}, torch {versions['torch']}, Pillow {versions['pillow']}\n")
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        data = options.data_dir or shop.draw_folder(root / "drawn")
        if options.quick:
            flip_pictures(data, root, num_images=24, num_flips=2, num_trainings=1)
        elif not options.costs:
            flip_pictures(data, root, options.images, options.flips, options.trainings)
        if options.costs or options.quick:
            measure_costs(data, num_rounds=2 if options.quick else 9)


# --- flips ----------------------------------------------------------------------------------------


def flip_pictures(
    data: Path, root: Path, num_images: int, num_flips: int, num_trainings: int
) -> None:
    """Print what single flipped bits do, by the form of the data, and exchanged pictures."""
    tree, labels, student = _label(data, root, num_images)
    print("| one bit flipped in | flips | still decodes | verify stops | training stops |", end="")
    print(" fetched again | silent | `distill` stops |\n|" + " --- |" * 8)
    with _cases(tree, root) as cases:
        for case in cases:
            count, rng = Counter[str](), random.Random(case.name)
            pictures = list(_pictures(case))
            for check in _checks(case, labels, student).values():  # they pass before a flip
                with contextlib.redirect_stderr(io.StringIO()):
                    check()
            for number in range(num_flips):
                path, begin, end = rng.choice(pictures)
                at, bit = rng.randrange(begin, end), 1 << rng.randrange(8)
                train = student if number < num_trainings else None
                count.update(_outcomes(case, labels, path, (begin, end), at, bit, train))
            distil = "-" if case.cache else f"{count['distill']} of {min(num_trainings, num_flips)}"
            columns = ("decodes", "verify", "reading", "refetched", "silent")
            figures = " | ".join(str(count[name]) for name in columns)
            print(f"| {case.name} | {num_flips} | {figures} | {distil} |", flush=True)
    _exchange(tree, root)


def _label(data: Path, root: Path, num_images: int) -> tuple[Path, Path, Path]:
    """Copy and label some images of a data set; return the copy, the labels, and a teacher."""
    tree, labels, teacher = root / "tree", root / "labels", root / "teacher"
    folders = sorted(path for path in (data / "train").iterdir() if path.is_dir())[:3]
    for split, count in (("train", num_images * 3 // 4), ("val", num_images // 4)):
        for folder in folders:
            (tree / split / folder.name).mkdir(parents=True)
            for path in sorted((data / split / folder.name).iterdir())[: count // len(folders)]:
                shutil.copy(path, tree / split / folder.name)
    words = ["finetune", "--data-dir", tree, "--model", "test_resnet", "--epochs", 1, *FLAGS]
    words.append("--no-pretrained")
    shop.call(*words, "--output", teacher)
    words = ["precompute", "--data-dir", tree, "--teacher", f"test_resnet={teacher}"]
    shop.call(*words, "--num-views", 1, *FLAGS, "--output", labels)
    return tree, labels, teacher


@contextlib.contextmanager
def _cases(tree: Path, root: Path) -> Iterator[list[Case]]:
    """Make every form of a tree; gives the cases while a web server runs."""
    packed, tars, plain, web = (root / name for name in ("packed", "tars", "plain", "web"))
    shop.call("pack", "--data-dir", tree, "--output", packed)
    shop.call("pack", "--data-dir", tree, "--to", "tar", "--output", tars)
    shutil.copytree(tars, plain)
    for pattern in ("*.index", "*.pack.json"):
        for path in plain.glob(pattern):
            path.unlink()
    shutil.copytree(tars, web / "index")
    shutil.copytree(plain, web / "plain")
    cases = [
        Case("pictures in folders", tree, tree),
        Case("packed tree", packed, packed),
        Case("tar files with index", tars, tars),
        Case("tar files without index", plain, plain),
    ]
    with _web_server(web) as url:
        for name in ("index", "plain"):
            cache = Cache(root / f"cache-{name}", CACHE_BYTES)
            address = f"{url}/{name}/{{train,val}}-000000.tar"
            for split in SPLITS:  # fetch both
                open_source(address, split, cache=cache).read(0)
            what = "with index" if name == "index" else "without index"
            cases.append(Case(f"cached copy, tar file {what}", address, cache.folder, cache))
        yield cases


@contextlib.contextmanager
def _web_server(folder: Path) -> Iterator[str]:
    """Serve a folder on loopback; gives its URL."""
    handler = partial(_QuietHandler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


class _QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        pass


def _pictures(case: Case) -> Iterator[tuple[Path, int, int]]:
    """Yield the file and the range of bytes of each picture."""
    files = [p for p in case.folder.rglob("[!.]*") if p.is_file()]
    contents = {path: path.read_bytes() for path in files}
    for split in SPLITS:
        source = open_source(case.data_dir, split, cache=case.cache)
        for position in range(len(source)):
            image = source.read(position)
            ((path, at),) = [(p, d.find(image)) for p, d in contents.items() if image in d]
            yield path, at, at + len(image)


def _outcomes(
    case: Case,
    labels: Path,
    path: Path,
    image: tuple[int, int],
    at: int,
    bit: int,
    student: Path | None,
) -> list[str]:
    """Flip a bit and run each check on it; return what happened, the bit as it was before."""
    right = path.read_bytes()
    data = bytearray(right)
    data[at] ^= bit
    wrong, found = bytes(data), list[str]()
    with contextlib.suppress(MealError):
        decode(wrong[slice(*image)])
        found.append("decodes")
    for name, check in _checks(case, labels, student).items():
        path.write_bytes(wrong)
        try:
            with contextlib.redirect_stderr(io.StringIO()):
                check()
        except (MealError, RuntimeError):
            found.append(name)
        else:
            is_fetched = case.cache is not None and path.read_bytes() == right
            found.append("refetched" if is_fetched else "silent")
    path.write_bytes(right)
    return found


def _checks(case: Case, labels: Path, student: Path | None) -> dict[str, Callable[[], None]]:
    checks = {"verify": partial(_verify, case, labels), "reading": partial(_read, case, labels)}
    if student is not None and case.cache is None:
        checks["distill"] = partial(_distil, case, labels, student)
    return checks


def _verify(case: Case, labels: Path) -> None:
    folder = None if case.cache is None else case.cache.folder
    given = {} if folder is None else {"cache_dir": folder}
    verify.run(LabelsVerifyConfig(labels=labels, data_dir=case.data_dir, workers=2, **given))


def _read(case: Case, labels: Path) -> None:
    """Read the images of an epoch and of its evaluation as `mealv2 distill` does."""
    for split in SPLITS:
        source = open_source(case.data_dir, split, cache=case.cache)
        of_split = LabelSet.open(labels, split=split)
        if split == "train":
            reader = view_reader(of_split, source)
            views: list[list[tuple[int, tuple[int, ...]]]] = [
                [(p, (0,))] for p in range(len(source))
            ]
        else:
            check = image_check(of_split, source, "first")
            reader = ViewReader(source, img_size=of_split.img_size, check=check)
            views = centre_requests(range(len(source)), BATCH)
        for batch in read_views(reader, views):
            check_failures(source, batch.failed, "fail")


def _distil(case: Case, labels: Path, student: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        words = ["distill", "--data-dir", case.data_dir, "--labels", labels]
        words += ["--model", "test_resnet", "--initial-checkpoint", student, "--workers", 0]
        words += ["--epochs", 1, "--batch-size", 16, "--device", "cpu"]
        shop.call(*words, "--output", Path(folder) / "run")


def _exchange(tree: Path, root: Path) -> None:
    """Exchange two BMPs of different classes and of one size; print what the checks say."""
    classes = sorted((tree / "train").iterdir())[:2]
    paths = [folder / "exchanged.bmp" for folder in classes]
    for folder, path in zip(classes, paths, strict=True):
        picture = next(p for p in sorted(folder.iterdir()) if p != path)
        with Image.open(picture) as image:
            image.convert("RGB").resize((96, 96)).save(path)
    labels = root / "labels-bmp"
    words = ["precompute", "--data-dir", tree, "--teacher", f"test_resnet={root / 'teacher'}"]
    shop.call(*words, "--num-views", 1, *FLAGS, "--output", labels)
    one, two = (path.read_bytes() for path in paths)
    assert len(one) == len(two)
    paths[0].write_bytes(two)
    paths[1].write_bytes(one)
    case = Case("BMPs", tree, tree)
    print("\n| two BMPs of different classes exchanged | |\n| --- | --- |")
    for name, check in (("labels verify --data-dir", _verify), ("reading an epoch", _read)):
        try:
            with contextlib.redirect_stderr(io.StringIO()):
                check(case, labels)
            result = "**silent**"
        except MealError as error:
            result = f"stops, exit code {error.exit_code}"
        print(f"| {name} | {result} |")


# --- costs ----------------------------------------------------------------------------------------


def measure_costs(data: Path, *, num_rounds: int) -> None:
    """Print the seconds of an epoch's reading, of hashing and decoding, and the rate of verify."""
    source = open_source(data, "train")
    images = [source.read(position) for position in range(len(source))]
    known = KnownHashes.none(len(source))
    for position, image in enumerate(images):
        known.set(position, content_hash(image))
    num_mb = sum(map(len, images)) / 1e6
    print(f"\n{len(images)} images of {data.name}, {num_mb:.1f} MB.\n")
    _measure_epochs(source, known, num_rounds)
    hashing = _median(lambda: [content_hash(image) for image in images], num_rounds)
    decoding = _median(lambda: [decode(image) for image in images], num_rounds)
    print(
        f"\n| one thread | s | MB/s |\n| --- | --- | --- |\n"
        f"| hash | {hashing:.4f} | {num_mb / hashing:.0f} |\n"
        f"| decode | {decoding:.3f} | {num_mb / decoding:.0f} |\n"
        f"| hash / decode | {100 * hashing / decoding:.2f} % | |"
    )
    rates = []
    for _ in range(num_rounds):
        with contextlib.redirect_stderr(io.StringIO()):
            found = compare_images(source, known, range(len(source)), workers=2, what="images")
        rates.append(num_mb / found.seconds)
    print(
        f"\n`labels verify --data-dir`, 2 threads, files in memory: {statistics.median(rates):.0f} "
        f"MB/s ({min(rates):.0f} to {max(rates):.0f})"
    )


def _measure_epochs(source: ImageSource, known: KnownHashes, num_rounds: int) -> None:
    """Print seconds and CPU seconds of an epoch's reading, the cases one after another."""
    order = np.random.default_rng(0).permutation(len(source)).tolist()
    requests = [
        [(p, (0,)) for p in order[start : start + BATCH]] for start in range(0, len(order), BATCH)
    ]
    wall: dict[str, list[float]] = {"never": [], "first": [], "always": []}
    used: dict[str, list[float]] = {name: [] for name in wall}
    reader = ViewReader(source, img_size=SIZE, views=DrawnViews(0))
    for number in range(num_rounds + 1):
        names = list(wall)
        random.Random(number).shuffle(names)
        for name in names:
            check = None if name == "never" else ImageCheck(known, always=name == "always")
            began, began_cpu = time.perf_counter(), time.process_time()
            for batch in read_views(replace(reader, check=check), requests, workers=2):
                check_failures(source, batch.failed, "fail")
            if number:  # the first round warms up
                wall[name].append(time.perf_counter() - began)
                used[name].append(time.process_time() - began_cpu)
    print("| --check-images | median s | range | CPU s | CPU s / never, median of pairs |")
    print("| --- | --- | --- | --- | --- |")
    for name in wall:
        pairs = [a / b for a, b in zip(used[name], used["never"], strict=True)]
        print(
            f"| {name} | {statistics.median(wall[name]):.3f} | {min(wall[name]):.3f} to "
            f"{max(wall[name]):.3f} | {statistics.median(used[name]):.3f} | "
            f"{statistics.median(pairs):.4f} |"
        )


def _median(work: Callable[[], object], num_rounds: int) -> float:
    """Return the median of the CPU seconds of some calls."""
    seconds = []
    for _ in range(num_rounds):
        began = time.thread_time()
        work()
        seconds.append(time.thread_time() - began)
    return statistics.median(seconds)


if __name__ == "__main__":
    main()
