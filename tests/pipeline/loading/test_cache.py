"""pipeline.loading.cache: how much memory decoded images may take."""

from pathlib import Path

import pytest

from mealv2.data.folder import ImageFolder
from pipeline.config import DistillConfig, FinetuneConfig
from pipeline.loading import cache

GIB = 1 << 30


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with 12 GiB free, without control groups; its files can be written."""
    (tmp_path / "meminfo").write_text(f"MemTotal: 1 kB\nMemAvailable:   {12 * GIB >> 10} kB\n")
    monkeypatch.setattr(cache, "_MEMORY", tmp_path / "meminfo")
    monkeypatch.setattr(cache, "_GROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(
        cache,
        "_FILES",
        {
            ":": (tmp_path / "v2", "memory.max", "memory.current", "inactive_file"),
            "memory:": (tmp_path / "v1", "memory.limit", "memory.usage", "total_inactive_file"),
        },
    )
    return tmp_path


def _write(path: Path, text: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{text}\n")


def test_free_memory_is_that_of_the_machine_without_a_limit(machine: Path) -> None:
    assert cache.free_memory() == 12 * GIB
    _write(machine / "cgroup", "0::/user/job")
    _write(machine / "v2" / "user" / "job" / "memory.max", "max")
    assert cache.free_memory() == 12 * GIB


def test_free_memory_is_the_least_that_a_control_group_leaves(machine: Path) -> None:
    _write(machine / "cgroup", "4:memory:/slurm/job\n0::/slurm/job")
    _write(machine / "v2" / "slurm" / "memory.max", 4 * GIB)  # a group above
    _write(machine / "v2" / "slurm" / "memory.current", 1 * GIB)
    assert cache.free_memory() == 3 * GIB
    _write(machine / "v1" / "slurm" / "job" / "memory.limit", 2 * GIB)
    _write(machine / "v1" / "slurm" / "job" / "memory.usage", GIB // 2)
    assert cache.free_memory() == 3 * GIB // 2


def test_files_that_the_kernel_keeps_in_memory_are_free(machine: Path) -> None:
    _write(machine / "cgroup", "0::/job")
    _write(machine / "v2" / "job" / "memory.max", 4 * GIB)
    _write(machine / "v2" / "job" / "memory.current", 4 * GIB)
    assert cache.free_memory() == 0
    _write(machine / "v2" / "job" / "memory.stat", f"anon {GIB}\ninactive_file {3 * GIB}")
    assert cache.free_memory() == 3 * GIB


@pytest.mark.parametrize("name", ["meminfo", "cgroup"])
def test_files_that_say_nothing_are_left_out(machine: Path, name: str) -> None:
    (machine / name).write_bytes(b"MemAvailable:\n0::/\xff\xfe\n4:memory\n")
    assert cache.free_memory() > GIB // 4


def test_images_are_not_kept_where_each_reading_is_asked_for(data_dir: Path, machine: Path) -> None:
    source = ImageFolder(data_dir, "train")
    common = {"data_dir": data_dir, "model": "test_resnet"}
    assert cache.image_cache(FinetuneConfig(**common), source) is not None
    assert cache.image_cache(FinetuneConfig(**common, cache_images="off"), source) is None
    distill = DistillConfig(**common, labels=data_dir, check_images="always")
    assert cache.image_cache(distill, source) is None


def test_ranks_of_a_machine_share_its_memory(
    data_dir: Path, machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    monkeypatch.setattr(cache, "ImageCache", lambda num, max_bytes: found.append(max_bytes))
    config = FinetuneConfig(data_dir=data_dir, model="test_resnet")
    source = ImageFolder(data_dir, "train")
    cache.image_cache(config, source)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    cache.image_cache(config, source)
    assert found == [2 * GIB, GIB // 2]
