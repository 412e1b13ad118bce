"""A classifier of which only the last linear layer is trained: linear evaluation."""

from typing import Self

import torch
from torch import Tensor, nn

from mealv2.errors import ConfigError
from mealv2.models.classifier import Classifier
from mealv2.own_code import reason_of

_NUM_PROBED, _PROBE_SEED = 2, 0


class FrozenClassifier(Classifier):
    """A classifier with a frozen backbone: gradients reach its last linear layer only.

    Everything before that layer stays in eval mode, batch normalisation and dropout included, and
    has no gradient. ``forward`` maps images B x 3 x H x W to logits like ``Classifier``, and also
    features B x D, which ``features`` returned, so that a backbone can run once for many epochs.
    Raises ConfigError for a model whose logits are not those of one ``nn.Linear`` at its end.
    """

    def __init__(self, model: Classifier, *, img_size: int) -> None:
        super().__init__(model.backbone, tag=model.tag, preprocessing=model.preprocessing)
        self.notes, self.model_args = model.notes, model.model_args
        self.head_name = _last_linear(model, img_size)
        self.backbone.requires_grad_(False)
        self.head.requires_grad_(True)

    @property
    def head(self) -> nn.Linear:
        """The layer that is trained."""
        head = self.backbone.get_submodule(self.head_name)
        assert isinstance(head, nn.Linear)
        return head

    def train(self, mode: bool = True) -> Self:
        """Set the mode of the head; the backbone stays in eval mode."""
        super().train(mode)
        self.backbone.eval()
        self.head.train(mode)
        return self

    @torch.no_grad()
    def features(self, images_BCHW: Tensor) -> Tensor:
        """Return the input of the head, B x D."""
        found: list[Tensor] = []
        hook = self.head.register_forward_pre_hook(lambda _, inputs: found.append(inputs[0]))
        try:
            super().forward(images_BCHW)
        finally:
            hook.remove()
        (features_BD,) = found
        return features_BD

    def forward(self, inputs: Tensor) -> Tensor:
        features_BD = inputs if inputs.ndim == 2 else self.features(inputs)
        logits_BC: Tensor = self.head(features_BD)
        return logits_BC


def _last_linear(model: Classifier, img_size: int) -> str:
    """Return the name of the linear layer whose output is the model's; raises ConfigError."""
    backbone = model.backbone
    layers = {
        name: layer
        for name, layer in backbone.named_modules()
        if isinstance(layer, nn.Linear) and layer.out_features == model.num_classes
    }
    outputs: dict[str, Tensor] = {}
    inputs: dict[str, Tensor] = {}

    def record(name: str, given: tuple[Tensor, ...], output: Tensor) -> None:
        inputs[name], outputs[name] = given[0], output

    hooks = [
        layer.register_forward_hook(lambda _, given, output, name=name: record(name, given, output))
        for name, layer in layers.items()
    ]
    modes = {module: module.training for module in model.modules()}
    generator = torch.Generator().manual_seed(_PROBE_SEED)
    images_BCHW = torch.rand(_NUM_PROBED, 3, img_size, img_size, generator=generator)
    try:
        with torch.no_grad():
            logits_BC = model.eval()(images_BCHW)
    except RuntimeError as error:
        raise ConfigError(
            f"model {model.tag} cannot be run at --img-size {img_size}: {reason_of(error)}"
        ) from error
    finally:
        for hook in hooks:
            hook.remove()
        for module, mode in modes.items():
            module.training = mode
    for name in reversed(outputs):
        if inputs[name].ndim == 2 and torch.equal(outputs[name], logits_BC):
            return name
    raise ConfigError(
        f"model {model.tag} has no last linear layer to train alone: its logits are not the output "
        "of one torch.nn.Linear; use --mode fine-tune"
    )
