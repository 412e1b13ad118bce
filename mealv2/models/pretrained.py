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
import timm
import torch.hub

from mealv2.errors import RemoteError
from mealv2.models.released import find
from mealv2.storage.hub_cache import hub_offline
from mealv2.storage.reachable import unreachable
from mealv2.storage.urls import file_name

_HUB_FILES = ("model.safetensors", "pytorch_model.bin")  # timm: in this order


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


def cached_file(name: str) -> Path | None:
    """Return the pretrained weights of timm's or a released model from the caches here.

    None without them, and for any other name. Asks no server.
    """
    if (released := find(name)) is not None:
        return _if_file(_cached_path(released.url))
    try:
        config = timm.get_pretrained_cfg(name)
    except RuntimeError:  # no tag of this model
        return None
    if config is None:
        return None
    if config.hf_hub_id:
        repository, _, revision = config.hf_hub_id.partition("@")
        for file in (config.hf_hub_filename, *_HUB_FILES):
            found = file and huggingface_hub.try_to_load_from_cache(
                repository, file, revision=revision or None
            )
            if isinstance(found, str):
                return Path(found)
    return _if_file(_cached_path(config.url)) if isinstance(config.url, str) else None


# the same hub has the weights of several teachers
_unreachable = lru_cache(unreachable)


def _is_cached(url: str) -> bool:
    return _cached_path(url).is_file()


def _if_file(path: Path) -> Path | None:
    return path if path.is_file() else None


def _cached_path(url: str) -> Path:
    return Path(torch.hub.get_dir()) / "checkpoints" / file_name(url)
