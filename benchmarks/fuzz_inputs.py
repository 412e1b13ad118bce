"""The command lines of benchmarks/fuzz_commands.py, and a folder of the files that they read."""

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

Mealv2 = Callable[..., None]  # runs a command to its end; raises if it fails

CLASSES = ("ants", "bees", "cats")
IMAGE_SUFFIXES = ("jpg", "png", "bmp", "gif", "webp", "tiff", "ppm", "avif")
SMALL = "--img-size 32 --workers 0"
TRAIN = f"--model test_resnet --epochs 1 --batch-size 6 {SMALL.replace('--img-size 32 ', '')}"
STAGE_ONE = f"precompute --teacher test_resnet=teacher --num-views 2 --shard-size 8 {SMALL} -b 8"
TAUGHT = (
    "distill --data-dir data --labels few-labels --missing teach --write-back "
    f"--teacher test_resnet=teacher --no-pretrained {TRAIN}"
)
NAMED = "--model test_resnet --checkpoint"
ON_WEB = "--data-dir URL/tars/{train,val}-000000.tar"
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
            f"{ON_TARS} {ON_WEB} --output out --cache-dir cache",
            "tars teacher cache",
        ),
        (
            f"distill --data-dir data --labels labels --initial-checkpoint teacher {TRAIN} "
            "--output out",
            "data labels teacher",
        ),
        (
            "distill --data-dir data --labels more-labels --initial-checkpoint weights.pth "
            f"{TRAIN} --output out",
            "data more-labels weights.pth",
        ),
        (
            f"{TAUGHT} --epochs 4 --output out",
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
        (
            f"finetune --data-dir packed --no-pretrained --img-size 32 {TRAIN} --output out",
            "packed",
        ),
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
            f"finetune {ON_WEB} --no-pretrained --img-size 32 "
            f"{TRAIN} --cache-dir cache --output out",
            "tars cache",
        ),
        (
            f"evaluate --data-dir data --checkpoint tuned {SMALL} --results-file out.csv",
            "data tuned",
        ),
        (
            f"evaluate --data-dir data {NAMED} weights.pth {SMALL}",
            "data weights.pth",
        ),
        (
            f"evaluate --data-dir data {NAMED} training.pth {SMALL}",
            "data training.pth",
        ),
        (
            f"evaluate --data-dir tars {NAMED} weights.safetensors {SMALL}",
            "tars weights.safetensors",
        ),
        (f"evaluate --data-dir plain-tars --checkpoint exported {SMALL}", "plain-tars exported"),
        (
            f"evaluate {ON_WEB} --checkpoint teacher {SMALL} --cache-dir cache",
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
        (
            "pack --data-dir plain-tars --split train --split val --to tar --output out",
            "plain-tars",
        ),
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
]


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
    shutil.copytree("labels", "more-labels")
    mealv2(
        "labels add-views more-labels --data-dir data --num-views 3 --workers 0 -b 8 "
        "--teacher test_resnet=teacher"
    )
    shutil.copytree("labels", "few-labels")  # the third epoch needs a third view
    mealv2(f"{TAUGHT} --epochs 3 --output few")
    shutil.rmtree("few")
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
        return "added shard" if "-views-" in name else "appended" if "-more-" in name else "shard"
    if "checkpoints" in parts[:-1] or "step-" in str(path):
        return f"checkpoint, {name}"
    if top in ("tuned", "distilled") and len(parts) == 2:
        return f"RUN/{name}"
    if name == "config.json":
        return "model config.json"
    return f"*{suffix}" if suffix in (".tar", ".index", ".safetensors", ".pth") else name


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
