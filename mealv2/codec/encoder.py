"""Encode soft labels: the views of each image together, or each view by itself if that is less."""

import itertools
import math

import numpy as np
import torch
from torch import Tensor

from mealv2.codec.given_models import encode_with_models
from mealv2.codec.labels import EncodedLabels
from mealv2.codec.record import MAX_CLASSES, MAX_KEPT, MIN_CLASSES
from mealv2.codec.record_blocks import blocks_of_records
from mealv2.codec.record_encoder import RATE_MAX_KEPT, encode_records
from mealv2.codec.shared_encoder import encode_shared

BITS_OF_CLASS = 12  # about what a class takes in a record of 1000 classes: a rate is KL for so many
_CHUNK = 1 << 22  # probabilities encoded at once


def encode(
    probs_NC: Tensor,
    *,
    rate: float | None = None,
    topk: int | None = None,
    num_views: int = 1,
    first: EncodedLabels | None = None,
) -> EncodedLabels:
    """Encode probabilities of any float type, on their device; rows of an image follow each other.

    ``rate``: the nats of KL(p || recovered) that must be saved by 12 more bits, about one class in
    a record. The ``num_views`` views of each image share a model, or each has a record, whichever
    has the least KL + rate * bits / 12. ``topk``: each view has a record that keeps this number of
    classes (up to 65,535). ``first``, with ``rate``: a row of an earlier block of each image; with
    its model, a block may be smaller. Rows are normalised. Raises ValueError for neither or both, a
    value out of range, views that do not divide the rows, and rows that are not distributions.
    """
    if probs_NC.ndim != 2 or not probs_NC.is_floating_point():
        raise ValueError(f"probabilities must be float, N x C, got {tuple(probs_NC.shape)}")
    num_rows, num_classes = probs_NC.shape
    if not MIN_CLASSES <= num_classes <= MAX_CLASSES:
        raise ValueError(f"classes must be {MIN_CLASSES} to {MAX_CLASSES}, got {num_classes}")
    if (rate is None) == (topk is None):
        raise ValueError("give either rate or topk")
    if rate is not None and not 0.0 < rate < math.inf:
        raise ValueError(f"rate must be above 0 and finite, got {rate}")
    if topk is not None and not 1 <= topk <= min(num_classes, MAX_KEPT):
        raise ValueError(f"topk must lie in 1..{min(num_classes, MAX_KEPT)}, got {topk}")
    if num_views < 1 or num_rows % num_views:
        raise ValueError(f"{num_rows} rows are not images of {num_views} views")
    if first is not None and first.num_classes != num_classes:
        raise ValueError(f"first has {first.num_classes} classes, and the rows {num_classes}")
    images = max(1, _CHUNK // (num_classes * num_views))
    none = EncodedLabels.of_blocks([], num_views, num_classes, count_size=_count_size(topk))
    parts = [none]
    if first is not None and len(first) * num_views != num_rows:
        raise ValueError(f"{num_rows} rows are not {num_views} views of {len(first)} images")
    for number, chunk_NC in enumerate(torch.split(probs_NC.detach(), images * num_views)):
        if len(chunk_NC):
            labels = encode_each_view(chunk_NC, rate, topk, num_views)
            if rate is not None and (num_views > 1 or first is not None):
                of_chunk = slice(number * images, (number + 1) * images)
                models = None if first is None else first[of_chunk]
                slope = rate / BITS_OF_CLASS
                labels = _shared_if_less(chunk_NC, labels, slope, num_views, models)
            parts.append(labels)
    return EncodedLabels.concat(parts).to(probs_NC.device)


def encode_each_view(
    probs_NC: Tensor, rate: float | None, topk: int | None, num_views: int
) -> EncodedLabels:
    """Return blocks with a record for each view: what ``encode`` starts from, on the CPU."""
    records = encode_records(probs_NC, rate, topk)
    counts_N = records.counts_N.cpu().numpy().astype(np.int64)
    payload_P = records.payload_P.cpu().numpy()
    num_classes, count_size = probs_NC.shape[1], _count_size(topk)
    data_P, ends_B = blocks_of_records(counts_N, payload_P, num_views, num_classes, count_size)
    return EncodedLabels.of_data(data_P, ends_B, num_views, num_classes, count_size=count_size)


def _count_size(topk: int | None) -> int:
    """Return the bytes of the number of classes that a record keeps."""
    return 1 if topk is None or topk <= RATE_MAX_KEPT else 2


def _shared_if_less(
    probs_NC: Tensor,
    labels: EncodedLabels,
    slope: float,
    num_views: int,
    first: EncodedLabels | None,
) -> EncodedLabels:
    """Return blocks with a shared model for the images where it has less KL + slope * bits.

    Their own, or that of the block of the image in ``first``.
    """
    probs_IVC = probs_NC.double().view(-1, num_views, probs_NC.shape[1])
    probs_IVC = probs_IVC / probs_IVC.sum(2, keepdim=True)
    sizes_I = torch.from_numpy(labels.ends_B - labels.at_B).to(probs_NC.device)
    negentropy_N = negentropy(probs_IVC.flatten(0, 1))
    on_device = labels.to(probs_NC.device)
    costs_I = divergence(probs_IVC.flatten(0, 1), on_device, negentropy_N)
    costs_I = costs_I.view(-1, num_views).mean(1) + slope * 8.0 * sizes_I / num_views
    blocks = labels.blocks(num_views)
    views = probs_IVC, negentropy_N.view(-1, num_views), slope
    own = encode_shared(*views) if num_views > 1 else ()
    for found in itertools.chain(own, () if first is None else encode_with_models(first, *views)):
        is_less_I = found.cost_I < costs_I[found.images_I]
        costs_I[found.images_I] = torch.minimum(found.cost_I, costs_I[found.images_I])
        for image, block, is_chosen in zip(
            found.images_I.tolist(), found.blocks, is_less_I.tolist(), strict=True
        ):
            blocks[image] = block if is_chosen else blocks[image]
    labels = EncodedLabels.of_blocks(blocks, num_views, probs_NC.shape[1])
    return labels if first is None else labels.using(first[labels.uses_others().nonzero()[0]])


def negentropy(probs_NC: Tensor) -> Tensor:
    """Return the sum of p ln p of each row, in nats."""
    return torch.xlogy(probs_NC, probs_NC).sum(1)


def divergence(
    probs_NC: Tensor, labels: EncodedLabels, negentropy_N: Tensor | None = None
) -> Tensor:
    """Return KL(p || recovered) of rows that sum to 1, in nats, float64 N."""
    negentropy_N = negentropy(probs_NC) if negentropy_N is None else negentropy_N
    kept = labels.kept()
    tail_N = kept.tail_N.double()
    log_tail_N = tail_N.clamp_min(1e-300).log()
    probs_NK = probs_NC.gather(1, kept.indices_NK) * kept.is_kept_NK
    log_NK = torch.where(kept.is_kept_NK, kept.probs_NK.double(), 1.0).log()
    rest_N = (1.0 - probs_NK.sum(1)).clamp_min(0.0) * (tail_N > 0)
    return negentropy_N - (probs_NK * log_NK).sum(1) - rest_N * log_tail_N
