"""mealv2.targets: which view an epoch uses, and who answers for it."""

from pathlib import Path

import numpy as np
import pytest
import torch

from mealv2.errors import LabelSetError
from mealv2.files import json_sha256
from mealv2.label_set import (
    FORMAT,
    FORMAT_VERSION,
    LabelSet,
    Shard,
    claim,
    describe_file,
    shard_name,
    write_manifest,
    write_shard,
)
from mealv2.targets import HardLabels, StoredLabels
from mealv2.views import scheduled_view

KEYS = ["ant/1.png", "bee/1.png", "猫/1.png"]
NUM_VIEWS, NUM_CLASSES, K = 5, 6, 2
NONE = torch.empty(0)  # no pixels: nobody looks at them


def indices_of(key: str, view: int) -> list[int]:
    """Classes that name the row: the image and its view."""
    return [KEYS.index(key), (KEYS.index(key) + 1 + view) % NUM_CLASSES]


@pytest.fixture(scope="module")
def label_set(tmp_path_factory) -> LabelSet:
    folder: Path = tmp_path_factory.mktemp("labels")
    plan = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "classes": [str(n) for n in range(NUM_CLASSES)],
        "img_size": 32,
        "topk": K,
        "roles": {"train": {"num_views": NUM_VIEWS}},
    }
    claim(folder, plan)
    indices = np.array([[indices_of(k, v) for v in range(NUM_VIEWS)] for k in KEYS], dtype="<u2")
    probs = np.broadcast_to(np.array([0.75, 0.125], dtype="<f2"), indices.shape).copy()
    rest = np.full(indices.shape[:2], 0.125, dtype="<f2")
    path = folder / shard_name("train", 0)
    write_shard(path, Shard(json_sha256(plan), "train", 0, KEYS, probs, indices, rest))
    listed = [describe_file(path, num_images=len(KEYS))]
    write_manifest(folder, plan, roles={"train": {"shards": listed, "skipped": {"x": "empty"}}})
    return LabelSet.open(folder)


def test_stored_labels_use_the_schedule_of_the_views_the_set_holds(label_set):
    targets = StoredLabels(label_set, KEYS, seed=9)
    for key in KEYS:
        used = [targets.view(key, epoch) for epoch in range(3 * NUM_VIEWS)]
        assert used == [
            scheduled_view(key, epoch, seed=9, num_views=NUM_VIEWS) for epoch in range(15)
        ]
        for start in range(0, 15, NUM_VIEWS):
            assert sorted(used[start : start + NUM_VIEWS]) == list(range(NUM_VIEWS))


def test_stored_labels_answer_for_positions_of_the_source_and_not_of_the_set(label_set):
    source_keys = ["x", "猫/1.png", "ant/1.png", "bee/1.png"]  # another order, one without labels
    answer = StoredLabels(label_set, source_keys, seed=0).answer([1, 3, 1, 2], [0, 4, 2, 1], NONE)
    assert answer.sources == {"labels_stored": 4}
    answer = answer.soft
    expected = [("猫/1.png", 0), ("bee/1.png", 4), ("猫/1.png", 2), ("ant/1.png", 1)]
    assert answer.indices_NK.dtype == torch.int64
    assert answer.indices_NK.tolist() == [indices_of(*place) for place in expected]
    assert answer.probs_NK.dtype == torch.float32
    assert answer.probs_NK.tolist() == [[0.75, 0.125]] * 4
    assert answer.rest_N.tolist() == [0.125] * 4
    assert answer.num_classes == NUM_CLASSES
    assert float(answer.dense()[0].sum()) == pytest.approx(1.0)


def test_stored_labels_refuse_an_image_or_a_view_without_label(label_set):
    targets = StoredLabels(label_set, ["x", *KEYS], seed=0)
    with pytest.raises(LabelSetError, match="it was skipped: empty"):
        targets.answer([0], [0], NONE)
    with pytest.raises(LabelSetError, match=f"no view {NUM_VIEWS}"):
        targets.answer([1], [NUM_VIEWS], NONE)


def test_hard_labels_answer_with_class_ids_whatever_the_view():
    targets = HardLabels([2, 0, 1])
    answer = targets.answer([2, 0, 0], [5, 6, 7], NONE).classes_B
    assert answer.dtype == torch.int64
    assert answer.tolist() == [1, 2, 2]


def test_hard_labels_use_a_fresh_view_every_epoch():
    targets = HardLabels([0])
    assert [targets.view("a.png", epoch) for epoch in range(100)] == list(range(100))


def test_hard_labels_use_the_views_of_a_label_set_where_told_how_many_it_holds(label_set):
    stored = StoredLabels(label_set, KEYS, seed=9)
    hard = HardLabels([0, 1, 2], num_views=NUM_VIEWS, seed=9)
    for key in KEYS:
        assert [hard.view(key, e) for e in range(15)] == [stored.view(key, e) for e in range(15)]
