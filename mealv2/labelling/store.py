"""Where a label set that is made is stored: in a folder."""

from pathlib import Path
from typing import Any

from mealv2 import label_set


class Store:
    """A label set in a local folder, where nothing needs to be fetched or uploaded.

    RemoteStore has the same methods for a set at a URL. ``location`` is its name in messages.
    """

    keeps_temporary_files = True

    def __init__(self, folder: Path) -> None:
        self.location = str(folder)
        self.folder = folder

    def claim(self, plan: dict[str, Any]) -> None:
        """Write the plan to the empty location; raises as label_set.claim if it has another."""
        label_set.claim(self.folder, plan)

    def fetch(self, name: str) -> None:
        """Update a file of ``folder`` from the location."""

    def refetch(self, name: str) -> bool:
        """Fetch a damaged file of ``folder`` again; return False if there is no other copy."""
        return False

    def fetch_all(self, *, require_complete: bool = False) -> None:
        """Update all files of ``folder`` from the location.

        With ``require_complete``, raises LabelSetError if a set at a URL has no manifest, or a file
        is not the one in the manifest.
        """

    def is_missing(self, name: str) -> bool:
        """Return whether a file of ``folder`` was not uploaded."""
        return False

    def upload(self, name: str, *, replace: bool = False, damaged: bool = False) -> bool:
        """Upload a file of ``folder``; return False if another one was uploaded first.

        That one then replaces the file in ``folder``. ``replace`` replaces every file at the
        location, ``damaged`` only the file that was last fetched, as far as the object store can
        compare.
        """
        return True
