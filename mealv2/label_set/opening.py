"""Opening the files of a label set: each must be the one that the manifest lists."""

import resource
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mealv2.errors import LabelSetError
from mealv2.label_set.manifest import remaking_command
from mealv2.label_set.shard_file import ShardFile

_MAX_OPEN = 4096


def max_open_files(num_tables: int) -> int:
    """Return how many shards of each table may stay open: together a quarter of the limit."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = _MAX_OPEN if limit == resource.RLIM_INFINITY else min(_MAX_OPEN, limit // 4 - 16)
    return max(1, most // num_tables)


def open_blocks(
    folder: Path, manifest: dict[str, Any], split: str, num_views: int | None
) -> list[tuple[range, list[ShardFile]]]:
    """Open the shards of a split: for each block, its views and its files.

    Raises LabelSetError for a damaged shard, and when no block ends at ``num_views``.
    """
    blocks = manifest["roles"][split]["blocks"]
    stops = [stop for _, stop in (block["views"] for block in blocks)]
    if num_views is not None and num_views not in stops:
        held = " or ".join(map(str, stops))
        raise LabelSetError(
            f"{folder} holds {held} views of each image, but {num_views} are needed"
        )
    opened = [
        (views, [_open_shard(folder, manifest, split, views, entry) for entry in block["shards"]])
        for block in blocks
        if (views := range(*block["views"])).stop <= (num_views or stops[-1])
    ]
    for _, files in opened:
        for file, first in zip(files, opened[0][1], strict=False):
            if file.header.get("first_sha256", first.head_sha256) != first.head_sha256:
                raise LabelSetError(
                    f"shard {file.path} was made for other first views than {first.path} has; run "
                    "the same `mealv2 labels add-views` again to replace it"
                )
    return opened


def _open_shard(
    folder: Path, manifest: dict[str, Any], split: str, views: range, entry: dict[str, Any]
) -> ShardFile:
    path = folder / entry["name"]
    again = remaking_command(manifest["plan"], entry["name"])
    advice = f"run the same {again} again to replace it"
    try:
        file = ShardFile(path)
    except LabelSetError as error:
        raise LabelSetError(f"{error}; {advice}") from None
    except OSError as error:
        raise LabelSetError(f"cannot read shard {path}: {error.strerror}; {advice}") from None
    found = (file.header["plan_sha256"], file.header["role"], file.first_view, file.num_views)
    expected = (manifest["plan_sha256"], split, views.start, len(views))
    if file.head_sha256 != entry.get("head_sha256") or found != expected:
        raise LabelSetError(f"shard {path} is not the one in the manifest; {advice}")
    return file


def open_appended(
    folder: Path, manifest: dict[str, Any], split: str, names: Sequence[str]
) -> list[ShardFile]:
    """Open files of appended rows; raises LabelSetError for one that is not of this set."""
    files = []
    for path in (folder / name for name in names):
        try:
            file = ShardFile(path)
        except FileNotFoundError:
            raise LabelSetError(f"{path} is missing; this run used its labels") from None
        except LabelSetError as error:
            raise LabelSetError(f"{error}; remove the file, a later run can add its rows") from None
        except OSError as error:
            raise LabelSetError(f"cannot read {path}: {error.strerror}") from None
        found = (file.header["plan_sha256"], file.header["role"], file.num_views)
        expected = (manifest["plan_sha256"], split, 1)
        if found != expected or not file.has_column("views"):
            raise LabelSetError(f"{path} holds rows of another label set; remove it")
        files.append(file)
    return files


def concatenated(columns: list[np.ndarray], kind: str) -> np.ndarray:
    """Return the columns of all files as one, of a NumPy type."""
    return np.concatenate([np.empty(0, kind), *columns])
