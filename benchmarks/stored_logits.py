"""What stored mean logits cost and lose: float16 values, a block of their own, a line.

    mealv2 precompute ... --topk all --label-dtype float32 --store-logits --output dense
    python benchmarks/stored_logits.py dense --views 1 8 32

Takes a set with all logits and prints a Markdown table for each number of views. Bytes are those of
the blocks, labels included. `float16 values` are those of the classes that a record keeps, and the
mean of all others. `a second block` codes the softmax of the mean logits as labels are coded, and
stores its normaliser; `others stored` adds the mean of the others in float16. `a line` is what sets
with a rate store. Errors are in nats: of the logits of the kept classes, of the ten likeliest ones,
of the mean of the others. KL is KL(softmax(z / T) || softmax(recovered / T)).

`D correct`: a discriminator is trained to tell the stored rows from those of a student that equals
the ensemble, and tried on other images; 50 % cannot be told apart. Three seeds.
"""

import argparse
import datetime
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import mean
from typing import NamedTuple

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.label_codec import table
from mealv2.codec import Kept, encode
from mealv2.label_set import Encoding, LabelSet
from mealv2.losses import compress_logits, discriminator_loss
from mealv2.models.discriminator import Discriminator
from mealv2.soft_labels import KeptLogits, keep_logits

SECOND_RATES = (0.003, 0.001, 0.0003)
SEEDS, STEPS, BATCH_SIZE = 3, 400, 128
NUM_LIKELIEST = 10


class Outputs(NamedTuple):
    """The outputs of an ensemble, float32 N x C; the views of an image follow each other."""

    probs_NC: Tensor
    logits_NC: Tensor


class Stored(NamedTuple):
    """Logits as a form recovers them, N x C; the classes kept; the bytes of a view."""

    name: str
    recovered_NC: Tensor
    kept: Kept
    size: float


def outputs_of(folder: Path, num_views: int) -> Outputs:
    """Return the first views of all images of a set of all classes."""
    labels = LabelSet.open(folder)
    keys = [key for key in labels.keys() for _ in range(num_views)]  # noqa: SIM118
    rows = labels.rows(keys, list(range(num_views)) * len(labels))
    assert rows.logits is not None, "the set stores no logits"
    kept, num_classes = rows.labels.kept(), labels.num_classes
    return Outputs(rows.labels.to_dense(), rows.logits.to_dense(kept, num_classes))


def forms(outputs: Outputs, num_views: int, rate: float) -> Iterator[Stored]:
    """Yield the logits in every form."""
    probs_NC, logits_NC = outputs
    num_rows, num_classes = logits_NC.shape
    records = encode(probs_NC, rate=rate)
    kept = records.kept()
    values = keep_logits(logits_NC, kept).rounded(torch.float16)
    counts_N = kept.is_kept_NK.sum(1)
    num_values = int((counts_N + (counts_N < num_classes)).sum())
    size = (records.nbytes + 2 * num_values) / num_rows
    yield Stored("float16 values", values.to_dense(kept, num_classes), kept, size)

    labels = encode(probs_NC, rate=rate, num_views=num_views)
    kept = labels.kept()
    rest_N = keep_logits(logits_NC, kept).rest_N
    for second_rate in SECOND_RATES:
        block = encode(torch.softmax(logits_NC, 1), rate=second_rate, num_views=num_views)
        all_NC = block.to_dense().log() + logits_NC.logsumexp(1).half().float()[:, None]
        found = keep_logits(all_NC, kept)
        size = (labels.nbytes + block.nbytes) / num_rows + 2
        name = f"a second block, rate {second_rate:g}"
        yield Stored(name, found.to_dense(kept, num_classes), kept, size)
        found = KeptLogits(found.values_NK, rest_N)
        yield Stored(f"{name}, others stored", found.to_dense(kept, num_classes), kept, size + 2)

    encoding = Encoding(num_classes, rate=rate, logits=True)
    rows = encoding.encode(probs_NC, logits_NC, num_views=num_views)
    assert rows.logits is not None
    size = sum(map(len, encoding.blocks(rows, num_views))) / num_rows
    kept = rows.labels.kept()
    yield Stored("a line", rows.logits.to_dense(kept, num_classes), kept, size)


