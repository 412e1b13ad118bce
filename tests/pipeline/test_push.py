"""pipeline.push: models and label sets reach the Hub in one commit, and are read back from it."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import yaml

from conftest import ROOT, Result
from hub import TOKEN, USER, Hub, running_hub
from mealv2.label_set import read_header
from pipeline.push import space
from stores import silent_server

Run = Callable[..., Result]
STRANGE = ("<b>ants</b> & | co", "*bees* [x](http://y) `z`", "cats: {a: #1}\n---\n$x$ _é_")
REPO = f"{USER}/tiny.v1"
# huggingface_hub's own call of its HTTP client
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub on loopback, and a user of it. The library reads its variables when it is imported."""
    with running_hub() as running:
        for name, value in running.environment(tmp_path / "home").items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", running.url)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        yield running


@pytest.fixture(scope="module")
def model(make_model: Callable[..., Path]) -> Path:
    return make_model("test_resnet", seed=3, classes=STRANGE)


def front_matter(card: bytes) -> dict[str, Any]:
    head: dict[str, Any] = yaml.safe_load(card.decode().split("---\n")[1])
    return head


def test_the_repository_is_what_export_makes(
    done: Run, hub: Hub, model: Path, tmp_path: Path, contents: Callable[..., dict[str, bytes]]
) -> None:
    result = done("push", model, f"hf://{REPO}", "--license", "mit")
    repo = hub.repos["models", REPO]
    assert len(repo["commits"]) == 1
    assert repo["private"] is False
    done("export", model, "--to", "timm", "--output", tmp_path / "out")
    exported, files = contents(tmp_path / "out"), dict(repo["files"])
    card, plain_card = files.pop("README.md"), exported.pop("README.md")
    assert files == exported
    assert front_matter(card) == front_matter(plain_card) | {"license": "mit"}
    assert f'timm.create_model("hf-hub:{REPO}"' in card.decode()
    assert "<b>" not in card.decode()
    assert result.report["model"] == {"url": f"{hub.url}/{REPO}", "commit": repo["commits"][0]}
    assert f"{hub.url}/{REPO}" in result.stderr
    assert hub.repos.keys() == {("models", REPO)}


def test_unchanged_files_are_not_uploaded_again(done: Run, hub: Hub, model: Path) -> None:
    reports = [done("push", model, f"hf://{REPO}").report for _ in range(2)]
    assert hub.num_uploads == 1
    assert reports[0] == reports[1]
    assert len(hub.repos["models", REPO]["commits"]) == 1


def test_the_space_names_its_model(done: Run, hub: Hub, model: Path) -> None:
    done("push", model, f"hf://{REPO}", "--space", "--private")
    assert hub.repos["spaces", REPO]["sdk"] == "gradio"
    assert {repo["private"] for repo in hub.repos.values()} == {True}
    files = hub.files("spaces", REPO)
    head = front_matter(files["README.md"])
    assert (head["sdk"], head["app_file"], head["models"]) == ("gradio", "app.py", [REPO])
    assert head["title"] == "tiny.v1"
    assert sorted(files) == ["README.md", "app.py", "requirements.txt"]


def test_a_dry_run_writes_the_files_and_sends_nothing(
    done: Run, hub: Hub, model: Path, tmp_path: Path, contents: Callable[..., dict[str, bytes]]
) -> None:
    out = tmp_path / "out"
    flags = ["--space", "--dry-run", "--output", out]
    report = done("push", model, f"hf://{REPO}", *flags).report
    assert hub.requests == []
    done("push", model, f"hf://{REPO}", "--space")
    for kind in ("model", "space"):
        assert contents(out / kind) == hub.files(f"{kind}s", REPO)
    assert report["files"].keys() == contents(out).keys()
    assert report["path"] == str(out)


@pytest.mark.parametrize(
    "repo", ["ant-lab/x", "hf://x", "hf://a/b/c", "hf://a/b--c", "hf://u:pa55w0rd@a/b", "hf://a/.."]
)
def test_a_wrong_name_of_a_repository_is_one_line(
    run_cli: Run, hub: Hub, model: Path, repo: str
) -> None:
    result = run_cli("push", model, repo)
    assert result.code == 2
    (line,) = result.stderr.splitlines()
    assert line.startswith("mealv2: TO must be hf://USER/NAME")
    assert "pa55w0rd" not in line
    assert hub.requests == []


