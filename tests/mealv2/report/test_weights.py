"""Weights for figures: where a start's are, what a run logged, histograms of odd arrays."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import torch.hub
from huggingface_hub import constants
from written_runs import write_run

from mealv2.errors import ConfigError
from mealv2.report.run import Run, open_run
from mealv2.report.weights import (
    Line,
    bin_edges,
    histogram_figure,
    logged_percentiles,
    percent_in_bins,
    percentile_figure,
    read_layers,
    start_file,
)


def run_of(folder: Path, **settings: object) -> Run:
    return open_run(write_run(folder, settings=settings))


def test_a_start_is_a_checkpoint_or_in_a_cache_and_never_downloaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "torch"))
    snapshot = tmp_path / "hub/models--timm--test_resnet.r160_in1k/snapshots" / ("0" * 40)
    own, hub = tmp_path / "start.safetensors", snapshot / "model.safetensors"
    released = tmp_path / "torch/checkpoints/MEALV2_EfficientNet_B0_224.pth"
    name = "test_resnet.r160_in1k"
    run = run_of(tmp_path / "a", model=name)
    with pytest.raises(ConfigError, match=f"its weights, {name}, are not in a cache"):
        start_file(run)
    for path in (own, hub, released):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    refs = snapshot.parent.parent / "refs"
    refs.mkdir()
    (refs / "main").write_text("0" * 40)
    assert start_file(run) == hub
    assert start_file(run_of(tmp_path / "b", initial_checkpoint=str(own))) == own
    assert start_file(run_of(tmp_path / "c", model=f"{name}={own}")) == own
    assert start_file(run_of(tmp_path / "d", model="mealv2_efficientnet_b0")) == released
    for number, settings in enumerate(({"pretrained": False}, {"mode": "scratch"})):
        with pytest.raises(ConfigError, match="it started from random weights"):
            start_file(run_of(tmp_path / f"e{number}", **settings))


def test_an_epoch_that_ran_again_counts_once_and_other_events_do_not(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run")
    with (path / "metrics.jsonl").open("a") as file:
        for epoch, value in ((1, 5.0), (0, 1.0), (1, 2.0)):
            event = {"event": "weights", "epoch": epoch, "layer": "a"}
            file.write(json.dumps({**event, "percentiles": [50], "values": [value]}) + "\n")
        file.write(json.dumps({"event": "prepared", "step": 1, "text": '"weights"'}) + "\n")
        file.write('{"event": "weights", "epoch": 2, "layer"')  # a training writes it now
    found = logged_percentiles(open_run(path))
    assert found == {"a": {0: {50: 1.0}, 1: {50: 2.0}}}
    figure = percentile_figure("p", "t", [(Line("<b>", 0), found["a"])])
    assert figure.data == [
        {"model": "<b>", "epoch": 0, "p50": 1.0},
        {"model": "<b>", "epoch": 1, "p50": 2.0},
    ]
    assert "<b>, epoch 0 to 1: percentiles 50th from 1 to 2" in figure.alt


def test_weights_that_are_all_equal_have_a_histogram() -> None:
    figure = histogram_figure("h", "t", [(Line("a", 0), np.zeros((3, 3)))])
    assert math.fsum(row["percent"] for row in figure.data) == pytest.approx(100.0)


def test_weights_outside_of_the_bins_count_in_the_whole() -> None:
    values = np.append(np.linspace(-1, 1, 9999), 1e6)
    edges = bin_edges([values])
    assert edges[-1] < 1.1
    outside = int(((values < edges[0]) | (values > edges[-1])).sum())
    assert percent_in_bins(values, edges).sum() == pytest.approx(100 * (1 - outside / values.size))
    assert 0 < outside < 30


def test_layers_that_a_file_does_not_have_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    safetensors.numpy.save_file({"a.weight": np.ones((2, 2), np.float16)}, path)
    found = read_layers(path, ["a", "b"])
    assert list(found) == ["a"]
    assert found["a"].dtype == np.float64


def test_layers_are_in_the_order_of_the_model_not_of_their_names(
    make_model: Callable[..., Path],
) -> None:
    # by name, conv_stem is the last convolution
    found = list(read_layers(make_model("test_efficientnet")))
    assert found == ["conv_stem", "blocks.3.0.conv_pw", "conv_head"]
