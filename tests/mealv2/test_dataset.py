"""mealv2.dataset: the views and labels of `mealv2 distill`, in anyone's DataLoader."""

import pickle
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, default_collate

import mealv2
import stored
from cases import mostly_slow
from mealv2.data.folder import ImageFolder
from mealv2.data.pixels import centre_crop, decode
from mealv2.dataset import EpochBatchSampler, SoftLabelDataset, collate
from mealv2.errors import DataError, LabelSetError
from mealv2.losses import similarity_loss
from mealv2.soft_labels import EncodedLabels, SoftLabels
from mealv2.targets import BatchTargets, StoredLabels
from mealv2.task import DistillTask

# A batch as `mealv2 distill` sees it: pixels, probabilities, class ids.
Step = tuple[Tensor, Tensor, list[int]]


@pytest.fixture
def steps_of(
    done: Callable[..., Any], distill_flags: list[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., list[Step]]:
    """A function: the batches of a distillation with these flags."""

    def run(*flags: object) -> list[Step]:
        seen: list[Step] = []
        batch = StoredLabels.batch

        def recording(
            self: StoredLabels,
            positions: Sequence[int],
            views: Sequence[int],
            images: Tensor,
            *others: Any,
            step: int,
        ) -> BatchTargets:
            found = batch(self, positions, views, images, *others, step=step)
            seen.append((images.clone(), dense(found.soft_labels), found.classes_B.tolist()))
            return found

        with monkeypatch.context() as patch:
            patch.setattr(StoredLabels, "batch", recording)
            done(*distill_flags, *flags)
        return seen

    return run


def dense(labels: Any) -> Tensor:
    probs: Tensor = labels if isinstance(labels, Tensor) else labels.to_dense()
    return probs


def loaded(
    dataset: SoftLabelDataset, sampler: EpochBatchSampler, *epochs: int, **settings: Any
) -> Iterator[Any]:
    """Yield the batches of some epochs from one DataLoader."""
    loader = DataLoader(dataset, batch_sampler=sampler, collate_fn=collate, **settings)
    for epoch in epochs:
        sampler.set_epoch(epoch)
        yield from loader


def assert_same(batches: list[Any], steps: list[Step]) -> None:
    assert [tuple(images.shape) for images, _ in batches] == [tuple(s[0].shape) for s in steps]
    for (images, targets), (step_images, probs, classes) in zip(batches, steps, strict=True):
        assert torch.equal(images, step_images)
        assert torch.equal(dense(targets.soft_labels), probs)
        assert targets.classes_B.tolist() == classes


# --- the proof: what `mealv2 distill` sees -----------------------------------------------------


@pytest.mark.parametrize("context", mostly_slow(["fork", "spawn"]))
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_two_workers_give_the_views_and_labels_of_a_distillation_of_two_epochs(
    context: str,
    data_dir: Path,
    labels_of: Callable[..., Path],
    steps_of: Callable[..., list[Step]],
    run: Path,
) -> None:
    labels = labels_of("curve")
    steps = steps_of("--labels", labels, "--seed", 5, "--output", run)
    dataset = SoftLabelDataset(labels, data_dir, seed=5, label="targets")
    settings = {"num_workers": 2, "multiprocessing_context": context, "persistent_workers": True}

    batches = list(loaded(dataset, EpochBatchSampler(dataset, 8), 0, 1, **settings))

    assert len(steps) == 10
    assert_same(batches, steps)
    assert not torch.equal(steps[0][0], steps[5][0]), "the epochs differ"


@pytest.mark.parametrize("form", mostly_slow(["float16", "all"]))
def test_every_encoding_gives_the_labels_of_a_distillation(
    form: str,
    data_dir: Path,
    labels_of: Callable[..., Path],
    steps_of: Callable[..., list[Step]],
    run: Path,
) -> None:
    labels = labels_of(form)
    steps = steps_of("--labels", labels, "--epochs", 1, "--output", run)
    dataset = SoftLabelDataset(labels, data_dir, label="targets")
    assert_same(list(loaded(dataset, EpochBatchSampler(dataset, 8), 0)), steps)


def test_several_views_of_an_image_in_a_batch_and_a_shorter_last_pass(
    data_dir: Path, labels_dir: Path, steps_of: Callable[..., list[Step]], run: Path
) -> None:
    flags = ("--epochs", 3, "--views-per-image", 2, "--batch-size", 12, "--output", run)
    steps = steps_of(*flags)
    dataset = SoftLabelDataset(labels_dir, data_dir, label="targets")
    sampler = EpochBatchSampler(dataset, 12, views_per_image=2, epochs=3)
    batches = list(loaded(dataset, sampler, 0, 2))
    assert [len(images) for images, _ in batches] == [12] * 6 + [12] * 3
    assert_same(batches, steps)


def test_an_index_without_a_view_shows_the_view_of_the_epoch(
    data_dir: Path, labels_dir: Path
) -> None:
    dataset = SoftLabelDataset(labels_dir, data_dir, seed=3, label="probs")
    sampler = EpochBatchSampler(dataset, 36)
    for epoch in range(5):
        dataset.set_epoch(epoch)
        ((batch),) = list(sampler)
        for index, view in batch[:4]:
            assert view == dataset.view(index)
            for part, same in zip(dataset[index], dataset[index, view], strict=True):
                assert torch.equal(dense(part), dense(same))
    assert {dataset.view(0, epoch) for epoch in range(4)} == {0, 1, 2, 3}, "all before any repeats"


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_persistent_workers_follow_set_epoch_also_for_plain_indices(
    data_dir: Path, labels_dir: Path
) -> None:
    dataset = SoftLabelDataset(labels_dir, data_dir, label="probs")
    loader = DataLoader(
        dataset,
        batch_size=36,
        num_workers=1,
        persistent_workers=True,
        multiprocessing_context="fork",
    )
    for epoch in (0, 3, 1):
        dataset.set_epoch(epoch)
        ((images, _),) = loader
        assert torch.equal(images, default_collate([dataset[i] for i in range(36)])[0])


def test_ranks_read_the_rows_that_the_ranks_of_a_distillation_read(
    data_dir: Path, labels_dir: Path
) -> None:
    dataset = SoftLabelDataset(labels_dir, data_dir)
    full = list(EpochBatchSampler(dataset, 8))
    parts = [list(EpochBatchSampler(dataset, 8, rank=r, num_replicas=3)) for r in range(3)]
    assert [[*a, *b, *c] for a, b, c in zip(*parts, strict=True)] == full
    assert [len(part) for part in parts[0]] == [2, 2, 2, 2, 1]
    alone = [list(EpochBatchSampler(dataset, 8, rank=r, num_replicas=5)) for r in range(5)]
    assert {len(batches) for batches in alone} == {4}, "4 images in the last batch, 5 processes"
    assert len(EpochBatchSampler(dataset, 8, num_replicas=5)) == 4


# --- items, collate, loss ----------------------------------------------------------------------


def test_labels_stay_compressed_until_the_loss(
    data_dir: Path, labels_of: Callable[..., Path]
) -> None:
    for form, kind in (("curve", EncodedLabels), ("float16", SoftLabels), ("all", SoftLabels)):
        dataset = SoftLabelDataset(labels_of(form), data_dir)
        images, labels = collate(dataset.__getitems__([(3, 1), (5, 2), (0, 0)]))
        assert isinstance(labels, kind)
        logits = torch.randn(3, 3, generator=torch.Generator().manual_seed(0))
        expected = similarity_loss(logits, labels.to_dense())
        assert float(similarity_loss(logits, labels)) == pytest.approx(float(expected), rel=1e-6)
        assert images.shape == (3, 3, 32, 32)
        assert images.dtype == torch.uint8


def test_targets_hold_what_the_full_task_needs(
    data_dir: Path, labels_of: Callable[..., Path]
) -> None:
    labels = labels_of("curve", logits=True)
    dataset = SoftLabelDataset(labels, data_dir, label="targets")
    images, targets = collate([dataset[3, 1], dataset[20, 2]])
    assert isinstance(targets, BatchTargets)
    assert targets.kept_logits is not None
    assert targets.label_counts == {"labels_stored": 2}
    student = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 32 * 32, 3))
    task = DistillTask(student, mealv2.Discriminator(3), discriminator_input="logits")
    assert task(images.float() / 255, targets)["parts"]["discriminator_loss"].isfinite()


