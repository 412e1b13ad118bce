"""Stage one: run the ensemble over views of every image once and keep what it said.

The validation split is labelled first, one centre crop an image; it says how good the teachers are.
"""

import shutil
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from mealv2 import label_set
from mealv2.errors import LabelSetError, StoppedError
from mealv2.files import TEMPORARY_PREFIX, json_sha256
from mealv2.images import INTERPOLATION, ImageSource, fingerprint, open_source
from mealv2.soft_labels import TAIL_RULE
from mealv2.views import RECIPE, RESIZE_OVER_CROP
from pipeline import logs, runtime, teachers
from pipeline.config import PrecomputeConfig
from pipeline.evaluation import open_split
from pipeline.labelling import Answers, Labeller
from pipeline.loaders import CENTRE, Pixels, Request, ViewReader, name_failures, read_views

_SAMPLE_SECONDS = 5.0  # about how long --dry-run measures


@dataclass(frozen=True)
class Role:
    """A split and the views labelled of it: ``train`` random ones, ``val`` the centre crop."""

    name: str
    source: ImageSource
    views: tuple[int, ...]
    shards: list[range]

    @property
    def num_labels(self) -> int:
        """How many views are labelled."""
        return len(self.source) * len(self.views)


def run(config: PrecomputeConfig) -> dict[str, Any]:
    """Label a data set; return the report. Raises MealError and OSError; whole shards stay."""
    machine = runtime.start(config)
    roles = _roles(config)
    classes = list(roles[-1].source.classes)
    topk = config.kept_classes(len(classes))
    ensemble, described = teachers.build(
        config.teacher, classes=classes, img_size=config.img_size, runtime=machine
    )
    labeller = Labeller(
        ensemble,
        machine,
        num_classes=len(classes),
        topk=topk,
        label_dtype=config.label_dtype,
        batch_size=config.batch_size,
        on_bad_image=config.on_bad_image,
    )
    if config.dry_run:
        return _estimate(config, labeller, roles)
    plan = _plan(config, labeller, roles, described)
    return _Stage(config, labeller, roles, plan).run()


