"""pipeline.config: bounds, defaults, schedules, and settings that would have no effect."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from timm.optim import list_optimizers

from mealv2.errors import ConfigError
from pipeline import config as configs
from pipeline.config import (
    OPTIMIZERS,
    DistillConfig,
    EvaluateConfig,
    ExportConfig,
    FinetuneConfig,
    PrecomputeConfig,
    PredictConfig,
    check_optimizer,
)

REQUIRED: dict[type[configs.Settings], dict[str, Any]] = {
    PrecomputeConfig: {"data_dir": Path("/d"), "output": Path("/o"), "teacher": ("a", "b=c")},
    DistillConfig: {"data_dir": Path("/d"), "labels": Path("/l"), "model": "m"},
    FinetuneConfig: {"data_dir": Path("/d"), "model": "m"},
    EvaluateConfig: {"data_dir": Path("/d"), "model": "m"},
    PredictConfig: {"image": (Path("/i"), Path("/j")), "model": "m"},
    ExportConfig: {"run": Path("/r"), "to": "timm"},
    configs.PushConfig: {"run": Path("/r"), "to": "hf://ant-lab/tiny"},
}
OTHERS: dict[type[configs.Settings], dict[str, Any]] = {
    configs.BenchConfig: {},
    configs.SlurmDistillConfig: {"flags": ("--seed", "1")},
}
EVERY = pytest.mark.parametrize("kind", REQUIRED, ids=lambda kind: kind.__name__)


def make(kind: type[configs.Settings], **values: Any) -> Any:
    return kind(**(REQUIRED | OTHERS)[kind] | values)


@EVERY
def test_a_config_is_frozen(kind: type[configs.Settings]) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        make(kind).workers = 1


@EVERY
def test_every_field_explains_itself(kind: type[configs.Settings]) -> None:
    for field in dataclasses.fields(kind):
        assert field.metadata["help"].endswith("."), field.name
        if field.default is None:
            assert field.metadata["shown"], f"{field.name}: what does None mean?"


@EVERY
def test_json_there_and_back_is_the_same_config(kind: type[configs.Settings]) -> None:
    triple = {"mean": (0.1, 0.2, 0.3), "std": (1.0, 2.0, 3.0)}
    extra: dict[type, dict[str, Any]] = {
        DistillConfig: {"decay_milestones": (3, 5), "resume": Path("/r"), **triple},
        FinetuneConfig: {"initial_checkpoint": Path("/c"), **triple},
        EvaluateConfig: {"results_file": Path("/x.csv"), **triple},
        ExportConfig: {"output": Path("/o")},
        configs.PushConfig: {"private": True},
    }
    config = make(kind, **extra.get(kind, {"workers": 5}))
    assert kind.from_json(json.loads(json.dumps(config.as_json()))) == config


def test_paths_are_kept_absolute() -> None:
    values = make(DistillConfig, labels=Path("labels")).as_json()
    assert values["labels"] == str(Path.cwd() / "labels")


def test_old_names_of_settings_are_read_as_the_new_ones() -> None:
    values = make(DistillConfig, decay_milestones=(3,), torchcompile="default").as_json()
    old = {"decay_milestones": "lr_milestones", "torchcompile": "compile", "train_split": "split"}
    named = {old.get(name, name): value for name, value in values.items()}
    assert DistillConfig.from_json(named) == DistillConfig.from_json(values)
    assert DistillConfig.from_json({**named, "decay_milestones": [3]}).decay_milestones == (3,)
    assert DistillConfig.from_json({**named, "decay_milestones": None}).decay_milestones == (3,)


def test_an_old_and_a_new_name_that_differ_are_refused() -> None:
    values = make(DistillConfig).as_json() | {"torchcompile": "default", "compile": "max-autotune"}
    with pytest.raises(ConfigError, match="'compile' is the old name of 'torchcompile'"):
        DistillConfig.from_json(values)


@EVERY
def test_unknown_setting_is_named(kind: type[configs.Settings]) -> None:
    with pytest.raises(ConfigError, match="nonsense"):
        kind.from_json({**make(kind).as_json(), "nonsense": 1})


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (kind, field.name)
        for kind in REQUIRED
        for field in dataclasses.fields(kind)
        if field.default is dataclasses.MISSING
    ],
)
@pytest.mark.parametrize("value", [None, "left out"])
def test_missing_required_setting_is_named_as_its_flag(
    kind: type[configs.Settings], name: str, value: str | None
) -> None:
    values = make(kind).as_json()
    if value is None:
        values[name] = None
    else:
        del values[name]
    (field,) = (f for f in dataclasses.fields(kind) if f.name == name)
    with pytest.raises(ConfigError, match=f"^{configs.spelling(field)} is required"):
        kind.from_json(values)


NAN = float("nan")
ONLINE: dict[str, Any] = {"labels": None, "online": True, "teacher": ("a",)}
MIXED: dict[str, Any] = {"cutmix_target": "mixed-labels"}


@pytest.mark.parametrize(
    ("kind", "values", "flag"),
    [
        (PrecomputeConfig, {"workers": -1}, "--workers"),
        (PrecomputeConfig, {"num_views": 0}, "--num-views"),
        (PrecomputeConfig, {"num_views": 99_999_999_999}, "--num-views"),
        (PrecomputeConfig, {"img_size": 0}, "--img-size"),
        (PrecomputeConfig, {"shard_size": 0}, "--shard-size"),
        (PrecomputeConfig, {"batch_size": 0}, "--batch-size"),
        (PrecomputeConfig, {"view_seed": -1}, "--view-seed"),
        (PrecomputeConfig, {"view_seed": 1 << 63}, "--view-seed"),
        (PrecomputeConfig, {"topk": "0"}, "--topk"),
        (PrecomputeConfig, {"topk": "-1"}, "--topk"),
        (PrecomputeConfig, {"topk": "many"}, "--topk"),
        (PrecomputeConfig, {"rate": 0.0}, "--rate"),
        (PrecomputeConfig, {"rate": NAN}, "--rate"),
        (PrecomputeConfig, {"rate": float("inf")}, "--rate"),
        (PrecomputeConfig, {"teacher": ()}, "--teacher"),
        (DistillConfig, {"epochs": 0}, "--epochs"),
        (DistillConfig, {"batch_size": 0}, "--batch-size"),
        (DistillConfig, {"log_interval": 0}, "--log-interval"),
        (DistillConfig, {"checkpoint_hist": 0}, "--checkpoint-hist"),
        (DistillConfig, {"seed": -1}, "--seed"),
        (DistillConfig, {"lr": NAN}, "--lr"),
        (DistillConfig, {"lr": -0.1}, "--lr"),
        (DistillConfig, {"lr": float("inf")}, "--lr"),
        (DistillConfig, {"momentum": NAN}, "--momentum"),
        (DistillConfig, {"weight_decay": -1.0}, "--weight-decay"),
        (DistillConfig, {"decay_rate": NAN}, "--decay-rate"),
        (DistillConfig, {"discriminator_weight": NAN}, "--discriminator-weight"),
        (DistillConfig, {"discriminator_lr": NAN}, "--discriminator-lr"),
        (DistillConfig, {"opt_betas": (0.9, 1.0)}, "--opt-betas"),
        (DistillConfig, {"opt_betas": (NAN, 0.9)}, "--opt-betas"),
        (DistillConfig, {"clip_grad": 0.0}, "--clip-grad"),
        (DistillConfig, {"drop_path": 1.5}, "--drop-path"),
        (DistillConfig, {"model_kwargs": ("depth",)}, "--model-kwargs depth is not KEY=VALUE"),
        (FinetuneConfig, {"model_kwargs": ("drop_rate=1",)}, "--model-kwargs drop_rate=1: use --d"),
        (DistillConfig, {"layer_decay": 0.0}, "--layer-decay"),
        (DistillConfig, {"layer_decay": 1.5}, "--layer-decay"),
        (DistillConfig, {"sched": "cosine", "min_lr": 0.1}, "--min-lr"),
        (
            DistillConfig,
            {"sched": "cosine", "min_lr": 1e-3, "discriminator_lr": 1e-4},
            "--discriminator-lr 0.0001 is below --min-lr",
        ),
        (DistillConfig, {"val_interval": 0}, "--val-interval"),
        (DistillConfig, {"recovery_interval": 0}, "--recovery-interval"),
        (DistillConfig, {"views_per_image": 0}, "--views-per-image"),
        (DistillConfig, {"views_per_image": 9, "batch_size": 8}, "--views-per-image"),
        (DistillConfig, {"model_ema": True, "model_ema_decay": 1.5}, "--model-ema-decay"),
        (DistillConfig, {"model_ema": True, "model_ema_decay": NAN}, "--model-ema-decay"),
        (DistillConfig, {"label_temperature": 0.0}, "--label-temperature"),
        (DistillConfig, {"label_temperature": NAN}, "--label-temperature"),
        (DistillConfig, {"label_temperature": float("inf")}, "--label-temperature"),
        (DistillConfig, {"student_temperature": 0.0}, "--student-temperature"),
        (FinetuneConfig, {"smoothing": 1.5}, "--smoothing"),
        (DistillConfig, {"early_stopping": 0}, "--early-stopping"),
        (DistillConfig, {"hard_label_weight": 1.5}, "--hard-label-weight"),
        (DistillConfig, {"hard_label_weight": NAN}, "--hard-label-weight"),
        (DistillConfig, MIXED | {"cutmix": -1.0}, "--cutmix"),
        (DistillConfig, MIXED | {"cutmix": NAN}, "--cutmix"),
        (DistillConfig, MIXED | {"mixup_prob": 1.5}, "--mixup-prob"),
        (DistillConfig, MIXED | {"mixup_prob": NAN}, "--mixup-prob"),
        (DistillConfig, {"mixup": -0.1}, "--mixup"),
        (FinetuneConfig, {"mixup": NAN}, "--mixup"),
        (FinetuneConfig, {"mixup": 1.0, "mixup_prob": -1.0}, "--mixup-prob"),
        (DistillConfig, {"mixup": 1.0, "mixup_off_epoch": -1}, "--mixup-off-epoch"),
        (DistillConfig, ONLINE | {"img_size": 0}, "--img-size"),
        (DistillConfig, ONLINE | {"view_seed": -1}, "--view-seed"),
        (DistillConfig, {"mean": (0.5, 0.5, 0.5)}, "--std"),
        (DistillConfig, {"std": (0.5, 0.5, 0.5)}, "--mean"),
        (DistillConfig, {"mean": (0.5,) * 3, "std": (0.5, 0.5, 0.0)}, "--std"),
        (DistillConfig, {"mean": (NAN,) * 3, "std": (0.5,) * 3}, "--mean"),
        (DistillConfig, {"mean": (0.5,) * 3, "std": (0.5, NAN, 0.5)}, "--std"),
        (FinetuneConfig, {"img_size": 0}, "--img-size"),
        (EvaluateConfig, {"img_size": 0}, "--img-size"),
        (EvaluateConfig, {"batch_size": 0}, "--batch-size"),
        (EvaluateConfig, {"model": None}, "--checkpoint"),
        (EvaluateConfig, {"mean": (0.5,) * 3, "std": (0.5, 0.0, 0.5)}, "--std"),
        (EvaluateConfig, {"results_file": Path("x.txt")}, "--results-file"),
    ],
)
def test_value_out_of_bounds_names_the_flag(
    kind: type[configs.Settings], values: dict[str, Any], flag: str
) -> None:
    with pytest.raises(ConfigError, match=flag):
        make(kind, **values)


@pytest.mark.parametrize(
    ("kind", "values", "flag"),
    [
        (
            DistillConfig,
            {"discriminator": "off", "discriminator_lr": 0.1},
            "--discriminator-lr",
        ),
        (
            DistillConfig,
            {"discriminator": "off", "discriminator_weight": 0.5},
            "--discriminator-weight",
        ),
        (
            DistillConfig,
            {"discriminator": "off", "discriminator_input": "probs"},
            "--discriminator-input",
        ),
        (DistillConfig, {"teacher": ("a",)}, "--teacher"),
        (DistillConfig, {"teacher": ("a",), "missing": "skip"}, "--teacher"),
        (DistillConfig, {"write_back": True}, "--write-back"),
        (DistillConfig, {"write_back": True, "missing": "skip"}, "--write-back"),
        (DistillConfig, {"train_split": "train"}, "--train-split"),
        (DistillConfig, {"img_size": 224}, "--img-size"),
        (DistillConfig, {"view_seed": 0}, "--view-seed"),
        (DistillConfig, ONLINE | {"missing": "teach"}, "--missing"),
        (DistillConfig, ONLINE | {"reuse_views": True}, "--reuse-views"),
        (DistillConfig, ONLINE | {"reuse_views": False}, "--reuse-views"),
        (DistillConfig, ONLINE | {"write_back": True}, "--write-back"),
        (DistillConfig, {"mixup_prob": 0.5}, "--mixup-prob"),
        (FinetuneConfig, {"mixup_off_epoch": 3}, "--mixup-off-epoch"),
        (FinetuneConfig, {"mixup": 0.2, "mixup_switch_prob": 0.3}, "--mixup-switch-prob"),
        (DistillConfig, MIXED | {"cutmix": 0.0}, "--cutmix-target has no effect with --cutmix 0"),
        (DistillConfig, MIXED | {"mixup_switch_prob": 0.3}, "--mixup-switch-prob"),
        (DistillConfig, MIXED | {"mixup_target": "mixed-labels"}, "--mixup-target"),
        (DistillConfig, {"mixup": 0.2, "mixup_off_epoch": 180}, "--mixup-off-epoch"),
        (DistillConfig, {"model_ema_decay": 0.9}, "--model-ema-decay"),
        (
            DistillConfig,
            {"sched": "cosine", "epochs": 9, "decay_milestones": (3,)},
            "--decay-milestones",
        ),
        (DistillConfig, {"sched": "cosine", "decay_rate": 0.5}, "--decay-rate"),
        (FinetuneConfig, {"sched": "cosine", "decay_rate": 0.5}, "--decay-rate"),
        (FinetuneConfig, {"model_ema_decay": 0.9}, "--model-ema-decay"),
        (DistillConfig, {"decay_epochs": 3.0}, "--decay-epochs"),
        (DistillConfig, {"sched": "poly", "decay_milestones": (3,)}, "--decay-milestones"),
        (DistillConfig, {"min_lr": 1e-3}, "--min-lr"),
        (DistillConfig, {"cooldown_epochs": 1}, "--cooldown-epochs"),
        (DistillConfig, {"warmup_lr": 1e-3}, "--warmup-lr"),
        (DistillConfig, {"warmup_epochs": 9, "epochs": 9}, "--warmup-epochs"),
        (DistillConfig, {"sched": "cosine", "cooldown_epochs": 180}, "--cooldown-epochs"),
        (
            DistillConfig,
            {"sched": "cosine", "epochs": 9, "warmup_epochs": 5, "cooldown_epochs": 4},
            "--warmup-epochs 5 and --cooldown-epochs 4 leave nothing of --epochs 9",
        ),
        (DistillConfig, {"clip_mode": "agc"}, "--clip-mode"),
        (DistillConfig, {"early_stopping": 1, "val_split": "none"}, "--early-stopping"),
        (
            DistillConfig,
            {"hard_label_weight": 1.0, "student_temperature": 2.0},
            "--student-temperature",
        ),
        (FinetuneConfig, {"epochs": 5, "decay_milestones": (5,)}, "--decay-milestones"),
        (FinetuneConfig, {"epochs": 5, "decay_milestones": (0, 2)}, "--decay-milestones"),
        (
            FinetuneConfig,
            {"pretrained": True, "initial_checkpoint": Path("c")},
            "--initial-checkpoint",
        ),
        (DistillConfig, {"dry_run": True, "auto_resume": True, "output": Path("o")}, "--auto-res"),
        (configs.BenchConfig, {"lines": ("labels",), "memory_images": 9}, "--memory-images"),
        (configs.BenchConfig, {"train_split": "x"}, "--train-split"),
        (configs.SlurmDistillConfig, {"max_requeues": 2}, "--max-requeues"),
        (PrecomputeConfig, {"amp_dtype": "float16"}, "--amp-dtype"),
        (PrecomputeConfig, {"label_dtype": "float16"}, "--label-dtype"),
        (PrecomputeConfig, {"label_dtype": "float32", "rate": 0.1}, "--label-dtype"),
        (FinetuneConfig, {"amp_dtype": "float16"}, "--amp-dtype"),
        (EvaluateConfig, {"amp_dtype": "float16"}, "--amp-dtype"),
    ],
)
def test_setting_without_effect_is_refused(
    kind: type[configs.Settings], values: dict[str, Any], flag: str
) -> None:
    with pytest.raises(ConfigError, match=flag):
        make(kind, **values)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"labels": None}, "--labels DIR, or --online"),
        ({"online": True, "teacher": ("a",)}, "not both"),
        ({"labels": None, "online": True}, "--online needs --teacher"),
        ({"cutmix_target": "teachers"}, "--cutmix-target teachers needs --online"),
        ({"mixup": 1.0, "mixup_target": "teachers"}, "--mixup-target teachers needs --online"),
    ],
)
def test_settings_that_exclude_or_need_each_other_are_named(
    values: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        make(DistillConfig, **values)


def test_old_names_of_cutmix_are_read() -> None:
    config = make(DistillConfig, **MIXED, cutmix=0.5, mixup_prob=0.25)
    values = config.as_json()
    values["cutmix_beta"], values["cutmix_prob"] = values.pop("cutmix"), values.pop("mixup_prob")
    assert DistillConfig.from_json(values) == config


@pytest.mark.parametrize(
    ("values", "alphas"),
    [
        ({}, (0.0, 0.0)),
        (MIXED, (0.0, 1.0)),
        ({"cutmix": 0.5}, (0.0, 0.5)),
        ({"cutmix": 0.0, "mixup": 0.0}, (0.0, 0.0)),
        ({"mixup": 0.2}, (0.2, 0.0)),
        (MIXED | {"mixup": 0.2}, (0.2, 1.0)),
    ],
)
def test_a_target_of_cutmix_alone_turns_it_on(
    values: dict[str, Any], alphas: tuple[float, float]
) -> None:
    config = make(DistillConfig, **values)
    assert (config.mixing["mixup"], config.mixing["cutmix"]) == alphas
    assert config.mixes == any(alphas)


def test_rate_and_topk_exclude_each_other() -> None:
    with pytest.raises(ConfigError, match="give --rate or --topk, not both"):
        make(PrecomputeConfig, rate=0.01, topk="10")


@pytest.mark.parametrize(
    "values",
    [
        {"missing": "teach", "write_back": True, "teacher": ("a",)},
        {"missing": "teach", "reuse_views": True},
        {"missing": "skip", "reuse_views": False},
        MIXED | {"cutmix": 1.0, "mixup_prob": 0.0},
        MIXED | {"mixup": 0.2, "mixup_switch_prob": 0.3, "mixup_off_epoch": 100},
        ONLINE | {"cutmix": 1.0, "mixup": 0.2, "mixup_target": "teachers"},
        {"model_ema": True, "model_ema_decay": 0.0},
        ONLINE | {"cutmix_target": "teachers", "discriminator_input": "logits"},
        ONLINE | {"train_split": "train", "img_size": 224, "view_seed": 0},
    ],
)
def test_settings_that_have_an_effect_are_taken(values: dict[str, Any]) -> None:
    config = make(DistillConfig, **values)
    assert DistillConfig.from_json(json.loads(json.dumps(config.as_json()))) == config


@pytest.mark.parametrize(
    ("values", "reuses"),
    [
        ({}, True),
        ({"missing": "skip"}, True),
        ({"missing": "teach"}, False),
        ({"missing": "teach", "reuse_views": True}, True),
        ({"reuse_views": False}, False),
    ],
)
def test_views_come_round_again_unless_the_teachers_are_there(
    values: dict[str, Any], reuses: bool
) -> None:
    assert make(DistillConfig, **values).reuses_views is reuses


@pytest.mark.parametrize(
    ("values", "found"),
    [
        ({"sched": "step"}, "multistep"),
        ({"sched": "step", "decay_epochs": None}, "multistep"),
        ({"sched": "step", "decay_epochs": 3.0}, "step"),
        ({"sched": "cosine"}, "cosine"),
        ({}, "multistep"),
    ],
)
def test_the_schedule_that_was_called_step_is_multistep(values: dict[str, Any], found: str) -> None:
    config = DistillConfig.from_json({"data_dir": "/d", "labels": "/l", "model": "m", **values})
    assert config.sched == found


def test_every_optimizer_of_timm_is_usable_or_left_out_by_name() -> None:
    for name in list_optimizers():
        if name in OPTIMIZERS:
            check_optimizer(f"lookahead_{name}")
            continue
        with pytest.raises(ConfigError, match=f"^--opt {name} cannot be used: it needs "):
            check_optimizer(name)
    assert set(list_optimizers()) > OPTIMIZERS


def test_arguments_of_the_model_are_python_literals_or_text() -> None:
    texts = ("depth=2", "mlp_ratio=0.5", "pool=avg", "norm=None", "dims=(1, 2)", "s='a=b'")
    expected = {"depth": 2, "mlp_ratio": 0.5, "pool": "avg", "norm": None, "dims": (1, 2)}
    assert make(FinetuneConfig, model_kwargs=texts).model_args == expected | {"s": "a=b"}


@pytest.mark.parametrize(
    "value",
    ["{[]: 1}", "{1, 2}", "b'a'", "1j", "1e999", "{1: 2}", "[(1, {2})]", "-" * 9999 + "1"],
)
def test_an_argument_of_the_model_that_no_json_file_holds_is_named(value: str) -> None:
    with pytest.raises(ConfigError, match=r"^--model-kwargs x=.{1,200}$"):
        make(FinetuneConfig, model_kwargs=(f"x={value}",))


def test_an_unknown_optimizer_is_answered_with_near_names() -> None:
    with pytest.raises(ConfigError, match=r"--opt adamW is unknown; .*adamw\?"):
        make(FinetuneConfig, opt="adamW")


def test_defaults_of_distill_are_the_papers() -> None:
    config = make(DistillConfig)
    assert (config.epochs, config.lr, config.momentum, config.weight_decay) == (180, 0.01, 0.9, 0)
    assert (config.discriminator, config.discriminator_weight) == ("paper", 1.0)


@pytest.mark.parametrize(
    ("values", "num_classes", "expected"),
    [
        ({}, 1000, 0.01),
        ({}, 100, 0.01),
        ({}, 99, 1e-4),
        ({"lr": 1e-5}, 10, 1e-5),
        ({"sched": "cosine", "min_lr": 1e-3}, 10, 1e-3),
        ({"discriminator_lr": 0.5}, 10, 0.5),
        ({"discriminator": "off"}, 10, None),
        ({"resume": Path("run")}, 10, None),  # of a run from before
    ],
)
def test_few_classes_have_a_discriminator_with_a_low_learning_rate(
    values: dict[str, Any], num_classes: int, expected: float | None
) -> None:
    assert make(DistillConfig, **values).resolved(num_classes).discriminator_lr == expected


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, True),
        ({"pretrained": False}, False),
        ({"initial_checkpoint": Path("c")}, False),
        ({"initial_checkpoint": Path("c"), "pretrained": False}, False),
    ],
)
def test_start_is_pretrained_unless_a_checkpoint_is_given(
    values: dict[str, Any], expected: bool
) -> None:
    assert make(FinetuneConfig, **values).from_pretrained is expected
