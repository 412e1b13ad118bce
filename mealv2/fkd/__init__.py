"""The label files of FKD (fast knowledge distillation) and SRe2L: reading and writing."""

from mealv2.fkd.batch_files import (
    ORDER_NAME,
    BatchFile,
    batch_path,
    find_batches,
    read_batch,
    sampled_order,
    stored_order,
    write_batch,
)
from mealv2.fkd.files import FkdFile, read_file, write_file
from mealv2.fkd.labels import (
    LABEL_TYPES,
    is_label_type,
    kind_of,
    labels_of,
    num_kept,
    pack,
    with_k,
)
from mealv2.fkd.tree import find_files, label_names, match_files

__all__ = [
    "LABEL_TYPES",
    "ORDER_NAME",
    "BatchFile",
    "FkdFile",
    "batch_path",
    "find_batches",
    "find_files",
    "is_label_type",
    "kind_of",
    "label_names",
    "labels_of",
    "match_files",
    "num_kept",
    "pack",
    "read_batch",
    "read_file",
    "sampled_order",
    "stored_order",
    "with_k",
    "write_batch",
    "write_file",
]
