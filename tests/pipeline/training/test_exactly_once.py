"""Every image exactly once an epoch: any number of ranks, workers and shards, resumed anywhere.

The trap is known from WebDataset: ranks that own shards of uneven sizes have uneven numbers of
steps, and who has one step more waits for ever for the others. Here all ranks cut the same batches.
"""

import io
import itertools
import random
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mealv2.batches import BatchSampler
from mealv2.data.loader import read_views
from mealv2.data.requests import BatchRequest
from mealv2.data.tar import TarShards
from mealv2.data.view_reader import ViewReader
from mealv2.targets import HardLabels
from mealv2.views import DrawnViews
from pipeline.config import FinetuneConfig
from tars import write_packed

RANKS, WORKERS, SHARDS = range(1, 6), range(4), range(1, 10)
EPOCHS = 3
WAIT_S = 30.0

Step = tuple[int, int]  # epoch, batch of it


class Grouped(TarShards):
    """Tar shards that are dear to read in any order, as those of a bucket are."""

    @property
    def groups(self) -> Sequence[int]:  # type: ignore[override]
        return self.shard_starts or []


def picture(level: int) -> bytes:
    """Return a small JPEG of one grey, by which it is known."""
    file = io.BytesIO()
    Image.new("RGB", (16, 16), (level, level, level)).save(file, "JPEG")
    return file.getvalue()


@pytest.fixture(scope="module")
def tars(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[Path]]:
    """Tar files of 1 to 7 images, by how many there are; image n of a set has the grey 3n."""
    drawn, folder = random.Random(6), tmp_path_factory.mktemp("tars")
    found = {}
    for num_shards in SHARDS:
        numbers, paths = itertools.count(), []
        for shard in range(num_shards):
            paths.append(folder / f"{num_shards}-{shard}.tar")
            some = list(itertools.islice(numbers, drawn.randint(1, 7)))
            write_packed(
                paths[-1], [(f"a/{number}.jpg", 0, picture(3 * number)) for number in some]
            )
        found[num_shards] = paths
    return found


def passes_of(source: TarShards, *, batch_size: int, views: int = 1) -> BatchSampler:
    config = FinetuneConfig(
        data_dir=Path("tars"),
        model="m",
        epochs=EPOCHS,
        batch_size=batch_size,
        views_per_image=views,
        seed=5,
    )
    targets = HardLabels([0] * len(source))
    return BatchSampler(config, source, range(len(source)), targets)


def share_of(rank: int, ranks: int) -> Callable[[BatchRequest], BatchRequest]:
    """Return what takes a rank's piece of a batch: neighbours, of sizes that differ by one."""

    def share(request: BatchRequest) -> BatchRequest:
        return request[len(request) * rank // ranks : len(request) * (rank + 1) // ranks]

    return share


def runs(drawn: random.Random, ranks: int, steps: list[Step]) -> Iterator[tuple[int, list[Step]]]:
    """Cut the steps of a run at random into runs that resume each other, of other ranks each."""
    cuts = sorted(drawn.sample(range(len(steps) + 1), min(2, len(steps))))
    for begin, end in itertools.pairwise([0, *cuts, len(steps)]):
        if begin < end:
            yield ranks, steps[begin:end]
            ranks = drawn.choice(RANKS)


def steps_of(sampler: BatchSampler) -> list[Step]:
    width = sampler.config.views_per_image
    starts = range(0, EPOCHS, width)
    return [(epoch, step) for epoch in starts for step in range(len(sampler.batches(epoch)))]


def test_every_image_is_in_one_share_an_epoch_whatever_the_ranks_and_where_it_was_resumed(
    tars: dict[int, list[Path]],
) -> None:
    drawn = random.Random(1)
    kinds = (TarShards, Grouped)
    for ranks, num_shards, kind, views in itertools.product(RANKS, SHARDS, kinds, (1, 2)):
        source = kind(tars[num_shards], name="tars", split="train")
        sampler = passes_of(source, batch_size=drawn.choice([2, 3, 5, 8, 50]), views=views)
        seen: Counter[tuple[int, int]] = Counter()
        for num, steps in runs(drawn, ranks, steps_of(sampler)):
            epoch, step = steps[0]
            for rank in range(num):
                requests = sampler.batches_from(epoch, step, local=share_of(rank, num))
                mine = list(itertools.islice(requests, len(steps)))
                assert len(mine) == len(steps), "every rank has every step"
                seen.update((p, view) for request in mine for p, shown in request for view in shown)
        assert seen == {(p, e): 1 for p in range(len(source)) for e in range(EPOCHS)}


@pytest.mark.parametrize("kind", [TarShards, Grouped])
@pytest.mark.parametrize("ranks", RANKS)
def test_every_image_is_read_once_an_epoch_by_ranks_that_wait_for_each_other(
    tars: dict[int, list[Path]], ranks: int, kind: type[TarShards]
) -> None:
    drawn = random.Random(ranks)
    for workers in WORKERS:
        source = kind(tars[drawn.choice(SHARDS)], name="tars", split="train")
        check_run(source, drawn, ranks=ranks, workers=workers)


@pytest.mark.parametrize("kind", [TarShards, Grouped])
def test_three_ranks_two_workers_and_seven_shards_do_not_hang(
    tars: dict[int, list[Path]], kind: type[TarShards]
) -> None:
    source = kind(tars[7], name="tars", split="train")
    check_run(source, random.Random(0), ranks=3, workers=2)


@pytest.mark.slow
def test_every_image_is_read_once_an_epoch_in_every_case(tars: dict[int, list[Path]]) -> None:
    drawn = random.Random(2)
    for ranks, workers, num_shards in itertools.product(RANKS, WORKERS, SHARDS):
        for kind in (TarShards, Grouped):
            source = kind(tars[num_shards], name="tars", split="train")
            check_run(source, drawn, ranks=ranks, workers=workers)


def check_run(source: TarShards, drawn: random.Random, *, ranks: int, workers: int) -> None:
    """Read all epochs, stopped and gone on at random places, and insist on every image once."""
    sampler = passes_of(source, batch_size=drawn.choice([2, 5, 8, 50]))
    seen: Counter[tuple[int, int]] = Counter()
    for num, steps in runs(drawn, ranks, steps_of(sampler)):
        # as a gradient that all ranks must have: who comes once too often is waited for in vain
        barrier = threading.Barrier(num, timeout=WAIT_S)
        with ThreadPoolExecutor(num) as pool:
            reads = [
                pool.submit(read_share, sampler, steps, share_of(rank, num), workers, barrier)
                for rank in range(num)
            ]
            for read in reads:
                seen.update(read.result())
    assert seen == {(p, epoch): 1 for p in range(len(source)) for epoch in range(EPOCHS)}


def read_share(
    sampler: BatchSampler,
    steps: list[Step],
    share: Callable[[BatchRequest], BatchRequest],
    workers: int,
    barrier: threading.Barrier,
) -> list[tuple[int, int]]:
    """Read a rank's share of some steps; return the image and view of every row."""
    reader = ViewReader(sampler.source, img_size=8, views=DrawnViews(0))
    requests = sampler.batches_from(*steps[0], local=share)
    seen: list[tuple[int, int]] = []
    for pixels in read_views(reader, itertools.islice(requests, len(steps)), workers=workers):
        greys = pixels.images_BCHW.float().mean((1, 2, 3)).numpy()
        np.testing.assert_allclose(greys, [3 * p for p in pixels.positions], atol=1)
        assert not pixels.failed
        seen += zip(pixels.positions, pixels.views, strict=True)
        barrier.wait()
    return seen
