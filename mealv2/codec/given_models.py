"""Encode views with the models of earlier blocks of their images: weights and residuals only."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mealv2.codec import components
from mealv2.codec.block import HEAD_SIZE, LOW_UNIT, MAX_COMPONENTS, NIBBLE
from mealv2.codec.block import block_with_model_of_another as block_bytes
from mealv2.codec.block_layout import BlockSpans, find_layout, windows
from mealv2.codec.labels import EncodedLabels
from mealv2.codec.residuals import LEVELS_PER_NAT
from mealv2.codec.shared_encoder import (
    Encoded,
    encoded,
    entries_of,
    fitted_together,
    streams_of,
    with_residuals,
)

_NEWTON_STEPS = 6
_START = 0.75  # of the weight of the first component: all are at most 1


class StoredModels(NamedTuple):
    """The models of blocks, by row of the labels that were given; padded.

    Classes, their number, the codes of components and the scales of their weights; as in a block.
    """

    rows_I: Tensor
    ids_IM: Tensor
    counts_I: Tensor
    components_I: Tensor
    codes_IRK: Tensor
    lows_IR: Tensor
    steps_IR: Tensor

    def rows(self, order: Tensor) -> "StoredModels":
        return StoredModels(*(column[order] for column in self))


def encode_with_models(
    first: EncodedLabels, probs_IVC: Tensor, negentropy_IV: Tensor, slope: float
) -> Iterator[Encoded]:
    """Yield groups of images, I x V x C float64 rows that sum to 1, with KL + slope * bits.

    Row i of ``first`` is of the block with the model for image i; those without one are left out.
    """
    num_views = probs_IVC.shape[1]
    models = StoredModels(*(column.to(probs_IVC.device) for column in stored_models(first)))
    for images in fitted_together(models.counts_I, num_views, models.components_I):
        yield _encode(models.rows(images), probs_IVC, negentropy_IV, slope)


def stored_models(labels: EncodedLabels) -> StoredModels:
    """Return the models of the blocks that rows are of, where they have one of their own."""
    num_components = labels.data_P[labels.at_B]
    has_model_B = (labels.views_B > 1) & (num_components > 0) & (num_components <= MAX_COMPONENTS)
    (rows_I,) = has_model_B[labels.block_N].nonzero()
    spans = BlockSpans(labels.at_B, labels.ends_B, labels.views_B).rows(labels.block_N[rows_I])
    kept = labels[rows_I].kept()
    ids_IM = torch.where(kept.is_kept_NK, kept.indices_NK, labels.num_classes).cpu()
    data_P = labels.data_P
    layout = find_layout(data_P, spans, spans, np.zeros_like(rows_I), labels.num_classes)
    r_R = np.arange(int(layout.components_N.max(initial=1)))
    has_IR = r_R < layout.components_N[:, None]
    scales_at_IR = np.where(has_IR, (spans.at_N + HEAD_SIZE)[:, None] + 2 * r_R, 0)
    codes_at_IR = layout.codes_at_N[:, None] + r_R * layout.entries_N[:, None] * has_IR
    nibbles_X = np.stack([data_P & NIBBLE, data_P >> 4], axis=1).reshape(-1)
    slots_K = np.arange(ids_IM.shape[1] + 1)
    codes_IRK = np.zeros((*codes_at_IR.shape, len(slots_K)))
    if len(rows_I):
        is_code_IRK = has_IR[..., None] & (slots_K < layout.entries_N[:, None])[:, None]
        codes_IRK = windows(nibbles_X, codes_at_IR, len(slots_K)) * is_code_IRK
    columns = (
        layout.components_N,
        codes_IRK.astype(np.float64),
        data_P[scales_at_IR].view(np.int8).astype(np.float64),
        data_P[scales_at_IR + 1].astype(np.float64),
    )
    counts_I = torch.from_numpy(layout.counts_N.astype(np.int64))
    return StoredModels(
        torch.from_numpy(rows_I), ids_IM, counts_I, *(torch.from_numpy(c) for c in columns)
    )


def _encode(
    models: StoredModels, probs_IVC: Tensor, negentropy_IV: Tensor, slope: float
) -> Encoded:
    """Encode images whose models have equally many components."""
    num_components = int(models.components_I[0])
    num_listed = int(models.counts_I.max())
    of_images = probs_IVC[models.rows_I], negentropy_IV[models.rows_I]
    entries, _ = entries_of(*of_images, models.ids_IM[:, :num_listed], models.counts_I)
    codes_IRK = models.codes_IRK[:, :num_components, : num_listed + 1]
    lows_IR, steps_IR = models.lows_IR[:, :num_components], models.steps_IR[:, :num_components]
    num_images, num_views, _ = entries.probs_IVK.shape
    weights_IVR = codes_IRK.new_zeros(num_images, num_views, num_components)
    weights_IVR[..., 0] = _START
    weights_IVR = components.fit_weights(entries, weights_IVR, codes_IRK, steps=_NEWTON_STEPS)
    offset_IVR = (weights_IVR - lows_IR[:, None] / LOW_UNIT) * LEVELS_PER_NAT
    nibbles_IVR = (offset_IVR / steps_IR[:, None]).round().clamp(0, NIBBLE)
    codes = codes_IRK, lows_IR, steps_IR, nibbles_IVR
    found = with_residuals(entries, models.counts_I, *codes, slope)
    streams, lengths_IV, divergence_I = streams_of(entries, found)
    nibbles = nibbles_IVR.cpu().numpy()
    blocks = [block_bytes(*of) for of in zip(nibbles, lengths_IV, streams, strict=True)]
    return encoded(models.rows_I, blocks, divergence_I, slope / num_views)
