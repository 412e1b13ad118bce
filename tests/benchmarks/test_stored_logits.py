"""benchmarks/stored_logits.py: bytes and errors of stored logits, and what tells them apart."""

from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import stored_logits
from label_sets import KEYS, ensemble_outputs, make_set
from mealv2.label_set import Encoding


def _outputs(num_views: int = 4) -> stored_logits.Outputs:
    return stored_logits.Outputs(*ensemble_outputs(10 * num_views, 50, num_views=num_views))


def test_bytes_and_errors_are_those_of_the_encoding() -> None:
    outputs = _outputs()
    *_, line = stored_logits.forms(outputs, 4, 0.001)
    encoding = Encoding(50, rate=0.001, logits=True)
    rows = encoding.encode(*outputs, num_views=4)
    assert line.size == sum(map(len, encoding.blocks(rows, 4))) / 40
    assert rows.logits is not None
    assert torch.equal(line.recovered_NC, rows.logits.to_dense(rows.labels.kept(), 50))


def test_a_line_keeps_the_mean_of_the_others_and_a_second_block_does_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(stored_logits, "STEPS", 1)
    outputs = _outputs()
    found = {stored.name: stored for stored in stored_logits.forms(outputs, 4, 0.001)}
    others = {name: float(stored_logits.row_of(outputs, found[name], 4)[5]) for name in found}
    assert abs(others["float16 values"]) < 0.011
    assert abs(others["a line"]) < 0.011
    assert others["a second block, rate 0.003"] > 0.05
    assert found["a line"].size < min(s.size for name, s in found.items() if name != "a line")


def test_divergence_is_that_of_the_softmax_at_a_temperature() -> None:
    generator = torch.Generator().manual_seed(0)
    logits, found = torch.randn(2, 5, 9, generator=generator)
    p, q = (
        np.exp(each / 4) / np.exp(each / 4).sum(axis=1, keepdims=True)
        for each in (logits.double().numpy(), found.double().numpy())
    )
    expected = (p * np.log(p / q)).sum(axis=1).mean()
    assert stored_logits.divergence(logits, found, 4.0) == pytest.approx(expected)


def test_equal_rows_are_not_told_apart_and_shifted_ones_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(stored_logits, "STEPS", 60)
    logits = _outputs().logits_NC
    assert stored_logits.told_apart(logits, logits, 4) == 0.5
    assert stored_logits.told_apart(logits, logits + 5.0, 4) > 0.8


def test_the_tables_of_a_set(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stored_logits, "STEPS", 2)
    dense = Encoding(20, "float32", topk=20, logits=True)
    make_set(tmp_path / "set", dense, num_views=4)
    stored_logits.main([str(tmp_path / "set"), "--views", "1", "4"])
    text = capsys.readouterr().out
    assert f"{len(KEYS)} images x 1 views, rate 0.001" in text
    assert text.count("| a line |") == 2
