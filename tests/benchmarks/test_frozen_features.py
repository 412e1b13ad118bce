"""benchmarks.frozen_features runs, and both trainings end with the same figures."""

import pytest

from benchmarks import frozen_features


@pytest.mark.slow
def test_both_trainings_end_with_the_same_figures(capsys: pytest.CaptureFixture[str]) -> None:
    frozen_features.main(["--quick", "--epochs", "2", "--workers", "0"])
    lines = capsys.readouterr().out.splitlines()
    cached, slow = (line.split("|")[4:6] for line in lines if line.startswith("| c"))
    assert cached == slow
    assert "ratio " in lines[-1]
