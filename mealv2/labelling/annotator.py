"""Run the ensemble on a stream of batches and encode its outputs as rows of a label set."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import torch

from mealv2 import defaults
from mealv2.codec import EncodedLabels, to_device
from mealv2.data.loader import on_device
from mealv2.data.requests import Batch, check_failures
from mealv2.data.source import ImageSource
from mealv2.errors import ConfigError, DataError, OnBadImage
from mealv2.label_set import Encoding, EncodingLoss, LabelSet, Rows
from mealv2.labelling.encoding_loss import encoding_loss, sample_size
from mealv2.metrics import num_correct
from mealv2.models.ensemble import (
    ONE_SIZE,
    BySize,
    EnsembleOutput,
    TeacherEnsemble,
    combine,
)
from mealv2.runtime import LocalRuntime

# The encoder runs when either limit is reached: 16 MB of probabilities (and of mean logits), or
# views of few classes at about 2 kB each.
_MAX_PROBABILITIES, _MAX_VIEWS = 1 << 22, 1 << 12


@dataclass(frozen=True)
class Annotations:
    """The labels of N views: ``positions`` in the source, and the encoded ``rows`` on the CPU.

    ``sizes_N2`` and ``boxes_N5`` are as in Batch. ``correct`` has the numbers of correct
    predictions, int64 2 x (T + 1): top-1 and top-5, of every teacher and, last, of the ensemble.
    ``failed`` maps the positions of unreadable images to the reason. ``hashes`` are the content
    hashes of all images whose bytes could be read, by position. ``loss`` is what the first labels
    lose by their encoding.
    """

    positions: list[int]
    rows: Rows
    sizes_N2: np.ndarray
    boxes_N5: np.ndarray
    correct: np.ndarray
    failed: dict[int, str]
    hashes: dict[int, int] = field(default_factory=dict)
    loss: EncodingLoss | None = None

    def without_failed(self) -> "Annotations":
        """Return the annotations without the views of images that failed, which have no rows.

        ``correct`` stays: it is counted for images with one view, which has no row if it failed.
        """
        if self.failed.keys().isdisjoint(self.positions):
            return self
        is_kept_N = np.array([p not in self.failed for p in self.positions], dtype=bool)
        return replace(
            self,
            positions=[p for p in self.positions if p not in self.failed],
            sizes_N2=self.sizes_N2[is_kept_N],
            boxes_N5=self.boxes_N5[is_kept_N],
        )


@dataclass(frozen=True)
class Annotator:
    """An ensemble on its device, and the encoding of its labels.

    ``first`` has the first labels of the images, whose models those of added views may use.
    """

    ensemble: TeacherEnsemble
    runtime: LocalRuntime
    encoding: Encoding
    batch_size: int
    on_bad_image: OnBadImage
    first: LabelSet | None = None

    def annotate(
        self, source: ImageSource, batches: Iterable[Batch], *, num_views: int, count_correct: bool
    ) -> Annotations:
        """Label every view of a stream of batches; an image with an unreadable view has no labels.

        The ``num_views`` views of an image follow each other. ``count_correct`` compares the
        predictions with the classes of the source. Raises DataError for an unreadable image, unless
        ``on_bad_image`` is skip, or for an output of the teachers that is not finite.
        """
        failed: dict[int, str] = {}
        hashes: dict[int, int] = {}
        positions: list[int] = []
        encoder = _RowEncoder(self.encoding, source, num_views, self.first)
        sizes, boxes = [np.empty((0, 2), np.uint32)], [np.empty((0, 5), np.uint32)]
        device = self.runtime.device
        shape = (2, len(self.ensemble.teachers) + 1)
        correct = torch.zeros(shape, dtype=torch.int64, device=device)
        for batch in on_device(batches, device):
            check_failures(source, batch.failed, self.on_bad_image)
            failed |= batch.failed
            hashes |= batch.hashes
            if not batch.positions:
                continue
            positions += batch.positions
            sizes.append(batch.sizes_B2)
            boxes.append(batch.boxes_B5)
            logits_TBC, output = self.predict(batch.images_BCHW, batch.other_sizes)
            if count_correct:
                # on the device: reading a count here would wait for every batch
                classes_B = torch.tensor([source.labels[p] for p in batch.positions])
                classes_B = to_device(classes_B, device)
                scores = (*logits_TBC, output.probs_BC)
                counts = [num_correct(s_BC, classes_B, k) for k in (1, 5) for s_BC in scores]
                correct += torch.stack(counts).view(shape)
            encoder.add(output, batch.positions)
        rows, loss = encoder.finish()
        return Annotations(
            positions,
            rows,
            np.concatenate(sizes),
            np.concatenate(boxes),
            correct.cpu().numpy(),
            failed,
            hashes,
            loss,
        ).without_failed()

    def predict(
        self, images_BCHW: torch.Tensor, other_sizes: BySize = ONE_SIZE
    ) -> tuple[torch.Tensor, EnsembleOutput]:
        """Return the teachers' logits T x B x C and the output of the ensemble, float32.

        ``images_BCHW`` is uint8 on the device, as are ``other_sizes``, which ``teacher_logits``
        describes. The host does not wait for the device.
        """
        with torch.inference_mode():
            with self.runtime.autocast():
                logits_TBC = self.ensemble.teacher_logits(images_BCHW, other_sizes)
            return logits_TBC, combine(logits_TBC)  # outside autocast: softmax and mean in float32


class _RowEncoder:
    """Collects the outputs of batches and encodes the images of some thousand rows at once.

    A call of the encoder takes milliseconds, however few the rows, and images do not depend on each
    other. An image of which views are missing has no rows. The host waits for the device only here.
    """

    def __init__(
        self, encoding: Encoding, source: ImageSource, num_views: int, first: LabelSet | None
    ) -> None:
        self._encoding = encoding
        self._source = source
        self._num_views = num_views
        self._first_set = first
        self._outputs: list[EnsembleOutput] = []
        self._positions: list[int] = []  # of the pending rows
        none = torch.zeros(0, encoding.num_classes)
        self._parts = [encoding.encode(none, none, num_views=num_views)]
        self._first = [none]  # exact probabilities of the first rows, whose loss is measured

    def add(self, output: EnsembleOutput, positions: Sequence[int]) -> None:
        """Add the output of a batch, for the images at these positions of the source.

        Raises DataError, now or at a later call, if the output is not finite.
        """
        self._outputs.append(output)
        self._positions += positions
        limit = min(_MAX_VIEWS, _MAX_PROBABILITIES // self._encoding.num_classes)
        if len(self._positions) >= max(limit, 2 * self._num_views):
            self._encode(all_images=False)

    def finish(self) -> tuple[Rows, EncodingLoss | None]:
        """Return all rows, on the CPU, and what the first ones lose; raises as ``add``."""
        self._encode(all_images=True)
        rows = Rows.concat(self._parts)
        return rows, encoding_loss(torch.cat(self._first), rows.labels)

    def _encode(self, *, all_images: bool) -> None:
        """Encode the pending rows, without those of the last image unless ``all_images``."""
        if not self._outputs:
            return
        columns = zip(*self._outputs, strict=True)
        outputs = EnsembleOutput(*(torch.cat(column) for column in columns))
        is_finite_N = torch.isfinite(outputs.probs_BC).all(dim=1)
        if not bool(is_finite_N.all()):
            key = self._source.keys[self._positions[is_finite_N.tolist().index(False)]]
            raise DataError(
                f"the outputs of the teachers near {key} are not finite; "
                "check their weights, or leave out --amp"
            )
        last = None if all_images else self._positions[-1]
        first_pending = len(self._positions) if last is None else self._positions.index(last)
        rows = complete_images(self._positions[:first_pending], self._num_views)
        encoded = self._encoding.encode(
            *(column[rows.to(column.device)] for column in outputs),
            num_views=self._num_views,
            first=self._first_labels(rows),
        )
        self._parts.append(encoded.to(torch.device("cpu")))
        unmeasured = sample_size(self._num_views) - sum(map(len, self._first))
        first = rows[:unmeasured].to(outputs.probs_BC.device)
        self._first.append(outputs.probs_BC[first].cpu())
        self._positions = self._positions[first_pending:]
        pending = EnsembleOutput(*(column[first_pending:] for column in outputs))
        self._outputs = [pending] if self._positions else []

    def _first_labels(self, rows: torch.Tensor) -> EncodedLabels | None:
        """Return a row of the first block of each image of pending rows."""
        if self._first_set is None or not self._encoding.shares_models:
            return None
        of_images = rows[:: self._num_views].tolist()
        keys = [self._source.keys[self._positions[row]] for row in of_images]
        return self._first_set.first_labels(keys)


def complete_images(positions: Sequence[int], num_views: int) -> torch.Tensor:
    """Return the rows, int64, of the images that have all their views."""
    counts = Counter(positions)
    whole = [row for row, position in enumerate(positions) if counts[position] == num_views]
    return torch.tensor(whole, dtype=torch.int64)


def choose_encoding(
    num_classes: int,
    *,
    rate: float | None = None,
    topk: str | int | None = None,
    label_dtype: Literal["float16", "float32"] | None = None,
    store_logits: bool = False,
) -> Encoding:
    """Return the encoding of --rate, --topk (a number, or all) and --label-dtype.

    Raises ConfigError if it does not fit the classes.
    """
    k, form = None, label_dtype or "curve"
    if topk is None:
        rate = defaults.RATE if rate is None else rate
    elif topk == "all":
        k, form = num_classes, label_dtype or "float16"
    else:
        k = int(topk)
        if k > num_classes:
            raise ConfigError(
                f"--topk {topk}: the data has only {num_classes} classes; use a smaller --topk, or "
                "--topk all"
            )
    try:
        return Encoding(num_classes, form, rate=rate, topk=k, logits=store_logits)
    except ValueError as error:
        raise ConfigError(
            f"{error}; --topk all or --label-dtype stores values without coding"
        ) from None