def test_without_a_token_the_line_names_the_login(
    run_cli: Run, hub: Hub, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    result = run_cli("push", model, f"hf://{REPO}")
    assert result.code == 2
    assert result.stderr.startswith("mealv2: there is no Hugging Face token: run `hf auth login`")
    assert hub.requests == []


def test_a_token_that_the_hub_rejects_is_one_line_without_it(
    run_cli: Run, hub: Hub, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_expired")
    result = run_cli("push", model, f"hf://{REPO}")
    assert result.code == 1
    assert result.stderr.splitlines()[-1].startswith(
        f"mealv2: cannot upload model {REPO}: 401 Unauthorized; the token is not valid"
    )
    assert "hf_expired" not in result.stderr


@pytest.mark.parametrize("exists", [False, True])
def test_a_repository_of_another_user_is_one_line(
    run_cli: Run, hub: Hub, model: Path, exists: bool
) -> None:
    if exists:
        hub.add("models", "bee-lab/tiny")
    result = run_cli("push", model, "hf://bee-lab/tiny")
    assert result.code == 1
    assert result.stderr.splitlines()[-1].startswith(
        "mealv2: cannot upload model bee-lab/tiny: 403 Forbidden; the token may not write there"
    )
    assert TOKEN not in result.stderr
    assert hub.num_uploads == 0


def test_private_never_uploads_to_a_public_repository(run_cli: Run, hub: Hub, model: Path) -> None:
    hub.add("models", REPO)
    result = run_cli("push", model, f"hf://{REPO}", "--private")
    assert result.code == 2
    assert "exists and is public" in result.stderr
    assert hub.num_uploads == 0
    assert hub.files("models", REPO) == {}


def test_a_hub_that_never_responds_is_one_line_in_10_seconds(
    run_cli: Run, hub: Hub, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mealv2.storage.reachable.RESPONSE_TIMEOUT_S", 0.2)
    with silent_server() as url:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", url)
        began = time.monotonic()
        result = run_cli("push", model, f"hf://{REPO}")
    assert time.monotonic() - began < 10
    assert result.code == 1
    assert result.stderr == (
        f"mealv2: cannot reach {url}: no response in 0.2 s; check the network, or list and write "
        "the files with --dry-run\n"
    )


def test_an_upload_that_fails_is_one_line_and_no_commit(
    run_cli: Run, hub: Hub, model: Path
) -> None:
    hub.upload_status = 400
    result = run_cli("push", model, f"hf://{REPO}")
    assert result.code == 1
    assert result.stderr.splitlines()[-1] == (
        f"mealv2: cannot upload model {REPO}: 400 Bad Request; run the same command again: files "
        "that are there are not uploaded twice"
    )
    assert hub.repos["models", REPO]["commits"] == []


def test_no_flag_takes_a_token(run_cli: Run, model: Path) -> None:
    result = run_cli("push", model, f"hf://{REPO}", "--token", TOKEN)
    assert result.code == 2
    assert "No such option" in result.stderr
    assert TOKEN not in result.stderr


def test_the_app_is_python_for_any_name() -> None:
    code = space.files(REPO, None)["app.py"].decode()
    compile(code, "app.py", "exec")
    assert f'MODEL = "{REPO}"' in code


def test_the_commands_of_the_page_run(
    done: Run,
    hub: Hub,
    model: Path,
    labels_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "labels").symlink_to(labels_dir)
    shutil.copytree(model, tmp_path / "runs" / "student" / "student")
    page = (ROOT / "docs" / "how-to" / "push.md").read_text(encoding="utf-8")
    lines = re.findall(r"^```sh\nmealv2 (.*)\n```", page, flags=re.MULTILINE)
    assert len(lines) == 3
    for line in lines:
        done(*line.replace("USER/NAME", REPO).split())
    assert hub.repos["models", REPO]["private"] is True
    assert (tmp_path / "runs" / "student" / "export" / "push" / "space" / "app.py").is_file()
    assert "manifest.json" in hub.files("datasets", f"{REPO}-labels")


# --- label sets -----------------------------------------------------------------------------------


def test_a_label_set_is_pushed_as_it_is_with_a_card(
    done: Run, hub: Hub, labels_dir: Path, contents: Callable[..., dict[str, bytes]]
) -> None:
    report = done("push", labels_dir, f"hf://{REPO}", "--license", "mit").report
    files = dict(hub.files("datasets", REPO))
    card = files.pop("README.md").decode()
    assert files == contents(labels_dir)
    assert report["dataset"]["url"] == f"{hub.url}/datasets/{REPO}"
    assert len(hub.repos["datasets", REPO]["commits"]) == 1

    assert front_matter(card.encode())["license"] == "mit"
    manifest = json.loads((labels_dir / "manifest.json").read_text())
    assert manifest["plan_sha256"] in card
    loss = done("labels", "info", labels_dir).report["roles"]["train"]["encoding_loss"]
    row = f"| KL of the train labels | {loss['kl']:.3g} nats, measured on 144 views |"
    assert row in card
    for teacher in manifest["roles"]["val"]["accuracy"]["teachers"]:
        assert f"| {teacher['top1']:.2f} | {teacher['top5']:.2f} |" in card


def test_a_pushed_label_set_is_read_from_its_name(
    done: Run, hub: Hub, labels_dir: Path, data_dir: Path, tmp_path: Path
) -> None:
    """In a process of its own: the library reads the address of the Hub when it is imported."""
    done("push", labels_dir, f"hf://{REPO}")
    environment = os.environ | hub.environment(tmp_path / "home") | {"OMP_NUM_THREADS": "1"}
    verify = ["labels", "verify", f"hf://{REPO}", "--data-dir", data_dir]
    words = [sys.executable, "-m", "mealv2", *verify, "--cache-dir", tmp_path / "cache"]
    found = subprocess.run(
        list(map(str, words)), env=environment, cwd=ROOT, capture_output=True, text=True, check=True
    )
    here = done("labels", "verify", labels_dir, "--data-dir", data_dir).report
    assert json.loads(found.stdout) | {"labels": None} == here | {"labels": None}


def test_a_damaged_or_unfinished_label_set_is_not_pushed(
    done: Run, run_cli: Run, hub: Hub, labels_dir: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(labels_dir, tmp_path / "copy"))
    shard = next(copy.glob("train-*.h5"))
    data = bytearray(shard.read_bytes())
    data[read_header(shard)["columns"]["labels"]["offset"]] ^= 1
    shard.write_bytes(data)
    result = run_cli("push", copy, f"hf://{REPO}")
    assert result.code == 3
    assert "is damaged: its SHA-256 is not the one in the manifest" in result.stderr
    shard.unlink()
    assert "is missing; run the same" in run_cli("push", copy, f"hf://{REPO}").stderr
    (copy / "manifest.json").unlink()
    result = run_cli("push", copy, f"hf://{REPO}")
    assert (result.code, hub.repos) == (3, {})
    assert "the label set is not finished; run the same `mealv2 precompute` again" in result.stderr


def test_a_folder_of_a_model_and_a_label_set_is_refused(
    run_cli: Run, hub: Hub, labels_dir: Path, model: Path, tmp_path: Path
) -> None:
    both = Path(shutil.copytree(labels_dir, tmp_path / "both"))
    shutil.copytree(model, both, dirs_exist_ok=True)
    result = run_cli("push", both, f"hf://{REPO}")
    assert (result.code, hub.repos) == (2, {})
    assert result.stderr.strip() == (
        f"mealv2: RUN: {both} has a model and a label set; give a folder of one"
    )


def test_a_dry_run_from_within_a_label_set_writes_beside_it(
    done: Run, hub: Hub, labels_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = Path(shutil.copytree(labels_dir, tmp_path / "copy"))
    monkeypatch.chdir(copy)
    assert done("push", ".", f"hf://{REPO}", "--dry-run").report["path"] == f"{copy}-push"


def test_a_dry_run_of_a_label_set_writes_its_card_only(
    done: Run, run_cli: Run, hub: Hub, labels_dir: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    report = done("push", labels_dir, f"hf://{REPO}", "--dry-run", "--output", out).report
    assert hub.requests == []
    assert [p.relative_to(out).as_posix() for p in out.rglob("*.*")] == ["dataset/README.md"]
    expected = {f"dataset/{p.name}" for p in labels_dir.iterdir()} | {"dataset/README.md"}
    assert set(report["files"]) == expected
    result = run_cli("push", labels_dir, f"hf://{REPO}", "--space")
    assert result.code == 2
    assert result.stderr.startswith("mealv2: --space is for models")


@pytest.mark.slow
def test_the_pushed_model_and_its_app_give_the_probabilities_of_predict(
    hub: Hub, make_model: Callable[..., Path], data_dir: Path, tmp_path: Path
) -> None:
    """In processes of their own, with the variables of a user."""
    folder = make_model("test_resnet", seed=3, steps=3)
    environment = os.environ | hub.environment(tmp_path / "home") | {"OMP_NUM_THREADS": "1"}

    def start(*words: object) -> str:
        found = subprocess.run(
            [sys.executable, *map(str, words)],
            env=environment,
            cwd=ROOT,
            check=True,
            capture_output=True,
            text=True,
        )
        assert TOKEN not in found.stdout + found.stderr
        return found.stdout

    start("-m", "mealv2", "push", folder, f"hf://{REPO}", "--space")
    (tmp_path / "app.py").write_bytes(hub.files("spaces", REPO)["app.py"])
    image = data_dir / "val" / "bees" / "00.jpg"
    code = (
        "import json, runpy, sys\nfrom PIL import Image\n"
        "app = runpy.run_path(sys.argv[1])\n"
        "print(json.dumps(app['predict'](Image.open(sys.argv[2]))))\n"
    )
    found = json.loads(start("-c", code, tmp_path / "app.py", image).splitlines()[-1])
    predict = ("predict", image, "--checkpoint", folder, "--exact-pil", "--json")
    report = json.loads(start("-m", "mealv2", *predict).splitlines()[0])
    expected = {best["class"]: best["prob"] for best in report["predictions"][0]["best"]}
    assert found == pytest.approx(expected, abs=0.01)
