"""Transfer: a backbone of hard labels against the same one distilled, on two other data sets.

    python -m benchmarks.transfer tiny-imagenet flowers17 cifar10 --output transfer-rows --jobs 2

Backbones learn Tiny-ImageNet (train/WNID/IMAGE, val/WNID/IMAGE): the base learns hard labels; the
distilled one continues from the base with stored labels of ImageNet teachers; base-more continues
from it with hard labels, for as many steps and on the same views; distilled-present has labels of
which the classes that the data has not are left out. `mealv2 transfer` then trains each on 17
Flowers (train/CLASS/IMAGE, val/CLASS/IMAGE) and a part of CIFAR-10 (train/CLASS/IMAGE,
test/CLASS/IMAGE). Finished runs are kept. Results: docs/benchmarks/transfer.md.
"""

import argparse
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.distillation import Bench, Setting, add_flags, setting_of
from benchmarks.experiment_tables import environment, exit_with_message, mean_cell, table
from benchmarks.experiments import Config, finished, run_all
from benchmarks.present_classes import PresentClassesConfig
from benchmarks.subsets import Part, write_subset
from benchmarks.tiny_imagenet import TEACHERS, write_class_map
from mealv2.storage.atomic import write_atomic
from mealv2.storage.json_format import canonical_json
from pipeline.config import TransferConfig

SETTING = Setting(
    student="test_resnet",
    teachers=(),
    img_size=64,
    teacher_img_size=96,
    images=50,
    val_images=10,
    val_split="val",
    epochs=8,
)
BASE_EPOCHS = 14
NUM_VIEWS = 2
SETS = {
    "flowers17": {"train": Part("train", 60), "val": Part("val", 20)},
    "cifar10": {"train": Part("train", 100), "val": Part("test", 100)},
}
# beside the defaults of `mealv2 transfer`, the paper's: 200 epochs, batches of 128, 224 pixels
TRANSFER: dict[str, Any] = {"batch_size": 32, "epochs": 10, "workers": 0, "checkpoint_hist": 1}
# backbones beside --compare, by the start of the name of their transfers
OTHERS = {"more": "base-more", "present": "distilled-present"}
TITLES = {
    ("scratch", "base"): "From scratch",
    ("fine-tune", "base"): "Fine-tune: base",
    ("fine-tune", "base-more"): "Fine-tune: base, as many steps more",
    ("fine-tune", "distilled"): "Fine-tune: distilled",
    ("fine-tune", "distilled-present"): "Fine-tune: distilled, present classes",
    ("frozen", "base"): "Freeze backbone: base",
    ("frozen", "base-more"): "Freeze backbone: base, as many steps more",
    ("frozen", "distilled"): "Freeze backbone: distilled",
    ("frozen", "distilled-present"): "Freeze backbone: distilled, present classes",
}
Values = dict[int, float]


def backbones(
    bench: Bench, teachers: Sequence[str], *, base_epochs: int, num_views: int
) -> dict[str, list[Config]]:
    """Return the runs that make each backbone, its own the last; all have seed 0."""
    size = bench.setting.teacher_img_size
    labels = bench.labels(
        "teachers", teachers, num_views=num_views, teacher_img_size=size, rate=0.001
    )
    base = bench.start(
        0, "base", epochs=base_epochs, val_interval=base_epochs, sched="cosine", weight_decay=5e-4
    )
    folder, class_map = bench.output / "labels" / "present", bench.class_map
    assert class_map is not None, "the teachers have other classes than the data"
    present = PresentClassesConfig(
        Path(str(labels.output)), bench.data / "train", class_map, folder
    )
    return {
        "base": [base],
        "distilled": bench.soft("distilled", 0, [labels], base),
        "base-more": bench.hard("base-more", 0, base, num_views=num_views),
        "distilled-present": bench.soft("distilled-present", 0, [labels, present], base),
    }


def transfers(
    output: Path, models: Mapping[str, Config], seeds: int, **settings: Any
) -> dict[str, TransferConfig]:
    """Return the runs of `mealv2 transfer` by folder: base against distilled, and the others."""
    given = TRANSFER | {"sets": output / "sets.txt", "seeds": seeds} | settings
    given["val_interval"] = given["epochs"]
    folders = {name: str(config.output) for name, config in models.items()}

    def of(name: str, **chosen: Any) -> TransferConfig:
        is_frozen = chosen["mode"] != "fine-tune"
        frozen: dict[str, Any] = {"feature_dir": output / "features"} if is_frozen else {}
        return TransferConfig(output=output / "transfers" / name, **given, **frozen, **chosen)

    compare = (folders["base"], folders["distilled"])
    found = {"table-6": of("table-6", compare=compare, mode="all")}
    for short, backbone in OTHERS.items():
        for mode in ("fine-tune", "frozen"):
            name = f"{short}-{mode}"
            found[name] = of(name, model=folders[backbone], mode=mode)
    return found


