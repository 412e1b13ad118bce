"""mealv2.data.held_out: which images of a split are held out, and the sources of both parts."""

from collections.abc import Callable
from hashlib import blake2b
from pathlib import Path
from typing import Any

import pytest

from mealv2.data.folder import ImageFolder, UnorderedSource
from mealv2.data.held_out import HeldOut, by_name, held_out_positions
from mealv2.data.open import open_source
from mealv2.data.source import fingerprint
from mealv2.data.subset import Subset
from mealv2.errors import ConfigError
from tars import tar_tree


class _Listed(UnorderedSource):
    """A source of images that are only names."""

    def __init__(self, images: dict[str, int]) -> None:
        self.keys, self.labels = list(images), list(images.values())
        self.sizes = self.stored_sizes = [1] * len(images)
        self.classes = [str(n) for n in range(max(self.labels) + 1)]
        self.name, self.split = "listed", "train"

    def __len__(self) -> int:
        return len(self.keys)

    def read(self, position: int) -> bytes:
        raise AssertionError(position)


def _images(*counts: int) -> dict[str, int]:
    return {f"{c}/{n:04d}.jpg": c for c, count in enumerate(counts) for n in range(count)}


def _held(images: dict[str, int], fraction: float, seed: int = 0) -> set[str]:
    source = _Listed(images)
    positions = held_out_positions(HeldOut(fraction, seed), source)
    return {source.keys[p] for p in positions}


def test_of_each_class_the_images_with_the_smallest_hash_are_held_out() -> None:
    images = _images(10, 7)
    for seed in (0, 5):
        expected = set()
        for label, count in ((0, 2), (1, 1)):  # 2.0 and 1.4, rounded
            head = b"mealv2/held-out/1\0" + seed.to_bytes(8, "little")
            of_class = [key for key in images if images[key] == label]
            of_class.sort(key=lambda k: blake2b(head + k.encode(), digest_size=8).digest()[::-1])
            expected |= set(of_class[:count])
        assert _held(images, 0.2, seed) == expected


def test_the_choice_is_frozen() -> None:
    assert sorted(_held(_images(12, 5), 0.25)) == FROZEN


FROZEN = ["0/0005.jpg", "0/0006.jpg", "0/0010.jpg", "1/0000.jpg"]


def test_another_seed_is_another_choice() -> None:
    assert _held(_images(50), 0.2) != _held(_images(50), 0.2, seed=1)


@pytest.mark.parametrize(
    ("count", "fraction", "held"),
    [(1, 0.5, 0), (2, 0.01, 1), (2, 0.99, 1), (5, 0.1, 1), (10, 0.25, 3)],
)
def test_a_class_keeps_an_image_and_gives_one_where_it_has_two(
    count: int, fraction: float, held: int
) -> None:
    assert len(_held(_images(count, 4), fraction) & set(_images(count))) == held


def test_pictures_added_to_one_class_leave_the_others_as_they_are() -> None:
    before, after = _held(_images(100, 40), 0.2), _held(_images(100, 60), 0.2)
    assert {k for k in before if k[0] == "0"} == {k for k in after if k[0] == "0"}


def test_few_of_the_old_pictures_change_sides_when_a_tenth_is_added() -> None:
    old = _images(1000)
    before, after = _held(old, 0.2), _held(_images(1100), 0.2)
    assert len(before ^ (after & old.keys())) <= 10  # of 1000; a new draw changes 320


def test_order_of_the_source_does_not_matter() -> None:
    images = _images(20, 20)
    assert _held(images, 0.3) == _held(dict(reversed(images.items())), 0.3)


