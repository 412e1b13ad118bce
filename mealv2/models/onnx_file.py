"""Classifiers in ONNX files, run by onnxruntime."""

import hashlib
import mmap
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor, nn

from mealv2.errors import ConfigError
from mealv2.models.released import MEAN, STD
from mealv2.storage.atomic import file_sha256
from mealv2.storage.json_format import parse_json

ONNX = ".onnx"
_TYPES = {"tensor(float)": torch.float32, "tensor(float16)": torch.float16}
_LOCATION = b"\x0a\x08location"  # protobuf's bytes of the key with the name of a data file


def is_onnx(name: str) -> bool:
    """Return whether a teacher's name is the path of an ONNX file."""
    return name.lower().endswith(ONNX)


class OnnxClassifier(nn.Module):
    """A classifier in an ONNX file, in its own precision and without gradients.

    ``forward`` maps images B x 3 x S x S, uint8 or float in [0, 1], to float logits B x C. A file
    of `mealv2 export` normalises them itself; for other files they are normalised with ImageNet's
    mean and std, of which ``notes`` has a line. ``img_size`` is the size that the file states,
    ``has_fixed_size`` whether it takes no other; ``sha256`` is that of the file, or of it
    and the files with its weights (external data). Raises ConfigError for a file that is no such
    model, and for weights outside its folder.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.name, self._path = path.name, path
        self.sha256 = _model_sha256(path)
        self._session = self._open("cpu")
        self._provider = "cpu"
        shape, logits = self._shapes()
        self._batch_size = shape[0] if isinstance(shape[0], int) else None
        self.has_fixed_size = isinstance(shape[2], int)
        stored = self._metadata()
        self.is_own = bool(stored)
        self.classes: list[str] | None = stored.get("classes")
        self.img_size: int | None = shape[2] if self.has_fixed_size else stored.get("img_size")
        self.mean: list[float] = list(stored.get("mean", MEAN))
        self.std: list[float] = list(stored.get("std", STD))
        self.num_classes: int | None = logits[1] if isinstance(logits[1], int) else None
        self.notes = [f"teacher {path}: SHA-256 {self.sha256}"]
        if not self.is_own:
            self.notes.append(
                f"teacher {path} does not name its normalisation: its images are normalised with "
                "ImageNet's mean and std"
            )

    def forward(self, images_BCHW: Tensor) -> Tensor:
        device = images_BCHW.device
        if device.type != self._provider:
            self._session, self._provider = self._open(device.type), device.type
        scale = 255.0 if images_BCHW.dtype == torch.uint8 else 1.0
        images_BCHW = images_BCHW.float().cpu() / scale
        if not self.is_own:
            mean_13, std_13 = (torch.tensor(v).view(1, 3, 1, 1) for v in (self.mean, self.std))
            images_BCHW = (images_BCHW - mean_13) / std_13
        logits_BC = torch.cat(list(self._run(images_BCHW.to(self._dtype))))
        return logits_BC[: len(images_BCHW)].float().to(device)

    def _run(self, images_BCHW: Tensor) -> Iterator[Tensor]:
        """Yield the logits; a file of a fixed batch size gets full batches, the last one padded."""
        size = self._batch_size or len(images_BCHW)
        for rows_BCHW in torch.split(images_BCHW, size):
            missing = size - len(rows_BCHW)
            full_BCHW = torch.cat([rows_BCHW, rows_BCHW[-1:].expand(missing, -1, -1, -1)])
            feed = {self._input: full_BCHW.contiguous().numpy()}
            yield torch.from_numpy(self._session.run([self._output], feed)[0])

    def _open(self, device_type: str) -> Any:
        try:
            import onnxruntime
        except ImportError:
            message = f"teacher {self._path} needs onnxruntime: pip install onnxruntime"
            raise ConfigError(message) from None
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3  # errors
        wanted = ["CUDAExecutionProvider"] if device_type == "cuda" else []
        known = onnxruntime.get_available_providers()
        providers = [*(name for name in wanted if name in known), "CPUExecutionProvider"]
        try:
            return onnxruntime.InferenceSession(str(self._path), options, providers=providers)
        except Exception as error:  # onnxruntime has an exception of its own for each cause
            reason = str(error).replace("\n", " ")
            raise ConfigError(f"cannot read {self._path} as an ONNX model: {reason}") from None

    def _shapes(self) -> tuple[list[Any], list[Any]]:
        """Return the shapes of images and logits; a dimension may be a name."""
        inputs, outputs = self._session.get_inputs(), self._session.get_outputs()
        shape, logits = list(inputs[0].shape), list(outputs[0].shape)
        has_colours = len(shape) == 4 and (shape[1] == 3 or not isinstance(shape[1], int))
        is_square = has_colours and len({s if isinstance(s, int) else None for s in shape[2:]}) == 1
        if len(inputs) != 1 or inputs[0].type not in _TYPES or not is_square or len(logits) != 2:
            raise ConfigError(
                f"{self._path} maps {inputs[0].type} {shape} to {logits}; a teacher maps float "
                "images B x 3 x S x S to logits B x C"
            )
        self._input, self._output = inputs[0].name, outputs[0].name
        self._dtype = _TYPES[inputs[0].type]
        return shape, logits

    def _metadata(self) -> dict[str, Any]:
        """Return what `mealv2 export` wrote into the file; empty for other files."""
        texts = self._session.get_modelmeta().custom_metadata_map
        if "mealv2" not in texts:
            return {}
        try:
            names = ("classes", "img_size", "mean", "std")
            return {name: parse_json(texts[name].encode()) for name in names}
        except (KeyError, ValueError) as error:
            raise ConfigError(f"the metadata of {self._path} is damaged: {error}") from None


def _model_sha256(path: Path) -> str:
    """Return the SHA-256 (hex) of an ONNX file; with external data, of the hashes of all its files.

    Raises ConfigError for a file that cannot be read, and for external data outside the folder.
    """
    digest = _file_sha256(path)
    locations = _data_locations(path)
    if not locations:
        return digest
    lines = [digest]
    for location in locations:
        inside = PurePosixPath(location)
        if inside.is_absolute() or ".." in inside.parts:
            raise ConfigError(
                f"{path} has weights outside its folder, in {location}; export it as one file"
            )
        lines.append(f"{location}\0{_file_sha256(path.parent / inside)}")
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _file_sha256(path: Path) -> str:
    try:
        return file_sha256(path)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None


def _data_locations(path: Path) -> list[str]:
    """Return the sorted names of the files with external data, relative to the model's folder.

    Raises ConfigError if the file seems to have some and the package onnx is missing.
    """
    if not path.stat().st_size:
        return []
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        if data.find(_LOCATION) < 0:
            return []
    try:
        import onnx
    except ImportError:
        raise ConfigError(
            f"{path} has weights in other files, which only the package onnx can name: export it "
            "as one file, or pip install onnx"
        ) from None
    try:
        model = onnx.load(str(path), load_external_data=False)
    except Exception as error:  # protobuf has an exception of its own
        reason = str(error).replace("\n", " ")
        raise ConfigError(f"cannot read {path} as an ONNX model: {reason}") from None
    return sorted(set(_locations(model, onnx.TensorProto)))


def _locations(message: Any, tensor_type: Any) -> Iterator[str]:
    """Yield the data files of all tensors in a protobuf message: weights, constants, subgraphs."""
    if isinstance(message, tensor_type):
        if message.data_location == tensor_type.EXTERNAL:
            yield from (each.value for each in message.external_data if each.key == "location")
        return
    for field, value in message.ListFields():
        if field.message_type is not None:
            for part in [value] if hasattr(value, "ListFields") else value:
                yield from _locations(part, tensor_type)
