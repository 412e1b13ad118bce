"""Commands that transfer small models to the tree of drawn images."""

from pathlib import Path

import pytest

from conftest import IMG_SIZE


@pytest.fixture(scope="session")
def transfer_flags(data_dir: Path) -> list[str]:
    """`mealv2 transfer` on the tree, all but --mode, the start and --output."""
    settings = {
        "--data-dir": data_dir,
        "--model": "test_resnet",
        "--img-size": IMG_SIZE,
        "--epochs": 2,
        "--batch-size": 12,
        "--workers": 0,
        "--log-interval": 1,
    }
    return ["transfer", *(str(part) for item in settings.items() for part in item)]


@pytest.fixture(scope="session")
def start(teacher_dirs: dict[str, Path]) -> list[str]:
    """``--initial-checkpoint`` of a model that was trained on the tree for some steps."""
    return ["--initial-checkpoint", str(teacher_dirs["test_resnet"])]
