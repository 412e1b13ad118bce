"""pipeline.labelling and its batches: exact, whole images or none, no wait but where it encodes."""

import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from mealv2.ensemble import TeacherEnsemble, combine
from mealv2.errors import DataError
from mealv2.images import ImageFolder
from mealv2.label_set import Encoding
from mealv2.views import DrawnViews
from pipeline.labelling import Labeller
from pipeline.loading.loader import Batch, ViewReader, read_views
from pipeline.runtime import Runtime, StopRequested
from pipeline.stage_one import Role, _Behind, _counter, requests_of
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


def _labeller(*teachers: nn.Module, batch_size: int = 5, amp: bool = False) -> Labeller:
    machine = Runtime(torch.device("cpu"), torch.bfloat16 if amp else None)
    encoding = Encoding(3, "float32", topk=3)
    return Labeller(TeacherEnsemble(teachers), machine, encoding, batch_size, "skip")


@pytest.fixture
def role(data_dir: Path) -> Role:
    return Role("train", ImageFolder(data_dir, "train"), (0, 1, 2), [range(36)])


def _pixels(role: Role, batch_size: int) -> Iterator[Batch]:
    reader = ViewReader(role.source, img_size=SIZE, views=DrawnViews(0))
    return iter(read_views(reader, requests_of(role, range(36), batch_size)))


# --- batches --------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 2, 3, 5, 7, 60, 10_000])
@pytest.mark.parametrize("views", [(0,), (4, 5, 6), tuple(range(30))])
def test_requests_are_batches_of_exactly_so_many_views_in_order(
    role: Role, batch_size: int, views: tuple[int, ...]
) -> None:
    positions = [7, 3, 20, 11]
    requests = requests_of(replace(role, views=views), positions, batch_size)
    rows = [[(p, v) for p, part in request for v in part] for request in requests]
    assert [row for batch in rows for row in batch] == [(p, v) for p in positions for v in views]
    assert all(len(batch) == batch_size for batch in rows[:-1])
    assert 0 < len(rows[-1]) <= batch_size
    assert all(part for request in requests for _, part in request)


def test_there_is_no_request_for_no_image(role: Role) -> None:
    assert requests_of(role, [], 5) == []


def test_teachers_are_asked_in_these_batches(role: Role) -> None:
    teacher = Teacher(0)
    answers = _labeller(teacher).label(role.source, _pixels(role, 5), score=False)
    assert teacher.batches == [5] * 21 + [3]
    assert answers.positions == [p for p in range(36) for _ in range(3)]
    assert len(answers.rows.labels) == len(answers.sizes_N2) == len(answers.boxes_N5) == 108


def test_an_image_that_fails_in_one_of_its_batches_has_labels_in_none(role: Role) -> None:
    whole = _labeller(Teacher(0)).label(role.source, _pixels(role, 5), score=False)

    def once() -> Iterator[Batch]:
        for number, item in enumerate(_pixels(role, 5)):
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

    answers = _labeller(Teacher(0)).label(role.source, once(), score=False)
    assert answers.failed == {1: "torn"}
    rows = [n for n, p in enumerate(whole.positions) if p != 1]
    assert answers.positions == [whole.positions[n] for n in rows]
    np.testing.assert_array_equal(answers.boxes_N5, whole.boxes_N5[rows])
    np.testing.assert_array_equal(answers.sizes_N2, whole.sizes_N2[rows])
    torch.testing.assert_close(
        answers.rows.labels.to_dense(), whole.rows.labels.to_dense()[rows], rtol=0, atol=1e-6
    )


def test_an_image_that_fails_in_several_batches_counts_once() -> None:
    none = torch.empty((0, 3, 1, 1), dtype=torch.uint8)
    empty = np.empty((0, 2)), np.empty((0, 5))
    count = _counter(6)
    seen = [
        count(Batch(none, *empty, positions, [], failed))
        for positions, failed in (([1, 1], {}), ([1], {2: "bad"}), ([], {2: "bad", 3: "bad"}))
    ]
    assert seen == [2, 7, 6]


