"""distributed: a run of several processes learns what one learns, and ends as one ends.

Real processes that meet over loopback; those that torchrun starts are in test_torchrun.py.
"""

import csv
import functools
import json
import re
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed import TCPStore

from cases import mostly_slow
from conftest import Result
from mealv2.batches import split_evenly
from mealv2.data import source as data_source
from mealv2.data.requests import centre_requests
from mealv2.data.source import fingerprint_of
from mealv2.metrics import Evaluation
from mealv2.storage.atomic import file_sha256
from pipeline.runtime.distributed import Ranks
from pipeline.training.evaluator import local_centre_requests
from warm import Warm, warm_process

Run = Callable[..., Result]
Events = Callable[[Path, str], list[dict[str, Any]]]

# the split and its folders are listed twice, to check the command and to open the data, before the
# first image is opened
_LISTED = 10

# Without batch normalisation a batch may be cut as one likes. Rounding grows with every step, the
# faster the higher the rate.
FREE = ["--model", "test_efficientnet_gn", "--no-pretrained", "--lr", "0.003"]


# --- who does what ------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 5), max_size=60), st.integers(1, 9), st.integers(1, 3))
def test_every_item_is_in_one_share_and_shares_differ_by_at_most_one(
    sizes: list[int], num: int, least: int
) -> None:
    cuts = split_evenly(sizes, num, min_size=least)
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
    cuts = split_evenly([1] * num_items, 6, min_size=2)
    assert sorted(map(len, cuts), reverse=True) == expected


