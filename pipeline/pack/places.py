"""Which splits are packed, and into which folder."""

from collections.abc import Iterator
from pathlib import Path

from mealv2.errors import ConfigError
from mealv2.files import TEMPORARY_PREFIX
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


def refuse_overlap(data_dir: Path, out: Path) -> None:
    """Raise ConfigError where one of two folders is in the other."""
    data, packed = data_dir.resolve(), out.resolve()
    if packed.is_relative_to(data) or data.is_relative_to(packed):
        raise ConfigError(
            f"--output {out} and --data-dir {data_dir} lie in one another; give another folder"
        )


def refuse_file(out: Path) -> None:
    """Raise ConfigError where --output is no folder and cannot become one."""
    if out.exists() and not out.is_dir():
        raise ConfigError(f"--output {out} is a file; give a folder")


def strange(folder: Path) -> Iterator[Path]:
    """Yield what is in a folder but for what killed runs leave behind."""
    if folder.is_dir():
        paths = (p for p in sorted(folder.iterdir()) if not p.name.startswith(TEMPORARY_PREFIX))
        yield from paths


def _has_tars(folder: Path) -> bool:
    return any(folder.glob("*.tar")) or any(folder.glob("*/*.tar"))


def _folders(folder: Path) -> Iterator[Path]:
    return (path for path in folder.iterdir() if path.is_dir() and path.name[0] != ".")
