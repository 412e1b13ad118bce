"""How many images, views and bytes a split of a label set has, by its manifest and headers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class SplitSize:
    """The images, views of each, shards, and bytes of the files and of the labels alone."""

    images: int
    views: int
    shards: int
    bytes: int
    label_bytes: int
    num_labels: int

    @property
    def bytes_per_view(self) -> float:
        """The mean bytes of a label."""
        return self.label_bytes / max(1, self.num_labels)


def split_size(entry: Mapping[str, Any], headers: Sequence[Mapping[str, Any]]) -> SplitSize:
    """Return the size of a split: its entry in the manifest, and the headers of its shards."""
    blocks = entry["blocks"]
    shards = [shard for block in blocks for shard in block["shards"]]
    return SplitSize(
        images=sum(map(num_rows, headers[: len(blocks[0]["shards"])])),
        views=max((block["views"][1] for block in blocks), default=0),
        shards=len(shards),
        bytes=sum(shard["bytes"] for shard in shards),
        label_bytes=sum(header["columns"]["labels"]["shape"][0] for header in headers),
        num_labels=sum(header["num_views"] * num_rows(header) for header in headers),
    )


def num_rows(header: Mapping[str, Any]) -> int:
    """Return the images, or appended rows, of a shard."""
    return int(header["columns"]["key_ends"]["shape"][0])
