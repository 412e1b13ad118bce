"""Run a new model once: does it take the image size, do its weights work?"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from mealv2.errors import ConfigError
from mealv2.own_code import reason_of

_NEARLY_EQUAL = 1e-6  # relative; two images that differ give features that differ by far more
_KEEP_SHAPE = (
    *(functional.batch_norm, functional.layer_norm, functional.group_norm),
    *(functional.gelu, functional.relu, functional.silu, functional.dropout),
)


def check_forward(
    backbone: nn.Module, img_size: int, *, name: str, weights: Path | None = None
) -> None:
    """Raise ConfigError if a timm model cannot be run on images of this size, or has no classifier.

    Without ``weights`` only shapes are computed where the model allows it, which needs no memory
    and the same time for every size. With ``weights``, a file to check, the forward pass is real:
    its outputs must be finite and differ between two images.
    """
    images_BCHW = _two_images(img_size)
    with _evaluated(backbone):
        if weights is None and (outputs := _on_meta(backbone, images_BCHW)) is not None:
            _check_shape(outputs, backbone, name)
            return
        try:
            logits_BC = backbone(images_BCHW)
            features = None
            if hasattr(backbone, "forward_features"):  # timm's models have it
                features = backbone.forward_features(images_BCHW)  # type: ignore[operator]
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # of timm and torch: every kind
            what = f"model {name} cannot be run at --img-size {img_size}"
            raise ConfigError(f"{what}: {reason_of(error)}") from error
    _check_shape(logits_BC, backbone, name)
    if weights is not None:
        _check_outputs(logits_BC, features, weights)


def num_logits(model: nn.Module, img_size: int, *, name: str) -> int:
    """Return the number of a model's logits; raises ConfigError for outputs of another kind."""
    with _evaluated(model):
        try:
            logits_BC = model(_two_images(img_size))
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # of any code: every kind
            what = f"model {name} cannot be run at --img-size {img_size}"
            raise ConfigError(f"{what}: {reason_of(error)}") from error
    if not isinstance(logits_BC, Tensor) or logits_BC.ndim != 2 or len(logits_BC) != 2:
        found = (
            tuple(logits_BC.shape) if isinstance(logits_BC, Tensor) else type(logits_BC).__name__
        )
        raise ConfigError(
            f"model {name} gives {found} for 2 images; logits of (2, classes) are needed"
        )
    return logits_BC.shape[1]


def _two_images(img_size: int) -> Tensor:
    """Return a gradient and noise as a normalised batch, 2 x 3 x S x S."""
    generator = torch.Generator().manual_seed(0)
    noise_CHW = torch.randn(3, img_size, img_size, generator=generator)
    gradient_CHW = torch.linspace(-1.0, 1.0, img_size).expand(3, img_size, img_size)
    return torch.stack([gradient_CHW, noise_CHW])


@contextmanager
def _evaluated(backbone: nn.Module) -> Iterator[None]:
    """Run a model in eval mode without gradients; restore its modes and torch's generator."""
    modes = [(module, module.training) for module in backbone.modules()]
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            backbone.eval()
            yield
    finally:
        backbone.train()  # timm's LeViT and EfficientViT forget what they cached in eval mode
        for module, mode in modes:
            module.training = mode


def _on_meta(backbone: nn.Module, images_BCHW: Tensor) -> object:
    """Return outputs that are only shapes; None if they do not work out or need real numbers."""
    state = {**dict(backbone.named_parameters()), **dict(backbone.named_buffers())}
    meta = {name: tensor.to("meta") for name, tensor in state.items()}
    try:
        with _FastShapes():
            # tie_weights=False: torch 2.14 does not restore a module that has several names
            return torch.func.functional_call(
                backbone, meta, (images_BCHW.to("meta"),), tie_weights=False
            )
    except Exception:  # the real forward pass tells why
        return None


class _FastShapes(TorchFunctionMode):
    """Knows the shapes of frequent layers, which torch derives in Python, in 3 to 10 ms each."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func in _KEEP_SHAPE:
            return args[0]
        if func is functional.linear and args[0].shape[-1] == args[1].shape[-1]:
            return args[0].new_empty((*args[0].shape[:-1], len(args[1])))
        return func(*args, **kwargs or {})


def _check_shape(logits_BC: object, backbone: nn.Module, name: str) -> None:
    """Raise ConfigError for outputs that are not one score per class, such as an encoder's."""
    expected = (2, backbone.num_classes)
    if not isinstance(logits_BC, Tensor) or logits_BC.shape != expected:
        shape = (
            tuple(logits_BC.shape) if isinstance(logits_BC, Tensor) else type(logits_BC).__name__
        )
        raise ConfigError(
            f"model {name} is no classifier: for two images its output is {shape}, not {expected}"
        )


def _check_outputs(logits_BC: Any, features: Any, weights: Path) -> None:
    """Raise ConfigError for outputs that are not finite, or that do not depend on the image."""
    if not (isinstance(logits_BC, Tensor) and torch.isfinite(logits_BC).all()):
        raise ConfigError(f"checkpoint {weights}: the model's outputs are not finite numbers")
    found = features if isinstance(features, list | tuple) else [features]
    maps = [f for f in found if isinstance(f, Tensor) and len(f) == 2] or [logits_BC]
    if all(torch.allclose(one, two, rtol=_NEARLY_EQUAL, atol=0.0) for one, two in maps):
        raise ConfigError(
            f"checkpoint {weights}: the model's outputs do not depend on the image; its "
            "weights are empty or damaged, download it again"
        )
