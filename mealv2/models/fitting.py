"""Fit the tensors of a weights file to a timm model: prefixes, head, sizes, what is left over."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from mealv2.errors import ConfigError
from mealv2.models.cifar import CifarNetwork
from mealv2.models.weights import read_state
from mealv2.storage.weight_files import find_checkpoint

State = dict[str, Tensor]
Rebuild = Callable[[State], nn.Module]  # timm's model with a state that timm adapts

# A start may leave out this share of a file's tensors; of the model's own, all must be there.
MAX_UNUSED = 0.1

# What trainers and libraries put before a model's keys, in any nesting.
_PREFIXES = (
    *("model.", "timm_model.", "ema_model.", "_orig_mod.", "module.", "backbone.", "net."),
    "network.",
)
_AVERAGES = ("ema_model.",)
# Counters beside the weights: torch's SWA, thop's profiler (one of each in every module).
_COUNTERS = ("n_averaged", "total_ops", "total_params")


@dataclass
class _Fit:
    """A file's tensors beside a model's, ``own``: what is used, and what is different."""

    path: Path
    own: State
    heads: tuple[str, ...]
    state: State
    notes: list[str] = field(default_factory=list)

    @property
    def missing(self) -> list[str]:
        return sorted(self.own.keys() - self.state.keys())

    @property
    def unknown(self) -> list[str]:
        return sorted(self.state.keys() - self.own.keys())

    @property
    def reshaped(self) -> list[str]:
        """The tensors of another shape than the model's."""
        both = sorted(self.own.keys() & self.state.keys())
        different = [key for key in both if self.own[key].shape != self.state[key].shape]
        return sorted(different, key=lambda key: -self.own[key].ndim)  # weights before biases


def load_weights(
    backbone: nn.Module,
    path: Path,
    *,
    state: Mapping[str, Any] | None = None,
    new_head: bool = False,
    other_classes: bool = False,
    rebuild: Rebuild | None = None,
) -> list[str]:
    """Load a weights file into a timm model; return what a user should know, one line each.

    ``state`` is the file's content, if it was read before. With ``new_head``, for a start, a head
    of another width (or of ``other_classes``) keeps its initial weights, as in timm, and up to
    MAX_UNUSED of the file's tensors may be unknown. ``rebuild`` lets timm resample tensors of
    another size. Raises ConfigError if the file does not fit.
    """
    path = find_checkpoint(path)
    fit = _Fit(path, backbone.state_dict(), _heads(backbone), {})
    state = read_state(path) if state is None else state
    if isinstance(backbone, CifarNetwork):
        state = backbone.adapt_state(state)
    fit.state = _tensors(fit, _unprefixed(fit, state))
    if new_head:
        _replace_head(fit, always=other_classes)
    if new_head and not fit.missing and 0 < len(fit.unknown) <= MAX_UNUSED * len(fit.state):
        fit.notes.append(
            f"{path}: {_count(len(fit.unknown), 'tensor')} without a place in the model not used "
            f"({_some(fit.unknown)})"
        )
        fit.state = {key: value for key, value in fit.state.items() if key in fit.own}
    if fit.reshaped and not (fit.missing or fit.unknown) and rebuild is not None:
        _resample(fit, rebuild)
    if fit.missing or fit.unknown or fit.reshaped:
        raise ConfigError(_misfit(fit, is_start=new_head))
    _check_values(fit)
    backbone.load_state_dict(fit.state)
    return fit.notes


# --- the file's tensors under the model's keys ----------------------------------------------------


def _unprefixed(fit: _Fit, state: Mapping[str, Any]) -> dict[str, Any]:
    """Return a state under the model's keys: without the prefix that most of them have.

    An average beside the weights is preferred, as in timm; other copies are left out.
    """
    found: dict[str, int] = {}
    for key in state:
        for prefix in _prefixes_of(key):
            found[prefix] = found.get(prefix, 0) + (key[len(prefix) :] in fit.own)
    most = max(found.values(), default=0)
    best = [prefix for prefix in found if found[prefix] == most > 0]
    averages = [prefix for prefix in best if any(name in prefix for name in _AVERAGES)]
    if len(averages or best) > 1 and 2 * most >= len(fit.own):
        names = " and ".join(repr(prefix) for prefix in sorted(averages or best))
        raise ConfigError(f"checkpoint {fit.path} has weights of the model under {names}; keep one")
    chosen = (averages or best or [""])[0]
    plain = {key[len(chosen) :]: value for key, value in state.items() if key.startswith(chosen)}
    for key, value in state.items():
        plain_names = [key[len(prefix) :] for prefix in _prefixes_of(key)]
        if not key.startswith(chosen) and not any(name in fit.own for name in plain_names):
            plain.setdefault(key, value)
    if chosen == "":
        for key in [key for key in plain if key not in fit.own]:
            if any(key[len(prefix) :] in fit.own for prefix in _prefixes_of(key)):
                del plain[key]
    return plain


def _prefixes_of(key: str) -> list[str]:
    """Return the known prefixes of a key, from none to all: "", "model.", "model.module."."""
    found, rest = [""], key
    while name := next((name for name in _PREFIXES if rest.startswith(name)), None):
        rest = rest.removeprefix(name)
        found.append(found[-1] + name)
    return found


