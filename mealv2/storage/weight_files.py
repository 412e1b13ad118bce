"""Find the weights file of a checkpoint and recognise what it is, without importing torch."""

import re
import zipfile
from pathlib import Path

from mealv2.errors import ConfigError

WEIGHTS_NAME = "model.safetensors"
EXPORT_FOLDER = "student"  # in a run folder: the trained model
SAFETENSORS, TORCH = "safetensors", "torch"

_HEAD_BYTES = 1024
_MAX_HEADER_BYTES = 100_000_000  # safetensors: the limit of its own reader
# What people save as weights by mistake, by the first bytes.
_OTHER_CONTENT = (
    (
        rb"version https://git-lfs\.github\.com/spec/",
        "a Git LFS pointer, not the weights; fetch them with `git lfs pull`",
    ),
    (
        rb"\s*(?i:<!doctype html|<html|<head|<\?xml)",
        "a web page, not weights; download the file itself (a link to its raw content)",
    ),
    (rb"\s*[{\[]", "JSON text, not weights"),
    (rb"\x89HDF\r\n\x1a\n", "an HDF5 file (Keras?), not weights of torch"),
    (rb"GGUF", "a GGUF file, not weights of torch"),
    (rb"\x93NUMPY", "a NumPy array, not weights of torch"),
    (rb"\x1f\x8b|BZh|\xfd7zXZ\x00|\x28\xb5\x2f\xfd|7z\xbc\xaf", "compressed; unpack it first"),
)


def find_checkpoint(path: Path) -> Path:
    """Return the weights file at a path: the file itself, or that of a run or model folder."""
    candidates = (
        [path / EXPORT_FOLDER / WEIGHTS_NAME, path / WEIGHTS_NAME] if path.is_dir() else [path]
    )
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    looked = " or ".join(str(candidate) for candidate in candidates)
    raise ConfigError(f"no checkpoint at {path} (looked for {looked})")


def weights_format(path: Path) -> str:
    """Return how a weights file is written, by its content: SAFETENSORS or TORCH.

    Raises ConfigError for an empty file and for content that is known to be something else, OSError
    if it cannot be read. Damage inside a file is found when it is loaded.
    """
    with path.open("rb") as file:
        head = file.read(_HEAD_BYTES)
    size = path.stat().st_size
    header_size = int.from_bytes(head[:8], "little")
    is_header = len(head) > 8 and head[8:9] == b"{" and header_size <= _MAX_HEADER_BYTES
    if is_header and 8 + header_size <= size:
        return SAFETENSORS
    if not head:
        raise ConfigError(f"cannot read checkpoint {path}: it is empty; copy or download it again")
    for pattern, what in _OTHER_CONTENT:
        if re.match(pattern, head):
            raise ConfigError(f"cannot read checkpoint {path}: it is {what}")
    if head.startswith(b"PK\x03\x04"):
        _check_zip(path)
    return TORCH


def _check_zip(path: Path) -> None:
    """Raise ConfigError for a complete zip archive that torch.save did not write."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        return  # torn: torch.load reports it
    if any(name.endswith("/constants.pkl") for name in names):
        raise ConfigError(
            f"cannot read checkpoint {path}: it is a TorchScript model; save its state_dict"
        )
    if not any(name.endswith("data.pkl") for name in names):
        raise ConfigError(
            f"cannot read checkpoint {path}: it is a zip archive that torch.save did not write "
            f"(first: {names[0] if names else 'no file'}); unpack it first"
        )
