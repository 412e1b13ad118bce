"""Tiny-ImageNet: label sets of several rates from ImageNet teachers, and their students.

    python -m benchmarks.tiny_imagenet tiny-imagenet --output tiny-rows --jobs 2

PATH is a folder train/WNID/IMAGE, val/WNID/IMAGE with 200 of ImageNet's classes. The teachers are
timm's ImageNet models as they are, with 1,000 classes (--class-map), on views resized to
--teacher-img-size. One dense label set is computed and converted to the others. Within a seed all
students have the same start, images, views and order; all are compared with the dense labels of the
validation images. Finished runs are kept. Results: docs/benchmarks/tiny-imagenet.md.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from timm.data.imagenet_info import ImageNetInfo

from benchmarks.distillation import Bench, Setting, add_flags, setting_of
from benchmarks.experiment_tables import chosen, exit_with_message, parser, run_rows
from benchmarks.experiments import Config, Row
from benchmarks.rate_tables import RATES, Comparison
from mealv2.storage.atomic import write_atomic

TEACHERS = ("tf_efficientnet_lite0.in1k", "tf_efficientnet_lite1.in1k")
SETTING = Setting(
    student="test_resnet",
    teachers=(),
    img_size=32,
    teacher_img_size=96,
    images=10,
    val_images=5,
    val_split="val",
)
NUM_VIEWS = 4
# label sets by name, with the settings of `mealv2 labels convert`
SETS: dict[str, dict[str, Any]] = {
    **{f"rate-{rate:g}": {"rate": rate} for rate in RATES},
    "top-10": {"topk": "10"},
    "top-5": {"topk": "5"},
    "top-5-float16": {"topk": "5", "label_dtype": "float16"},
    "top-1": {"topk": "1"},
}
QUICK = ("rate-0.001", "rate-0.016", "top-5", "top-1")


class Rates:
    """The rows of the benchmark: a student on dense labels, on each label set, on hard labels."""

    def __init__(self, bench: Bench, teachers: Sequence[str], num_views: int) -> None:
        self.bench = bench
        size = bench.setting.teacher_img_size
        labels = bench.labels("dense", teachers, num_views=num_views, teacher_img_size=size)
        self.dense: list[Config] = [labels]
        self.num_views = num_views

    def rows(self) -> list[Row]:
        """Return all rows; the first is the one to compare with."""
        bench = self.bench
        found = [self._of("dense", "dense, float32", self.dense, reference="")]
        for name, encoding in SETS.items():
            title = name.replace("-", " ", 1).replace("top ", "top-").replace("-float16", ", f16")
            found.append(self._of(name, title, bench.encoded(self.dense, name, **encoding)))
        views = {"num_views": self.num_views}

        def hard(seed: int) -> Sequence[Config]:
            return [*self.dense, *bench.hard("hard", seed, bench.start(seed), **views)]

        return [*found, Row("hard", "hard labels", hard, reference="dense", is_quick=True)]

    def _of(self, name: str, title: str, labels: Sequence[Config], reference: str = "dense") -> Row:
        bench = self.bench
        return Row(
            name,
            title,
            lambda seed: bench.soft(name, seed, labels, bench.start(seed)),
            reference=reference,
            is_quick=name in ("dense", *QUICK),
        )


def write_class_map(path: Path) -> None:
    """Write ImageNet's class names by class id, a line each, as --class-map reads them."""
    names = ImageNetInfo("imagenet-1k").label_names()
    write_atomic(path, "".join(f"{name}\n" for name in names).encode())


def main(words: Sequence[str] | None = None) -> None:
    """Run the rows that the flags ask for and print the tables."""
    flags = parser(__doc__)
    add_flags(flags, SETTING)
    flags.add_argument("--views", type=int, default=NUM_VIEWS, help=f"default: {NUM_VIEWS}")
    options = flags.parse_args(words)
    class_map = options.output / "classes.txt"
    bench = Bench(options.output, setting_of(options, SETTING, trained=False), class_map)
    rates = Rates(bench, options.teacher or TEACHERS, options.views)
    asked = chosen(rates.rows(), options)
    bench.write_images(options.data_dir)
    write_class_map(class_map)
    run_rows(asked, options)
    dense = Path(str(rates.dense[-1].output))
    compared = Comparison(asked, dense, bench.data, class_map)
    print(compared.write(options.output / "rates.md", range(options.seeds)))


if __name__ == "__main__":
    exit_with_message(main)
