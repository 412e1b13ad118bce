"""Upload a trained model to the Hugging Face Hub, in one commit, and a Gradio Space for it.

The files are those of `mealv2 export --to timm`. huggingface_hub takes the token from HF_TOKEN or
from `hf auth login`; it is never a flag, so it is in no history, process list or config.
"""

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import huggingface_hub
from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
from huggingface_hub.utils.tqdm import disable_progress_bars

from mealv2.errors import ConfigError, MealError, RemoteError
from mealv2.models import cifar, read_metadata
from mealv2.models.factory import is_factory
from mealv2.storage.atomic import file_sha256, write_atomic
from mealv2.storage.reachable import require_reachable
from mealv2.storage.transfer import reason, status_text
from mealv2.storage.weight_files import find_checkpoint
from pipeline import console, export
from pipeline.config import PushConfig
from pipeline.push import space
from pipeline.runtime.env import on_terminal

T = TypeVar("T")

# of its HTTP client, which differs by version: httpx, before it requests
_HTTP_ERROR: type[Exception] = huggingface_hub.errors.HTTPError  # type: ignore[attr-defined]

_LOG_IN = (
    "run `hf auth login` with a token that may write (https://huggingface.co/settings/tokens), or "
    "set HF_TOKEN"
)
_AGAIN = "run the same command again: files that are there are not uploaded twice"


def run(config: PushConfig) -> dict[str, Any]:
    """Upload and return the report. Raises MealError and OSError."""
    if config.dry_run:
        out = config.output or _default_out(config)
        export.check_out(out, as_file=False)
        out.parent.mkdir(parents=True, exist_ok=True)
    else:
        token = _token()
    with tempfile.TemporaryDirectory(prefix="mealv2-push-") as temporary:
        folder = Path(temporary) / "push"
        _write(folder, config)
        report = {"repo": config.repo_id, "private": config.private, "files": _listed(folder)}
        if config.dry_run:
            shutil.copytree(folder, out, dirs_exist_ok=True)
            console.info(f"wrote {out}; nothing was uploaded")
            return report | {"dry_run": True, "path": str(out)}
        return report | _upload(folder, config, token)


def _default_out(config: PushConfig) -> Path:
    folder = config.run if config.run.is_dir() else config.run.parent
    return folder / "export" / "push"


def _write(folder: Path, config: PushConfig) -> None:
    """Write the files of each repository into a folder of its own."""
    architecture = read_metadata(find_checkpoint(config.run)).get("architecture")
    if architecture and is_factory(architecture):
        raise ConfigError(
            f"{config.run} is a model of your own code, {architecture}, which no other can build; "
            "upload what `mealv2 export --to onnx` or `--to torchscript` writes"
        )
    if config.space and architecture in cifar.NAMES:
        raise ConfigError(
            f"--space: the Space installs timm, which cannot build {architecture} without mealv2; "
            "push the model without --space"
        )
    exported = export.load(config.run)
    source = f"hf-hub:{config.repo_id}"
    folder.mkdir()
    export.write_folder(
        folder / "model", exported, hub=False, source=source, licence=config.license
    )
    if config.space:
        (folder / "space").mkdir()
        for name, data in space.files(config.repo_id, config.license).items():
            write_atomic(folder / "space" / name, data)


def _listed(folder: Path) -> dict[str, dict[str, Any]]:
    """Return size and SHA-256 of each file, and print the sizes."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    names = [path.relative_to(folder).as_posix() for path in paths]
    sizes = [path.stat().st_size for path in paths]
    rows = [[name, console.size_of(size)] for name, size in zip(names, sizes, strict=True)]
    console.info(console.table([["file", "size"], *rows]))
    return {
        name: {"bytes": size, "sha256": file_sha256(path)}
        for name, size, path in zip(names, sizes, paths, strict=True)
    }


# --- the Hub --------------------------------------------------------------------------------------


def _token() -> str:
    """Return the user's token, if the Hub can be reached."""
    if (token := huggingface_hub.get_token()) is None:
        raise ConfigError(f"there is no Hugging Face token: {_LOG_IN}")
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        raise ConfigError("HF_HUB_OFFLINE is set: unset it to upload")
    advice = "check the network, or list and write the files with --dry-run"
    require_reachable(huggingface_hub.constants.ENDPOINT, advice)
    return token


def _upload(folder: Path, config: PushConfig, token: str) -> dict[str, Any]:
    """Upload each folder as one commit; return the addresses and commits."""
    if not on_terminal():
        disable_progress_bars()
    api = HfApi(token=token, library_name="mealv2")
    found = {"model": _push(api, folder / "model", config, "model")}
    if config.space:
        found["space"] = _push(api, folder / "space", config, "space")
        if config.private:
            console.info(
                "the Space reads a private model: add a token that may read it as the secret "
                f"HF_TOKEN in {found['space']['url']}/settings"
            )
    return found


def _push(api: HfApi, folder: Path, config: PushConfig, kind: str) -> dict[str, str]:
    """Create a repository if there is none, and commit a folder to it."""
    repo_id = config.repo_id
    what = f"{kind} {repo_id}"
    sdk = "gradio" if kind == "space" else None
    # None: an organisation may have private repositories as its default
    made = _request(
        what,
        lambda: api.create_repo(
            repo_id,
            repo_type=kind,
            private=config.private or None,
            exist_ok=True,
            space_sdk=sdk,
        ),
    )
    if config.private:
        info = _request(what, lambda: api.repo_info(repo_id, repo_type=kind))
        if not info.private:
            raise ConfigError(
                f"--private: the {what} exists and is public; make it private in {made.url}"
                "/settings, or give another name. Nothing was uploaded to it"
            )
    paths = sorted(folder.iterdir())
    additions = [CommitOperationAdd(path.name, path) for path in paths]
    commit = _request(
        what,
        lambda: api.create_commit(
            repo_id, additions, commit_message="Upload with mealv2", repo_type=kind
        ),
    )
    console.info(f"uploaded {kind} {made.url}")
    return {"url": str(made.url), "commit": commit.oid}


def _request(what: str, action: Callable[[], T]) -> T:
    """Call the library. Raises MealError: its errors may quote headers and signed URLs."""
    try:
        return action()
    except OfflineModeIsEnabled:
        raise ConfigError("HF_HUB_OFFLINE is set: unset it to upload") from None
    except HfHubHTTPError as error:
        raise _refused(what, error.response.status_code) from None
    except ValueError as error:
        raise MealError(f"cannot upload {what}: {reason(error)}") from None
    except RuntimeError as error:  # of an upload: the error of the request is its cause
        if isinstance(error.__cause__, HfHubHTTPError):
            raise _refused(what, error.__cause__.response.status_code) from None
        why = reason(error.__cause__ or error)
        raise RemoteError(f"cannot upload {what}: {why}; {_AGAIN}") from None
    except (_HTTP_ERROR, OSError) as error:
        raise RemoteError(
            f"cannot upload {what}: {reason(error)}; check the network and {_AGAIN}"
        ) from None


def _refused(what: str, status: int) -> RemoteError:
    """Return the error for a response of the Hub, with what to do."""
    owner = what.split()[1].partition("/")[0]
    advice = f"{_AGAIN}"
    if status == 401:
        advice = f"the token is not valid, or has expired: {_LOG_IN}"
    elif status in (402, 403, 404):
        advice = (
            f"the token may not write there: give a repository of your own, or a token of {owner} "
            f"({_LOG_IN})"
        )
    return RemoteError(f"cannot upload {what}: {status_text(status)}; {advice}")
