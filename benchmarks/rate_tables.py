"""Students on label sets of several rates: what the labels lose, and what the students lose."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from benchmarks.experiment_tables import compare_with_labels, figures, mean_cell, table
from benchmarks.experiments import Config, Report, Row, finished
from mealv2.label_set import MANIFEST_NAME, LabelSet
from mealv2.labelling.encoding_loss import kl_of_rows
from mealv2.soft_labels import Labels, concat
from mealv2.storage.atomic import write_atomic
from mealv2.storage.json_format import canonical_json, read_json
from pipeline.config import LabelsInfoConfig
from pipeline.label_sets import info
from pipeline.label_sets.writing import all_rows

RATES = (0.0003, 0.001, 0.004, 0.016, 0.064)
FIGURES = {"top1": ("top-1 %", 2), "agreement": ("agreement %", 2), "kl": ("KL, nats", 4)}


@dataclass(frozen=True)
class Comparison:
    """Rows whose students learn from different label sets of the same views.

    All are compared with the labels of the validation images in the set ``dense``, of which the
    other sets are conversions; ``data`` are the images.
    """

    rows: Sequence[Row]
    dense: Path
    data: Path
    class_map: Path | None = None

    def report(self, config: Config) -> Report | None:
        """Return the figures of a finished run against the dense labels; None before."""
        if finished(config) is None:
            return None
        run = Path(str(config.output))
        kept = run.with_name(f"{run.name}-dense.json")
        if not kept.exists():
            found = compare_with_labels(run, self.data, self.dense, self.class_map)
            write_atomic(kept, canonical_json(found).encode())
        return dict(read_json(kept))

    def labels_table(self) -> str:
        """Return the table of the label sets that are finished."""
        of = {row.title: row.result(0).as_json().get("labels") for row in self.rows}
        folders = {title: Path(str(folder)) for title, folder in of.items() if folder}
        dense_NC = labels_of_training(self.dense).to_dense()
        lines = [
            [title, *_labels_cells(folder, dense_NC)]
            for title, folder in folders.items()
            if (folder / MANIFEST_NAME).exists()
        ]
        return table(["labels", "encoding", "bytes a view", "KL to dense", "p99 of KL"], lines)

    def students_table(self, seeds: Sequence[int]) -> str:
        """Return accuracy, agreement with and KL to the dense labels, and their differences."""
        lines: dict[str, list[str]] = {}
        for name, (_, digits) in FIGURES.items():
            found = figures(self.rows, seeds, name, report_of=self.report)
            for row in self.rows:
                each = found[row.name]
                if each.values:
                    line = lines.setdefault(row.name, [row.title, str(len(each.values))])
                    line.append(mean_cell(list(each.values.values()), digits))
                    line.append(mean_cell(list(each.differences.values()), digits, "+"))
        titles = [word for title, _ in FIGURES.values() for word in (title, "difference")]
        return table(["labels", "seeds", *titles], lines.values())

    def write(self, path: Path, seeds: Sequence[int]) -> str:
        """Write both tables to a file, and return them."""
        text = f"{self.labels_table()}\n{self.students_table(seeds)}"
        write_atomic(path, text.encode())
        return text


def labels_of_training(folder: Path) -> Labels:
    """Return every training label of a set, image by image."""
    labels = LabelSet.open(folder)
    files = [file for _, files in labels.blocks for file in files]
    return concat([all_rows(file, labels.encoding).labels for file in files])


def _labels_cells(folder: Path, dense_NC: Tensor) -> list[str]:
    """Return the cells of a set: its encoding, bytes, and what the labels lose."""
    split = info.run(LabelsInfoConfig(labels=folder))["roles"]["train"]
    lost_N = kl_of_rows(dense_NC, labels_of_training(folder).to_dense())
    return [
        str(LabelSet.open(folder).encoding),
        f"{split['bytes_per_view']:.2f}",
        f"{abs(float(lost_N.mean())):.5f}",  # not -0
        f"{float(lost_N.quantile(0.99)):.4f}",
    ]