class _Stage:
    """Fill the folder of one plan: make the shards that are not there whole, then the manifest."""

    def __init__(
        self, config: PrecomputeConfig, labeller: Labeller, roles: list[Role], plan: dict[str, Any]
    ) -> None:
        self.config = config
        self.labeller = labeller
        self.roles = roles
        self.plan = plan
        self.plan_sha256 = json_sha256(plan)

    def run(self) -> dict[str, Any]:
        """Make what is missing; raises StoppedError on Ctrl-C, between two batches.

        SIGTERM ends the process as it does any other: schedulers requeue what a signal killed.
        """
        with runtime.stop_on_signal(signal.SIGINT) as self.stop:
            try:
                return self._run()
            except runtime.StopRequested:
                raise StoppedError(
                    "stopped; what was finished is kept: run the same command again to go on"
                ) from None

    def _run(self) -> dict[str, Any]:
        label_set.claim(self.config.out, self.plan)
        began = time.monotonic()
        made = 0
        for role in self.roles:
            made += self._label(role)
            if role.name == "val":
                self._say_accuracy(self._accuracy(self._shards(role)))
        entries = {role.name: self._entry(role) for role in self.roles}
        label_set.write_manifest(
            self.config.out, self.plan, roles=entries, versions=runtime.versions()
        )
        self._say_leftovers()
        train = entries["train"]
        return {
            "labels": str(self.config.out),
            "images": train["num_images"],
            "views": train["num_images"] * self.config.num_views,
            "skipped": sum(len(entry["skipped"]) for entry in entries.values()),
            "bytes": sum(s["bytes"] for entry in entries.values() for s in entry["shards"]),
            "shards_made": made,
            "seconds": round(time.monotonic() - began, 2),
            **({"accuracy": entries["val"]["accuracy"]} if "val" in entries else {}),
        }

    def _label(self, role: Role) -> int:
        """Make the missing shards of a role; return how many there were."""
        missing = [n for n in range(len(role.shards)) if self._whole_shard(role, n) is None]
        if len(missing) < len(role.shards):
            there = len(role.shards) - len(missing)
            logs.say(f"{role.name}: {there} of {len(role.shards)} shards are there")
        requests = {n: _requests(role, role.shards[n], self.config.batch_size) for n in missing}
        num_views = len(role.views)
        pixels = logs.progress(
            self._until_stopped(
                _read(self.config, role, [r for part in requests.values() for r in part])
            ),
            total=sum(len(role.shards[n]) for n in missing) * num_views,
            what=f"labelling {role.name}",
            unit="views",
            size=lambda item: len(item.positions) + len(item.failed) * num_views,
        )
        for number in missing:
            share = islice(pixels, len(requests[number]))
            answers = self.labeller.label(role.source, share, score=role.name == "val")
            path = self._path(role, number)
            # the first whole shard wins; one that is damaged is replaced
            label_set.write_shard(path, self._shard(role, number, answers), replace=path.exists())
        return len(missing)

    def _until_stopped(self, pixels: Iterator[Pixels]) -> Iterator[Pixels]:
        for item in pixels:
            self.stop.check()
            yield item

    def _shard(self, role: Role, number: int, answers: Answers) -> label_set.Shard:
        images = answers.positions[:: len(role.views)]
        shape = (len(images), len(role.views), self.labeller.topk)
        dense = self.labeller.topk == self.labeller.num_classes
        top1, top5 = answers.correct.tolist()
        return label_set.Shard(
            plan_sha256=self.plan_sha256,
            role=role.name,
            number=number,
            keys=[role.source.keys[p] for p in images],
            indices=None if dense else answers.indices_NK.reshape(shape),
            rest=None if dense else answers.rest_N.reshape(shape[:2]),
            probs=answers.probs_NK.reshape(shape),
            skipped=name_failures(role.source, answers.failed),
            counts={"top1": top1, "top5": top5} if role.name == "val" else {},
        )

    def _whole_shard(self, role: Role, number: int) -> label_set.Shard | None:
        """Return a shard of this plan that is there and checks, or None and say why."""
        path = self._path(role, number)
        try:
            shard = label_set.read_shard(path)
        except FileNotFoundError:
            return None
        except LabelSetError as error:
            logs.say(f"{error}; making it anew")
            return None
        if (shard.plan_sha256, shard.role, shard.number) != (self.plan_sha256, role.name, number):
            logs.say(f"shard {path} is of another label set; making it anew")
            return None
        return shard

    def _shards(self, role: Role) -> Iterator[label_set.Shard]:
        """Yield every shard of a role; raises LabelSetError for one that is not whole."""
        for number in range(len(role.shards)):
            shard = self._whole_shard(role, number)
            if shard is None:
                raise LabelSetError(
                    f"shard {self._path(role, number)} vanished or broke after it was written; "
                    "run the same command again"
                )
            yield shard

    def _entry(self, role: Role) -> dict[str, Any]:
        """Return what the manifest says of a role, from the files as they are."""
        shards = list(self._shards(role))
        listed = [
            label_set.describe_file(self._path(role, shard.number), num_images=len(shard.keys))
            for shard in shards
        ]
        skipped = {key: reason for shard in shards for key, reason in shard.skipped.items()}
        if skipped:
            logs.say(f"{role.name}: {len(skipped)} images skipped, listed in manifest.json")
        return {
            "shards": listed,
            "num_images": sum(len(shard.keys) for shard in shards),
            "skipped": skipped,
            **({"accuracy": self._accuracy(shards)} if role.name == "val" else {}),
        }

    def _accuracy(
        self, shards: Iterator[label_set.Shard] | Sequence[label_set.Shard]
    ) -> dict[str, Any]:
        """Return top-1/top-5 in percent of every teacher and of the ensemble."""
        shards = list(shards)
        images = sum(len(shard.keys) for shard in shards)
        top1, top5 = (
            np.sum([shard.counts[name] for shard in shards], axis=0) * 100.0 / max(1, images)
            for name in ("top1", "top5")
        )
        figures = [
            {"top1": round(float(a), 4), "top5": round(float(b), 4)}
            for a, b in zip(top1, top5, strict=True)
        ]
        named = zip(self.plan["teachers"], figures[:-1], strict=True)
        return {
            "num_images": images,
            "teachers": [{"model": teacher["model"], **figure} for teacher, figure in named],
            "ensemble": figures[-1],
        }

    def _say_accuracy(self, accuracy: dict[str, Any]) -> None:
        ensemble = accuracy["ensemble"]
        known = [*((t["model"], t) for t in accuracy["teachers"]), ("ensemble", ensemble)]
        rows = [[name, f"{f['top1']:.2f}", f"{f['top5']:.2f}"] for name, f in known]
        logs.say(logs.table([["teachers on the validation split", "top-1", "top-5"], *rows]))
        if ensemble["top1"] < 200.0 / self.labeller.num_classes:
            logs.say("the ensemble is near chance: are these its classes, in this order?")

    def _say_leftovers(self) -> None:
        leftover = list(self.config.out.glob(f"{TEMPORARY_PREFIX}*"))
        if leftover:
            logs.say(
                f"{self.config.out} holds {len(leftover)} temporary files of jobs that were killed "
                f"or still run ({TEMPORARY_PREFIX}*); remove them when none runs"
            )

    def _path(self, role: Role, number: int) -> Path:
        return self.config.out / label_set.shard_name(role.name, number)


