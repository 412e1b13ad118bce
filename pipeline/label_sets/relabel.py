"""Label some views of a label set again with its teachers, to compare."""

import math
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mealv2.data.loader import on_device, read_views
from mealv2.data.requests import Batch, check_failures
from mealv2.data.source import ImageSource
from mealv2.errors import DataError, LabelSetError, OnBadImage
from mealv2.label_set import LabelSet
from mealv2.labelling.annotator import Annotator
from mealv2.labelling.encoding_loss import kl_sum
from mealv2.labelling.plan import batch_requests
from mealv2.labelling.row_encoder import complete_images
from mealv2.models.ensemble import EnsembleOutput
from pipeline import console
from pipeline.config import LabelsVerifyConfig
from pipeline.labelling.compatibility import build_original_teachers, check_precision, view_reader
from pipeline.loading.sources import open_labelled
from pipeline.runtime.device import Runtime

# Other threads, precisions and resizes stay within these bounds, other views and pictures do not:
# docs/benchmarks/picture-checks.md has the figures.
MIN_TOP1_AGREEMENT = 95.0  # percent
MAX_EXTRA_KL = 0.02  # nats, mean, beyond the loss of the encoding


def relabel(config: LabelsVerifyConfig, folder: Path, runtime: Runtime) -> dict[str, Any]:
    """Label all views of random images again; return how the stored labels differ.

    ``kl`` is the mean KL(new || stored) in nats, ``kl_of_encoding`` the mean KL(new || encoded
    new). ``top1_agreement`` is in percent, ``identical`` a fraction. Raises MealError.
    """
    assert config.data_dir is not None
    labels = LabelSet.open(folder)
    plan = labels.manifest["plan"]
    check_precision(folder, plan, runtime)
    annotator = Annotator(
        build_original_teachers(folder, config.teacher, plan, runtime),
        runtime,
        labels.encoding,
        batch_size=config.batch_size,
        on_bad_image=config.on_bad_image,
    )
    source = open_labelled(config, config.data_dir, plan, "train")
    reader = view_reader(labels, source)
    chosen = _chosen(labels, source, config.relabel, seed=config.seed)
    requests = {
        views: batch_requests(positions, views, config.batch_size)
        for views, positions in chosen.items()
    }
    in_order = [request for of_block in requests.values() for request in of_block]
    batches = console.progress(
        read_views(reader, in_order, workers=config.workers, pin_memory=runtime.should_pin_memory),
        total=sum(len(views) * len(positions) for views, positions in chosen.items()),
        what="labelling again",
        unit="views",
        size=lambda batch: len(batch.positions) + len(batch.failed),
    )
    stream = on_device(batches, runtime.device)
    total, num_views, images = np.zeros(4), 0, set[int]()
    for views, of_block in requests.items():
        labelled = _labelled(islice(stream, len(of_block)), annotator, source, config.on_bad_image)
        total += _compared(labels, source, views, *labelled)
        rows = complete_images(labelled[0], len(views)).tolist()
        num_views += len(rows)
        images |= {labelled[0][row] for row in rows}
    if not num_views:
        raise DataError(f"none of the views of {source.name} to label again could be read")
    kl, kl_of_encoding, agreement, identical = (total / num_views).tolist()
    console.info(
        f"labelled {num_views} views of {len(images)} images again: KL {kl:.3g} nats, "
        f"{kl_of_encoding:.3g} of it from the encoding; the same top-1 class for {agreement:.2%}, "
        f"identical labels for {identical:.2%}"
    )
    found = {
        "views": num_views,
        "images": len(images),
        "top1_agreement": 100.0 * agreement,
        "kl": kl,
        "kl_of_encoding": kl_of_encoding,
        "identical": identical,
    }
    check_verdict(found, labels)
    return found


