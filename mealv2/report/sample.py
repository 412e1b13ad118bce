"""Read a seeded sample of a label set: what the ensemble says about each view, as numbers."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mealv2.codec import Kept
from mealv2.data.source import UNLABELLED
from mealv2.label_set import LabelSet, ShardFile, class_of
from mealv2.report.averaged import teacher_sets

MASS_K = (1, 2, 3, 5, 10, 20, 50, 100)
MAX_VIEWS = 100_000  # of a sample, all images together
_MIN_VIEWS = 8  # of an image of a sample, where the set has as many
_MAX_MEANS = 25_000_000  # images x classes of a sample: 100 MB
_BATCH_VALUES = 4_000_000  # views x classes that are read at once
_BATCH_VIEWS = 2048


@dataclass(frozen=True)
class LabelSample:
    """What an ensemble says about V views of N images of a label set with C classes.

    ``hard_N`` is the hard label or UNLABELLED, ``sizes_N2`` width and height of the image in pixels
    (None where the set has no sizes), ``bytes_N`` the stored bytes of one view's label, the mean of
    the image's views. ``views_V`` are the view numbers; ``has_NV`` is False where an image has no
    such view, whose values are NaN, -1 in ``best_NV``. Per view: ``best_NV`` the likeliest class,
    ``top1_NV`` its probability, ``hard_prob_NV`` that of the hard label (NaN without one),
    ``entropy_NV`` in nats, ``mass_NVK`` the mass of the ``mass_k[i]`` likeliest classes. The mean
    soft label of the views is ``mean_NC``. ``num_images`` and ``num_views`` describe the whole set.
    """

    classes: list[str]
    keys: list[str]
    hard_N: np.ndarray
    sizes_N2: np.ndarray | None
    bytes_N: np.ndarray
    views_V: np.ndarray
    has_NV: np.ndarray
    best_NV: np.ndarray
    top1_NV: np.ndarray
    hard_prob_NV: np.ndarray
    entropy_NV: np.ndarray
    mass_k: tuple[int, ...]
    mass_NVK: np.ndarray
    mean_NC: np.ndarray
    num_images: int
    num_views: int
    seed: int

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def is_all(self) -> bool:
        """Whether the sample is the whole set."""
        return len(self) == self.num_images and len(self.views_V) == self.num_views

    @property
    def size_text(self) -> str:
        """The size of the sample in words, for captions."""
        images, views = f"{len(self):,} images", f"{len(self.views_V)} views"
        if self.is_all:
            return f"all {images}, {views} each"
        return (
            f"a random sample (seed {self.seed}) of {images} of {self.num_images:,}, "
            f"{views} of {self.num_views} each"
        )

    def contradicts(self) -> np.ndarray:
        """Return whether the likeliest class of each view is another than the hard label, N x V."""
        is_labelled_N1 = (self.hard_N != UNLABELLED)[:, None]
        contradicts: np.ndarray = (
            self.has_NV & is_labelled_N1 & (self.best_NV != self.hard_N[:, None])
        )
        return contradicts

    def disagreement(self) -> np.ndarray:
        """Return how far the views of each image disagree, in nats, 0 if all say the same.

        The entropy of the mean label minus the mean entropy: the generalised Jensen-Shannon
        divergence of the views (Lin 1991, equation 5.1).
        """
        means_NC = self.mean_NC.astype(np.float64)
        of_mean_N = -(means_NC * np.log(np.maximum(means_NC, 1e-300))).sum(axis=1)
        found: np.ndarray = np.maximum(0.0, of_mean_N - np.nanmean(self.entropy_NV, axis=1))
        return found


def sample_labels(
    labels: LabelSet,
    *,
    hard: Mapping[str, int] | None = None,
    max_views: int = MAX_VIEWS,
    seed: int = 0,
) -> LabelSample:
    """Read a random sample of at most ``max_views`` views; all, if the set is not larger.

    A larger set gives at least eight views (or all) of each of as many images as fit. ``hard`` are
    the class ids by key for a set without them. The memory does not grow with the set, except that
    the keys are listed once. Raises LabelSetError for damaged labels and an empty set.
    """
    if not len(labels):
        raise ValueError(f"{labels.folder} has no labels of the split {labels.split}")
    rng = np.random.default_rng(seed)
    num_views = min(labels.num_views, max(_MIN_VIEWS, max_views // len(labels)))
    num_images = min(
        len(labels), max(1, max_views // num_views), max(1, _MAX_MEANS // labels.num_classes)
    )
    rows_N = np.sort(rng.choice(len(labels), num_images, replace=False))
    views_V = np.sort(rng.choice(labels.num_views, num_views, replace=False))
    first_views = labels.blocks[0][0]
    if views_V[0] not in first_views:  # the only views that every image has
        views_V[0] = rng.choice(first_views)
    return _read(labels, rows_N, views_V, hard=hard, seed=seed)


def sample_image(labels: LabelSet, key: str) -> LabelSample:
    """Return all views of one image as a sample; raises LabelSetError for an unknown key."""
    labels.soft_labels([key], [0])  # its error names the reason
    return _read(labels, labels.image_rows([key]), np.arange(labels.num_views))


def _read(
    labels: LabelSet,
    rows_N: np.ndarray,
    views_V: np.ndarray,
    *,
    hard: Mapping[str, int] | None = None,
    seed: int = 0,
) -> LabelSample:
    """Return these views of the images in these rows of a set, in order."""
    keys, hard_N, sizes_N2 = _images(labels, rows_N)
    if hard is not None:
        hard_N = np.array([hard.get(key, UNLABELLED) for key in keys], dtype=np.int64)
    per_view = _PerView(labels, keys, hard_N, views_V)
    per_view.read()
    return LabelSample(
        classes=labels.classes,
        keys=keys,
        hard_N=hard_N,
        sizes_N2=sizes_N2,
        bytes_N=np.sum([_bytes_per_view(each, keys) for each in teacher_sets(labels)], axis=0),
        views_V=views_V,
        has_NV=per_view.has_NV,
        best_NV=per_view.best_NV,
        top1_NV=per_view.top1_NV,
        hard_prob_NV=per_view.hard_prob_NV,
        entropy_NV=per_view.entropy_NV,
        mass_k=per_view.mass_k,
        mass_NVK=per_view.mass_NVK,
        mean_NC=per_view.mean_NC,
        num_images=len(labels),
        num_views=labels.num_views,
        seed=seed,
    )


class _PerView:
    """The arrays of a sample, filled batch by batch."""

    def __init__(
        self, labels: LabelSet, keys: list[str], hard_N: np.ndarray, views_V: np.ndarray
    ) -> None:
        shape = len(keys), len(views_V)
        self._labels, self._keys, self._hard_N, self._views_V = labels, keys, hard_N, views_V
        self.has_NV = _has_views(labels, keys, views_V)
        self.best_NV = np.full(shape, -1, dtype=np.int64)
        self.top1_NV, self.hard_prob_NV, self.entropy_NV = (np.full(shape, np.nan) for _ in "123")
        self.mass_k = tuple(k for k in MASS_K if k < labels.num_classes) or (1,)
        self.mass_NVK = np.full((*shape, len(self.mass_k)), np.nan)
        self.mean_NC = np.zeros((len(keys), labels.num_classes), dtype=np.float32)

    def read(self) -> None:
        """Read all views."""
        num_views = min(_BATCH_VIEWS, max(1, _BATCH_VALUES // self._labels.num_classes))
        step = max(1, num_views // len(self._views_V))
        for start in range(0, len(self._keys), step):
            self._read(range(start, min(start + step, len(self._keys))))

    def _read(self, rows: range) -> None:
        """Read the views of some images, which must be neighbours."""
        where = self.has_NV[rows.start : rows.stop]
        image_M, column_M = np.nonzero(where)
        image_M += rows.start
        names = [self._keys[row] for row in image_M.tolist()]
        found = self._labels.soft_labels(names, self._views_V[column_M].tolist())
        kept, num_classes = found.kept().by_probability(), self._labels.num_classes
        at = image_M, column_M
        values = view_values(kept, num_classes, self._hard_N[image_M], self.mass_k)
        for array, of_views in zip(
            (self.best_NV, self.top1_NV, self.hard_prob_NV, self.entropy_NV, self.mass_NVK),
            values,
            strict=True,
        ):
            array[at] = of_views
        dense_MC = kept.spread(kept.probs_NK, kept.tail_N, num_classes).numpy()
        ends = np.cumsum(where.sum(axis=1))  # every image has a view
        sums = np.add.reduceat(dense_MC, [0, *ends[:-1].tolist()], axis=0, dtype=np.float64)
        self.mean_NC[rows.start : rows.stop] = sums / where.sum(axis=1)[:, None]


def view_values(
    kept: Kept, num_classes: int, hard_M: np.ndarray, mass_k: Sequence[int]
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return what LabelSample has of M views: best, top1, hard_prob, entropy, mass (M x K).

    Sums in float64, over the classes that a label keeps and its even tail.
    """
    probs_MK = np.where(kept.is_kept_NK.numpy(), kept.probs_NK.numpy(), 0).astype(np.float64)
    indices_MK, is_kept_MK = kept.indices_NK.numpy(), kept.is_kept_NK.numpy()
    tail_M, num_kept_M = kept.tail_N.numpy().astype(np.float64), is_kept_MK.sum(axis=1)
    best_M, top1_M = kept.likeliest().numpy(), np.maximum(probs_MK.max(axis=1), tail_M)
    is_hard_MK = is_kept_MK & (indices_MK == hard_M[:, None])
    hard_prob_M = np.where(is_hard_MK.any(axis=1), (probs_MK * is_hard_MK).sum(axis=1), tail_M)
    hard_prob_M[hard_M == UNLABELLED] = np.nan
    # 0 log 0 = 0
    entropy_M = -(probs_MK * np.log(np.maximum(probs_MK, 1e-300))).sum(axis=1)
    entropy_M -= (num_classes - num_kept_M) * tail_M * np.log(np.maximum(tail_M, 1e-300))
    mass = [_mass(probs_MK, num_kept_M, tail_M, num_classes, k) for k in mass_k]
    return best_M, top1_M, hard_prob_M, entropy_M, np.stack(mass, axis=1)


