"""--log-weights: percentiles of a layer at the start and after every epoch, once each.

pipeline.training.run_log, mealv2.models.layers.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import torch

from conftest import Result
from mealv2.models.layers import PERCENTILES

Run = Callable[..., Result]
Events = Callable[[Path, str], list[dict[str, Any]]]


def expected(model_dir: Path, name: str) -> list[float]:
    """The percentiles of a saved tensor, from its sorted values."""
    weights = safetensors.numpy.load_file(model_dir / "model.safetensors")[name]
    ordered = np.sort(weights.astype(np.float64).ravel())
    found = []
    for percent in PERCENTILES:
        at = percent / 100 * (len(ordered) - 1)
        low = int(at)
        high = min(low + 1, len(ordered) - 1)
        found.append(float(ordered[low] + (at - low) * (ordered[high] - ordered[low])))
    return found


def test_start_and_every_epoch_are_logged_with_the_percentiles_of_the_saved_weights(
    done: Run, distill_flags: list[str], student_dir: Path, run: Path, events: Events
) -> None:
    layers = ["--log-weights", "layer2.0.conv1,auto", "--log-weights", "fc.bias"]
    done(*distill_flags, *layers, "--output", run)
    found = events(run, "weights")
    names = ["layer2.0.conv1", "layer2.0.conv2", "fc.bias"]
    assert [(e["epoch"], e["layer"]) for e in found] == [
        (n, name) for n in range(3) for name in names
    ]
    assert {tuple(e["percentiles"]) for e in found} == {PERCENTILES}
    first = {e["layer"]: e["values"] for e in found if e["epoch"] == 0}
    last = {e["layer"]: e["values"] for e in found if e["epoch"] == 2}
    for layer in names[:2]:
        assert first[layer] == pytest.approx(expected(student_dir, f"{layer}.weight"), rel=1e-12)
        assert last[layer] == pytest.approx(expected(run / "student", f"{layer}.weight"), rel=1e-12)
    assert last["fc.bias"] == pytest.approx(expected(run / "student", "fc.bias"), rel=1e-12)
    assert first["layer2.0.conv1"] != last["layer2.0.conv1"]


def test_a_resumed_run_has_every_epoch_once_and_the_same_bits(
    done: Run,
    finetune_flags: list[str],
    tmp_path: Path,
    events: Events,
    weights: Callable[[Path], dict[str, bytes]],
) -> None:
    plain, logged = tmp_path / "plain", tmp_path / "logged"
    flags = [*finetune_flags, "--recovery-interval", 2, "--checkpoint-hist", 9]
    done(*flags, "--output", plain)
    done(*flags, "--log-weights", "auto", "--output", logged)
    before = [(e["epoch"], e["values"]) for e in events(logged, "weights")]
    assert [epoch for epoch, _ in before] == [0, 1, 2]
    # 3 steps an epoch: from within epoch 2, and from within epoch 1
    for first_removed in (6, 3):
        for path in (logged / "checkpoints").iterdir():
            if int(path.stem.removeprefix("step-")) >= first_removed:
                path.unlink()
        (logged / "report.json").unlink()
        done("finetune", "--resume", logged)
        assert [(e["epoch"], e["values"]) for e in events(logged, "weights")] == before
        assert weights(logged) == weights(plain)


@pytest.mark.parametrize(
    ("layer", "hint"),
    [
        ("layer2.0.conv", "did you mean layer2.0.conv"),
        ("layer2", "did you mean layer2.0.conv1, "),
        ("blocks.7.mlp", "it has conv1.0, layer2.0.conv2, layer4.0.conv2, …"),
    ],
)
@pytest.mark.parametrize("flags", ["distill_flags", "finetune_flags"])
def test_an_unknown_layer_ends_in_one_line_with_names_near_it_and_writes_nothing(
    layer: str,
    hint: str,
    flags: str,
    request: pytest.FixtureRequest,
    run_cli: Run,
    run: Path,
) -> None:
    command = request.getfixturevalue(flags)
    result = run_cli(*command, "--log-weights", layer, "--output", run)
    assert result.code == 2
    (line,) = [line for line in result.stderr.splitlines() if "--log-weights" in line]
    assert f"--log-weights {layer}: the student has no weights of this name; {hint}" in line
    assert not run.exists()


def test_the_flag_may_be_added_when_a_run_is_resumed(
    done: Run, finetune_flags: list[str], run: Path, events: Events
) -> None:
    done(*finetune_flags, "--epochs", 1, "--output", run)
    done("finetune", "--resume", run, "--epochs", 2, "--log-weights", "conv1.0")
    assert [(e["epoch"], e["layer"]) for e in events(run, "weights")] == [(2, "conv1.0")]


def test_with_a_moving_average_the_weights_are_those_of_the_average(
    done: Run, finetune_flags: list[str], run: Path, events: Events
) -> None:
    done(*finetune_flags, "--model-ema", "--log-weights", "conv1.0", "--output", run)
    newest = max((run / "checkpoints").iterdir())
    average = torch.load(newest, weights_only=True)["state_dict_ema"]["conv1.0.weight"]
    median = float(np.median(average.double().numpy()))
    assert events(run, "weights")[-1]["values"][PERCENTILES.index(50)] == pytest.approx(median)
