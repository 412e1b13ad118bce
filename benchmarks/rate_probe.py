r"""What a rate of the label codec costs a linear probe on real features with 1,000 classes.

    python -m benchmarks.rate_probe --labels dense --data-dir imagenet --backbone FOLDER \
        --cache probe.npz

``--labels`` is a label set of exact values (`--topk all --label-dtype float32`). A linear layer on
256 principal components of the backbone's pooled features learns the labels of every second view of
four fifths of the images, encoded at each rate with the codec (all views together), and is compared
with the exact labels of their other views, and of the other images. Seeds draw the images; the arms
of a seed have the same images, start and batches. Prints a Markdown table with differences to exact
labels, paired by seed, and 95 % intervals.
"""

import argparse
import datetime
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import timm
import torch
from torch import Tensor, nn

from benchmarks.label_codec import table
from mealv2.dataset import SoftLabelDataset
from mealv2.intervals import interval
from mealv2.soft_labels import encode, top_k

RATES = (0.0003, 0.001, 0.002, 0.004, 0.016, 0.064)
TOPK = 10
FEATURES = 256  # principal components of the backbone's
STEPS, BATCH_SIZE, LEARNING_RATE, WEIGHT_DECAY = 400, 128, 3e-3, 1e-4
HELD_OUT = 0.2


def features_and_probs(
    labels: Path, data_dir: Path, backbone: Path, batch_size: int
) -> tuple[Tensor, Tensor]:
    """Return pooled features I x V x F and the exact labels I x V x C of all views."""
    data = SoftLabelDataset(labels, data_dir, label="probs")
    num_views = data.label_set.num_views
    network = timm.create_model(f"local-dir:{backbone}", pretrained=True, num_classes=0).eval()
    mean, std = (
        torch.tensor(network.pretrained_cfg[name]).view(3, 1, 1) for name in ("mean", "std")
    )
    places = [(image, view) for image in range(len(data)) for view in range(num_views)]
    features, probs = [], []
    for start in range(0, len(places), batch_size):
        items = data.__getitems__(places[start : start + batch_size])
        images_BCHW = torch.stack([image for image, _ in items]) / 255.0
        with torch.inference_mode():
            features.append(network((images_BCHW - mean) / std))
        probs.append(torch.stack([each for _, each in items]))  # type: ignore[misc]
        print(f"{start + len(items)} of {len(places)} views", file=sys.stderr, end="\r")
    shape = (len(data), num_views, -1)
    return torch.cat(features).view(shape).clone(), torch.cat(probs).view(shape)


def arms(probs_IVC: Tensor) -> dict[str, tuple[float, Tensor]]:
    """Return the bytes a view and the recovered labels of each way to keep them."""
    num_views, num_classes = probs_IVC.shape[1:]
    rows_NC = probs_IVC.reshape(-1, num_classes)
    found = {"exact": (4.0 * num_classes, probs_IVC)}
    for rate in RATES:
        encoded = encode(rows_NC, rate=rate, num_views=num_views)
        size = encoded.nbytes / len(encoded)
        found[f"rate {rate:g}"] = (size, encoded.to_dense().view_as(probs_IVC))
    kept = top_k(rows_NC, TOPK).rounded(torch.float16)
    found[f"top-{TOPK}, float16"] = (4.0 * TOPK + 2.0, kept.to_dense().view_as(probs_IVC))
    hard_NC = torch.nn.functional.one_hot(rows_NC.argmax(1), num_classes).float()
    found["likeliest class"] = (2.0, hard_NC.view_as(probs_IVC))
    return found


def fit(features_NF: Tensor, probs_NC: Tensor, seed: int) -> nn.Linear:
    """Return a linear layer that learned the labels."""
    generator = torch.Generator().manual_seed(seed)
    layer = nn.Linear(features_NF.shape[1], probs_NC.shape[1])
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    for _ in range(STEPS):
        chosen_B = torch.randint(0, len(features_NF), (BATCH_SIZE,), generator=generator)
        log_probs_BC = torch.log_softmax(layer(features_NF[chosen_B]), dim=1)
        loss = -(probs_NC[chosen_B] * log_probs_BC).sum(1).mean()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
    return layer