# --- answers --------------------------------------------------------------------------------------


def test_the_host_waits_where_rows_are_encoded_and_nowhere_else(role: Role) -> None:
    stream = list(_pixels(role, 5))
    labeller = _labeller(Teacher(0), Teacher(1))
    with recorded_syncs() as syncs:
        answers = labeller.label(role.source, stream, score=True)
    assert answers.correct.shape == (2, 3)
    assert syncs, "the end waits"
    for sync in syncs:
        assert "_encode" in sync or sync[-1] == "label", sync[-4:]  # the counts, at its end
    assert len(syncs) == 2


@pytest.mark.parametrize("spoilt", [0, 7, 21])
def test_answers_that_are_not_finite_are_refused_near_an_image(role: Role, spoilt: int) -> None:
    labeller = _labeller(Teacher(0), Teacher(1, spoilt=spoilt))
    near = role.source.keys[5 * spoilt // 3]
    with pytest.raises(DataError, match=f"near {near} are not finite"):
        labeller.label(role.source, _pixels(role, 5), score=False)


def test_correct_answers_are_counted_teacher_by_teacher(role: Role) -> None:
    teachers = [Teacher(0), Teacher(1)]
    answers = _labeller(*teachers).label(role.source, _pixels(role, 5), score=True)
    images_NCHW = torch.cat([item.images_BCHW for item in _pixels(role, 5)])
    truth_N = np.repeat(role.source.labels, 3)
    logits = [teacher(images_NCHW).detach() for teacher in teachers]
    scores = [*logits, combine(torch.stack(logits)).probs_BC]
    expected = [int((s.argmax(1).numpy() == truth_N).sum()) for s in scores]
    assert answers.correct.tolist() == [expected, [108] * 3]  # of 3 classes all are in the top 5


def test_softmax_and_mean_are_float32_under_autocast(role: Role) -> None:
    labeller = _labeller(Teacher(0), Teacher(1), amp=True)
    (images_BCHW,) = (item.images_BCHW for item in _pixels(role, 10_000))
    logits_TBC, (probs_BC, mean_logits_BC) = labeller.ask(images_BCHW)
    assert {logits_TBC.dtype, probs_BC.dtype, mean_logits_BC.dtype} == {torch.float32}
    # the teachers' own answers are bfloat16's, what is made of them is not
    assert torch.equal(logits_TBC, logits_TBC.bfloat16().float())
    expected = torch.softmax(logits_TBC.double(), dim=-1).mean(dim=0)
    torch.testing.assert_close(probs_BC.double(), expected, rtol=0, atol=1e-6)
    assert not torch.equal(probs_BC, probs_BC.bfloat16().float())


# --- writing behind -------------------------------------------------------------------------------


def test_tasks_are_done_in_order_in_one_other_thread_that_ends() -> None:
    done: list[tuple[int, str]] = []
    with _Behind() as behind:
        for number in range(9):
            behind.do(lambda n=number: done.append((n, threading.current_thread().name)))
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

    def hand_over(behind: _Behind) -> None:
        for number, task in enumerate([first, lambda: None, lambda: None]):
            behind.do(task)
            handed_over.append(number)

    with _Behind() as behind:
        other = threading.Thread(target=hand_over, args=(behind,))
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

    with pytest.raises(OSError, match="No space left"), _Behind() as behind:  # noqa: PT012
        behind.do(lambda: done.append(0))
        behind.do(fail)
        for number in range(1, 9):
            behind.do(lambda n=number: done.append(n))
    assert done == [0]

    with pytest.raises(OSError, match="No space left"), _Behind() as behind:
        behind.do(fail)  # the last one


def test_what_was_handed_over_is_done_before_a_stop_goes_on() -> None:
    done: list[int] = []
    go = threading.Event()
    with pytest.raises(StopRequested), _Behind() as behind:  # noqa: PT012
        behind.do(lambda: (go.wait(60), done.append(0))[1])
        behind.do(lambda: done.append(1))
        go.set()
        raise StopRequested("SIGINT")
    assert done == [0, 1]
