"""Export a trained model: timm folder, torch.hub folder, ONNX or TorchScript file.

The output is built under a temporary name, checked, and then renamed.
"""

import importlib.util
import io
import json
import re
import tempfile
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import mealv2
from mealv2.errors import ConfigError, MealError
from mealv2.models import (
    CONFIG_NAME,
    Classifier,
    cifar,
    create_classifier,
    read_metadata,
    save_classifier,
)
from mealv2.models.factory import is_factory
from mealv2.storage.atomic import TEMPORARY_PREFIX, file_sha256, write_atomic
from mealv2.storage.json_format import canonical_json
from mealv2.storage.weight_files import EXPORT_FOLDER, find_checkpoint
from pipeline import console
from pipeline.config import ExportConfig
from pipeline.export import model_card
from pipeline.load_model import require_own_code_named

# Largest difference between the logits of a file and of its model, relative to the largest logit.
TOLERANCES = {"onnx": 1e-4, "torchscript": 1e-6}

_MAX_ONNX_BYTES = 2**31 - 2**20  # protobuf's limit, with room for the graph

_HUBCONF = '''"""Entry point of torch.hub to the model in this folder; needs {needed}."""

from pathlib import Path

dependencies = {dependencies}


def {entry}(pretrained=True, **kwargs):
    """Return the timm model of this folder, with its weights unless pretrained is false.

    Its input is images in [0, 1] after (image - mean) / std; README.md has the values.
    """
    import timm
{registering}
    folder = Path(__file__).parent
    return timm.create_model(f"local-dir:{{folder}}", pretrained=pretrained, **kwargs)
'''


@dataclass(frozen=True)
class ExportedModel:
    """The model to export, the metadata of its checkpoint, and its run folder, if any."""

    model: Classifier
    stored: dict[str, Any]
    run: Path | None


def run(config: ExportConfig) -> dict[str, Any]:
    """Export and return the report. Raises MealError and OSError."""
    out = config.output or _default_out(config)
    as_file = config.to in TOLERANCES
    check_out(out, as_file=as_file)
    if config.to == "onnx":
        _require_onnx()
    exported = load(config.run, config.model)
    if is_factory(exported.stored["architecture"]) and not as_file:
        raise ConfigError(
            f"--to {config.to} makes a folder that timm builds, and {config.model} is your own "
            "code: use --to onnx or --to torchscript"
        )
    report: dict[str, Any] = {"path": str(out), "kind": config.to}
    out.parent.mkdir(parents=True, exist_ok=True)
    if as_file:
        data, difference = {"onnx": _onnx, "torchscript": _torchscript}[config.to](exported)
        if difference is not None:
            report["max_difference"] = difference
            console.info(
                f"largest difference to the checkpoint: {difference:.2g} of the largest logit"
            )
        if not write_atomic(out, data, replace=False):
            check_out(out, as_file=True)
    else:
        write_folder(out, exported, hub=config.to == "hub-folder")
    files = sorted(out.iterdir()) if out.is_dir() else [out]
    report["bytes"] = sum(path.stat().st_size for path in files)
    report["sha256"] = {path.name: file_sha256(path) for path in files}
    console.info(f"wrote {out}, {console.size_of(report['bytes'])}")
    return report


def _default_out(config: ExportConfig) -> Path:
    folder = config.run if config.run.is_dir() else config.run.parent
    names = {"onnx": "model.onnx", "torchscript": "model.pt"}
    return folder / "export" / names.get(config.to, config.to)


def check_out(out: Path, *, as_file: bool) -> None:
    """Raise ConfigError if the output exists; an empty folder is replaced."""
    if out.exists() and (as_file or not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} already exists; remove it, or give another --output")


def load(path: Path, name: str | None = None) -> ExportedModel:
    """Load a model that mealv2 saved; raises ConfigError for other files."""
    checkpoint = find_checkpoint(path)
    stored = read_metadata(checkpoint)
    missing = {"architecture", "classes", "img_size", "mean", "std"} - stored.keys()
    if missing:
        raise ConfigError(
            f"mealv2 did not save {checkpoint} (it has no {min(missing)}); give a run folder or "
            "the model folder in it"
        )
    if name is None:
        require_own_code_named(stored["architecture"], checkpoint)
    elif name != stored["architecture"]:
        raise ConfigError(f"--model {name}: {checkpoint} is of {stored['architecture']}")
    model = create_classifier(
        stored["architecture"],
        num_classes=len(stored["classes"]),
        checkpoint=checkpoint,
        img_size=stored["img_size"],
    )
    folder = checkpoint.absolute().parent
    in_run = folder.name == EXPORT_FOLDER and (folder.parent / CONFIG_NAME).is_file()
    return ExportedModel(
        model.eval().requires_grad_(False), stored, folder.parent if in_run else None
    )


# --- folders --------------------------------------------------------------------------------------


def write_folder(
    out: Path,
    exported: ExportedModel,
    *,
    hub: bool,
    source: str = model_card.FOLDER,
    licence: str | None = None,
) -> None:
    """Write a timm folder with a model card, and with a hubconf.py for torch.hub.

    ``source`` is the name by which timm loads the model, ``licence`` its identifier on the Hub.
    """
    stored = exported.stored
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=TEMPORARY_PREFIX) as temporary:
        folder = Path(temporary) / "folder"
        save_classifier(
            folder, exported.model, classes=stored["classes"], img_size=stored["img_size"]
        )
        history = model_card.history_of(exported.run)
        card = model_card.model_card(stored, history, source=source, licence=licence)
        write_atomic(folder / "README.md", card.encode())
        if hub:
            entry = re.sub(r"\W", "_", stored["architecture"])
            write_atomic(folder / "hubconf.py", _hubconf(stored["architecture"], entry).encode())
            console.info(f"torch.hub.load({str(out)!r}, {entry!r}, source='local')")
        folder.rename(out)


