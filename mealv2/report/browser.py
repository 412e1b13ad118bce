"""Records of the label browser: images with their views, boxes and soft labels, as JSON values."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from mealv2.data.source import UNLABELLED
from mealv2.label_set import LabelSet
from mealv2.report.label_errors import LabelErrors
from mealv2.report.sample import LabelSample, view_values
from mealv2.views import View, evaluation_resize

MIN_VIEWS = 320  # of all images together, where the set has as many
MIN_IMAGES = 60
MAX_SUSPECTS = 24  # that are shown beside them
VIEWS_OF_IMAGE = 8  # at most
TOPK = 5  # classes of a view
REASONS = {
    "entropy": "high entropy",
    "contradiction": "views contradict the hard label",
    "disagreement": "views disagree with each other",
    "suspected": "suspected label error",
    "random": "random choice",
}


def choose_images(
    sample: LabelSample, errors: LabelErrors, *, num_images: int | None = None, seed: int = 0
) -> dict[int, list[str]]:
    """Return rows of a sample to show, each with the REASONS that it was chosen for.

    The most suspicious labels come first, at most MAX_SUSPECTS. For ``num_images`` more the reasons
    take turns: contradicting views with the lowest probability of the hard label, the largest
    disagreement between views, the highest mean entropy, a random choice.
    """
    if num_images is None:
        num_images = max(MIN_IMAGES, -(-MIN_VIEWS // min(VIEWS_OF_IMAGE, len(sample.views_V))))
    suspects = errors.rows[:MAX_SUSPECTS].tolist()
    num_images = min(num_images + len(suspects), len(sample))
    hard_N = np.full(len(sample), np.nan)
    is_contradicted_N = sample.contradicts().any(axis=1)
    hard_N[is_contradicted_N] = np.nanmean(sample.hard_prob_NV[is_contradicted_N], axis=1)
    contradicted = np.argsort(hard_N, kind="stable")[: int(is_contradicted_N.sum())]
    disagreement_N = sample.disagreement() if len(sample.views_V) > 1 else np.zeros(len(sample))
    orders = {
        "contradiction": contradicted.tolist(),
        "disagreement": np.argsort(-disagreement_N, kind="stable").tolist(),
        "entropy": np.argsort(-np.nanmean(sample.entropy_NV, axis=1), kind="stable").tolist(),
        "random": np.random.default_rng(seed).permutation(len(sample)).tolist(),
    }
    if len(sample.views_V) == 1:
        del orders["disagreement"]
    chosen: dict[int, list[str]] = {row: ["suspected"] for row in suspects}
    for rank in range(len(sample)):
        for reason, order in orders.items():
            if rank >= len(order):
                continue
            if order[rank] in chosen:
                chosen[order[rank]].append(reason)
            elif len(chosen) < num_images:
                chosen[order[rank]] = [reason]
        if len(chosen) == num_images:
            break
    for row in set(errors.rows[MAX_SUSPECTS:].tolist()) & chosen.keys():
        chosen[row].append("suspected")
    return chosen


def choose_views(sample: LabelSample, row: int, *, most: int = VIEWS_OF_IMAGE) -> list[int]:
    """Return views of an image to show, in order: spread from the least to the most certain.

    Certain of the hard label; of the likeliest class for an image without one.
    """
    has_V = sample.has_NV[row]
    certainty = sample.top1_NV if sample.hard_N[row] == UNLABELLED else sample.hard_prob_NV
    views_V = sample.views_V[has_V]
    if len(views_V) <= most:
        return [int(view) for view in views_V]
    order_V = np.argsort(certainty[row][has_V], kind="stable")
    picked = order_V[np.linspace(0, len(order_V) - 1, most).round().astype(int)]
    return sorted(views_V[picked].tolist())


def image_records(
    labels: LabelSet,
    sample: LabelSample,
    errors: LabelErrors,
    chosen: dict[int, list[str]],
    *,
    max_views: int = VIEWS_OF_IMAGE,
    topk: int = TOPK,
) -> list[dict[str, Any]]:
    """Return the record of each chosen image; raises LabelSetError for damaged labels.

    ``key``, ``hard`` (class id or null), ``size`` (width, height or null), ``reasons``,
    ``entropy`` (mean, nats), ``hard_prob`` (mean or null), ``disagreement`` (nats),
    ``contradicting`` of ``num_views`` views, ``suggested`` (class id or null), ``mean`` (the
    likeliest classes of the mean label) and ``views`` as ``view_records`` returns them.
    """
    suggested = dict(zip(errors.rows.tolist(), errors.suggested.tolist(), strict=True))
    disagreement_N, contradicts_NV = sample.disagreement(), sample.contradicts()
    records = []
    for row, reasons in chosen.items():
        hard = int(sample.hard_N[row])
        size = None if sample.sizes_N2 is None else tuple(sample.sizes_N2[row].tolist())
        is_labelled = hard != UNLABELLED
        hard_prob = float(np.nanmean(sample.hard_prob_NV[row])) if is_labelled else None
        key, views = sample.keys[row], choose_views(sample, row, most=max_views)
        records.append(
            {
                "key": key,
                "hard": hard if is_labelled else None,
                "size": size,
                "reasons": reasons,
                "entropy": float(np.nanmean(sample.entropy_NV[row])),
                "hard_prob": hard_prob,
                "disagreement": float(disagreement_N[row]),
                "contradicting": int(contradicts_NV[row].sum()),
                "num_views": int(sample.has_NV[row].sum()),
                "suggested": suggested.get(row),
                "mean": likeliest(sample.mean_NC[row], topk),
                "views": view_records(labels, key, views, hard=hard, size=size, topk=topk),
            }
        )
    return records


def view_records(
    labels: LabelSet,
    key: str,
    views: Sequence[int],
    *,
    hard: int = UNLABELLED,
    size: tuple[int, int] | None = None,
    topk: int = TOPK,
) -> list[dict[str, Any]]:
    """Return a record for each of some views of an image; raises as ``LabelSet.lookup``.

    ``view``; ``box`` (top, left, height, width in pixels), ``flip``, ``vflip``, ``centre``,
    ``operations`` (their number), all null without the ``size`` of the image (width, height);
    ``top``: the ``topk`` likeliest classes as (class id, probability); ``rest``: the probability of
    all other classes; ``num_kept``: the classes with values of their own, ``tail``: the mass of
    those without; ``entropy`` in nats; ``hard_prob`` and ``contradicts`` the hard label, null
    without one.
    """
    found = labels.soft_labels([key] * len(views), list(views))
    kept, num_classes = found.kept().by_probability(), labels.num_classes
    hard_M = np.full(len(views), hard)
    best_M, _, hard_prob_M, entropy_M, _ = view_values(kept, num_classes, hard_M, (1,))
    num_kept_M = kept.is_kept_NK.sum(dim=1).tolist()
    dense_MC = kept.spread(kept.probs_NK, kept.tail_N, num_classes)
    is_labelled = hard != UNLABELLED
    records = []
    for row, view in enumerate(views):
        top = likeliest(dense_MC[row].numpy(), topk)
        records.append(
            {
                "view": int(view),
                **_box(None if size is None else view_of(labels, key, int(view), size)),
                "top": top,
                "rest": max(0.0, 1.0 - sum(prob for _, prob in top)),
                "num_kept": num_kept_M[row],
                "tail": float(kept.tail_N[row]) * (num_classes - num_kept_M[row]),
                "entropy": float(entropy_M[row]),
                "hard_prob": float(hard_prob_M[row]) if is_labelled else None,
                "contradicts": bool(best_M[row] != hard) if is_labelled else None,
            }
        )
    return records


def likeliest(probs_C: np.ndarray, topk: int = TOPK) -> list[tuple[int, float]]:
    """Return the likeliest classes of a distribution as (class id, probability)."""
    order = np.argsort(-probs_C, kind="stable")[:topk]
    return [(int(c), float(probs_C[c])) for c in order]


def view_of(labels: LabelSet, key: str, view: int, size: tuple[int, int]) -> View:
    """Return a labelled view of an image of ``size`` (width, height).

    That of the split ``val`` is the square that evaluation crops, not the whole image.
    """
    width, height = size
    if labels.split != "val":
        return labels.views().view(key, view, width=width, height=height)
    side = min(width, height) * labels.img_size / evaluation_resize(labels.img_size)
    top, left = round((height - side) / 2), round((width - side) / 2)
    return View(top, left, round(side), round(side), flip=False, is_centre=True)


def _box(view: View | None) -> dict[str, Any]:
    """Return what a record has of a view; nulls for None."""
    if view is None:
        return dict.fromkeys(("box", "flip", "vflip", "centre", "operations"))
    return {
        "box": (view.top, view.left, view.height, view.width),
        "flip": view.flip,
        "vflip": view.vflip,
        "centre": view.is_centre,
        "operations": len(view.operations),
    }
