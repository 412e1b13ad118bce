"""Which shards the plan of a label set has, and whether a file is one of them, whole."""

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

from mealv2.errors import LabelSetError
from mealv2.label_set.manifest import creating_command, planned_ranges, shard_name
from mealv2.label_set.shard_file import ShardFile


@dataclass(frozen=True)
class PlannedShard:
    """A shard that a set is to have.

    ``images`` are the positions of its images in the source, None where nobody knows; a centre crop
    is view 0. A block that starts at a later view was added to the set.
    """

    split: str
    number: int
    views: range
    images: Sequence[int] | None

    @property
    def name(self) -> str:
        """Its file name."""
        return shard_name(self.split, self.number, self.views if self.views.start else None)


class CheckedShard(NamedTuple):
    """A shard that was read and is whole: its header, and what a manifest says of its file."""

    header: dict[str, Any]
    entry: dict[str, Any]

    @property
    def num_images(self) -> int:
        """How many images it has labels of."""
        return int(self.entry["images"])


def planned_shards(plan: dict[str, Any]) -> list[PlannedShard]:
    """Return the shards of a plan, validation first, as stage one makes them.

    Views that were added are not in the plan. Raises LabelSetError for a plan that does not say its
    shards, as that of a set made of others.
    """
    if "derived" in plan:
        raise LabelSetError(
            f"its plan does not name its shards; the same {creating_command(plan)} again finds and "
            f"makes "
            "what it lacks"
        )
    try:
        return [
            PlannedShard(name, number, range(split["num_views"]), images)
            for name, split in sorted(plan["roles"].items(), reverse=True)
            for number, images in enumerate(planned_ranges(plan, name))
        ]
    except (KeyError, TypeError, ValueError) as error:
        raise LabelSetError(f"its plan does not say its shards ({error!r})") from None


def check_shard(folder: Path, shard: PlannedShard, plan_sha256: str) -> CheckedShard:
    """Read a shard once and check every byte that matters.

    Raises LabelSetError saying what is wrong with it, FileNotFoundError, or another OSError.
    """
    path = folder / shard.name
    data = path.read_bytes()  # mapped, a file that is replaced on a network share can end us
    file = ShardFile(path, data)
    check_planned_shard(file, shard, plan_sha256)
    entry = {
        "name": shard.name,
        "bytes": len(data),
        "images": file.num_images,
        "sha256": sha256(data).hexdigest(),
        "head_sha256": file.head_sha256,
    }
    return CheckedShard(file.header, entry)


def check_planned_shard(file: ShardFile, shard: PlannedShard, plan_sha256: str) -> None:
    """Raise LabelSetError for a shard with damaged labels, or another one than was planned."""
    damaged = sum(not is_intact for _, _, is_intact in file.blocks())
    if damaged:
        raise LabelSetError(f"shard {file.path} is damaged: the labels of {damaged} images")
    found = (file.header["plan_sha256"], file.header["role"], file.header["number"])
    if (*found, file.first_view) != (plan_sha256, shard.split, shard.number, shard.views.start):
        raise LabelSetError(f"shard {file.path} is of another label set")
    if file.num_views != len(shard.views):
        raise LabelSetError(f"shard {file.path} holds other views")
    num_images = file.num_images + len(file.header["skipped"])
    if shard.images is not None and num_images != len(shard.images):
        raise LabelSetError(
            f"shard {file.path} is of {num_images} images, and is to be of {len(shard.images)}"
        )
