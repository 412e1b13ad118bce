"""pipeline.demo.parts: the arms differ in their labels only, and come after what they need."""

from collections.abc import Callable
from pathlib import Path

import pytest

from conftest import Result
from pipeline.config import DemoConfig, DistillConfig, FinetuneConfig, PrecomputeConfig
from pipeline.demo import parts
from pipeline.demo.pictures import num_pictures


def parts_of(**settings: int) -> dict[str, parts.Part]:
    return {part.name: part for part in parts.plan_parts(DemoConfig(**settings))}


def test_arms_share_start_schedule_and_pictures() -> None:
    found = parts_of(seeds=2)
    hard, soft = (found[f"seed-1/{arm}"].config for arm in ("hard-labels", "soft-labels"))
    assert isinstance(hard, FinetuneConfig)
    assert isinstance(soft, DistillConfig)
    # the label set says these; `distill` cannot
    of_labels = {"train_split", "img_size", "view_seed", "exact_pil", "crop", "scale", "hflip"}
    shared = (vars(hard).keys() & vars(soft).keys()) - of_labels - {"output"}
    assert {name for name in shared if getattr(hard, name) != getattr(soft, name)} == set()
    labels = found["labels"].config
    assert isinstance(labels, PrecomputeConfig)
    assert soft.labels == labels.output
    assert hard.view_recipe == labels.view_recipe
    for name in ("num_views", "train_split", "img_size", "view_seed", "exact_pil"):
        assert getattr(hard, name) == getattr(labels, name)
    assert hard.num_views == hard.epochs  # each view once


def test_unlabelled_pictures_cost_no_more_steps() -> None:
    found = parts_of(seeds=1)
    soft, extra = (found[f"seed-0/{arm}"].config for arm in ("soft-labels", "soft-labels-extra"))
    assert isinstance(soft, DistillConfig)
    assert isinstance(extra, DistillConfig)
    differs = {name for name in vars(soft) if getattr(soft, name) != getattr(extra, name)}
    assert differs == {"labels", "epochs", "extra_data", "output"}
    labels = found["labels-extra"].config
    assert isinstance(labels, PrecomputeConfig)
    assert (extra.labels, extra.extra_data) == (labels.output, labels.extra_data)
    assert labels.num_views == extra.epochs
    pictures = num_pictures("train")
    steps = soft.epochs * -(-pictures // soft.batch_size)
    pictures += num_pictures("unlabelled")
    assert 0.9 * steps < extra.epochs * -(-pictures // extra.batch_size) <= steps


def test_longer_control_differs_in_epochs_and_has_a_new_view_in_each() -> None:
    found = parts_of(seeds=1)
    hard, longer = (found[f"seed-0/{arm}"].config for arm in ("hard-labels", "hard-labels-longer"))
    assert isinstance(longer, FinetuneConfig)
    differs = {name for name in vars(hard) if getattr(hard, name) != getattr(longer, name)}
    assert differs == {"epochs", "num_views", "output"}
    assert longer.epochs == longer.num_views == 3 * hard.epochs


def test_parts_come_after_those_that_they_need_and_seeds_begin_at_seed() -> None:
    planned = parts.plan_parts(DemoConfig(seed=3, seeds=10))
    names = [part.name for part in planned]
    assert len(set(names)) == len(names) == 4 + 5 * 10
    for number, part in enumerate(planned):
        assert set(part.needs) <= set(names[:number])
    seeds = {part.config.seed for part in planned if part.name.startswith("seed-")}
    assert seeds == set(range(3, 13))


def test_kept_label_sets_are_those_with_a_manifest(tmp_path: Path) -> None:
    planned = parts.plan_parts(DemoConfig(output=tmp_path, seeds=1))
    for name in ("labels", "seed-0/start"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "manifest.json").touch()
    assert [part.name for part in planned if parts.is_labelled(part)] == ["labels"]


@pytest.mark.parametrize(("flag", "most"), [("--seeds", 1000), ("--num-procs", 64)])
def test_numbers_have_a_limit(run_cli: Callable[..., Result], flag: str, most: int) -> None:
    result = run_cli("demo", flag, most + 1)
    assert result.code == 2
    assert result.stderr == f"mealv2: {flag} must be at most {most}: {most + 1}\n"


def test_first_line_says_what_happens_before_torch_is_imported(tmp_path: Path) -> None:
    config = DemoConfig(output=tmp_path / "demo")
    assert config.first_line == f"demo in {tmp_path}/demo: writing 5,000 pictures"
    config.data.mkdir(parents=True)
    assert config.first_line == f"demo in {tmp_path}/demo: looking for finished parts"


def test_a_started_run_is_resumed_and_a_label_set_is_continued_as_it_is(tmp_path: Path) -> None:
    config = DemoConfig(output=tmp_path, seeds=1)
    by_name = {part.name: part.config for part in parts.plan_parts(config)}
    for name in ("seed-0/start", "labels"):
        folder = tmp_path / name / "checkpoints"
        folder.mkdir(parents=True)
        (folder / "step-00000007.pt").touch()
    assert parts.resumed(by_name["seed-0/start"]).resume == tmp_path / "seed-0/start"
    assert parts.resumed(by_name["labels"]) == by_name["labels"]
    assert parts.resumed(by_name["seed-0/hard-labels"]) == by_name["seed-0/hard-labels"]
