"""What transfers from every kind of remote share: retries after an interruption, error messages."""

import http
import time
from collections.abc import Callable
from typing import NamedTuple, TypeVar

from mealv2.errors import ConfigError, MealError, RemoteError
from mealv2.storage.urls import CREDENTIALS_VARIABLE, PIPE, shown

T = TypeVar("T")

MAX_ATTEMPTS = 4  # of an interrupted transfer without progress; clients add retries of their own
RETRY_DELAY_S = 0.5  # before the second attempt, doubled before each further one
_PROGRESS = 1 << 20  # bytes after which a continued transfer gets new attempts


class File(NamedTuple):
    """A remote file: its size (0 if unknown), and a stamp that changes when it is replaced."""

    size: int
    stamp: str


class TransferInterruptedError(Exception):
    """A transfer that ended too early; another attempt may succeed.

    ``kept`` is the number of bytes of this attempt that the next one need not transfer again.
    """

    def __init__(self, reason: str, *, kept: int = 0, source: str = "connection") -> None:
        super().__init__(reason)
        self.kept = kept
        self.source = source


def retry(url: str, action: Callable[[], T]) -> T:
    """Call ``action`` again after an interruption; raises RemoteError after the last attempt."""
    attempts = 0
    while True:
        attempts += 1
        try:
            return action()
        except TransferInterruptedError as error:
            if error.kept >= _PROGRESS:
                attempts = 1
            if attempts == MAX_ATTEMPTS:
                source = "program" if url.startswith(PIPE) else error.source
                raise RemoteError(
                    f"cannot read {shown(url)}: {error}, {attempts} times; check the {source} and "
                    "run the same command again: it continues"
                ) from None
            time.sleep(RETRY_DELAY_S * 2 ** (attempts - 1))


def can_retry(status: int) -> bool:
    """Return whether a request with this HTTP status may succeed when it is repeated."""
    return status in (408, 429) or status >= 500


def status_error(url: str, status: int) -> MealError | TransferInterruptedError:
    """Return the error of a response: its status, and what to do."""
    name = status_text(status)
    if can_retry(status):
        return TransferInterruptedError(name, source="server")
    if status in (404, 410):
        return ConfigError(f"{shown(url)} does not exist ({name})")
    advice = "; check the URL"
    if status in (401, 403):
        advice = (
            ": the server denies access; check the password or signature in the URL, which may "
            f"have expired, or in {CREDENTIALS_VARIABLE}"
        )
    return RemoteError(f"cannot read {shown(url)}: {name}{advice}")


def status_text(status: int) -> str:
    """Return an HTTP status with its name: 403 Forbidden."""
    try:
        return f"{status} {http.HTTPStatus(status).phrase}"
    except ValueError:
        return f"HTTP status {status}"


def reason(error: BaseException) -> str:
    """Return the first line of an error, or its class name if the line may contain secrets."""
    text = str(error).strip().split("\n")[0]
    # some errors quote the request: signed URLs, keys
    return text if text and len(text) < 120 and "://" not in text else type(error).__name__
