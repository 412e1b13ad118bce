"""Bytes per view against what is lost: the label codec, fixed top-k, FKD's and TinyViT's layouts.

    python benchmarks/label_codec.py

Simulated 1,000-class ensembles of two teachers, four populations; prints Markdown tables.
benchmarks/views_together.py has real rows.
"""

import argparse
import datetime
import os
import platform
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from mealv2.codec import encode

NUM_CLASSES, NUM_DOMAINS, NUM_GROUPS, WIDTH = 1000, 12, 90, 96
RATES = (0.005, 0.002, 0.001, 0.0009, 0.0003, 0.0001)
IMAGES_AT_ONCE = 50

# Tuned to the means of docs/benchmarks/label-codec.md: scale of the logits, weight of the noise per
# class, spread of the views' log temperature, clutter in small crops, noise of an image, smoothing.
POPULATIONS = {
    "base": (20.7, 0.93, 0.343, 0.969, 0.355, 0.0),
    "ls": (26.8, 1.01, 0.436, 0.935, 0.36, 0.09),
    "sharp": (34.3, 1.21, 0.379, 0.818, 0.445, 0.0),
    "soft": (14.4, 0.92, 0.389, 1.198, 0.281, 0.0),
}


def population(name: str, num_images: int, num_views: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return (ensemble probabilities N x 1000, true classes N) of crops of images.

    Class prototypes lie in a hierarchy of domains, groups and leaves; each teacher has its own
    perturbed copy. An image is a prototype, noise, and in 3 of 10 a second object; a view sees the
    less of it, and the more of another class, the smaller its crop (area uniform in 0.08..1).
    Student-t noise per class is half the image's and half the view's. The label is the mean of the
    two softmaxes.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    def direction(*shape: int) -> Tensor:
        return torch.nn.functional.normalize(normal(*shape), dim=-1)

    def student_t(*shape: int) -> Tensor:  # 4 degrees of freedom
        return normal(*shape) / (sum(normal(*shape).square() for _ in range(4)) / 4.0) ** 0.5

    scale, noise_weight, spread, clutter, image_noise, smoothing = POPULATIONS[name]
    group_C = torch.arange(NUM_CLASSES) % NUM_GROUPS
    domains, groups = direction(NUM_DOMAINS, WIDTH), direction(NUM_GROUPS, WIDTH)
    tree = 0.7 * domains[group_C % NUM_DOMAINS] + 0.8 * groups[group_C]
    classes_CD = torch.nn.functional.normalize(tree + 0.8 * direction(NUM_CLASSES, WIDTH), dim=-1)
    teachers = [
        torch.nn.functional.normalize(classes_CD + 0.35 * direction(NUM_CLASSES, WIDTH), dim=-1)
        for _ in range(2)
    ]
    parts, truths = [], []
    for _ in range(0, num_images, IMAGES_AT_ONCE):
        n, m = IMAGES_AT_ONCE, num_views
        truth, second = torch.randint(0, NUM_CLASSES, (2, n), generator=generator)
        other = torch.randint(0, NUM_CLASSES, (n, m), generator=generator)
        has_second = 0.6 * (torch.rand(n, 1, generator=generator) < 0.3)
        image = (
            classes_CD[truth] + image_noise * direction(n, WIDTH) + has_second * classes_CD[second]
        )
        area = 0.08 + 0.92 * torch.rand(n, m, 1, generator=generator)
        seen = area**0.3 * image[:, None]
        seen = seen + clutter * (1.0 - area) * torch.exp(0.8 * normal(n, m, 1)) * classes_CD[other]
        seen = seen + 0.6 * image_noise * direction(n, m, WIDTH)
        seen = torch.nn.functional.normalize(seen, dim=-1)
        sharpness = torch.exp(spread * normal(n, m, 1))
        of_image = student_t(n, 1, NUM_CLASSES)
        probs = torch.zeros(n, m, NUM_CLASSES)
        for teacher_CD in teachers:
            noise = 0.7 * of_image + 0.7 * student_t(n, m, NUM_CLASSES)
            logits = sharpness * (scale * seen @ teacher_CD.T + noise_weight * noise)
            probs += 0.5 * torch.softmax(logits, dim=-1)
        parts.append(probs.flatten(0, 1) * (1.0 - smoothing) + smoothing / NUM_CLASSES)
        truths.append(truth.repeat_interleave(m))
    return torch.cat(parts)[: num_images * num_views], torch.cat(truths)[: num_images * num_views]


def describe(probs_NC: Tensor, truth_N: Tensor) -> list[str]:
    """Return the population's means as cells: top-1, median, top-5, 10, 50, 100, …"""
    mass_NK = probs_NC.topk(100, dim=1).values
    top = mass_NK.cumsum(1).mean(0)
    entropy = -torch.xlogy(probs_NC, probs_NC).sum(1).mean()
    right = (probs_NC.argmax(1) == truth_N).float().mean()
    figures = [top[0], mass_NK[:, 0].median(), top[4], top[9], top[49], top[99]]
    figures += [probs_NC.gather(1, truth_N[:, None]).mean(), right]
    cells = [f"{float(figure):.3f}" for figure in figures]
    return [*cells, f"{float(entropy):.2f}", f"{float(mass_NK[:, 99].median()):.0e}"]


# --- what is lost ---------------------------------------------------------------------------------


def divergence(probs_NC: Tensor, recovered: Callable[[Tensor, int], Tensor]) -> Tensor:
    """Return KL(p || recovered) of each row, N, float64; ``recovered(chunk, first row)``."""
    found = []
    for first in range(0, len(probs_NC), 1000):
        exact = probs_NC[first : first + 1000].double()
        other = recovered(probs_NC[first : first + 1000], first).double().clamp_min(1e-30)
        found.append((torch.xlogy(exact, exact) - torch.xlogy(exact, other)).sum(1))
    return torch.cat(found)


class Layout(NamedTuple):
    """A layout of k classes a view: its bytes, its type, and what it has for all other classes.

    ``rest``: their probability is ``stored``; or it is the ``sum`` that is missing to 1; or there
    is ``none``, and the k are divided by their sum.
    """

    k: int
    size: int
    dtype: torch.dtype
    rest: str


LAYOUTS = {
    **{
        f"top-{k}, uint16 + float16": Layout(k, 4 * k + 2, torch.float16, "stored")
        for k in (5, 10, 20, 100)
    },
    "FKD k5, float32": Layout(5, 40, torch.float32, "sum"),
    "FKD k5, float16": Layout(5, 20, torch.float16, "sum"),
    "FKD k10, float32": Layout(10, 80, torch.float32, "sum"),
    "FKD k10, float16": Layout(10, 40, torch.float16, "sum"),
    "TinyViT K=100": Layout(100, 404, torch.float16, "sum"),
    "top-10 pruned, uint16 + float16, others 0": Layout(10, 40, torch.float16, "none"),
}


def recovered_by(layout: Layout) -> Callable[[Tensor, int], Tensor]:
    """Return a function for ``divergence``: what a layout recovers of rows."""

    def recovered(probs_NC: Tensor, _: int) -> Tensor:
        num_classes = probs_NC.shape[1]
        kept_NK, indices_NK = probs_NC.topk(layout.k, dim=1)
        rest_N = probs_NC.scatter(1, indices_NK, 0.0).sum(1).to(layout.dtype).float()
        kept_NK = kept_NK.to(layout.dtype).float()
        if layout.rest == "sum":  # as the peers have it: may be a little below 0
            rest_N = 1.0 - kept_NK.sum(1)
        if layout.rest == "none":
            rest_N = torch.zeros_like(rest_N)
        dense_NC = (rest_N / (num_classes - layout.k))[:, None].repeat(1, num_classes)
        dense_NC.scatter_(1, indices_NK, kept_NK)
        return dense_NC if layout.rest == "sum" else dense_NC / dense_NC.sum(1, keepdim=True)

    return recovered


def layout_rows(name: str, probs_NC: Tensor) -> list[list[str]]:
    rows = []
    for title, layout in LAYOUTS.items():
        lost = divergence(probs_NC, recovered_by(layout))
        rows.append([name, title, f"{layout.size:.1f}", *losses(lost)])
    return rows


def codec_rows(name: str, probs_NC: Tensor, num_views: int) -> list[list[str]]:
    rows = []
    for title, views in (("codec", num_views), ("each view by itself", 1)):
        for rate in RATES:
            labels = encode(probs_NC, rate=rate, num_views=views)
            lost = divergence(
                probs_NC, lambda part, n, labels=labels: labels[n : n + len(part)].to_dense()
            )
            size = f"{labels.nbytes / len(labels):.1f}"
            rows.append([name, f"**{title}, rate {rate:g}**", size, *losses(lost)])
    return rows


def losses(lost_N: Tensor) -> list[str]:
    """Return cells: the mean and the 99th percentile."""
    return [f"{float(lost_N.mean()):.4f}", f"{float(lost_N.quantile(0.99)):.3f}"]


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--views", type=int, default=16)
    options = parser.parse_args()
    torch.set_num_threads(1)

    described, rows = [], []
    for name in POPULATIONS:
        probs_NC, truth_N = population(name, options.images, options.views)
        described.append([name, *describe(probs_NC, truth_N)])
        rows += codec_rows(name, probs_NC, options.views) + layout_rows(name, probs_NC)
    masses = ["top-1", "median top-1", "top-5", "top-10", "top-50", "top-100", "true class"]
    print(table(["population", *masses, "right", "entropy", "p at rank 100"], described))
    print(table(["population", "labels", "bytes a view", "KL", "p99"], rows))
    print(
        f"{options.images} images x {options.views} views; "
        f"{datetime.date.today()}, {os.cpu_count()} cores, {platform.machine()}, "
        f"torch {torch.__version__}"
    )


if __name__ == "__main__":
    main()
