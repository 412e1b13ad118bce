"""Many transfers: every set, mode, model and seed, each a run folder of its own; then one table."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mealv2.errors import ConfigError, StoppedError
from mealv2.storage.atomic import file_sha256, write_atomic
from mealv2.storage.json_format import canonical_json, read_json
from mealv2.storage.regular_files import read_regular
from mealv2.storage.urls import Location, located
from mealv2.storage.weight_files import find_checkpoint
from pipeline import console
from pipeline.command_line.paths import check_paths
from pipeline.comparison.starts import with_start
from pipeline.comparison.table import Form, Run, grid_report, grid_table
from pipeline.config import FREE_ON_RESUME, ComparisonConfig, plain
from pipeline.runtime.device import Runtime
from pipeline.training.run_folder import CONFIG_NAME, RunFolder, has_checkpoint

MODELS = ("base", "distilled")  # of --compare, in this order
_STARTS_NAME = "starts.json"

# Trains one run and returns its report.
TrainOne = Callable[[Any, Runtime], dict[str, Any]]
# Returns the fingerprints of a run's images: names, sizes and classes of both splits.
Fingerprints = Callable[[Any], list[str]]
# Hashes by kind ("weights", "images") and by the name in the settings.
_Starts = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class _Cell:
    """A run of the grid: where its result belongs in the table, and its settings."""

    run: Run
    config: ComparisonConfig


def run_grid(
    config: ComparisonConfig,
    runtime: Runtime,
    *,
    train_one: TrainOne,
    fingerprints: Fingerprints,
    form: Form,
) -> dict[str, Any]:
    """Train every cell whose run is not finished; print the table and return the report.

    Writes transfer.json and transfer.md into --output, before them starts.json: hashes of the
    weights that the runs start from and of the names and sizes of their images. Raises
    StoppedError after a signal, and ConfigError for a folder with a run of other settings, weights
    or images.
    """
    if runtime.ranks.is_distributed:
        raise ConfigError("several runs (--compare, --seeds, …) need one process, not torchrun")
    if config.seeds > 1 and find_spec("scipy") is None:
        raise ConfigError("--seeds needs scipy for the intervals over seeds: pip install scipy")
    cells = list(_cells(config))
    for cell in cells:
        check_paths(cell.config)
    starts = _starts(cells, fingerprints)  # an error of any of them comes before the first run
    assert config.output is not None, "checked by the settings"
    _require_same_starts(starts, cells, config.output)
    repeats = config.seeds > 1 and any(cell.config.caches_features for cell in cells)
    if repeats and getattr(config, "feature_dir", None) is None:
        console.info("--feature-dir DIR computes the features of a backbone once for all seeds")
    runs = []
    for number, cell in enumerate(cells, 1):
        console.info(f"{number}/{len(cells)}: {cell.config.output}")
        runs.append(replace(cell.run, report=_run(cell, runtime, train_one)))
    report, table = grid_report(runs, form), grid_table(runs, form, as_markdown=True)
    write_atomic(config.output / "transfer.json", canonical_json(report).encode())
    write_atomic(config.output / "transfer.md", f"{table}\n".encode())
    console.result(grid_table(runs, form))
    return {"output": str(config.output), **report}


def _cells(config: ComparisonConfig) -> Iterator[_Cell]:
    """Yield the runs: set by set, mode by mode, model by model, seed by seed."""
    assert config.output is not None, "checked by the settings"
    file, only = config.sets_file, config.data_dir
    sets = {"": only} if file is None else read_sets(file)
    starts = dict(zip(MODELS, config.compare or (), strict=False)) or {"model": config.model}
    seeds = range(config.seed, config.seed + config.seeds)
    for set_name, data_dir in sets.items():
        for mode in config.all_modes:
            for model, start in starts.items():
                if mode == "scratch" and model == MODELS[1]:
                    continue  # it has the same architecture, and no weights
                for seed in seeds:
                    name = "scratch" if mode == "scratch" else f"{mode}-{model}"
                    folder = config.output / set_name / name / f"seed-{seed}"
                    one = config.cell(model=start, mode=mode, data_dir=data_dir)
                    one = replace(one, seed=seed, output=folder)
                    yield _Cell(Run(set_name, mode, model, seed), one)


def read_sets(path: Path) -> dict[str, Location]:
    """Return the data sets of --sets by name: a line NAME DATA_DIR each, paths from its folder.

    Empty lines, and lines that begin with #, have no meaning. Raises ConfigError.
    """
    found: dict[str, Location] = {}
    try:
        text = read_regular(path).decode("utf-8-sig")
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read --sets {path}: {error}") from None
    for number, line in enumerate(text.splitlines(), 1):
        words = line.split(maxsplit=1)
        if not words or words[0].startswith("#"):
            continue
        if len(words) < 2:
            raise ConfigError(f"--sets {path}, line {number}: NAME DATA_DIR is needed: {line!r}")
        name, data_dir = words[0], located(words[1].strip())
        if name in found or not _is_plain(name):
            what = "is there twice" if name in found else "must be a plain folder name"
            raise ConfigError(f"--sets {path}, line {number}: the name {name} {what}")
        found[name] = path.parent / data_dir if isinstance(data_dir, Path) else data_dir
    if not found:
        raise ConfigError(f"--sets {path} has no data set; a line is NAME DATA_DIR")
    return found


def _is_plain(name: str) -> bool:
    """Return whether a name is a folder's own, not a path."""
    return name not in (".", "..") and Path(name).name == name and "\\" not in name


