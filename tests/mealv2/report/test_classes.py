"""Class by class: counts against loops, similarity by its definition, groups, figures."""

import numpy as np
import pytest

from mealv2.report import class_figures, classes

NUM = 7


def predictions(seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    hard_N = rng.integers(0, NUM - 1, 400)  # the last class has no images
    right_N = rng.random(400) < 0.3 + 0.3 * seed
    return hard_N, np.where(right_N, hard_N, rng.integers(0, NUM, 400))


def names() -> list[str]:
    return [f"class {c}" for c in range(NUM)]


def test_changes_and_pairs_are_those_of_loops() -> None:
    (hard_N, first_N), (_, last_N) = predictions(0), predictions(1)
    _, last_N = hard_N, np.where(last_N == first_N, last_N, hard_N)
    before, after = (classes.ClassResults.from_pairs(hard_N, p, NUM) for p in (first_N, last_N))
    assert before.top1 == pytest.approx(100 * (first_N == hard_N).mean())
    rows = classes.class_changes(names(), before, after)
    assert len(rows) == NUM - 1
    assert [row["gain"] for row in rows] == sorted((row["gain"] for row in rows), reverse=True)
    for row in rows:
        is_c = hard_N == row["class_id"]
        assert row["images"] == is_c.sum()
        assert row["before"] == pytest.approx(100 * (first_N[is_c] == row["class_id"]).mean())
        assert row["after"] == pytest.approx(100 * (last_N[is_c] == row["class_id"]).mean())
        assert row["gain"] == pytest.approx(row["after"] - row["before"])
    gains, losses = classes.extremes(rows, 2)
    assert [row["gain"] for row in gains] == [row["gain"] for row in rows[:2]]
    assert all(row["gain"] < 0 for row in losses)
    pairs = classes.confused_pairs(names(), before, after, number=5)
    assert len(pairs) == 5
    for pair in pairs:
        a, b = (names().index(pair[name]) for name in ("class", "other"))
        both = ((hard_N == a) & (first_N == b)) | ((hard_N == b) & (first_N == a))
        assert pair["before"] == both.sum()
        both = ((hard_N == a) & (last_N == b)) | ((hard_N == b) & (last_N == a))
        assert pair["after"] == both.sum() == pair["before"] + pair["change"]
    assert [p["before"] for p in pairs] == sorted((p["before"] for p in pairs), reverse=True)


def test_similarity_is_the_mean_mass_on_the_other_class() -> None:
    rng = np.random.default_rng(0)
    means_CC = rng.dirichlet(np.ones(NUM), size=NUM)
    means_CC[3] = np.nan  # a class without images
    found = classes.class_similarity(means_CC)
    assert (found.diagonal() == 0).all()
    for a in range(NUM):
        for b in set(range(NUM)) - {a}:
            known = [m for m in (means_CC[a, b], means_CC[b, a]) if not np.isnan(m)]
            assert found[a, b] == pytest.approx(sum(known) / len(known))
    pairs = classes.similar_pairs(found, 4)
    assert [value for *_, value in pairs] == sorted(found[np.triu_indices(NUM, 1)])[:-5:-1]
    chosen = classes.similar_classes(found, 4)
    assert len(set(chosen)) == len(chosen) <= 4
    assert set(pairs[0][:2]) <= set(chosen)
    assert classes.similar_classes(found, NUM) == list(range(NUM))


def test_similar_classes_are_compared_with_dissimilar_ones() -> None:
    similarity_CC = np.zeros((6, 6))
    for a, b, value in [(0, 1, 0.4), (2, 3, 0.2), (4, 5, 0.01)]:
        similarity_CC[a, b] = similarity_CC[b, a] = value
    rows = [
        {
            "class_id": c,
            "class": str(c),
            "images": 9,
            "before": 50.0,
            "after": 60.0 - c,
            "gain": 10.0 - c,
        }
        for c in range(6)
    ]
    most, least = classes.gains_by_similarity(rows, similarity_CC)
    assert (most["similarity"], most["gain"]) == pytest.approx((0.4, 9.5))
    assert (least["similarity"], least["gain"]) == pytest.approx((0.01, 5.5))


@pytest.mark.parametrize("num_classes", [3, 1000])
def test_figures_take_few_and_many_classes(num_classes: int) -> None:
    pytest.importorskip("matplotlib")
    rows = [
        {
            "class_id": c,
            "class": f"$x^{c} <b>",
            "images": 5,
            "before": 50.0,
            "after": c % 100,
            "gain": c % 100 - 50.0,
        }
        for c in range(num_classes)
    ]
    rows.sort(key=lambda row: -float(str(row["gain"])))
    figure = class_figures.change_figure(rows, before="start", after="student")
    assert figure is not None
    assert len(figure.data) == num_classes
    assert "<b>" not in figure.inline_svg()
    similarity_CC = np.random.default_rng(0).random((num_classes, num_classes))
    assert class_figures.similarity_figure(rows, similarity_CC) is not None


@pytest.mark.slow
def test_t_sne_keeps_clusters_apart() -> None:
    pytest.importorskip("sklearn")
    rng = np.random.default_rng(0)
    hard_N = np.repeat([2, 5], 20)
    features_ND = rng.normal(size=(40, 8)) + 8.0 * (hard_N == 5)[:, None]
    (figure,) = class_figures.tsne_figures({"start": features_ND}, hard_N, {2: "a", 5: "b"})
    assert (figure.name, len(figure.data)) == ("class-tsne-1", 40)
    a, b = (
        np.array([(row["x"], row["y"]) for row in figure.data if row["class"] == name])
        for name in "ab"
    )
    spread = max(np.linalg.norm(part - part.mean(0), axis=1).mean() for part in (a, b))
    assert np.linalg.norm(a.mean(0) - b.mean(0)) > 2 * spread
    assert class_figures.tsne_figures({"start": features_ND[:3]}, hard_N[:3], {2: "a"}) == []
