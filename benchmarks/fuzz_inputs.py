"""What benchmarks/fuzz_commands.py gives to commands: a folder of every kind of file, and damage."""

import copy
import gzip
import io
import json
import os
import random
import shutil
import socket
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from fuzz import TEXTS, change, odd, raw, text_of
from PIL import Image
from safetensors.torch import load_file

import cli

Mealv2 = Callable[..., None]  # runs a command to its end; raises if it fails

CLASSES = ("ants", "bees", "cats")
IMAGE_SUFFIXES = ("jpg", "png", "bmp", "gif", "webp", "tiff", "ppm", "avif")
SMALL = "--img-size 32 --workers 0"
TRAIN = f"--model test_resnet --epochs 1 --batch-size 6 {SMALL.replace('--img-size 32 ', '')}"
STAGE_ONE = f"precompute --teacher test_resnet=teacher --num-views 2 --shard-size 8 {SMALL} -b 8"
ON_TARS = STAGE_ONE.replace("--shard-size 8 ", "")


@dataclass(frozen=True)
class Command:
    """A command line, and the files and folders that it needs."""

    name: str
    words: tuple[str, ...]
    needs: tuple[str, ...]


def _command(line: str, needs: str) -> Command:
    words = line.split()
    name = " ".join(words[: 2 if words[0] in ("labels", "slurm") else 1])
    return Command(name, tuple(words), tuple(needs.split()))


COMMANDS = [
    _command(line, needs)
    for line, needs in (
        (f"{STAGE_ONE} --data-dir data --output out", "data teacher"),
        (f"{STAGE_ONE} --data-dir data --output out --store-logits --topk 2", "data teacher"),
        (f"{STAGE_ONE} --data-dir data --output unfinished", "data teacher unfinished"),
        (f"{STAGE_ONE} --data-dir data --output labels", "data teacher labels"),
        (
            f"{STAGE_ONE} --data-dir data --output unfinished --shard-list shards.txt",
            "data teacher unfinished shards.txt",
        ),
        (f"{ON_TARS} --data-dir tars --output out", "tars teacher"),
        (f"{ON_TARS} --data-dir plain-tars --output out", "plain-tars teacher"),
        (f"{STAGE_ONE} --data-dir packed --output out", "packed teacher"),
        (f"{STAGE_ONE} --data-dir data --output out --dry-run", "data teacher"),
        (
            "precompute --config stage-one.json --data-dir data --output out --workers 0",
            "stage-one.json data teacher",
        ),
        (
            f"{ON_TARS} --data-dir URL/tars/{{train,val}}-000000.tar --output out --cache-dir cache",
            "tars teacher cache",
        ),
        (
            f"distill --data-dir data --labels labels --initial-checkpoint teacher {TRAIN} "
            "--output out",
            "data labels teacher",
        ),
        (
            f"distill --data-dir data --labels more-labels --initial-checkpoint weights.pth {TRAIN} "
            "--output out",
            "data more-labels weights.pth",
        ),
        (
            f"distill --data-dir data --labels few-labels --missing teach --write-back "
            f"--teacher test_resnet=teacher --no-pretrained {TRAIN} --output out",
            "data few-labels teacher",
        ),
        (
            f"distill --data-dir data --online --teacher test_resnet=teacher --no-pretrained "
            f"--img-size 32 {TRAIN} --output out",
            "data teacher",
        ),
        ("distill --resume distilled --epochs 2", "data labels distilled teacher"),
        ("distill --config distilled/config.json --output out", "data labels distilled teacher"),
        (
            f"distill --data-dir data --labels labels --model test_resnet --no-pretrained "
            f"{TRAIN} --dry-run",
            "data labels",
        ),
        (
            f"finetune --data-dir data --initial-checkpoint weights.pth --img-size 32 {TRAIN} "
            "--output out",
            "data weights.pth",
        ),
        (
            f"finetune --data-dir tars --initial-checkpoint weights.safetensors --img-size 32 "
            f"{TRAIN} --output out",
            "tars weights.safetensors",
        ),
        (f"finetune --data-dir packed --no-pretrained --img-size 32 {TRAIN} --output out", "packed"),
        (
            f"finetune --data-dir data --initial-checkpoint exported --img-size 32 {TRAIN} "
            "--output out",
            "data exported",
        ),
        ("finetune --resume tuned --epochs 2", "data tuned"),
        (
            f"finetune --data-dir data --no-pretrained --img-size 32 {TRAIN} --output tuned "
            "--auto-resume --epochs 2",
            "data tuned",
        ),
        (
            f"finetune --data-dir URL/tars/{{train,val}}-000000.tar --no-pretrained --img-size 32 "
            f"{TRAIN} --cache-dir cache --output out",
            "tars cache",
        ),
        (f"evaluate --data-dir data --checkpoint tuned {SMALL} --results-file out.csv", "data tuned"),
        (
            f"evaluate --data-dir data --model test_resnet --checkpoint weights.pth {SMALL}",
            "data weights.pth",
        ),
        (
            f"evaluate --data-dir data --model test_resnet --checkpoint training.pth {SMALL}",
            "data training.pth",
        ),
        (
            f"evaluate --data-dir tars --model test_resnet --checkpoint weights.safetensors {SMALL}",
            "tars weights.safetensors",
        ),
        (f"evaluate --data-dir plain-tars --checkpoint exported {SMALL}", "plain-tars exported"),
        (
            f"evaluate --data-dir URL/tars/{{train,val}}-000000.tar --checkpoint teacher {SMALL} "
            "--cache-dir cache",
            "tars cache teacher",
        ),
        (f"predict data/val --checkpoint teacher {SMALL} --results-file out.json", "data teacher"),
        (f"predict data/train/ants --checkpoint distilled {SMALL}", "data distilled"),
        ("export tuned --to timm --output out", "tuned"),
        ("export distilled --to hub-folder --output out", "distilled"),
        ("export distilled --to torchscript --output out.pt", "distilled"),
        ("pack --data-dir data --to tar --output out --images-per-shard 8", "data"),
        ("pack --data-dir data --to tar --output tars", "data tars"),
        ("pack --data-dir data --output out", "data"),
        ("pack --data-dir data --output packed", "data packed"),
        ("pack --data-dir plain-tars --split train --split val --to tar --output out", "plain-tars"),
        ("labels info labels", "labels"),
        ("labels info unfinished", "unfinished"),
        ("labels status unfinished --list list.txt", "unfinished"),
        ("labels status labels", "labels"),
        ("labels finish all-shards", "all-shards"),
        ("labels verify labels", "labels"),
        ("labels verify more-labels", "more-labels"),
        ("labels verify labels --data-dir data --workers 0", "labels data"),
        ("labels verify packed-labels --data-dir packed --workers 0", "packed-labels packed"),
        (
            "labels verify labels --data-dir data --relabel 6 --teacher test_resnet=teacher "
            "--workers 0",
            "labels data teacher",
        ),
        ("labels merge parts/part-0 parts/part-1 --output out", "parts"),
        (
            "labels add-views labels --data-dir data --num-views 3 --workers 0 -b 8 "
            "--teacher test_resnet=teacher",
            "labels data teacher",
        ),
        ("labels split labels --output out", "labels"),
        ("labels convert labels --topk 2 --output out", "labels"),
        ("labels export labels --to fkd --label-type marginal_smoothing_k2 --output out", "labels"),
        ("labels export labels --to webdataset --data-dir data --output out", "labels data"),
        ("labels export labels --to parquet --output out", "labels"),
        ("labels import fkd --data-dir data --img-size 32 --output out", "fkd data"),
        (
            f"slurm precompute --print {STAGE_ONE.partition(' ')[2]} --data-dir data --output out",
            "data teacher",
        ),
        (
            f"slurm distill --print --data-dir data --labels labels --initial-checkpoint teacher "
            f"{TRAIN} --output out",
            "data labels teacher",
        ),
    )
]  # fmt: skip


