"""The files of a Gradio Space that classifies pictures with a model on the Hub."""

import json

APP = '''"""Classify a picture with the model {repo}."""

import timm
import torch
from PIL import Image

MODEL = {quoted}

model = timm.create_model(f"hf-hub:{{MODEL}}", pretrained=True).eval()
data_config = timm.data.resolve_data_config(model=model)
transform = timm.data.create_transform(**data_config, is_training=False)
names = model.pretrained_cfg["label_names"]
if len(set(names)) < len(names):  # a label of the app needs a name of its own
    names = [f"{{name}} ({{number}})" for number, name in enumerate(names)]


@torch.inference_mode()
def predict(image: Image.Image | None) -> dict[str, float]:
    """Return the probability of each class."""
    if image is None:
        return {{}}
    batch_BCHW = transform(image.convert("RGB")).unsqueeze(0)
    return dict(zip(names, model(batch_BCHW).softmax(1)[0].tolist(), strict=True))


if __name__ == "__main__":
    import gradio

    gradio.Interface(
        predict,
        gradio.Image(type="pil", label="Picture"),
        gradio.Label(num_top_classes=5, label="Class"),
        title=MODEL,
        flagging_mode="never",
    ).launch()
'''

# A Space runs on a CPU unless its owner chooses a GPU, and has Gradio.
REQUIREMENTS = """--extra-index-url https://download.pytorch.org/whl/cpu
torch
torchvision
timm>=1.0.20
"""

_README = """---
title: {title}
emoji: 🔍
colorFrom: blue
colorTo: green
sdk: gradio
app_file: app.py
pinned: false
models:
- {quoted}
tags:
- image-classification
- timm
- mealv2
{licence}---

Classifies pictures with [{repo}](https://huggingface.co/{repo}).
"""


def files(repo: str, licence: str | None) -> dict[str, bytes]:
    """Return the files of the Space of a model, USER/NAME, by name."""
    quoted = json.dumps(repo)  # a string of Python and of YAML
    readme = _README.format(
        title=json.dumps(repo.partition("/")[2]),
        quoted=quoted,
        repo=repo,
        licence=f"license: {json.dumps(licence)}\n" if licence else "",
    )
    texts = {
        "README.md": readme,
        "app.py": APP.format(repo=repo, quoted=quoted),
        "requirements.txt": REQUIREMENTS,
    }
    return {name: text.encode() for name, text in texts.items()}
