"""hubconf: the published torch.hub page runs unchanged, on the CPU, from this folder."""

import io
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torchvision import transforms

import cli
import published
from cases import mostly_slow
from mealv2.errors import ConfigError, MealError
from mealv2.models import released

ROOT = Path(cli.__file__).resolve().parent
HUB_NAMES = {  # as the hub page lists them
    "mealv1_resnest50": "resnet50",
    "mealv2_resnest50": "resnet50",
    "mealv2_resnest50_cutmix": "resnet50",
    "mealv2_resnest50_380x380": "resnet50",
    "mealv2_mobilenetv3_small_075": "tf_mobilenetv3_small_075",
    "mealv2_mobilenetv3_small_100": "tf_mobilenetv3_small_100",
    "mealv2_mobilenet_v3_large_100": "tf_mobilenetv3_large_100",
    "mealv2_efficientnet_b0": "tf_efficientnet_b0",
}

# Sends every https address to the server of this test, as http://127.0.0.1:PORT/HOST/PATH, and
# lets no connection go anywhere else. Nothing of torch.hub or of ours is replaced.
PRELUDE = """
import socket
import sys
import urllib.request

class ToLoopback(urllib.request.HTTPSHandler):
    def https_open(self, request):
        url = f"{sys.argv[1]}{request.host}{request.selector}"
        return self.parent.open(urllib.request.Request(url, method=request.get_method()))

urllib.request.install_opener(
    urllib.request.build_opener(urllib.request.ProxyHandler({}), ToLoopback)
)
connect = socket.socket.connect

def connect_here(self, address):
    assert address[0] == "127.0.0.1", address
    return connect(self, address)

socket.socket.connect = connect_here
"""

# The calls of the page, in its order and words.
PAGE = """
import torch
model = torch.hub.load('szq0214/MEAL-V2','meal_v2', 'mealv2_resnest50_cutmix', pretrained=True)
model.eval()

import urllib
url, filename = ("https://github.com/pytorch/hub/raw/master/images/dog.jpg", "dog.jpg")
try: urllib.URLopener().retrieve(url, filename)
except: urllib.request.urlretrieve(url, filename)

from PIL import Image
from torchvision import transforms
input_image = Image.open(filename)
preprocess = transforms.Compose([
    transforms.Resize(256),
    transforms.CenterCrop(224),
    transforms.ToTensor(),
    transforms.Normalize(mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225]),
])
input_tensor = preprocess(input_image)
input_batch = input_tensor.unsqueeze(0)

if torch.cuda.is_available():
    input_batch = input_batch.to('cuda')
    model.to('cuda')

with torch.no_grad():
    output = model(input_batch)
print(output[0])
probabilities = torch.nn.functional.softmax(output[0], dim=0)
print(probabilities)

with open("imagenet_classes.txt", "r") as f:
    categories = [s.strip() for s in f.readlines()]
top5_prob, top5_catid = torch.topk(probabilities, 5)
for i in range(top5_prob.size(0)):
    print(categories[top5_catid[i]], top5_prob[i].item())
"""

EPILOGUE = """
import mealv2
torch.save(
    {
        "output": output,
        "top5": [categories[i] for i in top5_catid],
        "top5_prob": top5_prob,
        "model": type(model).__module__ + "." + type(model).__name__,
        "devices": sorted({str(p.device) for p in model.parameters()}),
        "mealv2": mealv2.__file__,
        "entries": torch.hub.list("szq0214/MEAL-V2:master"),
    },
    "found.pt",
)
"""