# --- the files ------------------------------------------------------------------------------------


def write_whole(folder: Path, mealv2: Mealv2) -> None:
    """Write every kind of file that a command reads, by the commands that write them.

    The current folder is ``folder``.
    """
    rng = np.random.default_rng(0)
    for split, count in (("train", 4), ("val", 2)):
        for class_id, name in enumerate(CLASSES):
            for number in range(count):
                _write_image(folder / "data" / split / name, class_id, number, rng)
    mealv2(f"finetune --data-dir data --no-pretrained --img-size 32 {TRAIN} --output tuned")
    mealv2("export tuned --to timm --output exported")
    shutil.copytree("tuned/student", "teacher")
    state = _state("teacher")
    torch.save(state, "weights.pth")
    training = {"state_dict": {f"module.{n}": v for n, v in state.items()}, "epoch": 3}
    torch.save({**training, "arch": "test_resnet", "best": np.float64(0.5)}, "training.pth")
    shutil.copy("teacher/model.safetensors", "weights.safetensors")
    mealv2(f"{STAGE_ONE} --data-dir data --output labels")
    mealv2(
        f"distill --data-dir data --labels labels --initial-checkpoint teacher {TRAIN} "
        "--output distilled"
    )
    mealv2("pack --data-dir data --to tar --output tars")
    mealv2("pack --data-dir data --output packed")
    mealv2(f"{STAGE_ONE} --data-dir packed --output packed-labels")
    mealv2("labels split labels --output parts")
    mealv2("labels export labels --to fkd --label-type marginal_smoothing_k2 --output fkd")
    mealv2("labels export labels --to webdataset --data-dir data --output plain-tars")
    mealv2("labels export labels --to webdataset --data-dir data --split val --output val-tars")
    for path in Path("val-tars").glob("val-*.tar"):
        path.rename(Path("plain-tars", path.name))
    shutil.rmtree("val-tars")
    for name in ("more-labels", "few-labels"):
        shutil.copytree("labels", name)
        mealv2(
            f"labels add-views {name} --data-dir data --num-views 3 --workers 0 -b 8 "
            "--teacher test_resnet=teacher"
        )
    shutil.copytree("labels", "all-shards")
    Path("all-shards/manifest.json").unlink()
    shutil.copytree("all-shards", "unfinished")
    first = sorted(Path("unfinished").glob("train-*.h5"))[0]
    first.unlink()
    Path("shards.txt").write_text(f"{first.name}\n")
    settings = {"teacher": ["test_resnet=teacher"], "num_views": 2, "img_size": 32}
    settings |= {"shard_size": 8, "batch_size": 8, "data_dir": "data", "output": "out"}
    Path("stage-one.json").write_text(json.dumps(settings))
    mealv2("evaluate --data-dir URL/tars/{train,val}-000000.tar --checkpoint teacher "
           f"{SMALL} --cache-dir cache")  # fmt: skip


