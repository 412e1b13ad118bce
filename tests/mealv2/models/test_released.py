"""released: the table, the download; released models to evaluate, as student, as teacher."""

import hashlib
import re
import shlex
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor, nn
from torchvision import transforms
from torchvision.datasets import ImageFolder

import cli
import hubconf
import published
from conftest import Result
from mealv2.errors import ConfigError, MealError
from mealv2.models import Preprocessing, create_classifier, read_metadata, released
from mealv2.storage.json_format import read_json
from pipeline import config
from pipeline.labelling import teachers
from pipeline.runtime.device import Runtime

Run = Callable[..., Result]

ROOT = Path(cli.__file__).resolve().parent

IMAGENET = Preprocessing((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
SMALL = "mealv2_mobilenetv3_small_075"
SMALL_FILE = "MEALV2_MobileNet_V3_Small_0.75_224.pth"
SMALL_TIMM = "tf_mobilenetv3_small_075"
CLASSES = tuple(f"n{number:08d}" for number in range(1000))

# hub name, right spelling, spelling with the size; architecture, file, size, top-1, top-5: the
# paper's table and the hub page, written down a second time
TABLE = """
mealv1_resnest50 mealv1_resnet50 mealv1_resnet50_224
    resnet50 MEALV1_ResNet50_224.pth 224 78.21 94.01
mealv2_resnest50 mealv2_resnet50 mealv2_resnet50_224
    resnet50 MEALV2_ResNet50_224.pth 224 80.67 95.09
mealv2_resnest50_cutmix mealv2_resnet50_cutmix mealv2_resnet50_cutmix_224
    resnet50 MEALV2_ResNet50_224_cutmix.pth 224 80.98 95.35
mealv2_resnest50_380x380 mealv2_resnet50_380x380 mealv2_resnet50_380
    resnet50 MEALV2_ResNet50_380.pth 380 81.72 95.81
mealv2_mobilenetv3_small_075 mealv2_mobilenetv3_small_075 mealv2_mobilenetv3_small_075_224
    tf_mobilenetv3_small_075 MEALV2_MobileNet_V3_Small_0.75_224.pth 224 67.60 87.23
mealv2_mobilenetv3_small_100 mealv2_mobilenetv3_small_100 mealv2_mobilenetv3_small_100_224
    tf_mobilenetv3_small_100 MEALV2_MobileNet_V3_Small_1.0_224.pth 224 69.65 88.71
mealv2_mobilenet_v3_large_100 mealv2_mobilenetv3_large_100 mealv2_mobilenetv3_large_100_224
    tf_mobilenetv3_large_100 MEALV2_MobileNet_V3_Large_1.0_224.pth 224 76.92 93.32
mealv2_efficientnet_b0 mealv2_efficientnet_b0 mealv2_efficientnet_b0_224
    tf_efficientnet_b0 MEALV2_EfficientNet_B0_224.pth 224 78.29 93.95
"""
ROWS = [list(row) for row in zip(*[iter(TABLE.split())] * 8, strict=True)]


@pytest.fixture(scope="module")
def small() -> nn.Module:
    return published.drawn(SMALL_TIMM)


@pytest.fixture
def small_file(small: nn.Module, tmp_path: Path) -> Path:
    """The authors' file of the smallest model, fetched by hand."""
    path = tmp_path / SMALL_FILE
    path.write_bytes(published.as_published(small))
    return path


@pytest.fixture
def images() -> Tensor:
    return torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def logits(model: nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad():
        return model.eval()(images)


def normalised(images: Tensor, preprocessing: Preprocessing = IMAGENET) -> Tensor:
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (preprocessing.mean, preprocessing.std))
    return (images - mean) / std


# --- the table ------------------------------------------------------------------------------------


@pytest.mark.parametrize("spelling", [0, 1, 2], ids=["hub", "right", "sized"])
@pytest.mark.parametrize("row", ROWS, ids=[row[2] for row in ROWS])
def test_every_spelling_names_the_published_model(row: list[str], spelling: int) -> None:
    architecture, file_name, img_size, top1, top5 = row[3:]
    model = released.find(row[spelling])
    assert model is not None
    assert model is released.by_file(file_name)
    assert model.architecture.split(".")[0] == architecture
    assert (model.img_size, model.top1, model.top5) == (int(img_size), float(top1), float(top5))
    folder = "https://github.com/szq0214/MEAL-V2/releases/download/v1.0.0/"
    assert model.url == folder + file_name


def test_there_are_eight_models_and_no_name_means_two() -> None:
    assert len(ROWS) == len(released.RELEASED) == 8
    assert len(released.NAMES) == len({name for row in ROWS for name in row[:3]})
    assert not any(timm.is_model(name) for name in released.NAMES)


@pytest.mark.parametrize("name", ["resnet50", "mealv2", "mealv2_resnet50_384", "MEAL_resnet50"])
def test_no_other_name_or_file_is_a_released_model(name: str) -> None:
    assert released.find(name) is None
    assert released.by_file(f"{name}.pth") is None


def test_a_misspelt_name_suggests_the_right_one() -> None:
    with pytest.raises(ConfigError, match=r"unknown model 'mealv2_resnet50_22'.*mealv2_resnet50"):
        create_classifier("mealv2_resnet50_22", num_classes=None)


@pytest.mark.parametrize("name", [row[1] for row in ROWS])
def test_every_architecture_takes_imagenet_statistics_here_and_for_timm(name: str) -> None:
    model = create_classifier(name, num_classes=None, pretrained=False)
    assert model.preprocessing == IMAGENET
    config = timm.data.resolve_model_data_config(model.backbone, use_test_size=True)
    assert (config["mean"], config["std"]) == (IMAGENET.mean, IMAGENET.std)
    size = 380 if "380" in name else 224
    assert (config["input_size"], config["crop_pct"]) == ((3, size, size), 224 / 256)
    assert config["interpolation"] == "bilinear"


# --- docs/how-to/released-models.md -------------------------------------------------------------

DOCS = (ROOT / "docs" / "how-to" / "released-models.md").read_text(encoding="utf-8")


def test_the_documents_table_is_this_one() -> None:
    rows = [re.split(r"[`| ]+", line)[1:-1] for line in DOCS.splitlines() if line.startswith("| `")]
    assert rows == [[right, hub, *rest] for hub, right, _, _, *rest in ROWS]


@pytest.mark.parametrize("line", re.findall(r"^mealv2 .*$", DOCS, flags=re.MULTILINE))
def test_the_documents_commands_are_accepted(line: str, tmp_path: Path) -> None:
    _, name, *flags = shlex.split(line)
    command = cli.cli.commands[name]
    values = command.make_context(name, flags).params
    values.pop("config_file")
    settings = getattr(config, f"{name.title()}Config").from_json(values)
    for word in re.findall(r"\bmealv\d\w+", line.removeprefix("mealv2")):
        assert released.find(word)
    assert settings.data_dir


def test_the_documents_python_runs(
    server: published.Server, monkeypatch: pytest.MonkeyPatch, images: Tensor
) -> None:
    expected = published.drawn("resnet50")
    server.files["MEALV2_ResNet50_224.pth"] = published.as_published(expected)
    monkeypatch.chdir(ROOT)
    models = []
    for code in re.findall(r"^```python\n(.*?)^```$", DOCS, flags=re.MULTILINE | re.DOTALL):
        names: dict[str, nn.Module] = {}
        exec(compile(code, "released-models.md", "exec"), names)
        models.append(names["model"])
    hub, plain = models
    assert torch.equal(logits(hub, normalised(images)), logits(expected, normalised(images)))
    assert torch.equal(logits(plain, images), logits(expected, normalised(images)))


# --- building one ---------------------------------------------------------------------------------


def test_a_name_brings_the_published_weights_and_fetches_them_once(
    server: published.Server, small: nn.Module, images: Tensor
) -> None:
    server.files[SMALL_FILE] = published.as_published(small)
    for _ in range(2):
        model = create_classifier(SMALL, num_classes=None, pretrained=True)
        assert torch.equal(logits(model, images), logits(small, normalised(images)))
        assert model.tag == f"{SMALL_TIMM}.{SMALL}_224"
    assert server.asked == [SMALL_FILE]


@pytest.mark.parametrize("model", [SMALL, SMALL_TIMM])
def test_a_file_known_by_its_name_takes_imagenet_statistics(
    small_file: Path, small: nn.Module, images: Tensor, model: str
) -> None:
    loaded = create_classifier(model, num_classes=1000, checkpoint=small_file)
    assert loaded.preprocessing == IMAGENET
    assert torch.equal(logits(loaded, images), logits(small, normalised(images)))
    given = Preprocessing((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    loaded = create_classifier(model, num_classes=1000, checkpoint=small_file, preprocessing=given)
    assert loaded.preprocessing == given


@pytest.mark.parametrize("row", ROWS, ids=[row[2] for row in ROWS])
def test_a_files_name_says_what_it_is(tmp_path: Path, row: list[str]) -> None:
    (tmp_path / row[4]).touch()
    stored = read_metadata(tmp_path / row[4])
    architecture = stored.pop("architecture")
    assert architecture.split(".")[0] == row[3]
    mean, std = map(list, (IMAGENET.mean, IMAGENET.std))
    assert stored == {"img_size": int(row[5]), "mean": mean, "std": std}


def test_the_same_file_by_another_name_is_any_file(small_file: Path) -> None:
    other = small_file.rename(small_file.with_name("other.pth"))
    assert read_metadata(other) == {}
    loaded = create_classifier(SMALL_TIMM, num_classes=1000, checkpoint=other)
    assert loaded.preprocessing.mean == (0.5, 0.5, 0.5)
    assert loaded.tag == SMALL_TIMM


def test_another_class_count_means_a_new_head_and_nothing_else(
    server: published.Server, small: nn.Module
) -> None:
    server.files[SMALL_FILE] = published.as_published(small)
    model = create_classifier(SMALL, num_classes=3, pretrained=True)
    assert model.num_classes == 3
    theirs, ours = small.state_dict(), model.backbone.state_dict()
    different = [key for key in theirs if not torch.equal(theirs[key], ours[key])]
    assert different == ["classifier.weight", "classifier.bias"]


def test_a_file_gets_a_new_head_only_where_one_is_asked_for(small_file: Path) -> None:
    with pytest.raises(ConfigError, match=r"classifier\.\w+ is \(1000.*, the model has \(3"):
        create_classifier(SMALL, num_classes=3, checkpoint=small_file)
    model = create_classifier(SMALL, num_classes=3, checkpoint=small_file, new_head=True)
    assert model.num_classes == 3
    other = small_file.rename(small_file.with_name("other.pth"))
    model = create_classifier(SMALL, num_classes=3, checkpoint=other, new_head=True)
    assert "new head for 3 classes, the file's has 1000 classes" in " ".join(model.notes)


@pytest.mark.parametrize("name", ["MEALV2_ResNest50", "MealV2_resnet50_224", "MEALV1_RESNEST50"])
def test_capitals_of_a_name_do_not_count(name: str) -> None:  # as in the official hubconf
    found = released.find(name)
    assert found is not None
    assert name.lower() in found.names


# --- the hash of a file -------------------------------------------------------------------------


def test_the_sha256_of_a_file_is_noted_and_can_be_pinned(
    server: published.Server, small: nn.Module
) -> None:
    server.files[SMALL_FILE] = data = published.as_published(small)
    sha256 = hashlib.sha256(data).hexdigest()
    for pin in ("", f"@sha256:{sha256}", f"@sha256:{sha256[:8].upper()}"):
        model = create_classifier(SMALL + pin, num_classes=None, pretrained=True)
        assert model.notes[0].endswith(f"{SMALL_FILE}: SHA-256 {sha256}")
        assert model.tag == f"{SMALL_TIMM}.{SMALL}_224"  # a label set does not depend on the pin
    other = "0" * 64
    refused = rf"{SMALL_FILE} has SHA-256 {sha256}, not @sha256:{other}"
    with pytest.raises(ConfigError, match=refused):
        create_classifier(f"{SMALL}@sha256:{other}", num_classes=None, pretrained=True)
    with pytest.raises(ConfigError, match=refused):
        hubconf.meal_v2(f"{SMALL}@sha256:{other}")


def test_a_pin_holds_for_any_file_and_needs_one(small_file: Path) -> None:
    sha256 = hashlib.sha256(small_file.read_bytes()).hexdigest()
    create_classifier(f"{SMALL_TIMM}@sha256:{sha256}", num_classes=None, checkpoint=small_file)
    with pytest.raises(ConfigError, match=rf"not @sha256:{'1' * 8}$"):
        create_classifier(f"{SMALL_TIMM}@sha256:{'1' * 8}", num_classes=None, checkpoint=small_file)
    with pytest.raises(ConfigError, match=r"pins a weights file, but .* is used without one"):
        create_classifier(f"{SMALL_TIMM}@sha256:{sha256}", num_classes=3)


@pytest.mark.parametrize("pin", ["", "abc", "g" * 64, "0" * 65])
def test_a_pin_that_is_no_hash_is_refused(pin: str) -> None:
    with pytest.raises(ConfigError, match="write NAME@sha256:HEX, 8 to 64 hexadecimal digits"):
        create_classifier(f"{SMALL}@sha256:{pin}", num_classes=None, pretrained=True)


def test_an_all_zero_file_in_the_cache_is_refused(
    server: published.Server, small: nn.Module
) -> None:
    zeros = {key: torch.zeros_like(value) for key, value in small.state_dict().items()}
    path = Path(torch.hub.get_dir()) / "checkpoints" / SMALL_FILE
    path.parent.mkdir(parents=True)
    torch.save(zeros, path)
    for build in (
        lambda: create_classifier(SMALL, num_classes=None, pretrained=True, img_size=64),
        lambda: hubconf.meal_v2(SMALL),
    ):
        with pytest.raises(ConfigError, match=f"{SMALL_FILE} has the right shapes but no content"):
            build()


# --- the download ---------------------------------------------------------------------------------


def contents(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("trouble", ["missing", "torn", "a page", "nobody there"])
def test_a_download_that_fails_says_what_to_do_and_leaves_nothing(
    server: published.Server,
    small: nn.Module,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    trouble: str,
) -> None:
    reason = "the file is damaged or has no weights"
    if trouble == "missing":
        reason = "HTTP Error 404: Not Found"
    elif trouble == "torn":
        server.files[SMALL_FILE] = published.as_published(small)
        server.torn.add(SMALL_FILE)
    elif trouble == "a page":
        server.files[SMALL_FILE] = b"<!DOCTYPE html><title>Log in to the hotel's network</title>"
    else:
        with socket.create_server(("127.0.0.1", 0)) as closed:
            port = closed.getsockname()[1]
        monkeypatch.setattr(released, "BASE_URL", f"http://127.0.0.1:{port}/")
        reason = ".*refused.*"
    with pytest.raises(MealError) as caught:
        create_classifier(SMALL, num_classes=None, pretrained=True)
    said = str(caught.value)
    assert re.match(
        rf"cannot download {released.BASE_URL}{SMALL_FILE} \({reason}\); download it by", said
    )
    assert "--checkpoint FILE, --initial-checkpoint FILE" in said
    assert str(tmp_path / "hub" / "checkpoints") in said
    assert "\n" not in said
    assert contents(tmp_path) == []


def test_a_file_put_into_the_folder_by_hand_is_taken(
    server: published.Server, small: nn.Module, tmp_path: Path
) -> None:
    path = tmp_path / "hub" / "checkpoints" / SMALL_FILE
    path.parent.mkdir(parents=True)
    path.write_bytes(published.as_published(small))
    model = released.find(SMALL)
    assert model is not None
    assert released.download(model) == path
    assert server.asked == []


# --- in the stages --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def imagenet(draw_tree: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A thousand classes of one image each."""
    root = tmp_path_factory.mktemp("imagenet") / "data"
    return draw_tree(root, classes=CLASSES, num_train=0, num_val=1)


def cross_entropy(data_dir: Path, model: nn.Module, img_size: int, images: int = 1000) -> float:
    """The loss over the first images of val as the official inference.py prepares them."""
    prepare = transforms.Compose(
        [
            transforms.Resize(int(256 / 224 * img_size)),
            transforms.CenterCrop(img_size),
            transforms.ToTensor(),
            transforms.Normalize(IMAGENET.mean, IMAGENET.std),
        ]
    )
    rows = ImageFolder(str(data_dir / "val"), prepare, allow_empty=True)
    pixels, labels = zip(*(rows[number] for number in range(images)), strict=True)
    found = logits(model, torch.stack(pixels)).double()
    return float(nn.functional.cross_entropy(found, torch.tensor(labels)))


@pytest.mark.slow
def test_evaluate_runs_a_released_model_by_name(
    server: published.Server, small: nn.Module, imagenet: Path, done: Run
) -> None:
    server.files[SMALL_FILE] = published.as_published(small)
    flags = ["--model", f"{SMALL}_224", "--data-dir", imagenet, "--img-size", 64, "--workers", 0]
    report = done("evaluate", *flags, "--json").report
    assert (report["num_images"], report["model"]) == (1000, f"{SMALL_TIMM}.{SMALL}_224")
    expected = cross_entropy(imagenet, small, 64)
    assert report["cross_entropy"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("by", ["name", "file"])
def test_evaluate_knows_the_size_of_a_released_model(
    server: published.Server,
    draw_tree: Callable[..., Path],
    tmp_path: Path,
    done: Run,
    by: str,
) -> None:
    data_dir = draw_tree(tmp_path / "data", classes=CLASSES, num_train=0, num_val=1)
    for name in CLASSES[3:]:
        (data_dir / "val" / name / "00.jpg").write_bytes(b"")  # a thousand would take minutes
    model = published.drawn("resnet50")
    file = published.as_published(model)
    if by == "name":
        server.files["MEALV2_ResNet50_380.pth"] = file
        flags: list[object] = ["--model", "mealv2_resnest50_380x380"]
    else:
        (tmp_path / "MEALV2_ResNet50_380.pth").write_bytes(file)
        flags = ["--checkpoint", tmp_path / "MEALV2_ResNet50_380.pth"]
    flags += ["--data-dir", data_dir, "--on-bad-image", "skip", "--workers", 0]
    report = done("evaluate", *flags, "--json").report
    assert (report["img_size"], report["num_images"]) == (380, 3)
    assert report["model"] == "resnet50.mealv2_resnet50_380"
    expected = cross_entropy(data_dir, model, 380, images=3)
    assert report["cross_entropy"] == pytest.approx(expected, rel=1e-5)


def test_evaluate_refuses_data_of_another_class_count(
    server: published.Server, small: nn.Module, small_file: Path, data_dir: Path, run_cli: Run
) -> None:
    server.files[SMALL_FILE] = published.as_published(small)
    result = run_cli("evaluate", "--model", SMALL, "--data-dir", data_dir)
    assert (result.code, result.stdout) == (2, "")
    assert f"{SMALL} has 1000 classes, {data_dir}/val has 3" in result.stderr
    result = run_cli("evaluate", "--checkpoint", small_file, "--data-dir", data_dir)
    assert result.code == 2
    assert "another class count?" in result.stderr


def test_evaluate_without_a_model_knows_no_other_file(
    small_file: Path, data_dir: Path, run_cli: Run
) -> None:
    other = small_file.rename(small_file.with_name("other.pth"))
    result = run_cli("evaluate", "--checkpoint", other, "--data-dir", data_dir)
    assert result.code == 2
    assert "other.pth does not name its model; give --model" in result.stderr


@pytest.mark.parametrize("by", ["name", "file"])
def test_a_student_starts_from_a_released_model(
    server: published.Server,
    small: nn.Module,
    small_file: Path,
    data_dir: Path,
    tmp_path: Path,
    done: Run,
    by: str,
) -> None:
    if by == "name":
        server.files[SMALL_FILE] = published.as_published(small)
        start: list[object] = ["--model", f"{SMALL}_224", "--pretrained"]
    else:
        start = ["--model", SMALL_TIMM, "--initial-checkpoint", small_file]
    flags = ["--data-dir", data_dir, "--img-size", 32, "--epochs", 1, "--lr", 0, "--workers", 0]
    done("finetune", *flags, *start, "--output", tmp_path / "run")

    config = read_json(tmp_path / "run" / "student" / "config.json")
    assert config["architecture"] == SMALL_TIMM
    assert tuple(config["pretrained_cfg"]["mean"]) == IMAGENET.mean
    assert tuple(config["pretrained_cfg"]["std"]) == IMAGENET.std
    student = create_classifier(SMALL_TIMM, num_classes=3, checkpoint=tmp_path / "run")
    assert student.preprocessing == IMAGENET
    assert torch.equal(student.backbone.conv_stem.weight, small.conv_stem.weight)


@pytest.mark.parametrize("by", ["name", "file"])
def test_a_released_model_is_a_teacher_of_a_thousand_classes(
    server: published.Server, small: nn.Module, small_file: Path, by: str
) -> None:
    server.files[SMALL_FILE] = published.as_published(small)
    spec = SMALL if by == "name" else f"{SMALL_TIMM}={small_file}"
    cpu = Runtime(torch.device("cpu"), None)
    _, (described,) = teachers.build([spec], classes=CLASSES, img_size=32, runtime=cpu)
    assert described["model"] == f"{SMALL_TIMM}.{SMALL}_224"
    assert (tuple(described["mean"]), tuple(described["std"])) == (IMAGENET.mean, IMAGENET.std)
    with pytest.raises(ConfigError, match=r"has 1000 classes|another class count"):
        teachers.build([spec], classes=CLASSES[:3], img_size=32, runtime=cpu)
