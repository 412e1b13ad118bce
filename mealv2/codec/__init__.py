"""The label codec: probabilities to a few dozen bytes a view and back, on any device.

The record is described in mealv2.codec.record, byte by byte; encode on the device of the softmax,
decode there or in NumPy.
"""

from mealv2.codec.encoder import encode
from mealv2.codec.labels import EncodedLabels, to_device
from mealv2.codec.record import dense_rows
from mealv2.codec.tensors import Kept

__all__ = ["EncodedLabels", "Kept", "dense_rows", "encode", "to_device"]
