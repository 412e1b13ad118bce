"""pipeline.runtime.env: what torchrun says of a process, and what a job leaves for its next try."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from conftest import Result
from mealv2.errors import ConfigError, MealError
from pipeline.config import EvaluateConfig
from pipeline.runtime import distributed, env
from pipeline.runtime.device import create_runtime

Run = Callable[..., Result]

# --- what torchrun says of a process --------------------------------------------------------------


@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE", "LOCAL_RANK", "TORCHELASTIC_RESTART_COUNT"])
def test_a_variable_of_torchrun_that_is_no_number_is_named(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv(name, "two")
    with pytest.raises(ConfigError, match=f"{name} is 'two', not a number: start it"):
        env.rank()
    monkeypatch.setenv("LOCAL_RANK", "one")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ConfigError, match="not a number"):
        create_runtime(EvaluateConfig(data_dir=Path("d"), model="m", device="auto"))


def test_alone_a_process_is_the_only_rank() -> None:
    assert env.rank() == env.Rank(0, size=1, local=0, attempt=0)
    assert env.local_rank() is None


# --- what is in vain is not tried again ---------------------------------------------------------


@pytest.fixture
def refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a job leaves that it refused."""
    path = tmp_path / "refused"
    monkeypatch.setenv("MEALV2_REFUSED", str(path))
    return path


def test_a_job_that_refused_ends_at_once_when_it_is_tried_again(
    run_cli: Run, done: Run, finetune_flags: list[str], refused: Path, run: Path
) -> None:
    wrong = run_cli(*finetune_flags, "--model", "resnet5", "--output", run)
    assert wrong.code == 2
    assert refused.read_text() == "2\n"
    again = run_cli(*finetune_flags, "--output", run)
    assert (again.code, again.stdout, again.stderr) == (2, "", "")
    assert not run.exists()
    refused.unlink()
    done(*finetune_flags, "--epochs", 1, "--output", run)


@pytest.mark.parametrize("flags", [["--labels", "/not/there"], ["--no-such-flag"]])
def test_wrong_usage_and_labels_that_are_not_there_are_refusals(
    run_cli: Run, distill_flags: list[str], refused: Path, run: Path, flags: list[str]
) -> None:
    ended = run_cli(*distill_flags, *flags, "--output", run)
    assert ended.code in (2, 3)
    assert refused.read_text() == f"{ended.code}\n"


def test_what_may_get_better_is_no_refusal(
    run_cli: Run, own_data: Path, finetune_flags: list[str], refused: Path, run: Path
) -> None:
    (own_data / "train" / "bees" / "04.jpg").write_bytes(b"no picture")
    ended = run_cli(*finetune_flags, "--data-dir", own_data, "--output", run)
    assert ended.code == 1
    assert not refused.exists()


def test_ranks_that_do_not_answer_are_no_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    two = env.Rank(0, size=2, local=0, attempt=0)

    def raising(error: Exception) -> Callable[..., object]:
        def meet(*args: object, **settings: object) -> object:
            raise error

        return meet

    module = sys.modules["torch.distributed.rendezvous"]
    for error, kind in (
        (torch.distributed.DistNetworkError("timed out"), MealError),
        (ValueError("MASTER_ADDR expected, but not set"), ConfigError),
    ):
        monkeypatch.setattr(module, "rendezvous", raising(error))
        with (
            pytest.raises(MealError, match="the ranks cannot connect") as caught,
            distributed.process_group(two, backend="gloo"),
        ):
            pass
        assert type(caught.value) is kind
