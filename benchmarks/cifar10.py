"""CIFAR-10: what soft labels, discriminator, views, starts and teachers give, row by row.

    python -m benchmarks.cifar10 cifar10 --output cifar10-rows --quick --jobs 2

PATH is a folder train/CLASS/IMAGE, test/CLASS/IMAGE, or torch/cifar10:FOLDER with the published
archive. The teachers learn a part of the images from random weights; --teacher NAME fine-tunes
ImageNet models instead. Students see a smaller part; within a seed all rows have the same start,
images, views and order. The result of a run is its last epoch. Finished runs are kept, interrupted
ones resumed.

`--quick`: eight rows. `--table` prints what is finished. Results: docs/benchmarks/cifar10.md; those
of the rows of rates, all compared with the dense labels: docs/benchmarks/rates.md.
"""

from collections.abc import Sequence
from typing import Any

from benchmarks.distillation import (
    SCRATCH,
    VIEWS,
    Bench,
    Setting,
    Teacher,
    add_flags,
    setting_of,
    specs,
)
from benchmarks.experiment_tables import chosen, exit_with_message, parser, run_rows
from benchmarks.experiments import Config, Row
from benchmarks.rate_tables import RATES, Comparison

# Four residual blocks each; layers of stride 8 keep a map of 4 x 4 pixels.
NARROW = ("channels=(16,32,64,128)", "layers=(1,1,1,1)", "output_stride=8")
TEACHERS = (
    Teacher("resnet18-small", "resnet18", {**SCRATCH, "model_kwargs": NARROW}),
    Teacher("test_resnet-8", "test_resnet", {**SCRATCH, "model_kwargs": ("output_stride=8",)}),
)
SETTING = Setting(
    student="test_resnet",
    teachers=TEACHERS,
    img_size=32,
    teacher_images=4000,
    teacher_epochs=12,
    images=200,
    val_images=200,
    val_split="test",
)
NUM_VIEWS = (1, 3, 6)
# the second and third size of student beside Setting.student
SMALLER = ("test_efficientnet", ())
LARGER = ("resnet10t", ("channels=(32,64,128,256)",))
# as large as a teacher
LARGE = ("resnet18", NARROW)
# MEAL v1: stages 1 to 3 and the logits, with as many values as the student has positions; its stage
# 4 has one at 32 pixels, and the softmax of one value teaches nothing
BLOCKS: dict[str, Any] = {"out_layer": (-5, -4, -3, -1), "out_dims": (64, 16, 4), "pool": "avg"}
BOX = {"crop": "rrc"}  # the paper's views
CUTMIX: dict[str, Any] = {"cutmix": 1.0, "cutmix_target": "mixed-labels"}


def rows(bench: Bench) -> list[Row]:
    """Return all rows, the most telling first."""
    return [
        *_quick_rows(bench),
        *_meal_rows(bench),
        *_label_rows(bench),
        *_loss_rows(bench),
        *_start_rows(bench),
        *_view_rows(bench),
        *_student_rows(bench),
    ]


def _quick_rows(bench: Bench) -> list[Row]:
    soft = bench.soft_row
    return [
        soft("soft", "soft labels, stored", reference="", is_quick=True),
        Row(
            "hard",
            "hard labels",
            lambda seed: bench.hard("hard", seed, bench.start(seed)),
            reference="soft",
            is_quick=True,
        ),
        soft("d-off", "no discriminator", is_quick=True, discriminator="off"),
        soft("weight-decay", "weight decay 1e-4", is_quick=True, weight_decay=1e-4),
        _of_labels(bench, "teacher-0", "first teacher alone", bench.one_teacher(0), is_quick=True),
        _of_labels(bench, "weak", "weak teacher", bench.weak(), is_quick=True),
        Row(
            "random",
            "random start",
            lambda seed: bench.soft("random", seed, bench.dense(), None),
            reference="soft",
            is_quick=True,
        ),
        _of_labels(bench, "views-3", "3 views", bench.some_views(3), is_quick=True),
    ]


