"""benchmarks/views_together.py: bytes and KL of the label codec, the entropy bound, the tables."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks import views_together
from benchmarks.label_codec import LAYOUTS, recovered_by
from mealv2.codec import encode


def _powers(num_images: int = 4, num_views: int = 8, num_classes: int = 200) -> Tensor:
    """Return views that are powers of one distribution of their image."""
    generator = torch.Generator().manual_seed(0)
    logits = 2.0 * torch.randn(num_images, 1, num_classes, generator=generator)
    power = 0.5 + torch.rand(num_images, num_views, 1, generator=generator)
    return torch.softmax(logits * power, -1)


def test_bytes_and_kl_are_those_of_the_labels() -> None:
    probs = _powers()
    points = views_together.measure(probs, [0.001])
    (found,) = points[views_together.TOGETHER]
    labels = encode(probs.flatten(0, 1), rate=0.001, num_views=8)

    exact, recovered = probs.flatten(0, 1).double().numpy(), labels.to_dense().double().numpy()
    kl = (exact * np.log(exact / recovered)).sum(axis=1).mean()
    assert found == (0.001, labels.nbytes / 32, pytest.approx(kl, abs=1e-9))


def test_views_of_one_distribution_take_fewer_bytes_together() -> None:
    points = views_together.measure(_powers(), [0.0005, 0.001, 0.003])
    together, alone, bound = (
        points[name]
        for name in (views_together.TOGETHER, views_together.ALONE, views_together.BOUND)
    )
    sizes = [views_together.bytes_at(curve, 0.02) for curve in (together, alone)]
    assert sizes[0] < 0.5 * sizes[1]
    assert all(b[1] <= t[1] and b[2] == t[2] for b, t in zip(bound, together, strict=True))


def test_an_ideal_code_of_symbols_that_fit_the_codes_saves_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As often as a code of length n says, 2^-n."""
    counts = [
        2.0 ** (12 - codes.lengths_XS) for codes in (views_together.RUNS, views_together.VALUES)
    ]
    monkeypatch.setattr(views_together.residual_codes, "count", lambda *_, **__: counts)
    probs = _powers()
    every = torch.ones(4, dtype=torch.bool)
    assert views_together.saved_bytes(probs, 0.001, every) == pytest.approx(0.0, abs=1e-9)
    counts[1] = counts[1] + 1000.0
    assert views_together.saved_bytes(probs, 0.001, every) > 0.1
    assert views_together.saved_bytes(probs, 0.001, ~every) == 0.0


@pytest.mark.parametrize("title", LAYOUTS)
def test_layouts_recover_the_classes_they_keep(title: str) -> None:
    layout = LAYOUTS[title]
    probs = _powers(1, 3)[0]
    recovered = recovered_by(layout)(probs, 0)
    ids = probs.topk(layout.k, dim=1).indices
    kept, expected = recovered.gather(1, ids), probs.gather(1, ids)
    if layout.rest == "none":
        expected = expected / expected.sum(1, keepdim=True)
        assert float(recovered.scatter(1, ids, 0.0).max()) == 0.0
    assert torch.allclose(kept, expected, rtol=2e-3)
    assert torch.allclose(recovered.sum(1), torch.ones(3), atol=1e-3)


def test_the_table_compares_bytes_at_one_divergence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.savez(tmp_path / "rows.npz", probs=_powers(3, 4, 120).numpy())
    one = str(tmp_path / "rows.npz")
    views_together.main([f"{one},{one}", "--views", "1", "4", "--json", str(tmp_path / "out.json")])
    printed = capsys.readouterr().out
    assert "| rows + rows, 6 images x 1 views | codec, views together, rate 0.001 |" in printed
    assert "| rows + rows, 6 images x 4 views | entropy bound, rate 0.001 |" in printed
    assert "| top-10 pruned, uint16 + float16, others 0 | 40.0 | infinite |" in printed
    assert (tmp_path / "out.json").exists()
    curve = [(0.1, 10.0, 0.04), (0.01, 40.0, 0.01)]
    assert views_together.bytes_at(curve, 0.02) == pytest.approx(20.0)
    assert math.isnan(views_together.bytes_at(curve, 0.05))


def test_added_views_take_fewer_bytes_with_the_model_of_the_first_ones(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    probs = _powers(num_views=18)
    points = views_together.measure_added(probs, 16, [0.001])
    own, with_first = (
        points[name][0] for name in (views_together.OWN_BLOCK, views_together.FIRST_MODEL)
    )
    assert with_first[1] < 0.5 * own[1]
    first = encode(probs[:, :16].flatten(0, 1), rate=0.001, num_views=16)[::16]
    added = probs[:, 16:].flatten(0, 1)
    labels = encode(added, rate=0.001, num_views=2, first=first)
    assert with_first[:2] == (0.001, labels.nbytes / 8)
    assert own[1] == encode(added, rate=0.001, num_views=2).nbytes / 8

    np.savez(tmp_path / "rows.npz", probs=probs.numpy())
    views_together.main([str(tmp_path / "rows.npz"), "--added", "16", "--views", "1", "2"])
    printed = capsys.readouterr().out
    assert "rows, 4 images x 1 views added to 16" in printed
    assert views_together.FIRST_MODEL in printed
