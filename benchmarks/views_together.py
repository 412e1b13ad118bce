"""What coding the views of an image together could save: estimates on real softmax rows.

    python benchmarks/views_together.py real_rows_32views.npz --views 1 4 32 --json out.json

Each file has an array ``probs``, images x views x classes. Prints a Markdown table of bytes a view
against KL: the label codec, which codes each view by itself, and a model that the views of an image
share. Nothing here writes labels: the bytes of the model are ideal code lengths, with tables
counted on the other half of the images.

The model. An image lists M classes; all others are one entry, spread evenly. Over these entries

    ln p_v = sum over r of weight_vr component_r + step residual_v - ln Z_v

with R components of the image, two or three numbers for each view, and few residuals, small
integers, most of them 0. R and M are those of the least KL + slope * bits for each image. R = 1 is
one distribution for the image, raised to a power for each view.
"""

import argparse
import datetime
import itertools
import json
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import label_codec
from mealv2.codec import encode

SLOPES = (0.00005, 0.0001, 0.0002, 0.0004)  # nats of KL that a bit must save
LISTS, COMPONENTS = (32, 64, 128, 200, 320), (1, 2, 3)
RATES = (0.0003, 0.0005, 0.0007, 0.001, 0.002)
WEIGHT_BITS, LENGTH_BITS, RANGE_BITS, LIST_LENGTH_BITS = 5, 8, 24, 10
RESIDUAL_STEP, MAX_RESIDUAL, MAX_CODE = 0.6, 8, 40
FIT_STEPS, REFIT_STEPS, SWEEPS, ROUNDS = 200, 40, 3, 3
_RESIDUALS = torch.arange(-MAX_RESIDUAL, MAX_RESIDUAL + 1, dtype=torch.float64)


class Views(NamedTuple):
    """The views of images over the listed classes and, last, all others: K = M + 1 entries.

    ``probs_IVK``; ``negentropy_IV``, sum of p ln p over all classes; ``classes_K``, the ln of the
    number of classes in an entry; ``list_bits``, what the list of an image takes.
    """

    probs_IVK: Tensor
    negentropy_IV: Tensor
    classes_K: Tensor
    list_bits: float


class Fitted(NamedTuple):
    """The model without residuals: ``base_IVK``, codes of the components, bits of all but them."""

    base_IVK: Tensor
    codes_IRK: Tensor
    bits_IV: Tensor


def listed(probs_IVC: Tensor, num_listed: int) -> Views:
    """Return the views over the classes with the largest mean, and all others."""
    num_images, num_views, num_classes = probs_IVC.shape
    ids_IM = probs_IVC.mean(1).topk(num_listed, dim=1).indices
    kept_IVM = probs_IVC.gather(2, ids_IM[:, None].expand(num_images, num_views, num_listed))
    rest_IV1 = (1.0 - kept_IVM.sum(2, keepdim=True)).clamp_min(1e-12)
    classes_K = torch.zeros(num_listed + 1, dtype=torch.float64)
    classes_K[-1] = math.log(num_classes - num_listed)
    choices = [math.lgamma(n + 1) for n in (num_classes, num_listed, num_classes - num_listed)]
    bits = (choices[0] - choices[1] - choices[2]) / math.log(2) + LIST_LENGTH_BITS
    negentropy_IV = torch.xlogy(probs_IVC, probs_IVC).sum(2)
    return Views(torch.cat([kept_IVM, rest_IV1], 2), negentropy_IV, classes_K, bits)


def divergence(views: Views, base_IVK: Tensor) -> Tensor:
    """Return KL(p || recovered) of views, I x V, for log weights of the entries' classes."""
    total_IV = torch.logsumexp(base_IVK + views.classes_K, -1)
    return views.negentropy_IV - (views.probs_IVK * base_IVK).sum(-1) + total_IV


