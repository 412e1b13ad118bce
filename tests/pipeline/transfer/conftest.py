"""Commands that transfer small models to the tree of drawn images."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def transfer_flags(training_flags: list[str]) -> list[str]:
    """`mealv2 transfer` on the tree, all but --mode, the start and --output."""
    return ["transfer", *training_flags]


@pytest.fixture(scope="session")
def start(teacher_dirs: dict[str, Path]) -> list[str]:
    """``--initial-checkpoint`` of a model that was trained on the tree for some steps."""
    return ["--initial-checkpoint", str(teacher_dirs["test_resnet"])]
