"""Run the ensemble on a stream of batches and encode its outputs as rows of a label set."""

from collections.abc import Iterable
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import torch

from mealv2 import defaults
from mealv2.codec import to_device
from mealv2.data.loader import on_device
from mealv2.data.requests import Batch, check_failures
from mealv2.data.source import ImageSource
from mealv2.errors import ConfigError, OnBadImage
from mealv2.label_set import Encoding, EncodingLoss, LabelSet, Rows
from mealv2.labelling.row_encoder import RowEncoder
from mealv2.metrics import num_correct
from mealv2.models.ensemble import (
    ONE_SIZE,
    BySize,
    EnsembleOutput,
    TeacherEnsemble,
    combine,
)
from mealv2.runtime import LocalRuntime


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
        sizes, boxes = [np.empty((0, 2), np.uint32)], [np.empty((0, 5), np.uint32)]
        device = self.runtime.device
        shape = (2, len(self.ensemble.teachers) + 1)
        correct = torch.zeros(shape, dtype=torch.int64, device=device)
        with closing(RowEncoder(self.encoding, source, num_views, self.first)) as encoder:
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
