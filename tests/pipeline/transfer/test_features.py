"""Cached features: the run of a frozen backbone without them, to the bit, with one pass only."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from conftest import Result
from mealv2.models.frozen import FrozenClassifier
from pipeline.transfer import frozen as frozen_module

Run = Callable[..., Result]
Events = Callable[[Path, str], list[dict[str, Any]]]
Weights = Callable[[Path], dict[str, bytes]]

CENTRE = ["--crop", "center", "--hflip", 0]


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of images of every pass through a frozen backbone."""
    found: list[int] = []
    features = FrozenClassifier.features

    def counting(self: FrozenClassifier, images_BCHW: torch.Tensor) -> torch.Tensor:
        found.append(len(images_BCHW))
        return features(self, images_BCHW)

    monkeypatch.setattr(FrozenClassifier, "features", counting)
    return found


@pytest.mark.parametrize("views", [CENTRE, ["--num-views", 2]], ids=["one view", "stored views"])
def test_a_cached_run_is_the_slow_run_to_the_bit(
    done: Run,
    transfer_flags: list[str],
    start: list[str],
    tmp_path: Path,
    weights: Weights,
    events: Events,
    passes: list[int],
    views: list[Any],
) -> None:
    words = [*transfer_flags, "--mode", "frozen", *start, *views, "--epochs", 4]
    seen = {}
    for cache in ("auto", "off"):
        passes.clear()
        done(*words, "--cache-features", cache, "--output", tmp_path / cache)
        seen[cache] = sum(passes)
    num_views = 1 if views is CENTRE else 2
    assert seen == {"auto": 36 * num_views + 15, "off": 4 * 36 + 5 * 15}
    assert weights(tmp_path / "auto") == weights(tmp_path / "off")
    losses = {
        cache: [event["loss"] for event in events(tmp_path / cache, "train")] for cache in seen
    }
    assert losses["auto"] == losses["off"]
    found = {cache: events(tmp_path / cache, "validation") for cache in seen}
    figures = {c: [e["cross_entropy"] for e in found[c]] for c in seen}
    assert figures["auto"] == figures["off"]


def test_features_too_large_for_memory_are_computed_in_every_epoch(
    done: Run,
    transfer_flags: list[str],
    start: list[str],
    run: Path,
    passes: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(frozen_module, "free_memory", lambda: 1000)
    words = [*transfer_flags, "--mode", "frozen", *start, "--epochs", 1]
    assert "fewer --num-views need less" in done(*words, "--output", run).stderr
    assert sum(passes) == 36 + 2 * 15


@pytest.mark.parametrize("split", ["train", "val"])
def test_an_image_that_cannot_be_read_stops_or_is_skipped_in_every_epoch(
    run_cli: Run,
    done: Run,
    transfer_flags: list[str],
    start: list[str],
    own_data: Path,
    tmp_path: Path,
    split: str,
) -> None:
    bad = own_data / split / "cats" / "01.jpg"
    bad.write_bytes(bad.read_bytes()[:200])
    words = [*transfer_flags, "--data-dir", own_data, "--mode", "frozen", *start]
    result = run_cli(*words, "--output", tmp_path / "stopped")
    assert result.code == 1
    assert str(bad) in result.stderr.splitlines()[-1]
    skipping = ["--on-bad-image", "skip", "--output", tmp_path / "skipped"]
    result = done(*words, *skipping)
    assert result.report["num_images"] == (14 if split == "val" else 15)
    assert ("skipped 1" in result.stderr) is (split == "train")


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ("--mode fine-tune --cache-features off", "--cache-features has no effect"),
        ("--mode frozen --cutmix 1", "--cutmix has no effect with cached features"),
        ("--mode frozen --mixup 1", "add --cache-features off"),
    ],
)
def test_a_wrong_flag_is_one_line(
    run_cli: Run, transfer_flags: list[str], run: Path, words: str, named: str
) -> None:
    result = run_cli(*transfer_flags, *words.split(), "--output", run)
    assert result.code == 2
    assert named in result.stderr


