"""A vision transformer with AdamW, warmup, cosine and layer decay, beside timm's own loop."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
from timm.loss import SoftTargetCrossEntropy
from timm.models import model_parameters
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.task import ClassificationTask
from timm.utils import dispatch_clip_grad

from conftest import Result
from mealv2.task import DistillTask

Run = Callable[..., Result]
EPOCHS, UPDATES, BATCH_SIZE = 4, 6, 6
LR, WARMUP_LR, WEIGHT_DECAY, LAYER_DECAY, CLIP = 1e-3, 1e-4, 0.05, 0.75, 1.0

Batches = list[tuple[torch.Tensor, torch.Tensor]]


@pytest.fixture(scope="module")
def start(make_model: Callable[..., Path]) -> Path:
    return make_model("test_vit", seed=3)


@pytest.fixture(scope="module")
def flags(distill_flags: list[str], start: Path) -> list[object]:
    transformer = ["--model", "test_vit", "--initial-checkpoint", start, "--opt", "adamw"]
    transformer += ["--lr", LR, "--weight-decay", WEIGHT_DECAY, "--layer-decay", LAYER_DECAY]
    transformer += ["--sched", "cosine", "--warmup-epochs", 1, "--warmup-lr", WARMUP_LR]
    transformer += ["--sched-on-updates", "--clip-grad", CLIP, "--epochs", EPOCHS]
    transformer += ["--batch-size", BATCH_SIZE, "--val-split", "none", "--checkpoint-hist", "all"]
    return [*distill_flags, *transformer]


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> Batches:
    """The images and labels of every step, as the student gets them."""
    found: Batches = []
    forward = DistillTask.forward

    def recording(self: Any, images: torch.Tensor, targets: Any, **mixture: Any) -> Any:
        labels = targets.soft_labels.to_dense().clone()
        if mixture:
            lam, partner = mixture["mixture"]["lam"], mixture["mixture"]["partner"]
            labels = lam * labels + (1 - lam) * partner.soft_labels.to_dense()
        found.append((images.clone(), labels))
        return forward(self, images, targets, **mixture)

    monkeypatch.setattr(DistillTask, "forward", recording)
    return found


def losses_of_timm(start: Path, batches: Batches) -> tuple[list[float], list[float]]:
    """Train as timm's train.py does on these tensors; return the losses and rates of the steps."""
    model = timm.create_model("test_vit", num_classes=3, img_size=32)
    model.load_state_dict(safetensors.torch.load_file(start / "model.safetensors"))
    model = model.to(memory_format=torch.channels_last).train()
    task = ClassificationTask(model, SoftTargetCrossEntropy(), verbose=False)
    optimizer = create_optimizer_v2(
        model, "adamw", lr=LR, weight_decay=WEIGHT_DECAY, layer_decay=LAYER_DECAY
    )
    scheduler, _ = create_scheduler_v2(
        optimizer,
        "cosine",
        num_epochs=EPOCHS,
        warmup_epochs=1,
        warmup_lr=WARMUP_LR,
        step_on_epochs=False,
        updates_per_epoch=UPDATES,
    )
    mean, std = (torch.tensor(model.pretrained_cfg[n]).view(1, 3, 1, 1) for n in ("mean", "std"))
    losses, rates = [], []
    for number, (images, labels) in enumerate(batches, start=1):
        rates.append(max(group["lr"] for group in optimizer.param_groups))
        loss = task((images.float() / 255 - mean) / std, labels)["loss"]
        optimizer.zero_grad()
        loss.backward()
        dispatch_clip_grad(model_parameters(model), CLIP, mode="norm")
        optimizer.step()
        scheduler.step_update(num_updates=number)
        losses.append(loss.item())
    return losses, rates


@pytest.mark.parametrize("mixing", [[], ["--mixup", 0.4, "--cutmix", 1]])
def test_first_steps_are_those_of_timms_own_loop(
    done: Run,
    flags: list[object],
    start: Path,
    run: Path,
    batches: Batches,
    events: Callable[[Path, str], list[dict[str, Any]]],
    mixing: list[object],
) -> None:
    done(*flags, *mixing, "--discriminator", "off", "--output", run)
    found = events(run, "train")
    losses, rates = losses_of_timm(start, batches)
    assert len(found) == EPOCHS * UPDATES > 20
    assert [event["lr"] for event in found] == rates
    assert [event["loss"] for event in found[:20]] == pytest.approx(losses[:20], rel=1e-5)
    assert mixing or losses[20] < 0.9 * losses[0]


def test_a_transformer_resumes_to_the_bit(
    done: Run,
    flags: list[object],
    run: Path,
    tmp_path: Path,
    weights: Callable[[Path], dict[str, bytes]],
) -> None:
    flags = [*flags, "--drop", 0.1, "--drop-path", 0.1, "--model-ema", "--mixup", 0.4]
    done(*flags, "--epochs", 2, "--recovery-interval", 4, "--output", run)
    killed = tmp_path / "killed"
    shutil.copytree(run, killed)
    (killed / "report.json").unlink()
    kept = sorted((killed / "checkpoints").iterdir())
    assert [path.stem[-2:] for path in kept] == ["04", "06", "08", "12"]
    for path in kept[1:]:
        path.unlink()
    done("distill", "--resume", killed)
    assert weights(killed) == weights(run)
    assert (killed / "summary.csv").read_text() == (run / "summary.csv").read_text()
    ends = [max((folder / "checkpoints").iterdir()) for folder in (run, killed)]
    one, other = (torch.load(end, weights_only=True)["optimizer"]["state"] for end in ends)
    assert one.keys() == other.keys()
    for key, kept_state in one.items():
        assert all(torch.equal(value, other[key][name]) for name, value in kept_state.items())
