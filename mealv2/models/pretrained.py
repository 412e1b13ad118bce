"""Where timm finds pretrained weights: its cache at once if the server cannot be reached.

Without this, huggingface_hub asks a hub that does not answer for minutes, also for weights in its
cache, and a download from a URL has no time limit.
"""

import contextlib
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import huggingface_hub
import torch.hub

from mealv2.errors import RemoteError
from mealv2.storage.hub_cache import hub_offline
from mealv2.storage.reachable import unreachable
from mealv2.storage.urls import file_name


@contextlib.contextmanager
def weights_in_reach(config: Mapping[str, Any]) -> Iterator[None]:
    """Let timm load the weights of a pretrained config in the block.

    Raises RemoteError if they are in no cache and their server cannot be reached.
    """
    url, failure = config.get("url"), None
    if config.get("hf_hub_id"):
        if not huggingface_hub.constants.HF_HUB_OFFLINE:
            failure = _unreachable(huggingface_hub.constants.ENDPOINT)
    elif url and not _is_cached(url):
        failure = _unreachable(url)
        if failure:
            raise RemoteError(f"{failure}, and the cache has no copy")
    try:
        with hub_offline() if failure else contextlib.nullcontext():
            yield
    except Exception:
        if failure is None:
            raise
        raise RemoteError(f"{failure}, and the cache has no copy") from None


# the same hub has the weights of several teachers
_unreachable = lru_cache(unreachable)


def _is_cached(url: str) -> bool:
    return (Path(torch.hub.get_dir()) / "checkpoints" / file_name(url)).is_file()