def test_transform_changes_the_pixels(data_dir: Path, labels_dir: Path) -> None:
    plain = SoftLabelDataset(labels_dir, data_dir, label="probs")
    changed = SoftLabelDataset(
        labels_dir, data_dir, label="probs", transform=lambda image: image.float() / 255
    )
    assert torch.equal(changed[4, 2][0], plain[4, 2][0].float() / 255)


def test_the_validation_split_has_centre_crops_and_classes(
    data_dir: Path, labels_dir: Path
) -> None:
    dataset = SoftLabelDataset(labels_dir, data_dir, split="val", label="targets")
    source = ImageFolder(data_dir, "val")
    images, targets = collate([dataset[i] for i in range(len(dataset))])
    assert isinstance(targets, BatchTargets)
    assert targets.classes_B is not None
    assert targets.classes_B.tolist() == list(source.labels)
    crop = centre_crop(decode(source.read(7)), 32)
    assert torch.equal(images[7], torch.from_numpy(crop).permute(2, 0, 1))


def test_images_without_labels_are_not_in_the_dataset(
    own_data: Path, precompute_flags: list[str], done: Callable[..., Any], tmp_path: Path
) -> None:
    bad = sorted(own_data.glob("train/*/*"))[2]
    bad.write_bytes(b"not an image")
    flags = ("--data-dir", own_data, "--on-bad-image", "skip", "--output", tmp_path / "labels")
    done(*precompute_flags, *flags)
    dataset = SoftLabelDataset(tmp_path / "labels", own_data, label="targets")
    assert len(dataset) == 35
    batches = list(EpochBatchSampler(dataset, 8))
    assert sorted(i for batch in batches for i, _ in batch) == list(range(35))
    assert dataset[2][1].classes_B.tolist() == [dataset.source.labels[3]]  # type: ignore[union-attr]