def values_of(runs: Mapping[str, TransferConfig]) -> dict[tuple[str, str, str], Values]:
    """Return top-1 by seed of the finished runs; by data set, mode and backbone."""
    found = {}
    for name, config in runs.items():
        for row in (finished(config) or {"results": []})["results"]:
            model = OTHERS.get(name.partition("-")[0], row["model"])
            values = {int(seed): value for seed, value in row["values"].items()}
            found[row["set"], row["mode"], model] = values
    return found


def table_6(values: Mapping[tuple[str, str, str], Values]) -> str:
    """Return the form of the paper's Table 6, with differences of the same seeds."""
    lines = []
    for (mode, model), title in TITLES.items():
        cells = [mean_cell(list(values.get((name, mode, model), {}).values())) for name in SETS]
        lines.append([title, *cells])
        if not model.startswith("distilled"):
            continue
        for other, words in (("base", "base"), ("base-more", "base, as many steps more")):
            cells = [_difference(values, (name, mode), model, other) for name in SETS]
            lines.append([f"{title} minus {words}", *cells])
    return table(["top-1 % (95 %)", *SETS], lines)


def _difference(
    values: Mapping[tuple[str, str, str], Values], of: tuple[str, str], model: str, other: str
) -> str:
    one, two = values.get((*of, model), {}), values.get((*of, other), {})
    return mean_cell([one[seed] - two[seed] for seed in one if seed in two], sign="+")


def _write_sets(options: argparse.Namespace) -> None:
    lines = []
    for name, parts in SETS.items():
        folder = write_subset(getattr(options, name), options.output / "sets" / name, parts)
        lines.append(f"{name} {folder.resolve()}\n")
    write_atomic(options.output / "sets.txt", "".join(lines).encode())


def _parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    found.add_argument("tiny_imagenet", type=Path, help="folder of train/WNID, val/WNID")
    for name in SETS:
        found.add_argument(name, type=Path, help="data set to transfer to")
    found.add_argument("--output", type=Path, required=True, help="folder to make or continue")
    found.add_argument("--seeds", type=int, default=3, help="of the transfers (3)")
    found.add_argument("--jobs", type=int, default=1, help="runs at a time")
    found.add_argument("--table", action="store_true", help="print what is finished, run nothing")
    found.add_argument("--only-backbones", action="store_true", help="end before the transfers")
    found.add_argument("--views", type=int, default=NUM_VIEWS, help=f"default: {NUM_VIEWS}")
    found.add_argument("--base-epochs", type=int, default=BASE_EPOCHS, help=f"{BASE_EPOCHS}")
    for name in ("epochs", "batch_size"):
        flag, value = f"--transfer-{name.replace('_', '-')}", TRANSFER[name]
        found.add_argument(flag, type=int, default=value, help=f"default: {value}")
    add_flags(found, SETTING)
    return found


def main(words: Sequence[str] | None = None) -> None:
    """Make the backbones and the transfers, and print their table."""
    options = _parser().parse_args(words)
    output, class_map = options.output, options.output / "classes.txt"
    bench = Bench(output, setting_of(options, SETTING, trained=False), class_map)
    made = backbones(
        bench,
        options.teacher or TEACHERS,
        base_epochs=options.base_epochs,
        num_views=options.views,
    )
    runs = transfers(
        output,
        {name: each[-1] for name, each in made.items()},
        options.seeds,
        img_size=bench.setting.img_size,
        epochs=options.transfer_epochs,
        batch_size=options.transfer_batch_size,
    )
    if not options.table:
        bench.write_images(options.tiny_imagenet)
        write_class_map(class_map)
        _write_sets(options)
        last = [] if options.only_backbones else runs.values()
        run_all([*(c for each in made.values() for c in each), *last], jobs=options.jobs)
    values = values_of(runs)
    text = table_6(values)
    reports = {name: finished(each[-1]) for name, each in made.items()}
    results = {
        "environment": environment(),
        "setting": dataclasses.asdict(bench.setting),
        "backbones": reports,
        "values": {" ".join(name): each for name, each in values.items()},
    }
    write_atomic(output / "results.json", canonical_json(results).encode())
    write_atomic(output / "table.md", text.encode())
    print(text)


if __name__ == "__main__":
    exit_with_message(main)
