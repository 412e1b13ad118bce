"""Damage to files, and odd values of options, for benchmarks/fuzz_commands.py."""

import copy
import gzip
import io
import json
import os
import random
import socket
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch
from fuzz_inputs import IMAGE_SUFFIXES, Command

import cli
from fuzz import TEXTS, change, odd, raw, text_of

# --- damage ---------------------------------------------------------------------------------------


def damage_file(rng: random.Random, path: Path) -> str:
    """Damage a file; return what was done."""
    kind = rng.randrange(20)
    if kind < 4:
        return _special(rng, path)
    data = path.read_bytes()
    if kind == 4:
        path.write_bytes(rng.choice(TEXTS))
        return "another text"
    maker = _FORMATS.get(path.suffix)
    if maker is not None and kind < 14 and data:
        changed = maker(rng, path, data)
        path.write_bytes(changed)
        return "changed values"
    path.write_bytes(raw(rng, data) if data else rng.choice(TEXTS))
    return "bytes"


def _special(rng: random.Random, path: Path) -> str:
    kind = rng.randrange(10)
    path.unlink()
    if kind == 0:
        os.mkfifo(path)
        return "pipe"
    if kind == 1:
        path.symlink_to("/dev/zero")
        return "link to /dev/zero"
    if kind == 2:
        path.touch()
        os.truncate(path, 20 << 30)
        return "sparse, 20 GB"
    if kind == 3:
        path.mkdir()
        if rng.random() < 0.5:
            (path / "x").write_bytes(b"x")
        return "folder"
    if kind == 4:
        path.symlink_to(path.name)
        return "link to itself"
    if kind == 5:
        path.symlink_to(path.parent, target_is_directory=True)
        return "link to the folder above"
    if kind == 6:
        with socket.socket(socket.AF_UNIX) as listener:
            folder = os.open(path.parent, os.O_RDONLY)  # the path can be too long for a socket
            try:
                listener.bind(f"/proc/self/fd/{folder}/{path.name}")
            finally:
                os.close(folder)
        return "socket"
    if kind == 7:
        return "missing"
    if kind == 8:
        path.symlink_to("/nowhere")
        return "dangling link"
    path.touch()
    return "empty"


def _changed_json(rng: random.Random, _: Path, data: bytes) -> bytes:
    try:
        tree = json.loads(data)
    except ValueError:
        return raw(rng, data)
    tree = copy.deepcopy(tree)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        if isinstance(tree, dict | list) and tree:
            change(rng, tree)
    return _encoded(rng, tree)


def _encoded(rng: random.Random, tree: Any) -> bytes:
    try:
        return text_of(rng, tree)
    except (ValueError, TypeError, LookupError):
        return json.dumps(tree).encode()


def _changed_lines(rng: random.Random, path: Path, data: bytes) -> bytes:
    lines = data.splitlines(keepends=True)
    at = rng.randrange(len(lines))
    if path.suffix == ".jsonl" and rng.random() < 0.7:
        lines[at] = _changed_json(rng, path, lines[at]).replace(b"\n", b" ") + b"\n"
    else:
        odd_lines = [
            b"\x1b[31mred\n",
            b"\xff\xfe\n",
            b"\n",
            b"a\0b\n",
            b"../x\n",
            b"9" * 9999 + b"\n",
        ]
        odd_lines += [lines[0], "\ufeffx\n".encode(), b",\n", b"=1+1\n"]
        lines[at] = rng.choice(odd_lines)
    return b"".join(lines)


def _changed_gzip(rng: random.Random, path: Path, data: bytes) -> bytes:
    if rng.random() < 0.1:  # a small file of 3 GB
        return gzip.compress(bytes(1 << 24), 9) * 180
    return gzip.compress(_changed_json(rng, path, gzip.decompress(data)))


def _changed_weights(rng: random.Random, path: Path, data: bytes) -> bytes:
    state = torch.load(io.BytesIO(data), weights_only=False)
    inner = rng.choice([state, *(v for v in state.values() if isinstance(v, dict) and v)])
    name = rng.choice(list(inner))
    value = inner[name]
    kind = rng.randrange(9)
    if kind == 0:
        inner[name] = odd(rng)
    elif kind == 1:
        del inner[name]
    elif kind == 2:
        inner[rng.choice((1, None, "", "x" * 9999, ("a", 1), b"x"))] = value
    elif kind == 3:  # a tensor of a huge shape in a few bytes
        inner[name] = torch.zeros(1).expand(1 << 40)
    elif kind == 4:
        inner[name] = torch.full((3, 3), float("nan"))
    elif kind == 5:
        inner[name] = torch.eye(2).to_sparse()
    elif kind == 6:
        inner[name] = torch.zeros(2, dtype=rng.choice((torch.complex64, torch.bool, torch.int8)))
    elif kind == 7:
        inner[name] = {"x": {"y": [inner[name]]}}
    else:
        state = rng.choice(([1, 2], None, 3, "x", {}, {"state_dict": {}}, torch.zeros(3), {"a": 1}))
    out = io.BytesIO()
    torch.save(state, out)
    return out.getvalue()


