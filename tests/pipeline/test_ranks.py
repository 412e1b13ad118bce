"""pipeline.ranks: a run of several processes learns what one learns, and ends as one ends.

Real processes that meet over loopback; those that torchrun starts are in test_torchrun.py.
"""

import json
import shutil
import signal
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from conftest import Result
from mealv2.files import file_sha256
from mealv2.metrics import Evaluation
from pipeline.ranks import Ranks, pieces
from warm import Warm, warm_process

Run = Callable[..., Result]
Events = Callable[[Path, str], list[dict[str, Any]]]

# Without batch normalisation a batch may be cut as one likes. Rounding grows with every step, the
# faster the higher the rate.
FREE = ["--model", "test_efficientnet_gn", "--no-pretrained", "--lr", "0.003"]


# --- who does what ------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 5), max_size=60), st.integers(1, 9), st.integers(1, 3))
def test_every_item_is_in_one_share_and_shares_differ_by_at_most_one(
    sizes: list[int], num: int, least: int
) -> None:
    cuts = pieces(sizes, num, least=least)
    assert len(cuts) == num
    assert [item for cut in cuts for item in cut] == list(range(len(sizes)))
    filled = [cut for cut in cuts if cut]
    assert cuts[: len(filled)] == filled
    assert max(map(len, filled), default=0) - min(map(len, filled), default=0) <= 1
    if len(filled) > 1:
        assert all(sum(sizes[item] for item in cut) >= least for cut in filled)
    if least == 1:
        assert len(filled) == min(num, len(sizes))


@pytest.mark.parametrize(("num_items", "expected"), [(9, [3, 2, 2, 2, 0, 0]), (12, [2] * 6)])
def test_a_share_too_small_for_batch_normalisation_is_given_to_others(
    num_items: int, expected: list[int]
) -> None:
    cuts = pieces([1] * num_items, 6, least=2)
    assert sorted(map(len, cuts), reverse=True) == expected


def test_figures_of_parts_add_up_to_those_of_the_whole() -> None:
    generator = torch.Generator().manual_seed(0)
    logits_BC = torch.randn(7, 3, generator=generator)
    labels_B = torch.tensor([0, 1, 2, 0, 1, 2, 2])
    whole, together, sums = Evaluation(3), Evaluation(3), torch.zeros(12, dtype=torch.float64)
    whole.add(logits_BC, labels_B)
    for rows in (slice(0, 4), slice(4, 4), slice(4, 7)):
        part = Evaluation(3)
        part.add(logits_BC[rows], labels_B[rows])
        sums += part.sums()
    together.take(sums)
    assert together.summary() == pytest.approx(whole.summary(), rel=1e-12)
    assert together.per_class() == whole.per_class()


def test_a_run_of_one_process_tells_nobody() -> None:
    alone, tensor = Ranks(), torch.ones(2)
    assert alone.agree(3, "SIGINT") == (3, "SIGINT")
    assert alone.total(tensor) is tensor
    assert alone.joined(tensor) is tensor
    assert alone.totals({"a": 1}) == {"a": 1}


# --- several of them ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Ended:
    """How the ranks of a run ended, and what each said on both streams."""

    codes: list[int]
    said: list[str]

    @property
    def report(self) -> dict[str, Any]:
        """The JSON object that the first rank printed, and no other line of JSON."""
        (line,) = [line for line in self.said[0].splitlines() if line.startswith("{")]
        value = json.loads(line)
        assert isinstance(value, dict)
        return value

    @property
    def lines(self) -> list[str]:
        """What all of them said to the user before they ended."""
        return [line for text in self.said for line in text.splitlines() if "mealv2: " in line]


@pytest.fixture(scope="module")
def warm(finetune_flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Warm]:
    """A process that has imported all that training needs, and forks ranks."""
    folder = tmp_path_factory.mktemp("warm")
    with warm_process(folder, [*finetune_flags, "--epochs", 1, "--output", folder / "run"]) as warm:
        yield warm


