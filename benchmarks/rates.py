"""The student of the demo, on label sets of several rates.

    mealv2 demo --seeds 5 --output demo
    python -m benchmarks.rates demo --output rates --seeds 5

PATH is a folder that `mealv2 demo` made: its images, teachers, and starts of each seed. One dense
label set is computed, and the others are converted from it. Within a seed all students have the
same start, images, views and order; all are compared with the dense labels of the validation
images. Finished runs are kept. Results: docs/benchmarks/rates.md.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.distillation import DENSE
from benchmarks.experiment_tables import chosen, exit_with_message, parser, write_results
from benchmarks.experiments import COMMON, Config, Row, run_all
from benchmarks.rate_tables import RATES, Comparison
from mealv2.errors import ConfigError
from pipeline.config import DistillConfig, LabelsConvertConfig, PrecomputeConfig
from pipeline.demo.parts import (
    BATCH_SIZE,
    DISCRIMINATOR_LR,
    EPOCHS,
    IMG_SIZE,
    LR,
    START,
    STUDENT,
    TEACHERS,
    VIEWS,
    run_name,
    teacher_name,
)

LOGITS: dict[str, Any] = {"store_logits": True}
# Label sets by name: the set to convert from (none: the teachers), and the settings.
SETS: dict[str, tuple[str, dict[str, Any]]] = {
    "dense": ("", DENSE),
    **{f"rate-{rate:g}": ("dense", {"rate": rate}) for rate in RATES},
    "top-1": ("dense", {"topk": "1"}),
    "dense-logits": ("", DENSE | LOGITS),
    "rate-0.001-logits": ("dense-logits", {"rate": 0.001} | LOGITS),
}
QUICK = ("dense", *(f"rate-{rate:g}" for rate in RATES))


@dataclass(frozen=True)
class Demo:
    """The folder of a demo, the folder of the students, and their epochs."""

    folder: Path
    output: Path
    epochs: int

    @property
    def data(self) -> Path:
        """The images."""
        return self.folder / "data"

    def seeds(self, number: int) -> list[int]:
        """Return the first seeds that the demo has a start of; raises ConfigError for too few."""
        starts = self.folder.glob(f"seed-*/{START}")
        found = sorted(int(path.parent.name.partition("-")[2]) for path in starts)
        if len(found) < number:
            raise ConfigError(
                f"{self.folder} has the starts of {len(found)} seeds, {number} are needed; "
                f"run `mealv2 demo --seeds {number} --output {self.folder}`"
            )
        return found[:number]

    def labels(self, name: str) -> list[Config]:
        """Return the runs of a label set; it comes last."""
        source, settings = SETS[name]
        output = self.output / "labels" / name
        if source:
            of = self.labels(source)
            return [*of, LabelsConvertConfig(labels=of[-1].output, output=output, **settings)]
        made = PrecomputeConfig(
            data_dir=self.data,
            output=output,
            teacher=tuple(f"{n}={self.folder / teacher_name(n)}" for n in TEACHERS),
            num_views=self.epochs,
            img_size=IMG_SIZE,
            workers=0,
            job_index=0,  # one job, whatever the environment is
            num_jobs=1,
            **VIEWS,
            **settings,
        )
        return [made]

    def student(self, name: str, seed: int) -> list[Config]:
        """Return the runs of a student with the settings of the demo."""
        labels = self.labels(name)
        student = DistillConfig(
            data_dir=self.data,
            labels=labels[-1].output,
            output=self.output / "rows" / name / f"seed-{seed}",
            model=STUDENT,
            initial_checkpoint=self.folder / run_name(seed, START),
            epochs=self.epochs,
            lr=LR,
            weight_decay=0.0,
            discriminator_lr=DISCRIMINATOR_LR,
            batch_size=BATCH_SIZE,
            val_interval=self.epochs,
            seed=seed,
            **COMMON,
        )
        return [*labels, student]

    def rows(self) -> list[Row]:
        """Return a row for each label set, compared with the one that it was converted from."""
        return [
            Row(
                name,
                name.replace("rate-", "rate ").replace("-logits", ", logits"),
                lambda seed, name=name: self.student(name, seed),  # type: ignore[misc]
                reference=source,
                is_quick=name in QUICK,
            )
            for name, (source, _) in SETS.items()
        ]


def main(words: Sequence[str] | None = None) -> None:
    """Run the rows that the flags ask for and print the tables."""
    flags = parser(__doc__)
    flags.add_argument("--epochs", type=int, default=EPOCHS, help=f"default: {EPOCHS}")
    options = flags.parse_args(words)
    demo = Demo(options.data_dir, options.output, options.epochs)
    rows, seeds = chosen(demo.rows(), options), demo.seeds(options.seeds)
    if not options.table:
        run_all((c for seed in seeds for row in rows for c in row.runs(seed)), jobs=options.jobs)
    print(write_results(options.output, rows, seeds))
    dense = options.output / "labels" / rows[0].name
    print(Comparison(rows, dense, demo.data).write(options.output / "rates.md", seeds))


if __name__ == "__main__":
    exit_with_message(main)