def _mass(
    probs_MK: np.ndarray, num_kept_M: np.ndarray, tail_M: np.ndarray, num_classes: int, k: int
) -> np.ndarray:
    """Return the mass of the k likeliest classes; a class not kept may exceed one that is."""
    cumulative_MK = np.cumsum(-np.sort(-probs_MK, axis=1), axis=1)
    cumulative_MK = np.pad(cumulative_MK, ((0, 0), (1, 0)))
    above_M = (probs_MK > tail_M[:, None]).sum(axis=1)
    of_tail_M = np.clip(k - above_M, 0, num_classes - num_kept_M)
    of_kept_M = np.minimum(k - of_tail_M, num_kept_M)
    mass_M: np.ndarray = cumulative_MK[np.arange(len(probs_MK)), of_kept_M] + of_tail_M * tail_M
    return mass_M


def _has_views(labels: LabelSet, keys: list[str], views_V: np.ndarray) -> np.ndarray:
    """Return whether the set has each view of each image, bool N x V."""
    has_NV = np.ones((len(keys), len(views_V)), dtype=bool)
    for views, _ in labels.blocks[1:]:  # an image that could not be read has no added views
        columns = [column for column, view in enumerate(views_V.tolist()) if view in views]
        if columns:
            first = int(views_V[columns[0]])
            has_NV[:, columns] = np.array([[labels.holds(key, first)] for key in keys])
    return has_NV


