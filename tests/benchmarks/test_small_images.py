"""benchmarks/small_images.py (docs/benchmarks/small-images.md), on a few images."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks import small_images


@pytest.mark.slow
def test_loaders_and_step_are_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    generator = np.random.default_rng(0)
    for n in range(128):
        folder = tmp_path / "train" / str(n % 2)
        folder.mkdir(parents=True, exist_ok=True)
        noise = generator.integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{n}.jpg")
    small_images.main([str(tmp_path), "--crop", "rrc", "--quick"])

    printed = capsys.readouterr().out
    for row in ("from memory, 2 threads", "ImageFolder, 2", "CIFAR10", "loaded by 0 threads"):
        assert row in printed