@pytest.fixture
def ranks(warm: Warm) -> Callable[..., Ended]:
    """A function: run ``mealv2 ARGS`` in so many ranks; ``hit`` says what befalls some of them."""

    def run(num: int, *args: object, hit: dict[int, dict[str, Any]] | None = None) -> Ended:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        there = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
        jobs = []
        for rank in range(num):
            mine = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(num)}
            job = {"args": [*map(str, args)], "env": there | mine, "out": "/nowhere"}
            jobs.append(job | (hit or {}).get(rank, {}))
        results = warm.run(*jobs)
        said = [Path(f"{warm.log}-{n}").read_text() for n in range(num)]
        return Ended([result["code"] for result in results], said)

    return run


@pytest.fixture
def done_in(ranks: Callable[..., Ended]) -> Callable[..., Ended]:
    """The same, and insist that all of them end with 0."""

    def run(num: int, *args: object) -> Ended:
        ended = ranks(num, *args)
        assert ended.codes == [0] * num, ended.said
        return ended

    return run


def losses(run: Path, events: Events) -> list[float]:
    return [event["loss"] for event in events(run, "train")]


def newest(run: Path) -> dict[str, Any]:
    state: dict[str, Any] = torch.load(max((run / "checkpoints").iterdir()), weights_only=True)
    return state


def sha256(run: Path) -> str:
    return file_sha256(run / "student" / "model.safetensors")


CASES: dict[str, list[object]] = {
    # batches of 17, 17 and 2: two of four ranks have none of the last
    "plain": ["--batch-size", 17, "--model-ema", "--model-ema-decay", 0.5],
    "micro-batches": ["--batch-size", 17, "--grad-accum-steps", 3],
    "views": ["--batch-size", 10, "--views-per-image", 2, "--grad-accum-steps", 2],
    "official": ["--batch-size", 15, "--discriminator", "official", "--seed", 1],
    "teachers": ["--batch-size", 16, "--missing", "teach"],
}


@pytest.mark.parametrize("case", ["plain", "views"])
def test_losses_of_one_two_and_four_ranks_agree(
    done: Run,
    done_in: Callable[..., Ended],
    distill_flags: list[str],
    tmp_path: Path,
    events: Events,
    case: str,
) -> None:
    _losses_agree(done, done_in, distill_flags, tmp_path, events, CASES[case])


@pytest.mark.slow
@pytest.mark.parametrize("case", ["micro-batches", "official"])
def test_losses_agree_in_other_forms_of_a_run(
    done: Run,
    done_in: Callable[..., Ended],
    distill_flags: list[str],
    tmp_path: Path,
    events: Events,
    case: str,
) -> None:
    _losses_agree(done, done_in, distill_flags, tmp_path, events, CASES[case])


def _losses_agree(
    done: Run,
    done_in: Callable[..., Ended],
    distill_flags: list[str],
    tmp_path: Path,
    events: Events,
    extra: list[object],
) -> None:
    without = distill_flags.index("--initial-checkpoint")
    flags = [*distill_flags[:without], *distill_flags[without + 2 :], *FREE, *extra]
    alone = tmp_path / "alone"
    report = done(*flags, "--output", alone).report
    assert losses(alone, events)[-1] != pytest.approx(losses(alone, events)[0], rel=0.01)
    for num in (2, 4):
        run = tmp_path / str(num)
        ended = done_in(num, *flags, "--output", run)
        assert losses(run, events) == pytest.approx(losses(alone, events), rel=1e-5)
        for told in ("train", "validation"):
            for event, expected in zip(events(run, told), events(alone, told), strict=True):
                others = {"event", "time", "images_per_second", "data_wait_share"}
                same = {name: v for name, v in expected.items() if name not in others}
                assert {n: event[n] for n in same} == pytest.approx(same, rel=1e-4, abs=1e-6)
        figures = {n: v for n, v in report.items() if isinstance(v, float) and n != "seconds"}
        assert {n: ended.report[n] for n in figures} == pytest.approx(figures, rel=1e-4)


