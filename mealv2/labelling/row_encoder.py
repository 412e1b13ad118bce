"""Encode the outputs of an ensemble, some thousand views at once, while the teachers run."""

from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from mealv2.codec import EncodedLabels
from mealv2.data.source import ImageSource
from mealv2.errors import DataError
from mealv2.label_set import Encoding, EncodingLoss, LabelSet, Rows
from mealv2.labelling.encoding_loss import encoding_loss, sample_size
from mealv2.models.ensemble import EnsembleOutput

# The encoder runs when either limit is reached: 16 MB of probabilities (and of mean logits), or
# views of few classes at about 2 kB each.
_MAX_PROBABILITIES, _MAX_VIEWS = 1 << 22, 1 << 12


class RowEncoder:
    """Collects the outputs of batches and encodes the images of some thousand rows at once.

    A call of the encoder takes milliseconds, however few the rows, and images do not depend on each
    other. It runs in a thread, on the caller's stream, while the caller continues with the next
    batches: only the thread waits for the device. An image of which views are missing has no rows.
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
        self._executor = ThreadPoolExecutor(1, "encode")
        self._running: Future[tuple[Rows, Tensor]] | None = None

    def add(self, output: EnsembleOutput, positions: Sequence[int]) -> None:
        """Add the output of a batch, for the images at these positions of the source.

        Raises DataError, now or at a later call, if the output is not finite.
        """
        self._outputs.append(output)
        self._positions += positions
        limit = min(_MAX_VIEWS, _MAX_PROBABILITIES // self._encoding.num_classes)
        if len(self._positions) >= max(limit, 2 * self._num_views):
            self._start(self._positions.index(self._positions[-1]))

    def finish(self) -> tuple[Rows, EncodingLoss | None]:
        """Return all rows, on the CPU, and what the first ones lose; raises as ``add``."""
        self._start(len(self._positions))
        self._wait()
        rows = Rows.concat(self._parts)
        return rows, encoding_loss(torch.cat(self._first), rows.labels)

    def close(self) -> None:
        """End the thread, also after an error."""
        self._executor.shutdown(wait=False, cancel_futures=True)

    def _start(self, num_rows: int) -> None:
        """Encode the first of the pending rows: of complete images, or of those with no rows."""
        self._wait()  # no more than one group of rows at a time
        if not num_rows:
            return
        columns = zip(*self._outputs, strict=True)
        outputs = EnsembleOutput(*(torch.cat(column) for column in columns))
        of_rows = EnsembleOutput(*(column[:num_rows] for column in outputs))
        device = of_rows.probs_BC.device
        stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
        todo = of_rows, self._positions[:num_rows], stream
        self._running = self._executor.submit(self._encoded_on, *todo)
        self._positions = self._positions[num_rows:]
        pending = EnsembleOutput(*(column[num_rows:] for column in outputs))
        self._outputs = [pending] if self._positions else []

    def _wait(self) -> None:
        """Wait for the rows that are being encoded."""
        if self._running is not None:
            rows, probs_NC = self._running.result()
            self._running = None
            self._parts.append(rows)
            self._first.append(probs_NC)

    def _encoded_on(
        self, outputs: EnsembleOutput, positions: Sequence[int], stream: torch.cuda.Stream | None
    ) -> tuple[Rows, Tensor]:
        with torch.cuda.stream(stream):  # the current stream belongs to a thread; None off a GPU
            return self._encoded(outputs, positions)

    def _encoded(self, outputs: EnsembleOutput, positions: Sequence[int]) -> tuple[Rows, Tensor]:
        """Return the rows of complete images, and the probabilities of those to measure."""
        is_finite_N = torch.isfinite(outputs.probs_BC).all(dim=1)
        if not bool(is_finite_N.all()):
            key = self._source.keys[positions[is_finite_N.tolist().index(False)]]
            raise DataError(
                f"the outputs of the teachers near {key} are not finite; "
                "check their weights, or leave out --amp"
            )
        rows = complete_images(positions, self._num_views)
        of_images = [positions[row] for row in rows[:: self._num_views].tolist()]
        encoded = self._encoding.encode(
            *(column[rows.to(column.device)] for column in outputs),
            num_views=self._num_views,
            first=self._first_labels(of_images),
        )
        unmeasured = sample_size(self._num_views) - sum(map(len, self._first))
        first = rows[:unmeasured].to(outputs.probs_BC.device)
        return encoded.to(torch.device("cpu")), outputs.probs_BC[first].cpu()

    def _first_labels(self, positions: Sequence[int]) -> EncodedLabels | None:
        """Return a row of the first block of each image."""
        if self._first_set is None or not self._encoding.shares_models:
            return None
        return self._first_set.first_labels([self._source.keys[p] for p in positions])


def complete_images(positions: Sequence[int], num_views: int) -> torch.Tensor:
    """Return the rows, int64, of the images that have all their views."""
    counts = Counter(positions)
    complete = [row for row, position in enumerate(positions) if counts[position] == num_views]
    return torch.tensor(complete, dtype=torch.int64)