def compare(layer: nn.Linear, features_NF: Tensor, probs_NC: Tensor) -> tuple[float, float]:
    """Return KL(exact || probe) in nats and the agreement of the likeliest class in percent."""
    with torch.no_grad():
        log_probs_NC = torch.log_softmax(layer(features_NF), dim=1)
    kl_N = (torch.xlogy(probs_NC, probs_NC) - probs_NC * log_probs_NC).sum(1)
    agrees_N = log_probs_NC.argmax(1) == probs_NC.argmax(1)
    return float(kl_N.mean()), 100.0 * float(agrees_N.double().mean())


def measure(features_IVF: Tensor, probs_IVC: Tensor, seeds: int) -> list[list[str]]:
    """Return the rows of the table."""
    features_NF = features_IVF.flatten(0, 1)
    features_NF = features_NF - features_NF.mean(0)
    left_NF, spread_F, _ = torch.linalg.svd(features_NF, full_matrices=False)
    scaled_NF = left_NF[:, :FEATURES] * spread_F[:FEATURES] / spread_F[0] * len(left_NF) ** 0.5
    features_IVF = scaled_NF.view(*features_IVF.shape[:2], -1)
    kinds = arms(probs_IVC)
    found: dict[str, list[tuple[float, ...]]] = {name: [] for name in kinds}
    for seed in range(seeds):
        order = torch.from_numpy(np.random.default_rng(seed).permutation(len(probs_IVC)))
        held, kept = order.tensor_split([round(HELD_OUT * len(order))])
        for name, (_, labels_IVC) in kinds.items():
            learned = features_IVF[kept, ::2], labels_IVC[kept, ::2]
            layer = fit(*(part.flatten(0, 1) for part in learned), seed)
            views = features_IVF[kept, 1::2], probs_IVC[kept, 1::2]
            images = features_IVF[held], probs_IVC[held]
            figures = [
                compare(layer, *(part.flatten(0, 1) for part in others))
                for others in (views, images)
            ]
            found[name].append((*figures[0], *figures[1]))
            print(f"seed {seed}: {name} {found[name][-1]}", file=sys.stderr, flush=True)
    return [row_of(name, kinds[name], probs_IVC, found[name], found["exact"]) for name in kinds]


def row_of(
    name: str,
    kind: tuple[float, Tensor],
    probs_IVC: Tensor,
    found: Sequence[tuple[float, ...]],
    exact: Sequence[tuple[float, ...]],
) -> list[str]:
    """Return the cells of an arm: bytes, KL of its labels, figures less those of exact labels."""
    size, labels_IVC = kind
    log_IVC = labels_IVC.clamp_min(1e-30)
    kl_IVC = torch.xlogy(probs_IVC, probs_IVC) - torch.xlogy(probs_IVC, log_IVC)
    cells = [name, f"{size:.1f}", f"{float(kl_IVC.sum(2).mean()):.4f}"]
    for figure, digits in ((0, 4), (1, 2), (2, 4), (3, 2)):
        values = [each[figure] for each in found]
        paired = [a - each[figure] for a, each in zip(values, exact, strict=True)]
        limits = interval(paired)
        cell = f"{np.mean(values):.{digits}f}"
        if name != "exact" and limits is not None:
            low, high = limits
            cell += f", {np.mean(paired):+.{digits}f} ({low:+.{digits}f} to {high:+.{digits}f})"
        cells.append(cell)
    return cells


def main(words: Sequence[str] | None = None) -> None:
    """Print the table."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("--labels", type=Path, required=True)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--backbone", type=Path, required=True, help="a timm model folder")
    parser.add_argument("--cache", type=Path, required=True, help=".npz of features and labels")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=32)
    given = parser.parse_args(words)
    if given.cache.is_file():
        cached = np.load(given.cache, allow_pickle=False)
        parts = torch.from_numpy(cached["features"]), torch.from_numpy(cached["probs"])
    else:
        parts = features_and_probs(given.labels, given.data_dir, given.backbone, given.batch_size)
        np.savez(given.cache, features=parts[0].numpy(), probs=parts[1].numpy())
    heads = ["labels", "bytes a view", "KL of the labels", "other views: KL(exact to probe)"]
    heads += ["agreement %", "other images: KL(exact to probe)", "agreement %"]
    print(table(heads, measure(*parts, given.seeds)))
    print(f"{datetime.date.today()}, {os.cpu_count()} cores, torch {torch.__version__}")


if __name__ == "__main__":
    main()
