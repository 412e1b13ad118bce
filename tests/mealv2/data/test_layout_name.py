"""mealv2.data.layout_name: what a wrong folder's message says."""

from pathlib import Path

import pytest

from mealv2.data.layout_name import layout_name
from mealv2.errors import ConfigError


def test_the_folder_above_names_the_one_below(tmp_path: Path) -> None:
    (tmp_path / "VOCdevkit/VOC2007/ImageSets/Main").mkdir(parents=True)
    named = layout_name(Path(f"voc2007:{tmp_path}/VOCdevkit"))
    assert named is not None
    with pytest.raises(ConfigError, match=r"name voc2007:.*VOCdevkit/VOC2007$"):
        named.check(["train"])


def test_a_missing_folder_is_said_to_be_missing(tmp_path: Path) -> None:
    named = layout_name(Path(f"cub200:{tmp_path}/CUB"))
    assert named is not None
    with pytest.raises(ConfigError, match=r"no folder .*CUB$"):
        named.check(["train"])
