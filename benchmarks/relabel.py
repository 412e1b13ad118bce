"""What `mealv2 labels verify --relabel` finds where labels are right and where they are not.

    python benchmarks/relabel.py
    python benchmarks/relabel.py --data-dir flowers

It draws JPEGs, or takes a few of three classes of a tree ROOT/{train,val}/CLASS, trains two small
teachers, labels views, and labels all of them again: on this machine as before, with other threads,
another resize and another precision, which are right; and from other views and other pictures,
which are wrong. MIN_TOP1_AGREEMENT and MAX_EXTRA_KL of pipeline/label_sets/relabel.py must lie
between the two.
"""

import argparse
import random
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import same_numbers as shop

FLAGS = ["--num-views", 4, "--img-size", 64, "--workers", 0, "--device", "cpu"]


def copied(tree: Path, root: Path) -> Path:
    """Copy some images of the first three classes of a tree."""
    for split, count in shop.IMAGES.items():
        for folder in sorted(path for path in (tree / split).iterdir() if path.is_dir())[:3]:
            (root / split / folder.name).mkdir(parents=True)
            for path in sorted(folder.iterdir())[:count]:
                shutil.copy(path, root / split / folder.name)
    return root


def rows(root: Path, tree: Path | None) -> Iterator[tuple[str, dict[str, float]]]:
    """Yield the name of a case and its figures."""
    import torch

    from pipeline.config import LabelsVerifyConfig
    from pipeline.label_sets import relabel
    from pipeline.labelling import compatibility
    from pipeline.runtime.device import Runtime

    shop.IMAGES.update(train=24, val=4)
    data = shop.draw_folder(root / "data") if tree is None else copied(tree, root / "data")
    teachers = []
    for name in ("test_resnet", "test_efficientnet"):
        words = [*shop.FINETUNE, "--data-dir", data, "--model", name, "--output", root / name]
        words[words.index("--epochs") + 1] = "30"
        shop.call(*words)
        teachers.append(f"{name}={root / name}")
    flags = [flag for teacher in teachers for flag in ("--teacher", teacher)]
    shop.call("precompute", "--data-dir", data, *flags, *FLAGS, "--output", root / "labels")
    config = LabelsVerifyConfig(
        labels=root / "labels", data_dir=data, relabel=10_000, teacher=tuple(teachers), workers=0
    )
    cpu = Runtime(torch.device("cpu"), None)
    low = Runtime(torch.device("cpu"), torch.bfloat16)

    def found(runtime: Runtime = cpu, data_dir: Path = data) -> dict[str, float]:
        with (
            mock.patch.object(relabel, "check_precision"),
            mock.patch.object(relabel, "check_verdict"),
            mock.patch.object(compatibility, "image_check", return_value=None),
        ):
            return relabel.relabel(replace(config, data_dir=data_dir), root / "labels", runtime)

    yield "as before", found()
    torch.set_num_threads(2)
    yield "2 threads instead of 1", found()
    torch.set_num_threads(1)
    with mock.patch.object(compatibility, "choose_resize", return_value="pil"):
        yield "Pillow's resize instead of torch's", found()
    yield "bfloat16 instead of float32", found(low)
    with mock.patch("mealv2.label_set.LabelSet.views") as views:
        from mealv2.views import DrawnViews

        views.return_value = DrawnViews(1)
        yield "**other views of the same pictures**", found()
    for share in (0.05, 0.5):
        other = root / f"swapped-{share}"
        shutil.copytree(data, other)
        paths = sorted((other / "train").rglob("*.[jJ]*"))
        chosen = random.Random(0).sample(paths, round(share * len(paths)) // 2 * 2)
        for a, b in zip(chosen[::2], chosen[1::2], strict=True):
            one, two = a.read_bytes(), b.read_bytes()
            a.write_bytes(two)
            b.write_bytes(one)
        yield f"**{share:.0%} of the pictures exchanged**", found(data_dir=other)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", type=Path)
    options = parser.parse_args()
    shop.use_tree(shop.ROOT)
    print("| labelled again | KL, nats | of the encoding | extra KL | top-1 agreement, % |")
    print("|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for name, of in rows(Path(folder), options.data_dir):
            kl, encoding = of["kl"], of["kl_of_encoding"]
            print(
                f"| {name} | {kl:.2g} | {encoding:.2g} | {kl - encoding:.2g} | "
                f"{of['top1_agreement']:.1f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
