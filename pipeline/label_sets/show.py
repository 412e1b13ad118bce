"""`mealv2 labels show`: the views of one image and their labels, as text and as a drawing."""

from pathlib import Path
from typing import Any

from mealv2.data.pixels import decode
from mealv2.data.requests import CENTRE
from mealv2.data.source import UNLABELLED
from mealv2.data.view_reader import ViewReader
from mealv2.errors import DataError
from mealv2.label_set import LabelSet
from mealv2.report import browser
from mealv2.report.averaged import open_labels
from mealv2.report.label_errors import find_label_errors
from mealv2.report.sample import LabelSample, sample_image
from mealv2.report.view_figure import figure_bytes, view_figure
from mealv2.storage.atomic import write_atomic
from mealv2.storage.urls import is_url, shown
from mealv2.text import printable
from pipeline import console
from pipeline.config import LabelsShowConfig
from pipeline.labelling.compatibility import choose_resize, image_check
from pipeline.labelling.store import local_folder
from pipeline.loading.sources import open_labelled

_BAR = 24  # characters
_EIGHTHS = " ▏▎▍▌▋▊▉"


def run(config: LabelsShowConfig) -> dict[str, Any]:
    """Show an image's labels as text without --json; return the report. Raises MealError."""
    location = config.labels
    folder = local_folder(config, location) if is_url(location) else Path(location)
    labels = open_labels(folder, split=config.split)
    sample = sample_image(labels, config.key)
    (record,) = browser.image_records(
        labels,
        sample,
        find_label_errors(sample),
        {0: []},
        max_views=config.max_views,
        topk=config.topk,
    )
    del record["reasons"], record["suggested"]  # one image has no threshold to compare with
    report = {"labels": shown(location), "split": config.split, **_named(record, labels)}
    if not config.json:
        console.result(_shown(record, labels, sample))
    if config.pictures is not None:
        _draw(config, labels, record)
        report["pictures"] = str(config.pictures)
        console.info(f"drawn in {config.pictures}")
    return report


def _named(value: Any, labels: LabelSet) -> Any:
    """Return a record with class names beside the class ids of its labels."""
    if not isinstance(value, dict):
        return value
    found = {name: item for name, item in value.items() if name not in ("top", "mean", "views")}
    for name in {"top", "mean"} & value.keys():
        found[name] = [
            {"class_id": c, "class": labels.classes[c], "prob": prob} for c, prob in value[name]
        ]
    if "hard" in value:
        hard = value["hard"]
        found["hard_class"] = None if hard is None else labels.classes[hard]
    if "views" in value:
        found["views"] = [_named(view, labels) for view in value["views"]]
    return found


# --- text ---------------------------------------------------------------------------------------


def _shown(record: dict[str, Any], labels: LabelSet, sample: LabelSample) -> str:
    """Return the record as text: the image, the mean of its views, then each view."""
    hard, size = record["hard"], record["size"]
    name = "none" if hard is None else labels.classes[hard]
    lines = [_line(record["key"]), f"hard label {_line(name)}"]
    if size is not None:
        lines[0] += f", {size[0]} x {size[1]} pixels"
    if hard is not None:
        views = console.count(record["num_views"], "view")
        lines[1] += (
            f": mean probability {100 * record['hard_prob']:.1f} %, {record['contradicting']} of "
            f"{views} contradict it"
        )
    lines += [
        f"mean entropy {record['entropy']:.3f} nats, disagreement between views "
        f"{record['disagreement']:.3f} nats",
        "",
        f"mean of {console.count(record['num_views'], 'view')}",
        *_bars(record["mean"], hard, labels),
    ]
    for view in record["views"]:
        lines += ["", _view_line(view), *_bars(view["top"], hard, labels, view["hard_prob"])]
    if len(record["views"]) < record["num_views"]:
        number = len(record["views"])
        lines += ["", f"{number} of {record['num_views']} views; --max-views shows more"]
    return "\n".join(lines)


def _view_line(view: dict[str, Any]) -> str:
    parts = [f"view {view['view']}"]
    if view["box"] is not None:
        top, left, height, width = view["box"]
        parts.append(f"box {width} x {height} at x {left}, y {top}")
        parts += ["flipped"] * bool(view["flip"]) + ["upside down"] * bool(view["vflip"])
        if view["operations"]:
            parts.append(console.count(view["operations"], "operation"))
    parts += [f"entropy {view['entropy']:.3f} nats", f"{view['num_kept']} classes stored"]
    if view["contradicts"]:
        parts.append("contradicts the hard label")
    return ", ".join(parts)


def _bars(
    top: list[tuple[int, float]], hard: int | None, labels: LabelSet, hard_prob: float | None = None
) -> list[str]:
    """Return a line per class: percent, bar, name; the hard label wherever it ranks, the rest."""
    shown = list(top)
    if hard is not None and hard_prob is not None and hard not in dict(top):
        shown.append((hard, hard_prob))
    lines = [
        f"  {100 * prob:5.1f} %  {_bar(prob)}  {_line(labels.classes[c])}"
        + (" (hard label)" if c == hard else "")
        for c, prob in shown
    ]
    others = labels.num_classes - len(shown)
    if others:
        rest = max(0.0, 1.0 - sum(prob for _, prob in shown))
        classes = f"{others} other class{'' if others == 1 else 'es'}"
        lines.append(f"  {100 * rest:5.1f} %  {_bar(rest)}  {classes}")
    return lines


def _bar(prob: float) -> str:
    eighths = round(prob * _BAR * 8)
    full, part = divmod(min(max(eighths, 0), 8 * _BAR), 8)
    return ("█" * full + (_EIGHTHS[part] if part else "")).ljust(_BAR)


def _line(text: str) -> str:
    return printable(text, is_line=True)


# --- drawing ------------------------------------------------------------------------------------


def _draw(config: LabelsShowConfig, labels: LabelSet, record: dict[str, Any]) -> None:
    """Write the drawing of --pictures; raises DataError for an image that cannot be read."""
    assert config.data_dir is not None
    assert config.pictures is not None
    source = open_labelled(config, config.data_dir, labels.manifest["plan"], config.split)
    key = record["key"]
    if key not in source.keys:
        raise DataError(f"{source.name} has no image {key!r}; give the data that was labelled")
    position = list(source.keys).index(key)
    views = tuple(view["view"] for view in record["views"])
    is_val = config.split == "val"
    reader = ViewReader(
        source,
        img_size=labels.img_size,
        views=None if is_val else labels.views(),
        resize=choose_resize(labels),
        check=image_check(labels, source, "first"),
    )
    batch = reader.read([(position, (CENTRE,) if is_val else views)])
    if batch.failed:
        raise DataError(f"cannot read image {key!r}: {batch.failed[position]}")
    crops = list(batch.images_BCHW.permute(0, 2, 3, 1).numpy())
    pixels_HWC = decode(source.read(position))
    if record["size"] is None:  # imported labels have no sizes
        size = pixels_HWC.shape[1], pixels_HWC.shape[0]
        hard = UNLABELLED if record["hard"] is None else record["hard"]
        record["views"] = browser.view_records(
            labels, key, views, hard=hard, size=size, topk=config.topk
        )
    canvas = view_figure(record, labels.classes, pixels_HWC, crops)
    data = figure_bytes(canvas, config.pictures.suffix.removeprefix("."))
    write_atomic(config.pictures, data)
