"""The statistics of a label set against plain float64 NumPy on its dense rows."""

from pathlib import Path

import numpy as np
import pytest
import torch

import label_sets
from mealv2.errors import LabelSetError
from mealv2.label_set import Encoding, Images, LabelSet
from mealv2.report.labels import compare_teachers, label_statistics
from mealv2.report.sample import LabelSample, sample_labels

NUM_IMAGES, NUM_VIEWS, NUM_CLASSES = 30, 5, 9
KEYS = [f"class {n % NUM_CLASSES}/{n}.jpg" for n in range(NUM_IMAGES)]
ENCODINGS = [
    Encoding(NUM_CLASSES, rate=1e-2),
    Encoding(NUM_CLASSES, topk=3),
    Encoding(NUM_CLASSES, "float16", topk=3),
    Encoding(NUM_CLASSES, "float32", topk=NUM_CLASSES, logits=True),
]


def images(hard_N: list[int]) -> Images:
    sizes_N2 = np.array([[40 + n, 30 + n] for n in range(len(hard_N))])
    return Images(sizes_N2, np.full(len(hard_N), 1000), np.array(hard_N))


def made(folder: Path, encoding: Encoding, **settings: object) -> label_sets.Made:
    hard = [n % NUM_CLASSES for n in range(NUM_IMAGES)]
    return label_sets.make_set(
        folder,
        encoding,
        KEYS,
        NUM_VIEWS,
        shard_size=7,
        images=images(hard),
        **settings,  # type: ignore[arg-type]
    )


def entropy(probs: np.ndarray) -> np.ndarray:
    return -np.where(probs > 0, probs * np.log(np.where(probs > 0, probs, 1)), 0).sum(axis=-1)


@pytest.mark.parametrize("encoding", ENCODINGS, ids=str)
def test_the_statistics_are_those_of_the_dense_rows(tmp_path: Path, encoding: Encoding) -> None:
    stored = made(tmp_path / "set", encoding)
    dense_NVC = stored.dense_NVC.astype(np.float64)
    sample = sample_labels(LabelSet.open(tmp_path / "set"))
    found = label_statistics(sample)
    assert sample.is_all
    assert sample.sizes_N2 is not None
    assert sample.sizes_N2[3].tolist() == [43, 33]
    hard_N = np.arange(NUM_IMAGES) % NUM_CLASSES
    hard_prob_NV = dense_NVC[np.arange(NUM_IMAGES), :, hard_N]
    # of equal ones the first of the record; those of dense rows have no ties
    best_NV = stored.rows.labels.argmax().numpy().reshape(NUM_IMAGES, NUM_VIEWS)
    assert (
        dense_NVC.max(axis=2) == np.take_along_axis(dense_NVC, best_NV[..., None], 2)[..., 0]
    ).all()
    contradicts_NV = best_NV != hard_N[:, None]
    by_rank = -np.sort(-dense_NVC, axis=2)
    near = {"rel": 1e-5, "abs": 1e-6}  # labels are float32
    assert found.num_views == NUM_IMAGES * NUM_VIEWS == found.num_labelled
    assert found.top1 == pytest.approx(dense_NVC.max(axis=2).mean(), **near)
    assert found.entropy == pytest.approx(entropy(dense_NVC).mean(), **near)
    assert found.hard_prob == pytest.approx(hard_prob_NV.mean(), **near)
    assert list(found.mass) == [1, 2, 3, 5]
    for k, mass in found.mass.items():
        assert mass == pytest.approx(by_rank[..., :k].sum(axis=2).mean(), **near)
    assert found.num_contradicting == contradicts_NV.sum() > 0
    per_image = contradicts_NV.sum(axis=1)
    counts = (per_image == 0).sum(), (per_image == NUM_VIEWS).sum()
    assert found.images_contradicting["none"] == counts[0]
    assert found.images_contradicting["all"] == counts[1]
    assert sum(found.images_contradicting.values()) == NUM_IMAGES
    mean_NC = dense_NVC.mean(axis=1)
    np.testing.assert_allclose(sample.mean_NC, mean_NC, rtol=1e-5, atol=1e-7)
    disagreement_N = entropy(mean_NC) - entropy(dense_NVC).mean(axis=1)
    np.testing.assert_allclose(sample.disagreement(), disagreement_N, atol=1e-5)
    assert found.mean_label_CC is not None
    for c, row in enumerate(found.classes):
        is_c = hard_N == c
        np.testing.assert_allclose(found.mean_label_CC[c], mean_NC[is_c].mean(axis=0), rtol=1e-5)
        assert row["images"] == is_c.sum()
        assert row["entropy"] == pytest.approx(entropy(dense_NVC[is_c]).mean(), **near)
        assert row["top1_probability"] == pytest.approx(dense_NVC[is_c].max(axis=2).mean(), **near)
        assert row["contradicting_percent"] == pytest.approx(100 * contradicts_NV[is_c].mean())
        assert row["hard_label_probability"] == pytest.approx(hard_prob_NV[is_c].mean(), **near)


