"""Run a new model once: does it take the image size, do its weights work?"""

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mealv2.errors import ConfigError

_NEARLY_EQUAL = 1e-6  # relative; two images that differ give features that differ by far more


def check_forward(
    backbone: nn.Module, img_size: int, *, name: str, weights: Path | None = None
) -> None:
    """Raise ConfigError if a timm model cannot be run on images of this size.

    Without ``weights`` only shapes are computed where the model allows it, which costs milliseconds
    and no memory. With ``weights``, a file to check, the forward pass is real: its outputs must be
    finite and differ between two images.
    """
    images_BCHW = _two_images(img_size)
    with _evaluated(backbone):
        if weights is None and _runs_on_meta(backbone, images_BCHW):
            return
        try:
            logits_BC = backbone(images_BCHW)
            features = backbone.forward_features(images_BCHW)  # type: ignore[operator]
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # of timm and torch: every kind
            what = f"model {name} cannot be run at --img-size {img_size}"
            raise ConfigError(f"{what}: {reason_of(error)}") from error
    if weights is not None:
        _check_outputs(logits_BC, features, weights)


def reason_of(error: Exception) -> str:
    """Return an error of another library in one line."""
    lines = [line.strip() for line in str(error).split("\n") if line.strip()]
    if lines:
        return lines[0]
    frames = traceback.extract_tb(error.__traceback__)  # an assertion without a message
    return f"{type(error).__name__} at {frames[-1].line}" if frames else type(error).__name__


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
        for module, mode in modes:
            module.training = mode


def _runs_on_meta(backbone: nn.Module, images_BCHW: Tensor) -> bool:
    """Return whether the shapes work out; false also for models that need real numbers."""
    state = {**dict(backbone.named_parameters()), **dict(backbone.named_buffers())}
    meta = {name: tensor.to("meta") for name, tensor in state.items()}
    try:
        torch.func.functional_call(backbone, meta, (images_BCHW.to("meta"),))
    except Exception:  # the real forward pass tells why
        return False
    return True


def _check_outputs(logits_BC: Any, features: Any, weights: Path) -> None:
    """Raise ConfigError for outputs that are not finite, or that do not depend on the image."""
    if not (isinstance(logits_BC, Tensor) and torch.isfinite(logits_BC).all()):
        raise ConfigError(f"checkpoint {weights}: the model's outputs are not finite numbers")
    if isinstance(features, Tensor) and len(features) == len(logits_BC) == 2:
        one, other = features
        if torch.allclose(one, other, rtol=_NEARLY_EQUAL, atol=0.0):
            raise ConfigError(
                f"checkpoint {weights}: the model's outputs do not depend on the image; its "
                "weights are empty or damaged, download it again"
            )
