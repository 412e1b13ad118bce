"""Pair the blocks of a student with those of its teachers, before the first step."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mealv2.errors import ConfigError
from mealv2.meal.alignment import Pool
from mealv2.meal.blocks import BlockLayers, block_outputs, is_logits
from mealv2.models import Classifier
from mealv2.own_code import reason_of

# MEAL: --out_dims, the lengths of the blocks before the logits
DEFAULT_DIMS = (5000, 1000, 500, 200)


@dataclass(frozen=True)
class Network:
    """A student or a teacher, its name in messages, and the size of its images."""

    name: str
    module: nn.Module
    img_size: int


def pair_blocks(
    networks: Sequence[Network],
    positions: Sequence[int],
    *,
    sizes: Sequence[int] = (),
    pool: Pool | None = "max",
) -> tuple[BlockLayers, tuple[int, ...]]:
    """Return the compared blocks, and the length that each has in all of the networks.

    The student is the first network. ``sizes`` are the lengths of the aligned blocks in the order
    of ``positions``; the one of the logits may be left out, and all may: then they are MEAL's, or
    ``default_out_dims`` of the student's network. An image of zeros goes through each network.
    Raises ConfigError, which names both networks and their sizes, for blocks that do not pair.
    """
    layers = BlockLayers()
    if tuple(positions) != layers.positions:
        lengths = [len(_checked_outputs(network)) for network in networks]
        _check_lengths(networks, lengths, positions)
        given = sizes or _default_sizes(networks[0], lengths[0], positions)
        of_positions = _sizes(lengths[0], positions, given) if pool else (None,) * len(positions)
        layers = BlockLayers(tuple(positions), of_positions, pool)
    widths = [_widths(layers, network) for network in networks]
    for network, other in zip(networks[1:], widths[1:], strict=True):
        for position, own, width in zip(positions, widths[0], other, strict=True):
            if own != width:
                raise ConfigError(
                    f"--out-layer {position}: {networks[0].name} has {own} values there, "
                    f"{network.name} has {width}; compare blocks of equal length, aligned by "
                    "--out-dims, or only the logits: --out-layer -1"
                )
    if len(sizes) == len(positions):
        _check_size_of_logits(positions, sizes, widths[0])
    return layers, widths[0]


def _check_lengths(
    networks: Sequence[Network], lengths: Sequence[int], positions: Sequence[int]
) -> None:
    """Raise ConfigError for a position that a network lacks, or that differs between networks."""
    for network, length in zip(networks, lengths, strict=True):
        for position in positions:
            if not -length <= position < length:
                raise ConfigError(
                    f"--out-layer {position}: {network.name} has {length - 1} blocks and the "
                    f"logits, positions 0 to {length - 1}"
                )
        if length != lengths[0] and any(position >= 0 for position in positions):
            raise ConfigError(
                f"--out-layer counts from the front, but {networks[0].name} has {lengths[0] - 1} "
                f"blocks and {network.name} has {length - 1}; count from the end (-1 is the "
                "logits, -2 the last block), or choose other networks"
            )
    same = [position % lengths[0] for position in positions]
    if len(set(same)) < len(same):
        raise ConfigError(f"--out-layer names a block twice: {', '.join(map(str, positions))}")


def _default_sizes(student: Network, length: int, positions: Sequence[int]) -> list[int]:
    """Return a length for each position, 0 where there is none; that of the logits is not used."""
    own = getattr(_inner(student.module), "default_out_dims", DEFAULT_DIMS)
    numbers = [position % length for position in positions]
    return [own[number] if number < len(own) else 0 for number in numbers]


def _sizes(length: int, positions: Sequence[int], given: Sequence[int]) -> tuple[int | None, ...]:
    """Return the length of each aligned block, None for the logits."""
    blocks = [position for position in positions if not is_logits(position, length)]
    if len(given) not in (len(blocks), len(positions)):
        raise ConfigError(
            f"--out-dims has {len(given)} values, --out-layer {len(blocks)} blocks before the "
            "logits: give one value for each"
        )
    left = iter(given)
    found: list[int | None] = []
    for position in positions:
        if not is_logits(position, length):
            found.append(next(left))
            continue
        found.append(None)
        if len(given) == len(positions):
            next(left)
    if 0 in found:
        raise ConfigError("--out-dims is needed: MEAL's are those of the first four blocks")
    return tuple(found)


def _check_size_of_logits(
    positions: Sequence[int], sizes: Sequence[int], widths: Sequence[int]
) -> None:
    for position, size, width in zip(positions, sizes, widths, strict=True):
        if size != width:
            raise ConfigError(
                f"--out-dims {size} at --out-layer {position}: the logits are {width}; leave this "
                "value out"
            )


def _checked_outputs(network: Network) -> list[Tensor]:
    """Return the blocks of an image of zeros; raises ConfigError where they do not end in the
    logits of the network.
    """
    with _in_eval_mode(network.module):
        image_BCHW = _image(network)
        try:
            outputs = block_outputs(network.module, image_BCHW)
        except (ConfigError, RuntimeError, ValueError, TypeError, AssertionError) as error:
            raise ConfigError(f"{network.name}: {reason_of(error)}") from error
        logits_BC = network.module(image_BCHW)
    same = outputs[-1].shape == logits_BC.shape
    if not (same and torch.allclose(outputs[-1].float(), logits_BC.float(), 1e-3, 1e-3)):
        raise ConfigError(
            f"{network.name}: what its blocks end in is not the logits of its forward; use "
            "--out-layer -1"
        )
    return outputs


def _widths(layers: BlockLayers, network: Network) -> tuple[int, ...]:
    with _in_eval_mode(network.module):
        try:
            outputs, _ = layers.outputs(network.module, _image(network))
        except ValueError as error:  # a feature map of another shape
            raise ConfigError(f"{network.name}: {error}") from error
    return tuple(output.shape[1] for output in outputs)


def _image(network: Network) -> Tensor:
    device = next((p.device for p in network.module.parameters()), torch.device("cpu"))
    return torch.zeros(1, 3, network.img_size, network.img_size, device=device)


def _inner(module: nn.Module) -> nn.Module:
    return module.backbone if isinstance(module, Classifier) else module


@contextmanager
def _in_eval_mode(module: nn.Module) -> Iterator[None]:
    """Run without gradient in eval mode; give the modes back at the end."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for part, training in modes:
            part.training = training
