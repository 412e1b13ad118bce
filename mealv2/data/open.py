"""Open a split of a data set: class folders, a table or tar files, local or behind a URL."""

from pathlib import Path

from mealv2.data import hf_sets, torch_sets
from mealv2.data.extra import UnlabelledFolder
from mealv2.data.folder import ImageFolder, is_flat
from mealv2.data.held_out import HeldOut
from mealv2.data.hf_name import hf_name
from mealv2.data.image_table import ImageTable, check_splits, is_table
from mealv2.data.layout_name import layout_name
from mealv2.data.layouts import open_layout
from mealv2.data.own_source import own_source
from mealv2.data.remote_tar import RemoteShards, RemoteTar
from mealv2.data.source import ClassNames, ImageSource
from mealv2.data.tar import TarShards
from mealv2.data.tar_splits import find_split, require_no_split
from mealv2.data.torch_name import torch_name
from mealv2.errors import ConfigError
from mealv2.storage import object_store
from mealv2.storage.cache import Cache
from mealv2.storage.urls import Location, is_url, shown


def open_source(
    data_dir: Location,
    split: str,
    *,
    cache: Cache | None = None,
    held_out: HeldOut | None = None,
    names: ClassNames | None = None,
) -> ImageSource:
    """Open a split of a data set: an ImageFolder tree, a table of images, tar files, a data set of
    torchvision (``torch/NAME:FOLDER``) or Hugging Face (``hfds/NAME``), one in a published layout
    (``voc2007:FOLDER``, ``cub200:``, ``birdsnap:``, ``list:``), or what a function returns
    (``package.module:function``).

    The split ``train`` of a folder of class folders is the folder itself. With ``held_out``, two
    splits are the parts of one. With ``names``, which returns their class names, a folder of
    pictures without class folders is the split ``train``, unlabelled, and so are tar files without
    class ids. A URL needs a ``cache`` for copies of its tar files. Raises ConfigError for a missing
    split, DataError for a damaged tar file, RemoteError.
    """
    if not is_url(data_dir):
        data_dir = Path(data_dir)
        if names is not None and split == "train" and is_flat(data_dir):
            return UnlabelledFolder(data_dir, classes=names())
    if held_out is None or not held_out.is_of(split):
        return _open(data_dir, split, cache, names)
    if split != held_out.of:
        if isinstance(data_dir, Path) and (named := torch_name(data_dir)):
            named.check([held_out.of], made=split)
        elif isinstance(data_dir, Path) and (on_hub := hf_name(data_dir)):
            hf_sets.require_no_split(on_hub, split)
        elif isinstance(data_dir, Path) and (layout := layout_name(data_dir)):
            layout.check([held_out.of], made=split)
        elif isinstance(data_dir, Path) and own_source(data_dir):
            pass  # nothing lists its splits
        elif isinstance(data_dir, Path) and is_table(data_dir):
            check_splits(data_dir, (), made=split)
        else:
            require_no_split(data_dir, split, store=object_store)
    return held_out.part(_open(data_dir, held_out.of, cache), split)


def download(data_dir: Location) -> None:
    """Download a data set of torchvision or Hugging Face that is missing on this machine.

    Raises ConfigError for any other data set, RemoteError.
    """
    if isinstance(data_dir, Path) and (named := torch_name(data_dir)):
        torch_sets.download(named)
    elif isinstance(data_dir, Path) and (on_hub := hf_name(data_dir)):
        hf_sets.download(on_hub)
    else:
        raise ConfigError(f"--download is for torch/NAME:FOLDER and hfds/NAME, not {data_dir}")


def _open(
    data_dir: Location, split: str, cache: Cache | None, names: ClassNames | None = None
) -> ImageSource:
    if isinstance(data_dir, Path) and (named := torch_name(data_dir)):
        return torch_sets.TorchSet(named, split)
    if isinstance(data_dir, Path) and (on_hub := hf_name(data_dir)):
        return hf_sets.HfSet(on_hub, split)
    if isinstance(data_dir, Path) and (layout := layout_name(data_dir)):
        return open_layout(layout, split)
    if isinstance(data_dir, Path) and (own := own_source(data_dir)):
        return own.open(split)
    if isinstance(data_dir, Path) and is_table(data_dir):
        return ImageTable(data_dir, split)
    found = find_split(data_dir, split, store=object_store)
    if isinstance(data_dir, Path):
        if found is None:
            return ImageFolder(data_dir, split)
        paths = [Path(tar) for tar in found.tars]
        return TarShards(paths, name=found.name, split=split, classes=found.classes, names=names)
    if found is None:
        raise ConfigError(f"{shown(data_dir)} has no tar files of the split {split}")
    assert cache is not None, "remote files need a cache"
    tars = [RemoteTar(str(tar), cache) for tar in found.tars]
    return RemoteShards(
        tars, cache, name=found.name, split=split, classes=found.classes, names=names
    )
