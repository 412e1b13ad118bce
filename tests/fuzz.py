"""Label sets with random damage, and read to the end: run as a program, so that it may crash.

``python tests/fuzz.py FOLDER SEED FIRST COUNT`` runs cases FIRST to FIRST + COUNT - 1 and prints
what came of them as JSON. Case N of a seed is the same wherever it runs.
"""

import contextlib
import copy
import json
import os
import random
import resource
import shutil
import signal
import sys
import traceback
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from pathlib import Path
from types import FrameType
from typing import Any

Tree = Any  # what JSON can hold
Files = dict[str, bytes]

SECONDS = 5  # of computing, that any case may take on however busy a machine
SECONDS_PER_BYTE = 3e-7  # and for what its files hold: reading is linear
FLOOR = 16 << 20  # bytes that any case may take
TIMES_SIZE = 10  # bytes it may take for each of its set
MEASURED_EVERY = 4  # cases: measuring memory makes one three times as slow
ADDRESS_SPACE = 4 << 30  # beyond what the imports took; making the cases needs some too
HEAD_SIZE = 512

CRAZY: list[Tree] = [
    -1, 0, 1, 2, 3, 255, 256, 2**31, 2**32, 2**53 + 1, 2**62, 2**63 - 1, 2**63, 2**64, 10**30,
    10**4000, -(2**70), 0.5, 1.0, -0.0, 1e308, True, False, None, "", "x", "..", "/etc/passwd",
    "a\0b", "\ud800", "é" * 300, "train-00000.h5", [], {}, [[]], [0], [0, 4], [4, 0], [-1, 5],
    [0, 10**20], ["x"], [None], {"": None}, {"reason": 1}, "00" * 32, list(range(1000)),
    [2**60] * 1000,
]  # fmt: skip
TEXTS = [
    b"", b"null", b"{", b"[]", b"{}", b"3", b'"x"', b"NaN", b"[" * 10_000 + b"]" * 10_000,
    b'{"a":' * 10_000 + b"1" + b"}" * 10_000, b"9" * 5_000, b"-" + b"9" * 100_000, b"\xff\xfe{}",
    "{}".encode("utf-16"), b"\xef\xbb\xbf{}", b'{"a": "\\ud800"}', b'{"a": NaN}', b'{"a": 1e999}',
    b"[" + b"[]," * 3_000 + b"0]", b"\0" * 1_000,
]  # fmt: skip


# --- damage ---------------------------------------------------------------------------------------


