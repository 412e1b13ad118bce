"""The label set: what an ensemble said about some views of some images, as a verified artifact."""

from mealv2.label_set.appended import Appender
from mealv2.label_set.manifest import (
    FORMAT,
    FORMAT_VERSION,
    claim,
    describe_file,
    read_manifest,
    read_plan,
    shard_name,
    shard_ranges,
    write_manifest,
)
from mealv2.label_set.reader import LabelSet, Lookup
from mealv2.label_set.shard import (
    Shard,
    class_id_type,
    num_header_bytes,
    num_label_bytes,
    read_shard,
    write_shard,
)

__all__ = [
    "FORMAT",
    "FORMAT_VERSION",
    "Appender",
    "LabelSet",
    "Lookup",
    "Shard",
    "claim",
    "class_id_type",
    "describe_file",
    "num_header_bytes",
    "num_label_bytes",
    "read_manifest",
    "read_plan",
    "read_shard",
    "shard_name",
    "shard_ranges",
    "write_manifest",
    "write_shard",
]