def repository() -> bytes:
    """Return the archive GitHub makes of this folder, so far as torch.hub needs it."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.mkdir("szq0214-MEAL-V2-59e6bca")
        for path in [ROOT / "hubconf.py", *sorted((ROOT / "mealv2").rglob("*.py"))]:
            name = path.relative_to(ROOT).as_posix()
            archive.writestr(f"szq0214-MEAL-V2-59e6bca/{name}", path.read_bytes())
    return file.getvalue()


def photograph() -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (33, 44, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).resize((440, 330)).save(file, "jpeg")
    return file.getvalue()


@pytest.mark.slow
def test_the_published_page_runs_unchanged_on_the_cpu(tmp_path: Path) -> None:
    model = published.drawn("resnet50")
    categories = [f"category {number}" for number in range(1000)]
    (tmp_path / "imagenet_classes.txt").write_text("\n".join(categories))
    (tmp_path / "home" / "hub").mkdir(parents=True)
    (tmp_path / "home" / "hub" / "trusted_list").write_text("szq0214_MEAL-V2\n")  # a user's yes
    branches = [{"name": "master", "commit": {"sha": "59e6bca"}}]
    weights = "github.com/szq0214/MEAL-V2/releases/download/v1.0.0/MEALV2_ResNet50_224_cutmix.pth"
    files = {
        "api.github.com/repos/szq0214/MEAL-V2/branches": json.dumps(branches).encode(),
        "github.com/szq0214/MEAL-V2/zipball/master": repository(),
        weights: published.as_published(model),
        "github.com/pytorch/hub/raw/master/images/dog.jpg": photograph(),
    }
    with published.serving() as server:
        server.files |= files
        done = subprocess.run(
            [sys.executable, "-I", "-c", PRELUDE + PAGE + EPILOGUE, server.url],
            cwd=tmp_path,
            env={
                "TORCH_HOME": str(tmp_path / "home"),
                "OMP_NUM_THREADS": "1",
                "CUDA_VISIBLE_DEVICES": "",
            },
            capture_output=True,
            text=True,
            check=False,
        )
    assert done.returncode == 0, done.stderr
    assert server.asked == ["github.com/szq0214/MEAL-V2/tree/main/", *files]

    found = torch.load(tmp_path / "found.pt", weights_only=True)
    prepare = transforms.Compose(
        [
            transforms.Resize(256),
            transforms.CenterCrop(224),
            transforms.ToTensor(),
            transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )
    with torch.no_grad():
        expected = model(prepare(Image.open(io.BytesIO(photograph()))).unsqueeze(0))
    assert torch.equal(found["output"], expected)
    assert found["top5"] == [categories[i] for i in expected[0].topk(5).indices]
    assert torch.equal(found["top5_prob"], expected[0].softmax(0).topk(5).values)
    assert (found["model"], found["devices"]) == ("timm.models.resnet.ResNet", ["cpu"])
    assert found["entries"] == ["meal_v2"]
    hub = tmp_path / "home" / "hub"
    assert Path(found["mealv2"]).is_relative_to(hub / "szq0214_MEAL-V2_master")


# --- in this process ------------------------------------------------------------------------------


def load(name: str, **settings: object) -> torch.nn.Module:
    model = torch.hub.load(str(ROOT), "meal_v2", name, source="local", **settings)
    assert isinstance(model, torch.nn.Module)
    return model


@pytest.mark.parametrize("name", mostly_slow(HUB_NAMES, fast=2))
def test_without_weights_every_name_is_timms_plain_model(
    server: published.Server, name: str
) -> None:
    model, expected = load(name, pretrained=False), timm.create_model(HUB_NAMES[name])
    assert type(model) is type(expected)
    shapes, ours = ({k: v.shape for k, v in m.state_dict().items()} for m in (expected, model))
    assert ours == shapes
    assert {p.device.type for p in model.parameters()} == {"cpu"}
    assert server.asked == []


def test_weights_come_silently_where_no_progress_is_wanted(
    server: published.Server, capfd: pytest.CaptureFixture[str]
) -> None:
    model = published.drawn("tf_mobilenetv3_small_100")
    server.files["MEALV2_MobileNet_V3_Small_1.0_224.pth"] = published.as_published(model)
    loaded = load("mealv2_mobilenetv3_small_100", progress=False)
    assert capfd.readouterr().err == ""
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(loaded.eval()(images), model(images))


def test_progress_is_shown_by_default(
    server: published.Server, capfd: pytest.CaptureFixture[str]
) -> None:
    model = published.drawn("tf_mobilenetv3_small_075")
    server.files["MEALV2_MobileNet_V3_Small_0.75_224.pth"] = published.as_published(model)
    load("mealv2_mobilenetv3_small_075")
    assert "100%" in capfd.readouterr().err


def test_an_unknown_name_lists_all_of_them() -> None:
    with pytest.raises(ConfigError, match="unknown model 'mealv2_resnet18'; known: ") as caught:
        load("mealv2_resnet18")
    assert all(f"{name}" in str(caught.value) for name in released.NAMES)


def test_weights_that_cannot_be_had_end_in_one_line(server: published.Server) -> None:
    with pytest.raises(MealError, match=r"^cannot download .*404") as caught:
        load("mealv2_efficientnet_b0")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("exportable", [True, False])
def test_timm_builds_an_exportable_model_where_one_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, exportable: bool
) -> None:
    asked: list[bool] = []
    is_exportable = timm.layers.is_exportable

    def asking() -> bool:
        asked.append(is_exportable())
        return asked[-1]

    monkeypatch.setattr("timm.layers.create_act.is_exportable", asking)
    load("mealv2_mobilenetv3_small_075", pretrained=False, exportable=exportable)
    assert set(asked) == {exportable}
