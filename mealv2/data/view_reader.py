"""Read the views of one request: decode every image once, cut its views into rows of a batch."""

import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import KW_ONLY, dataclass
from functools import partial

import numpy as np

from mealv2.data.batch_cut import can_cut, centre_crop_batch, cut_batch
from mealv2.data.buffers import BufferPool
from mealv2.data.content_hash import ImageCheck
from mealv2.data.image_cache import ImageCache
from mealv2.data.pixels import DecodedImage, Resize, ViewsOf, centre_crop, decode_for
from mealv2.data.requests import CENTRE, Batch, BatchRequest
from mealv2.data.source import ImageSource
from mealv2.errors import DataError
from mealv2.view_boxes import boxes_of
from mealv2.views import View, Views

_VIEWS_OF_A_CUT = 8  # of one image that are cut one after another
_MIN_TOGETHER = 16  # fewer small views are cut one by one
_TWO_32 = 1 << 32


@dataclass(frozen=True)
class ViewReader:
    """How to load views of a source's images; ``views`` are not needed for centre crops.

    ``other_sizes`` are sizes beside ``img_size`` to resize each view to. ``check`` compares images
    with those that were labelled; batches get ``hashes`` if kept. ``cache`` keeps decoded images,
    unless their hashes are kept.
    """

    source: ImageSource
    _: KW_ONLY
    img_size: int
    views: Views | None = None
    resize: Resize = "torch"
    check: ImageCheck | None = None
    keeps_hashes: bool = False
    other_sizes: tuple[int, ...] = ()
    cache: ImageCache | None = None

    @property
    def sizes(self) -> tuple[int, ...]:
        """All sizes of the views, that of ``img_size`` first."""
        return (self.img_size, *self.other_sizes)

    def hash_of(self, position: int, data: bytes) -> int | None:
        """Return the content hash of an image, None if it is not needed; raises as ``check``."""
        if not (self.keeps_hashes or (self.check is not None and self.check.is_due(position))):
            return None
        found = self.source.original_hash(position, data)
        if self.check is not None:
            self.check(position, found)
        return found

    def decoded(self, position: int) -> np.ndarray | None:
        """Return the pixels of an image if they are in memory and need no comparison."""
        if self.cache is None or self.keeps_hashes:
            return None
        is_due = self.check is not None and self.check.is_due(position)
        return None if is_due else self.cache.get(position)

    @property
    def open_cache(self) -> ImageCache | None:
        """The cache if it may keep images that are decoded now."""
        is_open = self.cache is not None and self.cache.is_open and not self.keeps_hashes
        return self.cache if is_open else None

    def read(self, request: BatchRequest) -> Batch:
        """Return the batch of one request, read by this thread."""
        return BatchReader(self, request, memory=BufferPool(pin_memory=False)).read()

    def views_of(
        self, position: int, indices: Iterable[int], width: int, height: int
    ) -> list[View]:
        """Return the boxes and flips of some views of an image."""
        assert self.views is not None, "only centre crops can be cut without views"
        key = self.source.keys[position]
        return [self.views.view(key, index, width=width, height=height) for index in indices]

    def cut(
        self, decoded_image: DecodedImage, position: int, index: int
    ) -> tuple[list[np.ndarray], tuple[int, ...]]:
        """Return the pixels of a view of a decoded image in each of ``sizes``, and its box."""
        resize = self.resize
        if index == CENTRE:
            pixels_HWC = decoded_image.pixels_HWC
            return [centre_crop(pixels_HWC, s, resize=resize) for s in self.sizes], (0, 0, 0, 0, 0)
        (view,) = self.views_of(position, (index,), decoded_image.width, decoded_image.height)
        return [decoded_image.cut(view, s, resize=resize) for s in self.sizes], view.box()

    def can_cut_together(self, height: int, width: int, is_centre: bool) -> bool:
        """Return whether views of many images of one size are cut together; centre crops or not."""
        if not (is_centre or getattr(self.views, "draws_small_boxes", False)):
            return False
        return all(can_cut(self.resize, height, width, size) for size in self.sizes)

    def cut_together(
        self, images_NHWC: np.ndarray, positions: Sequence[int], indices: Sequence[int]
    ) -> tuple[list[np.ndarray], np.ndarray]:
        """Return a view of each of N images in each of ``sizes``, and the boxes, N x 5.

        All views are centre crops, or none is.
        """
        if indices[0] == CENTRE:
            cut = [centre_crop_batch(images_NHWC, s, resize=self.resize) for s in self.sizes]
            return cut, np.zeros((len(images_NHWC), 5), dtype=np.int64)
        assert self.views is not None, "only centre crops can be cut without views"
        num, height, width, _ = images_NHWC.shape
        keys = [self.source.keys[position] for position in positions]
        boxes_N5 = boxes_of(self.views, keys, indices, np.full(num, width), np.full(num, height))
        cut = [cut_batch(images_NHWC, boxes_N5, s, resize=self.resize) for s in self.sizes]
        return cut, boxes_N5


