"""pipeline.training.checkpoint: saved whole, the newest few kept, damage noticed."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from mealv2.errors import MealError
from pipeline.training import checkpoint
from pipeline.training.run_folder import has_checkpoint

STATE = {"epoch": 3, "args": {"lr": 0.1, "out": None}, "state_dict": {"w": torch.arange(5000.0)}}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return tmp_path


def names(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def test_what_is_saved_comes_back(run: Path) -> None:
    path = checkpoint.save(run, STATE, step=12, keep=2)
    assert path == run / "checkpoints" / "step-00000012.pt"
    newest, state, damaged = checkpoint.load_newest(run)
    assert (newest, damaged) == (path, [])
    assert (state["epoch"], state["args"]) == (3, STATE["args"])
    assert torch.equal(state["state_dict"]["w"], STATE["state_dict"]["w"])


def test_existence_is_said(run: Path) -> None:
    assert not has_checkpoint(run)
    checkpoint.save(run, STATE, step=1, keep=1)
    assert has_checkpoint(run)


def test_newest_are_kept_and_nothing_else(run: Path) -> None:
    for step in (1, 2, 10, 9_999_999):
        checkpoint.save(run, {"step": step}, step=step, keep=2)
    assert names(run) == ["step-00000010.pt", "step-09999999.pt"]
    assert checkpoint.load_newest(run)[1] == {"step": 9_999_999}


def test_files_it_did_not_make_are_left_alone(run: Path) -> None:
    (run / "checkpoints").mkdir()
    (run / "checkpoints" / "best.pt").write_bytes(b"mine")
    for step in (1, 2, 3):
        checkpoint.save(run, {}, step=step, keep=1)
    assert names(run) == ["best.pt", "step-00000003.pt"]


def test_what_was_just_saved_stays_beside_a_torn_one_of_a_later_step(run: Path) -> None:
    """A run that went on from the one before the torn one, told to keep one."""
    later = checkpoint.save(run, STATE, step=10, keep=1)
    later.write_bytes(b"torn")
    for step in (5, 6):
        saved = checkpoint.save(run, {"step": step}, step=step, keep=1)
        path, state, damaged = checkpoint.load_newest(run)
        assert (path, state) == (saved, {"step": step})
        assert len(damaged) == (step == 5), "what is damaged is set aside once"
    assert names(run) == ["step-00000006.pt", "step-00000010.pt.damaged"]


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _text(path: Path) -> None:
    path.write_text("not a checkpoint\n")


def _pickle(path: Path) -> None:
    torch.save({"state": Path("a pickled object")}, path)


@pytest.mark.parametrize("damage", [_truncate, _empty, _text, _pickle])
def test_damaged_checkpoint_is_named_in_one_line(run: Path, damage: Callable[[Path], None]) -> None:
    path = checkpoint.save(run, STATE, step=7, keep=1)
    damage(path)
    with pytest.raises(MealError, match=r"step-00000007\.pt is damaged") as caught:
        checkpoint.load_newest(run)
    assert "\n" not in str(caught.value)


def test_a_flipped_bit_in_the_weights_is_noticed(
    run: Path, flipped_bit: Callable[..., None]
) -> None:
    path = checkpoint.save(run, STATE, step=7, keep=1)
    flipped_bit(path)  # the middle of the file lies in the tensor
    with pytest.raises(MealError, match=r"step-00000007\.pt is damaged"):
        checkpoint.load_newest(run)


@pytest.mark.parametrize("damage", [_truncate, _empty, _text, _pickle])
def test_damaged_newest_one_is_told_and_the_one_before_comes_back(
    run: Path, damage: Callable[[Path], None]
) -> None:
    before = checkpoint.save(run, STATE, step=1, keep=2)
    damage(checkpoint.save(run, STATE, step=2, keep=2))
    path, state, damaged = checkpoint.load_newest(run)
    assert (path, state["epoch"]) == (before, 3)
    assert len(damaged) == 1
    assert "step-00000002.pt is damaged" in damaged[0]
    assert "\n" not in damaged[0]


def test_torn_ones_do_not_push_the_whole_ones_out(run: Path) -> None:
    for step in (5, 10, 20, 25):
        path = checkpoint.save(run, {"step": step}, step=step, keep=4)
        if step > 10:
            _truncate(path)
    assert checkpoint.load_newest(run)[1] == {"step": 10}
    checkpoint.save(run, {"step": 15}, step=15, keep=2)
    assert checkpoint.load_newest(run)[1] == {"step": 15}
    assert [name for name in names(run) if name.endswith(".pt")] == [
        "step-00000010.pt",
        "step-00000015.pt",
    ]
