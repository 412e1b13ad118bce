"""Find the images below folders: links are followed, and what is left out is counted."""

import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from mealv2.data.image_files import HEAD_SIZE, format_of, kind_of_name, reason_of_name
from mealv2.data.left_out import LeftOut
from mealv2.errors import ConfigError


class FoundImage(NamedTuple):
    """An image file and its size; 0 bytes for a link to nothing, which ``read`` raises for."""

    path: Path
    num_bytes: int


class _Folder(NamedTuple):
    """A folder to list, its real path, and the real paths of the folders with links to it."""

    path: str
    real: str
    links: tuple[str, ...] = ()
    is_second: bool = False  # it, or a folder above, is also listed under another path


class Walk:
    """Lists the images below the folders of a split.

    A regular file, also behind a link, is an image if it has an image's extension, and if it has an
    unknown extension but an image's first bytes. Hidden names are left out. ``root`` is the folder
    that names in messages are relative to.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._real_root = os.path.realpath(root)
        self._left_out = LeftOut()
        self._listed: dict[str, str] = {}  # by real path
        self._dangling: list[str] = []

    def images(self, folder: Path) -> Iterator[FoundImage]:
        """Yield the images below a folder, which is ``root`` or in it, unsorted.

        Raises ConfigError for a link to a folder that contains it, OSError for a folder that cannot
        be listed.
        """
        if folder == self._root:
            first = self._entered(_Folder(str(folder), self._real_root))
        else:
            above = _Folder(str(self._root), self._real_root)
            first = self._below(above, str(folder), folder.name, is_link=folder.is_symlink())
        waiting = [first]
        while waiting:
            above = waiting.pop()
            for entry in _listing(above.path):
                if entry.name[0] == ".":
                    self._leave_out(entry.path, "hidden")
                    continue
                status = _status(entry)
                if status is not None and stat.S_ISDIR(status.st_mode):
                    is_link = entry.is_symlink()
                    waiting.append(self._below(above, entry.path, entry.name, is_link=is_link))
                elif (num_bytes := self._size_of_image(entry, status)) is not None:
                    yield FoundImage(Path(entry.path), num_bytes)

    def count_outside(self, expected: str) -> None:
        """Count what lies directly in ``root``, but not folders and the file ``expected``."""
        for entry in _listing(str(self._root)):
            if entry.name[0] == ".":
                self._leave_out(entry.path, "hidden")
            elif entry.name != expected and not entry.is_dir():
                self._leave_out(entry.path, "outside a class folder")

    def left_out(self) -> LeftOut:
        """Return what was left out so far, with remarks on links."""
        remarks = list(self._left_out.remarks)
        if self._dangling:
            number, first = len(self._dangling), self._dangling[0]
            remarks.append(f"links to nothing among the images: {number} ({first})")
        return LeftOut(self._left_out.counts, self._left_out.examples, remarks)

    def _below(self, above: _Folder, path: str, name: str, *, is_link: bool) -> _Folder:
        """Return a folder in another one."""
        if not is_link:
            real = f"{above.real.rstrip('/')}/{name}"
            return self._entered(_Folder(path, real, above.links, above.is_second))
        real, links = os.path.realpath(path), (*above.links, above.real)
        if any(f"{inside}/".startswith(f"{real.rstrip('/')}/") for inside in links):
            raise ConfigError(
                f"{path} is a link to {real}, a folder that contains it; remove the link"
            )
        return self._entered(_Folder(path, real, links, above.is_second))

    def _entered(self, folder: _Folder) -> _Folder:
        """Record a folder; one that was recorded under another path gets a remark."""
        first = self._listed.setdefault(folder.real, folder.path)
        if first == folder.path or folder.is_second:
            return folder
        one, two = self._relative(folder.path), self._relative(first)
        self._left_out.remarks.append(f"{one} is the same folder as {two}: its images count twice")
        return folder._replace(is_second=True)

    def _size_of_image(
        self, entry: "os.DirEntry[str]", status: os.stat_result | None
    ) -> int | None:
        """Return the size of an image, None for anything else, which it counts."""
        is_image = kind_of_name(entry.name)
        if status is None:
            if is_image:
                self._dangling.append(self._relative(entry.path))
                return 0
            reason = "a link to nothing" if entry.is_symlink() else "unreadable"
        elif not stat.S_ISREG(status.st_mode):
            reason = "not a file"
        elif is_image:
            return status.st_size
        else:
            reason = reason_of_name(entry.name)
            if is_image is None:
                try:
                    if format_of(_head(entry.path)) is not None:
                        return status.st_size
                except OSError:
                    reason = "unreadable"
        self._leave_out(entry.path, reason)
        return None

    def _leave_out(self, path: str, reason: str) -> None:
        self._left_out.add(self._relative(path), reason)

    def _relative(self, path: str) -> str:
        return os.path.relpath(path, self._root)


def _listing(path: str) -> list["os.DirEntry[str]"]:
    with os.scandir(path) as entries:
        return sorted(entries, key=lambda entry: entry.name)


def _status(entry: "os.DirEntry[str]") -> os.stat_result | None:
    """Return the status of what an entry leads to, None if that is nothing."""
    try:
        return entry.stat()
    except OSError:
        return None


def _head(path: str) -> bytes:
    # a file that a pipe replaced meanwhile must not block
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        return os.read(descriptor, HEAD_SIZE)
    finally:
        os.close(descriptor)
