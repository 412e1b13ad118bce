"""The shards in the plan of a label set, and the check of their files."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from mealv2.errors import LabelSetError
from mealv2.label_set.first_blocks import check_bound
from mealv2.label_set.manifest import creating_command, describe_file, planned_ranges, shard_name
from mealv2.label_set.shard_file import ShardFile
from mealv2.label_set.shard_head import read_head
from mealv2.storage.regular_files import read_regular
from mealv2.text import count


@dataclass(frozen=True)
class PlannedShard:
    """A shard of a plan.

    ``images`` are the positions of its images in the source, None if unknown; a centre crop is view
    0. A block that starts at a later view was added to a finished set.
    """

    split: str
    number: int
    views: range
    images: Sequence[int] | None

    @property
    def name(self) -> str:
        """The file name."""
        return shard_name(self.split, self.number, self.views if self.views.start else None)


class CheckedShard(NamedTuple):
    """The header of a shard that passed all checks, and the manifest's entry of its file.

    ``hashes`` are the content hashes of its images by key, of those that have one.
    """

    header: dict[str, Any]
    entry: dict[str, Any]
    hashes: dict[str, int]

    @property
    def num_images(self) -> int:
        """The number of images with labels."""
        return int(self.entry["images"])


def planned_shards(plan: dict[str, Any]) -> list[PlannedShard]:
    """Return the shards of a plan in the order of stage one: ``val`` first.

    Views that were added later are not in the plan. Raises LabelSetError for a plan that does not
    list its shards: that of a set made from other sets.
    """
    if "derived" in plan:
        raise LabelSetError(
            "its plan does not list its shards; run the same "
            f"{creating_command(plan)} again: it completes the set"
        )
    try:
        return [
            PlannedShard(name, number, range(split["num_views"]), images)
            for name, split in sorted(plan["roles"].items(), reverse=True)
            for number, images in enumerate(planned_ranges(plan, name))
        ]
    except (KeyError, TypeError, ValueError) as error:
        raise LabelSetError(f"its plan does not define its shards ({error!r})") from None


def check_shard(folder: Path, shard: PlannedShard, plan_sha256: str) -> CheckedShard:
    """Read and check a shard; raises LabelSetError, FileNotFoundError, or another OSError."""
    path = folder / shard.name
    size = read_head(path, with_index=False).size  # checked, so that no larger file is read
    # in memory: replacing a mapped file on a network share kills the process
    data = read_regular(path, max_bytes=size)
    file = ShardFile(path, data)
    check_planned_shard(file, shard, plan_sha256)
    entry = describe_file(path, num_images=file.num_images, data=data)
    return CheckedShard(file.header, entry, file.content_hashes())


def check_planned_shard(file: ShardFile, shard: PlannedShard, plan_sha256: str) -> None:
    """Raise LabelSetError for a shard with damaged labels, or one that is not as planned.

    The shard whose models it uses must lie beside it.
    """
    damaged = sum(not is_intact for _, _, is_intact in file.blocks())
    if damaged:
        raise LabelSetError(f"shard {file.path} is damaged: labels of {count(damaged, 'image')}")
    found = (file.header["plan_sha256"], file.header["role"], file.header["number"])
    if (*found, file.first_view) != (plan_sha256, shard.split, shard.number, shard.views.start):
        raise LabelSetError(f"shard {file.path} belongs to another label set")
    check_bound(file)
    if file.num_views != len(shard.views):
        raise LabelSetError(f"shard {file.path} does not have the planned views")
    num_images = file.num_images + len(file.header["skipped"])
    if shard.images is not None and num_images != len(shard.images):
        raise LabelSetError(
            f"shard {file.path} has {num_images} images, the plan has {len(shard.images)}"
        )
