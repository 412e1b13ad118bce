"""Labels read from any bits: they are refused, or each row is a distribution."""

import numpy as np
import pytest
import torch

from mealv2.errors import LabelSetError
from mealv2.soft_labels import EncodedLabels


def are_valid(labels: EncodedLabels) -> bool:
    """Return whether the strict check passes; what cannot be decoded does not pass it either."""
    try:
        dense = labels.to_dense()
    except LabelSetError:
        with pytest.raises(LabelSetError):
            labels.check()
        return False
    assert bool(torch.isfinite(dense).all())
    assert float(dense.min()) > 0.0
    np.testing.assert_allclose(dense.double().sum(1).numpy(), 1.0, atol=1e-5)
    try:
        labels.check()
    except LabelSetError:
        return False
    return True
