"""What packing a tree and packing tar files share: splits, the output folder, reading ahead."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from mealv2.data.pack_index import Pack
from mealv2.data.source import ImageSource
from mealv2.errors import ConfigError, DataError
from mealv2.storage.atomic import list_folder, write_atomic
from pipeline.config import PackConfig

T = TypeVar("T")
R = TypeVar("R")


def splits_of(config: PackConfig) -> list[str]:
    """Return the splits to pack; raises ConfigError if there is none."""
    if config.split:
        return list(dict.fromkeys(config.split))
    if not config.data_dir.is_dir():
        raise ConfigError(f"no folder {config.data_dir}; give the data set as --data-dir")
    found = [folder.name for folder in _folders(config.data_dir) if _folders(folder)]
    if found:
        return found
    if any(config.data_dir.glob("*.tar")) or any(config.data_dir.glob("*/*.tar")):
        raise ConfigError(
            f"{config.data_dir} has tar files and no class folders: give the split to pack, for "
            "example --split train"
        )
    raise ConfigError(
        f"no folder in {config.data_dir} has class folders; "
        "--data-dir must contain ROOT/SPLIT/CLASS/IMAGE"
    )


def check_output(config: PackConfig, is_packed: Callable[[Path], bool]) -> None:
    """Raise ConfigError unless --output is separate from the data and each path in it is packed."""
    out, data_dir = config.output, config.data_dir
    if out.exists() and not out.is_dir():
        raise ConfigError(f"--output {out} is a file; give a folder")
    data, packed = data_dir.resolve(), out.resolve()
    if packed.is_relative_to(data) or data.is_relative_to(packed):
        raise ConfigError(
            f"--output {out} and --data-dir {data_dir} contain one another; give another folder"
        )
    for name in list_folder(out) if out.is_dir() else ():
        if not is_packed(out / name):
            raise ConfigError(
                f"--output {out} is not empty: {name} is not from `mealv2 pack`; give a new folder"
            )


def claim(path: Path, wanted: Pack, source: ImageSource) -> Pack:
    """Write the index of a new pack, or return the existing one, complete or not.

    Raises ConfigError for an existing pack of other images or with other settings.
    """
    found = Pack.read(path)
    if found is None:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, wanted.to_bytes())
        return wanted
    advice = "give a new folder as --output"
    if found.data_sha256 != wanted.data_sha256:
        raise ConfigError(
            f"{path.parent} holds other images than {source.name}, or an earlier version of them; "
            f"{advice}"
        )
    for name, value in wanted.settings.items():
        if (other := found.settings.get(name)) != value:
            if name == "stored_sha256":
                raise ConfigError(
                    f"{path.parent} holds the images of {source.name} from before or after "
                    f"`mealv2 pack` re-packed them; {advice}"
                )
            raise ConfigError(
                f"{path.parent} was packed with {name} {other}, which is {value} now; {advice}"
            )
    return found


def _folders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and path.name[0] != ".")


def read_image(source: ImageSource, position: int) -> bytes:
    """Return an encoded image; raises DataError if it cannot be read."""
    path = Path(source.name) / source.keys[position]
    try:
        return source.read(position)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}; replace it or remove it") from None


def changed_error(source: ImageSource) -> DataError:
    """Return the error for a source that no longer has the images it was opened with."""
    return DataError(f"{source.name} changed while it was packed; pack it into a new folder")


def other_picture(packed: Path, source: ImageSource, key: str) -> ConfigError:
    """Return the error for an image that is not the one that a pack was made of."""
    return ConfigError(
        f"{packed} was packed from another picture than {source.name}/{key} of now, of the same "
        "size; give a new folder as --output"
    )


def in_threads(work: Callable[[T], R], items: Iterable[T], *, workers: int) -> Iterator[R]:
    """Yield ``work(item)`` of each item, in order, a few items ahead of the reader.

    If an item raises or the reader stops, running calls finish and no other starts.
    """
    pool = ThreadPoolExecutor(workers)
    pending: deque[Future[R]] = deque()
    try:
        for item in items:
            pending.append(pool.submit(work, item))
            if len(pending) > 4 * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
