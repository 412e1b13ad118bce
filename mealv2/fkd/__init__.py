"""The label files of FKD (fast knowledge distillation): reading, matching to images, writing."""

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
    "FkdFile",
    "find_files",
    "is_label_type",
    "kind_of",
    "label_names",
    "labels_of",
    "match_files",
    "num_kept",
    "pack",
    "read_file",
    "with_k",
    "write_file",
]
