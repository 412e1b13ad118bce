"""Whether the decoded images of a training run are kept in memory, and how much they may take."""

import os
from contextlib import suppress
from pathlib import Path

from mealv2.data.image_cache import ImageCache
from mealv2.data.source import ImageSource
from pipeline.config import TrainConfig
from pipeline.runtime import env

MAX_BYTES = 2 << 30  # of the decoded images of a source
_PART = 4  # of the memory that is free: training and validation images take half of it at most
_MEMORY = Path("/proc/meminfo")
_GROUPS = Path("/proc/self/cgroup")
_ROOT = Path("/sys/fs/cgroup")
# Of control groups of version 2 and 1, by how their lines begin after the number: the folder, the
# files of the limit and of the usage, and the entry of memory.stat for files that can be dropped.
_FILES = {
    ":": (_ROOT, "memory.max", "memory.current", "inactive_file"),
    "memory:": (
        _ROOT / "memory",
        "memory.limit_in_bytes",
        "memory.usage_in_bytes",
        "total_inactive_file",
    ),
}
_UNREADABLE = (OSError, ValueError, IndexError)  # ValueError also for the limit "max"


def image_cache(config: TrainConfig, source: ImageSource) -> ImageCache | None:
    """Return memory for the decoded images of a source; None with --cache-images off.

    Images that every reading compares with the labelled ones are not kept.
    """
    if config.cache_images == "off" or getattr(config, "check_images", None) == "always":
        return None
    max_bytes = min(MAX_BYTES, free_memory() // _PART) // env.ranks_on_this_machine()
    return ImageCache(len(source), max_bytes)


def free_memory() -> int:
    """Return the bytes that this process may still use, by the machine and its control groups."""
    free = [_free_of_machine()]
    with suppress(*_UNREADABLE):
        for line in _GROUPS.read_text(errors="replace").splitlines():
            _, _, named = line.partition(":")
            for start, (root, *names) in _FILES.items():
                if named.startswith(start):
                    group = root / named.removeprefix(start).lstrip("/")
                    for folder in (group, *group.parents):
                        if folder.is_relative_to(root):
                            free += _free_of_group(folder, *names)
    return max(0, min(free))


def _free_of_machine() -> int:
    with suppress(*_UNREADABLE):
        for line in _MEMORY.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) << 10
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def _free_of_group(folder: Path, limit: str, usage: str, droppable: str) -> list[int]:
    """Return the bytes that a control group leaves; nothing without a limit."""
    with suppress(*_UNREADABLE):
        free = int((folder / limit).read_text()) - int((folder / usage).read_text())
        with suppress(*_UNREADABLE):
            for line in (folder / "memory.stat").read_text().splitlines():
                if line.split()[0] == droppable:
                    free += int(line.split()[1])
        return [free]
    return []