def _roles(config: PrecomputeConfig) -> list[Role]:
    """Return what is labelled, validation first."""
    train = open_source(config.data_dir, config.split)
    val = open_split(config.data_dir, config.val_split, classes=list(train.classes))
    sources = [("val", val, (CENTRE,)), ("train", train, tuple(range(config.num_views)))]
    return [
        Role(name, source, views, label_set.shard_ranges(len(source), config.shard_size))
        for name, source, views in sources
        if source is not None
    ]


def _plan(
    config: PrecomputeConfig, labeller: Labeller, roles: list[Role], described: list[dict[str, Any]]
) -> dict[str, Any]:
    """Return everything that determines the labels, as JSON."""
    views = {
        "train": {**RECIPE, "seed": config.view_seed},
        "val": {"name": "centre-crop", "resize_over_crop": list(RESIZE_OVER_CROP)},
    }
    return {
        "format": label_set.FORMAT,
        "format_version": label_set.FORMAT_VERSION,
        "classes": list(roles[-1].source.classes),
        "teachers": described,
        "ensemble": "mean of softmax",
        "precision": labeller.machine.precision,
        "img_size": config.img_size,
        "interpolation": INTERPOLATION,
        "topk": labeller.topk,
        "tail": TAIL_RULE,
        "label_dtype": config.label_dtype,
        "shard_size": config.shard_size,
        "roles": {
            role.name: {
                "split": role.source.split,
                "num_images": len(role.source),
                "data_sha256": fingerprint(role.source),
                "views": views[role.name],
                "num_views": len(role.views),
            }
            for role in roles
        },
    }


def _estimate(config: PrecomputeConfig, labeller: Labeller, roles: list[Role]) -> dict[str, Any]:
    """Measure a few seconds of work; return rows, bytes and seconds of the whole."""
    num_labels = sum(role.num_labels for role in roles)
    num_bytes = sum(
        role.num_labels
        * label_set.num_label_bytes(labeller.topk, labeller.num_classes, config.label_dtype)
        + sum(len(key.encode()) + 8 for key in role.source.keys)
        + len(role.shards) * label_set.num_header_bytes()
        for role in roles
    )
    rate = _measure(config, labeller, roles[-1])
    logs.say(
        f"{num_labels} views, {logs.size_of(num_bytes)}, about "
        f"{logs.duration(num_labels / rate)} at {rate:.0f} views/s on this machine"
    )
    free = shutil.disk_usage(_existing(config.out)).free
    if free < num_bytes:
        logs.say(f"only {logs.size_of(free)} are free at {config.out}")
    return {
        "dry_run": True,
        "images": len(roles[-1].source),
        "views": num_labels,
        "bytes": num_bytes,
        "views_per_second": round(rate, 1),
        "seconds": round(num_labels / rate, 1),
    }


def _measure(config: PrecomputeConfig, labeller: Labeller, role: Role) -> float:
    """Return views per second: one batch to warm up and guess, then a sample of a few seconds."""
    rate = 0.0
    seconds = 0.0
    num_images = max(1, config.batch_size // len(role.views))
    for _ in range(2):
        num_images = min(num_images, len(role.source))
        requests = _requests(role, range(num_images), config.batch_size)
        began = time.monotonic()
        labeller.label(role.source, _read(config, role, requests), score=False)
        seconds = time.monotonic() - began
        rate = num_images * len(role.views) / seconds
        num_images = max(num_images, int(rate * _SAMPLE_SECONDS / len(role.views)))
    return rate


def _read(config: PrecomputeConfig, role: Role, requests: list[Request]) -> Iterator[Pixels]:
    reader = ViewReader(role.source, img_size=config.img_size, seed=config.view_seed)
    return iter(read_views(reader, requests, workers=config.workers if requests else 0))


def _requests(role: Role, positions: range, batch_size: int) -> list[Request]:
    """Cut images into requests of about one batch of views, each image whole."""
    step = max(1, batch_size // len(role.views))
    return [
        [(position, role.views) for position in positions[start : start + step]]
        for start in range(0, len(positions), step)
    ]


def _existing(path: Path) -> Path:
    """Return the nearest folder at or above a path that exists."""
    path = path.absolute()
    return next(p for p in (path, *path.parents) if p.is_dir())