class LoadedImage:
    """An image, decoded by the first thread that needs it, released by the last."""

    def __init__(self, reader: ViewReader, position: int) -> None:
        self.position = position
        self.failure: str | None = None
        self.content_hash: int | None = None
        self._reader = reader
        self._lock = threading.Lock()
        self._uses = 0
        self._is_shared = False
        self._decoded: DecodedImage | None = None

    def keep(self) -> None:
        """Keep the pixels for one more use."""
        with self._lock:
            self._uses += 1
            self._is_shared = self._uses > 1

    def release(self) -> None:
        """End one use."""
        with self._lock:
            self._uses -= 1
            if self._uses == 0:
                self._decoded = None

    def decoded(self, views_of: ViewsOf | None) -> DecodedImage | None:
        """Return the part that ``views_of`` needs, or all of an image that other tasks need too.

        None for an image that cannot be read; ``failure`` has the reason.
        """
        with self._lock:
            if self._decoded is None and self.failure is None:
                try:
                    self._decoded = self._decode(views_of)
                except (DataError, OSError) as error:
                    self.failure = getattr(error, "strerror", None) or str(error)
            return self._decoded

    def _decode(self, views_of: ViewsOf | None) -> DecodedImage:
        reader, position = self._reader, self.position
        pixels_HWC = reader.decoded(position)
        if pixels_HWC is not None:
            height, width, _ = pixels_HWC.shape
            return DecodedImage(pixels_HWC, width, height)
        data = reader.source.read(position)
        self.content_hash = reader.hash_of(position, data)
        cache = reader.open_cache
        if cache is None:
            return decode_for(data, None if self._is_shared else views_of)
        decoded_image = decode_for(data, None)
        cache.add(position, decoded_image.pixels_HWC)
        return decoded_image


# Some views of an image, and the row of the first.
_ImageViews = tuple[LoadedImage, tuple[int, ...], int]
_SmallViews = tuple[list[int], list[int], list[int], list[np.ndarray]]
_Groups = defaultdict[tuple[int, int, bool], _SmallViews]  # by height, width, whether centre crops


def _groups() -> _Groups:
    """Return no views: the row, position and index of each and the pixels of its image."""
    return defaultdict(lambda: ([], [], [], []))


