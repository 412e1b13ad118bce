"""The annotator and the encoding of a command's settings."""

from dataclasses import replace

from mealv2.label_set import Encoding
from mealv2.labelling.annotator import Annotator, choose_encoding
from mealv2.models.ensemble import TeacherEnsemble
from pipeline.compile import compile_teachers
from pipeline.config import EncodingConfig, LabellingConfig, PrecomputeConfig
from pipeline.labelling.batch_size import find_batch_size
from pipeline.runtime.device import Runtime


def make_annotator(
    config: LabellingConfig,
    runtime: Runtime,
    ensemble: TeacherEnsemble,
    encoding: Encoding,
    *,
    img_size: int,
    max_batch_size: int,
) -> Annotator:
    """Return an annotator with the batch size and compilation of a config.

    ``max_batch_size`` limits --batch-size auto. Raises ConfigError if no batch fits into memory.
    """
    batch_size = 0 if config.batch_size == "auto" else config.batch_size
    annotator = Annotator(ensemble, runtime, encoding, batch_size, config.on_bad_image)
    if not batch_size:
        found = find_batch_size(
            annotator.predict,
            img_size=img_size,
            other_sizes=ensemble.other_sizes,
            device=runtime.device,
            max_size=max_batch_size,
        )
        annotator = replace(annotator, batch_size=found)
    if config.torchcompile != "off":
        compile_teachers(ensemble, mode=config.torchcompile, batch_size=annotator.batch_size)
    return annotator


def encoding_of(config: PrecomputeConfig | EncodingConfig, num_classes: int) -> Encoding:
    """Return the encoding of a config; raises ConfigError if it does not fit the classes."""
    return choose_encoding(
        num_classes,
        rate=config.rate,
        topk=config.topk,
        label_dtype=config.label_dtype,
        store_logits=config.store_logits,
    )
