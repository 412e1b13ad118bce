"""The label codec: probabilities to a few dozen bytes a view and back, on any device.

mealv2.codec.record describes the record byte by byte.
"""

from mealv2.codec.encoder import encode
from mealv2.codec.kept import Kept, to_device
from mealv2.codec.labels import EncodedLabels
from mealv2.codec.record import dense_rows

__all__ = ["EncodedLabels", "Kept", "dense_rows", "encode", "to_device"]
