"""Encode the views of images together: the classes to list, the model, its codes, the residuals."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mealv2.codec import components
from mealv2.codec.block import (
    LOW_UNIT,
    MAX_COMPONENTS,
    MAX_LISTED,
    NIBBLE,
    Model,
    block_bytes,
    coded,
    packed,
)
from mealv2.codec.components import Entries, Fit
from mealv2.codec.residuals import LEVELS_PER_NAT, STEPS, choose, contexts_of

_ZERO = 8  # the code of 0 in all components but the first, which has no negative values
_LIST_BITS = 5.0  # about what the id of a listed class takes
_CODE_BITS = _WEIGHT_BITS = 4
_USED = 0.1  # the part of a component's gain that residuals would not reach as cheaply
# Images with about equal lists are fitted together, padded to the longest: up to these listed
# classes, and so many probabilities. A CPU's cache has them; for a GPU, few operations count.
_CPU_GROUPS, _CPU_CHUNK = (16, 32, 48, 64, 96, 128, 192, 256, 384), 1 << 18
_GROUPS, _CHUNK = (128,), 1 << 21


class Encoded(NamedTuple):
    """The blocks of images: by index; KL + slope * bits of each, the mean over its views, nats."""

    images_I: Tensor
    blocks: list[bytes]
    cost_I: Tensor


class Modelled(NamedTuple):
    """Images with models of equally many components: by index, their entries, ids, list lengths."""

    images_I: Tensor
    entries: Entries
    ids_IM: Tensor
    counts_I: Tensor
    fit: Fit


def encode_shared(probs_IVC: Tensor, negentropy_IV: Tensor, slope: float) -> Iterator[Encoded]:
    """Yield groups of images, I x V x C float64 rows that sum to 1, with KL + slope * bits.

    ``negentropy_IV`` is the sum of p ln p; ``cost_I`` is the mean over the views, in nats.
    """
    for modelled in models(probs_IVC, negentropy_IV, slope):
        found = quantise(modelled, slope)
        yield _write(modelled, found, slope, probs_IVC.shape[2])


def models(probs_IVC: Tensor, negentropy_IV: Tensor, slope: float) -> Iterator[Modelled]:
    """Yield groups of images with their listed classes and models; the rows sum to 1."""
    num_views = probs_IVC.shape[1]
    mean_IC = probs_IVC.mean(1)
    order_IC = torch.sort(mean_IC, dim=1, descending=True, stable=True).indices
    counts_I = num_listed(mean_IC.gather(1, order_IC), slope / num_views)
    for images in fitted_together(counts_I, num_views):
        counts_G = counts_I[images]
        ids_GM = order_IC[images, : int(counts_G.max())]
        probs_GVC, negentropy_GV = probs_IVC[images], negentropy_IV[images]
        entries, ids_GM = entries_of(probs_GVC, negentropy_GV, ids_GM, counts_G)
        for part, fit in _grow(entries, slope):
            yield Modelled(images[part], entries.rows(part), ids_GM[part], counts_G[part], fit)


def fitted_together(
    counts_I: Tensor, num_views: int, components_I: Tensor | None = None
) -> Iterator[Tensor]:
    """Yield indices of images with about equally many listed classes, and equally many components.

    Results do not depend on the groups.
    """
    is_cpu = counts_I.device.type == "cpu"
    longest, chunk = (_CPU_GROUPS, _CPU_CHUNK) if is_cpu else (_GROUPS, _CHUNK)
    group_I = torch.bucketize(counts_I, torch.tensor(longest, device=counts_I.device))
    if components_I is not None:
        group_I = group_I * (MAX_COMPONENTS + 1) + components_I
    for number in sorted(set(group_I.tolist())):
        (group,) = (group_I == number).nonzero(as_tuple=True)
        width = int(counts_I[group].max())
        yield from torch.split(group, max(1, chunk // (num_views * width)))


def num_listed(sorted_IC: Tensor, slope: float) -> Tensor:
    """Return the number of classes to list, by the mean over the views, likeliest first.

    The least KL(mean || listed classes exact, others even) + slope * bits of a class.
    """
    num_classes = sorted_IC.shape[1]
    most = min(num_classes, MAX_LISTED)
    k_K = torch.arange(1, most + 1, device=sorted_IC.device)
    head_IK = sorted_IC[:, :most]
    rest_IK = (1.0 - head_IK.cumsum(1)).clamp_min(0.0)
    others_K = (num_classes - k_K).clamp_min(1)
    score_IK = -torch.xlogy(head_IK, head_IK).cumsum(1)
    score_IK = score_IK - torch.xlogy(rest_IK, rest_IK / others_K)
    per_class = _LIST_BITS + 3.0 * _CODE_BITS
    return (score_IK + slope * per_class * k_K).argmin(1) + 1


def entries_of(
    probs_IVC: Tensor, negentropy_IV: Tensor, ids_IM: Tensor, counts_I: Tensor
) -> tuple[Entries, Tensor]:
    """Return the views over the entries, and the ids of classes, ascending, padded with C."""
    num_views, num_classes = probs_IVC.shape[1:]
    slot_M = torch.arange(ids_IM.shape[1], device=ids_IM.device)
    ids_IM = torch.where(slot_M < counts_I[:, None], ids_IM, num_classes).sort(dim=1).values
    padded_IM = ids_IM.clamp_max(num_classes - 1)[:, None].expand(-1, num_views, -1)
    is_listed_IM = ids_IM < num_classes
    kept_IVM = probs_IVC.gather(2, padded_IM) * is_listed_IM[:, None]
    # the entry of all others follows the listed classes, before the padding
    rest_IV = (1.0 - kept_IVM.sum(2)).clamp_min(0.0)
    sizes_IK = torch.nn.functional.pad(is_listed_IM.to(kept_IVM.dtype), (0, 1))
    others_I = (num_classes - counts_I).to(kept_IVM.dtype)
    sizes_IK.scatter_(1, counts_I[:, None], others_I[:, None])
    probs_IVK = torch.nn.functional.pad(kept_IVM, (0, 1))
    at_IV1 = counts_I[:, None, None].expand(-1, num_views, 1)
    has_others_I = (others_I > 0).to(kept_IVM.dtype)
    probs_IVK = probs_IVK.scatter(2, at_IV1, (rest_IV * has_others_I[:, None])[..., None])
    probs_IVK = probs_IVK / probs_IVK.sum(2, keepdim=True)
    return Entries(probs_IVK, sizes_IK, negentropy_IV), ids_IM


def _grow(entries: Entries, slope: float) -> Iterator[tuple[Tensor, Fit]]:
    """Yield (images, their model), with as many components as pay for their bits."""
    num_views = entries.probs_IVK.shape[1]
    images = torch.arange(len(entries.probs_IVK), device=entries.probs_IVK.device)
    fit = components.first(entries)
    divergence_I = entries.divergence(fit.levels()).mean(1)
    most = min(MAX_COMPONENTS, max(1, num_views // 4))
    while fit.weights_IVR.shape[2] < most:
        grown = components.grow(entries, fit)
        grown_I = entries.divergence(grown.levels()).mean(1)
        num_entries_I = (entries.sizes_IK > 0).sum(1)
        bits_I = _WEIGHT_BITS + (_CODE_BITS * num_entries_I + 16) / num_views
        pays_I = _USED * (divergence_I - grown_I) > slope * bits_I
        stop, more = (~pays_I).nonzero()[:, 0], pays_I.nonzero()[:, 0]
        if len(stop):
            yield images[stop], Fit(fit.weights_IVR[stop], fit.components_IRK[stop])
        if not len(more):
            return
        images, entries, divergence_I = images[more], entries.rows(more), grown_I[more]
        fit = Fit(grown.weights_IVR[more], grown.components_IRK[more])
    yield images, fit


class Quantised(NamedTuple):
    """Codes of images of R components: whole numbers, float64; the residuals and their contexts."""

    codes_IRK: Tensor
    lows_IR: Tensor
    steps_IR: Tensor
    nibbles_IVR: Tensor
    levels_IVK: Tensor
    contexts_IVK: Tensor
    residuals_IVK: Tensor


def quantise(modelled: Modelled, slope: float, bits: Tensor | None = None) -> Quantised:
    """Return the codes of models, and the residuals on top of them.

    ``bits``: what each residual costs, contexts x values; by default of the codes of the format.
    """
    _, entries, _, counts_I, fit = modelled
    codes_IRK, weights_IVR = _codes(entries, fit)
    weights_IVR = components.fit_weights(entries, weights_IVR, codes_IRK, steps=3)
    lows_IR = (weights_IVR.amin(1) * LOW_UNIT).floor().clamp(-128, 127)
    spans_IR = weights_IVR.amax(1) - lows_IR / LOW_UNIT
    steps_IR = (spans_IR * LEVELS_PER_NAT / NIBBLE).ceil().clamp(1, 255)
    offset_IVR = (weights_IVR - lows_IR[:, None] / LOW_UNIT) * LEVELS_PER_NAT
    nibbles_IVR = (offset_IVR / steps_IR[:, None]).round().clamp(0, NIBBLE)
    coded = codes_IRK, lows_IR, steps_IR, nibbles_IVR
    return with_residuals(entries, counts_I, *coded, slope, bits)


def with_residuals(
    entries: Entries,
    counts_I: Tensor,
    codes_IRK: Tensor,
    lows_IR: Tensor,
    steps_IR: Tensor,
    nibbles_IVR: Tensor,
    slope: float,
    bits: Tensor | None = None,
) -> Quantised:
    """Return the residuals on top of the codes of images with so many listed classes."""
    whole_IVR = lows_IR[:, None] * (LEVELS_PER_NAT // LOW_UNIT) + steps_IR[:, None] * nibbles_IVR
    levels_IVK = whole_IVR @ codes_IRK  # exact: whole numbers in float64
    slots_K = torch.arange(levels_IVK.shape[2], device=levels_IVK.device)
    sizes_IK = entries.sizes_IK.long()
    is_others_IK = (slots_K == counts_I[:, None]) & (sizes_IK > 0)
    contexts_IVK = contexts_of(levels_IVK.long(), sizes_IK[:, None], is_others_IK[:, None])
    model_IVK = entries.model(levels_IVK / LEVELS_PER_NAT)
    residuals_IVK = choose(entries.probs_IVK, model_IVK, contexts_IVK, slope, bits)
    residuals_IVK = residuals_IVK * (sizes_IK > 0)[:, None]
    return Quantised(
        codes_IRK, lows_IR, steps_IR, nibbles_IVR, levels_IVK, contexts_IVK, residuals_IVK
    )


def _codes(entries: Entries, fit: Fit) -> tuple[Tensor, Tensor]:
    """Return the components in whole nats, and weights of at most 1 to go with them."""
    largest_IR = fit.weights_IVR.abs().amax(1).clamp_min(1e-9)
    components_IRK = fit.components_IRK * largest_IR[..., None]
    # a constant added to a component changes nothing: the likeliest class has 0
    top_I11 = entries.probs_IVK.mean(1).argmax(1)[:, None, None]
    components_IRK = components_IRK - components_IRK.gather(
        2, top_I11.expand(-1, components_IRK.shape[1], 1)
    )
    is_entry_I1K = (entries.sizes_IK > 0)[:, None]
    lowest_I1 = components_IRK[:, 0].masked_fill(~is_entry_I1K[:, 0], torch.inf).amin(1, True)
    first_I1K = (components_IRK[:, 0] - lowest_I1)[:, None].round().clamp(0, NIBBLE)
    others_IRK = (components_IRK[:, 1:].round() + _ZERO).clamp(0, NIBBLE)
    codes_IRK = torch.cat([first_I1K, others_IRK], 1) * is_entry_I1K
    return codes_IRK, fit.weights_IVR / largest_IR[:, None]


class Streams(NamedTuple):
    """The residuals of images in bytes, their bits in each view; KL, the mean over the views."""

    streams: list[bytes]
    lengths_IV: np.ndarray
    divergence_I: Tensor


def streams_of(entries: Entries, found: Quantised) -> Streams:
    """Return the residuals of images in bytes."""
    num_images, num_views, _ = found.levels_IVK.shape
    steps = torch.from_numpy(STEPS).to(found.levels_IVK)
    levels_IVK = found.levels_IVK - steps[found.contexts_IVK] * found.residuals_IVK
    divergence_I = entries.divergence(levels_IVK / LEVELS_PER_NAT).mean(1)
    contexts_NK, residuals_NK, sizes_NK = (
        part.expand_as(levels_IVK).flatten(0, 1).cpu().numpy().astype(np.int64)
        for part in (found.contexts_IVK, found.residuals_IVK, entries.sizes_IK[:, None])
    )
    residuals = coded(residuals_NK, contexts_NK, sizes_NK)
    lengths_IV = residuals.lengths_N.reshape(num_images, num_views)
    return Streams(packed(residuals, num_views), lengths_IV, divergence_I)


def _write(modelled: Modelled, found: Quantised, slope: float, num_classes: int) -> Encoded:
    images_I, entries, ids_IM, counts_I, _ = modelled
    streams, lengths_IV, divergence_I = streams_of(entries, found)
    codes_IRK, lows_IR, steps_IR, nibbles_IVR, ids, counts = (
        part.cpu().numpy().astype(np.int64) for part in (*found[:4], ids_IM, counts_I)
    )
    blocks = []
    for image, stream in enumerate(streams):
        num_listed = int(counts[image])
        num_entries = num_listed + (num_listed < num_classes)
        model = Model(
            ids[image, :num_listed],
            codes_IRK[image, :, :num_entries],
            lows_IR[image],
            steps_IR[image],
            nibbles_IVR[image],
        )
        blocks.append(block_bytes(model, lengths_IV[image], stream, num_classes))
    return encoded(images_I, blocks, divergence_I, slope / lengths_IV.shape[1])


def encoded(images_I: Tensor, blocks: list[bytes], divergence_I: Tensor, slope: float) -> Encoded:
    """Return blocks with their cost; ``slope`` is the cost of a bit, of a view."""
    bytes_I = torch.tensor([len(block) for block in blocks]).to(divergence_I)
    return Encoded(images_I, blocks, divergence_I + slope * 8.0 * bytes_I)
