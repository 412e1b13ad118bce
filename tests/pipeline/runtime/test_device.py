"""pipeline.runtime.device: device, precision, versions, and the flag that a signal sets."""

import importlib.metadata
import os
import signal
import threading
from pathlib import Path

import pytest
import torch

from mealv2.errors import ConfigError
from mealv2.runtime import library_versions
from pipeline.config import EvaluateConfig
from pipeline.runtime.device import create_runtime
from pipeline.runtime.seeds import seed_everything
from pipeline.runtime.signals import StopRequested, stop_on_signal


def config(**values: object) -> EvaluateConfig:
    return EvaluateConfig(**{"data_dir": Path("d"), "model": "m"} | values)  # type: ignore[arg-type]


def test_without_amp_networks_compute_in_float32() -> None:
    runtime = create_runtime(config(device="cpu"))
    with runtime.autocast():
        product = torch.ones(2, 2) @ torch.ones(2, 2)
    assert product.dtype == torch.float32
    assert (runtime.device.type, runtime.precision) == ("cpu", "float32")


def test_amp_computes_in_bfloat16_and_says_so() -> None:
    runtime = create_runtime(config(device="cpu", amp=True))
    with runtime.autocast():
        product = torch.ones(2, 2) @ torch.ones(2, 2)
    assert product.dtype == torch.bfloat16
    assert runtime.precision == "bfloat16"


def test_a_network_is_channels_last_also_beside_tensors_of_five_dimensions() -> None:
    network = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3), torch.nn.Conv2d(4, 4, 1), torch.nn.Conv3d(3, 4, 3)
    )
    before = [tensor.clone() for tensor in network.parameters()]
    moved = create_runtime(config(device="cpu")).to_device(network)
    assert moved is network
    assert network[0].weight.stride() == (27, 1, 9, 3)
    assert network[1].weight.stride() == (4, 1, 4, 4)  # as Module.to gives; contiguous() does not
    assert network[2].weight.is_contiguous()
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), before, strict=True))


def test_convolutions_that_onednn_computes_wrong_in_channels_last_get_the_plain_layout() -> None:
    """Strides are all that tells the layouts of a 1 x 1 kernel apart; oneDNN goes by them."""
    concerned, other = torch.nn.Conv2d(3, 8, 1, stride=2), torch.nn.Conv2d(8, 4, 1, stride=2)
    seen: list[tuple[int, ...]] = []
    network = create_runtime(config(device="cpu")).to_device(torch.nn.Sequential(concerned, other))
    concerned.register_forward_hook(lambda module, images, _: seen.append(images[0].stride()))
    images_BCHW = torch.randn(2, 3, 64, 64).to(memory_format=torch.channels_last)
    network(images_BCHW).sum().backward()
    assert seen == [(3 * 64 * 64, 64 * 64, 64, 1)]
    assert concerned.weight.stride() == (3, 1, 1, 1)
    assert other.weight.stride() == (8, 1, 8, 8)

    kernel_OC, bias = concerned.weight.detach().double()[:, :, 0, 0], concerned.bias
    assert bias is not None
    expected = torch.einsum("oc,bchw->bohw", kernel_OC, images_BCHW[:, :, ::2, ::2].double())
    expected += bias.detach().double()[:, None, None]
    torch.testing.assert_close(concerned(images_BCHW).double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("device", ["cuda:99", "mps"])
def test_device_that_is_not_there_is_refused_by_name(device: str) -> None:
    if device == "mps" and torch.backends.mps.is_available():
        pytest.skip("this machine has it")
    with pytest.raises(ConfigError, match=f"--device {device}: not on this machine") as caught:
        create_runtime(config(device=device))
    assert "\n" not in str(caught.value)


def test_a_word_that_is_not_a_device_is_refused_by_the_config() -> None:
    with pytest.raises(ConfigError, match="--device banana"):
        config(device="banana")


def test_float16_is_refused_on_the_cpu() -> None:
    with pytest.raises(ConfigError, match="--amp-dtype float16"):
        create_runtime(config(device="cpu", amp=True, amp_dtype="float16"))


def test_versions_are_those_installed() -> None:
    versions = library_versions()
    for package in ("torch", "torchvision", "timm", "pillow", "numpy", "h5py"):
        installed = importlib.metadata.version(package)
        assert versions[package].split("+")[0] == installed.split("+")[0]
    assert {"mealv2", "python"} < versions.keys()


def test_equal_seeds_give_equal_new_weights() -> None:
    with torch.random.fork_rng():
        drawn = []
        for seed in (1, 1, 2):
            seed_everything(seed)
            drawn.append(torch.nn.Linear(3, 3).weight.detach().clone())
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


# --- signals: real ones, sent to this process ---------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_at_the_next_check_and_not_before(
    number: signal.Signals, capfd: pytest.CaptureFixture[str]
) -> None:
    with stop_on_signal(signal.SIGINT, signal.SIGTERM) as stop:
        stop.check()
        os.kill(os.getpid(), number)
        with pytest.raises(StopRequested, match=number.name):
            stop.check()
    assert "a second signal quits at once" in capfd.readouterr().err


def test_handlers_are_put_back() -> None:
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.getsignal(number) for number in numbers]
    with stop_on_signal(signal.SIGINT, signal.SIGTERM):
        assert [signal.getsignal(number) for number in numbers] != before
    assert [signal.getsignal(number) for number in numbers] == before


def test_outside_the_main_thread_handlers_are_left_alone() -> None:
    before = signal.getsignal(signal.SIGINT)
    seen: list[object] = []

    def body() -> None:
        with stop_on_signal(signal.SIGINT, signal.SIGTERM) as stop:
            stop.check()
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    assert seen == [before]
