"""Draw small data sets in the layouts of VOC2007, CUB-200-2011, Birdsnap and lists of images."""

from pathlib import Path

import numpy as np
from PIL import Image

VOC_CLASSES = ("aeroplane", "bicycle", "cat")
BIRDS = ("Black_Footed_Albatross", "Laysan_Albatross", "Blue_Jay")


def draw(path: Path, kinds: tuple[int, ...], rng: np.random.Generator, size: int = 40) -> None:
    """Write a JPEG with a bright stripe for each kind, at a height of its own, on noise."""
    pixels = rng.normal(90, 20, (size, size, 3))
    for kind in kinds:
        pixels[4 + 12 * kind : 12 + 12 * kind, :, kind % 3] += 120
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(path, quality=95)


def draw_voc(folder: Path, *, num_train: int = 24, num_test: int = 12) -> Path:
    """Write ImageSets/Main and JPEGImages; every sixth image has a difficult object."""
    rng = np.random.default_rng(0)
    rows: dict[str, list[tuple[str, list[int]]]] = {"trainval": [], "test": []}
    for number in range(num_train + num_test):
        present = [bool(number >> kind & 1) for kind in range(3)]
        labels = [1 if is_present else -1 for is_present in present]
        if number % 6 == 5:
            labels[2] = 0
        name = f"{number + 1:06d}"
        draw(folder / "JPEGImages" / f"{name}.jpg", tuple(np.flatnonzero(present)), rng)
        rows["trainval" if number < num_train else "test"].append((name, labels))
    lists = folder / "ImageSets" / "Main"
    lists.mkdir(parents=True)
    for split, images in rows.items():
        (lists / f"{split}.txt").write_text("".join(f"{name}\n" for name, _ in images))
        for column, class_name in enumerate(VOC_CLASSES):
            # as published: two spaces before a 1
            lines = [f"{name} {labels[column]:2d}\n" for name, labels in images]
            (lists / f"{class_name}_{split}.txt").write_text("".join(lines))
    return folder


def draw_cub(folder: Path, *, num_train: int = 6, num_test: int = 3) -> Path:
    """Write images.txt, image_class_labels.txt, train_test_split.txt, classes.txt and images."""
    rng = np.random.default_rng(1)
    paths, labels, parts = [], [], []
    names = [f"{number:03d}.{bird}" for number, bird in enumerate(BIRDS, 1)]
    for kind, name in enumerate(names):
        for number in range(num_train + num_test):
            paths.append(f"{name}/{BIRDS[kind]}_{number:04d}_{number}.jpg")
            labels.append(kind + 1)
            parts.append(int(number < num_train))
            draw(folder / "images" / paths[-1], (kind,), rng)
    for file, column in (
        ("images.txt", paths),
        ("image_class_labels.txt", labels),
        ("train_test_split.txt", parts),
    ):
        text = "".join(f"{number} {value}\n" for number, value in enumerate(column, 1))
        (folder / file).write_text(text)
    lines = [f"{number} {name}\n" for number, name in enumerate(names, 1)]
    (folder / "classes.txt").write_text("".join(lines))
    return folder


def draw_birdsnap(folder: Path, *, num_train: int = 6, num_test: int = 3) -> Path:
    """Write species.txt, images.txt and test_images.txt, and images as get_birdsnap.py does."""
    rng = np.random.default_rng(2)
    species = ["id\tcommon\tscientific\tdir\n"]
    images, tested = ["url\tmd5\tpath\tspecies_id\tbb_x1\n"], ["path\n"]
    for kind, bird in enumerate(BIRDS):
        species.append(f"{kind + 1}\t{bird.replace('_', ' ')}\tAves\t{bird}\n")
        for number in range(num_train + num_test):
            path = f"{bird}/{100 * kind + number}.jpg"
            images.append(f"http://example.com/{number}\t0\t{path}\t{kind + 1}\t1\n")
            if number >= num_train:
                tested.append(f"{path}\n")
            draw(folder / "download" / "images" / path, (kind,), rng)
    for name, lines in (
        ("species.txt", species),
        ("images.txt", images),
        ("test_images.txt", tested),
    ):
        (folder / name).write_text("".join(lines))
    return folder


def draw_lists(folder: Path, *, num_train: int = 6, num_test: int = 3, seed: int = 3) -> Path:
    """Write images, and lists/train.txt and lists/val.txt with `PATH CLASS` lines."""
    rng = np.random.default_rng(seed)
    lines: dict[str, list[str]] = {"train": [], "val": []}
    for kind in range(3):
        for number in range(num_train + num_test):
            path = f"images/{kind}-{number}.jpg"
            draw(folder / path, (kind,), rng)
            lines["train" if number < num_train else "val"].append(f"{path} {10 * kind}\n")
    (folder / "lists").mkdir()
    for split, rows in lines.items():
        (folder / "lists" / f"{split}.txt").write_text("".join(rows))
    return folder
