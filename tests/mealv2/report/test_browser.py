"""The records of the label browser: what they choose; their numbers are those of the set."""

from pathlib import Path

import numpy as np
import pytest

import label_sets
from mealv2.errors import LabelSetError
from mealv2.label_set import Encoding, Images, LabelSet
from mealv2.report import browser
from mealv2.report.label_errors import find_label_errors
from mealv2.report.sample import sample_image, sample_labels
from mealv2.views import view_of

NUM_IMAGES, NUM_CLASSES = 40, 9
KEYS = [f"{n}.jpg" for n in range(NUM_IMAGES)]


def made(folder: Path, num_views: int = 5) -> label_sets.Made:
    hard_N = np.arange(NUM_IMAGES) % NUM_CLASSES
    sizes_N2 = np.array([[60 + n, 40 + n] for n in range(NUM_IMAGES)])
    images = Images(sizes_N2, np.full(NUM_IMAGES, 1000), hard_N)
    encoding = Encoding(NUM_CLASSES, topk=4)
    return label_sets.make_set(folder, encoding, KEYS, num_views, shard_size=9, images=images)


def test_records_have_the_numbers_of_the_set(tmp_path: Path) -> None:
    dense_NVC = made(tmp_path / "set").dense_NVC.astype(np.float64)
    labels = LabelSet.open(tmp_path / "set")
    sample = sample_labels(labels)
    chosen = browser.choose_images(sample, find_label_errors(sample))
    records = browser.image_records(labels, sample, find_label_errors(sample), chosen)
    assert len(records) == NUM_IMAGES
    for record in records:
        n = int(record["key"].split(".")[0])
        hard, width, height = n % NUM_CLASSES, 60 + n, 40 + n
        assert (record["hard"], record["size"]) == (hard, (width, height))
        assert record["hard_prob"] == pytest.approx(dense_NVC[n, :, hard].mean(), rel=1e-5)
        best = sample.best_NV[n]
        assert (record["contradicting"], record["num_views"]) == ((best != hard).sum(), 5)
        assert [view["view"] for view in record["views"]] == [0, 1, 2, 3, 4]
        for view in record["views"]:
            probs_C = dense_NVC[n, view["view"]]
            expected = view_of(KEYS[n], view["view"], seed=0, width=width, height=height)
            assert view["box"] == (expected.top, expected.left, expected.height, expected.width)
            assert view["flip"] == expected.flip
            for class_id, prob in view["top"]:
                assert prob == pytest.approx(probs_C[class_id], rel=1e-5)
            assert [prob for _, prob in view["top"]] == pytest.approx(np.sort(probs_C)[:-6:-1])
            assert view["rest"] == pytest.approx(np.sort(probs_C)[:-5].sum(), abs=1e-6)
            assert view["num_kept"] == 4
            assert view["tail"] == pytest.approx(np.sort(probs_C)[:5].sum(), abs=1e-6)
            assert view["contradicts"] == (best[view["view"]] != hard)
            entropy = -(probs_C * np.log(probs_C)).sum()
            assert view["entropy"] == pytest.approx(entropy, rel=1e-5)


def test_each_reason_gets_its_share_of_the_images(tmp_path: Path) -> None:
    made(tmp_path / "set")
    sample = sample_labels(LabelSet.open(tmp_path / "set"))
    errors = find_label_errors(sample)
    assert len(errors) >= 2
    suspects = min(len(errors), browser.MAX_SUSPECTS)
    chosen = browser.choose_images(sample, errors, num_images=10)
    assert len(chosen) == 10 + suspects
    assert list(chosen)[:suspects] == errors.rows[:suspects].tolist()
    counts = {r: sum(r in reasons for reasons in chosen.values()) for r in browser.REASONS}
    assert min(counts.values()) >= 2
    assert int(np.nanmean(sample.entropy_NV, axis=1).argmax()) in chosen
    assert int(sample.disagreement().argmax()) in chosen
    assert chosen == browser.choose_images(sample, errors, num_images=10)


def test_many_views_are_spread_over_their_certainty(tmp_path: Path) -> None:
    made(tmp_path / "set", num_views=30)
    sample = sample_labels(LabelSet.open(tmp_path / "set"))
    picked = browser.choose_views(sample, 3)
    assert len(picked) == browser.VIEWS_OF_IMAGE
    assert picked == sorted(picked)
    hard_prob_V = sample.hard_prob_NV[3]
    assert {int(hard_prob_V.argmin()), int(hard_prob_V.argmax())} <= set(picked)


def test_one_image_is_a_sample_of_all_its_views(tmp_path: Path) -> None:
    dense_NVC = made(tmp_path / "set").dense_NVC
    labels = LabelSet.open(tmp_path / "set")
    sample = sample_image(labels, "7.jpg")
    assert (sample.keys, sample.hard_N.tolist()) == (["7.jpg"], [7])
    np.testing.assert_allclose(sample.mean_NC[0], dense_NVC[7].mean(axis=0), rtol=1e-5)
    with pytest.raises(LabelSetError, match="not an image of this set"):
        sample_image(labels, "another.jpg")