def test_features_on_disk_serve_other_seeds_and_nothing_else(
    done: Run,
    transfer_flags: list[str],
    start: list[str],
    tmp_path: Path,
    passes: list[int],
    weights: Weights,
) -> None:
    words = [*transfer_flags, "--mode", "frozen", *start, "--num-views", 2, "--epochs", 1]
    kept = ["--feature-dir", tmp_path / "features"]
    for number, (flags, seen) in enumerate(
        [
            ([], 36 * 2 + 15),
            (["--seed", 1], 0),
            (["--smoothing", 0.1], 0),
            (["--view-seed", 1], 36 * 2),  # the centre crops are the same
            (["--crop", "pad"], 36 * 2),
            (["--mean", 0.1, 0.2, 0.3, "--std", 0.5, 0.5, 0.5], 36 * 2 + 15),
        ]
    ):
        passes.clear()
        done(*words, *flags, *kept, "--output", tmp_path / str(number))
        assert sum(passes) == seen, flags
    done(*words, "--seed", 1, "--output", tmp_path / "memory")
    assert weights(tmp_path / "memory") == weights(tmp_path / "1")


def test_another_picture_of_the_same_size_has_other_features(
    done: Run,
    transfer_flags: list[str],
    start: list[str],
    own_data: Path,
    run: Path,
    passes: list[int],
) -> None:
    words = [*transfer_flags, "--mode", "frozen", *start, "--num-views", 1, "--epochs", 1]
    words += ["--data-dir", own_data, "--feature-dir", run.parent / "features"]
    done(*words, "--output", run / "before")
    picture = next((own_data / "train" / "ants").glob("*.png"))
    with Image.open(picture) as image:
        stored = [image.copy(), image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)]
    for pixels, seen in ((stored[0], 36), (stored[1], 36), (stored[0], 0)):
        # a BMP has the same size whatever its pixels are
        pixels.save(picture, format="BMP")
        passes.clear()
        done(*words, "--output", run / f"{seen} {len(list(run.iterdir()))}")
        assert sum(passes) == seen
    # file names and the times of files are no content
    picture.touch()
    passes.clear()
    done(*words, "--output", run / "touched")
    assert sum(passes) == 0


def test_damaged_features_on_disk_are_an_error(
    done: Run,
    run_cli: Run,
    transfer_flags: list[str],
    start: list[str],
    tmp_path: Path,
    flipped_bit: Callable[..., None],
) -> None:
    words = [*transfer_flags, "--mode", "frozen", *start, "--num-views", 1, "--epochs", 1]
    kept = ["--feature-dir", tmp_path / "features"]
    done(*words, *kept, "--output", tmp_path / "one")
    for path in (tmp_path / "features").glob("*.npy"):
        flipped_bit(path)
    result = run_cli(*words, *kept, "--output", tmp_path / "two")
    assert result.code == 1
    assert "is damaged: its hash differs" in result.stderr.splitlines()[-1]


def test_a_resumed_run_may_cache_features_or_not(
    done: Run,
    transfer_flags: list[str],
    start: list[str],
    tmp_path: Path,
    weights: Weights,
) -> None:
    words = [*transfer_flags, "--mode", "frozen", *start, "--num-views", 2, "--sched", "constant"]
    done(*words, "--epochs", 2, "--output", tmp_path / "whole")
    done(*words, "--epochs", 1, "--output", tmp_path / "parts")
    run = tmp_path / "parts"
    done("transfer", "--resume", run, "--epochs", 2, "--cache-features", "off")
    assert weights(run) == weights(tmp_path / "whole")


def test_a_run_continues_in_the_middle_of_an_epoch_with_the_same_bits(
    done: Run,
    transfer_flags: list[str],
    start: list[str],
    tmp_path: Path,
    weights: Weights,
) -> None:
    run = tmp_path / "run"
    words = [*transfer_flags, "--mode", "frozen", *start, "--num-views", 2]
    done(*words, "--recovery-interval", 1, "--checkpoint-hist", "all", "--output", run)
    whole = weights(run)
    for path in run.glob("checkpoints/step-*.pt"):
        if path.stem > "step-00000004":  # of 6 steps, 3 an epoch
            path.unlink()
    (run / "report.json").unlink()
    done("transfer", "--resume", run)
    assert weights(run) == whole
