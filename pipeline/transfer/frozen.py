"""Decide whether the features of a frozen backbone are cached, and compute them."""

from collections.abc import Sequence
from functools import partial

from mealv2.data.requests import CENTRE
from mealv2.data.source import ImageSource
from mealv2.data.view_reader import ViewReader
from mealv2.models.frozen import FrozenClassifier
from mealv2.views import DrawnViews
from pipeline import console
from pipeline.config import TransferConfig
from pipeline.loading.cache import free_memory
from pipeline.runtime import env
from pipeline.runtime.device import Runtime
from pipeline.training.feature_files import feature_key, load_features, save_features
from pipeline.training.features import FeatureTable, compute_features, num_bytes

_PART = 2  # of the free memory, one over this


def cached_features(
    config: TransferConfig,
    model: FrozenClassifier,
    source: ImageSource,
    val: ImageSource | None,
    runtime: Runtime,
) -> tuple[FeatureTable | None, FeatureTable | None]:
    """Return the features of the training views and of the centre crops of ``val``.

    None for both with --cache-features off, or if they do not fit in memory. Raises DataError as
    ``compute_features``.
    """
    num_views = config.num_stored_views
    assert num_views is not None, "a frozen backbone has stored views"
    needed = num_bytes(len(source), num_views, model.head.in_features)
    needed += num_bytes(0 if val is None else len(val), 1, model.head.in_features)
    limit = free_memory() // _PART // env.ranks_on_this_machine()
    # all ranks decide alike, or some would wait for the others
    too_large = runtime.ranks.all_reduce_counts({"ranks": needed > limit})["ranks"] > 0
    if not config.caches_features or too_large:
        if config.caches_features:
            console.info(
                f"features of {num_views} views per image take {console.size_of(needed)}, more "
                f"than half of the free memory: the backbone runs in every epoch; fewer "
                "--num-views need less"
            )
        return None, None
    runtime.to_device(model)
    views = DrawnViews(config.view_seed, config.view_recipe)
    reader = partial(ViewReader, img_size=config.img_size, resize=config.resize)
    found = partial(_features, config, model, runtime)
    of_train = found(reader(source, views=views), range(num_views))
    return of_train, None if val is None else found(reader(val), (CENTRE,))


def _features(
    config: TransferConfig,
    model: FrozenClassifier,
    runtime: Runtime,
    reader: ViewReader,
    views: Sequence[int],
) -> FeatureTable:
    """Return the features of some views, from --feature-dir if they are there."""
    folder, ranks, key = config.feature_dir, runtime.ranks, ""
    if folder is not None:
        if ranks.is_main_process:
            key = feature_key(model, reader, runtime, views, workers=config.workers)
        key = ranks.broadcast_text(key)
    if folder is not None and key:
        kept = load_features(folder, key, views)
        # all ranks compute, or none
        if not ranks.all_reduce_counts({"missing": kept is None})["missing"] and kept is not None:
            console.info(f"features of {reader.source.split}: read from {folder}")
            return kept
    table = compute_features(
        model,
        reader,
        runtime,
        views=views,
        batch_size=config.batch_size,
        workers=config.workers,
        on_bad_image=config.on_bad_image,
    )
    if folder is not None and key and ranks.is_main_process:
        save_features(folder, key, table)
    return table
