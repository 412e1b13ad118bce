"""Classifiers: timm models with their normalisation, weights and metadata."""

from mealv2.models.classifier import (
    CONFIG_NAME,
    Classifier,
    Preprocessing,
    create_classifier,
    read_metadata,
    weights_sha256,
)
from mealv2.models.saving import save_classifier

__all__ = [
    "CONFIG_NAME",
    "Classifier",
    "Preprocessing",
    "create_classifier",
    "read_metadata",
    "save_classifier",
    "weights_sha256",
]
