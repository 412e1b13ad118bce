"""Where the answers of a distillation come from: a label set, its teachers for what it lacks, or
teachers online.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from mealv2.ensemble import TeacherEnsemble
from mealv2.errors import ConfigError, LabelSetError
from mealv2.files import read_json
from mealv2.images import ImageSource, fingerprint, open_source
from mealv2.label_set import UNKNOWN, Appender, Encoding, LabelSet, read_manifest, refuse_drift
from mealv2.pixels import Resize, probe_sha256, resize_of
from mealv2.soft_labels import Labels
from mealv2.targets import OnlineTeachers, StoredLabels, Targets
from mealv2.views import DrawnViews, Views
from pipeline import logs, runtime, teachers
from pipeline.config import DEFAULT_IMG_SIZE, DistillConfig
from pipeline.evaluation import LabelTable, centre_shares
from pipeline.labelling import Labeller
from pipeline.loaders import ViewReader, read_views
from pipeline.runtime import Runtime

_LIBRARY: dict[Resize, str] = {"torch": "torch", "pil": "pillow"}
_KEPT_OF_VALIDATION = 100  # classes kept in memory of each validation label of online teachers


@dataclass(frozen=True)
class Answers:
    """Who answers for which images, and what is known of the validation split.

    ``accuracies`` are the teachers' there, by name, which they were asked about ``num_asked`` views
    for; ``provenance`` is what the run folder keeps.
    """

    targets: Targets
    positions: list[int]
    img_size: int
    views: Views
    resize: Resize
    provenance: dict[str, Any]
    of_validation: LabelTable | None = None
    accuracies: dict[str, dict[str, float]] = field(default_factory=dict)
    num_asked: int = 0


class CentreLabels:
    """The labels of a validation split's centre crops, in memory; a LabelTable."""

    def __init__(self, keys: Sequence[str], labels: Labels) -> None:
        self._rows = {key: row for row, key in enumerate(keys)}
        self._labels = labels

    def __contains__(self, key: object) -> bool:
        return key in self._rows

    def __len__(self) -> int:
        return len(self._rows)

    def soft_labels(self, keys: Sequence[str], views: Sequence[int]) -> Labels:
        """Return the labels of images; there is one view of each."""
        return self._labels.rows(torch.tensor([self._rows[key] for key in keys]))


def open_training_images(config: DistillConfig) -> ImageSource:
    """Open the images to train on: the split that the label set names, or --split."""
    if config.labels is None:
        return open_source(config.data_dir, config.split or "train")
    plan = read_manifest(config.labels)["plan"]
    return open_source(config.data_dir, plan["roles"]["train"]["split"])


def online(
    config: DistillConfig, machine: Runtime, source: ImageSource, val: ImageSource | None
) -> Answers:
    """Let the --teacher models answer at every step; they label the validation split first."""
    img_size = config.img_size or DEFAULT_IMG_SIZE
    ensemble, described = teachers.build(
        config.teacher, classes=list(source.classes), img_size=img_size, runtime=machine
    )
    of_validation, num_asked = None, 0
    accuracies: dict[str, dict[str, float]] = {}
    if val is not None:
        of_validation, figures = _label_validation(
            config, machine, ensemble, val, img_size=img_size, resize=config.resize
        )
        num_asked = len(of_validation)
        names = [*(f"teacher {teacher['model']}" for teacher in described), "ensemble"]
        accuracies = dict(zip(names, figures, strict=True))
    return Answers(
        OnlineTeachers(ensemble, source.labels),
        list(range(len(source))),
        img_size,
        DrawnViews(config.view_seed or 0),
        config.resize,
        {"online": True, "teachers": described},
        of_validation,
        accuracies,
        num_asked,
    )


def stored(
    config: DistillConfig, machine: Runtime, source: ImageSource, val: ImageSource | None
) -> Answers:
    """Answer from the label set, and from its teachers where --missing says so."""
    assert config.labels is not None
    if config.write_back and not os.access(config.labels, os.W_OK):  # now, not an epoch later
        raise LabelSetError(
            f"cannot append to {config.labels}: no permission; leave out --write-back"
        )
    labels = LabelSet.open(config.labels, **_pinned(config))
    _check_logits(config, labels)
    _check_boxes(labels)
    check_same_data(
        labels,
        source,
        may_lack_images=config.missing != "fail",
        choice=", or say what to do with them: --missing teach or --missing skip",
    )
    plan = labels.manifest["plan"]["roles"]
    val_labels = None
    if val is not None and val.split == plan.get("val", {}).get("split"):
        val_labels = LabelSet.open(config.labels, role="val")
        check_same_data(val_labels, val)
    ensemble = None
    if config.missing == "teach":
        ensemble = teachers_of(config.labels, config.teacher, labels.manifest["plan"], machine)
    targets = StoredLabels(
        labels,
        source.keys,
        source.labels,
        seed=config.seed,
        reuse=config.reuses_views,
        missing=config.missing,
        ensemble=ensemble,
        appender=Appender(labels) if config.write_back else None,
    )
    has_labels = labels.has_labels(source.keys)
    positions = [
        p
        for p, (key, there) in enumerate(zip(source.keys, has_labels.tolist(), strict=True))
        if there or (config.missing != "fail" and key not in labels.skipped)
    ]
    _check_epochs(config, labels)
    lacking = int((~has_labels).sum()) - len(labels.skipped)
    if lacking:
        done = "left out" if config.missing == "skip" else "labelled by the teachers"
        logs.say(
            f"{lacking} images are not in the label set; they are {done}, but for views "
            "that were appended"
        )
    return Answers(
        targets,
        positions,
        labels.img_size,
        labels.views(),
        resize_of_set(labels, config.exact_pil),
        {
            "path": str(config.labels.absolute()),
            "plan_sha256": labels.manifest["plan_sha256"],
            "appended": labels.appended,
            "num_views": labels.num_views,
        },
        val_labels,
        _accuracies(val_labels),
    )


