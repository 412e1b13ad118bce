"""The name of a data set of Hugging Face as a path: ``hfds/NAME``. Nothing slow is imported."""

import importlib.util
import re
from pathlib import Path
from typing import NamedTuple

from mealv2.errors import ConfigError

BUILDERS = ("imagefolder", "parquet", "disk")  # of local folders; disk: of save_to_disk
OPTIONS = ("config", "image", "label")
_NAMED = re.compile(r"(?:(?P<base>.*?)/)?hfds/(?P<name>[^/].*)")
_ON_HUB = re.compile(r"[\w.-]+(/[\w.-]+)?")


class HfName(NamedTuple):
    """A data set of the Hub, or a builder and its folder; names of its configuration and columns.

    A column that is not named is the only one with images, or with class labels.
    """

    name: str
    folder: Path | None = None
    config: str | None = None
    image: str | None = None
    label: str | None = None

    def __str__(self) -> str:
        return f"hfds/{self.name}" + (f":{self.folder}" if self.folder else "")

    def check(self) -> None:
        """Raise ConfigError for a malformed name, a missing folder, or without the package."""
        if self.folder is None and not _ON_HUB.fullmatch(self.name):
            known = ", ".join(f"{builder}:FOLDER" for builder in BUILDERS)
            raise ConfigError(f"{self} is not USER/NAME of the Hugging Face Hub, or {known}")
        if self.folder is not None and not self.folder.is_dir():
            raise ConfigError(f"{self}: there is no such folder")
        if importlib.util.find_spec("datasets") is None:
            raise ConfigError(f"{self} needs another package: pip install 'mealv2[hfds]'")


def hf_name(path: Path) -> HfName | None:
    """Return the data set that a path names, None for any other path, or one that exists.

    The name may end in ``,config=…``, ``,image=…`` and ``,label=…``. A relative FOLDER is relative
    to the folder that ``hfds/`` is in, so that the absolute path of a setting means the same.
    """
    found = _NAMED.fullmatch(path.as_posix())
    if found is None or path.exists():
        return None
    name, *options = re.split(rf",(?=(?:{'|'.join(OPTIONS)})=)", found["name"])
    settings = dict(option.split("=", 1) for option in options)
    builder, colon, folder = name.partition(":")
    if colon and builder in BUILDERS:
        return HfName(builder, Path(found["base"] or "") / folder, **settings)
    return HfName(name, None, **settings)
