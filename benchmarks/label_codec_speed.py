"""Views a second: the label codec beside TinyViT's layout, on one thread.

    python benchmarks/label_codec_speed.py --rows real_rows_32views.npz

Real softmax rows (an array ``probs``, images x views x classes), or the base population of
label_codec.py, 16 views; rate 0.001. Prints a Markdown table. TinyViT's layout is
rebuilt here from its description: an int32 seed, 100 int16 ids and 100 float16 probabilities a
view, one view after another as its Python code has it, and a line of text with each view's key.
Files are in memory on both sides.
"""

import argparse
import datetime
import io
import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median

import numpy as np
import torch
from label_codec import population, table
from torch import Tensor

from mealv2.codec import EncodedLabels, encode
from mealv2.losses import similarity_loss

K, RECORD_SIZE = 100, 4 + 4 * 100
BATCH_SIZE = 256
REPETITIONS = 5


def write_tinyvit(probs_NC: Tensor, keys: list[str]) -> tuple[bytes, str]:
    """Return (records, lines of keys), batch by batch, view by view."""
    records, lines = io.BytesIO(), io.StringIO()
    seeds = np.arange(len(probs_NC), dtype=np.int32)
    for n in range(0, len(probs_NC), BATCH_SIZE):
        values, ids = probs_NC[n : n + BATCH_SIZE].topk(K, dim=1, sorted=True)
        views = zip(
            keys[n : n + BATCH_SIZE],
            seeds[n : n + BATCH_SIZE],
            ids.to(torch.int16).numpy(),
            values.to(torch.float16).numpy(),
            strict=True,
        )
        for key, seed, ids_K, values_K in views:
            records.write(seed.tobytes() + ids_K.tobytes() + values_K.tobytes())
            lines.write(key + "\n")
    return records.getvalue(), lines.getvalue()


def read_tinyvit(records: bytes, keys: list[str]) -> int:
    """Look up, seek and read every view in order; ids int32 and probabilities float32."""
    place = {key: i for i, key in enumerate(keys)}
    file, total = io.BytesIO(records), 0
    for key in keys:
        file.seek(place[key] * RECORD_SIZE)
        record = file.read(RECORD_SIZE)
        int(np.frombuffer(record, np.int32, 1)[0])  # the seed
        ids_K = np.frombuffer(record, np.int16, K, 4).astype(np.int32)
        probs_K = np.frombuffer(record, np.float16, K, 4 + 2 * K).astype(np.float32)
        total += len(ids_K) + len(probs_K)
    return total


def speed_rows(probs_NC: Tensor, num_views: int) -> list[list[str]]:
    """Return views per second, median and range, all tasks in turn in each repetition."""

    def encoded(views: int) -> EncodedLabels:
        return encode(probs_NC, rate=0.001, num_views=views)

    labels, alone = encoded(num_views), encoded(1)
    keys = [f"n{n // 1300:08d}_{n:08d}.JPEG" for n in range(len(labels))]
    records, _ = write_tinyvit(probs_NC, keys)
    random_B = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))[:512]
    batch = labels[random_B]
    logits = torch.randn(len(batch), labels.num_classes)
    dense = batch.to_dense()
    # replace() gives labels that were not decoded yet
    tasks: dict[str, tuple[int, Callable[[], object]]] = {
        "write, TinyViT K=100": (len(labels), lambda: write_tinyvit(probs_NC, keys)),
        "write, codec": (len(labels), lambda: encoded(num_views).to_bytes()),
        "write, codec, each view by itself": (len(labels), lambda: encoded(1).to_bytes()),
        "read all, TinyViT K=100": (len(labels), lambda: read_tinyvit(records, keys)),
        "read all, codec": (len(labels), lambda: replace(labels).kept()),
        "read all, codec, each view by itself": (len(labels), lambda: replace(alone).kept()),
        "check, codec": (len(labels), lambda: replace(labels).check()),
        "all to dense rows": (len(labels), lambda: replace(labels).to_dense()),
        "512 random labels decoded": (512, lambda: replace(batch).kept()),
        "512 of views by themselves decoded": (512, lambda: alone[random_B].kept()),
        "512 random labels to the loss": (512, lambda: similarity_loss(logits, replace(batch))),
        "512 dense rows to the loss": (512, lambda: similarity_loss(logits, dense)),
    }
    seconds: dict[str, list[float]] = {name: [] for name in tasks}
    for _ in range(REPETITIONS):
        for name, (_, task) in tasks.items():
            task()  # memory, caches
            start = time.perf_counter()
            task()
            seconds[name].append(time.perf_counter() - start)
    rows = []
    for name, (n, _) in tasks.items():
        spread = f"{n / max(seconds[name]):,.0f} to {n / min(seconds[name]):,.0f}"
        typical = median(seconds[name])
        rows.append([name, f"{n / typical:,.0f}", spread, f"{1e3 * typical:.2f}"])
    return rows


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=Path, help=".npz with probs, images x views x C")
    parser.add_argument("--images", type=int, default=512, help="simulated, without --rows")
    given = parser.parse_args(words)
    torch.set_num_threads(1)
    if given.rows:
        probs_IVC = torch.from_numpy(np.load(given.rows, allow_pickle=False)["probs"])
        probs_NC, num_views = probs_IVC.flatten(0, 1), probs_IVC.shape[1]
    else:
        num_views = 16
        probs_NC, _ = population("base", given.images, num_views)
    print(table(["one thread", "views/s", "range", "ms"], speed_rows(probs_NC, num_views)))
    print(
        f"{len(probs_NC)} views, {num_views} an image, {datetime.date.today()}, "
        f"{os.cpu_count()} cores, {platform.machine()}, torch {torch.__version__}, "
        f"numpy {np.__version__}"
    )


if __name__ == "__main__":
    main()
