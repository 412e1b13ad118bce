"""`mealv2 labels export`: labels as FKD's files, as members of tar shards, or as tables."""

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mealv2 import fkd
from mealv2.data.source import ImageSource
from mealv2.data.tar_writer import sample, sample_names, tar_writer
from mealv2.errors import ConfigError, LabelSetError
from mealv2.label_set import LabelSet, Rows, ShardFile, member_bytes
from mealv2.soft_labels import top_k
from mealv2.storage.atomic import atomic_file, list_folder, write_atomic
from mealv2.storage.json_format import canonical_json
from mealv2.views import BOX_UNIT, fractions
from pipeline import console
from pipeline.config import LabelsExportConfig
from pipeline.label_sets.writing import all_rows, require_outside
from pipeline.labelling.compatibility import check_same_data
from pipeline.loading.sources import open_images

# readers of a folder of tables leave out names that begin so
_PLAN_NAME = "_plan.json"
_REPORT_NAME = "_export.json"


def run(config: LabelsExportConfig) -> dict[str, Any]:
    """Export; return the report. Raises MealError and OSError.

    _plan.json says what is exported, before the first file, and _export.json how much it was, after
    the last. Every file is whole; those that are there are kept, so it can be run again.
    """
    require_outside(config.output, [config.labels])
    labels = LabelSet.open(config.labels, split=config.split)
    if labels.num_appended:
        console.info(f"{labels.num_appended} labels that were appended are left out")
    labels = LabelSet.open(config.labels, split=config.split, appended=[])
    prepare, write = {
        "fkd": (_check_fkd, _fkd),
        "webdataset": (_check_webdataset, _webdataset),
        "parquet": (_check_parquet, _parquet),
    }[config.to]
    prepare(config, labels)
    _claim(config, labels)
    files = write(config, labels)
    num_bytes = sum(path.stat().st_size for path in files)
    report = {
        "to": config.to,
        "images": len(labels),
        "views": len(labels) * labels.num_views,
        "files": len(files),
        "bytes": num_bytes,
    }
    write_atomic(config.output / _REPORT_NAME, canonical_json(report).encode())
    console.info(
        f"{config.output}: {console.count(len(files), 'file')}, {console.size_of(num_bytes)}"
    )
    return {"output": str(config.output), **report}


def _claim(config: LabelsExportConfig, labels: LabelSet) -> None:
    """Make --output the place of this export; raises ConfigError where it holds something else."""
    plan = {
        "to": config.to,
        "role": config.split,
        "num_views": labels.num_views,
        "label_set": labels.manifest["plan"],
        **({"label_type": config.label_type} if config.to == "fkd" else {}),
    }
    path = config.output / _PLAN_NAME
    config.output.mkdir(parents=True, exist_ok=True)
    if path.is_file():
        if path.read_bytes() != canonical_json(plan).encode():
            raise ConfigError(f"--output {config.output} holds another export; give a new folder")
        return
    if names := list_folder(config.output):
        raise ConfigError(
            f"--output {config.output} is not empty ({names[0]}, …); give a new folder"
        )
    write_atomic(path, canonical_json(plan).encode())


def _is_there(module: str) -> bool:
    """Return whether a module can be imported, without importing it."""
    try:
        return importlib.util.find_spec(module) is not None
    except ValueError:  # it has been ruled out
        return False


def _progress(labels: LabelSet, what: str) -> Iterator[tuple[int, ShardFile]]:
    """Yield the shards of the first block of views, with their numbers."""
    _, files = labels.blocks[0]
    return iter(
        console.progress(
            list(enumerate(files)),
            total=len(labels),
            what=what,
            unit="images",
            size=lambda item: item[1].num_images,
        )
    )


def _rows_of(labels: LabelSet, number: int) -> Rows:
    """Return all views of the images of a shard, those of added blocks too, image by image.

    Every block is read once, however many views there are.
    """
    parts, addresses, first_row = [], [], 0
    keys = labels.blocks[0][1][number].keys()
    for views, files in labels.blocks:
        file = files[number]
        row_of = {key: row for row, key in enumerate(file.keys())}
        if missing := [key for key in keys if key not in row_of]:
            labels.rows(missing[:1], [views.start])  # raises, saying why it is not there
        images_N1 = np.array([row_of[key] for key in keys], dtype=np.int64)[:, None]
        addresses.append(first_row + images_N1 * len(views) + np.arange(len(views)))
        parts.append(all_rows(file, labels.encoding))
        first_row += len(parts[-1].labels)
    order_N = torch.from_numpy(np.concatenate(addresses, axis=1).reshape(-1))
    return parts[0] if len(parts) == 1 else Rows.concat(parts).rows(order_N)


def _boxes_of(labels: LabelSet, file: ShardFile) -> tuple[np.ndarray, np.ndarray]:
    """Return boxes N x V x 4 as fractions of the image, float64, and flips N x V, bool."""
    images, num_views = file.images, labels.num_views
    if file.stored_views is not None:
        return file.stored_views.boxes_NV4 / BOX_UNIT, file.stored_views.flips_NV.astype(bool)
    if images is None:
        raise LabelSetError(f"{file.path} does not say how large its images are")
    recipe = labels.views()
    boxes, flips = [], []
    for key, (width, height) in zip(file.keys(), images.sizes_N2.tolist(), strict=True):
        for index in range(num_views):
            view = recipe.view(key, index, width=width, height=height)
            boxes.append(fractions(view, width=width, height=height))
            flips.append(view.flip)
    shape = (file.num_images, num_views)
    return np.array(boxes).reshape(*shape, 4), np.array(flips, dtype=bool).reshape(shape)