class BatchReader:
    """A batch while threads fill its rows.

    ``before`` is the last image of the previous request: its views may continue in this one.
    """

    def __init__(
        self,
        reader: ViewReader,
        request: BatchRequest,
        *,
        memory: BufferPool,
        before: LoadedImage | None = None,
    ) -> None:
        self._reader = reader
        self._positions = [position for position, views in request for _ in views]
        self._indices = [index for _, views in request for index in views]
        self.has_large_images = False  # that are cut one by one
        self._in_memory = _groups()
        self._from_files: list[_ImageViews] = []
        num_rows = len(self._positions)
        self._images = [memory.take(num_rows, size) for size in reader.sizes]  # B x S x S x 3
        self._rows = [images_BHWC.numpy() for images_BHWC in self._images]
        self._sizes_B2 = np.zeros((num_rows, 2), dtype=np.uint32)
        self._boxes_B5 = np.zeros((num_rows, 5), dtype=np.uint32)
        self.last = self._divide(request, before)

    def _divide(self, request: BatchRequest, before: LoadedImage | None) -> LoadedImage | None:
        """Divide the views by where their images are; return the last image."""
        row, image = 0, before
        for position, views in request:
            pixels_HWC = self._reader.decoded(position)
            if pixels_HWC is not None and self._add(
                self._in_memory, row, position, views, pixels_HWC
            ):
                row += len(views)
                continue
            if image is None or image.position != position:
                image = LoadedImage(self._reader, position)
            for start in range(0, len(views), _VIEWS_OF_A_CUT):
                image.keep()
                part = views[start : start + _VIEWS_OF_A_CUT]
                self._from_files.append((image, part, row + start))
            row += len(views)
        if image is not None:
            image.keep()  # for the next request
        if before is not None:
            before.release()
        return image

    def _add(
        self,
        groups: _Groups,
        row: int,
        position: int,
        views: tuple[int, ...],
        pixels_HWC: np.ndarray,
    ) -> bool:
        """Add views that are cut with others to their group; return whether they are."""
        height, width, _ = pixels_HWC.shape
        is_centre = views == (CENTRE,)
        if CENTRE in views and not is_centre:
            return False
        group = height, width, is_centre
        if group not in groups and not self._reader.can_cut_together(*group):
            return False
        rows, positions, indices, images = groups[group]
        for at, index in enumerate(views, start=row):
            rows.append(at)
            positions.append(position)
            indices.append(index)
            images.append(pixels_HWC)
        return True

    @property
    def reads_files(self) -> bool:
        """Whether some of its images are not in memory."""
        return bool(self._from_files)

    def tasks(self, num_views: int) -> Iterator[tuple[int, Callable[[], None]]]:
        """Yield tasks of about ``num_views`` views, with the number of views.

        Those of small images in memory are one task.
        """
        if self._in_memory:
            total = sum(len(rows) for rows, *_ in self._in_memory.values())
            yield total, partial(self._cut_groups, self._in_memory)
        task: list[_ImageViews] = []
        size = 0
        for image_views in self._from_files:
            task.append(image_views)
            size += len(image_views[1])
            if size >= num_views:
                yield size, partial(self._read, task)
                task, size = [], 0
        if task:
            yield size, partial(self._read, task)

    def read(self) -> Batch:
        """Fill all rows in this thread; return the batch."""
        for _, run in self.tasks(len(self._positions)):
            run()
        return self.finish()

    def _read(self, task: list[_ImageViews]) -> None:
        """Decode the images of a task if necessary and cut their views."""
        groups = _groups()
        for image, indices, row in task:
            views_of = partial(self._reader.views_of, image.position, indices)
            decoded_image = image.decoded(None if CENTRE in indices else views_of)
            if decoded_image is not None:
                pixels_HWC, position = decoded_image.pixels_HWC, image.position
                is_complete = decoded_image.is_complete
                if not (is_complete and self._add(groups, row, position, indices, pixels_HWC)):
                    self.has_large_images = True
                    self._sizes_B2[row : row + len(indices)] = (
                        decoded_image.width,
                        decoded_image.height,
                    )
                    for at, index in enumerate(indices, start=row):
                        self._cut(at, position, index, decoded_image)
            image.release()
        self._cut_groups(groups)

    def _cut(self, row: int, position: int, index: int, decoded_image: DecodedImage) -> None:
        cut, self._boxes_B5[row] = self._reader.cut(decoded_image, position, index)
        for rows, pixels_HWC in zip(self._rows, cut, strict=True):
            rows[row] = pixels_HWC

    def _cut_groups(self, groups: _Groups) -> None:
        """Cut the views of small images, those of the same size together."""
        for (height, width, _), (rows, positions, indices, images) in groups.items():
            self._sizes_B2[rows] = width, height
            if len(rows) < _MIN_TOGETHER:
                for row, position, index, pixels_HWC in zip(
                    rows, positions, indices, images, strict=True
                ):
                    self._cut(row, position, index, DecodedImage(pixels_HWC, width, height))
                continue
            cut, boxes_N5 = self._reader.cut_together(np.stack(images), positions, indices)
            self._boxes_B5[rows] = boxes_N5 % _TWO_32
            for rows_BSSC, pixels_NSSC in zip(self._rows, cut, strict=True):
                rows_BSSC[rows] = pixels_NSSC

    def finish(self, tasks: Iterable[Future[None]] = ()) -> Batch:
        """Return the batch once its tasks are done."""
        for task in tasks:
            task.result()
        failed = {i.position: i.failure for i, _, _ in self._from_files if i.failure is not None}
        images = (image for image, _, _ in self._from_files)
        hashes = {i.position: i.content_hash for i in images if i.content_hash is not None}
        all_images, sizes_B2, boxes_B5 = self._images, self._sizes_B2, self._boxes_B5
        positions, indices = self._positions, self._indices
        if failed:
            kept = [row for row, position in enumerate(positions) if position not in failed]
            all_images = [images_BHWC[kept] for images_BHWC in all_images]
            sizes_B2, boxes_B5 = sizes_B2[kept], boxes_B5[kept]
            positions = [positions[row] for row in kept]
            indices = [indices[row] for row in kept]
        images_BCHW, *others = (images_BHWC.permute(0, 3, 1, 2) for images_BHWC in all_images)
        other_sizes = dict(zip(self._reader.other_sizes, others, strict=True))
        return Batch(
            images_BCHW, sizes_B2, boxes_B5, positions, indices, failed, hashes, other_sizes
        )
