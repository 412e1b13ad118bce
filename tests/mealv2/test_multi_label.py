"""mealv2.multi_label: sigmoid loss and mAP against float64 NumPy; ignored labels change nothing."""

import numpy as np
import pytest
import torch
from torch import nn

from mealv2.average_precision import average_precision, average_precision_11_points
from mealv2.data.folder import UnorderedSource
from mealv2.errors import ConfigError
from mealv2.multi_label import (
    MultiLabelEvaluation,
    MultiLabels,
    MultiLabelTask,
    labels_of,
    multi_label_loss,
)
from mealv2.targets import BatchTargets


def drawn(num: int = 12, num_classes: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    rng = np.random.default_rng(3)
    logits = torch.tensor(rng.normal(size=(num, num_classes)), dtype=torch.float32)
    labels = torch.tensor(rng.integers(-1, 2, size=(num, num_classes)), dtype=torch.int8)
    return logits, labels


def test_the_loss_is_that_of_the_formula() -> None:
    logits, labels = drawn()
    s, y = logits.numpy().astype(np.float64), labels.numpy()
    p = 1 / (1 + np.exp(-s))
    terms = np.where(y == 1, -np.log(p), -np.log(1 - p)) * (y != 0)
    assert float(multi_label_loss(logits, labels)) == pytest.approx(terms.sum() / y.size, rel=1e-6)


def test_gradients_of_parts_add_up_to_that_of_the_batch() -> None:
    logits, labels = drawn()
    found = []
    for cuts in ([slice(0, 12)], [slice(0, 5), slice(5, 12)]):
        leaf = logits.clone().requires_grad_()
        for cut in cuts:
            (multi_label_loss(leaf[cut], labels[cut]) * len(labels[cut]) / 12).backward()
        found.append(leaf.grad)
    assert torch.allclose(found[0], found[1], atol=1e-8)
    assert bool((found[0][labels == 0] == 0).all())


def test_the_task_mixes_the_losses_of_both_images() -> None:
    logits, labels = drawn()
    targets, partner = (
        BatchTargets(multi_labels_BC=labels),
        BatchTargets(multi_labels_BC=labels.flip(0)),
    )
    task = MultiLabelTask(nn.Identity())
    mixed = task(logits, targets, {"partner": partner, "lam": 0.3})["loss"]
    parts = [multi_label_loss(logits, rows) for rows in (labels, labels.flip(0))]
    assert float(mixed) == pytest.approx(0.3 * float(parts[0]) + 0.7 * float(parts[1]))


def test_targets_are_the_rows_of_their_images_and_move_together() -> None:
    _, labels = drawn()
    targets = MultiLabels(labels, num_views=2, seed=0)
    batch = targets.batch([3, 1], [0, 0], torch.empty(2, 0))
    assert torch.equal(batch.multi_labels_BC, labels[[3, 1]])
    turned = batch.rows(torch.tensor([1, 0])).to(torch.device("cpu"))
    assert torch.equal(turned.multi_labels_BC, labels[[1, 3]])
    assert {targets.view("a", epoch) for epoch in range(2)} == {0, 1}


def test_the_mean_is_over_classes_with_a_positive_image_in_any_order_of_batches() -> None:
    logits, labels = drawn()
    labels[:, 2] = -1
    found = MultiLabelEvaluation(4)
    for cut in (slice(0, 7), slice(7, 12)):
        found.add(logits[cut], labels[cut])
    kept = [0, 1, 3]
    for name, form in (("map", average_precision), ("map_11point", average_precision_11_points)):
        each = [form(logits[:, c], labels[:, c]) for c in kept]
        assert found.summary()[name] == pytest.approx(100 * np.mean(each))
    assert found.summary()["num_images"] == 12
    row = found.per_class()[2]
    assert (row["present"], row["ap"], row["ap_11point"]) == (0, None, None)
    assert found.per_class()[0]["ignored"] == int((labels[:, 0] == 0).sum())


class Source(UnorderedSource):
    """Two images of two classes."""

    def __init__(self) -> None:
        self.name, self.split = "drawn", "train"
        self.keys, self.labels, self.classes = ["a", "b"], [0, 1], ["x", "y"]
        self.sizes = self.stored_sizes = [1, 1]

    def __len__(self) -> int:
        return 2

    def read(self, position: int) -> bytes:
        raise AssertionError


def test_labels_of_a_source_are_checked() -> None:
    assert labels_of(Source(), [[1, 0], [-1, 1]]).tolist() == [[1, 0], [-1, 1]]
    with pytest.raises(ConfigError, match="other than 1, 0 and -1"):
        labels_of(Source(), [[1, 2], [0, 0]])
    with pytest.raises(ConfigError, match=r"multi_labels of \(1, 2\)"):
        labels_of(Source(), [[1, 0]])