def _write_image(folder: Path, class_id: int, number: int, rng: np.random.Generator) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    pixels = np.clip(rng.normal(60 + 60 * class_id, 30, (36, 44, 3)), 0, 255).astype(np.uint8)
    suffix = IMAGE_SUFFIXES[(4 * class_id + number) % len(IMAGE_SUFFIXES)]
    Image.fromarray(pixels).save(folder / f"{number}.{suffix}")


def _state(folder: str) -> dict[str, torch.Tensor]:
    return dict(load_file(f"{folder}/model.safetensors"))


def kind_of(path: Path) -> str:
    """Return the kind of a file, as tables name it."""
    parts, name = path.parts, path.name
    top, suffix = parts[0], path.suffix
    if suffix[1:] in IMAGE_SUFFIXES:
        return f"image {suffix}"
    if top == "cache":
        return "cached copy" if suffix == ".tar" else "cache, other files"
    if top == "fkd":
        return "FKD labels"
    if suffix == ".h5":
        return "appended shard" if "added" in name or "append" in name else "shard"
    if "checkpoints" in parts[:-1] or "step-" in str(path):
        return f"checkpoint, {name}"
    if top in ("tuned", "distilled") and len(parts) == 2:
        return f"RUN/{name}"
    if name == "config.json":
        return "model config.json"
    return f"*{suffix}" if suffix in (".tar", ".index", ".safetensors", ".pth") else name


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
    except (UnicodeEncodeError, ValueError, TypeError, IndexError):
        return json.dumps(tree).encode()


def _changed_lines(rng: random.Random, path: Path, data: bytes) -> bytes:
    lines = data.splitlines(keepends=True)
    at = rng.randrange(len(lines))
    if path.suffix == ".jsonl" and rng.random() < 0.7:
        lines[at] = _changed_json(rng, path, lines[at]).replace(b"\n", b" ") + b"\n"
    else:
        odd_lines = [b"\x1b[31mred\n", b"\xff\xfe\n", b"\n", b"a\0b\n", b"../x\n", b"9" * 9999 + b"\n"]
        odd_lines += [lines[0], "\ufeffx\n".encode(), b",\n", b"=1+1\n"]
        lines[at] = rng.choice(odd_lines)
    return b"".join(lines)


def _changed_gzip(rng: random.Random, path: Path, data: bytes) -> bytes:
    if rng.random() < 0.1:  # a small file of 3 GB
        return gzip.compress(bytes(1 << 24), 9) * 180
    return gzip.compress(_changed_json(rng, path, gzip.decompress(data)))


def _changed_weights(rng: random.Random, path: Path, data: bytes) -> bytes:
    state = torch.load(io.BytesIO(data), weights_only=False)
    inner = rng.choice([state, *(v for v in state.values() if isinstance(v, dict))])
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
        inner[name] = torch.sparse_coo_tensor(torch.zeros(1, 1, dtype=torch.int64), [1.0], (5,))
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


def _changed_tar(rng: random.Random, _: Path, data: bytes) -> bytes:
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
        member.type = rng.choice((tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE))
        member.linkname = rng.choice(("/etc/passwd", "../../x", member.name))
    elif kind == 1:
        odd_names = ("../" * 20 + "x.jpg", "/abs.jpg", "a\x1b[31m.jpg", "x" * 5000 + ".jpg", ".jpg", "a.cls")
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
    ".gz": _changed_gzip, ".pth": _changed_weights, ".safetensors": _changed_safetensors,
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
    ("epochs", "num_views", "views_per_image", "relabel", "workers", "num_procs", "grad_accum_steps",
     "images_per_shard", "parts", "num_jobs", "log_interval")
)  # fmt: skip


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


def files_of(command: Command, folder: Path) -> dict[str, list[Path]]:
    """Return the files that a command is given, relative to ``folder``, by kind."""
    found: dict[str, list[Path]] = {}
    for path in _walk(folder, command.needs):
        found.setdefault(kind_of(path), []).append(path)
    return found


def _walk(folder: Path, needs: tuple[str, ...]) -> Iterator[Path]:
    for name in needs:
        top = folder / name
        for path in [top] if top.is_file() else sorted(top.rglob("*")):
            if path.is_file() and not path.is_symlink():
                yield path.relative_to(folder)
