"""The files of a label set's repository on the Hub: its own, unchanged, and a card."""

from pathlib import Path
from typing import Any

from mealv2.errors import ConfigError, LabelSetError
from mealv2.label_set import (
    MANIFEST_NAME,
    PLAN_NAME,
    listed_shards,
    read_manifest,
    remaking_command,
)
from mealv2.label_set.shard import APPENDED_PREFIX
from mealv2.storage.atomic import write_atomic
from pipeline.config import PushConfig
from pipeline.push.label_set_card import CARD_NAME, card


def write(folder: Path, config: PushConfig) -> None:
    """Link the files of a finished set into a new folder, and write its card there.

    Appended rows are files of the set. Raises LabelSetError where it is not finished or a file is
    missing.
    """
    if config.space:
        raise ConfigError("--space is for models: a label set has no page that runs it")
    source = config.run.resolve()
    manifest = read_manifest(source)
    names = [PLAN_NAME, MANIFEST_NAME, *(s["name"] for s in listed_shards(manifest["roles"]))]
    names += sorted(p.name for p in source.glob(f"*-{APPENDED_PREFIX}*.h5"))
    folder.mkdir()
    for name in names:
        if not (source / name).is_file():
            command = remaking_command(manifest["plan"], name)
            again = f"run the same {command} again to make it"
            raise LabelSetError(f"{source / name} is missing; {again}")
        (folder / name).symlink_to(source / name)
    text = card(source, manifest, config.repo_id, config.license)
    write_atomic(folder / CARD_NAME, text.encode())


def check(files: dict[str, dict[str, Any]], source: Path) -> None:
    """Raise LabelSetError for a listed file that is not the one in the set's manifest."""
    manifest = read_manifest(source)
    for shard in listed_shards(manifest["roles"]):
        if files[f"dataset/{shard['name']}"]["sha256"] != shard["sha256"]:
            command = remaking_command(manifest["plan"], shard["name"])
            again = f"run the same {command} again to replace it"
            raise LabelSetError(
                f"{source / shard['name']} is damaged: its SHA-256 is not the one in the manifest; "
                f"{again}. Nothing was uploaded"
            )


def linked(folder: str, names: list[str]) -> list[str]:
    """Return the names of links: the files that a set has already (shutil's ``ignore``)."""
    return [name for name in names if (Path(folder) / name).is_symlink()]