def check_same_data(
    labels: LabelSet, source: ImageSource, *, may_lack_images: bool = False, choice: str = ""
) -> None:
    """Raise LabelSetError, saying what differs, when the labels are of other images.

    With ``may_lack_images`` the source may have images that the set does not. ``choice`` is what
    else could be done where that is all that differs.
    """
    if list(source.classes) != labels.classes:
        odd = sorted(set(source.classes) ^ set(labels.classes))
        raise LabelSetError(
            f"{labels.folder} is a label set of {labels.num_classes} classes, {source.name} has "
            f"{len(source.classes)} (only in one of them: {_some(odd)}); give its own --data-dir"
        )
    there = set(labels.keys()) | labels.skipped.keys()
    made_from = labels.manifest["plan"]["roles"][labels.role]["data_sha256"]
    if fingerprint(source, only=there if may_lack_images else None) == made_from:
        return
    new, gone = sorted(set(source.keys) - there), sorted(there - set(source.keys))
    if may_lack_images:  # then these are not what is wrong
        new = []
    what = [f"images without labels: {len(new)} ({_some(new)})"] if new else []
    what += [f"labelled images that are gone: {len(gone)} ({_some(gone)})"] if gone else []
    advice = "give the data it was made from, or precompute labels for this data"
    if new and not gone:
        advice += choice
    raise LabelSetError(
        f"{labels.folder} was made from other data than {source.name}: "
        f"{' and '.join(what) or 'the same names, but other files'}; {advice}"
    )


def _check_epochs(config: DistillConfig, labels: LabelSet) -> None:
    """Raise ConfigError where the stored views end before the epochs do, or within one batch."""
    if config.reuses_views and config.views_per_image > labels.num_views:
        raise ConfigError(
            f"--views-per-image {config.views_per_image}: {labels.folder} holds only "
            f"{labels.num_views} views of an image"
        )
    if config.reuses_views or config.missing == "teach" or config.epochs <= labels.num_views:
        return
    raise ConfigError(
        f"--no-reuse-views: {config.epochs} epochs need as many views, {labels.folder} holds "
        f"{labels.num_views}; let its teachers answer with --missing teach, or use fewer --epochs"
    )


def teachers_of(
    folder: Path, given: Sequence[str], plan: dict[str, Any], machine: Runtime
) -> TeacherEnsemble:
    """Build the teachers that made the set in a folder, from its plan or from --teacher.

    Raises LabelSetError where the weights differ, or nobody knows which they were.
    """
    _refuse_imported(folder, plan)
    made_by = plan["teachers"]
    specs = list(given)
    if not specs:
        for teacher in made_by:
            if "." not in teacher["model"]:
                raise ConfigError(
                    f"{folder} was made by an own checkpoint of {teacher['model']}; "
                    f"say where it is: --teacher {teacher['model']}=RUN, for every teacher"
                )
        specs = [teacher["model"] for teacher in made_by]
    ensemble, described = teachers.build(
        specs, classes=plan["classes"], img_size=plan["img_size"], runtime=machine
    )
    there, here = (
        [(teacher["weights_sha256"], teacher["mean"], teacher["std"]) for teacher in group]
        for group in (made_by, described)
    )
    if sorted(there) != sorted(here):
        new = [d["model"] for d, what in zip(described, here, strict=True) if what not in there]
        raise LabelSetError(
            f"{folder} was made by {len(there)} teachers with other weights or "
            f"normalisation than {new[0] if new else f'these {len(here)}'}; give those of its "
            f"manifest: {', '.join(teacher['model'] for teacher in made_by)}"
        )
    return ensemble


def check_precision(folder: Path, plan: dict[str, Any], machine: Runtime) -> None:
    """Raise ConfigError where teachers would answer in another precision than the set's."""
    _refuse_imported(folder, plan)
    if machine.precision != plan["precision"]:
        raise ConfigError(
            f"{folder} was computed in {plan['precision']}, this is {machine.precision}; give or "
            "leave out --amp and --amp-dtype as when it was made"
        )