def _tensors(fit: _Fit, state: Mapping[str, Any]) -> State:
    """Return the tensors without the counters of libraries.

    Files before torch 0.4.1 have no batch counters of BatchNorm: they start at 0. Raises
    ConfigError if another value is in the place of a tensor.
    """
    tensors = {}
    for key, value in state.items():
        if isinstance(value, Tensor):
            if key in fit.own or key.rpartition(".")[2] not in _COUNTERS:
                tensors[key] = value
        elif key in fit.own:
            raise ConfigError(f"checkpoint {fit.path} holds no tensor under {key}")
    if not tensors:
        raise ConfigError(f"checkpoint {fit.path} holds no weights")
    for key in fit.own.keys() - tensors.keys():
        if key.endswith(".num_batches_tracked"):
            tensors[key] = fit.own[key]
    return tensors


# --- head and sizes -------------------------------------------------------------------------------


def _heads(backbone: nn.Module) -> tuple[str, ...]:
    """Return the key prefixes of a timm model's classifier."""
    config: Mapping[str, Any] = backbone.pretrained_cfg  # type: ignore[assignment]
    names = config.get("classifier") or ()
    return tuple(f"{name}." for name in ([names] if isinstance(names, str) else names))


def _replace_head(fit: _Fit, *, always: bool) -> None:
    """Give the model's own head to a state whose head is missing or has another width."""
    own = {key: value for key, value in fit.own.items() if key.startswith(fit.heads)}
    known = {key: value for key, value in fit.state.items() if key.startswith(fit.heads)}
    shapes = {key: value.shape for key, value in known.items()}
    if not own or (not always and shapes == {key: value.shape for key, value in own.items()}):
        return
    widths = {len(value) for key, value in known.items() if value.ndim}
    if not known:
        why = "the file has none"
    elif always and shapes == {key: value.shape for key, value in own.items()}:
        why = "the file's classes have other names"
    else:
        why = f"the file's has {'/'.join(map(str, sorted(widths)))} classes"
    fit.state = {key: value for key, value in fit.state.items() if key not in known} | own
    num_classes = max(len(value) for value in own.values() if value.ndim)
    fit.notes.append(f"{fit.path}: new head for {_count(num_classes, 'class', 'classes')}, {why}")


def _resample(fit: _Fit, rebuild: Rebuild) -> None:
    """Let timm load a state whose tensors have other sizes, as it does with its own weights."""
    reshaped = fit.reshaped
    try:
        adapted = rebuild(dict(fit.state)).state_dict()
    except Exception:  # timm has no rule for this tensor: the misfit is reported
        return
    first = reshaped[0]
    before, after = (tuple(state[first].shape) for state in (fit.state, fit.own))
    more = f" and {len(reshaped) - 1} more" if len(reshaped) > 1 else ""
    fit.notes.append(
        f"{fit.path}: timm resampled {first}{more} from another image size, {before} to {after}"
    )
    fit.state = adapted


def _check_values(fit: _Fit) -> None:
    """Raise ConfigError for a file of the right shapes without content, such as zeros."""
    matrices = [v for key, v in fit.state.items() if v.ndim > 1 and v is not fit.own.get(key)]
    if matrices and all(bool((value == value.flatten()[0]).all()) for value in matrices):
        raise ConfigError(
            f"checkpoint {fit.path} has the right shapes but no content: every one of its weight "
            "tensors is constant; download it again"
        )


# --- what does not fit ----------------------------------------------------------------------------


def _misfit(fit: _Fit, *, is_start: bool) -> str:
    """Return one line: how much fits, how much is needed, and the first tensors that do not."""
    missing, unknown, reshaped = fit.missing, fit.unknown, fit.reshaped
    num_fitting = len(fit.own) - len(missing) - len(reshaped)
    if not missing and not unknown and all(key.startswith(fit.heads) for key in reshaped):
        key = reshaped[0]
        return (
            f"checkpoint {fit.path} does not fit: {key} is {tuple(fit.state[key].shape)}, the "
            f"model has {tuple(fit.own[key].shape)} (another class count?); only "
            "--initial-checkpoint gets a new head"
        )
    parts = [f"{num_fitting} of the model's {len(fit.own)} tensors fit"]
    if missing:
        parts.append(f"{len(missing)} are missing (first: {missing[0]})")
    if unknown:
        parts.append(
            f"{len(unknown)} of the file's {len(fit.state)} are unknown (first: {unknown[0]})"
        )
    if reshaped:
        key = reshaped[0]
        shapes = f"{tuple(fit.state[key].shape)}, the model has {tuple(fit.own[key].shape)}"
        parts.append(f"{len(reshaped)} have another shape (first: {key} is {shapes})")
    needed = "needed: all"
    if is_start:
        needed += f" of the model's but its head, and {1 - MAX_UNUSED:.0%} of the file's"
    what = "does not fit" if not missing and not unknown else "is of another model"
    return f"checkpoint {fit.path} {what}: {', '.join(parts)}; {needed}"


def _some(names: Iterable[str]) -> str:
    listed = list(names)
    return ", ".join(listed[:2]) + (", …" if len(listed) > 2 else "")


def _count(number: int, one: str, several: str = "") -> str:
    return f"{number} {one if number == 1 else several or one + 's'}"
