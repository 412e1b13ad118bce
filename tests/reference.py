"""The method again in NumPy float64, written from the formulas and not from the package's code.

Every gradient is derived by hand: nothing here differentiates anything.
"""

from collections.abc import Callable, Sequence
from functools import cache
from typing import NamedTuple

import numpy as np

from mealv2.codec.residual_codes import RUN_LENGTHS, VALUE_LENGTHS  # numbers of the format

Layers = list[tuple[np.ndarray, np.ndarray]]  # (weight out x in, bias) of each linear layer


def log_softmax(logits_NC: np.ndarray) -> np.ndarray:
    shifted = np.asarray(logits_NC, dtype=np.float64)
    shifted = shifted - shifted.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def softmax(logits_NC: np.ndarray) -> np.ndarray:
    return np.exp(log_softmax(logits_NC))


def ensemble(logits_TNC: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return q = (1/T) sum_t softmax(z_t) and m = (1/T) sum_t z_t, both N x C."""
    logits_TNC = np.asarray(logits_TNC, dtype=np.float64)
    return softmax(logits_TNC).mean(axis=0), logits_TNC.mean(axis=0)


def similarity(student_NC: np.ndarray, probs_NC: np.ndarray) -> tuple[float, np.ndarray]:
    """Return L = -(1/N) sum q log softmax(s), and dL/ds = (softmax(s) sum_c q - q) / N."""
    probs_NC = np.asarray(probs_NC, dtype=np.float64)
    num_rows = len(probs_NC)
    loss = -(probs_NC * log_softmax(student_NC)).sum() / num_rows
    mass_N1 = probs_NC.sum(axis=1, keepdims=True)
    return float(loss), (softmax(student_NC) * mass_N1 - probs_NC) / num_rows


def blended(rows_N: np.ndarray, order_N: np.ndarray, lam: float) -> np.ndarray:
    """Return x'_i = l x_i + (1 - l) x_o(i) of images or labels, the mixup paper's eq. 1."""
    rows_N = np.asarray(rows_N, dtype=np.float64)
    return lam * rows_N + (1.0 - lam) * rows_N[order_N]


class Discrimination(NamedTuple):
    """What telling N student rows from N teacher rows gives."""

    loss: float
    outputs: np.ndarray
    accuracy: float
    grad_student: np.ndarray
    grad_layers: Layers


def discriminator_forward(
    layers: Layers, rows_NC: np.ndarray, *, last_relu: bool
) -> tuple[np.ndarray, list[np.ndarray], list[np.ndarray]]:
    """Return (outputs, the input of every layer, what every layer gave before its ReLU)."""
    value = np.asarray(rows_NC, dtype=np.float64)
    inputs, before = [], []
    for position, (weight, bias) in enumerate(layers):
        inputs.append(value)
        value = value @ weight.astype(np.float64).T + bias.astype(np.float64)
        before.append(value)
        if last_relu or position < len(layers) - 1:
            value = np.maximum(value, 0.0)
    return value, inputs, before


def discriminate(
    layers: Layers, student_NC: np.ndarray, teacher_NC: np.ndarray, *, variant: str
) -> Discrimination:
    """Loss and gradients over [student rows; teacher rows].

    official: two outputs, ReLU last, targets (1, 0) and (0, 1), mean over all 4N entries.
    paper: one output, no ReLU last, targets 0 and 1, mean over all 2N entries.
    """
    num_rows = len(student_NC)
    rows = np.concatenate([student_NC, teacher_NC]).astype(np.float64)
    outputs, inputs, before = discriminator_forward(layers, rows, last_relu=variant == "official")
    of_teacher = np.repeat([0.0, 1.0], num_rows)
    official = variant == "official"
    targets = np.stack([1 - of_teacher, of_teacher], 1) if official else of_teacher[:, None]
    # BCE of a logit x against y: log(1 + e^x) - x y; its derivative: 1 / (1 + e^-x) - y
    loss = (np.logaddexp(0.0, outputs) - outputs * targets).mean()
    grad = (1.0 / (1.0 + np.exp(-outputs)) - targets) / outputs.size

    grad_layers: Layers = []
    for position in reversed(range(len(layers))):
        if official or position < len(layers) - 1:
            grad = grad * (before[position] > 0)
        grad_layers.insert(0, (grad.T @ inputs[position], grad.sum(axis=0)))
        grad = grad @ layers[position][0].astype(np.float64)

    says_teacher = outputs[:, 1] - outputs[:, 0] if official else outputs[:, 0]
    right = np.where(of_teacher == 1, says_teacher > 0, says_teacher < 0)
    accuracy = (right + 0.5 * (says_teacher == 0)).mean()
    return Discrimination(float(loss), outputs, float(accuracy), grad[:num_rows], grad_layers)


def top_k(probs_NC: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the k largest of every row, largest first: (indices, probabilities)."""
    indices = np.argsort(-np.asarray(probs_NC), axis=1, kind="stable")[:, :k]
    return indices, np.take_along_axis(np.asarray(probs_NC), indices, axis=1)


def dense(
    indices_NK: np.ndarray, probs_NK: np.ndarray, rest_N: np.ndarray, num_classes: int
) -> np.ndarray:
    """Recover rows of C: the kept stay, the others share the rest evenly; then sum to 1."""
    rows = []
    kept = zip(indices_NK, np.asarray(probs_NK, dtype=np.float64), rest_N, strict=True)
    for indices, probs, rest in kept:
        others = num_classes - len(indices)
        row = np.full(num_classes, rest / others if others else 0.0)
        row[indices] = probs
        rows.append(row / row.sum())
    return np.array(rows)


def fkd_recovery(packed: np.ndarray, kind: str, num_classes: int) -> np.ndarray:
    """Return the rows that FKD's stored arrays stand for, row by row from its paper's formulas."""
    rows = []
    for stored in np.asarray(packed, dtype=np.float64):
        if kind == "ori":
            row = stored
        elif kind == "hard":
            row = np.eye(num_classes)[int(stored)]
        else:
            ids, values = stored.reshape(2, -1)
            if kind == "marginal_renorm":
                row = np.zeros(num_classes)
                values = values / values.sum()
            else:
                row = np.full(num_classes, (1.0 - values.sum()) / (num_classes - len(ids)))
            row[ids.astype(int)] = values
        rows.append(row)
    return np.array(rows)


def compress_top_k(
    logits_NC: np.ndarray, indices_NK: np.ndarray | Sequence[Sequence[int]]
) -> np.ndarray:
    """Log-probabilities whose not-kept classes all have the mean probability of the not-kept.

    A row may keep more classes than another.
    """
    rows = []
    for log_probs, indices in zip(log_softmax(logits_NC), indices_NK, strict=True):
        others = np.setdiff1d(np.arange(len(log_probs)), indices)
        row = log_probs.copy()
        if len(others):
            row[others] = np.logaddexp.reduce(log_probs[others]) - np.log(len(others))
        rows.append(row)
    return np.array(rows)


# --- one whole step of training -----------------------------------------------------------------


class Settings(NamedTuple):
    """How a step is computed; the names are DistillTask's."""

    variant: str | None = "paper"  # of the discriminator; None: off
    shown: str = "log-probs"  # what the discriminator is shown
    weight: float = 1.0  # of its loss
    temperature: float = 1.0  # of the labels
    hard_weight: float = 0.0
    lr: float = 0.05
    momentum: float = 0.9
    weight_decay: float = 0.0


class State(NamedTuple):
    """The weights of a linear student and a discriminator, and the momentum of each."""

    student: Layers
    discriminator: Layers
    momenta: Layers


MIN_LOG = -24 * np.log(2.0)


def shown_rows(
    logits_NC: np.ndarray, indices_NK: np.ndarray, shown: str
) -> tuple[np.ndarray, np.ndarray]:
    """Return (rows N x C of the student for the discriminator, d rows / d logits N x C x C)."""
    num_rows, num_classes = logits_NC.shape
    probs = softmax(logits_NC)
    eye = np.eye(num_classes)
    if shown == "logits":  # of classes not kept, their mean
        slopes = np.repeat(eye[None], num_rows, axis=0)
        for slope, kept in zip(slopes, indices_NK, strict=True):
            others = np.setdiff1d(np.arange(num_classes), kept)
            slope[np.ix_(others, others)] = 1.0 / max(1, len(others))
        return compress_logits(logits_NC, indices_NK), slopes
    if shown == "probs":
        return probs, probs[:, :, None] * (eye - probs[:, None, :])
    rows = compress_top_k(logits_NC, indices_NK)
    slopes = np.empty((num_rows, num_classes, num_classes))
    for i, kept in enumerate(indices_NK):
        slopes[i] = eye - probs[i]  # d log p_j / d s = e_j - p
        others = np.setdiff1d(np.arange(num_classes), kept)
        if len(others):
            tail = np.zeros(num_classes)
            tail[others] = probs[i, others] / probs[i, others].sum()
            slopes[i, others] = tail - probs[i]
        slopes[i, rows[i] < MIN_LOG] = 0.0  # cut off below, and flat there
    return np.maximum(rows, MIN_LOG), slopes


def whole_step(
    state: State,
    images_ND: np.ndarray,
    teacher_logits_TNC: np.ndarray,
    classes_N: np.ndarray,
    k: int,
    settings: Settings,
) -> tuple[dict[str, float], State]:
    """Return (losses by name, the state after one step of SGD) of a linear student.

    Labels: the k likeliest classes of the ensemble and the rest spread evenly.
    """
    num_classes = teacher_logits_TNC.shape[2]
    ((weight, bias),) = state.student
    logits = images_ND @ weight.T + bias
    mean_probs, mean_logits = ensemble(teacher_logits_TNC)
    indices, kept = top_k(mean_probs, k)
    labels = dense(indices, kept, 1.0 - kept.sum(axis=1), num_classes)
    softened = labels ** (1.0 / settings.temperature)
    softened = softened / softened.sum(axis=1, keepdims=True)

    soft_loss, soft_grad = similarity(logits, softened)
    hard_loss, hard_grad = similarity(logits, np.eye(num_classes)[classes_N])
    w = settings.hard_weight
    losses = {"similarity_loss": soft_loss}
    grad_logits = (1.0 - w) * soft_grad + w * hard_grad
    if w:
        losses["hard_label_loss"] = hard_loss
    loss = (1.0 - w) * soft_loss + w * hard_loss
    grad_layers: Layers = []
    if settings.variant is not None:
        student_rows, slopes = shown_rows(logits, indices, settings.shown)
        teacher_rows = {
            "logits": compress_logits(mean_logits, indices),
            "probs": labels,
            "log-probs": np.maximum(np.log(labels), MIN_LOG),
        }[settings.shown]
        form = "official" if settings.variant == "official" else "paper"
        seen = discriminate(state.discriminator, student_rows, teacher_rows, variant=form)
        grad_shown = np.einsum("nj,njc->nc", seen.grad_student, slopes)
        sign = -1.0 if settings.variant == "adversarial" else 1.0
        losses["discriminator_loss"] = seen.loss
        losses["discriminator_gradient_ratio"] = float(
            settings.weight * np.linalg.norm(grad_shown) / np.linalg.norm(grad_logits)
        )
        loss += settings.weight * seen.loss
        grad_logits = grad_logits + sign * settings.weight * grad_shown
        grad_layers = [(settings.weight * gw, settings.weight * gb) for gw, gb in seen.grad_layers]
    losses["loss"] = float(loss)

    grads = [(grad_logits.T @ images_ND, grad_logits.sum(axis=0)), *grad_layers]
    weights = [*state.student, *state.discriminator]
    moved, momenta = [], []
    for layer, grad, momentum in zip(weights, grads, state.momenta, strict=True):
        # SGD: v <- mu v + g + wd w;  w <- w - lr v
        velocity = tuple(
            settings.momentum * v + g + settings.weight_decay * value
            for value, g, v in zip(layer, grad, momentum, strict=True)
        )
        momenta.append(velocity)
        moved.append(
            tuple(value - settings.lr * v for value, v in zip(layer, velocity, strict=True))
        )
    return losses, State(moved[:1], moved[1:], momenta)


# --- the record of an encoded label, from its description -----------------------------------------

_FIRST = (
    "0 2 4 6 8 10 13 15 18 21 25 28 32 36 41 45 51 56 62 68 75 82 90 99 108 117 128 139 151 163 "
    "177 192"
)
_CURVE = "0 1 3 5 8 11 14 18 23 29 36 44 54 66 84 112"
_POWERS = {i: round(2**24 * np.exp(i / 16)) for i in range(-271, 240)}
_RESIDUAL_STEPS = [26, 34, 43, 55, 71, 91, 117, 150, *[166] * 11, 102]


def decode_record(record: bytes, k: int, num_classes: int) -> np.ndarray:
    """Return the distribution that a record of k classes stands for, float64, bit after bit."""
    bits = "".join(f"{byte:08b}"[::-1] for byte in record)
    position = 0

    def number(width: int) -> int:
        nonlocal position
        position += width
        return int(bits[position - width : position][::-1], 2)

    tail_step = 6 * number(6) if k < num_classes else 0
    anchors = {rank for i in range(16) for rank in (2**i, 3 * 2**i)} - {1}
    ranks = [1, *sorted(rank for rank in anchors | {k} if rank <= k and rank > 1)]
    levels = [0]
    for i in range(1, len(ranks)):
        table, width = (_FIRST, 5) if i == 1 else (_CURVE, 4)
        levels.append(levels[-1] + int(table.split()[number(width)]))
    levels = [min(level, 1024) for level in levels]
    ids = [number((num_classes - 1).bit_length()) for _ in range(k)]
    assert len(bits) - position < 8
    assert "1" not in bits[position:]

    row = np.full(num_classes, np.exp(-min(levels[-1] + tail_step, 1024) / 16))
    row[ids] = np.exp(-np.interp(np.log(np.arange(1, k + 1)), np.log(ranks), levels) / 16)
    return row / row.sum()


def decode_shared_block(block: bytes, num_views: int, num_classes: int) -> np.ndarray:
    """Return the distributions of a block whose views share a model, float64 V x C."""
    return decode_shared(block, num_views, num_classes)[0]


def decode_shared(block: bytes, num_views: int, num_classes: int) -> tuple[np.ndarray, list[int]]:
    """Return the distributions of a block whose views share a model, and its listed classes.

    Written from docs/reference/label-codec.md: nibble after nibble, bit after bit.
    """
    num_components, num_listed, length_size = block[0], block[1] + 256 * block[2], block[3]
    assert 1 <= num_components <= 8
    assert 1 <= num_listed <= min(num_classes, 512)
    assert length_size in (1, 2)
    at = 4
    lows_steps = []
    for _ in range(num_components):
        low, step = block[at], block[at + 1]
        lows_steps.append((low - 256 if low > 127 else low, step))
        at += 2
    lengths = []
    for _ in range(num_views):
        lengths.append(int.from_bytes(block[at : at + length_size], "little"))
        at += length_size
    stream_at = len(block) - -(-sum(lengths) // 8)
    nibbles = [part for byte in block[at:stream_at] for part in (byte & 15, byte >> 4)]
    nibbles.reverse()  # the next one is popped

    num_entries = num_listed + (num_listed < num_classes)
    weights = [
        [8 * low + step * nibbles.pop() for low, step in lows_steps] for _ in range(num_views)
    ]
    components = [[nibbles.pop() for _ in range(num_entries)] for _ in range(num_components)]
    ids = list(range(num_listed))
    if num_listed < num_classes:
        ids = _listed_ids(nibbles, num_listed, num_classes)
    assert nibbles in ([], [15])

    num_others = num_classes - num_listed
    bits = "".join(f"{byte:08b}"[::-1] for byte in block[stream_at:])
    assert "1" not in bits[sum(lengths) :]
    rows = []
    for view_weights, length in zip(weights, lengths, strict=True):
        levels = [
            sum(w * codes[k] for w, codes in zip(view_weights, components, strict=True))
            for k in range(num_entries)
        ]
        _subtract_residuals(levels, num_others, bits[:length])
        bits = bits[length:]
        lowest = min(levels)
        masses = np.exp([-min(level - lowest, 16384) / 256.0 for level in levels])
        row = np.full(num_classes, masses[-1])
        row[ids] = masses[:num_listed]
        rows.append(row / row.sum())
    return np.array(rows), ids


def with_own_model(
    block: bytes, num_views: int, first: bytes, first_views: int, num_classes: int
) -> bytes:
    """Return a block that uses the model of ``first`` as one that has this model itself."""
    num_components, first_size = first[0], first[3]
    assert first_views > 1
    size = 2 if num_views == 1 else block[0] - 8
    assert block[0] == (0 if num_views == 1 else 8 + size)
    assert size in (1, 2)

    def parts(data: bytes, at: int, size: int, views: int) -> tuple[bytes, list[int], bytes]:
        """Return lengths, nibbles, residuals."""
        ends = range(at, at + size * views, size)
        num_bits = sum(int.from_bytes(data[n : n + size], "little") for n in ends)
        stream_at = len(data) - -(-num_bits // 8)
        pairs = data[at + size * views : stream_at]
        nibbles = [part for byte in pairs for part in (byte & 15, byte >> 4)]
        return data[at : at + size * views], nibbles, data[stream_at:]

    head = 4 + 2 * num_components
    _, of_first, _ = parts(first, head, first_size, first_views)
    lengths, nibbles, stream = parts(block, 1, size, num_views)
    assert nibbles[num_components * num_views :] in ([], [15])
    nibbles = nibbles[: num_components * num_views] + of_first[num_components * first_views :]
    if len(nibbles) % 2:  # the padding moves
        nibbles = nibbles[:-1] if nibbles[-1] == 15 else [*nibbles, 15]
    pairs = bytes(a | b << 4 for a, b in zip(nibbles[::2], nibbles[1::2], strict=True))
    return first[:3] + bytes([size]) + first[4:head] + lengths + pairs + stream


def _listed_ids(nibbles: list[int], num_listed: int, num_classes: int) -> list[int]:
    """Return classes from the gaps between them; low nibbles of all, then the rest of each."""
    num_low = ((num_classes // num_listed).bit_length() - 1) // 4
    low = [sum(nibbles.pop() << 4 * n for n in range(num_low)) for _ in range(num_listed)]
    ids, last = [], -1
    for part in low:
        high = 0
        while (piece := nibbles.pop()) == 15:
            high += 15
        last += 1 + part + ((high + piece) << 4 * num_low)
        ids.append(last)
    assert last < num_classes
    return ids


def entry_contexts(levels: list[int], num_others: int) -> list[int]:
    """Return -ln p of each entry in half nats, whole-number arithmetic; 19 for all others."""
    sizes = [*[1] * (len(levels) - 1), num_others or 1]
    coarse = [(level - min(levels)) // 16 for level in levels]
    total = sum(n * _POWERS[-c] for c, n in zip(coarse, sizes, strict=True) if c < 272)
    log_total = max(i for i in range(240) if _POWERS[i] <= total)
    contexts = [min((c + log_total) // 8, 18) for c in coarse]
    return [*contexts[:-1], 19] if num_others else contexts


@cache
def prefix_codes(lengths: str) -> dict[str, int]:
    """Return the canonical code of each symbol, first bit first, by the hex digits of lengths."""
    codes, word, before = {}, 0, 0
    for size, symbol in sorted((int(digit, 16), symbol) for symbol, digit in enumerate(lengths)):
        word <<= size - before
        codes[f"{word:0{size}b}"] = symbol
        word, before = word + 1, size
    return codes


def _subtract_residuals(levels: list[int], num_others: int, bits: str) -> None:
    """Subtract the residuals of a view, which these bits hold, from its levels."""
    contexts = entry_contexts(levels, num_others)
    order = sorted(range(len(levels)), key=lambda k: (contexts[k] != 19, contexts[k], k))

    def symbol(tables: list[str], context: int) -> int:
        nonlocal bits
        codes = prefix_codes(tables[context])
        size = next(n for n in range(1, 12) if bits[:n] in codes)
        found, bits = codes[bits[:size]], bits[size:]
        return found

    place = 0
    while bits:
        run = symbol(RUN_LENGTHS, contexts[order[place]])
        place += run
        if run < 31:
            entry = order[place]
            value = symbol(VALUE_LENGTHS, contexts[entry])
            steps = (value // 2 + 1) * (-1 if value % 2 else 1)
            levels[entry] -= steps * _RESIDUAL_STEPS[contexts[entry]]
            place += 1


def best_count(probs_C: np.ndarray, rate: float) -> tuple[int, np.ndarray]:
    """Return (argmin_k KL(p || recovered_k) + rate k, the costs of k = 1..C), by trying them."""
    probs_C = probs_C.astype(np.float64) / probs_C.astype(np.float64).sum()
    order = np.argsort(-probs_C, kind="stable")
    costs = []
    for k in range(1, len(probs_C) + 1):
        recovered = np.full(len(probs_C), probs_C[order[k:]].sum() / max(1, len(probs_C) - k))
        recovered[order[:k]] = probs_C[order[:k]]
        some = probs_C > 0
        divergence = (probs_C[some] * np.log(probs_C[some] / recovered[some])).sum()
        costs.append(divergence + rate * k)
    return int(np.argmin(costs)) + 1, np.array(costs)


# --- the block of an image in a label set, from its description -----------------------------------


class BlockView(NamedTuple):
    """What a block says of one view: all probabilities, and logits of all classes if it has any."""

    probs_C: np.ndarray
    logits_C: np.ndarray | None


def record_size(k: int, num_classes: int) -> int:
    """Return the bytes of a record of k classes: tail, curve, ids, and zeros up to a whole byte."""
    anchors = {rank for i in range(17) for rank in (2**i, 3 * 2**i) if 1 < rank < k} | {k} - {1}
    curve = 5 + 4 * (len(anchors) - 1) if anchors else 0
    bits = 6 * (k < num_classes) + curve + k * (num_classes - 1).bit_length()
    return -(-bits // 8)


def read_block(
    block: bytes,
    *,
    form: str,
    num_classes: int,
    num_views: int,
    topk: int | None = None,
    logits: bool = False,
) -> list[BlockView]:
    """Read the views of a block, byte after byte: counts, records, logits."""
    if logits and form == "curve" and topk is None:
        return _with_fitted_logits(block, num_classes, num_views)
    position = 0

    def take(num_bytes: int) -> bytes:
        nonlocal position
        position += num_bytes
        assert position <= len(block)
        return block[position - num_bytes : position]

    counts = [topk] * num_views
    if form == "curve" and num_views > 1 and block[0]:
        rows = decode_shared_block(block, num_views, num_classes)
        return [BlockView(row, None) for row in rows]
    if form == "curve":  # a count takes a byte, or two where topk exceeds 255
        take(num_views > 1)  # a zero: the views have records
        size = 1 if topk is None or topk < 256 else 2
        counts = [int.from_bytes(take(size), "little") for _ in range(num_views)]

    ids_of, probs = [], []
    for k in counts:
        if form == "curve":
            record = take(record_size(k, num_classes))
            row = decode_record(record, k, num_classes)
            ids_of.append(record_ids(record, k, num_classes))
        else:
            ids, row = _float_record(take, form, num_classes, k)
            ids_of.append(ids)
        probs.append(row)

    views = []
    for k, ids, row in zip(counts, ids_of, probs, strict=True):
        logits_C = None
        if logits:
            values = np.frombuffer(take(2 * k), "<f2").astype(np.float64)
            rest = np.frombuffer(take(2), "<f2")[0] if k < num_classes else 0.0
            logits_C = np.full(num_classes, np.float64(rest))
            logits_C[ids] = values
        views.append(BlockView(row, logits_C))
    assert position == len(block)
    return views


def _with_fitted_logits(block: bytes, num_classes: int, num_views: int) -> list[BlockView]:
    """Read the views of a block that ends with a slope, an offset and the others' mean of each."""
    end = len(block) - 5 * num_views
    labels, lines = block[:end], block[end:]
    views = read_block(labels, form="curve", num_classes=num_classes, num_views=num_views)
    kept = kept_classes(labels, num_classes, num_views)
    found = []
    for view, ids, at in zip(views, kept, range(0, len(lines), 5), strict=True):
        offset, rest = np.frombuffer(lines, "<f2", 2, at + 1).astype(np.float64)
        logits_C = np.full(num_classes, rest)
        logits_C[ids] = lines[at] / 64 * np.log(view.probs_C[ids]) + offset
        found.append(BlockView(view.probs_C, logits_C))
    return found


def kept_classes(labels: bytes, num_classes: int, num_views: int) -> list[list[int]]:
    """Return the classes that each view of a block of labels keeps."""
    if num_views > 1 and labels[0]:
        return [decode_shared(labels, num_views, num_classes)[1]] * num_views
    at = num_views > 1
    counts = labels[at : at + num_views]
    ids, at = [], at + num_views
    for k in counts:
        size = record_size(k, num_classes)
        ids.append(record_ids(labels[at : at + size], k, num_classes))
        at += size
    return ids


def record_ids(record: bytes, k: int, num_classes: int) -> list[int]:
    """Return the classes of a curve's record; they are its last field but for the filling."""
    width = (num_classes - 1).bit_length()
    anchors = {rank for i in range(17) for rank in (2**i, 3 * 2**i) if 1 < rank < k} | {k} - {1}
    at = 6 * (k < num_classes) + (5 + 4 * (len(anchors) - 1) if anchors else 0)
    return _ids(record, at, k, width)


def _ids(data: bytes, at: int, k: int, width: int) -> list[int]:
    """Return k numbers of ``width`` bits each from a bit on, lowest bit first."""
    number = int.from_bytes(data, "little") >> at
    return [number >> width * i & (1 << width) - 1 for i in range(k)]


def _float_record(
    take: Callable[[int], bytes], form: str, num_classes: int, k: int
) -> tuple[list[int], np.ndarray]:
    """Return (ids, distribution) of a record of values: ids, values, the others' mass."""
    kind = {"float16": "<f2", "float32": "<f4"}[form]
    size = int(kind[-1])
    if k == num_classes:  # all values in class order, nothing else
        values = np.frombuffer(take(k * size), kind).astype(np.float64)
        return list(range(k)), values / values.sum()
    width = (num_classes - 1).bit_length()
    ids = _ids(take(-(-k * width // 8)), 0, k, width)
    values = np.frombuffer(take(k * size), kind).astype(np.float64)
    (rest,) = np.frombuffer(take(size), kind).astype(np.float64)
    row = np.full(num_classes, rest / (num_classes - k))
    row[ids] = values
    return ids, row / row.sum()


def compress_logits(
    logits_NC: np.ndarray, kept: np.ndarray | Sequence[Sequence[int]]
) -> np.ndarray:
    """Return logits whose classes not kept all have the mean logit of those."""
    rows = np.array(logits_NC, dtype=np.float64)
    for row, ids in zip(rows, kept, strict=True):
        others = np.setdiff1d(np.arange(len(row)), ids)
        if len(others):
            row[others] = row[others].mean()
    return rows


def calibration_error(
    probs_NC: np.ndarray, labels_N: np.ndarray, num_bins: int = 15
) -> tuple[float, list[int]]:
    """Return the expected calibration error and the images of each bin, image by image.

    Guo et al. 2017, equations 1 to 3: bin m holds confidences in ((m - 1) / M, m / M].
    """
    bins: list[list[tuple[float, bool]]] = [[] for _ in range(num_bins)]
    for probs_C, label in zip(probs_NC.astype(np.float64), labels_N, strict=True):
        confidence = float(probs_C.max())
        m = next(m for m in range(1, num_bins + 1) if confidence <= m / num_bins or m == num_bins)
        bins[m - 1].append((confidence, int(probs_C.argmax()) == label))
    error = 0.0
    for members in filter(None, bins):
        accuracy = sum(hit for _, hit in members) / len(members)
        confidence = sum(c for c, _ in members) / len(members)
        error += len(members) / len(labels_N) * abs(accuracy - confidence)
    return error, [len(members) for members in bins]
