"""benchmarks/imagenet_samples.py on drawn pictures and small models of 1,000 classes."""

import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks import imagenet_samples
from benchmarks.efficientnet_lite_weights import imagenet_classes
from benchmarks.imagenet_samples import Model, Settings, arrange, document
from mealv2.errors import ConfigError

WNIDS = ("n01440764", "n02124075", "n15075141")  # the first, one between, the last


def jpeg(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (40, 56, 3), dtype=np.uint8)
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, "JPEG")
    return data.getvalue()


@pytest.fixture
def samples(tmp_path: Path) -> Path:
    folder = tmp_path / "samples"
    folder.mkdir()
    for number, wnid in enumerate(WNIDS):
        (folder / f"{wnid}_thing.JPEG").write_bytes(jpeg(number))
    return folder


def test_a_folder_a_tree_and_a_tar_file_are_the_same_pictures(
    samples: Path, tmp_path: Path
) -> None:
    tree = tmp_path / "tree"
    with tarfile.open(tmp_path / "samples.tar", "w") as tar:
        for path in sorted(samples.iterdir()):
            tar.add(path, path.name)
            (tree / path.name[:9]).mkdir(parents=True)
            (tree / path.name[:9] / path.name).write_bytes(path.read_bytes())
    for number, path in enumerate((samples, tree, tmp_path / "samples.tar")):
        out = tmp_path / str(number)
        assert arrange(path, out, 2) == arrange(path, out, 2) == 3
        found = {file.relative_to(out).as_posix(): file.read_bytes() for file in out.rglob("*.*")}
        classes = found.pop("classes.txt").decode().split()
        assert classes == sorted(imagenet_classes())
        assert len(classes) == 1000
        assert found == {
            f"{split}/{wnid}/{wnid}_thing.JPEG": (samples / f"{wnid}_thing.JPEG").read_bytes()
            for split, wnids in {"val": WNIDS, "some": WNIDS[:2]}.items()
            for wnid in wnids
        }


@pytest.mark.parametrize("name", ["tench.JPEG", "n99999999_tench.JPEG", "xn01440764_tench.JPEG"])
def test_a_picture_without_an_imagenet_class_is_an_error(
    samples: Path, tmp_path: Path, name: str
) -> None:
    (samples / name).write_bytes(jpeg(9))
    with pytest.raises(ConfigError, match=f"{name} has no WordNet id"):
        arrange(samples, tmp_path / "out", 3)


def test_pictures_of_another_call_are_an_error(samples: Path, tmp_path: Path) -> None:
    arrange(samples, tmp_path / "out", 3)
    (samples / "n01440764_thing.JPEG").unlink()
    with pytest.raises(ConfigError, match="give another --output"):
        arrange(samples, tmp_path / "out", 3)


def test_missing_weights_are_one_line_that_names_the_script(samples: Path, tmp_path: Path) -> None:
    words = [samples, "--weights", tmp_path / "none", "--output", tmp_path / "out"]
    with pytest.raises(SystemExit, match=r"efficientnet_lite_weights\.py makes it"):
        imagenet_samples.main([str(word) for word in words])


@pytest.mark.slow
def test_the_tables_have_figures_and_a_second_call_runs_nothing(
    samples: Path,
    tmp_path: Path,
    make_model: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(imagenet_samples, "SIMULATED_IMAGES", 50)
    classes = tuple(imagenet_classes())
    models = [
        Model(name, make_model(name, seed=seed, classes=classes, img_size=size), size)
        for seed, (name, size) in enumerate({"test_resnet": 32, "test_efficientnet": 48}.items())
    ]
    rows = tmp_path / "others.npz"
    np.savez(rows, probs=np.full((4, 2, 1000), 0.001, dtype=np.float32))
    settings = Settings(
        tmp_path / "out",
        models,
        img_size=32,
        num_views=2,
        num_some=2,
        rows=[rows],
        in_this_process=True,
    )
    text = document(samples, settings)
    messages = capsys.readouterr().err
    assert text.startswith("3 pictures; ")
    for line in (
        "| model | top-1 / top-5 % at 32 | own size | top-1 / top-5 % |",
        "| **these pictures** | 6 | 0.0",
        "| others | 8 | 0.001 |",
        "| simulated base | **0.001** | ",
        "| 1 process, 1 thread | another process, 1 thread | 2 | ",
        "| 2 processes, 1 thread each | another process, 2 threads | 2 | ",
    ):
        assert line in text
    agreed = [line.split(" | ") for line in text.splitlines() if "another process" in line]
    assert len(agreed) == 6
    assert {cells[4] for cells in agreed} == {"0.0e+00"}
    assert {cells[6].strip(" |") for cells in agreed} == {"100.0"}
    assert messages.count("mealv2 ") == 16
    assert document(samples, settings) == text
    assert capsys.readouterr().err == ""
