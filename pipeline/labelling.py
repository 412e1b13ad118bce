"""What the ensemble says about a stream of views: exact batches in, rows of a label set out."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from mealv2.ensemble import EnsembleOutput, TeacherEnsemble, combine
from mealv2.errors import ConfigError, DataError
from mealv2.images import ImageSource
from mealv2.label_set import Encoding, Rows
from mealv2.metrics import num_correct
from pipeline.config import DEFAULT_RATE, NewEncoding, OnBadImage, PrecomputeConfig
from pipeline.loaders import Pixels, refuse_failures
from pipeline.runtime import Runtime

_ENCODED_AT_ONCE = 1 << 22  # probabilities; 16 MB, and as many mean logits


@dataclass(frozen=True)
class Answers:
    """The labels of N views: ``positions`` in the source, and ``rows`` on the CPU.

    ``sizes_N2`` and ``boxes_N5`` say of which pixels, as in Pixels. ``correct`` counts the right
    answers, int64 2 x (T + 1): at top-1 and top-5, of every teacher and last of the ensemble.
    ``failed`` are the images that could not be read, with the reason.
    """

    positions: list[int]
    rows: Rows
    sizes_N2: np.ndarray
    boxes_N5: np.ndarray
    correct: np.ndarray
    failed: dict[int, str]


@dataclass(frozen=True)
class Labeller:
    """An ensemble on its device, and how its answers are kept."""

    ensemble: TeacherEnsemble
    machine: Runtime
    encoding: Encoding
    batch_size: int
    on_bad_image: OnBadImage

    def label(self, source: ImageSource, pixels: Iterable[Pixels], *, score: bool) -> Answers:
        """Answer every view of a stream, in batches of exactly ``batch_size``, the last one fewer.

        Batches depend on the stream alone, not on who read it. ``score`` compares with the data's
        labels. Raises DataError for an unreadable image (unless skipped) or answers not finite.
        """
        failed: dict[int, str] = {}
        positions: list[int] = []
        kept = _Kept(self.encoding)
        sizes, boxes = [np.empty((0, 2), np.uint32)], [np.empty((0, 5), np.uint32)]
        correct = np.zeros((2, len(self.ensemble.teachers) + 1), dtype=np.int64)

        def noted() -> Iterator[Pixels]:
            for item in pixels:
                refuse_failures(source, item.failed, self.on_bad_image)
                failed.update(item.failed)
                sizes.append(item.sizes_B2)
                boxes.append(item.boxes_B5)
                yield item

        for images_BCHW, batch in self._exact_batches(noted()):
            logits_TBC, answer = self.ask(images_BCHW)
            if not bool(torch.isfinite(answer.probs_BC).all()):
                raise DataError(
                    f"the teachers' answers near {source.keys[batch[0]]} are not finite; "
                    "check their weights, or leave out --amp"
                )
            if score:
                truth = [source.labels[p] for p in batch]
                correct += _num_correct(logits_TBC, answer.probs_BC, truth)
            positions += batch
            kept.add(answer)
        return Answers(
            positions,
            kept.rows(),
            np.concatenate(sizes),
            np.concatenate(boxes),
            correct,
            failed,
        )

    def ask(self, images_BCHW: torch.Tensor) -> tuple[torch.Tensor, EnsembleOutput]:
        """Return the teachers' logits T x B x C and the ensemble's answer, float32."""
        with self.machine.autocast():
            logits_TBC = self.ensemble.teacher_logits(self.machine.images(images_BCHW))
        return logits_TBC, combine(logits_TBC)

    def _exact_batches(self, pixels: Iterable[Pixels]) -> Iterator[tuple[torch.Tensor, list[int]]]:
        """Regroup what the workers sent."""
        waiting: list[torch.Tensor] = []
        positions: list[int] = []
        for item in pixels:
            waiting.append(item.images_BCHW)
            positions += item.positions
            while len(positions) >= self.batch_size:
                images_BCHW = torch.cat(waiting)
                yield images_BCHW[: self.batch_size], positions[: self.batch_size]
                waiting = [images_BCHW[self.batch_size :]]
                positions = positions[self.batch_size :]
        if positions:
            yield torch.cat(waiting), positions


class _Kept:
    """Answers as a label set keeps them, encoded some thousand at a time.

    A call of the encoder costs milliseconds however few its rows; rows do not depend on the others.
    """

    def __init__(self, encoding: Encoding) -> None:
        self._encoding = encoding
        self._waiting: list[EnsembleOutput] = []
        none = torch.zeros(0, encoding.num_classes)
        self._parts = [encoding.encode(none, none)]

    def add(self, answer: EnsembleOutput) -> None:
        """Keep the answer to a batch."""
        self._waiting.append(answer)
        if sum(part.probs_BC.numel() for part in self._waiting) >= _ENCODED_AT_ONCE:
            self._encode()

    def rows(self) -> Rows:
        """Return all rows, on the CPU."""
        self._encode()
        return Rows.joined(self._parts)

    def _encode(self) -> None:
        if self._waiting:
            columns = zip(*self._waiting, strict=True)
            probs_NC, mean_logits_NC = (torch.cat(column) for column in columns)
            rows = self._encoding.encode(probs_NC, mean_logits_NC)
            self._parts.append(rows.to(torch.device("cpu")))
            self._waiting.clear()


def encoding_of(config: PrecomputeConfig | NewEncoding, num_classes: int) -> Encoding:
    """Return how labels are kept; raises ConfigError for what these classes do not allow."""
    rate, topk, form = None, None, config.label_dtype or "curve"
    if config.topk is None:
        rate = DEFAULT_RATE if config.rate is None else config.rate
    elif config.topk == "all":
        topk, form = num_classes, config.label_dtype or "float16"
    else:
        topk = int(config.topk)
        if topk > num_classes:
            raise ConfigError(
                f"--topk {topk}: the data has only {num_classes} classes; use less, or all"
            )
    try:
        return Encoding(num_classes, form, rate=rate, topk=topk, logits=config.store_logits)
    except ValueError as error:
        raise ConfigError(
            f"{error}; --topk all or --label-dtype stores values as they are"
        ) from None


def _num_correct(logits_TBC: torch.Tensor, probs_BC: torch.Tensor, labels: list[int]) -> np.ndarray:
    labels_B = torch.tensor(labels, device=probs_BC.device)
    scores = [*logits_TBC, probs_BC]
    return np.array([[int(num_correct(s, labels_B, k)) for s in scores] for k in (1, 5)])
