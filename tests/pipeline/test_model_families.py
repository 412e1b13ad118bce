"""One small model of every architecture family of timm: trained, resumed, exported, reloaded."""

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.models import _registry

from mealv2.models import create_classifier
from pipeline.training.run_folder import checkpoint_paths

# Of each module of timm the model with the fewest parameters, and the smallest of 64, 96, 128, …
# pixels that it takes.
FAMILIES = {
    "beit": ("beit_base_patch16_224", 64),
    "byoanet": ("lambda_resnet26t", 64),
    "byobnet": ("test_byobnet", 64),
    "cait": ("cait_xxs24_224", 64),
    "cifar": ("cifar_mobilenet", 64),  # ours, registered with timm
    "coat": ("coat_tiny", 64),
    "convit": ("convit_tiny", 64),
    "convmixer": ("convmixer_768_32", 64),
    "convnext": ("test_convnext", 64),
    "cpubone": ("cpubone_nano", 64),
    "crossvit": ("crossvit_tiny_240", 240),
    "csatv2": ("csatv2", 64),
    "cspnet": ("cs3darknet_focus_s", 64),
    "cspnext": ("cspnext_tiny", 64),
    "davit": ("davit_tiny", 64),
    "deepseek_vit": ("deepseek_vit_412m", 224),
    "deit": ("deit_tiny_patch16_224", 64),
    "densenet": ("densenet121", 64),
    "dla": ("dla46x_c", 64),
    "dpn": ("dpn48b", 64),
    "edgenext": ("edgenext_xx_small", 64),
    "efficientformer": ("efficientformer_l1", 224),
    "efficientformer_v2": ("efficientformerv2_s0", 64),
    "efficientnet": ("test_efficientnet", 64),
    "efficientvim": ("efficientvim_m1", 64),
    "efficientvit_mit": ("efficientvit_b0", 64),
    "efficientvit_msra": ("efficientvit_m0", 64),
    "eva": ("vit_tiny_patch16_dinov3_qkvb", 64),
    "fasternet": ("fasternet_t0", 64),
    "fastvit": ("fastvit_t8", 64),
    "focalnet": ("focalnet_tiny_srf", 64),
    "gcvit": ("gcvit_xxtiny", 64),
    "gemma4_vit": ("gemma4_vit_570m", 96),
    "ghostnet": ("ghostnet_050", 64),
    "hardcorenas": ("hardcorenas_b", 64),
    "hgnet": ("hgnetv2_b0", 64),
    "hiera": ("hiera_tiny_224", 64),
    "hieradet_sam2": ("sam2_hiera_tiny", 64),
    "hrnet": ("hrnet_w18_small", 64),
    "iformer": ("iformer_t", 64),
    "inception_next": ("inception_next_atto", 64),
    "inception_resnet_v2": ("inception_resnet_v2", 96),
    "inception_v3": ("inception_v3", 96),
    "inception_v4": ("inception_v4", 96),
    "lcnetv2": ("lcnetv2_small", 64),
    "levit": ("levit_128s", 64),
    "lowformer": ("lowformer_b0", 64),
    "mambaout": ("test_mambaout", 64),
    "maxxvit": ("test_coatnet", 64),
    "metaformer": ("poolformerv2_s12", 64),
    "mlp_mixer": ("gmlp_ti16_224", 64),
    "mobilenetv3": ("lcnet_035", 64),
    "mobilenetv5": ("mobilenetv5_base", 64),
    "mobilevit": ("mobilevit_xxs", 64),
    "mvitv2": ("mvitv2_tiny", 64),
    "naflexvit": ("naflexvit_base_patch16_parfac_gap", 64),
    "nasnet": ("nasnetalarge", 64),
    "nest": ("nest_tiny", 64),
    "nextvit": ("nextvit_small", 64),
    "nfnet": ("test_nfnet", 64),
    "pit": ("pit_ti_224", 64),
    "pnasnet": ("pnasnet5large", 64),
    "pvt_v2": ("pvt_v2_b0", 64),
    "qwen3_vit": ("qwen3_vit_88m", 64),
    "rdnet": ("rdnet_tiny", 64),
    "regnet": ("regnetx_002", 64),
    "repghost": ("repghostnet_050", 64),
    "repvit": ("repvit_m1", 64),
    "res2net": ("res2next50", 64),
    "resnest": ("resnest14d", 64),
    "resnet": ("test_resnet", 64),
    "resnetv2": ("resnetv2_18", 64),
    "rexnet": ("rexnet_100", 64),
    "selecsls": ("selecsls42", 64),
    "senet": ("legacy_seresnet18", 64),
    "sequencer": ("sequencer2d_s", 64),
    "shvit": ("shvit_s1", 64),
    "sknet": ("skresnet18", 64),
    "starnet": ("starnet_s050", 64),
    "swiftformer": ("swiftformer_xs", 64),
    "swin_transformer": ("swin_tiny_patch4_window7_224", 64),
    "swin_transformer_v2": ("swinv2_tiny_window8_256", 64),
    "swin_transformer_v2_cr": ("swinv2_cr_tiny_224", 64),
    "tiny_vit": ("tiny_vit_5m_224", 64),
    "tnt": ("tnt_s_legacy_patch16_224", 64),
    "tresnet": ("tresnet_m", 64),
    "twins": ("twins_svt_small", 64),
    "vgg": ("vgg11", 64),
    "visformer": ("visformer_tiny", 64),
    "vision_transformer": ("test_vit", 64),
    "vision_transformer_hybrid": ("vit_tiny_r_s16_p8_224", 64),
    "vision_transformer_relpos": ("test_vit_relpos", 64),
    "vision_transformer_sam": ("samvit_base_patch16_224", 64),
    "vitamin": ("vitamin_small_224", 64),
    "volo": ("volo_d1_224", 64),
    "vovnet": ("ese_vovnet19b_slim_dw", 64),
    "xception": ("legacy_xception", 64),
    "xception_aligned": ("xception41p", 64),
    "xcit": ("xcit_nano_12_p8_224", 64),
}
# What has more parameters than a test needs gets fewer blocks; their code is the same.
_TWO_BLOCKS = {"depth": 2, "embed_dim": 96, "num_heads": 3}
FEWER_BLOCKS: dict[str, dict[str, Any]] = {
    "beit": _TWO_BLOCKS,
    "deepseek_vit": _TWO_BLOCKS,
    "gemma4_vit": _TWO_BLOCKS,
    "mobilenetv5": {"channel_multiplier": 0.25, "num_features": 256},
    "naflexvit": _TWO_BLOCKS,
    "nasnet": {"num_features": 1344, "stem_size": 32},
    "qwen3_vit": _TWO_BLOCKS,
    "vgg": {"mlp_ratio": 0.05},
    "vision_transformer_sam": {**_TWO_BLOCKS, "global_attn_indexes": (1,)},
}
# One of each kind of operator: convolution, attention, windows, mixers, recurrence.
ONNX = (
    *("byobnet", "convnext", "deit", "efficientnet", "mlp_mixer", "mobilenetv3", "regnet"),
    *("resnet", "swin_transformer", "vision_transformer"),
)
# Sizes that these cannot take.
REFUSED = {
    "test_vit": 30,
    "halonet_h1": 64,
    "crossvit": 96,
    "deepseek_vit": 64,
    "efficientformer": 64,
    "inception_resnet_v2": 64,
    "inception_v3": 64,
    "inception_v4": 64,
}
NAMES = {family: name for family, (name, _) in FAMILIES.items()}

