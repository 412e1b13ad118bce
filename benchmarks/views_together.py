"""Bytes a view against KL on real softmax rows: the label codec with and without shared models.

    python benchmarks/views_together.py rows.npz --views 1 4 32
    python benchmarks/views_together.py --simulated 100
    python benchmarks/views_together.py rows.npz --added 16 --views 1 4 8

Each file has an array ``probs``, images x views x classes; files in one argument, joined by commas,
are joined by images. Prints a Markdown table for each number of views: the label codec with the
views of an image together, with each view by itself, an entropy bound, and others' layouts. Bytes
are those of the blocks, as a label set has them; KL is KL(p || recovered), nats, the mean over
views.

The entropy bound is the size of the same labels if an ideal coder coded the symbols of the
residuals, each in its own context with the frequencies of these very rows, and the components and
weights as they are. So it bounds a better code for the residuals, not a better model.

``--added N`` measures views that are added to N first ones: a block of them with a model of its
own, or with that of the first block where this is less.
"""

import argparse
import datetime
import json
import math
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import residual_codes
from benchmarks.label_codec import LAYOUTS, divergence, population, recovered_by, table
from mealv2.codec import EncodedLabels, encode
from mealv2.codec.encoder import BITS_OF_CLASS
from mealv2.codec.residuals import RUNS, VALUES

RATES = (0.0003, 0.0005, 0.001, 0.002, 0.003, 0.005)
ADDED_RATES = (*RATES, 0.008)
TOGETHER, ALONE, BOUND = "codec, views together", "codec, each view by itself", "entropy bound"
OWN_BLOCK, FIRST_MODEL = "added views, block of their own", "added views, or the first model"

Points = dict[str, list[tuple[float, float, float]]]


def measure(probs_IVC: Tensor, rates: Sequence[float] = RATES) -> Points:
    """Return (rate, bytes a view, mean KL) of the codec's curves; a layout has one point."""
    num_views = probs_IVC.shape[1]
    rows_NC = probs_IVC.flatten(0, 1).float()
    points: Points = {TOGETHER: [], ALONE: [], BOUND: []}
    for rate in rates:
        for name, views in ((ALONE, 1), (TOGETHER, num_views)):
            labels = encode(rows_NC, rate=rate, num_views=views)
            points[name].append((rate, labels.nbytes / len(labels), mean_kl(rows_NC, labels)))
        if num_views > 1:
            is_shared_I = [block[0] > 0 for block in labels.blocks(num_views)]
            saved = saved_bytes(probs_IVC, rate / BITS_OF_CLASS, torch.tensor(is_shared_I))
            _, size, kl = points[TOGETHER][-1]
            points[BOUND].append((rate, size - saved, kl))
    for name, layout in LAYOUTS.items():
        kl = float(divergence(rows_NC, recovered_by(layout)).mean())
        points[name] = [(math.nan, layout.size, math.inf if layout.rest == "none" else kl)]
    return points


def measure_added(
    probs_IVC: Tensor, num_first: int, rates: Sequence[float] = ADDED_RATES
) -> Points:
    """Return (rate, bytes a view, mean KL) of the views after the first ones, one block of them."""
    first_IVC, added_IVC = probs_IVC[:, :num_first].float(), probs_IVC[:, num_first:].float()
    rows_NC, num_views = added_IVC.flatten(0, 1), added_IVC.shape[1]
    points: Points = {OWN_BLOCK: [], FIRST_MODEL: []}
    for rate in rates:
        first = encode(first_IVC.flatten(0, 1), rate=rate, num_views=num_first)[::num_first]
        for name, models in ((OWN_BLOCK, None), (FIRST_MODEL, first)):
            labels = encode(rows_NC, rate=rate, num_views=num_views, first=models)
            points[name].append((rate, labels.nbytes / len(labels), mean_kl(rows_NC, labels)))
    return points


def mean_kl(rows_NC: Tensor, labels: EncodedLabels) -> float:
    """Return the mean KL(p || recovered) in nats."""
    kl_N = divergence(rows_NC, lambda part, n: labels[n : n + len(part)].to_dense())
    return float(kl_N.mean())


