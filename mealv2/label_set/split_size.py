"""Images, views, bytes and loss of a split of a label set, by its manifest and headers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mealv2.label_set.shard import EncodingLoss
from mealv2.label_set.shard_file import loss_in


@dataclass(frozen=True)
class SplitSize:
    """The images, views of each, shards, and bytes of the files and of the labels alone.

    ``loss`` is the mean over the views that were measured, None if none was.
    """

    images: int
    views: int
    shards: int
    bytes: int
    label_bytes: int
    num_labels: int
    loss: EncodingLoss | None

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
        loss=_mean_loss([loss for header in headers if (loss := loss_in(header))]),
    )


def _mean_loss(losses: Sequence[EncodingLoss]) -> EncodingLoss | None:
    num_views = sum(loss.num_views for loss in losses)
    if not num_views:
        return None
    kl = sum(loss.kl * loss.num_views for loss in losses) / num_views
    return EncodingLoss(float(f"{kl:.3g}"), num_views)  # three digits, as each of them


def num_rows(header: Mapping[str, Any]) -> int:
    """Return the images, or appended rows, of a shard."""
    return int(header["columns"]["key_ends"]["shape"][0])