def test_only_the_first_rank_says_and_writes(
    done_in: Callable[..., Ended], finetune_flags: list[str], run: Path
) -> None:
    ended = done_in(2, *finetune_flags, *FREE, "--grad-accum-steps", 2, "--output", run)
    assert ended.said[1] == ""
    assert "2 ranks: 12 views a step, 6 on each, in 2 micro-batches of 3\n" in ended.said[0]
    assert ended.said[0].count("epoch 2/2") == 1
    assert json.loads((run / "report.json").read_text()) == ended.report
    assert ended.report["steps"] == 6


def test_what_batch_normalisation_sees_is_said(
    done_in: Callable[..., Ended], done: Run, finetune_flags: list[str], tmp_path: Path
) -> None:
    flags = [*finetune_flags, "--epochs", 1, "--val-split", "none", "--grad-accum-steps", 3]
    said = done(*flags, "--output", tmp_path / "alone").stderr
    paper = "(the paper: 64, of 512 on 8 GPUs)"
    expected = "12 on each, in 3 micro-batches of 4; batch normalisation sees 4"
    assert f"1 rank: 12 views a step, {expected} {paper}" in said
    said = done_in(2, *flags[:-2], "--output", tmp_path / "two").said[0]
    assert f"2 ranks: 12 views a step, 6 on each; batch normalisation sees 6 {paper}" in said


def test_teachers_are_asked_once_about_each_view_and_counted(
    done_in: Callable[..., Ended],
    done: Run,
    data_dir: Path,
    teacher_flags: list[str],
    distill_flags: list[str],
    tmp_path: Path,
) -> None:
    online = ["distill", "--online", *teacher_flags, "--data-dir", data_dir, "--img-size", 32]
    online += [*FREE, "--batch-size", 16, "--epochs", 1, "--workers", 0]
    alone = done(*online, "--output", tmp_path / "alone").report
    two = done_in(2, *online, "--output", tmp_path / "two").report
    assert alone["teacher_forwards"] == two["teacher_forwards"] == 36 + 15
    assert two["kl"] == pytest.approx(alone["kl"], rel=1e-4)
    cached = done(*distill_flags, "--epochs", 1, "--output", tmp_path / "cached").report
    assert cached["teacher_forwards"] == 0


# --- stopped, and continued on as many ranks or others ------------------------------------------


@pytest.fixture(scope="module")
def whole(
    warm: Warm, distill_flags: list[str], tmp_path_factory: pytest.TempPathFactory
) -> tuple[list[object], Path]:
    """Flags, and a run of four ranks with a checkpoint of every second step. Not to be changed."""
    run = tmp_path_factory.mktemp("whole") / "run"
    flags: list[object] = [*distill_flags, "--batch-size", 17, "--lr", 0.05, "--model-ema"]
    flags += ["--cutmix-target", "mixed-labels", "--cutmix-prob", 0.5]
    flags += ["--checkpoint-every", 2, "--checkpoint-hist", 99]
    ended = ranks.__wrapped__(warm)(4, *flags, "--output", run)  # type: ignore[attr-defined]
    assert ended.codes == [0] * 4, ended.said
    return flags, run


def _as_stopped_after(step: int, whole: Path, run: Path) -> None:
    shutil.copytree(whole, run)
    (run / "report.json").unlink()
    for path in (run / "checkpoints").iterdir():
        if int(path.stem.split("-")[1]) > step:
            path.unlink()


@pytest.mark.parametrize("step", [2, 4])
def test_on_as_many_ranks_it_ends_in_the_same_bits(
    done_in: Callable[..., Ended], whole: tuple[list[object], Path], run: Path, step: int
) -> None:
    _as_stopped_after(step, whole[1], run)
    done_in(4, "distill", "--resume", run)
    assert sha256(run) == sha256(whole[1])
    assert (run / "summary.csv").read_bytes() == (whole[1] / "summary.csv").read_bytes()
    one, other = newest(run), newest(whole[1])
    assert torch.equal(one["rng"], other["rng"])
    assert one["rng"].shape[0] == 4