def _label_rows(bench: Bench) -> list[Row]:
    found = [
        _of_labels(
            bench, f"rate-{rate:g}", f"rate {rate:g}", bench.converted(f"rate-{rate:g}", rate=rate)
        )
        for rate in RATES
    ]
    found += [
        _of_labels(bench, f"top-{k}", f"top-{k}", bench.converted(f"top-{k}", topk=str(k)))
        for k in (1, 3)
    ]
    found += [
        _of_labels(bench, f"views-{n}", f"{n} views", bench.some_views(n))
        for n in NUM_VIEWS
        if n not in (3, bench.setting.epochs)
    ]
    last = len(bench.setting.teachers) - 1
    if last:
        teacher = bench.one_teacher(last)
        found.append(_of_labels(bench, f"teacher-{last}", "last teacher alone", teacher))
        logits = bench.mean_of_logits()
        found.append(_of_labels(bench, "mean-logits", "mean of logits", logits))
    return [*found, bench.soft_row("online", "soft labels, online", **_online(bench))]


def _loss_rows(bench: Bench) -> list[Row]:
    soft, lr = bench.soft_row, bench.setting.lr
    online = _online(bench) | CUTMIX | {"cutmix_target": "teachers"}
    return [
        soft("d-lr", "discriminator at the student's rate (paper)", discriminator_lr=lr),
        soft("d-official", "discriminator of the official code", discriminator="official"),
        soft("d-adversarial", "discriminator, adversarial", discriminator="adversarial"),
        soft("cutmix", "CutMix, mixed labels", **CUTMIX),
        soft("cutmix-teachers", "CutMix, labelled by the teachers", **online),
        Row(
            "hard-weight-decay",
            "hard labels, weight decay 1e-4",
            lambda seed: bench.hard(
                "hard-weight-decay", seed, bench.start(seed), weight_decay=1e-4
            ),
            reference="hard",
        ),
    ]


def _meal_rows(bench: Bench) -> list[Row]:
    """Return MEAL v1: one teacher a batch, online; the discriminator is that of its code."""
    first, both = specs(bench.teachers()[:1]), specs(bench.teachers())

    def row(name: str, title: str, teachers: tuple[str, ...], **settings: Any) -> Row:
        meal = {"method": "meal", "teacher": teachers, "discriminator": "official"}
        return bench.soft_row(name, title, **(_online(bench) | meal | settings))

    found = [row("meal-one", "MEAL v1, first teacher", first)]
    if len(both) == 1:
        return [*found, row("meal-blocks", "MEAL v1, three blocks", both, **BLOCKS)]
    return [
        *found,
        row("meal", "MEAL v1, one of both teachers a batch", both),
        row("meal-d-off", "MEAL v1, both, no discriminator", both, discriminator="off"),
        row("meal-blocks", "MEAL v1, both, three blocks", both, **BLOCKS),
    ]


def _start_rows(bench: Bench) -> list[Row]:
    s = bench.setting
    extra = max(1, round(s.epochs * 120 / 180))  # the paper: 120 epochs before 180

    def all_images(seed: int) -> Config:
        # on the teachers' images: as many steps as the other start, or one epoch
        epochs = max(1, round(s.epochs * s.images / s.teacher_images))
        return bench.start(
            seed, "teacher-images", train_split="teacher-train", epochs=epochs, val_interval=epochs
        )

    def figure_6(seed: int) -> Sequence[Config]:
        settings = {"epochs": extra, "lr": 10 * s.lr, "sched": "constant", "val_interval": extra}
        first = bench.soft("random-extra-first", seed, bench.dense(), None, **settings)
        return [*first[:-1], *bench.soft("random-extra", seed, bench.dense(), first[-1])]

    def twice(seed: int) -> Sequence[Config]:
        settings = {"epochs": 2 * s.epochs, "val_interval": 2 * s.epochs}
        return bench.soft("random-twice", seed, bench.dense(), None, **settings)

    def thrice(seed: int) -> Sequence[Config]:
        settings = {"epochs": 3 * s.epochs, "val_interval": 3 * s.epochs, "num_views": None}
        return bench.hard("hard-thrice", seed, bench.start(seed), **settings)

    return [
        Row(
            "start-all",
            "start trained on the teachers' images",
            lambda seed: bench.soft("start-all", seed, bench.dense(), all_images(seed)),
            reference="soft",
        ),
        Row("random-extra", "random start, extra epochs at 10 x rate", figure_6, reference="soft"),
        Row("random-twice", "random start, twice the epochs", twice, reference="soft"),
        Row("hard-thrice", "hard labels, 3 x epochs, fresh views", thrice, reference="soft"),
    ]


