"""Upload a trained model or a label set to the Hugging Face Hub, in one commit each.

A model has the files of `mealv2 export --to timm`, and a Gradio Space if asked for; a label set has
its own files. Both have a card.
"""

import shutil
import tempfile
from pathlib import Path
from typing import Any

from mealv2.errors import ConfigError
from mealv2.label_set import is_label_set
from mealv2.models import cifar, read_metadata
from mealv2.models.factory import is_factory
from mealv2.storage.atomic import file_sha256, write_atomic
from mealv2.storage.weight_files import find_checkpoint
from pipeline import console, export
from pipeline.config import PushConfig
from pipeline.push import hub, label_set_files, space


def run(config: PushConfig) -> dict[str, Any]:
    """Upload and return the report. Raises MealError and OSError."""
    if config.dry_run:
        out = config.output or _default_out(config)
        export.check_out(out, as_file=False)
        out.parent.mkdir(parents=True, exist_ok=True)
    else:
        token = hub.user_token()
    with tempfile.TemporaryDirectory(prefix="mealv2-push-") as temporary:
        folder = Path(temporary) / "push"
        folder.mkdir()
        is_set = is_label_set(config.run)
        if is_set:
            label_set_files.write(folder / "dataset", config)
        else:
            _write_model(folder, config)
        files = _listed(folder)
        if is_set:
            label_set_files.check(files, config.run)
        report = {"repo": config.repo_id, "private": config.private, "files": files}
        if config.dry_run:
            # a label set is a folder already: only what is added to it is written
            ignored = label_set_files.linked if is_set else None
            shutil.copytree(folder, out, dirs_exist_ok=True, ignore=ignored)
            console.info(f"wrote {out}; nothing was uploaded")
            return report | {"dry_run": True, "path": str(out)}
        return report | _upload(folder, config, token)


def _default_out(config: PushConfig) -> Path:
    if is_label_set(config.run):
        labels = config.run.resolve()
        return labels.with_name(f"{labels.name}-push")
    folder = config.run if config.run.is_dir() else config.run.parent
    return folder / "export" / "push"


def _write_model(folder: Path, config: PushConfig) -> None:
    """Write the files of the model's repository, and of its Space, into a folder of its own."""
    architecture = read_metadata(find_checkpoint(config.run)).get("architecture")
    if architecture and is_factory(architecture):
        raise ConfigError(
            f"{config.run} is a model of your own code, {architecture}, which no other can build; "
            "upload what `mealv2 export --to onnx` or `--to torchscript` writes"
        )
    if config.space and architecture in cifar.NAMES:
        raise ConfigError(
            f"--space: the Space installs timm, which cannot build {architecture} without mealv2; "
            "push the model without --space"
        )
    exported = export.load(config.run)
    source = f"hf-hub:{config.repo_id}"
    export.write_folder(
        folder / "model", exported, hub=False, source=source, licence=config.license
    )
    if config.space:
        (folder / "space").mkdir()
        for name, data in space.files(config.repo_id, config.license).items():
            write_atomic(folder / "space" / name, data)


def _listed(folder: Path) -> dict[str, dict[str, Any]]:
    """Return size and SHA-256 of each file, and print the sizes."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    names = [path.relative_to(folder).as_posix() for path in paths]
    sizes = [path.stat().st_size for path in paths]
    rows = [[name, console.size_of(size)] for name, size in zip(names, sizes, strict=True)]
    console.info(console.table([["file", "size"], *rows]))
    return {
        name: {"bytes": size, "sha256": file_sha256(path)}
        for name, size, path in zip(names, sizes, paths, strict=True)
    }


def _upload(folder: Path, config: PushConfig, token: str) -> dict[str, Any]:
    """Upload each folder as one commit; return the addresses and commits by kind."""
    found = {
        path.name: hub.upload(path, config.repo_id, path.name, token, private=config.private)
        for path in sorted(folder.iterdir())
    }
    if config.space and config.private:
        console.info(
            "the Space reads a private model: add a token that may read it as the secret "
            f"HF_TOKEN in {found['space']['url']}/settings"
        )
    return found
