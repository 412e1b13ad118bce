"""The Hugging Face Hub: the token, and a folder uploaded as one commit.

huggingface_hub takes the token from HF_TOKEN or from `hf auth login`; it is never a flag, so it is
in no history, process list or config.
"""

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import huggingface_hub
from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
from huggingface_hub.utils.tqdm import disable_progress_bars

from mealv2.errors import ConfigError, MealError, RemoteError
from mealv2.storage.reachable import require_reachable
from mealv2.storage.transfer import reason, status_text
from pipeline import console
from pipeline.runtime.env import on_terminal

T = TypeVar("T")

# of its HTTP client, which differs by version: httpx, before it requests
_HTTP_ERROR: type[Exception] = huggingface_hub.errors.HTTPError  # type: ignore[attr-defined]

_LOG_IN = (
    "run `hf auth login` with a token that may write (https://huggingface.co/settings/tokens), or "
    "set HF_TOKEN"
)
_AGAIN = "run the same command again: files that are there are not uploaded twice"


def user_token() -> str:
    """Return the user's token, if the Hub can be reached. Raises ConfigError, RemoteError."""
    if (token := huggingface_hub.get_token()) is None:
        raise ConfigError(f"there is no Hugging Face token: {_LOG_IN}")
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        raise ConfigError("HF_HUB_OFFLINE is set: unset it to upload")
    advice = "check the network, or list and write the files with --dry-run"
    require_reachable(huggingface_hub.constants.ENDPOINT, advice)
    return token


def upload(folder: Path, repo_id: str, kind: str, token: str, *, private: bool) -> dict[str, str]:
    """Commit a folder to a repository, created if missing; return its address and the commit.

    ``kind`` is model, space or dataset. With ``private`` nothing is uploaded to a public one.
    Raises MealError.
    """
    if not on_terminal():
        disable_progress_bars()
    api = HfApi(token=token, library_name="mealv2")
    what = f"{kind} {repo_id}"
    sdk = "gradio" if kind == "space" else None
    # None: an organisation may have private repositories as its default
    made = _request(
        what,
        lambda: api.create_repo(
            repo_id,
            repo_type=kind,
            private=private or None,
            exist_ok=True,
            space_sdk=sdk,
        ),
    )
    if private:
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
