"""Fit the distribution that the views of an image share: a few components, and weights for a view.

Over the listed classes and, as one more entry, all others,

    ln p_v = - sum over r of weight_vr component_r - ln Z_v,

a log-bilinear model: logistic principal components. Newton steps on KL(p || model) move the weights
of each view and the components in turn. All sums are float64: their order, which differs between
devices and batches, moves a value by 10^-14 and so practically never a stored code.
"""

from typing import NamedTuple

import torch
from torch import Tensor

_ROUNDS = 2  # of both half steps, for each component added
_POWER_STEPS = 6
_LARGEST_STEP = 1.0  # nats
_RIDGE = 1e-3
_LEAST = 1e-12


class Entries(NamedTuple):
    """Views over the entries of their image: the listed classes in ascending order, all others.

    ``probs_IVK`` float64; ``sizes_IK`` is the number of classes in an entry, 0 for padding;
    ``negentropy_IV`` is the sum of p ln p over all classes.
    """

    probs_IVK: Tensor
    sizes_IK: Tensor
    negentropy_IV: Tensor

    def rows(self, images: Tensor) -> "Entries":
        """Return some images."""
        return Entries(*(each[images] for each in self))

    def divergence(self, levels_IVK: Tensor) -> Tensor:
        """Return KL(p || model) in nats, I x V; levels are -ln p plus a constant."""
        total_IV = torch.logsumexp(self.sizes_IK.log()[:, None] - levels_IVK, dim=-1)
        return self.negentropy_IV + (self.probs_IVK * levels_IVK).sum(-1) + total_IV

    def model(self, levels_IVK: Tensor) -> Tensor:
        """Return the probability of each entry, I x V x K."""
        return torch.softmax(self.sizes_IK.log()[:, None] - levels_IVK, dim=-1)


class Fit(NamedTuple):
    """``weights_IVR`` and ``components_IRK`` in nats; levels are their product."""

    weights_IVR: Tensor
    components_IRK: Tensor

    def levels(self) -> Tensor:
        """Return the levels of the model, I x V x K, in nats."""
        return self.weights_IVR @ self.components_IRK


def first(entries: Entries) -> Fit:
    """Return the model of one component: the mean over the views, to a power for each view."""
    mean_IK = entries.probs_IVK.mean(1) / entries.sizes_IK.clamp_min(1.0)
    levels_IK = -mean_IK.clamp_min(_LEAST).log()
    levels_IK = (levels_IK - levels_IK.amin(1, keepdim=True)) * (entries.sizes_IK > 0)
    weights_IV1 = torch.ones_like(entries.negentropy_IV)[..., None]
    return refine(entries, Fit(weights_IV1, levels_IK[:, None]))


def grow(entries: Entries, fit: Fit) -> Fit:
    """Return the model with one more component: the direction in which the views differ most."""
    scale_I1K = entries.probs_IVK.mean(1, keepdim=True).sqrt()
    left_IVK = (entries.model(fit.levels()) - entries.probs_IVK) / scale_I1K.clamp_min(_LEAST)
    largest_I = left_IVK.square().sum(2).argmax(1)
    vector_IK1 = left_IVK[torch.arange(len(largest_I)), largest_I][..., None]
    for _ in range(_POWER_STEPS):
        vector_IK1 = left_IVK.mT @ (left_IVK @ vector_IK1)
        vector_IK1 = vector_IK1 / vector_IK1.norm(dim=1, keepdim=True).clamp_min(_LEAST)
    added_I1K = vector_IK1.mT / scale_I1K.clamp_min(_LEAST) * (entries.sizes_IK > 0)[:, None]
    added_I1K = 4.0 * added_I1K / added_I1K.abs().amax(2, keepdim=True).clamp_min(_LEAST)
    weights_IVR = torch.cat([fit.weights_IVR, torch.zeros_like(fit.weights_IVR[..., :1])], 2)
    return refine(entries, Fit(weights_IVR, torch.cat([fit.components_IRK, added_I1K], 1)))


def refine(entries: Entries, fit: Fit) -> Fit:
    """Return the model after a few Newton steps of the weights and the components in turn."""
    weights_IVR, components_IRK = fit
    weights_IVR = fit_weights(entries, weights_IVR, components_IRK, steps=2)
    for _ in range(_ROUNDS):
        components_IRK = components_IRK + _component_step(entries, weights_IVR, components_IRK)
        weights_IVR = fit_weights(entries, weights_IVR, components_IRK, steps=1)
    return Fit(weights_IVR, components_IRK)


def fit_weights(
    entries: Entries, weights_IVR: Tensor, components_IRK: Tensor, *, steps: int
) -> Tensor:
    """Return the weights after Newton steps, view by view, for given components."""
    num_components = components_IRK.shape[1]
    pairs_IXK = components_IRK[:, :, None] * components_IRK[:, None]
    pairs_IXK = pairs_IXK.flatten(1, 2)
    for _ in range(steps):
        model_IVK = entries.model(weights_IVR @ components_IRK)
        slope_IVR = (model_IVK - entries.probs_IVK) @ components_IRK.mT
        mean_IVR = model_IVK @ components_IRK.mT
        curvature = (model_IVK @ pairs_IXK.mT).view(*mean_IVR.shape, num_components)
        curvature = curvature - mean_IVR[..., :, None] * mean_IVR[..., None, :]
        step_IVR = _solve(curvature, slope_IVR, ridge=1e-6)
        weights_IVR = weights_IVR + step_IVR.clamp(-_LARGEST_STEP / 2, _LARGEST_STEP / 2)
    return weights_IVR


def _component_step(entries: Entries, weights_IVR: Tensor, components_IRK: Tensor) -> Tensor:
    """Return a Newton step of the components, entry by entry, for given weights."""
    model_IVK = entries.model(weights_IVR @ components_IRK)
    slope_IRK = weights_IVR.mT @ (model_IVK - entries.probs_IVK)
    num_components = weights_IVR.shape[2]
    pairs_IVX = (weights_IVR[..., :, None] * weights_IVR[..., None, :]).flatten(2)
    curvature = (model_IVK.mT @ pairs_IVX).view(*slope_IRK.mT.shape, num_components)
    # relative to the mean over entries: an entry that no view has moves little
    num_I = num_components * (entries.sizes_IK > 0).sum(1)  # padding depends on the batch
    mean_I1 = (curvature.diagonal(dim1=-2, dim2=-1).sum((1, 2)) / num_I)[:, None]
    step_IKR = _solve(curvature, slope_IRK.mT, ridge=_RIDGE, floor=mean_I1)
    return step_IKR.mT.clamp(-_LARGEST_STEP, _LARGEST_STEP)


def _solve(
    matrices: Tensor, vectors: Tensor, *, ridge: float, floor: Tensor | None = None
) -> Tensor:
    """Return the solutions of small positive systems with a ridge on their diagonals."""
    size = matrices.shape[-1]
    if floor is None:
        floor = matrices.diagonal(dim1=-2, dim2=-1).mean(-1)
    added = (ridge * floor + _LEAST)[..., None, None]
    identity = torch.eye(size, dtype=matrices.dtype, device=matrices.device)
    solved, _ = torch.linalg.solve_ex(matrices + added * identity, vectors[..., None])
    solution: Tensor = solved[..., 0]
    return solution
