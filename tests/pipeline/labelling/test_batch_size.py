"""pipeline.labelling.batch_size: the size is found by trying, and the set says which it was."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import Result
from mealv2.errors import ConfigError
from mealv2.label_set import LabelSet, read_manifest
from mealv2.models.ensemble import BySize
from pipeline.labelling.batch_size import find_batch_size

Run = Callable[..., Result]
CPU = torch.device("cpu")


class TrainingSpec:
    """Multiplies matrices so often as ``times`` says of a batch; keeps the sizes it was asked."""

    def __init__(self, times: Callable[[int], int], *, fits: int = 1 << 30) -> None:
        self.sizes: list[int] = []
        self._times = times
        self._fits = fits
        self._matrix = torch.ones(64, 64)

    def __call__(self, images_BCHW: torch.Tensor, by_size: BySize) -> None:
        assert images_BCHW.dtype == torch.uint8
        assert images_BCHW.is_contiguous(memory_format=torch.channels_last)
        size = len(images_BCHW)
        self.sizes.append(size)
        if size > self._fits:
            raise torch.OutOfMemoryError("no room")
        for _ in range(self._times(size)):
            self._matrix @ self._matrix


@pytest.mark.slow
@pytest.mark.timing
@pytest.mark.parametrize(
    ("times", "max_batch_size", "expected"),
    [
        (lambda size: 400, 10_000, 256),  # as fast for any batch: the largest for a CPU
        (lambda size: 400, 100, 64),  # and no more than there are views
        (lambda size: 400, 5, 5),
        (lambda size: size * size * 4, 10_000, 8),  # ever slower: the smallest
    ],
    ids=["free", "few views", "very few views", "dear"],
)
def test_it_doubles_while_that_makes_it_faster(
    times: Callable[[int], int],
    max_batch_size: int,
    expected: int,
    capsys: pytest.CaptureFixture[str],
) -> None:
    work = TrainingSpec(times)
    assert find_batch_size(work, img_size=8, device=CPU, max_size=max_batch_size) == expected
    assert max(work.sizes) <= max_batch_size
    (message,) = capsys.readouterr().err.splitlines()
    assert message.startswith(f"--batch-size auto: {expected} views a forward pass (")


def test_what_does_not_fit_into_memory_is_not_taken() -> None:
    assert (
        find_batch_size(
            TrainingSpec(lambda size: 400, fits=40), img_size=8, device=CPU, max_size=999
        )
        == 32
    )
    with pytest.raises(ConfigError, match=r"8 views of 8 pixels do not fit.*cpu; give a smaller"):
        find_batch_size(TrainingSpec(lambda size: 1, fits=4), img_size=8, device=CPU, max_size=999)


def test_stage_one_finds_it_says_it_and_keeps_it(
    done: Run, run_cli: Run, precompute_flags: list[str], tmp_path: Path, labels_dir: Path
) -> None:
    out = tmp_path / "labels"
    result = done(*precompute_flags, "--batch-size", "auto", "--output", out)
    chosen = read_manifest(out)["batch_size"]
    assert chosen in (8, 16, 32, 64, 128)  # of 144 views
    assert f"--batch-size auto: {chosen} views a forward pass" in result.stderr
    assert LabelSet.open(out).num_views == 4

    # a run that makes no shard changes nothing
    before = (out / "manifest.json").read_bytes()
    assert done(*precompute_flags, "--batch-size", 5, "--output", out).report["shards_made"] == 0
    assert (out / "manifest.json").read_bytes() == before
    assert read_manifest(labels_dir)["batch_size"] == 16

    refused = run_cli(*precompute_flags, "--batch-size", "automatic", "--output", out)
    assert (refused.code, refused.stderr.count("\n")) == (2, 1)
    assert "'automatic' is not a valid integer" in refused.stderr


def test_a_settings_file_may_say_auto(
    config_of: Callable[..., Any], precompute_flags: list[str], tmp_path: Path
) -> None:
    flags = [f for f in precompute_flags if f != "--batch-size"]
    flags.remove("16")
    (tmp_path / "c.json").write_text('{"batch_size": "auto"}')
    found = config_of(*flags, "--config", tmp_path / "c.json", "--output", tmp_path / "labels")
    assert found.batch_size == "auto"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_it_stays_within_memory() -> None:
    device = torch.device("cuda")
    total = torch.cuda.get_device_properties(device).total_memory
    per_image = total // 100  # 64 images fit, 128 do not

    def forward(images_BCHW: torch.Tensor, by_size: BySize) -> None:
        torch.empty(len(images_BCHW) * per_image, dtype=torch.uint8, device=device)

    assert find_batch_size(forward, img_size=8, device=device, max_size=4096) in (8, 16, 32, 64)
    assert torch.cuda.memory_allocated(device) < total // 100
