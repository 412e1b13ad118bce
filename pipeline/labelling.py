"""What the ensemble says about a stream of views: exact batches in, top-k rows out."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from mealv2.ensemble import TeacherEnsemble, combine
from mealv2.errors import DataError
from mealv2.images import ImageSource
from mealv2.label_set import class_id_type
from mealv2.metrics import num_correct
from mealv2.soft_labels import top_k
from pipeline.config import OnBadImage
from pipeline.loaders import Pixels, refuse_failures
from pipeline.runtime import Runtime


@dataclass(frozen=True)
class Answers:
    """The labels of N views: ``positions`` in the source; class ids, probabilities, rest (N).

    ``correct`` counts the right answers, int64 2 x (T + 1): at top-1 and top-5, of every teacher
    and last of the ensemble. ``failed`` are the images that could not be read, with the reason.
    """

    positions: list[int]
    indices_NK: np.ndarray
    probs_NK: np.ndarray
    rest_N: np.ndarray
    correct: np.ndarray
    failed: dict[int, str]


@dataclass(frozen=True)
class Labeller:
    """An ensemble on its device, and how its answers are kept."""

    ensemble: TeacherEnsemble
    machine: Runtime
    num_classes: int
    topk: int
    label_dtype: str
    batch_size: int
    on_bad_image: OnBadImage

    def label(self, source: ImageSource, pixels: Iterable[Pixels], *, score: bool) -> Answers:
        """Answer every view of a stream, in batches of exactly ``batch_size``, the last one fewer.

        Batches depend on the stream alone, not on who read it. ``score`` compares with the data's
        labels. Raises DataError for an unreadable image (unless skipped) or answers not finite.
        """
        failed: dict[int, str] = {}
        positions: list[int] = []
        indices = [np.empty((0, self.topk), class_id_type(self.num_classes))]
        value_type = np.dtype(self.label_dtype).newbyteorder("<")
        probs = [np.empty((0, self.topk), value_type)]
        rest = [np.empty(0, value_type)]
        correct = np.zeros((2, len(self.ensemble.teachers) + 1), dtype=np.int64)
        for images_BCHW, batch in self._exact_batches(source, pixels, failed):
            logits_TBC, probs_BC = self._ask(images_BCHW)
            if not bool(torch.isfinite(probs_BC).all()):
                raise DataError(
                    f"the teachers' answers near {source.keys[batch[0]]} are not finite; "
                    "check their weights, or leave out --amp"
                )
            if score:
                correct += _num_correct(logits_TBC, probs_BC, [source.labels[p] for p in batch])
            kept = top_k(probs_BC, self.topk)
            positions += batch
            indices.append(kept.indices_NK.cpu().numpy().astype(indices[0].dtype))
            probs.append(kept.probs_NK.cpu().numpy().astype(value_type))
            rest.append(kept.rest_N.cpu().numpy().astype(value_type))
        return Answers(
            positions,
            np.concatenate(indices),
            np.concatenate(probs),
            np.concatenate(rest),
            correct,
            failed,
        )

    def _ask(self, images_BCHW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the teachers' logits T x B x C and the ensemble's probabilities B x C, float32."""
        with self.machine.autocast():
            logits_TBC = self.ensemble.teacher_logits(self.machine.images(images_BCHW))
        return logits_TBC, combine(logits_TBC).probs_BC

    def _exact_batches(
        self, source: ImageSource, pixels: Iterable[Pixels], failed: dict[int, str]
    ) -> Iterator[tuple[torch.Tensor, list[int]]]:
        """Regroup what the workers sent; note the images that failed."""
        waiting: list[torch.Tensor] = []
        positions: list[int] = []
        for item in pixels:
            refuse_failures(source, item.failed, self.on_bad_image)
            failed.update(item.failed)
            waiting.append(item.images_BCHW)
            positions += item.positions
            while len(positions) >= self.batch_size:
                images_BCHW = torch.cat(waiting)
                yield images_BCHW[: self.batch_size], positions[: self.batch_size]
                waiting = [images_BCHW[self.batch_size :]]
                positions = positions[self.batch_size :]
        if positions:
            yield torch.cat(waiting), positions


def _num_correct(logits_TBC: torch.Tensor, probs_BC: torch.Tensor, labels: list[int]) -> np.ndarray:
    labels_B = torch.tensor(labels, device=probs_BC.device)
    scores = [*logits_TBC, probs_BC]
    return np.array([[int(num_correct(s, labels_B, k)) for s in scores] for k in (1, 5)])
