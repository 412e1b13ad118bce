"""RetinaNet with a feature pyramid, by torchvision, on the features of any timm model."""

import json
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import timm
import torch
from timm.layers.norm_act import freeze_batch_norm_2d
from torch import Tensor, nn
from torchvision.models.detection import RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops.feature_pyramid_network import FeaturePyramidNetwork, LastLevelP6P7

from mealv2.errors import ConfigError
from mealv2.models.classifier import (
    DETECTION,
    METADATA_KEY,
    Classifier,
    Preprocessing,
    create_classifier,
    read_metadata,
    weights_sha256,
)
from mealv2.models.weights import read_state
from mealv2.own_code import reason_of
from mealv2.storage.atomic import write_atomic
from mealv2.storage.weight_files import WEIGHTS_NAME, find_checkpoint

FIRST_STAGE = 4  # the stride of its output; those of C3, C4 and C5 follow
_STRIDES = (8, 16, 32)
CHANNELS = 256  # of the pyramid and the heads
_ANCHOR_SIDES = (32, 64, 128, 256, 512)  # of P3 to P7
_PROBE_SIDES = (64, 96)


class Thresholds(NamedTuple):
    """Which detections are kept: by score, by overlap, and how many of an image."""

    score: float = 0.05
    nms: float = 0.5
    detections: int = 100


class _Float32Head(RetinaNetHead):  # type: ignore[misc]  # untyped
    """torchvision's head with float32 outputs, also with autocast."""

    def forward(self, x: list[Tensor]) -> dict[str, Tensor]:
        return {name: found.float() for name, found in super().forward(x).items()}


class _NoResize(GeneralizedRCNNTransform):  # type: ignore[misc]  # untyped
    """torchvision's normalisation and padding of images that have their size."""

    def resize(self, image: Tensor, target: Any = None) -> tuple[Tensor, Any]:
        return image, target


class _Pyramid(nn.Module):
    """P3 to P7 from C3 to C5 of a timm model; P6 is a convolution of C5, as in detectron2."""

    def __init__(
        self,
        body: nn.Module,
        levels: Sequence[int],
        channels: Sequence[int],
        out_channels: int,
    ) -> None:
        super().__init__()
        self.out_channels = out_channels
        self.body = body
        self._levels = tuple(levels)  # where C3, C4 and C5 are in the body's outputs
        last = LastLevelP6P7(channels[-1], out_channels)
        last.use_P5 = False  # torchvision takes P5 where C5 has as many channels
        self.fpn = FeaturePyramidNetwork(list(channels), out_channels, extra_blocks=last)

    def forward(self, images_BCHW: Tensor) -> "OrderedDict[str, Tensor]":
        features = self.body(images_BCHW)
        chosen = OrderedDict((str(level), features[level]) for level in self._levels)
        found: OrderedDict[str, Tensor] = self.fpn(chosen)
        return found


class Detector(Classifier):
    """RetinaNet in the place of a classifier: ``backbone`` is torchvision's RetinaNet.

    The weights of ``start`` become its features; batch normalisation is frozen, the statistics and
    the affine part, as in detectron2. With ``freezes_first_stage`` the stem and the first stage
    have no gradient. Raises ConfigError for a model without features of strides 8, 16 and 32 (and
    4, of the first stage).
    """

    def __init__(
        self,
        start: Classifier,
        *,
        num_classes: int,
        freezes_first_stage: bool = False,
        channels: int = CHANNELS,
        thresholds: Thresholds | None = None,
    ) -> None:
        body, levels = _features_of(start)
        if freezes_first_stage:
            _freeze_first_stage(body, levels, start.tag)
        kept_levels = [levels[stride] for stride in _STRIDES]
        inputs = [body.feature_info.channels()[level] for level in kept_levels]
        pyramid = _Pyramid(body, kept_levels, inputs, channels)
        kept = thresholds or Thresholds()
        # detectron2's sizes; torchvision's defaults are whole numbers
        sizes = tuple(tuple(side * 2 ** (k / 3) for k in range(3)) for side in _ANCHOR_SIDES)
        anchors = AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * len(sizes))
        retinanet: Any = RetinaNet(
            pyramid,
            num_classes,
            anchor_generator=anchors,
            head=_Float32Head(channels, anchors.num_anchors_per_location()[0], num_classes),
            score_thresh=kept.score,
            nms_thresh=kept.nms,
            detections_per_img=kept.detections,
        )
        mean, std = start.preprocessing.mean, start.preprocessing.std
        retinanet.transform = _NoResize(0, 0, list(mean), list(std))
        retinanet.num_classes = num_classes
        super().__init__(retinanet, tag=start.tag, preprocessing=start.preprocessing)
        self.model_args = start.model_args

    def forward(  # type: ignore[override]  # a detector needs sizes, and returns no logits
        self,
        images_BCHW: Tensor,
        sizes: Sequence[tuple[int, int]],
        targets: list[dict[str, Tensor]] | None = None,
    ) -> Any:
        """Return torchvision's losses in training mode, else its detections of each image.

        ``images_BCHW`` are uint8, ``sizes`` height and width of the image in each, at its upper
        left. ``targets`` have ``boxes`` and ``labels``.
        """
        images = [
            image[:, :height, :width].float() / 255.0
            for image, (height, width) in zip(images_BCHW, sizes, strict=True)
        ]
        return self.backbone(images, targets)