def test_bytes_per_view_are_those_of_the_files(tmp_path: Path) -> None:
    encoding = ENCODINGS[0]
    rows = made(tmp_path / "set", encoding).rows
    blocks = encoding.blocks(rows, NUM_VIEWS)
    found = label_statistics(sample_labels(LabelSet.open(tmp_path / "set")))
    assert found.bytes == pytest.approx(sum(map(len, blocks)) / (NUM_IMAGES * NUM_VIEWS))


def test_a_sample_is_seeded_and_says_its_size(tmp_path: Path) -> None:
    dense_NVC = made(tmp_path / "set", ENCODINGS[0]).dense_NVC
    labels = LabelSet.open(tmp_path / "set")
    few = sample_labels(labels, max_views=20, seed=3)
    assert (len(few), len(few.views_V)) == (4, NUM_VIEWS)
    assert "4 images of 30, 5 views of 5" in few.size_text
    again, other = (sample_labels(labels, max_views=20, seed=seed) for seed in (3, 4))
    assert few.keys == again.keys != other.keys
    rows = [KEYS.index(key) for key in few.keys]
    np.testing.assert_allclose(few.top1_NV, dense_NVC[rows].max(axis=2), rtol=1e-5)
    assert sample_labels(labels).size_text == "all 30 images, 5 views each"


def test_images_without_added_views_or_hard_label(tmp_path: Path) -> None:
    stored = label_sets.make_set(
        tmp_path / "set", ENCODINGS[0], KEYS, 6, block_ends=(4, 6), first_block_only=KEYS[:2]
    )
    sample = sample_labels(LabelSet.open(tmp_path / "set"))
    found = label_statistics(sample)
    assert found.num_views == 6 * NUM_IMAGES - 4
    assert (found.num_labelled, found.hard_prob) == (0, None)
    assert found.mean_label_CC is not None
    assert np.isnan(found.mean_label_CC).all()
    means_C = stored.dense_NVC[0, :4].astype(np.float64).mean(axis=0)
    np.testing.assert_allclose(sample.mean_NC[0], means_C, rtol=1e-5, atol=1e-7)
    assert sample.best_NV[0].tolist()[4:] == [-1, -1]
    hard = dict.fromkeys(KEYS, 0)
    assert (sample_labels(LabelSet.open(tmp_path / "set"), hard=hard).hard_N == 0).all()


def test_teachers_are_compared_view_by_view(tmp_path: Path) -> None:
    sets = [made(tmp_path / str(n), ENCODINGS[n], seed=n) for n in range(3)]
    found = compare_teachers([LabelSet.open(each.folder) for each in sets])
    hard_NV = np.arange(NUM_IMAGES)[:, None] % NUM_CLASSES
    for a, one in enumerate(sets):
        p = one.dense_NVC.astype(np.float64)
        assert found.accuracy_T[a] == pytest.approx(100 * (p.argmax(2) == hard_NV).mean())
        for b, other in enumerate(sets):
            q = other.dense_NVC.astype(np.float64)
            agreement = 100 * (p.argmax(2) == q.argmax(2)).mean()
            assert found.agreement_TT[a, b] == pytest.approx(agreement)
            logs = np.log(np.maximum(p, 1e-12)) - np.log(np.maximum(q, 1e-12))
            assert found.kl_TT[a, b] == pytest.approx((p * logs).sum(2).mean(), abs=1e-6)
    assert found.agreement_TT[0, 1] < 100
    label_sets.make_set(tmp_path / "few", ENCODINGS[0], KEYS, 2)
    with pytest.raises(LabelSetError, match="other classes or views"):
        compare_teachers([LabelSet.open(path) for path in (sets[0].folder, tmp_path / "few")])


def test_the_memory_is_bounded_for_many_classes(tmp_path: Path) -> None:
    encoding = label_sets.ENCODINGS["many classes"]
    label_sets.make_set(tmp_path / "set", encoding, KEYS[:3], 1)
    sample = sample_labels(LabelSet.open(tmp_path / "set"))
    assert isinstance(sample, LabelSample)
    assert label_statistics(sample).mean_label_CC is None
    torch.testing.assert_close(torch.from_numpy(sample.mean_NC.sum(1)), torch.ones(3))
