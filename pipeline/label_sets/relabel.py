"""Asking a label set's teachers again about some of its views, to compare."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mealv2.data.source import ImageSource
from mealv2.label_set import LabelSet, Rows
from mealv2.models.ensemble import EnsembleOutput
from pipeline import console
from pipeline.config import LabelsVerifyConfig
from pipeline.labelling.annotate import Annotator
from pipeline.labelling.compatibility import build_original_teachers, check_precision, choose_resize
from pipeline.loading.loader import ViewReader, on_device, read_views
from pipeline.loading.requests import BatchRequest, check_failures
from pipeline.loading.sources import open_images
from pipeline.runtime.device import Runtime

_NOTHING = float(np.finfo(np.float32).tiny)  # of a class that float16 rounded to 0: no log of 0


def relabel(config: LabelsVerifyConfig, folder: Path, runtime: Runtime) -> dict[str, Any]:
    """Return how the stored labels of random views differ from the teachers' answers now.

    ``kl`` is the mean KL(answer || stored) in nats and ``kl_of_encoding`` what the set's encoding
    alone loses of these answers; ``top1_agreement`` in percent; ``identical`` the share of labels
    that come out the same to the bit. Raises MealError.
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
    source = open_images(config, config.data_dir, plan["roles"]["train"]["split"])
    addresses = _addresses(labels, config.relabel, seed=config.seed)
    reader = ViewReader(
        source, img_size=labels.img_size, views=labels.views(), resize=choose_resize(labels)
    )
    requests = _requests(source, addresses, config.batch_size)
    batches = console.progress(
        read_views(reader, requests, workers=config.workers, pin_memory=runtime.should_pin_memory),
        total=len(addresses),
        what="asking the teachers again",
        unit="views",
        size=lambda batch: len(batch.positions) + len(batch.failed),
    )
    total, num_views = np.zeros(4), 0
    for batch in on_device(batches, runtime.device):
        check_failures(source, batch.failed, config.on_bad_image)
        if not batch.positions:
            continue
        num_views += len(batch.positions)
        _, annotations = annotator.predict(batch.images_BCHW)
        stored = labels.rows([source.keys[p] for p in batch.positions], batch.views)
        fresh = labels.encoding.encode(*annotations).to(torch.device("cpu"))
        total += _compared(annotations, stored, fresh)
    kl, kl_of_encoding, agreement, identical = (total / max(1, num_views)).tolist()
    console.info(
        f"{num_views} views asked again: KL {kl:.3g} nats, of which the encoding loses "
        f"{kl_of_encoding:.3g}; top-1 agrees in {100.0 * agreement:.2f} %, "
        f"{100.0 * identical:.2f} % are the same to the bit"
    )
    return {
        "views": num_views,
        "kl": kl,
        "kl_of_encoding": kl_of_encoding,
        "top1_agreement": 100.0 * agreement,
        "identical": identical,
    }


def _addresses(labels: LabelSet, number: int, *, seed: int) -> list[tuple[str, int]]:
    """Return the (key, view) of random labels, in the order of the set."""
    keys, num_views = list(labels.keys()), labels.num_views
    num_labels = len(keys) * num_views
    rng = np.random.default_rng(seed)
    chosen = np.sort(rng.choice(num_labels, min(number, num_labels), replace=False)).tolist()
    addresses = [(keys[n // num_views], n % num_views) for n in chosen]
    return [
        address for address in addresses if labels.holds(*address)
    ]  # added views can lack an image


def _requests(
    source: ImageSource, addresses: Sequence[tuple[str, int]], batch_size: int
) -> list[BatchRequest]:
    position_of = {key: position for position, key in enumerate(source.keys)}
    return [
        [(position_of[key], (view,)) for key, view in addresses[start : start + batch_size]]
        for start in range(0, len(addresses), batch_size)
    ]


def _compared(annotations: EnsembleOutput, stored: Rows, fresh: Rows) -> np.ndarray:
    """Return the sums over rows of the four figures, the last two as counts."""
    probs_NC = annotations.probs_BC.cpu().double()
    then_NC, now_NC = stored.labels.to_dense(), fresh.labels.to_dense()
    agrees_N = probs_NC.argmax(dim=1) == stored.labels.argmax()
    is_same_N = (then_NC == now_NC).all(dim=1)
    return np.array(
        [_kl(probs_NC, then_NC), _kl(probs_NC, now_NC), int(agrees_N.sum()), int(is_same_N.sum())]
    )


def _kl(probs_NC: torch.Tensor, stored_NC: torch.Tensor) -> float:
    """Return the sum over rows of KL(p || q), nats."""
    # sum_c p_c (log p_c - log q_c), 0 log 0 = 0
    stored_NC = stored_NC.double().clamp_min(_NOTHING)
    return float((torch.xlogy(probs_NC, probs_NC) - torch.xlogy(probs_NC, stored_NC)).sum())