# --- FKD ------------------------------------------------------------------------------------------


def _check_fkd(config: LabelsExportConfig, labels: LabelSet) -> None:
    try:
        fkd.num_kept(config.label_type, labels.num_classes)
    except LabelSetError as error:
        raise ConfigError(f"--label-type {config.label_type}: {error}") from None
    fkd.label_names(labels.keys())
    _boxes_of(labels, labels.blocks[0][1][0])


def _fkd(config: LabelsExportConfig, labels: LabelSet) -> list[Path]:
    """Write OUT/SPLIT/CLASS/STEM.tar for every image, as FKD names them; return the files."""
    folder = config.output / labels.manifest["plan"]["roles"]["train"]["split"]
    names = fkd.label_names(labels.keys())
    kept = fkd.num_kept(config.label_type, labels.num_classes)
    for number, file in _progress(labels, "exporting"):
        paths = [folder / name for name in map(names.__getitem__, file.keys())]
        if all(path.exists() for path in paths):
            continue
        boxes, flips = _boxes_of(labels, file)
        exact = top_k(_rows_of(labels, number).labels.to_dense(), kept)
        packed = fkd.pack(exact, config.label_type)
        by_image = packed.reshape(file.num_images, labels.num_views, *packed.shape[1:])
        for row, path in enumerate(paths):
            path.parent.mkdir(parents=True, exist_ok=True)
            fkd.write_file(path, boxes[row].astype(np.float32), flips[row], by_image[row])
    return [folder / name for name in names.values()]


# --- WebDataset -----------------------------------------------------------------------------------


def _source_of(config: LabelsExportConfig, labels: LabelSet) -> ImageSource:
    assert config.data_dir is not None
    split = labels.manifest["plan"]["roles"][labels.split]["split"]
    return open_images(config, config.data_dir, split)


def _check_webdataset(config: LabelsExportConfig, labels: LabelSet) -> None:
    check_same_data(labels, _source_of(config, labels), allow_missing=True)


def _webdataset(config: LabelsExportConfig, labels: LabelSet) -> list[Path]:
    """Write a tar of images and labels for every shard; return the files.

    Equal inputs give equal bytes. The class names go into classes.json.
    """
    source = _source_of(config, labels)
    position_of = {key: position for position, key in enumerate(source.keys)}
    write_atomic(config.output / "classes.json", canonical_json(source.classes).encode())
    made = []
    for number, file in _progress(labels, "exporting"):
        path = config.output / f"{labels.split}-{number:06d}.tar"
        made.append(path)
        if path.exists():
            continue
        keys = file.keys()
        blocks = labels.encoding.blocks(_rows_of(labels, number), labels.num_views)
        with (
            atomic_file(path) as temporary,
            temporary.open("xb") as stream,
            tar_writer(stream) as writer,
        ):
            for key, name, block in zip(keys, sample_names(keys), blocks, strict=True):
                position = position_of[key]
                class_id, image = source.labels[position], source.read(position)
                writer.write(sample(name, key, class_id, image, mealv2=member_bytes(key, block)))
    return made


# --- Parquet --------------------------------------------------------------------------------------


def _check_parquet(config: LabelsExportConfig, labels: LabelSet) -> None:
    if not _is_there("pyarrow"):
        raise ConfigError("--to parquet needs pyarrow: pip install 'mealv2[parquet]'")


def _parquet(config: LabelsExportConfig, labels: LabelSet) -> list[Path]:
    """Write a table of labels for every shard, one row a view; return the files."""
    import pyarrow
    import pyarrow.parquet

    made = []
    for number, _ in _progress(labels, "exporting"):
        path = config.output / f"{labels.split}-{number:05d}.parquet"
        made.append(path)
        if path.exists():
            continue
        table = pyarrow.table(_columns(labels, number, pyarrow))
        with atomic_file(path) as temporary:
            pyarrow.parquet.write_table(table, temporary, compression="zstd")
    return made


def _columns(labels: LabelSet, number: int, pyarrow: Any) -> dict[str, Any]:
    """Return the columns of a shard's table by name."""
    rows, file = _rows_of(labels, number), labels.blocks[0][1][number]
    kept = rows.labels.kept()
    counts = kept.is_kept_NK.sum(dim=1)
    ends = np.concatenate([[0], np.cumsum(counts.numpy())]).astype(np.int32)

    def lists(values_NK: torch.Tensor, kind: str) -> Any:
        flat = values_NK[kept.is_kept_NK].numpy().astype(kind)
        return pyarrow.ListArray.from_arrays(ends, pyarrow.array(flat))

    columns: dict[str, Any] = {
        "key": np.repeat(np.array(file.keys(), dtype=object), labels.num_views),
        "view": np.tile(np.arange(labels.num_views, dtype=np.int32), file.num_images),
        "classes": lists(kept.indices_NK, "int32"),
        "probs": lists(kept.probs_NK, "float32"),
        "prob_of_each_other": kept.tail_N.numpy(),
    }
    if rows.logits is not None:
        columns["mean_logits"] = lists(
            rows.logits.values_NK[:, : kept.is_kept_NK.shape[1]], "float32"
        )
        columns["mean_logit_of_others"] = rows.logits.rest_N.float().numpy()
    if file.images is not None:
        columns["true_class"] = np.repeat(file.images.classes_N.astype(np.int32), labels.num_views)
    if labels.split == "train" and (file.images is not None or file.stored_views is not None):
        boxes, flips = _boxes_of(labels, file)
        for position, name in enumerate(("top", "left", "height", "width")):
            columns[f"box_{name}"] = boxes[..., position].reshape(-1)
        columns["flip"] = flips.reshape(-1)
    return columns