def test_the_held_out_split_and_the_unlabelled_pictures_of_the_set_are_found(
    data_dir: Path, precompute_flags: list[str], done: Callable[..., Any], tmp_path: Path
) -> None:
    classes, pool = tmp_path / "classes", tmp_path / "pool"
    shutil.copytree(data_dir / "train", classes)
    shutil.copytree(data_dir / "val" / "bees", pool)
    flags = ["--data-dir", classes, "--val-fraction", 0.25, "--extra-data", pool]
    done(*precompute_flags, *flags, "--output", tmp_path / "labels")
    dataset = SoftLabelDataset(tmp_path / "labels", classes, extra_data=[pool])
    assert (len(dataset), len(dataset.source)) == (27 + 5, 27 + 5)
    held_out = SoftLabelDataset(tmp_path / "labels", classes, split="val", extra_data=[pool])
    assert len(held_out) == 9
    assert not set(held_out.source.keys) & set(dataset.source.keys)


def test_any_image_source_serves(data_dir: Path, labels_dir: Path) -> None:
    dataset = SoftLabelDataset(labels_dir, ImageFolder(data_dir, "train"), label="probs")
    same = SoftLabelDataset(labels_dir, data_dir, label="probs")
    assert all(
        torch.equal(dense(a), dense(b)) for a, b in zip(dataset[1, 1], same[1, 1], strict=True)
    )


def test_pixels_of_another_version_are_noted(
    data_dir: Path, labels_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert SoftLabelDataset(labels_dir, data_dir).notes == []
    monkeypatch.setattr("mealv2.dataset.probe_sha256", lambda resize: "0" * 64)
    (note,) = SoftLabelDataset(labels_dir, data_dir).notes
    assert "up to 2 of 255" in note
    other = Path(shutil.copytree(labels_dir, tmp_path / "other"))
    stored.signed_again(other, lambda plan, splits: plan.update(operations_sha256="0" * 64))
    _, note = SoftLabelDataset(other, data_dir).notes
    assert "changed by another version of timm or Pillow" in note


def test_a_pickled_dataset_gives_the_same_items(data_dir: Path, labels_dir: Path) -> None:
    dataset = SoftLabelDataset(labels_dir, data_dir, label="probs", seed=2)
    item = dataset[6, 1]
    dataset.set_epoch(3)
    copy = pickle.loads(pickle.dumps(dataset))  # noqa: S301
    assert copy.epoch == 3
    assert all(torch.equal(dense(a), dense(b)) for a, b in zip(copy[6, 1], item, strict=True))


# --- what cannot be -----------------------------------------------------------------------------


def test_other_data_another_image_and_a_damaged_one_are_errors(
    own_data: Path, labels_dir: Path
) -> None:
    path = sorted(own_data.glob("train/*/*"))[4]
    original = path.read_bytes()
    path.write_bytes(original[:-1] + bytes([original[-1] ^ 1]))
    with pytest.raises(LabelSetError, match="not the picture that was labelled"):
        SoftLabelDataset(labels_dir, own_data)[4]
    SoftLabelDataset(labels_dir, own_data, check_images=False)[3]
    path.write_bytes(original[:20] + bytes(len(original) - 20))
    with pytest.raises(DataError, match="cannot read image"):
        SoftLabelDataset(labels_dir, own_data, check_images=False)[4]
    path.unlink()
    with pytest.raises(LabelSetError, match="made from other data"):
        SoftLabelDataset(labels_dir, own_data)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"views_per_image": 5}, "1..4"),
        ({"rank": 2, "num_replicas": 2}, "rank 2 of 2"),
        ({"views_per_image": 0}, "1..4"),
    ],
)
def test_batches_that_cannot_be_are_errors(
    data_dir: Path, labels_dir: Path, settings: dict[str, int], named: str
) -> None:
    dataset = SoftLabelDataset(labels_dir, data_dir)
    with pytest.raises(ValueError, match=named):
        EpochBatchSampler(dataset, 8, **settings)


# --- the public names ---------------------------------------------------------------------------


def test_every_public_name_is_there() -> None:
    assert set(mealv2.__all__) <= set(dir(mealv2))
    assert [name for name in mealv2.__all__ if not hasattr(mealv2, name)] == []
    assert mealv2.SoftLabelDataset is SoftLabelDataset


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'SoftLabels'"):
        mealv2.SoftLabels  # noqa: B018