def _features_of(start: Classifier) -> tuple[Any, dict[int, int]]:
    """Return timm's features with the weights of a model, and their positions by stride.

    The strides are 8, 16 and 32, and 4 if the model has it. Raises ConfigError.
    """
    full: Any = start.backbone
    infos = getattr(full, "feature_info", None) or []
    last = {info["reduction"]: index for index, info in enumerate(infos)}
    architecture = (getattr(full, "pretrained_cfg", None) or {}).get("architecture")
    if architecture is None or not set(_STRIDES) <= last.keys():
        strides = ", ".join(str(info["reduction"]) for info in infos) or "none"
        raise ConfigError(
            f"model {start.tag} has no features of strides 8, 16 and 32 for a pyramid (its "
            f"strides: {strides}); use a timm model with features_only, such as a ResNet"
        )
    kept = [stride for stride in (FIRST_STAGE, *_STRIDES) if stride in last]
    try:
        body = timm.create_model(
            architecture,
            features_only=True,
            pretrained=False,
            out_indices=[last[stride] for stride in kept],
            **start.model_args,
        )
        _copy_weights(body, full)
        body = freeze_batch_norm_2d(body)  # type: ignore[no-untyped-call]
        with torch.no_grad():
            body(torch.zeros(1, 3, *_PROBE_SIDES))
    except (RuntimeError, TypeError, ValueError, AssertionError, KeyError) as error:
        raise ConfigError(
            f"model {start.tag} gives no features of any image size: {reason_of(error)}"
        ) from error
    return body, {stride: position for position, stride in enumerate(kept)}


def _copy_weights(body: nn.Module, full: nn.Module) -> None:
    """Copy the weights of a timm model into its features, whose names differ in their dots."""
    state = {_plain(name): tensor for name, tensor in full.state_dict().items()}
    body.load_state_dict({name: state[_plain(name)] for name in body.state_dict()})


def _plain(name: str) -> str:
    return name.removeprefix("model.").replace(".", "_")


def _freeze_first_stage(body: nn.Module, levels: dict[int, int], tag: str) -> None:
    """Freeze all that the output of the first stage depends on, of any architecture."""
    if FIRST_STAGE not in levels:
        raise ConfigError(f"model {tag} has no first stage of stride 4; use --mode fine-tune")
    named = [parameter for parameter in body.parameters() if parameter.requires_grad]
    first_BCHW = body(torch.zeros(1, 3, *_PROBE_SIDES))[levels[FIRST_STAGE]]
    gradients = torch.autograd.grad(first_BCHW.sum(), named, allow_unused=True)
    for parameter, gradient in zip(named, gradients, strict=True):
        if gradient is not None:
            parameter.requires_grad_(False)


def save_detector(
    folder: Path,
    model: Classifier,
    *,
    classes: Sequence[str],
    img_size: int,
    held_out: Sequence[str] = (),
) -> None:
    """Write ``model.safetensors``, which ``load_detector`` reads; raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    stored = {
        "task": DETECTION,
        "architecture": model.tag.split(".")[0],
        "classes": list(classes),
        "img_size": img_size,
        "mean": model.preprocessing.mean,
        "std": model.preprocessing.std,
        "model_args": model.model_args,
        "weights_sha256": weights_sha256(model.backbone),
    }
    state = {name: value.cpu().contiguous() for name, value in model.backbone.state_dict().items()}
    metadata = {METADATA_KEY: json.dumps(stored, sort_keys=True)}
    write_atomic(folder / WEIGHTS_NAME, safetensors.torch.save(state, metadata))


def load_detector(path: str | Path, *, thresholds: Thresholds | None = None) -> Detector:
    """Return the detector of a run or model folder, in eval mode; raises ConfigError."""
    path = find_checkpoint(Path(path))
    stored = read_metadata(path)
    if stored.get("task") != DETECTION:
        raise ConfigError(f"{path} is not a detector of `mealv2 transfer-detection`")
    start = create_classifier(
        stored["architecture"],
        num_classes=1,
        model_args=stored["model_args"],
        preprocessing=Preprocessing(tuple(stored["mean"]), tuple(stored["std"])),
    )
    state = read_state(path)
    channels = len(state["backbone.fpn.layer_blocks.0.0.weight"])
    model = Detector(
        start, num_classes=len(stored["classes"]), channels=channels, thresholds=thresholds
    )
    model.backbone.load_state_dict(state)
    return model.eval()