def row_of(outputs: Outputs, stored: Stored, num_views: int) -> list[str]:
    """Return the cells of a form."""
    logits_NC, kept = outputs.logits_NC, stored.kept
    error_NC = stored.recovered_NC - logits_NC
    likeliest_NT = logits_NC.topk(min(NUM_LIKELIEST, logits_NC.shape[1]), 1).indices
    rest_N, recovered_N = (keep_logits(each, kept).rest_N for each in (logits_NC, stored[1]))
    errors = [error_NC[kept.mask(logits_NC.shape[1])], error_NC.gather(1, likeliest_NT)]
    return [
        stored.name,
        f"{stored.size:.1f}",
        f"{float(kept.is_kept_NK.sum(1).double().mean()):.1f}",
        *(f"{float(error.square().mean().sqrt()):.2f}" for error in errors),
        f"{float((recovered_N - rest_N).mean()):+.2f}",
        *(f"{divergence(logits_NC, stored.recovered_NC, T):.4f}" for T in (1.0, 4.0)),
        f"{100 * told_apart(compress_logits(logits_NC, kept), stored[1], num_views):.0f}",
    ]


def divergence(logits_NC: Tensor, recovered_NC: Tensor, temperature: float) -> float:
    """Return the mean KL of the softmax at a temperature, nats."""
    # KL(p || q) = sum_c p_c (ln p_c - ln q_c)
    logs_NC, found_NC = (
        torch.log_softmax(each.double() / temperature, 1) for each in (logits_NC, recovered_NC)
    )
    return float((logs_NC.exp() * (logs_NC - found_NC)).sum(1).mean())


def told_apart(student_NC: Tensor, stored_NC: Tensor, num_views: int) -> float:
    """Return how often a discriminator is right on images that it was not trained on."""
    num_images = len(student_NC) // num_views
    num_trained = max(1, (7 * num_images) // 10)
    found = []
    for seed in range(SEEDS):
        torch.manual_seed(seed)
        rows_IV = torch.randperm(num_images)[:, None] * num_views + torch.arange(num_views)
        trained, other = rows_IV[:num_trained].flatten(), rows_IV[num_trained:].flatten()
        discriminator = Discriminator(student_NC.shape[1])
        optimizer = torch.optim.Adam(discriminator.parameters(), lr=1e-3)
        for _ in range(STEPS):
            batch = trained[torch.randint(len(trained), (BATCH_SIZE,))]
            loss, _ = discriminator_loss(discriminator, student_NC[batch], stored_NC[batch])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        with torch.no_grad():
            _, accuracy = discriminator_loss(discriminator, student_NC[other], stored_NC[other])
        found.append(float(accuracy))
    return mean(found)


def main(words: Sequence[str] | None = None) -> None:
    """Print the tables."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("labels", type=Path, help="label set of all classes, with logits")
    parser.add_argument("--views", type=int, nargs="+", required=True, help="numbers of views")
    parser.add_argument("--rate", type=float, default=0.001, help="rate of the labels")
    given = parser.parse_args(words)
    torch.set_num_threads(1)
    head = ["logits as", "bytes a view", "kept", "kept", "likeliest", "others", "KL, T = 1"]
    head += ["KL, T = 4", "D correct, %"]
    for num_views in given.views:
        outputs = outputs_of(given.labels, num_views)
        num_images = len(outputs.probs_NC) // num_views
        print(f"{num_images} images x {num_views} views, rate {given.rate:g}\n")
        every = forms(outputs, num_views, given.rate)
        print(table(head, [row_of(outputs, stored, num_views) for stored in every]), flush=True)
    print(f"{datetime.date.today()}, {os.cpu_count()} cores, torch {torch.__version__}")


if __name__ == "__main__":
    main()