def fit(views: Views, num_components: int) -> Fitted:
    """Return the components and weights of the least KL, rounded to what is stored."""
    weights_IVR, components_IRK = _start(views, num_components)
    weights_IVR, components_IRK = _descend(views, weights_IVR, components_IRK, FIT_STEPS)
    largest_IR = weights_IVR.abs().amax(1).clamp_min(1e-6)
    largest_IR[:, 0] = 1.0
    step = 0.5 if num_components == 1 else 1.0
    codes_IRK = (components_IRK * largest_IR[..., None] / step).round()
    codes_IRK = codes_IRK.clamp(-MAX_CODE, MAX_CODE)
    weights_IVR = weights_IVR / largest_IR[:, None]
    weights_IVR, _ = _descend(views, weights_IVR, codes_IRK * step, REFIT_STEPS, move_all=False)
    low_I1R, high_I1R = weights_IVR.amin(1, keepdim=True), weights_IVR.amax(1, keepdim=True)
    grid_I1R = ((high_I1R - low_I1R) / (2**WEIGHT_BITS - 1)).clamp_min(1e-9)
    weights_IVR = low_I1R + ((weights_IVR - low_I1R) / grid_I1R).round() * grid_I1R
    shared = (views.list_bits + RANGE_BITS * num_components) / weights_IVR.shape[1]
    bits = shared + WEIGHT_BITS * num_components + LENGTH_BITS
    return Fitted(
        weights_IVR @ (codes_IRK * step), codes_IRK, torch.full_like(views.negentropy_IV, bits)
    )


def _start(views: Views, num_components: int) -> tuple[Tensor, Tensor]:
    """Return the mean's logarithm with weight 1, then singular vectors of what is left."""
    probs_IVK, classes_K = views.probs_IVK, views.classes_K
    mean_I1K = probs_IVK.mean(1, keepdim=True)
    log_mean_I1K = mean_I1K.clamp_min(1e-12).log() - classes_K
    first_I1K = log_mean_I1K - log_mean_I1K[..., :1]
    weights_IVR = torch.ones(*probs_IVK.shape[:2], 1, dtype=torch.float64)
    log_IVK = probs_IVK.clamp_min(1e-10).log() - classes_K
    left_IVK = (log_IVK - log_IVK[..., :1] - first_I1K) * mean_I1K.sqrt()
    u_IVR, s_IR, v_IRK = torch.linalg.svd(left_IVK, full_matrices=False)
    more = min(num_components - 1, s_IR.shape[1])
    root_IR = s_IR[:, :more].sqrt()
    rest_IRK = v_IRK[:, :more] * root_IR[..., None] / mean_I1K.sqrt()
    components_IRK = torch.cat([first_I1K, rest_IRK - rest_IRK[..., :1]], 1)
    return torch.cat([weights_IVR, u_IVR[..., :more] * root_IR[:, None]], 2), components_IRK


def _descend(
    views: Views, weights_IVR: Tensor, components_IRK: Tensor, steps: int, *, move_all: bool = True
) -> tuple[Tensor, Tensor]:
    """Return weights, and components if ``move_all``, after steps of Adam on the KL."""
    weights_IVR = weights_IVR.clone().requires_grad_()
    components_IRK = components_IRK.clone().requires_grad_(move_all)
    moved = [weights_IVR, components_IRK] if move_all else [weights_IVR]
    optimizer = torch.optim.Adam(moved, lr=0.05)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 0.05 * (1.0 - step / steps) + 1e-3
        optimizer.zero_grad()
        divergence(views, weights_IVR @ components_IRK).sum().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    components_IRK = components_IRK.detach()
    return weights_IVR.detach(), components_IRK - components_IRK[..., :1]


# --- residuals ------------------------------------------------------------------------------------


def places(num_entries: int) -> Tensor:
    """Return the table of each entry: three for each octave of ranks, one for all others."""
    ranks = torch.arange(1, num_entries, dtype=torch.float64)
    tables_M = (3.0 * ranks.log2()).long()
    return torch.cat([tables_M, tables_M[-1:] + 1])


