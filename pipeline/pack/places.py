"""Which splits are packed, and into which folder."""

from collections.abc import Callable, Iterator
from pathlib import Path

from mealv2.data.jpeg_pack import Pack
from mealv2.data.source import ImageSource
from mealv2.errors import ConfigError
from mealv2.storage.atomic import TEMPORARY_PREFIX, write_atomic
from pipeline.config import PackConfig


def splits_of(config: PackConfig) -> list[str]:
    """Return the splits to pack; raises ConfigError where there is none."""
    if config.split:
        return list(dict.fromkeys(config.split))
    if not config.data_dir.is_dir():
        raise ConfigError(f"no folder {config.data_dir}; give the data set as --data-dir")
    folders = sorted(_folders(config.data_dir))
    found = [folder.name for folder in folders if any(_folders(folder))]
    if not found and _has_tars(config.data_dir):
        raise ConfigError(
            f"{config.data_dir} holds tar files and no class folders: say which split of them to "
            "pack, --split train"
        )
    if not found:
        raise ConfigError(
            f"no folder in {config.data_dir} has class folders; "
            "--data-dir must hold ROOT/SPLIT/CLASS/IMAGE"
        )
    return found


def check_out(config: PackConfig, is_ours: Callable[[Path], bool]) -> None:
    """Raise ConfigError where --output cannot be the folder of a pack.

    It must be a folder that neither lies in the data nor has it inside, and whose files and folders
    ``is_ours`` accepts.
    """
    out, data_dir = config.output, config.data_dir
    if out.exists() and not out.is_dir():
        raise ConfigError(f"--output {out} is a file; give a folder")
    data, packed = data_dir.resolve(), out.resolve()
    if packed.is_relative_to(data) or data.is_relative_to(packed):
        raise ConfigError(
            f"--output {out} and --data-dir {data_dir} lie in one another; give another folder"
        )
    for path in foreign_files(out):
        if not is_ours(path):
            raise ConfigError(
                f"--output {out} is not empty, and {path.name} is not packed; give a new folder"
            )


def claim(path: Path, wanted: Pack, source: ImageSource) -> Pack:
    """Write the index of a pack that begins, or return the one that is there, finished or not.

    Raises ConfigError where that is of other images or has other settings.
    """
    found = Pack.read(path)
    if found is None:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, wanted.to_bytes())
        return wanted
    if found.data_sha256 != wanted.data_sha256:
        raise ConfigError(
            f"{path.parent} holds other images than {source.name}, or what that was before it "
            "changed; give a new folder as --output"
        )
    for name, value in wanted.settings.items():
        if (other := found.settings.get(name)) != value:
            if name == "stored_sha256":
                raise ConfigError(
                    f"{path.parent} holds the images of {source.name} as they were before, or "
                    "after, `mealv2 pack` re-packed them; give a new folder as --output"
                )
            raise ConfigError(
                f"{path.parent} was packed with {name} {other}, which is {value} now; give a new "
                "folder as --output"
            )
    return found


def foreign_files(folder: Path) -> Iterator[Path]:
    """Yield what is in a folder but for what killed runs leave behind."""
    if folder.is_dir():
        paths = (p for p in sorted(folder.iterdir()) if not p.name.startswith(TEMPORARY_PREFIX))
        yield from paths


def _has_tars(folder: Path) -> bool:
    return any(folder.glob("*.tar")) or any(folder.glob("*/*.tar"))


def _folders(folder: Path) -> Iterator[Path]:
    return (path for path in folder.iterdir() if path.is_dir() and path.name[0] != ".")