def _run(cell: _Cell, runtime: Runtime, train_one: TrainOne) -> dict[str, Any]:
    """Train a cell, or continue its run, or read the report of a finished one."""
    config, folder = cell.config, cell.config.output
    assert folder is not None, "a cell has a folder"
    if has_checkpoint(folder):
        _require_same(config, folder)
        if (report := RunFolder(folder).report()) is not None:
            return report
        config = replace(config, output=None, resume=folder)
    try:
        return train_one(config, runtime)
    except StoppedError as error:
        raise StoppedError(
            f"{error}; the same command again continues with all other runs too"
        ) from None


def _starts(cells: Sequence[_Cell], fingerprints: Fingerprints) -> _Starts:
    """Return what the runs start from: hashes of the weights of each model and of each data set."""
    found: _Starts = {"weights": {}, "images": {}}
    for cell in cells:
        weights, data_dir = with_start(cell.config).initial_checkpoint, _data_dir(cell)
        if weights is not None and cell.config.model not in found["weights"]:
            found["weights"][cell.config.model] = file_sha256(find_checkpoint(Path(weights)))
        if data_dir not in found["images"]:
            found["images"][data_dir] = fingerprints(cell.config)
    return found


def _data_dir(cell: _Cell) -> str:
    return str(plain(cell.config.data_dir))  # without the secrets of a URL


def _require_same_starts(starts: _Starts, cells: Sequence[_Cell], output: Path) -> None:
    """Write what the runs start from; raise ConfigError if runs of the folder have another start.

    The images of a run that is not finished are compared when it is resumed.
    """
    path = output / _STARTS_NAME
    try:
        kept = {n: dict(found) for n, found in read_json(path).items()} if path.exists() else {}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from None
    for cell in cells:
        folder = cell.config.output
        if folder is None or not has_checkpoint(folder):
            continue
        names = {"weights": cell.config.model, "images": _data_dir(cell)}
        if RunFolder(folder).report() is None:
            del names["images"]
        for kind, name in names.items():
            now = starts[kind].get(name)
            if kept.get(kind, {}).get(name, now) != now:
                raise ConfigError(
                    f"the {kind} of {name} are not those that {folder} started from; give another "
                    "--output"
                )
    output.mkdir(parents=True, exist_ok=True)
    merged = {kind: kept.get(kind, {}) | found for kind, found in starts.items()}
    write_atomic(path, canonical_json(merged).encode())


def _require_same(config: ComparisonConfig, folder: Path) -> None:
    """Raise ConfigError if a folder has a run of other settings."""
    try:
        kept = dict(read_json(folder / CONFIG_NAME))
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"cannot read {folder / CONFIG_NAME}: {error}") from None
    for name, value in config.as_json().items():
        if name not in FREE_ON_RESUME and kept.get(name) != value:
            raise ConfigError(
                f"{folder} holds a run of other settings ({name}: {kept.get(name)} in the run, "
                f"{value} in this command); give another --output"
            )
