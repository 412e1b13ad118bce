"""Views a second: the label codec beside TinyViT's layout, on one thread.

    python benchmarks/label_codec_speed.py

The base population of label_codec.py, rate 0.001; prints a Markdown table. TinyViT's layout is
rebuilt here from its description: an int32 seed, 100 int16 ids and 100 float16 probabilities a
view, one view after another as its Python code has it, and a line of text with each view's key.
Files are in memory on both sides.
"""

import datetime
import io
import os
import platform
import time
from collections.abc import Callable
from dataclasses import replace
from statistics import median

import numpy as np
import torch
from label_codec import population, table
from torch import Tensor

from mealv2.codec import EncodedLabels, dense_rows, encode
from mealv2.codec.record import check_rows, decode_rows
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


def many(labels: EncodedLabels, copies: int) -> tuple[np.ndarray, np.ndarray]:
    """Return counts and records of so many copies of the labels: a shard's size."""
    return np.tile(labels.counts_N.numpy(), copies), np.tile(labels.payload_P.numpy(), copies)


def speed_rows(probs_NC: Tensor) -> list[list[str]]:
    """Return views per second, median and range, all tasks in turn in each repetition."""
    labels = encode(probs_NC, rate=0.001)
    counts, payload = labels.counts_N.numpy(), labels.payload_P.numpy()
    many_counts, many_payload = many(labels, 16)
    keys = [f"n{n // 1300:08d}_{n:08d}.JPEG" for n in range(len(labels))]
    records, _ = write_tinyvit(probs_NC, keys)
    batch = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))[:512]]
    logits = torch.randn(len(batch), labels.num_classes)
    dense = batch.to_dense()
    # replace() gives labels that were not decoded yet
    tasks: dict[str, tuple[int, Callable[[], object]]] = {
        "write, TinyViT K=100": (len(labels), lambda: write_tinyvit(probs_NC, keys)),
        "write, codec": (len(labels), lambda: encode(probs_NC, rate=0.001).to_bytes()),
        "read all, TinyViT K=100": (len(labels), lambda: read_tinyvit(records, keys)),
        "read all, codec, NumPy": (
            len(many_counts),
            lambda: decode_rows(many_counts, many_payload, labels.num_classes),
        ),
        "check, codec": (
            len(many_counts),
            lambda: check_rows(many_counts, many_payload, labels.num_classes),
        ),
        "records to dense rows, NumPy": (
            len(labels),
            lambda: dense_rows(counts, payload, labels.num_classes),
        ),
        "records to dense rows, torch": (len(labels), lambda: replace(labels).to_dense()),
        "512 records decoded, torch": (512, lambda: replace(batch).kept()),
        "512 records to the loss": (512, lambda: similarity_loss(logits, replace(batch))),
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


def main() -> None:
    torch.set_num_threads(1)
    probs_NC, _ = population("base", 512, 16)
    print(table(["one thread", "views/s", "range", "ms"], speed_rows(probs_NC)))
    print(
        f"{len(probs_NC)} views, {datetime.date.today()}, {os.cpu_count()} cores, "
        f"{platform.machine()}, torch {torch.__version__}, numpy {np.__version__}"
    )


if __name__ == "__main__":
    main()
