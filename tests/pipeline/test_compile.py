"""pipeline.compile: compiled networks answer as the plain ones do, and change nothing kept."""

import copy
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from conftest import Result
from mealv2.models.ensemble import TeacherEnsemble
from pipeline.compile import Compiler, compile_teachers

Run = Callable[..., Result]
Events = Callable[[Path, str], list[dict[str, Any]]]

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


class Tiny(nn.Module):
    """A network that compiles in seconds; counts how often Python runs it."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Linear(48, 16)
        self.norm = nn.BatchNorm1d(16)
        self.head = nn.Linear(16, 5)
        self.calls = 0

    def forward(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        if not torch.compiler.is_compiling():
            self.calls += 1
        hidden_BH = self.norm(self.hidden(images_BCHW.float().flatten(1) / 255.0))
        logits_BC: torch.Tensor = self.head(torch.relu(hidden_BH))
        return logits_BC


def _images(size: int, seed: int = 0) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.integers(256, size=(size, 3, 4, 4), dtype=np.uint8))


@pytest.fixture
def no_compiler() -> Iterator[None]:
    """torch.compile finds no C++ compiler."""
    from torch._inductor import config

    torch.compiler.reset()
    with config.patch({"cpp.cxx": ("/nowhere/c++",), "fx_graph_cache": False}):
        yield


@pytest.fixture
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compile here, in this process, what nobody compiled before."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    torch.compiler.reset()


def test_batches_of_another_size_are_not_compiled(seeded_weights: None) -> None:
    network = Tiny()
    call = Compiler("default", 8).compiled(network)
    for size in (3, 7, 9):
        torch.testing.assert_close(call(_images(size)), network(_images(size)), rtol=0, atol=0)
    assert network.calls == 6


@pytest.mark.slow
def test_without_a_compiler_it_says_so_once_and_computes_the_same(
    no_compiler: None, seeded_weights: None, capsys: pytest.CaptureFixture[str]
) -> None:
    network = Tiny()
    plain = copy.deepcopy(network)
    call = Compiler("default", 8).compiled(network)
    for seed in range(3):
        torch.testing.assert_close(call(_images(8, seed)), plain(_images(8, seed)), rtol=0, atol=0)
    said = [line for line in capsys.readouterr().err.splitlines() if "--torchcompile" in line]
    assert len(said) == 1
    assert "this machine cannot compile (" in said[0]
    assert "C++ compiler" in said[0]
    # the failed attempt has left nothing behind: not a batch was counted twice
    torch.testing.assert_close(network.state_dict(), plain.state_dict(), rtol=0, atol=0)


@pytest.mark.slow
def test_stage_one_goes_on_without_a_compiler_to_the_same_bits(
    no_compiler: None,
    done: Run,
    precompute_flags: list[str],
    labels_dir: Path,
    tmp_path: Path,
    contents: Callable[..., dict[str, bytes]],
) -> None:
    result = done(*precompute_flags, "--torchcompile", "default", "--output", tmp_path / "labels")
    assert result.stderr.count("this machine cannot compile") == 1  # of two teachers
    assert contents(tmp_path / "labels") == contents(labels_dir)


@pytest.mark.slow
def test_what_the_network_itself_refuses_is_still_its_own_error(no_compiler: None) -> None:
    call = Compiler("default", 1).compiled(Tiny())
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        call(_images(1))


@pytest.mark.slow
@needs_compiler
def test_compiled_steps_agree_with_plain_ones_and_keep_the_names_of_the_state(
    fresh: None, seeded_weights: None
) -> None:
    network = Tiny()
    plain = copy.deepcopy(network)
    names = list(network.state_dict())
    call = Compiler("default", 8).compiled(network)
    optimizers = [torch.optim.SGD(n.parameters(), lr=0.1) for n in (network, plain)]
    classes_B = torch.arange(8) % 5
    for seed in range(4):
        losses = []
        for student_logits, optimizer in zip((call, plain), optimizers, strict=True):
            loss = nn.functional.cross_entropy(student_logits(_images(8, seed)), classes_B)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
        assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    assert network.calls == 0, "it never ran as it is"
    assert list(network.state_dict()) == names
    torch.testing.assert_close(network.state_dict(), plain.state_dict(), rtol=0, atol=1e-5)
    assert list(copy.deepcopy(network).state_dict()) == names  # as the moving average is made


@pytest.mark.slow
@needs_compiler
def test_compiled_teachers_answer_as_the_plain_ones(fresh: None, seeded_weights: None) -> None:
    ensemble = TeacherEnsemble([Tiny(), Tiny()])
    expected = ensemble(_images(8))
    names = list(ensemble.state_dict())
    compile_teachers(ensemble, mode="default", batch_size=8)
    with torch.inference_mode():
        found = ensemble(_images(8))
    assert [teacher.calls for teacher in ensemble.teachers] == [1, 1]
    for value, other in zip(found, expected, strict=True):
        torch.testing.assert_close(value, other, rtol=0, atol=1e-5)
    assert list(ensemble.state_dict()) == names


@pytest.mark.slow
@needs_compiler
def test_runs_that_compile_repeat_resume_and_agree_with_plain_ones(
    fresh: None,
    done: Run,
    distill_flags: list[str],
    tmp_path: Path,
    events: Events,
    weights: Callable[[Path], dict[str, bytes]],
) -> None:
    flags = [*distill_flags, "--torchcompile", "default", "--recovery-interval", 1]
    done(*flags, "--checkpoint-hist", 99, "--output", tmp_path / "compiled")
    done(*distill_flags, "--output", tmp_path / "plain")
    losses = [[e["loss"] for e in events(tmp_path / n, "train")] for n in ("compiled", "plain")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert losses[0][0] == pytest.approx(losses[1][0], abs=1e-5)
    assert weights(tmp_path / "compiled").keys() == weights(tmp_path / "plain").keys()

    resumed = tmp_path / "resumed"
    shutil.copytree(tmp_path / "compiled", resumed)
    (resumed / "report.json").unlink()
    for path in (resumed / "checkpoints").iterdir():
        if int(path.stem.split("-")[1]) > 3:
            path.unlink()
    done("distill", "--resume", resumed)
    assert weights(resumed) == weights(tmp_path / "compiled")


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_on_a_gpu_compiled_steps_agree_with_plain_ones(mode: Any, seeded_weights: None) -> None:
    network = Tiny().cuda()
    plain = copy.deepcopy(network)
    call = Compiler(mode, 8).compiled(network)
    optimizers = [torch.optim.SGD(n.parameters(), lr=0.1, fused=True) for n in (network, plain)]
    for seed, size in enumerate((8, 8, 8, 5, 8, 8)):  # a smaller batch between is not compiled
        losses = []
        for student_logits, optimizer in zip((call, plain), optimizers, strict=True):
            logits_BC = student_logits(_images(size, seed).cuda())
            loss = nn.functional.cross_entropy(logits_BC, torch.arange(size).cuda() % 5)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.detach().clone())
        assert float(losses[0]) == pytest.approx(float(losses[1]), abs=1e-5)
    torch.testing.assert_close(network.state_dict(), plain.state_dict(), rtol=0, atol=1e-4)


@pytest.mark.gpu
@needs_gpu
def test_on_a_gpu_teachers_in_cuda_graphs_keep_their_answers_apart(seeded_weights: None) -> None:
    ensemble = TeacherEnsemble([Tiny(), Tiny()]).cuda()
    plain = [ensemble.teacher_logits(_images(8, seed).cuda()) for seed in range(6)]
    compile_teachers(ensemble, mode="reduce-overhead", batch_size=8)
    with torch.inference_mode():
        found = [ensemble.teacher_logits(_images(8, seed).cuda()) for seed in range(6)]
    for value, other in zip(found, plain, strict=True):
        torch.testing.assert_close(value, other, rtol=0, atol=1e-4)
