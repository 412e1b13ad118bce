"""Estimates of coding views together: divergence, code lengths, the gain on known rows."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks import views_together


def _powers(num_images: int = 4, num_views: int = 8, num_classes: int = 60) -> Tensor:
    """Return views that are powers of one distribution of their image."""
    generator = torch.Generator().manual_seed(0)
    logits = 2.0 * torch.randn(num_images, 1, num_classes, generator=generator, dtype=torch.float64)
    power = 0.5 + torch.rand(num_images, num_views, 1, generator=generator, dtype=torch.float64)
    return torch.softmax(logits * power, -1)


def test_divergence_is_that_of_the_recovered_distribution() -> None:
    probs = _powers(2, 3, 10)
    views = views_together.listed(probs, 4)
    base = torch.linspace(-3.0, 0.0, 2 * 3 * 5, dtype=torch.float64).view(2, 3, 5)

    ids = probs.mean(1).numpy().argsort(1)[:, ::-1]
    for image in range(2):
        for view in range(3):
            recovered = np.full(10, math.exp(base[image, view, 4]))
            recovered[ids[image, :4]] = np.exp(base[image, view, :4].numpy())
            recovered /= recovered.sum()
            p = probs[image, view].numpy()
            expected = (p * np.log(p / recovered)).sum()
            found = views_together.divergence(views, base)[image, view]
            assert float(found) == pytest.approx(expected, abs=1e-12)


def test_code_lengths_are_those_of_the_counts() -> None:
    values = torch.tensor([[0, 1], [0, 1], [0, 0], [1, 1]])
    lengths = views_together.code_lengths(values, torch.tensor([0, 1]), 2)
    assert lengths[0, 0] == pytest.approx(-math.log2(3.02 / 4.04))
    assert lengths[1, 1] == pytest.approx(-math.log2(3.02 / 4.04))


def test_residuals_reach_any_row_where_bits_cost_little() -> None:
    probs = _powers(1, 4, 12)
    views = views_together.listed(probs, 11)
    bits = torch.ones(int(views_together.places(12).max()) + 1, 17, dtype=torch.float64)
    flat = torch.zeros(1, 4, 12, dtype=torch.float64)
    _, kl, _ = views_together.residuals(views, flat, bits, 1e-9)
    # a residual is off by at most half its step: KL is at most about its variance / 2
    assert float(kl.max()) < views_together.RESIDUAL_STEP**2 / 8
    assert float(views_together.divergence(views, flat).min()) > 10 * float(kl.max())


def test_views_that_are_powers_of_one_distribution_need_no_residuals() -> None:
    probs = _powers()
    kl, bits = views_together.model(probs, 40, 1, 0.0002)
    own_kl, own_bits = views_together.today(probs, 0.001)
    assert float(kl.mean()) < float(own_kl.mean())
    assert float(bits.mean()) < 0.5 * float(own_bits.mean())


def test_the_table_compares_bytes_at_one_divergence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(views_together, "LISTS", (20,))
    monkeypatch.setattr(views_together, "FIT_STEPS", 20)
    np.savez(tmp_path / "rows.npz", probs=_powers(4, 4).float().numpy())
    views_together.main([str(tmp_path / "rows.npz"), "--views", "1", "4"])
    printed = capsys.readouterr().out
    assert "| rows, 1 views | label codec, rate 0.001 |" in printed
    assert "| rows, 4 views | **up to 3 components** |" in printed
    assert "| rows, 1 views | **up to 2 components** |" not in printed
    assert views_together.bytes_at([(10.0, 0.04), (40.0, 0.01)], 0.02) == pytest.approx(20.0)
