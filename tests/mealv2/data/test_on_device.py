"""mealv2.data.loader: the same pixels on the device; on a CPU nothing is done."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from mealv2.data.loader import on_device
from mealv2.data.requests import Batch


def _batches(number: int, *, pinned: bool = False) -> list[Batch]:
    rng = np.random.default_rng(0)
    found = []
    for n in range(number):
        pixels = rng.integers(256, size=(3 + n % 2, 64, 64, 3), dtype=np.uint8)
        images_BCHW = torch.from_numpy(pixels).permute(0, 3, 1, 2)
        if pinned:
            images_BCHW = images_BCHW.pin_memory()
        size = len(images_BCHW)
        boxes_B5, sizes_B2 = np.zeros((size, 5), np.uint32), np.ones((size, 2), np.uint32)
        found.append(Batch(images_BCHW, sizes_B2, boxes_B5, [n] * size, [0] * size, {99: "bad"}))
    return found


def test_on_a_cpu_the_very_pixels_pass_through_one_at_a_time() -> None:
    given = _batches(3)
    read: list[int] = []

    def reading() -> Iterator[Batch]:
        for number, item in enumerate(given):
            read.append(number)
            yield item

    stream = on_device(reading(), torch.device("cpu"))
    for number, item in enumerate(given):
        found = next(stream)
        assert read == list(range(number + 1))  # nothing is read ahead: a stop loses no batch
        assert found.images_BCHW is item.images_BCHW
        assert (found.positions, found.views) == (item.positions, item.views)
        assert found.failed == {99: "bad"}
    assert list(stream) == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_they_are_the_same_pixels_in_the_same_layout_whatever_the_gpu_does() -> None:
    device = torch.device("cuda")
    given = _batches(40, pinned=True)
    busy = torch.ones(2048, 2048, device=device)
    sums = []
    for item in on_device(given, device):
        assert item.images_BCHW.device.type == "cuda"
        assert item.images_BCHW.is_contiguous(memory_format=torch.channels_last)
        for _ in range(5):
            busy = busy @ busy * 0.0 + 1.0  # the host gets ahead, and the copies with it
        sums.append((item.images_BCHW.long() * torch.arange(64, device=device)).sum())
    expected = [int((item.images_BCHW.long() * torch.arange(64)).sum()) for item in given]
    assert [int(value) for value in sums] == expected