@given(st.integers(1, 90), st.integers(1, 20), st.integers(1, 5))
def test_ranks_validate_neighbours_in_as_many_requests(
    num_images: int, batch_size: int, num: int
) -> None:
    """What lies in few files: of shards of ten images a rank reads those of its run alone."""
    source: Any = range(num_images)
    shares = [local_centre_requests(source, batch_size, Ranks(rank, num)) for rank in range(num)]
    alone = local_centre_requests(source, batch_size, Ranks())

    assert {len(share) for share in shares} == {len(alone)}
    runs = [[p for request in share for p, _ in request] for share in shares]
    assert [position for run in runs for position in run] == list(source)
    assert max(len(request) for share in shares for request in share) <= batch_size
    shards = sum(len({position // 10 for position in run}) for run in runs)
    assert shards <= -(-num_images // 10) + num - 1
    assert alone == centre_requests(source, batch_size)


def test_figures_of_parts_add_up_to_those_of_the_whole() -> None:
    generator = torch.Generator().manual_seed(0)
    logits_BC = torch.randn(7, 3, generator=generator)
    labels_B = torch.tensor([0, 1, 2, 0, 1, 2, 2])
    whole, process_group = Evaluation(3), Evaluation(3)
    sums = torch.zeros_like(whole.sums())
    whole.add(logits_BC, labels_B)
    for rows in (slice(0, 4), slice(4, 4), slice(4, 7)):
        part = Evaluation(3)
        part.add(logits_BC[rows], labels_B[rows])
        sums += part.sums()
    process_group.load_sums(sums)
    assert process_group.summary() == pytest.approx(whole.summary(), rel=1e-12)
    assert process_group.per_class() == whole.per_class()


def test_a_run_of_one_process_tells_nobody() -> None:
    alone, tensor = Ranks(), torch.ones(2)
    assert alone.sync_step(3, "SIGINT") == (3, "SIGINT")
    assert alone.all_reduce(tensor) is tensor
    assert alone.gather_rows(tensor) is tensor
    assert alone.all_reduce_counts({"a": 1}) == {"a": 1}


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


def _in_ranks(
    warm: Warm, num: int, *args: object, hit: dict[int, dict[str, Any]] | None = None
) -> Ended:
    """Run ``mealv2 ARGS`` in so many ranks; ``hit`` says what befalls some of them."""
    # as torchrun does: the store in which ranks find each other outlives all of them
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    there = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
    there |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "GLOO_SOCKET_IFNAME": "lo"}
    jobs = []
    for rank in range(num):
        mine = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(num)}
        job = {"args": [*map(str, args)], "env": there | mine, "out": "/nowhere"}
        job["kill_after_s"] = 60  # nothing may hang
        jobs.append(job | (hit or {}).get(rank, {}))
    results = warm.run(*jobs)
    logs = [Path(f"{warm.log}-{n}").read_text() for n in range(num)]
    # torch's own warning where nothing gives loopback's address a name
    said = [
        re.sub(r"^\[W.*\[c10d\] The hostname of the client.*\n", "", log, flags=re.M)
        for log in logs
    ]
    return Ended([result["code"] for result in results], said)


@pytest.fixture
def ranks(warm: Warm) -> Callable[..., Ended]:
    """The function to do so with a process that is there."""
    return functools.partial(_in_ranks, warm)


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


def _of_a_free_student(flags: list[str]) -> list[object]:
    """Return flags of a distillation with another student, from new weights."""
    place = flags.index("--initial-checkpoint")
    return [*flags[:place], *flags[place + 2 :], *FREE]


CASES: dict[str, list[object]] = {
    # batches of 17, 17 and 2: two of four ranks have none of the last
    "plain": ["--batch-size", 17, "--model-ema", "--model-ema-decay", 0.5],
    "micro-batches": ["--batch-size", 17, "--grad-accum-steps", 3],
    "views": ["--batch-size", 10, "--views-per-image", 2, "--grad-accum-steps", 2],
    "official": ["--batch-size", 15, "--discriminator", "official", "--seed", 1],
    "teachers": ["--batch-size", 16, "--missing", "teach"],
}


@pytest.mark.parametrize(
    "case",
    [
        "plain",
        *(pytest.param(case, marks=pytest.mark.slow) for case in CASES if case != "plain"),
    ],
)
def test_losses_of_one_two_and_four_ranks_agree(
    done: Run,
    done_in: Callable[..., Ended],
    distill_flags: list[str],
    teacher_flags: list[str],
    tmp_path: Path,
    events: Events,
    case: str,
) -> None:
    flags = [*_of_a_free_student(distill_flags), *CASES[case]]
    flags += teacher_flags if "teach" in flags else []
    alone = tmp_path / "alone"
    report = done(*flags, "--output", alone).report
    assert losses(alone, events)[-1] != pytest.approx(losses(alone, events)[0], rel=0.01)
    for num in (2, 4):
        run = tmp_path / str(num)
        ended = done_in(num, *flags, "--output", run)
        # sums in another order differ by 1e-7, which each step multiplies by three or so
        assert losses(run, events) == pytest.approx(losses(alone, events), rel=3e-5)
        for told in ("train", "validation"):
            for event, expected in zip(events(run, told), events(alone, told), strict=True):
                # the ratio of two norms is that of each share on its own
                others = {"event", "time", "images_per_second", "data_wait_share"}
                others.add("discriminator_gradient_ratio")
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
    with (run / "summary.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    correct = [36 * float(row["train_top1"]) / 100 for row in rows]  # of all ranks together
    assert correct == pytest.approx([round(number) for number in correct], abs=1e-3)
    assert all(0 <= float(row["val_ece"]) <= 100 for row in rows)


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.fixture
def as_of_several(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Runs in this process take the ways of several ranks, of which there is one."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    monkeypatch.setattr(Ranks, "is_distributed", True)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("as_of_several")
def test_the_images_are_hashed_once(
    done: Run, finetune_flags: list[str], run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[object] = []

    def hashed(*args: object) -> str:
        asked.append(args)
        return fingerprint_of(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(data_source, "fingerprint_of", hashed)
    done(*finetune_flags, "--epochs", 1, "--val-split", "none", "--output", run)
    assert len(asked) == 1
    assert "data_sha256" in newest(run)


# --- stopped, and continued on as many ranks or others ------------------------------------------


@pytest.fixture(scope="module")
def whole(
    warm: Warm, distill_flags: list[str], tmp_path_factory: pytest.TempPathFactory
) -> tuple[list[object], Path]:
    """Flags, and a run of four ranks with a checkpoint of every second step. Not to be changed."""
    run = tmp_path_factory.mktemp("whole") / "run"
    flags: list[object] = [*distill_flags, "--batch-size", 17, "--lr", 0.05, "--model-ema"]
    flags += ["--cutmix-target", "mixed-labels", "--cutmix-prob", 0.5]
    flags += ["--recovery-interval", 2, "--checkpoint-hist", 99]
    ended = _in_ranks(warm, 4, *flags, "--output", run)
    assert ended.codes == [0] * 4, ended.said
    return flags, run


def _as_stopped_after(step: int, whole: Path, run: Path) -> None:
    shutil.copytree(whole, run)
    (run / "report.json").unlink()
    for path in (run / "checkpoints").iterdir():
        if int(path.stem.split("-")[1]) > step:
            path.unlink()


@pytest.mark.parametrize("step", [4, pytest.param(2, marks=pytest.mark.slow)])
def test_on_as_many_ranks_it_ends_in_the_same_bits(
    done_in: Callable[..., Ended], whole: tuple[list[object], Path], run: Path, step: int
) -> None:
    _as_stopped_after(step, whole[1], run)
    ended = done_in(4, "distill", "--resume", run)
    where = {2: "epoch 1/2 after 2 of its 3 steps", 4: "epoch 2/2 after 1 of its 3 steps"}[step]
    assert f"resuming in {where} ({step} in all)\n" in ended.said[0]
    assert ended.said[1:] == [""] * 3
    assert sha256(run) == sha256(whole[1])
    assert (run / "summary.csv").read_bytes() == (whole[1] / "summary.csv").read_bytes()
    one, other = newest(run), newest(whole[1])
    assert torch.equal(one["rng"], other["rng"])
    assert one["rng"].shape[0] == 4


@pytest.mark.slow
@pytest.mark.parametrize("num", [2, 1])
def test_on_another_number_of_ranks_it_goes_on(
    done_in: Callable[..., Ended],
    done: Run,
    distill_flags: list[str],
    tmp_path: Path,
    events: Events,
    num: int,
) -> None:
    flags = [*_of_a_free_student(distill_flags), "--batch-size", 17, "--checkpoint-hist", 9]
    whole, run = tmp_path / "whole", tmp_path / "run"
    done_in(4, *flags, "--output", whole)
    _as_stopped_after(3, whole, run)
    if num == 1:
        report = done("distill", "--resume", run).report
    else:
        report = done_in(num, "distill", "--resume", run).report
    assert report["steps"] == 6
    assert losses(run, events) == pytest.approx(losses(whole, events), rel=1e-5)
    assert newest(run)["rng"].shape[0] == num
    one, other = newest(run)["state_dict"], newest(whole)["state_dict"]
    assert all(torch.allclose(one[n], other[n], rtol=1e-3, atol=1e-5) for n in one)


@pytest.mark.parametrize(("image", "step"), [(27, 5), pytest.param(3, 1, marks=pytest.mark.slow)])
def test_a_signal_to_one_rank_stops_all_at_the_same_step_saved(
    ranks: Callable[..., Ended],
    done_in: Callable[..., Ended],
    data_dir: Path,
    finetune_flags: list[str],
    tmp_path: Path,
    image: int,
    step: int,
) -> None:
    """Twice, as srun signals every process, and torchrun those that it started once more."""
    whole, run = tmp_path / "whole", tmp_path / "run"
    flags = [*finetune_flags, "--batch-size", 14]
    done_in(2, *flags, "--output", whole)
    event = {"out": str(data_dir / "train"), "kill_at_event": image + _LISTED}
    hit = {1: {**event, "signal": signal.SIGTERM, "times": 2}}
    ended = ranks(2, *flags, "--output", run, hit=hit)
    assert ended.codes == [4, 4]
    (line,) = ended.lines
    assert "stopped by SIGTERM in epoch" in line
    assert line.endswith(f"torchrun … -m mealv2 finetune --resume {run}")
    assert newest(run)["total_steps"] == step
    resumed = done_in(2, "finetune", "--resume", run)
    where = f"epoch {1 + step // 3}/2 after {step % 3} of its 3 steps"
    assert f"resuming in {where} ({step} in all)\n" in "".join(resumed.said)
    assert sha256(run) == sha256(whole)


# --- when one of them ends ----------------------------------------------------------------------


def test_a_rank_that_is_killed_ends_the_others_with_one_clear_line(
    ranks: Callable[..., Ended], data_dir: Path, finetune_flags: list[str], run: Path
) -> None:
    hit = {1: {"out": str(data_dir / "train"), "kill_at_event": 12 + _LISTED}}
    ended = ranks(3, *finetune_flags, "--output", run, hit=hit)
    assert ended.codes == [1, -signal.SIGKILL, 1]
    (line,) = ended.lines
    assert "another rank ended without a message" in line
    assert "--auto-resume" in line
    assert "Traceback" not in "".join(ended.said)


@pytest.fixture
def with_bad_image(own_data: Path, finetune_flags: list[str]) -> list[str]:
    """Flags of a run of which one image cannot be decoded."""
    (own_data / "train" / "bees" / "04.jpg").write_bytes(b"no picture")
    (own_data / "val" / "bees" / "03.jpg").write_bytes(b"no picture")
    place = finetune_flags.index("--data-dir")
    return [*finetune_flags[: place + 1], str(own_data), *finetune_flags[place + 2 :]]


def test_a_bad_image_ends_all_ranks_with_one_clear_line(
    ranks: Callable[..., Ended], with_bad_image: list[str], run: Path
) -> None:
    ended = ranks(3, *with_bad_image, "--val-split", "none", "--output", run)
    assert ended.codes == [1, 1, 1]
    (line,) = ended.lines
    assert "bees/04.jpg" in line
    assert "--on-bad-image skip" in line
    assert "Traceback" not in "".join(ended.said)


@pytest.mark.slow
def test_bad_images_are_left_out_and_the_mean_is_over_those_that_are_there(
    done: Run,
    done_in: Callable[..., Ended],
    with_bad_image: list[str],
    tmp_path: Path,
    events: Events,
) -> None:
    flags = [*with_bad_image, *FREE, "--on-bad-image", "skip", "--epochs", 1]
    flags += ["--batch-size", 7, "--lr", 0.001]
    alone = done(*flags, "--output", tmp_path / "alone").report
    three = done_in(3, *flags, "--output", tmp_path / "three").report
    assert losses(tmp_path / "three", events) == pytest.approx(
        losses(tmp_path / "alone", events), rel=1e-5
    )
    assert three["num_images"] == alone["num_images"] == 14


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_a_last_view_that_skipping_left_does_not_end_a_run_with_batch_normalisation(
    ranks: Callable[..., Ended],
    with_bad_image: list[str],
    run: Path,
    events: Events,
    num_ranks: int,
) -> None:
    flags = [*with_bad_image, "--on-bad-image", "skip", "--epochs", 1, "--val-split", "none"]
    ended = ranks(num_ranks, *flags, "--batch-size", 2 * num_ranks, "--output", run)
    assert ended.codes == [0] * num_ranks, ended.said
    assert ended.report["steps"] == 18 // num_ranks
    # alone the step has nothing to learn from; of two ranks the other has
    assert len(events(run, "train")) == (17 if num_ranks == 1 else 9)


def test_what_all_ranks_find_wrong_is_said_once(
    ranks: Callable[..., Ended], finetune_flags: list[str], run: Path
) -> None:
    ended = ranks(2, *finetune_flags, "--model", "resnet5", "--output", run)
    assert ended.codes == [2, 2]
    (line,) = ended.lines
    assert "resnet5" in line


@pytest.mark.parametrize(
    ("wrong", "named"),
    mostly_slow(
        [
            (["--no-such-flag"], "--no-such-flag"),
            (["--lr", "much"], "'much' is not a valid float"),
            (["--momentum", "-1"], "--momentum"),
            (["--config", "/not/there"], "/not/there"),
        ]
    ),
)
def test_wrong_usage_is_said_once_before_ranks_have_met(
    ranks: Callable[..., Ended], finetune_flags: list[str], wrong: list[str], named: str
) -> None:
    ended = ranks(3, *finetune_flags, *wrong)
    assert ended.codes == [2, 2, 2]
    (line,) = "".join(ended.said).splitlines()
    assert line.startswith("mealv2: ")
    assert named in line


def test_ranks_of_different_runs_do_not_train_together(
    warm: Warm, ranks: Callable[..., Ended], finetune_flags: list[str], tmp_path: Path
) -> None:
    flags = [*finetune_flags, "--output", tmp_path / "run"]
    other = {"args": [*map(str, flags), "--seed", "1"]}
    ended = ranks(2, *flags, hit={1: other})
    assert ended.codes == [2, 2]
    (line,) = ended.lines
    assert "the ranks do not have the same settings" in line


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--sync-bn"], "--sync-bn needs GPUs"),
        (["--device", "cuda:0"], "--device cuda:0 is one device"),
    ],
)
def test_what_cannot_be_in_several_ranks_is_refused(
    ranks: Callable[..., Ended], finetune_flags: list[str], run: Path, flags: list[str], said: str
) -> None:
    ended = ranks(2, *finetune_flags, *flags, "--output", run)
    assert ended.codes == [2, 2]
    assert all(said in line for line in ended.lines)
    assert not run.exists()


def test_commands_for_one_process_refuse_ranks(
    ranks: Callable[..., Ended], data_dir: Path, student_dir: Path, distill_flags: list[str]
) -> None:
    evaluate = ["evaluate", "--data-dir", data_dir, "--checkpoint", student_dir]
    for command in (evaluate, [*distill_flags, "--dry-run"]):
        ended = ranks(2, *command)
        assert ended.codes == [2, 2]
        (line,) = ended.lines
        assert "torchrun is for distill, finetune, transfer and precompute" in line


# --- found again --------------------------------------------------------------------------------


def test_auto_resume_begins_goes_on_and_returns_the_report_of_what_is_done(
    done: Run, finetune_flags: list[str], tmp_path: Path
) -> None:
    flags = [*finetune_flags, "--checkpoint-hist", 9]
    done(*flags, "--output", tmp_path / "whole")
    run = tmp_path / "run"
    command = [*flags, "--output", run, "--auto-resume"]
    begun = done(*command).report
    assert done(*command).report == begun
    assert sha256(run) == sha256(tmp_path / "whole")
    shutil.rmtree(run)
    _as_stopped_after(3, tmp_path / "whole", run)
    went_on = done(*command)
    assert "epoch 2/2" in went_on.stderr
    assert "epoch 1/2" not in went_on.stderr
    assert sha256(run) == sha256(tmp_path / "whole")
    assert json.loads((run / "config.json").read_text())["auto_resume"] is False


def test_auto_resume_refuses_settings_of_another_run(
    done: Run, run_cli: Run, finetune_flags: list[str], tmp_path: Path
) -> None:
    command = [*finetune_flags, "--output", tmp_path / "run", "--auto-resume"]
    done(*command)
    refused = run_cli(*command, "--lr", 0.5)
    assert refused.code == 2
    assert "--lr 0.5 contradicts the run" in refused.stderr
    settings = json.loads((tmp_path / "run" / "config.json").read_text())
    config = tmp_path / "config.json"
    config.write_text(json.dumps(settings))
    by_config = ["finetune", "--config", config, "--output", tmp_path / "run", "--auto-resume"]
    assert done(*by_config).report["steps"] == 6
    config.write_text(json.dumps({**settings, "momentum": 0.5}))
    assert "--momentum 0.5 contradicts the run" in run_cli(*by_config).stderr


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--auto-resume"], "--auto-resume needs --output"),
        (["--sync-bn"], "--sync-bn has no effect in one process"),
        (
            ["--grad-accum-steps", 2, "--torchcompile", "max-autotune"],
            "cannot be used with --torchcompile",
        ),
        (["--grad-accum-steps", 13], "--grad-accum-steps 13 exceeds --batch-size 12"),
    ],
)
def test_settings_without_effect_are_refused(
    run_cli: Run, finetune_flags: list[str], flags: list[object], said: str
) -> None:
    refused = run_cli(*finetune_flags, *flags)
    assert refused.code == 2
    assert said in refused.stderr
