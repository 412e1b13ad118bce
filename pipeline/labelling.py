"""What the ensemble says about a stream of views: batches in, rows of a label set out."""

from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
import torch

from mealv2.devices import moved
from mealv2.ensemble import EnsembleOutput, TeacherEnsemble, combine
from mealv2.errors import ConfigError, DataError
from mealv2.images import ImageSource
from mealv2.label_set import Encoding, Rows
from mealv2.metrics import num_correct
from pipeline.batch_size import fastest
from pipeline.compiling import compile_teachers
from pipeline.config import DEFAULT_RATE, Labelling, NewEncoding, OnBadImage, PrecomputeConfig
from pipeline.loading.loader import Batch, on_device
from pipeline.loading.requests import check_failures
from pipeline.runtime import Runtime

# Encoded at once: probabilities, 16 MB and as many mean logits, or views, at some 2 kB each.
_MOST_PROBABILITIES, _MOST_VIEWS = 1 << 22, 1 << 12


@dataclass(frozen=True)
class Answers:
    """The labels of N views: ``positions`` in the source, and ``rows`` on the CPU.

    ``sizes_N2`` and ``boxes_N5`` say of which pixels, as in Batch. ``correct`` counts the right
    answers, int64 2 x (T + 1): at top-1 and top-5, of every teacher and last of the ensemble.
    ``failed`` are the images that could not be read, with the reason.
    """

    positions: list[int]
    rows: Rows
    sizes_N2: np.ndarray
    boxes_N5: np.ndarray
    correct: np.ndarray
    failed: dict[int, str]

    def without_failed(self) -> "Answers":
        """Return the same without the views of images that failed: all of an image's, or none.

        ``correct`` stays: it is of images with one view, which have none where they failed.
        """
        is_kept_N = np.array([p not in self.failed for p in self.positions], dtype=bool)
        return replace(
            self,
            positions=[p for p in self.positions if p not in self.failed],
            rows=self.rows.rows(torch.from_numpy(np.flatnonzero(is_kept_N))),
            sizes_N2=self.sizes_N2[is_kept_N],
            boxes_N5=self.boxes_N5[is_kept_N],
        )


@dataclass(frozen=True)
class Labeller:
    """An ensemble on its device, and how its answers are kept."""

    ensemble: TeacherEnsemble
    machine: Runtime
    encoding: Encoding
    batch_size: int
    on_bad_image: OnBadImage

    def label(self, source: ImageSource, pixels: Iterable[Batch], *, score: bool) -> Answers:
        """Answer every view of a stream, batch by batch as it comes.

        An image that failed in one batch has labels in none. ``score`` compares with the data's
        labels. Raises DataError for an unreadable image (unless skipped) or answers not finite.
        """
        failed: dict[int, str] = {}
        positions: list[int] = []
        kept = _Kept(self.encoding)
        sizes, boxes = [np.empty((0, 2), np.uint32)], [np.empty((0, 5), np.uint32)]
        device = self.machine.device
        shape = (2, len(self.ensemble.teachers) + 1)
        correct = torch.zeros(shape, dtype=torch.int64, device=device)
        for item in on_device(pixels, device):
            check_failures(source, item.failed, self.on_bad_image)
            failed |= item.failed
            if not item.positions:
                continue
            positions += item.positions
            sizes.append(item.sizes_B2)
            boxes.append(item.boxes_B5)
            logits_TBC, answer = self.ask(item.images_BCHW)
            if score:
                truth_B = torch.tensor([source.labels[p] for p in item.positions])
                correct += _num_correct(logits_TBC, answer.probs_BC, moved(truth_B, device))
            kept.add(answer, near=source.keys[item.positions[0]])
        answers = Answers(
            positions,
            kept.rows(),
            np.concatenate(sizes),
            np.concatenate(boxes),
            correct.cpu().numpy(),
            failed,
        )
        return answers if failed.keys().isdisjoint(positions) else answers.without_failed()

    def ask(self, images_BCHW: torch.Tensor) -> tuple[torch.Tensor, EnsembleOutput]:
        """Return the teachers' logits T x B x C and the ensemble's answer, float32.

        Of images on the device; nothing here waits for it.
        """
        with torch.inference_mode():
            with self.machine.autocast():
                logits_TBC = self.ensemble.teacher_logits(images_BCHW)
            return logits_TBC, combine(logits_TBC)  # outside autocast: softmax and mean in float32


class _Kept:
    """Answers as a label set keeps them, encoded some thousand at a time.

    A call of the encoder costs milliseconds however few its rows; rows do not depend on the others.
    Here alone the host waits for the device.
    """

    def __init__(self, encoding: Encoding) -> None:
        self._encoding = encoding
        self._waiting: list[EnsembleOutput] = []
        self._finite: list[tuple[str, torch.Tensor]] = []
        self._num_waiting = 0
        none = torch.zeros(0, encoding.num_classes)
        self._parts = [encoding.encode(none, none)]

    def add(self, answer: EnsembleOutput, *, near: str) -> None:
        """Keep the answer to a batch; ``near`` is the key of its first image.

        Raises DataError, now or at a later call, for an answer that is not finite.
        """
        self._waiting.append(answer)
        self._finite.append((near, torch.isfinite(answer.probs_BC).all()))
        self._num_waiting += len(answer.probs_BC)
        most = min(_MOST_VIEWS, _MOST_PROBABILITIES // self._encoding.num_classes)
        if self._num_waiting >= most:
            self._encode()

    def rows(self) -> Rows:
        """Return all rows, on the CPU; raises as ``add``."""
        self._encode()
        return Rows.joined(self._parts)

    def _encode(self) -> None:
        if not self._waiting:
            return
        near, flags = zip(*self._finite, strict=True)
        is_finite_M = torch.stack(flags)
        if not bool(is_finite_M.all()):
            key = near[is_finite_M.tolist().index(False)]
            raise DataError(
                f"the teachers' answers near {key} are not finite; "
                "check their weights, or leave out --amp"
            )
        columns = zip(*self._waiting, strict=True)
        probs_NC, mean_logits_NC = (torch.cat(column) for column in columns)
        rows = self._encoding.encode(probs_NC, mean_logits_NC)
        self._parts.append(rows.to(torch.device("cpu")))
        self._waiting.clear()
        self._finite.clear()
        self._num_waiting = 0


def make_labeller(
    config: Labelling,
    machine: Runtime,
    ensemble: TeacherEnsemble,
    encoding: Encoding,
    *,
    img_size: int,
    most: int,
) -> Labeller:
    """Put an ensemble to work as a config says; its batch size, if found by trying, up to ``most``.

    Raises ConfigError where no batch fits into memory.
    """
    chosen = config.batch_size if config.batch_size != "auto" else 0
    labeller = Labeller(ensemble, machine, encoding, chosen, config.on_bad_image)
    if config.batch_size == "auto":
        found = fastest(labeller.ask, img_size=img_size, device=machine.device, most=most)
        labeller = replace(labeller, batch_size=found)
    if config.compile != "off":
        compile_teachers(ensemble, mode=config.compile, batch_size=labeller.batch_size)
    return labeller


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


def _num_correct(
    logits_TBC: torch.Tensor, probs_BC: torch.Tensor, labels_B: torch.Tensor
) -> torch.Tensor:
    """Return the right answers at top-1 and top-5, 2 x (T + 1), on the device."""
    scores = [*logits_TBC, probs_BC]
    counts = [num_correct(s, labels_B, k) for k in (1, 5) for s in scores]
    return torch.stack(counts).view(2, -1)
