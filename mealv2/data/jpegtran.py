"""JPEGs into JPEGs with restart markers, by the program jpegtran: every pixel stays the same."""

import shutil
import subprocess
from dataclasses import dataclass
from io import BytesIO

import numpy as np
from PIL import Image

from mealv2.data.jpeg_restart import is_packed, mcus_per_row, with_index
from mealv2.data.pixels import decode
from mealv2.errors import ConfigError, DataError

AGAIN = "run the same command again to go on"

MCUS_PER_INTERVAL = 4  # about: more make views larger than they need be, fewer make files larger

# Why a file is a copy of the original.
NOT_A_JPEG = "not a JPEG"
UNREADABLE = "unreadable"
OTHER_KIND = "not 8-bit gray or 3 components"
REFUSED = "refused by jpegtran"
DIFFERENT = "pixels would differ"


@dataclass(frozen=True)
class Jpegtran:
    """The program that moves a JPEG's coefficients into another JPEG, and its version."""

    path: str
    version: str

    @classmethod
    def find(cls) -> "Jpegtran":
        """Look for it; raises ConfigError where there is none, or one that does something else."""
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
        """Return a JPEG with a restart marker every ``interval`` MCUs; None where it refuses.

        It is baseline, with the Huffman tables that fit it best. Raises DataError where the
        program was killed.
        """
        command = [self.path, "-copy", "all", "-optimize", "-restart", f"{interval}B"]
        # a group of its own: Ctrl-C is for this process, which finishes what was begun
        done = subprocess.run(
            command, input=data, capture_output=True, check=False, process_group=0
        )
        if done.returncode < 0:
            raise DataError(f"jpegtran was killed by signal {-done.returncode}; {AGAIN}")
        return done.stdout if done.returncode in (0, 2) else None  # 2: there were warnings


def packed(data: bytes, program: Jpegtran) -> tuple[bytes, str | None]:
    """Return the packed file and None, or the same file and why it is not packed."""
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
    """Return the divisor of the MCUs of a row that is nearest to 4, the smaller one of two."""
    divisors = [number for number in range(1, per_row + 1) if per_row % number == 0]
    return min(divisors, key=lambda number: (abs(number - MCUS_PER_INTERVAL), number))


def decodes_to(data: bytes, pixels_HWC: np.ndarray) -> bool:
    """Return whether a file has the very pixels of an image."""
    try:
        return np.array_equal(decode(data), pixels_HWC)
    except DataError:
        return False