def _refuse_imported(folder: Path, plan: dict[str, Any]) -> None:
    if any(teacher["weights_sha256"] == UNKNOWN for teacher in plan["teachers"]):
        raise LabelSetError(
            f"the labels of {folder} were imported: nobody knows the weights of the teachers that "
            "made them, so that no teacher can add to them or be compared with them"
        )


def _label_validation(
    config: DistillConfig,
    machine: Runtime,
    ensemble: TeacherEnsemble,
    val: ImageSource,
    *,
    img_size: int,
    resize: Resize,
) -> tuple[CentreLabels, list[dict[str, float]]]:
    """Ask the ensemble about the validation split once; return its labels, and the accuracy of
    every teacher and of the ensemble. Ranks ask about the images that they will evaluate.
    """
    num_classes, ranks = len(val.classes), machine.ranks
    requests = centre_shares(val, config.batch_size, ranks)
    labeller = Labeller(
        ensemble,
        machine,
        Encoding(num_classes, "float32", topk=min(num_classes, _KEPT_OF_VALIDATION)),
        batch_size=config.batch_size,
        on_bad_image=config.on_bad_image,
    )
    pixels = logs.progress(
        read_views(
            ViewReader(val, img_size=img_size, resize=resize),
            requests,
            workers=config.workers,
            pin_memory=machine.pins,
        ),
        total=sum(map(len, requests)),
        what="teachers on the validation split",
        unit="images",
        size=lambda item: len(item.positions) + len(item.failed),
    )
    answers = labeller.label(val, pixels, score=True)
    num_images = int(ranks.total(torch.tensor(len(answers.positions))))
    percent = ranks.total(torch.from_numpy(answers.correct)).numpy() * 100.0 / max(1, num_images)
    figures = [{"top1": float(a), "top5": float(b)} for a, b in percent.T]
    return CentreLabels([val.keys[p] for p in answers.positions], answers.rows.labels), figures


def resize_of_set(labels: LabelSet, exact_pil: bool | None = None) -> Resize:
    """Return who is to resize the views of a set: who did, unless a flag says otherwise.

    Says so where the pixels will not be those that were labelled.
    """
    plan = labels.manifest["plan"]
    resize = resize_of(plan.get("interpolation"))
    if exact_pil is not None and exact_pil != (resize == "pil"):
        logs.say(
            f"{labels.folder} was labelled on views resized by {_LIBRARY[resize]}; these pixels "
            "differ from them by up to 2 of 255"
        )
        return "pil" if exact_pil else "torch"
    if plan.get("probe_sha256") not in (None, probe_sha256(resize)):
        library = _LIBRARY[resize]
        made_by = labels.manifest.get("versions", {}).get(library, "another version")
        logs.say(
            f"{labels.folder} was labelled on views resized by {library} {made_by}; the one here, "
            f"{runtime.versions()[library]}, or the machine, gives slightly other pixels"
        )
    return resize


def _check_boxes(labels: LabelSet) -> None:
    """Raise LabelSetError where this machine cuts other boxes than those that were labelled.

    Looks at the smallest shard: arithmetic that has drifted, drifts everywhere.
    """
    files = [file for file in labels.blocks[0][1] if file.num_images]
    if not files:
        raise LabelSetError(f"{labels.folder} has labels of no image")
    refuse_drift(min(files, key=lambda file: file.num_images), labels.views())


def _check_logits(config: DistillConfig, labels: LabelSet) -> None:
    """Raise ConfigError where the discriminator is to see logits that the set does not have."""
    if config.discriminator_input == "logits" and not labels.encoding.logits:
        raise ConfigError(
            f"--discriminator-input logits: {labels.folder} holds none; precompute with "
            "--store-logits, use --online, or show it log-probs"
        )


def _pinned(config: DistillConfig) -> dict[str, Any]:
    """Return what of the label set the run to resume began with; nothing for a new run."""
    if config.resume is None or not (path := config.resume / logs.LABELS_NAME).exists():
        return {}
    try:
        kept = read_json(path)
        num_views = kept.get("num_views")  # runs before views could be added do not say
        if not isinstance(num_views, int | None):
            raise TypeError("num_views is no number")
        return {"appended": [Path(name).name for name in kept["appended"]], "num_views": num_views}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path} is damaged: {error}") from None


def _accuracies(labels: LabelSet | None) -> dict[str, dict[str, float]]:
    """Return what stage one measured of the teachers, by name."""
    accuracy = None if labels is None else labels.manifest["roles"]["val"].get("accuracy")
    if accuracy is None:
        return {}
    named = {f"teacher {t['model']}": t for t in accuracy["teachers"]}
    return {**named, "ensemble": accuracy["ensemble"]}


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:2]) + (", …" if len(names) > 2 else "")
