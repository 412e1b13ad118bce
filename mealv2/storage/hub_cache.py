"""The local cache of the Hugging Face Hub."""

import contextlib
from collections.abc import Iterator

import huggingface_hub


@contextlib.contextmanager
def hub_offline() -> Iterator[None]:
    """Make huggingface_hub use its cache only, as HF_HUB_OFFLINE does."""
    before = huggingface_hub.constants.HF_HUB_OFFLINE
    huggingface_hub.constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        huggingface_hub.constants.HF_HUB_OFFLINE = before
