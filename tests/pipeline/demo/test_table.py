"""pipeline.demo.table: gains, seed by seed, with Student's interval."""

from typing import Any

import numpy as np
import pytest

from pipeline.config import DemoConfig
from pipeline.demo import parts, table


def reports_of(seeds: list[int]) -> dict[str, Any]:
    """Reports as the commands make them: the seeds differ by more than the arms."""
    models = [{"model": name, "top1": 94.0} for name in parts.TEACHERS]
    accuracy = {"teachers": models, "ensemble": {"top1": 95.0}}
    found: dict[str, Any] = {
        name: {"views": 10, "bytes": 200, "accuracy": accuracy}
        for name in (parts.LABELS, parts.EXTRA_LABELS)
    }
    for place, seed in enumerate(seeds):
        for arm, top1 in ((parts.START, 40.0), (parts.HARD, 60.0)):
            found[parts.run_name(seed, arm)] = {"top1": top1 + 9 * place, "steps": 100}
        for arm, gain in ((parts.HARD_LONGER, 2.0), (parts.SOFT, 4.0), (parts.EXTRA, 10.0)):
            top1 = 60.0 + 9 * place + gain + 0.1 * place
            found[parts.run_name(seed, arm)] = {"top1": top1, "steps": 90}
    return found


def words_of(report: dict[str, Any]) -> str:
    """Return the table and its notes without line breaks."""
    return " ".join(table.table_of(report).split())


def test_gains_are_paired_by_seed() -> None:
    report = table.report_of(DemoConfig(seed=3, seeds=3), reports_of([3, 4, 5]))
    gain = report["gains"][parts.SOFT]
    assert gain["differences"] == pytest.approx([4.0, 4.1, 4.2])
    # sd 0.1, t(0.975, 2) = 4.302653: not the sd of 9 between the seeds
    half = 4.302653 * 0.1 / np.sqrt(3)
    assert gain["interval_95"] == pytest.approx((4.1 - half, 4.1 + half), rel=1e-5)
    assert report["seeds"] == [3, 4, 5]

    text = table.table_of(report)

    soft = next(line for line in text.splitlines() if line.startswith("(a) soft labels "))
    assert soft.split()[3:] == ["100", "soft", "90", "73.1", "+4.1", "+3.9", "to", "+4.3"]
    extra = next(line for line in text.splitlines() if line.startswith("(b) "))
    assert extra.split()[-5:] == ["79.1", "+10.1", "+9.9", "to", "+10.3"]
    control = next(line for line in text.splitlines() if "control" in line)
    assert control.split()[-3:] == ["hard", "100", "69.0"]
    longer = next(line for line in text.splitlines() if "3 times the steps" in line)
    assert longer.split()[-5:] == ["71.1", "+2.1", "+1.9", "to", "+2.3"]
    assert "1,000 of them have no class label" in words_of(report)
    assert "seeds 3 to 5" in words_of(report)


def test_one_seed_has_no_interval() -> None:
    report = table.report_of(DemoConfig(seeds=1), reports_of([0]))
    assert report["gains"][parts.EXTRA]["interval_95"] is None
    text = words_of(report)
    assert "(b) +10.0 points: one seed has no interval, so this can be chance (--seeds 3)." in text
    assert "mean of seed 0." in text


@pytest.mark.parametrize(
    ("interval", "verdict"),
    [
        ((0.2, 2.0), "(a) +1.1 points: the interval is above 0, so not chance over seeds. Same"),
        ((-0.2, 2.0), "(a) +1.1 points: the interval contains 0: too few seeds to tell"),
        ((-2.0, -0.2), "(a) +1.1 points: the interval is below 0: soft labels did harm"),
    ],
)
def test_table_says_whether_a_gain_can_be_chance(
    interval: tuple[float, float], verdict: str
) -> None:
    report = table.report_of(DemoConfig(seeds=3), reports_of([0, 1, 2]))
    report["gains"][parts.SOFT] |= {"mean": 1.1, "interval_95": interval}
    text = words_of(report)
    assert verdict in text
    assert "(b) +10.1 points: the interval is above 0" in text
    assert "Two things differ from the control, labels and pictures" in text
    assert "Student's t over the seeds" in text


def test_seed_that_chose_the_setting_is_named() -> None:
    chosen = "The setting was chosen on seed 0; --seed 3 has seeds that chose nothing."
    for seeds in ([0, 1, 2], [3, 4, 5]):
        report = table.report_of(DemoConfig(seed=seeds[0]), reports_of(seeds))
        assert (chosen in words_of(report)) == (0 in seeds)
        assert max(map(len, table.table_of(report).splitlines())) <= 100