Run = Callable[..., Any]


@pytest.fixture(scope="module")
def six_pictures(
    draw_tree: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> list[Any]:
    """Return the flags of a training of two steps, one an epoch."""
    root = draw_tree(tmp_path_factory.mktemp("six") / "data", num_train=2, num_val=0)
    flags = ["--data-dir", root, "--val-split", "none", "--batch-size", 6, "--workers", 0]
    return [*flags, "--no-pretrained", "--lr", 0.001, "--epochs", 2]


@pytest.fixture(autouse=True)
def fewer_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let timm build the models of FEWER_BLOCKS with these settings, whoever asks."""
    for family, settings in FEWER_BLOCKS.items():
        name = FAMILIES[family][0]
        smaller = partial(timm.models.model_entrypoint(name), **settings)
        monkeypatch.setitem(_registry._model_entrypoints, name, smaller)


def test_every_family_of_the_installed_timm_is_listed() -> None:
    assert sorted(FAMILIES) == sorted(timm.list_modules())


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_of_every_family_trains_resumes_and_is_exported(
    six_pictures: list[Any], tmp_path: Path, done: Run, family: str
) -> None:
    name, img_size = FAMILIES[family]
    run = tmp_path / "run"
    flags = [*six_pictures, "--img-size", img_size, "--model", name]
    done("finetune", *flags, "--output", run)
    weights = (run / "student" / "model.safetensors").read_bytes()

    before_last, last = checkpoint_paths(run)
    last.unlink()  # as if the run had been killed in its second epoch
    (run / "report.json").unlink(missing_ok=True)
    done("finetune", "--resume", run)
    assert [before_last, last] == checkpoint_paths(run)
    assert (run / "student" / "model.safetensors").read_bytes() == weights

    done("export", run, "--to", "timm", "--output", tmp_path / "timm")
    reloaded = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True).eval()
    trained = create_classifier(name, num_classes=3, checkpoint=run, img_size=img_size).eval()
    images = torch.randn(2, 3, img_size, img_size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(reloaded(images), trained.backbone(images))

    started = create_classifier(
        name, num_classes=5, checkpoint=run, img_size=img_size, new_head=True
    )
    assert any("new head for 5 classes, the file's has 3 classes" in n for n in started.notes)
    if family in ONNX:
        done("export", run, "--to", "onnx", "--output", tmp_path / "model.onnx")
    shutil.rmtree(tmp_path)


@pytest.mark.parametrize(
    "family",
    [pytest.param(f, marks=[] if f == "test_vit" else pytest.mark.slow) for f in REFUSED],
)
def test_a_size_that_a_model_cannot_take_is_one_line_before_the_run_folder(
    six_pictures: list[Any], tmp_path: Path, run_cli: Run, family: str
) -> None:
    name, img_size = NAMES.get(family, family), REFUSED[family]
    flags = [*six_pictures, "--img-size", img_size, "--model", name]
    result = run_cli("finetune", *flags, "--output", tmp_path / "run")
    assert result.code == 2
    (line,) = [line for line in result.stderr.splitlines() if "cannot be" in line]
    assert f"model {name} cannot be" in line
    assert f"at --img-size {img_size}: " in line
    assert not line.endswith("Error")
    assert not (tmp_path / "run").exists()