def _changed_safetensors(rng: random.Random, path: Path, data: bytes) -> bytes:
    size = int.from_bytes(data[:8], "little")
    header = _changed_json(rng, path, data[8 : 8 + size])
    kind = rng.randrange(4)
    length = rng.choice((0, 1, 2**63, 2**64 - 1, size)) if kind == 0 else len(header)
    return length.to_bytes(8, "little") + header + data[8 + size :]


def _changed_tar(rng: random.Random, path: Path, data: bytes) -> bytes:
    if not tarfile.is_tarfile(path):  # a cache has other files with such names
        return raw(rng, data)
    out = io.BytesIO()
    with tarfile.open(fileobj=io.BytesIO(data)) as old, tarfile.open(fileobj=out, mode="w") as new:
        members = old.getmembers()
        at = rng.randrange(len(members))
        for number, member in enumerate(members):
            content = old.extractfile(member)
            body = content.read() if content is not None else b""
            member.pax_headers = dict(member.pax_headers)
            if number == at:
                body = _changed_member(rng, member, body)
            new.addfile(member, io.BytesIO(body))
            if number == at and rng.random() < 0.2:
                new.addfile(member, io.BytesIO(body))
    return out.getvalue()


def _changed_member(rng: random.Random, member: tarfile.TarInfo, body: bytes) -> bytes:
    kind = rng.randrange(8)
    if kind == 0:
        member.type = rng.choice(
            (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE)
        )
        member.linkname = rng.choice(("/etc/passwd", "../../x", member.name))
    elif kind == 1:
        odd_names = (
            "../" * 20 + "x.jpg",
            "/abs.jpg",
            "a\x1b[31m.jpg",
            "x" * 5000 + ".jpg",
            ".jpg",
            "a.cls",
        )
        member.name = rng.choice(odd_names)
    elif kind == 2:
        body = rng.choice((b"", b"-1", b"9" * 5000, b"\xff", b"nan", b"3", b"1e9", b"{"))
    elif kind == 3:
        member.pax_headers["size"] = rng.choice(("9" * 20, "-5", "x"))
    elif kind == 4:
        member.name = member.name.replace(".", rng.choice(("..", "", "\n.", "\u202e.")), 1)
    else:
        body = raw(rng, body) if body else b"x"
    member.size = len(body)
    return body


def _changed_image(rng: random.Random, _: Path, data: bytes) -> bytes:
    if rng.random() < 0.7:  # the head says how large it is
        head = bytearray(data)
        for _ in range(rng.choice((1, 2, 4))):
            head[rng.randrange(min(len(head), 200))] = rng.choice((0, 1, 0x7F, 0x80, 0xFF))
        return bytes(head)
    return raw(rng, data)


_FORMATS: dict[str, Callable[[random.Random, Path, bytes], bytes]] = {
    ".json": _changed_json, ".index": _changed_json, ".lock": _changed_json,
    ".jsonl": _changed_lines, ".csv": _changed_lines, ".txt": _changed_lines,
    ".gz": _changed_gzip, ".pth": _changed_weights, ".pt": _changed_weights,
    ".safetensors": _changed_safetensors,
    ".tar": _changed_tar, **{f".{suffix}": _changed_image for suffix in IMAGE_SUFFIXES},
}  # fmt: skip


# --- odd values of options ------------------------------------------------------------------------

_ODD_WORDS = (
    "", "0", "-1", "1", "2", "3", "1000000000000000000", "100000000", "9" * 400, "-9" * 30,
    "9223372036854775807", "9223372036854775808", "nan", "inf", "-inf", "1e308", "1e-320", "0.5",
    "x", "é\u202e", "\x1b[31mred", "a,b", ",", "=", "a=", "=b", "a=b=c", "..", "/", "/dev/null",
    "/dev/zero", "data", "teacher", "labels", "weights.pth", "x" * 5000, "a\nb", "true", "all",
    "auto", "none", "s3:/x", "s3://", "http://", "http://127.0.0.1:1/x.tar", "ftp://x/y", "pipe:",
    "pipe:false", "file:///etc", "{a,b}", "{0..999999999}", "%s", "~", "*", "\udcff",
)  # fmt: skip
# a large number is not wrong there, it takes long
_LONG = frozenset(
    (
        *("epochs", "num_views", "views_per_image", "relabel", "workers", "num_procs"),
        *("grad_accum_steps", "images_per_shard", "parts", "num_jobs", "log_interval"),
    )
)


def odd_option(rng: random.Random, command: Command) -> tuple[list[str], str]:
    """Return the words of a command with an odd value of some option, and the option's name."""
    group: click.Command = cli.cli
    for word in command.name.split():
        assert isinstance(group, click.Group)
        group = group.commands[word]
    words = list(command.words)
    options = [p for p in group.params if isinstance(p, click.Option) and not p.is_flag]
    option = rng.choice([p for p in options if p.opts[0] not in ("--cache-dir", "--help")])
    count = max(1, option.nargs)
    values = [rng.choice(_ODD_WORDS) for _ in range(count)]
    if option.name in _LONG:
        values = [v if not v.isdecimal() or int(v) < 4 or int(v) > 2**40 else "3" for v in values]
    if command.name.startswith("slurm"):
        return [*words[:2], option.opts[0], *values, *words[2:]], option.opts[0]
    return [*words, option.opts[0], *values], option.opts[0]