def test_the_parts_of_a_folder_read_its_images(own_data: Path) -> None:
    whole, held_out = ImageFolder(own_data, "train"), HeldOut(0.25, of="train", name="held")
    train, val = (open_source(own_data, s, held_out=held_out) for s in ("train", "held"))
    assert (len(train), len(val), train.split, val.split) == (27, 9, "train", "held")
    assert sorted([*train.keys, *val.keys]) == list(whole.keys)
    for part in (train, val):
        assert part.classes == whole.classes
        for position, key in enumerate(part.keys):
            at = whole.keys.index(key)
            data = part.read(position)
            assert data == whole.read(at)
            assert part.labels[position] == whole.labels[at]
            assert part.original_hash(position, data) == whole.original_hash(at, data)
    assert open_source(own_data, "val", held_out=held_out).keys[0] == "ants/00.jpg"  # a third split


def test_tar_files_and_folders_hold_out_the_same_images(data_dir: Path, tmp_path: Path) -> None:
    root = tar_tree(data_dir, tmp_path / "tars", keys=True)
    for path in root.glob("val-*.tar"):
        path.unlink()
    held_out = HeldOut(0.25)
    for split in ("train", "val"):
        tars = open_source(root, split, held_out=held_out)
        folder = open_source(data_dir / "train", split, held_out=held_out)
        assert list(tars.keys) == list(folder.keys)
        assert fingerprint(tars) == fingerprint(folder)
        assert tars.read(1) == folder.read(1)
        assert tars.shard_starts is not None


def test_groups_of_a_part_are_those_with_images_of_it() -> None:
    source: Any = _Listed(_images(12))
    source.shard_starts = source.groups = [0, 4, 8]
    announced: list[list[int]] = []
    source.announce = lambda groups: announced.append(list(groups))
    part = Subset(source, [1, 2, 9, 10, 11], split="train")
    assert (part.groups, part.shard_starts) == ([0, 2], [0, 2])
    part.announce([1, 0])
    assert announced == [[2, 0]]


def test_class_folders_without_splits_are_the_split_train(own_data: Path) -> None:
    nested, direct = ImageFolder(own_data, "train"), ImageFolder(own_data / "train", "train")
    assert direct.keys == nested.keys
    assert fingerprint(direct) == fingerprint(nested)
    assert direct.split == "train"


def test_a_folder_of_splits_is_not_taken_for_class_folders(own_data: Path) -> None:
    (own_data / "train").rename(own_data / "training")
    with pytest.raises(ConfigError, match="--train-split and --val-split"):
        open_source(own_data, "train")


def test_a_missing_validation_split_names_the_flags_that_help(own_data: Path) -> None:
    with pytest.raises(ConfigError, match=r"--val-fraction 0\.2.* --val-split none"):
        open_source(own_data / "train", "val")


def test_an_existing_validation_split_contradicts_a_fraction(own_data: Path) -> None:
    with pytest.raises(ConfigError, match="has a split val"):
        open_source(own_data, "val", held_out=HeldOut(0.2))


def test_a_split_with_one_image_in_each_class_cannot_be_divided() -> None:
    with pytest.raises(ConfigError, match="--val-split none"):
        HeldOut(0.5).part(_Listed(_images(1, 1)), "val")


def test_class_ids_follow_the_names(draw_tree: Callable[..., Path], tmp_path: Path) -> None:
    source = ImageFolder(draw_tree(tmp_path / "two", classes=("ants", "cats")), "val")
    matched = by_name(source, ["ants", "bees", "cats"])
    assert matched is not None
    assert set(matched.labels) == {0, 2}
    assert matched.classes == ["ants", "bees", "cats"]
    assert by_name(source, ["ants", "bees"]) is None
    assert by_name(source, ["ants", "cats"]) is source


@pytest.mark.parametrize(
    "damaged", [{}, {"version": 2}, {"fraction": 1.0}, {"seed": -1}, {"of": 3}, "x"]
)
def test_an_entry_of_a_plan_is_read_back_or_refused(damaged: Any) -> None:
    held_out = HeldOut(0.2, 3, "a", "b")
    assert HeldOut.from_json(held_out.as_json()) == held_out
    assert HeldOut.from_json(None) is None
    entry = held_out.as_json() | damaged if isinstance(damaged, dict) and damaged else damaged
    with pytest.raises(ConfigError, match="unknown way"):
        HeldOut.from_json(entry)
