"""pipeline.training.run_log: one short line an epoch, the rest in files."""

import csv
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from conftest import Result
from pipeline.training import run_log
from pipeline.training.run_folder import RunFolder
from pipeline.training.run_log import RunLog

Run = Callable[..., Result]
Events = Callable[[Path, str], list[dict[str, Any]]]
LINE = re.compile(
    r"epoch (\d)/2  loss (\S+)  top-1 (\S+)  agreement (\S+)  lr (\S+)  (\d+) img/s(  ETA .+)?"
)


def rows_of(run: Path) -> list[dict[str, str]]:
    with (run / "summary.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_an_epoch_is_one_line_with_the_figures_of_its_row(
    done: Run, distill_flags: list[str], run: Path, events: Events
) -> None:
    stderr = done(*distill_flags, "--output", run).stderr
    found = [LINE.fullmatch(line) for line in stderr.splitlines() if line.startswith("epoch ")]
    lines = [match.groups() for match in found if match]
    assert len(lines) == len(found) == 2
    rows, of_epochs = rows_of(run), events(run, "epoch")
    for (epoch, loss, top1, agreement, lr, speed, end), row, event in zip(
        lines, rows, of_epochs, strict=True
    ):
        assert (epoch, row["epoch"], event["epoch"]) == (epoch,) * 2 + (int(epoch),)
        assert loss == f"{float(row['train_loss']):.4f}"
        assert top1 == f"{float(row['val_top1']):.2f}"
        assert agreement == f"{float(row['val_agreement']):.2f}"
        assert lr == f"{float(row['lr']):.3g}"
        assert speed == f"{event['images_per_second']:.0f}"
        assert (end is None) == (epoch == "2"), "a run that has ended has no time left"
        same = {name: str(value) for name, value in event.items() if name in row}
        assert same == row, "metrics.jsonl has all figures of the row"
    assert of_epochs[1]["steps"] == 10


def test_an_epoch_without_validation_has_no_accuracy(
    done: Run, finetune_flags: list[str], run: Path
) -> None:
    said = done(*finetune_flags, "--val-split", "none", "--output", run).stderr
    (line,) = (line for line in said.splitlines() if line.startswith("epoch 1/"))
    assert re.fullmatch(r"epoch 1/2  loss \S+  lr \S+  \d+ img/s  ETA .+", line)


class _Fixed:
    """Any attribute of a run: what a line of its log needs."""

    def __init__(self, **values: Any) -> None:
        vars(self).update(values)

    def log(self, event: str, **figures: Any) -> None: ...

    def log_epoch(self, row: dict[str, Any]) -> None: ...


@pytest.mark.parametrize(
    ("epoch", "seconds", "end"), [(998, 100.0, "03:20"), (999, 172_000.0, "47:46:40")]
)
def test_the_longest_line_fits_100_columns(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    epoch: int,
    seconds: float,
    end: str,
) -> None:
    progress = _Fixed(epoch=epoch - 1, step=0, total_steps=10**9)
    state = _Fixed(progress=progress, lr=1.2345e-05)
    log: Any = RunLog(_Fixed(epochs=1000, log_weights=()), _Fixed(), state, _Fixed(logged={}), None)  # type: ignore[arg-type]
    clock = iter([0.0, 0.0, seconds])
    monkeypatch.setattr(run_log.time, "monotonic", lambda: next(clock))
    log.bar(1, last_epoch=epoch, epochs_of_step=1.0)
    progress.epoch = epoch
    metrics = {"top1": 100.0, "agreement": 100.0}
    log.log_epoch({"loss": 12.34567}, metrics, images_per_second=12345.6)
    line = capsys.readouterr().err.rstrip("\n")
    assert "  agreement 100.00  lr 1.23e-05  12346 img/s" in line
    assert line.endswith(f"  ETA {end}")
    assert len(line) <= 100


@pytest.mark.parametrize(
    ("done_before", "count"),
    [(1, 0), (0, 1)],  # the epoch of the warning is in the checkpoint, or runs again
)
def test_a_resumed_run_warns_of_the_discriminator_once(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, done_before: int, count: int
) -> None:
    progress = _Fixed(epoch=0, step=0, total_steps=0)
    state = _Fixed(progress=progress, lr=0.1)
    config, spec = _Fixed(epochs=9, log_weights=()), _Fixed(extra={"discriminator": (None, 0.1)})
    trained = {"loss": 1.0, "discriminator_accuracy": 0.99, run_log.GRADIENT_RATIO: 0.9}

    def epochs(log: Any, *, last: int) -> int:
        while progress.epoch < last:
            progress.epoch += 1
            log.log_epoch(trained, {}, images_per_second=0.0)
        return capsys.readouterr().err.count("the discriminator wins")

    folder = RunFolder.create(tmp_path, {})
    assert epochs(RunLog(config, spec, state, folder, None), last=2) == 1  # type: ignore[arg-type]
    progress.epoch = done_before
    folder = RunFolder.reopen(tmp_path, epoch=done_before, step=done_before)
    assert epochs(RunLog(config, spec, state, folder, None), last=3) == count  # type: ignore[arg-type]