def _view_rows(bench: Bench) -> list[Row]:
    size = bench.setting.larger_img_size
    teachers = bench.teachers()
    boxes: list[Config] = [*teachers, bench.labels("boxes", specs(teachers), **BOX)]
    large: list[Config] = [*teachers, bench.labels("larger", specs(teachers), img_size=size)]
    start = {"img_size": size}

    def start_at_size(seed: int) -> Config:
        return bench.start(seed, "larger", **start)

    found = [
        _of_labels(bench, "boxes", "random boxes (paper)", boxes),
        Row(
            "hard-boxes",
            "hard labels, random boxes",
            lambda seed: bench.hard("hard-boxes", seed, bench.start(seed), **BOX),
            reference="boxes",
        ),
    ]
    if size != bench.setting.img_size:
        found += [
            Row(
                "larger",
                f"{size} pixels",
                lambda seed: bench.soft("larger", seed, large, start_at_size(seed)),
                reference="soft",
            ),
            Row(
                "hard-larger",
                f"hard labels, {size} pixels",
                lambda seed: bench.hard("hard-larger", seed, start_at_size(seed), **start),
                reference="larger",
            ),
        ]
    return found


def _student_rows(bench: Bench) -> list[Row]:
    found = []
    for name, (model, arguments) in {"small": SMALLER, "big": LARGER, "large": LARGE}.items():
        of = {"model": model, "model_kwargs": arguments}

        def start(seed: int, name: str = name, of: dict[str, Any] = of) -> Config:
            return bench.start(seed, name, **of)

        def soft(seed: int, name: str = name, of: dict[str, Any] = of) -> Sequence[Config]:
            return bench.soft(f"soft-{name}", seed, bench.dense(), start(seed, name, of), **of)

        def hard(seed: int, name: str = name, of: dict[str, Any] = of) -> Sequence[Config]:
            return bench.hard(f"hard-{name}", seed, start(seed, name, of), **of)

        found += [
            Row(f"soft-{name}", f"student {model}", soft, reference="soft"),
            Row(f"hard-{name}", f"student {model}, hard labels", hard, reference=f"soft-{name}"),
        ]
    return found


def _of_labels(
    bench: Bench, name: str, title: str, labels: Sequence[Config], *, is_quick: bool = False
) -> Row:
    """Return a row that differs from the reference in its label set."""
    return Row(
        name,
        title,
        lambda seed: bench.soft(name, seed, labels, bench.start(seed)),
        reference="soft",
        is_quick=is_quick,
    )


def _online(bench: Bench) -> dict[str, Any]:
    return {
        "online": True,
        "teacher": specs(bench.teachers()),
        "img_size": bench.setting.img_size,
        **VIEWS,
    }


def main(words: Sequence[str] | None = None) -> None:
    """Run the rows that the flags ask for and print their table."""
    flags = parser(__doc__)
    add_flags(flags, SETTING)
    options = flags.parse_args(words)
    bench = Bench(options.output, setting_of(options, SETTING))
    asked = chosen(rows(bench), options)
    bench.write_images(options.data_dir)
    run_rows(asked, options)
    rates = [row for row in asked if row.name == "soft" or row.name.startswith("rate-")]
    if len(rates) > 1:
        compared = Comparison(rates, options.output / "labels" / "dense", bench.data)
        print(compared.write(options.output / "rates.md", range(options.seeds)))


if __name__ == "__main__":
    exit_with_message(main)