def _images(
    labels: LabelSet, rows_N: np.ndarray
) -> tuple[list[str], np.ndarray, np.ndarray | None]:
    """Return key, class id and size of the images at these sorted rows."""
    keys: list[str] = []
    hard: list[int] = []
    sizes: list[np.ndarray] = []
    for file, inside in _files(labels, rows_N):
        names, images = file.keys(), file.images
        keys += [names[row] for row in inside.tolist()]
        if images is None:
            hard += [UNLABELLED] * len(inside)
        else:
            hard += [class_of(number) for number in images.classes_N[inside].tolist()]
            sizes.append(images.sizes_N2[inside].astype(np.int64))
    sizes_N2 = np.concatenate(sizes) if sum(map(len, sizes)) == len(keys) else None
    return keys, np.array(hard, dtype=np.int64), sizes_N2


def _bytes_per_view(labels: LabelSet, keys: list[str]) -> np.ndarray:
    """Return the stored bytes of one view's label, the mean of the first block's views, N."""
    rows_N = labels.image_rows(keys)
    order_N = np.argsort(rows_N)
    sorted_N = np.concatenate(
        [
            np.diff(np.append(np.int64(0), file.column("label_ends").astype(np.int64)))[inside]
            / file.num_views
            for file, inside in _files(labels, rows_N[order_N])
        ]
    )
    bytes_N = np.empty(len(keys))
    bytes_N[order_N] = sorted_N
    return bytes_N


def _files(labels: LabelSet, rows_N: np.ndarray) -> Iterator[tuple[ShardFile, np.ndarray]]:
    """Yield the files that have the images at these sorted rows, and their rows in the file."""
    start = 0
    for file in labels.blocks[0][1]:
        stop = start + file.num_images
        inside = rows_N[(rows_N >= start) & (rows_N < stop)] - start
        if len(inside):
            yield file, inside
            file.unmap()
        start = stop
