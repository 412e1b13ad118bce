"""Add restart markers to JPEGs with the program jpegtran, without changing a pixel."""

import shutil
import subprocess
from dataclasses import dataclass
from io import BytesIO

import numpy as np
from PIL import Image

from mealv2.data.jpeg_restart import is_packed, mcus_per_row, with_index
from mealv2.data.pixels import decode
from mealv2.errors import ConfigError, DataError

_MCUS_PER_INTERVAL = 4  # about; more decode more pixels than a view needs, fewer make files larger

# Reasons why a file is a copy of the original.
NOT_A_JPEG = "not a JPEG"
UNREADABLE = "unreadable"
OTHER_KIND = "not 8-bit gray or 3 components"
REFUSED = "refused by jpegtran"
DIFFERENT = "pixels would differ"


@dataclass(frozen=True)
class Jpegtran:
    """The program that copies a JPEG's coefficients into another JPEG, and its version."""

    path: str
    version: str

    @classmethod
    def find(cls) -> "Jpegtran":
        """Find the program; raises ConfigError if it is missing or writes no restart markers."""
        path = shutil.which("jpegtran")
        if path is None:
            raise ConfigError(
                "mealv2 pack needs the program jpegtran: install libjpeg-turbo-progs (Debian, "
                "Ubuntu), libjpeg-turbo-utils (Fedora) or jpeg-turbo (Homebrew)"
            )
        output = subprocess.run([path, "-version"], input=b"", capture_output=True, check=False)
        lines = (output.stderr + output.stdout).decode(errors="replace").strip().splitlines()
        program = cls(path, lines[0].strip() if lines else "unknown")
        sample = BytesIO()
        Image.new("RGB", (64, 16)).save(sample, "JPEG")
        if packed(sample.getvalue(), program)[1] is not None:
            raise ConfigError(
                f"{path} ({program.version}) does not put restart markers into a JPEG; "
                "install libjpeg-turbo's"
            )
        return program

    def restarted(self, data: bytes, interval: int) -> bytes | None:
        """Return a baseline JPEG with a restart marker every ``interval`` MCUs; None on failure.

        Huffman tables are optimised. Raises DataError if the program was killed.
        """
        command = [self.path, "-copy", "all", "-optimize", "-restart", f"{interval}B"]
        # its own process group: Ctrl-C reaches this process only, which finishes the image
        done = subprocess.run(
            command, input=data, capture_output=True, check=False, process_group=0
        )
        if done.returncode < 0:
            raise DataError(
                f"jpegtran was killed by signal {-done.returncode}; run the same "
                "command again to continue"
            )
        return done.stdout if done.returncode in (0, 2) else None  # 2: there were warnings


def packed(data: bytes, program: Jpegtran) -> tuple[bytes, str | None]:
    """Return the packed file and None, or the same file and the reason why it is not packed."""
    try:
        pixels_HWC = decode(data)
    except DataError:
        return data, UNREADABLE
    if not data.startswith(b"\xff\xd8"):
        return data, NOT_A_JPEG
    per_row = mcus_per_row(data)
    if per_row is None:
        return data, OTHER_KIND
    restarted = program.restarted(data, interval_of(per_row))
    if restarted is None or not is_packed(restarted):
        return data, REFUSED
    restarted = with_index(restarted)
    return (restarted, None) if decodes_to(restarted, pixels_HWC) else (data, DIFFERENT)


def interval_of(per_row: int) -> int:
    """Return the divisor of the MCUs of a row that is nearest to 4, the smaller of two."""
    divisors = [number for number in range(1, per_row + 1) if per_row % number == 0]
    return min(divisors, key=lambda number: (abs(number - _MCUS_PER_INTERVAL), number))


def decodes_to(data: bytes, pixels_HWC: np.ndarray) -> bool:
    """Return whether a file decodes to exactly these pixels."""
    try:
        return np.array_equal(decode(data), pixels_HWC)
    except DataError:
        return False
