"""Settings of `mealv2 pack`."""

from dataclasses import dataclass
from pathlib import Path

from mealv2.errors import ConfigError
from pipeline.config.base import Settings
from pipeline.config.fields import at_least, required, setting


@dataclass(frozen=True, kw_only=True)
class PackConfig(Settings):
    """Re-pack JPEGs without loss, so that a view is cut out before it is decoded.

    Every pixel stays the same, and label sets of DATA are label sets of OUT. Needs jpegtran.
    """

    data_dir: Path = required("Data set: ROOT/SPLIT/CLASS/IMAGE.")
    out: Path = required("Folder of the packed tree; made if missing, continued if unfinished.")
    split: tuple[str, ...] = setting(
        (), "Folder under --data-dir to pack; repeat it for several.", shown="all with classes"
    )
    workers: int = setting(4, "Images that are packed at the same time.")

    def __post_init__(self) -> None:
        at_least(self, 1, "workers")
        for name in self.split:
            if not name or Path(name).name != name or name[0] == ".":
                raise ConfigError(f"--split {name!r} must be the name of a folder under --data-dir")