def residuals(
    views: Views, base_IVK: Tensor, bits_TS: Tensor, slope: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return residuals I x V x K of the least KL + slope * bits, that KL, and their bits, I x V.

    One entry after the other takes its best value, given the others; the same again.
    """
    table_K = places(base_IVK.shape[-1])
    shape = base_IVK.shape[:2]
    probs_NK, base_NK = views.probs_IVK.flatten(0, 1), base_IVK.flatten(0, 1)
    weights_NK = (base_NK - base_NK.amax(1, keepdim=True) + views.classes_K).exp()
    factor_S = (RESIDUAL_STEP * _RESIDUALS).exp()
    chosen_NK = torch.full(base_NK.shape, MAX_RESIDUAL)
    total_N = weights_NK.sum(1)
    for _, k in itertools.product(range(SWEEPS), reversed(range(base_NK.shape[1]))):
        others_N = (total_N - weights_NK[:, k] * factor_S[chosen_NK[:, k]]).clamp_min(1e-30)
        totals_NS = others_N[:, None] + weights_NK[:, k, None] * factor_S
        gain_NS = RESIDUAL_STEP * _RESIDUALS * probs_NK[:, k, None]
        best_N = (totals_NS.log() - gain_NS + slope * bits_TS[table_K[k]]).argmin(1)
        chosen_NK[:, k] = best_N
        total_N = totals_NS.gather(1, best_N[:, None])[:, 0]
    kl_IV = divergence(views, base_IVK + RESIDUAL_STEP * _RESIDUALS[chosen_NK].view_as(base_IVK))
    return chosen_NK.view_as(base_IVK), kl_IV, bits_TS[table_K, chosen_NK].sum(1).view(shape)


def code_lengths(values: Tensor, table_K: Tensor, size: int) -> Tensor:
    """Return ideal code lengths, tables x values, counted over values ... x K."""
    counts = torch.full((int(table_K.max()) + 1, size), 0.02, dtype=torch.float64)
    flat = (table_K * size + values).flatten()
    counts += torch.bincount(flat, minlength=counts.numel()).view_as(counts)
    return -(counts / counts.sum(1, keepdim=True)).log2()


def component_bits(codes_IRK: Tensor, counted_IRK: Tensor) -> Tensor:
    """Return the bits of each image's components, with tables counted on other images."""
    table_R1 = torch.arange(codes_IRK.shape[1])[:, None]
    size = 2 * MAX_CODE + 1
    lengths_RS = code_lengths(counted_IRK.long() + MAX_CODE, table_R1, size)
    return lengths_RS[table_R1, codes_IRK.long() + MAX_CODE].sum((1, 2))


# --- tables ---------------------------------------------------------------------------------------


def model(probs_IVC: Tensor, num_listed: int, num_components: int, slope: float) -> Tensor:
    """Return KL and bits a view of each image, 2 x I; each half has the other's tables."""
    halves = [listed(probs_IVC[half::2], num_listed) for half in (0, 1)]
    fitted = [fit(views, num_components) for views in halves]
    found = torch.zeros(2, len(probs_IVC), dtype=torch.float64)
    size = len(_RESIDUALS)
    for half in (0, 1):
        other = 1 - half
        table_K = places(num_listed + 1)
        bits_TS = (_RESIDUALS.abs() + (_RESIDUALS != 0) + 0.3).expand(int(table_K.max()) + 1, size)
        for _ in range(ROUNDS):
            values, _, _ = residuals(halves[other], fitted[other].base_IVK, bits_TS, slope)
            bits_TS = code_lengths(values, table_K, size)
        _, kl_IV, bits_IV = residuals(halves[half], fitted[half].base_IVK, bits_TS, slope)
        shared_I = component_bits(fitted[half].codes_IRK, fitted[other].codes_IRK)
        bits_IV = bits_IV + fitted[half].bits_IV + shared_I[:, None] / kl_IV.shape[1]
        found[:, half::2] = torch.stack([kl_IV.mean(1), bits_IV.mean(1)])
    return found


def today(probs_IVC: Tensor, rate: float) -> Tensor:
    """Return KL and bits a view of each image with the label codec, 2 x I."""
    num_images, num_views, num_classes = probs_IVC.shape
    rows_NC = probs_IVC.reshape(-1, num_classes)
    labels = encode(rows_NC.float(), rate=rate)
    kl_N = label_codec.divergence(rows_NC, lambda _, n: labels[n : n + 1000].to_dense())
    bits_N = 8.0 * (labels.sizes() + labels.count_size).double()
    return torch.stack([each.view(num_images, num_views).mean(1) for each in (kl_N, bits_N)])


def best(found_XI: Sequence[Tensor], slope: float) -> tuple[float, float, list[int]]:
    """Return mean bytes and KL of the best candidate of each image, and how often each is it."""
    kl_XI, bits_XI = torch.stack(list(found_XI), 1)
    chosen_I = (kl_XI + slope * bits_XI).argmin(0)[None]
    counts = torch.bincount(chosen_I[0], minlength=len(kl_XI)).tolist()
    return (
        float(bits_XI.gather(0, chosen_I).mean()) / 8,
        float(kl_XI.gather(0, chosen_I).mean()),
        counts,
    )


def bytes_at(points: Sequence[tuple[float, float]], kl: float) -> float:
    """Return the bytes of a curve of (bytes, KL) at a KL, by ln bytes over ln KL; NaN outside."""
    by_kl = sorted(points, key=lambda point: point[1])
    sizes, losses = np.log(np.array(by_kl)).T
    return float(np.exp(np.interp(math.log(kl), losses, sizes, left=np.nan, right=np.nan)))


def measure(probs_IVC: Tensor) -> list[tuple[str, float, float]]:
    """Return (labels, bytes a view, KL) of the codec, and of the model with up to R components."""
    rows = []
    own = {rate: today(probs_IVC, rate) for rate in RATES}
    for rate, found in own.items():
        rows.append((f"label codec, rate {rate:g}", *best([found], 0.0)[:2]))
    for slope in SLOPES:
        candidates = list(own.values())
        for num_components in COMPONENTS:
            if num_components > probs_IVC.shape[1]:
                break
            candidates += [
                model(probs_IVC, num_listed, num_components, slope)
                for num_listed in LISTS
                if num_listed < probs_IVC.shape[2]
            ]
            size, kl, _ = best(candidates, slope)
            rows.append((f"up to {num_components} components, slope {slope:g}", size, kl))
    return rows


def main(words: Sequence[str] | None = None) -> None:
    """Print the table."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("rows", type=Path, nargs="+", help=".npz with probs, images x views x C")
    parser.add_argument("--views", type=int, nargs="*", help="numbers of views; default: all")
    parser.add_argument("--kl", type=float, default=0.024, help="KL at which bytes are compared")
    parser.add_argument("--json", type=Path, help="write the measured points here too")
    given = parser.parse_args(words)
    table, points = [], {}
    for path in given.rows:
        probs_IVC = torch.from_numpy(np.load(path, allow_pickle=False)["probs"]).double()
        for num_views in given.views or [probs_IVC.shape[1]]:
            name = f"{path.stem}, {num_views} views"
            rows = measure(probs_IVC[:, :num_views])
            points[name] = rows
            table += [[name, labels, f"{size:.1f}", f"{kl:.4f}"] for labels, size, kl in rows]
            for label in ("label codec", *(f"up to {r} components" for r in COMPONENTS)):
                curve = [row[1:] for row in rows if row[0].startswith(label)]
                if curve:
                    at = bytes_at(curve, given.kl)
                    table.append([name, f"**{label}**", f"{at:.1f}", f"**{given.kl:g}**"])
            print(name, file=sys.stderr, flush=True)
    print(label_codec.table(["rows", "labels", "bytes a view", "KL"], table))
    print(f"{datetime.date.today()}, {os.cpu_count()} cores, torch {torch.__version__}")
    if given.json:
        given.json.write_text(json.dumps(points))


if __name__ == "__main__":
    main()
