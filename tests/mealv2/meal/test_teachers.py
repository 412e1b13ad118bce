"""Which teacher labels a step; what teachers in train mode leave behind."""

from collections import Counter

import pytest
import torch
from torch import Tensor, nn

from mealv2.errors import DataError
from mealv2.meal import BlockLayers, SelectedTeachers
from mealv2.meal.teachers import drawn_teachers
from mealv2.models.ensemble import TeacherEnsemble


class Constant(nn.Module):
    """A teacher whose logits are its number."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number
        self.norm = nn.BatchNorm1d(3)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        self.norm(images_BCHW.mean(dim=(2, 3)))
        return torch.full((len(images_BCHW), 4), float(self.number))


def teachers(num: int, **options: object) -> SelectedTeachers:
    ensemble = TeacherEnsemble([Constant(number) for number in range(num)])
    return SelectedTeachers(ensemble, BlockLayers(), [0, 1, 2], seed=5, **options)  # type: ignore[arg-type]


def images(num: int = 3) -> Tensor:
    return torch.rand(num, 3, 4, 4, generator=torch.Generator().manual_seed(0))


def test_random_is_a_pure_function_of_seed_and_step_and_uniform() -> None:
    draws = [drawn_teachers(3, "random", seed=7, step=step) for step in range(1, 3001)]
    again = [drawn_teachers(3, "random", seed=7, step=step) for step in range(1, 3001)]
    other = [drawn_teachers(3, "random", seed=8, step=step) for step in range(1, 3001)]
    assert draws == again != other
    counts = Counter(draws)
    assert set(counts) == {(0,), (1,), (2,)}
    assert all(abs(count - 1000) < 130 for count in counts.values())  # 5 standard deviations


def test_round_robin_takes_them_in_turn_and_all_takes_all() -> None:
    turns = [drawn_teachers(3, "round-robin", seed=7, step=step) for step in range(1, 6)]
    assert turns == [(0,), (1,), (2,), (0,), (1,)]
    assert drawn_teachers(3, "all", seed=7, step=4) == (0, 1, 2)


@pytest.mark.parametrize("step", range(1, 9))
def test_a_batch_has_the_blocks_of_the_teacher_of_its_step(step: int) -> None:
    (number,) = drawn_teachers(4, "random", seed=5, step=step)
    targets = teachers(4).batch([2, 0, 1], [0, 0, 0], images(), step=step)
    ((logits,),) = targets.blocks
    assert torch.equal(logits, torch.full((3, 4), float(number)))
    assert targets.classes_B is not None
    assert targets.classes_B.tolist() == [2, 0, 1]
    rows = targets.rows(torch.tensor([2, 1])).blocks[0][0]
    assert torch.equal(rows, logits[[2, 1]])


def test_eval_mode_changes_no_teacher_and_keeps_no_state() -> None:
    targets = teachers(2, selection="all")
    before = {name: x.clone() for name, x in targets.ensemble.state_dict().items()}
    targets.batch([0, 1, 2], [0, 0, 0], images())
    after = targets.ensemble.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert targets.state() == {}


def test_train_mode_drifts_and_its_state_continues_in_another_object() -> None:
    first, second = (teachers(2, selection="all", mode="train") for _ in range(2))
    start = first.state()
    first.batch([0, 1, 2], [0, 0, 0], images())
    state = first.state()
    assert any(not torch.equal(start[name], state[name]) for name in state)
    second.restore(state)
    assert all(torch.equal(second.state()[name], state[name]) for name in state)
    for targets in (first, second):
        targets.batch([0, 1, 2], [0, 0, 0], images() / 2, step=2)
    assert all(torch.equal(second.state()[n], x) for n, x in first.state().items())
    assert not any(module.training for module in first.ensemble.modules())


def test_train_mode_of_one_image_says_what_it_needs() -> None:
    with pytest.raises(DataError, match="--teacher-mode"):
        teachers(1, mode="train").batch([0], [0], images(1))