def _hubconf(architecture: str, entry: str) -> str:
    """Return the code of hubconf.py; timm knows the networks for CIFAR only from mealv2."""
    needed, packages, registering = "torch and timm", ["torch", "timm"], ""
    if architecture in cifar.NAMES:
        needed, packages = "torch, timm and mealv2", [*packages, "mealv2"]
        registering = f"\n    {model_card.REGISTERING}\n"
    dependencies = json.dumps(packages)
    return _HUBCONF.format(
        entry=entry, needed=needed, dependencies=dependencies, registering=registering
    )


# --- files ----------------------------------------------------------------------------------------


def _require_onnx() -> None:
    missing = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(f"--to onnx needs {' and '.join(missing)}: pip install 'mealv2[export]'")


def _onnx(exported: ExportedModel) -> tuple[bytes, float | None]:
    """Return the ONNX file, and its difference to the model if onnxruntime is installed."""
    weights = sum(t.numel() * t.element_size() for t in exported.model.state_dict().values())
    if weights > _MAX_ONNX_BYTES:
        raise ConfigError(
            f"{console.size_of(weights)} of weights do not fit into one ONNX file; use another --to"
        )
    import onnx

    program = torch.onnx.export(
        exported.model,
        (_images(exported, 2),),
        dynamo=True,
        input_names=["images"],
        output_names=["logits"],
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        verbose=False,
    )
    assert program is not None
    proto = program.model_proto
    _remove_local_paths(proto)
    proto.producer_name, proto.producer_version = "mealv2", mealv2.__version__
    onnx.helper.set_model_props(proto, _properties(exported))
    onnx.checker.check_model(proto)
    data: bytes = proto.SerializeToString()
    if importlib.util.find_spec("onnxruntime") is None:
        console.info("not compared with the checkpoint; pip install onnxruntime to compare")
        return data, None
    import onnxruntime

    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])

    def forward(images_BCHW: torch.Tensor) -> torch.Tensor:
        (logits,) = session.run(["logits"], {"images": images_BCHW.numpy()})
        return torch.from_numpy(logits)

    return data, _checked("onnx", exported, forward)


def _remove_local_paths(proto: Any) -> None:
    """Remove the stack traces that torch adds, which have paths of this machine."""
    graph = proto.graph
    noted = [proto, graph, *graph.node, *graph.input, *graph.output, *graph.value_info]
    for part in [*noted, *graph.initializer, *proto.functions]:
        del part.metadata_props[:]
        part.doc_string = ""


def _torchscript(exported: ExportedModel) -> tuple[bytes, float | None]:
    """Return the TorchScript file, traced, and its difference to the model."""
    buffer, extra = io.BytesIO(), {"mealv2.json": canonical_json(_properties(exported))}
    with warnings.catch_warnings():
        # torch no longer develops TorchScript, but keeps the loader
        warnings.filterwarnings("ignore", message=r".*torch\.jit\.\w+. is deprecated")
        # a vision transformer checks its input shape, which is fixed here
        warnings.filterwarnings("ignore", category=torch.jit.TracerWarning)  # type: ignore[attr-defined]
        traced = torch.jit.trace(exported.model, _images(exported, 2))  # type: ignore[no-untyped-call]
        torch.jit.save(traced, buffer, _extra_files=extra)
        data = _without_debug_records(buffer)
        loaded = torch.jit.load(io.BytesIO(data))  # type: ignore[no-untyped-call]
    return data, _checked("torchscript", exported, loaded)


def _without_debug_records(archive: io.BytesIO) -> bytes:
    """Return a TorchScript archive without source lines, which have paths of this machine."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(archive) as old, zipfile.ZipFile(buffer, "w") as new:
        for entry in old.infolist():
            if not entry.filename.endswith(".debug_pkl"):
                new.writestr(zipfile.ZipInfo(entry.filename), old.read(entry))
    return buffer.getvalue()


def _properties(exported: ExportedModel) -> dict[str, str]:
    """Return the metadata of a file, each value as JSON."""
    stored = exported.stored
    values = {name: stored[name] for name in ("architecture", "classes", "img_size", "mean", "std")}
    return {name: json.dumps(v) for name, v in values.items()} | {"mealv2": mealv2.__version__}


def _images(exported: ExportedModel, num_images: int) -> torch.Tensor:
    size = exported.stored["img_size"]
    generator = torch.Generator().manual_seed(num_images)
    return torch.rand(num_images, 3, size, size, generator=generator)


def _checked(
    kind: str, exported: ExportedModel, forward: Callable[[torch.Tensor], torch.Tensor]
) -> float:
    """Return the largest difference to the model's logits, relative to the largest logit.

    Raises MealError above the tolerance.
    """
    largest = 0.0
    for num_images in (1, 3):  # traced with 2
        images_BCHW = _images(exported, num_images)
        expected, found = exported.model(images_BCHW), forward(images_BCHW)
        scale = max(float(expected.abs().max()), torch.finfo(torch.float32).tiny)
        largest = max(largest, float((found - expected).abs().max()) / scale)
    if not largest <= TOLERANCES[kind]:  # also for NaN
        raise MealError(
            f"the logits of the {kind} file differ from those of the checkpoint by {largest:.2g} "
            f"of the largest logit, allowed {TOLERANCES[kind]:.0g}; not written"
        )
    return largest
