"""mealv2.labelling.annotator: exact batches, all views of an image or none, few waits."""

import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from mealv2.data.folder import ImageFolder
from mealv2.data.loader import read_views
from mealv2.data.requests import Batch
from mealv2.data.view_reader import ViewReader
from mealv2.errors import DataError
from mealv2.label_set import Encoding
from mealv2.labelling.annotator import Annotator
from mealv2.labelling.plan import LabelSplit, batch_requests
from mealv2.labelling.shards import BackgroundWriter, view_counter
from mealv2.models.ensemble import TeacherEnsemble, combine
from mealv2.soft_labels import EncodedLabels
from mealv2.views import DrawnViews
from pipeline.runtime.device import Runtime
from pipeline.runtime.signals import StopRequested
from syncs import recorded_syncs

SIZE = 16


class Teacher(nn.Module):
    """Answers at once; not with a number where ``spoilt`` images are in the batch."""

    def __init__(self, seed: int, *, spoilt: int | None = None) -> None:
        super().__init__()
        self.layer = nn.Linear(3 * SIZE * SIZE, 3)
        self.spoilt = spoilt
        self.batches: list[int] = []
        nn.init.zeros_(self.layer.bias)
        nn.init.normal_(self.layer.weight, generator=torch.Generator().manual_seed(seed))

    def forward(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        self.batches.append(len(images_BCHW))
        logits_BC: torch.Tensor = self.layer(images_BCHW.float().flatten(1) / 2550.0)
        return logits_BC * float("nan") if len(self.batches) - 1 == self.spoilt else logits_BC


def _annotator(*teachers: nn.Module, batch_size: int = 5, amp: bool = False) -> Annotator:
    runtime = Runtime(torch.device("cpu"), torch.bfloat16 if amp else None)
    encoding = Encoding(3, "float32", topk=3)
    return Annotator(TeacherEnsemble(teachers), runtime, encoding, batch_size, "skip")


@pytest.fixture
def split(data_dir: Path) -> LabelSplit:
    reader = ViewReader(ImageFolder(data_dir, "train"), img_size=SIZE, views=DrawnViews(0))
    return LabelSplit("train", reader, (0, 1, 2), [range(36)], plan_sha256="")


def _pixels(split: LabelSplit, batch_size: int) -> Iterator[Batch]:
    return iter(read_views(split.reader, batch_requests(range(36), split.views, batch_size)))


# --- batches --------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 2, 3, 5, 7, 60, 10_000])
@pytest.mark.parametrize("views", [(0,), (4, 5, 6), tuple(range(30))])
def test_requests_are_batches_of_exactly_so_many_views_in_order(
    batch_size: int, views: tuple[int, ...]
) -> None:
    positions = [7, 3, 20, 11]
    requests = batch_requests(positions, views, batch_size)
    rows = [[(p, v) for p, part in request for v in part] for request in requests]
    assert [row for batch in rows for row in batch] == [(p, v) for p in positions for v in views]
    assert all(len(batch) == batch_size for batch in rows[:-1])
    assert 0 < len(rows[-1]) <= batch_size
    assert all(part for request in requests for _, part in request)


def test_there_is_no_request_for_no_image() -> None:
    assert batch_requests([], (0, 1, 2), 5) == []


def test_teachers_are_asked_in_these_batches(split: LabelSplit) -> None:
    teacher = Teacher(0)
    annotations = _annotator(teacher).annotate(
        split.source, _pixels(split, 5), num_views=3, count_correct=False
    )
    assert teacher.batches == [5] * 21 + [3]
    assert annotations.positions == [p for p in range(36) for _ in range(3)]
    assert (
        len(annotations.rows.labels)
        == len(annotations.sizes_N2)
        == len(annotations.boxes_N5)
        == 108
    )


def test_an_image_that_fails_in_one_of_its_batches_has_labels_in_none(split: LabelSplit) -> None:
    complete = _annotator(Teacher(0)).annotate(
        split.source, _pixels(split, 5), num_views=3, count_correct=False
    )

    def once() -> Iterator[Batch]:
        for number, item in enumerate(_pixels(split, 5)):
            if number == 1:  # image 1 has views 0 and 1 in batch 0, view 2 in batch 1
                assert item.positions[0] == 1
                item = replace(
                    item,
                    images_BCHW=item.images_BCHW[1:],
                    sizes_B2=item.sizes_B2[1:],
                    boxes_B5=item.boxes_B5[1:],
                    positions=item.positions[1:],
                    views=item.views[1:],
                    failed={1: "torn"},
                )
            yield item

    annotations = _annotator(Teacher(0)).annotate(
        split.source, once(), num_views=3, count_correct=False
    )
    assert annotations.failed == {1: "torn"}
    rows = [n for n, p in enumerate(complete.positions) if p != 1]
    assert annotations.positions == [complete.positions[n] for n in rows]
    np.testing.assert_array_equal(annotations.boxes_N5, complete.boxes_N5[rows])
    np.testing.assert_array_equal(annotations.sizes_N2, complete.sizes_N2[rows])
    torch.testing.assert_close(
        annotations.rows.labels.to_dense(), complete.rows.labels.to_dense()[rows], rtol=0, atol=1e-6
    )


def test_images_are_encoded_as_wholes_however_many_rows_at_once(
    split: LabelSplit, monkeypatch: pytest.MonkeyPatch
) -> None:
    def blocks() -> list[bytes]:
        annotator = replace(_annotator(Teacher(0)), encoding=Encoding(3, rate=0.01))
        found = annotator.annotate(
            split.source, _pixels(split, 5), num_views=3, count_correct=False
        )
        assert isinstance(found.rows.labels, EncodedLabels)
        return found.rows.labels.blocks(3)

    at_once = blocks()
    monkeypatch.setattr("mealv2.labelling.row_encoder._MAX_VIEWS", 7)
    assert blocks() == at_once


def test_an_image_that_fails_in_several_batches_counts_once() -> None:
    none = torch.empty((0, 3, 1, 1), dtype=torch.uint8)
    empty = np.empty((0, 2)), np.empty((0, 5))
    count = view_counter(6)
    seen = [
        count(Batch(none, *empty, positions, [], failed))
        for positions, failed in (([1, 1], {}), ([1], {2: "bad"}), ([], {2: "bad", 3: "bad"}))
    ]
    assert seen == [2, 7, 6]


# --- annotations ----------------------------------------------------------------------------------


def test_the_host_waits_at_the_end_and_nowhere_else(
    split: LabelSplit, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mealv2.labelling.row_encoder._MAX_VIEWS", 7)  # encoded in a thread
    stream = list(_pixels(split, 5))
    annotator = _annotator(Teacher(0), Teacher(1))
    with recorded_syncs() as syncs:
        annotations = annotator.annotate(split.source, stream, num_views=3, count_correct=True)
    assert annotations.correct.shape == (2, 3)
    # in the thread that encodes; at the end, where its results and the counts are needed
    here = [sync[-1] for sync in syncs if "_worker" not in sync and "finish" not in sync]
    assert here == ["annotate"]


@pytest.mark.parametrize("spoilt", [0, 7, 21])
def test_answers_that_are_not_finite_are_refused_near_an_image(
    split: LabelSplit, spoilt: int
) -> None:
    annotator = _annotator(Teacher(0), Teacher(1, spoilt=spoilt))
    near = split.source.keys[5 * spoilt // 3]
    with pytest.raises(DataError, match=f"near {near} are not finite"):
        annotator.annotate(split.source, _pixels(split, 5), num_views=3, count_correct=False)


def test_correct_answers_are_counted_teacher_by_teacher(split: LabelSplit) -> None:
    teachers = [Teacher(0), Teacher(1)]
    annotations = _annotator(*teachers).annotate(
        split.source, _pixels(split, 5), num_views=3, count_correct=True
    )
    images_NCHW = torch.cat([item.images_BCHW for item in _pixels(split, 5)])
    truth_N = np.repeat(split.source.labels, 3)
    logits = [teacher(images_NCHW).detach() for teacher in teachers]
    scores = [*logits, combine(torch.stack(logits)).probs_BC]
    expected = [int((s.argmax(1).numpy() == truth_N).sum()) for s in scores]
    assert annotations.correct.tolist() == [
        expected,
        [108] * 3,
    ]  # of 3 classes all are in the top 5


def test_softmax_and_mean_are_float32_under_autocast(split: LabelSplit) -> None:
    annotator = _annotator(Teacher(0), Teacher(1), amp=True)
    (images_BCHW,) = (item.images_BCHW for item in _pixels(split, 10_000))
    logits_TBC, (probs_BC, mean_logits_BC) = annotator.predict(images_BCHW)
    assert {logits_TBC.dtype, probs_BC.dtype, mean_logits_BC.dtype} == {torch.float32}
    # the teachers' own answers are bfloat16's, what is made of them is not
    assert torch.equal(logits_TBC, logits_TBC.bfloat16().float())
    expected = torch.softmax(logits_TBC.double(), dim=-1).mean(dim=0)
    torch.testing.assert_close(probs_BC.double(), expected, rtol=0, atol=1e-6)
    assert not torch.equal(probs_BC, probs_BC.bfloat16().float())


# --- background writer ----------------------------------------------------------------------------


def test_tasks_are_done_in_order_in_one_other_thread_that_ends() -> None:
    done: list[tuple[int, str]] = []
    with BackgroundWriter() as writer:
        for number in range(9):
            writer.submit(lambda n=number: done.append((n, threading.current_thread().name)))
    assert [number for number, _ in done] == list(range(9))
    (name,) = {name for _, name in done}
    assert name.startswith("writing")
    assert name not in {thread.name for thread in threading.enumerate()}


def test_no_more_than_two_are_unfinished() -> None:
    may_go_on, begun = threading.Event(), threading.Event()
    handed_over: list[int] = []

    def first() -> None:
        begun.set()
        assert may_go_on.wait(60)

    def hand_over(writer: BackgroundWriter) -> None:
        for number, task in enumerate([first, lambda: None, lambda: None]):
            writer.submit(task)
            handed_over.append(number)

    with BackgroundWriter() as writer:
        other = threading.Thread(target=hand_over, args=(writer,))
        other.start()
        assert begun.wait(60)
        while len(handed_over) < 2:
            pass
        other.join(timeout=0.2)
        assert handed_over == [0, 1]
        may_go_on.set()
        other.join()
    assert handed_over == [0, 1, 2]


def test_what_goes_wrong_is_raised_here_and_nothing_after_it_is_done() -> None:
    done: list[int] = []

    def fail() -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"), BackgroundWriter() as writer:  # noqa: PT012
        writer.submit(lambda: done.append(0))
        writer.submit(fail)
        for number in range(1, 9):
            writer.submit(lambda n=number: done.append(n))
    assert done == [0]

    with pytest.raises(OSError, match="No space left"), BackgroundWriter() as writer:
        writer.submit(fail)  # the last one


def test_submitted_tasks_are_done_before_a_stop_is_raised() -> None:
    done: list[int] = []
    go = threading.Event()
    with pytest.raises(StopRequested), BackgroundWriter() as writer:  # noqa: PT012
        writer.submit(lambda: (go.wait(60), done.append(0))[1])
        writer.submit(lambda: done.append(1))
        go.set()
        raise StopRequested("SIGINT")
    assert done == [0, 1]
