"""The label set: an ensemble's labels of views of images, as a verified artifact."""

from mealv2.label_set.appended import Appender, write_rows
from mealv2.label_set.blocks import Rows, block_of_member, member_bytes
from mealv2.label_set.boxes import boxes_of, boxes_sha256, check_box_drift
from mealv2.label_set.claiming import claim
from mealv2.label_set.content import content_of, labelled_hashes, shard_hashes
from mealv2.label_set.encoding import Encoding
from mealv2.label_set.first_blocks import bound_to_first, first_labels_of
from mealv2.label_set.logits import FittedLogits, Logits, concat_logits
from mealv2.label_set.manifest import (
    FORMAT,
    MANIFEST_NAME,
    PLAN_NAME,
    UNKNOWN,
    creating_command,
    describe_file,
    is_label_set,
    listed_sha256,
    listed_shards,
    read_manifest,
    read_plan,
    remaking_command,
    shard_name,
    shard_ranges,
    write_manifest,
)
from mealv2.label_set.matching import check_boxes, check_same_data
from mealv2.label_set.planned import (
    CheckedShard,
    PlannedShard,
    check_planned_shard,
    check_shard,
    planned_shards,
)
from mealv2.label_set.reader import LabelSet
from mealv2.label_set.shard import (
    FORMAT_VERSION,
    EncodingLoss,
    Images,
    Shard,
    StoredViews,
    class_of,
    stored_class,
    write_shard,
)
from mealv2.label_set.shard_file import ShardFile, read_shard
from mealv2.label_set.shard_head import read_header
from mealv2.label_set.web_set import WebSet, is_web, web_set_at

__all__ = [
    "FORMAT",
    "FORMAT_VERSION",
    "MANIFEST_NAME",
    "PLAN_NAME",
    "UNKNOWN",
    "Appender",
    "CheckedShard",
    "Encoding",
    "EncodingLoss",
    "FittedLogits",
    "Images",
    "LabelSet",
    "Logits",
    "PlannedShard",
    "Rows",
    "Shard",
    "ShardFile",
    "StoredViews",
    "WebSet",
    "block_of_member",
    "bound_to_first",
    "boxes_of",
    "boxes_sha256",
    "check_box_drift",
    "check_boxes",
    "check_planned_shard",
    "check_same_data",
    "check_shard",
    "claim",
    "class_of",
    "concat_logits",
    "content_of",
    "creating_command",
    "describe_file",
    "first_labels_of",
    "is_label_set",
    "is_web",
    "labelled_hashes",
    "listed_sha256",
    "listed_shards",
    "member_bytes",
    "planned_shards",
    "read_header",
    "read_manifest",
    "read_plan",
    "read_shard",
    "remaking_command",
    "shard_hashes",
    "shard_name",
    "shard_ranges",
    "stored_class",
    "web_set_at",
    "write_manifest",
    "write_rows",
    "write_shard",
]
