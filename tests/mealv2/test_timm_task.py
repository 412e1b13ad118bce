"""mealv2.timm_task: the calls and tools of timm's loop train from a label set."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.task import resume_task_checkpoint
from timm.utils import dispatch_clip_grad
from torch.utils.data import DataLoader

from cases import mostly_slow
from mealv2.dataset import EpochBatchSampler, SoftLabelDataset, collate
from mealv2.models.discriminator import Discriminator
from mealv2.timm_task import SoftLabelTask


def loader_of(labels: Path, data_dir: Path, **settings: Any) -> DataLoader[Any]:
    dataset = SoftLabelDataset(labels, data_dir, **settings)
    sampler = EpochBatchSampler(dataset, 8)
    return DataLoader(dataset, batch_sampler=sampler, collate_fn=collate)


def train(
    task: SoftLabelTask,
    loader: DataLoader[Any],
    optimizer: Any,
    *,
    epochs: int,
    lr_scheduler: Any = None,
    clip_grad: float | None = None,
    grad_accum_steps: int = 1,
) -> list[float]:
    """Train with the calls of timm's train.py, in its order; return the mean loss of each epoch.

    The package timm does not contain that script.
    """
    losses, num_updates = list[float](), 0
    for epoch in range(epochs):
        loader.dataset.set_epoch(epoch)  # type: ignore[attr-defined]
        task.get_trainable_module().train()
        optimizer.zero_grad()
        of_epoch = list[float]()
        for index, (images, targets) in enumerate(loader):
            loss = task(images, targets)["loss"]
            of_epoch.append(loss.item())
            # as timm: the last update of an epoch may have fewer batches
            in_last = len(loader) - index <= len(loader) % grad_accum_steps
            accumulated = len(loader) % grad_accum_steps if in_last else grad_accum_steps
            (loss / accumulated).backward()
            if (index + 1) % grad_accum_steps and index + 1 < len(loader):
                continue
            if clip_grad is not None:
                dispatch_clip_grad(task.get_clip_parameters(), value=clip_grad)
            optimizer.step()
            optimizer.zero_grad()
            num_updates += 1
            task.update_ema(step=num_updates)
            if lr_scheduler is not None:
                lr_scheduler.step_update(num_updates=num_updates)
        losses.append(sum(of_epoch) / len(of_epoch))
    return losses


def seeded(make: Callable[[], Any]) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make()


@pytest.mark.parametrize("label", mostly_slow(["labels", "targets", "probs"]))
def test_the_calls_of_timms_loop_train_the_student_that_distill_trains(
    label: str,
    data_dir: Path,
    labels_of: Callable[..., Path],
    student_dir: Path,
    done: Callable[..., Any],
    distill_flags: list[str],
    run: Path,
) -> None:
    labels = labels_of("curve")
    flags = ("--labels", labels, "--discriminator", "off", "--lr", 0.05, "--decay-rate", 1)
    done(*distill_flags, *flags, "--output", run)
    model = timm.create_model("test_resnet", num_classes=3)
    start = safetensors.torch.load_file(student_dir / "model.safetensors")
    model.load_state_dict(start)
    task = SoftLabelTask(model)
    optimizer = create_optimizer_v2(
        task.get_trainable_module(), opt="momentum", lr=0.05, weight_decay=0.0
    )

    train(task, loader_of(labels, data_dir, label=label), optimizer, epochs=2)

    expected = safetensors.torch.load_file(run / "student" / "model.safetensors")
    for name, tensor in task.get_eval_model().state_dict().items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=1e-5, msg=name)
    assert any(not torch.allclose(expected[n], start[n], atol=1e-3) for n in start)


def test_timms_tools_serve_a_student_with_a_discriminator(
    data_dir: Path, labels_dir: Path, tmp_path: Path
) -> None:
    def make() -> SoftLabelTask:
        model = timm.create_model("test_vit", num_classes=3, img_size=32)
        return SoftLabelTask(model, Discriminator(3), discriminator_weight=0.5)

    task = seeded(make)
    optimizer = create_optimizer_v2(
        task.get_trainable_module(), opt="adamw", lr=1e-3, weight_decay=0.05, layer_decay=0.7
    )
    scheduler, _ = create_scheduler_v2(
        optimizer, sched="cosine", num_epochs=3, updates_per_epoch=5, step_on_epochs=False
    )
    task.setup_ema(decay=0.9)
    loader = loader_of(labels_dir, data_dir, label="targets")
    losses = train(
        task,
        loader,
        optimizer,
        epochs=3,
        lr_scheduler=scheduler,
        clip_grad=1.0,
        grad_accum_steps=2,
    )
    assert losses[-1] < losses[0]

    named = {id(p): name for name, p in task.get_trainable_module().named_parameters()}
    decay_of = {
        named[id(p)]: g["weight_decay"] for g in optimizer.param_groups for p in g["params"]
    }
    assert decay_of["student.backbone.pos_embed"] == 0.0, "the model's own no_weight_decay"
    assert decay_of["student.backbone.head.weight"] == 0.05
    scales = {named[id(p)]: g["lr_scale"] for g in optimizer.param_groups for p in g["params"]}
    assert (
        scales["student.backbone.patch_embed.proj.weight"] < scales["discriminator.layers.0.weight"]
    )
    assert set(named.values()) == set(decay_of)

    saved = {**task.get_checkpoint_state(), **task.get_checkpoint_state(ema=True), "epoch": 2}
    assert saved["state_dict"].keys() == timm.create_model("test_vit").state_dict().keys()
    assert not torch.equal(*(saved[n]["head.weight"] for n in ("state_dict", "state_dict_ema")))
    torch.save(saved, tmp_path / "last.pth.tar")
    again = make()
    resume_task_checkpoint(again, str(tmp_path / "last.pth.tar"))
    batch = next(iter(loader))
    task.eval(), again.eval()
    results = [each(*batch)["parts"]["discriminator_loss"] for each in (task, again)]
    assert torch.equal(*results)


def test_timms_evaluator_measures_the_student_on_normalised_images(
    data_dir: Path, labels_dir: Path
) -> None:
    task = SoftLabelTask(timm.create_model("test_resnet", num_classes=3)).eval()
    evaluator = task.create_evaluator()
    images, targets = next(iter(loader_of(labels_dir, data_dir, split="train", label="targets")))
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in ((0.5,) * 3, (0.5,) * 3))
    with torch.no_grad():
        output = task.get_eval_model()((images / 255 - mean) / std)
        assert torch.allclose(output, task(images, targets)["output"], atol=1e-5)
    evaluator.update(output, targets.classes_B)
    assert evaluator.num_samples == 8


def test_a_model_without_normalisation_needs_one() -> None:
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 4 * 4, 2))
    with pytest.raises(ValueError, match="give mean and std"):
        SoftLabelTask(model)
    task = SoftLabelTask(model, mean=(0.5,) * 3, std=(0.5,) * 3)
    probs = torch.tensor([[0.25, 0.75]])
    assert task(torch.zeros(1, 3, 4, 4, dtype=torch.uint8), probs)["loss"].isfinite()
