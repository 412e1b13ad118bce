"""pipeline.training.meters: image-weighted means, speed, and the time spent waiting."""

import types
from pathlib import Path

import pytest
import torch

from pipeline.training.meters import Meter


def test_means_weigh_each_image_alike() -> None:
    meter = Meter()
    meter.add(8, {"loss": torch.tensor(1.0)})
    meter.add(2, {"loss": torch.tensor(6.0)})
    assert meter.means() == {"loss": pytest.approx(2.0, rel=1e-12)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_sum_of_many_batches_keeps_its_digits_whatever_their_type(dtype: torch.dtype) -> None:
    meter = Meter()
    for _ in range(2500):  # an epoch of ImageNet
        meter.add(512, {"loss": torch.tensor(0.1, dtype=dtype)})
    assert meter.means()["loss"] == pytest.approx(float(torch.tensor(0.1, dtype=dtype)), rel=1e-4)


def test_cleared_meter_begins_anew() -> None:
    meter = Meter()
    assert meter.means() == {}
    meter.add(4, {"loss": torch.tensor(1.0)})
    meter.clear()
    assert meter.means() == {}
    meter.add(1, {"loss": torch.tensor(3.0)})
    assert meter.means() == {"loss": 3.0}


def test_no_graph_is_held() -> None:
    meter = Meter()
    meter.add(1, {"loss": torch.ones((), requires_grad=True) * 2})
    assert not any(value.requires_grad for value in meter._sums.values())


def test_nan_is_not_hidden() -> None:
    meter = Meter()
    meter.add(1, {"loss": torch.tensor(float("nan"))})
    meter.add(1, {"loss": torch.tensor(1.0)})
    assert meter.means()["loss"] != meter.means()["loss"]


def test_speed_is_of_all_time_and_waiting_a_share_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(
        "pipeline.training.meters.time", types.SimpleNamespace(perf_counter=lambda: now)
    )
    meter = Meter()
    for _ in range(3):
        now += 4.0
        meter.add(8, {})
    meter.waited_s = 9.0
    assert meter.speed() == {"images_per_second": 24 / 12, "data_wait_share": 9 / 12}


def test_counts_are_sums_and_are_cleared() -> None:
    meter = Meter()
    meter.count({"stored": 8, "taught": 0})
    meter.count({"stored": 3})
    assert meter.counts == {"stored": 11, "taught": 0}
    meter.counts["stored"] = 99
    assert meter.counts["stored"] == 11, "what is returned is the caller's"
    meter.clear()
    assert meter.counts == {}


def test_restored_meter_goes_on_as_if_it_had_never_stopped() -> None:
    def fill(meter: Meter, values: list[float]) -> None:
        for value in values:
            meter.add(3, {"loss": torch.tensor(value)})
            meter.count({"stored": 3})

    whole, first, second = Meter(), Meter(), Meter()
    fill(whole, [0.1, 0.7, 0.3])
    fill(first, [0.1, 0.7])
    state = first.state()
    fill(first, [5.0])  # what is kept does not change any more
    second.restore(state, torch.device("cpu"))
    fill(second, [0.3])
    assert second.means() == whole.means()
    assert (second.counts, second.num_images) == (whole.counts, whole.num_images)


def test_state_of_a_meter_is_what_a_checkpoint_may_hold(tmp_path: Path) -> None:
    meter = Meter()
    meter.add(3, {"loss": torch.tensor(0.5)})
    meter.count({"stored": 3})
    torch.save(meter.state(), tmp_path / "state.pt")
    kept = torch.load(tmp_path / "state.pt", weights_only=True)
    assert kept == {"sums": {"loss": torch.tensor(1.5)}, "counts": {"stored": 3}, "images": 3}