def saved_bytes(probs_IVC: Tensor, slope: float, is_shared_I: Tensor) -> float:
    """Return by how much an ideal code of the residuals' symbols is shorter, bytes a view.

    Only images whose views share a model have residuals; the bytes are over all views.
    """
    if not is_shared_I.any():
        return 0.0
    bits = 0.0
    counted = residual_codes.count([probs_IVC[is_shared_I].numpy()], slopes=[slope])
    for counts_XS, codes in zip(counted, (RUNS, VALUES), strict=True):
        totals_X1 = np.maximum(counts_XS.sum(axis=1, keepdims=True), 1.0)
        ideal_XS = -np.log2(np.maximum(counts_XS, 1.0) / totals_X1)  # 0 times any are 0
        bits += float((counts_XS * (codes.lengths_XS - ideal_XS)).sum())
    return bits / 8.0 / (probs_IVC.shape[0] * probs_IVC.shape[1])


def bytes_at(points: Sequence[tuple[float, float, float]], kl: float) -> float:
    """Return the bytes of a curve at a KL, by ln bytes over ln KL; NaN outside."""
    by_kl = sorted((loss, size) for _, size, loss in points)
    if not by_kl:
        return math.nan
    losses, sizes = np.log(np.array(by_kl)).T
    return float(np.exp(np.interp(math.log(kl), losses, sizes, left=np.nan, right=np.nan)))


def rows_of(name: str, points: Points) -> list[list[str]]:
    """Return the cells of every measured point."""
    rows = []
    for labels, curve in points.items():
        for rate, size, loss in curve:
            title = labels if math.isnan(rate) else f"{labels}, rate {rate:g}"
            lost = f"{loss:.4f}" if math.isfinite(loss) else "infinite"
            rows.append([name, title, f"{size:.1f}", lost])
    return rows


def summary_of(name: str, points: Points, kl: float) -> list[str]:
    """Return cells: bytes at one KL of each curve, the share, and of the layouts size and KL."""
    together, alone, bound = (bytes_at(points[curve], kl) for curve in (TOGETHER, ALONE, BOUND))
    sizes = [f"{size:.1f}" for size in (alone, together)]
    if math.isnan(bound):
        return [name, *sizes, f"{together / alone:.2f}", ""]
    return [name, *sizes, f"{together / alone:.2f}", f"{bound:.1f}"]


def sources(given: Any) -> Iterator[tuple[str, Tensor]]:
    """Yield names and rows, images x views x classes."""
    for files in given.rows:
        paths = [Path(path) for path in files.split(",")]
        arrays = [np.load(path, allow_pickle=False)["probs"] for path in paths]
        yield " + ".join(path.stem for path in paths), torch.from_numpy(np.concatenate(arrays))
    if given.simulated:
        num_views = max(given.views or [32])
        rows_NC, _ = population("base", given.simulated, num_views)
        yield "simulated base", rows_NC.unflatten(0, (-1, num_views))


def main(words: Sequence[str] | None = None) -> None:
    """Print the tables."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("rows", nargs="*", help=".npz with probs, images x views x C")
    parser.add_argument("--simulated", type=int, default=0, metavar="IMAGES")
    parser.add_argument("--views", type=int, nargs="*", help="numbers of views; default: all")
    parser.add_argument("--added", type=int, metavar="FIRST", help="measure views after these")
    parser.add_argument("--kl", type=float, default=0.024, help="KL at which bytes are compared")
    parser.add_argument("--json", type=Path, help="write the measured points here too")
    given = parser.parse_args(words)
    torch.set_num_threads(1)
    rows, summary, found = [], [], {}
    first = given.added or 0
    for source, probs_IVC in sources(given):
        for num_views in given.views or [probs_IVC.shape[1] - first]:
            name = f"{source}, {len(probs_IVC)} images x {num_views} views"
            some_IVC = probs_IVC[:, : first + num_views]
            if first:
                name += f" added to {first}"
                points = measure_added(some_IVC, first)
                sizes = [bytes_at(points[curve], given.kl) for curve in (OWN_BLOCK, FIRST_MODEL)]
                shown = [f"{size:.1f}" for size in sizes]
                summary.append([name, *shown, f"{sizes[1] / sizes[0]:.2f}"])
            else:
                points = measure(some_IVC)
                summary.append(summary_of(name, points, given.kl))
            found[name] = points
            rows += rows_of(name, points)
            print(name, file=sys.stderr, flush=True)
    head = ["rows", ALONE, TOGETHER, "share", BOUND]
    if first:
        head = ["rows", OWN_BLOCK, FIRST_MODEL, "share"]
    print(f"Bytes a view at KL {given.kl:g}:\n")
    print(table(head, summary))
    print(table(["rows", "labels", "bytes a view", "KL"], rows))
    print(f"{datetime.date.today()}, {os.cpu_count()} cores, torch {torch.__version__}")
    if given.json:
        given.json.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