def raw(rng: random.Random, data: bytes) -> bytes:
    """Return bytes with a damage that disks, copies and people do."""
    kind = rng.randrange(9)
    at, to = sorted(rng.randrange(len(data) + 1) for _ in range(2))
    part = data[at : min(to, at + rng.choice((1, 8, 64, 512, 4096)))]
    if kind <= 1:  # bits
        damaged = bytearray(data)
        for _ in range(rng.choice((1, 1, 1, 2, 8))):
            bit = rng.randrange(8 * len(data))
            damaged[bit // 8] ^= 1 << bit % 8
        return bytes(damaged)
    if kind == 2:  # bytes
        return data[:at] + rng.randbytes(len(part)) + data[at + len(part) :]
    if kind == 3:  # zeros, as of blocks that were not written
        return data[:at] + bytes(len(part)) + data[at + len(part) :]
    if kind == 4:
        return data[:at]
    if kind == 5:
        return data[:at] + data[at + len(part) :]
    if kind == 6:
        return data[:at] + rng.randbytes(rng.choice((1, 2, 8, 512))) + data[at:]
    if kind == 7:
        return data[:to] + part + data[to:]
    size = rng.choice((1, 8, 64, 512))
    blocks = [data[i : i + size] for i in range(0, len(data), size)]
    a, b = rng.randrange(len(blocks)), rng.randrange(len(blocks))
    blocks[a], blocks[b] = blocks[b], blocks[a]
    return b"".join(blocks)


def places(tree: Tree, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path of everything in a JSON value."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    for name, value in items:
        yield (*path, name)
        if isinstance(value, dict | list):
            yield from places(value, (*path, name))


def odd(rng: random.Random) -> Tree:
    """Return a value that hardly any place is made for, its own to change."""
    return copy.deepcopy(rng.choice(CRAZY))


def change(rng: random.Random, tree: Tree) -> None:
    """Change something in a JSON value: another value, gone, moved, or one more."""
    paths = list(places(tree))
    if not paths:
        return
    path = rng.choice(paths)
    inside = tree
    for name in path[:-1]:
        inside = inside[name]
    kind = rng.randrange(8)
    if kind == 0:
        del inside[path[-1]]
    elif kind == 1 and isinstance(inside, dict):
        inside[rng.choice(("more", "columns", "views", "labels", ""))] = odd(rng)
    elif kind == 1:
        inside.insert(rng.randrange(len(inside) + 1), odd(rng))
    elif kind == 2:  # a value from elsewhere
        value = tree
        for name in rng.choice(paths):
            value = value[name]
        inside[path[-1]] = copy.deepcopy(value)
    elif kind == 3 and type(inside[path[-1]]) is int:
        inside[path[-1]] += rng.choice((-512, -8, -1, 1, 8, 512))
    else:
        inside[path[-1]] = odd(rng)


def text_of(rng: random.Random, tree: Tree) -> bytes:
    """Return a JSON value as text, sometimes as no writer would write it."""
    text = json.dumps(tree, sort_keys=True, indent=2).encode()
    kind = rng.randrange(12)
    if kind == 0:
        return rng.choice(TEXTS)
    if kind == 1:  # the same name twice
        name = rng.choice(list(tree))
        return text[:-1] + b", " + json.dumps({name: odd(rng)}).encode()[1:]
    if kind == 2:
        at = rng.randrange(len(text))
        return text[:at] + rng.choice(TEXTS) + text[at:]
    return text


# --- signed again ---------------------------------------------------------------------------------


def header_of(shard: bytes) -> tuple[int, int]:
    """Return where the header of a shard begins and ends."""
    at, size = (int.from_bytes(shard[i : i + 8], "little") for i in (24, 32))
    return at, at + size


def with_header(shard: bytes, text: bytes) -> bytes:
    """Return a shard with another header behind its end, its hashes right."""
    body = shard[HEAD_SIZE:] + text
    numbers = (HEAD_SIZE + len(body), HEAD_SIZE + len(body) - len(text), len(text))
    head = shard[:16] + b"".join(n.to_bytes(8, "little") for n in numbers) + sha256(text).digest()
    return (head + sha256(head).digest()).ljust(HEAD_SIZE, b"\0") + body


def signed(tree: dict[str, Any], shard: bytes) -> None:
    """Make the hashes of columns in a header right, where they can be."""
    with contextlib.suppress(ArithmeticError, AttributeError, LookupError, TypeError, ValueError):
        for name, where in tree["columns"].items():
            if "sha256" in where:
                size = {"|": 1, "<": int(where["type"][-1])}[where["type"][0]]
                for length in where["shape"]:
                    size *= length
                part = shard[where["offset"] : where["offset"] + size]
                columns = tree["columns"]
                columns[name]["sha256"] = sha256(part).hexdigest()


def signed_manifest(files: Files, manifest: Tree, write: Callable[[Tree], bytes]) -> bytes:
    """Return a manifest whose hashes are right, those of the files too."""
    from mealv2.storage.json_format import canonical_json

    with contextlib.suppress(AttributeError, LookupError, TypeError, ValueError, RecursionError):
        for split in manifest["roles"].values():
            for block in split["blocks"]:
                for entry in block["shards"]:
                    data = files[entry["name"]]
                    entry["bytes"] = len(data)
                    entry["sha256"] = sha256(data).hexdigest()
                    entry["head_sha256"] = sha256(data[:HEAD_SIZE]).hexdigest()
    with contextlib.suppress(LookupError, TypeError, ValueError, RecursionError):
        plan_text = canonical_json(manifest["plan"]).encode("utf-8", "surrogatepass")
        manifest["plan_sha256"] = sha256(plan_text).hexdigest()
    if not isinstance(manifest, dict):
        return write(manifest)
    manifest["manifest_sha256"] = "0" * 64
    text = write(manifest)
    own = sha256(text).hexdigest().encode()
    return text.replace(b'"manifest_sha256": "' + b"0" * 64, b'"manifest_sha256": "' + own, 1)


# --- cases ----------------------------------------------------------------------------------------


@dataclass
class Set:
    """A whole set: its files, and its labels, which every case is compared with."""

    name: str
    files: Files
    places: list[tuple[str, int]]
    rows: Any


@dataclass
class Case:
    """A damaged set. ``must`` be found by verify; ``is_forged``: other labels, signed as such."""

    kind: str
    files: Files
    must: bool = False
    is_forged: bool = False


def make_case(rng: random.Random, whole: Set) -> Case:
    """Return a set with something wrong."""
    files = dict(whole.files)
    kind = rng.choice(["raw"] * 5 + ["header"] * 3 + ["column"] + ["manifest"] * 2)
    if kind == "raw":
        name = rng.choice(sorted(files))
        files[name] = raw(rng, files[name])
        must = files != whole.files
        return Case(f"raw {Path(name).suffix[1:]}", files, must=must)
    if kind == "manifest":
        manifest = json.loads(files["manifest.json"])
        for _ in range(rng.choice((1, 1, 2, 4))):
            change(rng, manifest)
        files["manifest.json"] = signed_manifest(files, manifest, lambda t: text_of(rng, t))
        return Case(kind, files)
    name = rng.choice([name for name in sorted(files) if name.endswith(".h5")])
    shard = files[name]
    begin, end = header_of(shard)
    header = json.loads(shard[begin:end])
    forged = False
    if kind == "header":
        for _ in range(rng.choice((1, 1, 2, 4))):
            change(rng, header)
        if rng.random() < 0.9:
            signed(header, shard)
        files[name] = with_header(shard, text_of(rng, header))
        # rows that were appended answer before others do; what they label is up to them
        forged = "-more-" in name
    else:
        column = rng.choice(sorted(header["columns"]))
        where = header["columns"][column]
        size = int(where["type"][-1])
        for length in where["shape"]:
            size *= length
        if size:
            data = bytearray(shard)
            at = where["offset"] + rng.randrange(size)
            data[at] = rng.choice((0, 1, 127, 128, 255, data[at] ^ 1, (data[at] + 1) % 256))
            shard = bytes(data)
        forged = "-more-" in name
        if column == "labels" and rng.random() < 0.5:
            shard = with_right_crcs(shard, header)
            forged = True
        signed(header, shard)
        files[name] = with_header(shard, json.dumps(header).encode())
    files["manifest.json"] = signed_manifest(
        files, json.loads(files["manifest.json"]), lambda t: json.dumps(t, indent=2).encode()
    )
    return Case(kind, files, is_forged=forged)


def with_right_crcs(shard: bytes, header: dict[str, Any]) -> bytes:
    """Return a shard whose blocks pass their CRC-32, whatever is in them."""
    import numpy as np

    from mealv2.label_set.blocks import block_crc

    def column(name: str, kind: str) -> list[int]:
        where = header["columns"][name]
        return np.frombuffer(shard, kind, where["shape"][0], where["offset"]).tolist()

    at = {name: where["offset"] for name, where in header["columns"].items()}
    crcs, key_at, label_at = [], at["keys"], at["labels"]
    for key_end, label_end in zip(
        column("key_ends", "<u8"), column("label_ends", "<u8"), strict=True
    ):
        key = shard[key_at : at["keys"] + key_end]
        block = shard[label_at : at["labels"] + label_end]
        crcs.append(block_crc(key, block).to_bytes(4, "little"))
        key_at, label_at = at["keys"] + key_end, at["labels"] + label_end
    data = b"".join(crcs)
    return shard[: at["crc32"]] + data + shard[at["crc32"] + len(data) :]


NUM_SPECIAL = 12  # the first cases: too large, or too rare, to be met by chance


def make_special(number: int, whole: Set) -> Case:
    """Return one of the first cases."""
    name = next(name for name in sorted(whole.files) if name.endswith(".h5"))
    begin, end = header_of(whole.files[name])
    header = whole.files[name][begin:end]
    if number < 4:
        digits = b"9" * 100_000_000
        if number < 2:
            text = digits if number else b'{"plan": ' + digits + b"}"
            return Case("100 MB of digits", {**whole.files, "manifest.json": text})
        text = digits if number == 2 else header[:-1] + b', "more": ' + digits + b"}"
    else:
        field = (b"counts", b"skipped", b"num_views", b"columns")[number % 4]
        deep = (b"[" * 10_000 + b"]" * 10_000, b'{"a":' * 10_000 + b"1" + b"}" * 10_000)
        text = header[:-1] + b', "' + field + b'": ' + deep[number // 8] + b"}"
    kind = "100 MB of digits" if number < 4 else "nested"
    return Case(kind, {**whole.files, name: with_header(whole.files[name], text)})


# --- reading --------------------------------------------------------------------------------------


class TooLong(BaseException):
    """A case took more than its time."""


def _too_long(number: int, frame: FrameType | None) -> None:
    raise TooLong


class Reader:
    """Reads sets in a folder in every way there is."""

    def __init__(self, folder: Path) -> None:
        # imported here, so that a test that starts this program imports nothing for it
        import label_sets
        from mealv2.errors import LabelSetError
        from mealv2.label_set import LabelSet
        from pipeline.config import LabelsInfoConfig, LabelsVerifyConfig
        from pipeline.label_sets import info, verify

        self.folder = folder / "set"
        self._error = LabelSetError
        self._open = LabelSet.open
        self._same = label_sets.same
        self._look_up = label_sets.look_up
        self._verify = lambda: verify.run(LabelsVerifyConfig(labels=self.folder, workers=1))
        self._info = lambda: info.run(LabelsInfoConfig(labels=self.folder))

    def put(self, files: Files) -> None:
        """Write a set."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        for name, data in files.items():
            (self.folder / name).write_bytes(data)

    def outcome(self, whole: Set, case: Case, rng: random.Random) -> str:
        """Read a damaged set; return ``right`` or why it was refused; raises what is a defect."""
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):  # noqa: PTH123
            return self._outcome(whole, case, rng)

    def _outcome(self, whole: Set, case: Case, rng: random.Random) -> str:
        opened: list[Any] = []
        reasons = [self._refusal(lambda: opened.append(self._open(self.folder)))]
        some = rng.sample(range(len(whole.places)), 3)
        for order in (range(len(whole.places)), *([n] for n in some)):
            for labels in opened:
                check = partial(self._check_rows, labels, whole, case, list(order))
                reasons.append(self._refusal(check))
        found = self._refusal(self._verify)
        told = self._refusal(self._info)
        assert found or not case.must, "verify did not find it"
        assert found or told is None, "verify finds what info does not"
        return next((r for r in (*reasons, found) if r), "right")

    def _check_rows(self, labels: Any, whole: Set, case: Case, order: list[int]) -> None:
        import torch

        rows = self._look_up(labels, [whole.places[n] for n in order])
        rows.labels.kept()
        if not case.is_forged:
            expected = whole.rows.rows(torch.tensor(order))
            assert self._same(rows, expected), "wrong labels were returned"

    def _refusal(self, read: Callable[[], object]) -> str | None:
        """Return why reading was refused, None where it was not."""
        refused = None
        try:
            read()
        except self._error as error:
            refused = error
        if refused is None:
            return None
        assert refused.exit_code == 3
        assert str(refused).strip(), "a reason"
        return str(refused)


def reason_of(text: str, folder: Path) -> str:
    """Return a reason without names and numbers, to count by."""
    text = text.replace(str(folder), "").partition(";")[0]
    text = text.partition(" is damaged: ")[2] or text
    for mark in ("SHA-256", "CRC-32", "no label", "is not the one", "cannot be read", "column"):
        if mark in text:
            return mark
    return " ".join([word for word in text.split() if word.isalpha()][:5])


def make_sets(folder: Path) -> list[Set]:
    """Write whole sets of many kinds."""
    import numpy as np

    from label_sets import ENCODINGS, KEYS, make_set
    from mealv2.label_set import Appender, Encoding, Images, LabelSet, ShardFile

    images = Images(np.full((5, 2), 40), np.full(5, 1000), np.zeros(5), np.arange(5))
    sets = []
    for number, name in enumerate(
        ("rate", "rate, logits", "curve of all", "float16", "float32, logits", "dense float16")
    ):
        place = folder / "whole" / str(number)
        ends = (2, 4) if number % 2 else ()
        skipped = {"bad/1.jpg": "the file is empty"} if number < 3 else None
        known = images if number < 4 else None
        made = make_set(
            place, ENCODINGS[name], KEYS, 4, block_ends=ends, skipped=skipped, images=known
        )
        labels = LabelSet.open(place)
        where = made.addresses()
        if number % 3 == 0:
            keys = KEYS[:2]
            appender = Appender(labels)
            probs = labels.soft_labels(keys, [1, 1]).to_dense()
            appender.add(keys, [7, 7], labels.encoding.encode(probs))
            appender.flush()
            where += [(key, 7) for key in keys]
        sets.append(_read_whole(name, place, where))
    place = folder / "whole" / "added"
    ends = (16, 17, 20)
    made = make_set(
        place, Encoding(50, rate=1e-3), KEYS, 20, block_ends=ends, images=images, uses_first=True
    )
    assert any("first_sha256" in ShardFile(path).header for path in place.glob("*.h5"))
    sets.append(_read_whole("rate, added to the first model", place, made.addresses()))
    return sets


def _read_whole(name: str, place: Path, places: list[tuple[str, int]]) -> Set:
    from label_sets import look_up
    from mealv2.label_set import LabelSet

    files = {path.name: path.read_bytes() for path in place.iterdir()}
    return Set(name, files, places, look_up(LabelSet.open(place), places))


def run(folder: Path, seed: int, first: int, count: int) -> dict[str, Any]:
    """Run cases; return how many were read or refused, by kind and reason, and what was wrong."""
    sets = make_sets(folder)
    reader = Reader(folder)
    signal.signal(signal.SIGPROF, _too_long)
    for whole in sets:  # nothing is wrong with these
        reader.put(whole.files)
        assert reader.outcome(whole, Case("whole", whole.files), random.Random(0)) == "right"
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + ADDRESS_SPACE, resource.RLIM_INFINITY))
    kinds: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    wrong = []
    most = 0.0
    for number in range(first, first + count):
        (folder / "at.txt").write_text(str(number))
        rng = random.Random(f"{seed}-{number}")
        whole = sets[0] if number < NUM_SPECIAL else rng.choice(sets)
        case = make_special(number, whole) if number < NUM_SPECIAL else make_case(rng, whole)
        reader.put(case.files)
        size = sum(map(len, case.files.values()))
        signal.setitimer(signal.ITIMER_PROF, SECONDS + size * SECONDS_PER_BYTE)
        is_measured = number < NUM_SPECIAL or number % MEASURED_EVERY == 0
        if is_measured:
            tracemalloc.start()
        try:
            what = reader.outcome(whole, case, rng)
            signal.setitimer(signal.ITIMER_PROF, 0)
            peak = tracemalloc.get_traced_memory()[1] if is_measured else 0
            most = max(most, max(0, peak - FLOOR) / size)
            assert peak <= TIMES_SIZE * size + FLOOR, f"it took {peak} bytes for {size}"
            kinds[f"{case.kind}: {'right' if what == 'right' else 'refused'}"] += 1
            reasons[reason_of(what, reader.folder)] += 1
        except BaseException:  # whatever it is, it is the finding
            signal.setitimer(signal.ITIMER_PROF, 0)
            named = f"case {number} of seed {seed} ({whole.name}, {case.kind})"
            wrong.append(f"{named}\n{traceback.format_exc()}")
            if len(wrong) == 10:
                break
        finally:
            tracemalloc.stop()
    return {"kinds": kinds, "reasons": reasons, "wrong": wrong, "most": round(most, 2)}


if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).resolve().parents[1])]
    print(json.dumps(run(Path(sys.argv[1]), *map(int, sys.argv[2:5]))))