def check_verdict(found: dict[str, Any], labels: LabelSet) -> None:
    """Raise LabelSetError if labels differ by more than another machine explains."""
    extra_kl, agreement = found["kl"] - found["kl_of_encoding"], found["top1_agreement"]
    # a few images more may differ by chance: two standard deviations; views of one depend on it
    chance = 200.0 * math.sqrt(0.05 * 0.95 / found["images"])
    if extra_kl <= MAX_EXTRA_KL and agreement >= MIN_TOP1_AGREEMENT - chance:
        return
    raise LabelSetError(
        f"{labels.folder}: these teachers give other labels for these images: KL {extra_kl:.3g} "
        f"nats beyond the encoding (at most {MAX_EXTRA_KL}), the same top-1 class for "
        f"{agreement:.4g} % (at least {MIN_TOP1_AGREEMENT:g} %, less chance); run "
        "`mealv2 labels verify --data-dir` without --quick to compare all images, else precompute "
        "the set again"
    )


def _chosen(
    labels: LabelSet, source: ImageSource, number: int, *, seed: int
) -> dict[range, list[int]]:
    """Return the positions of random images for each block, whose views are encoded together.

    They have at least ``number`` views, or are all; in the order of the set.
    """
    keys, blocks = list(labels.keys()), [views for views, _ in labels.blocks]
    position_of = {key: position for position, key in enumerate(source.keys)}
    order = np.random.default_rng(seed).permutation(len(keys) * len(blocks)).tolist()
    chosen: dict[range, list[int]] = {views: [] for views in blocks}
    num_views = 0
    for image, block in (divmod(n, len(blocks)) for n in order):
        # an image that could not be read later has no added views
        if num_views < number and labels.holds(keys[image], blocks[block].start):
            chosen[blocks[block]].append(position_of[keys[image]])
            num_views += len(blocks[block])
    return {views: sorted(positions) for views, positions in chosen.items()}


def _labelled(
    batches: Iterable[Batch], annotator: Annotator, source: ImageSource, on_bad_image: OnBadImage
) -> tuple[list[int], EnsembleOutput]:
    """Return the position of each row, and all outputs of the ensemble."""
    none = torch.zeros(0, annotator.encoding.num_classes)
    positions: list[int] = []
    outputs: list[EnsembleOutput] = []
    for batch in batches:
        check_failures(source, batch.failed, on_bad_image)
        if batch.positions:
            positions += batch.positions
            outputs.append(annotator.predict(batch.images_BCHW, batch.other_sizes)[1])
    columns = zip(*outputs, strict=True) if outputs else ((none,), (none,))
    return positions, EnsembleOutput(*(torch.cat(column) for column in columns))


def _compared(
    labels: LabelSet,
    source: ImageSource,
    views: range,
    positions: Sequence[int],
    outputs: EnsembleOutput,
) -> np.ndarray:
    """Return sums over views: the two KL, and how many agree and are identical.

    Compares images that have all views of their block.
    """
    rows = complete_images(positions, len(views))
    if not len(rows):
        return np.zeros(4)
    uses_models = labels.encoding.shares_models
    again = EnsembleOutput(*(column[rows.to(column.device)] for column in outputs))
    keys = [source.keys[positions[row]] for row in rows.tolist()]
    stored = labels.soft_labels(keys, list(views) * (len(rows) // len(views)))
    is_added = views.start > labels.blocks[0][0].start
    first = labels.first_labels(keys[:: len(views)]) if is_added and uses_models else None
    encoded = labels.encoding.encode(*again, num_views=len(views), first=first)
    fresh = encoded.to(torch.device("cpu")).labels
    probs_NC = again.probs_BC.cpu().double()
    then_NC, now_NC = stored.to_dense(), fresh.to_dense()
    # where classes are nearly equal, the encoding itself may change the likeliest
    agrees_N = (probs_NC.argmax(dim=1) == stored.argmax()) | (fresh.argmax() == stored.argmax())
    is_same_N = (then_NC == now_NC).all(dim=1)
    return np.array(
        [
            kl_sum(probs_NC, then_NC),
            kl_sum(probs_NC, now_NC),
            int(agrees_N.sum()),
            int(is_same_N.sum()),
        ]
    )
