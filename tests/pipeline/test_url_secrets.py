"""Passwords and signatures of URLs: sent with requests, written nowhere, read again to resume."""

import base64
import http.server
import json
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

from conftest import Result
from mealv2.storage.cache import Cache
from mealv2.storage.urls import shown, with_secrets, without_secrets
from tars import tar_tree

Run = Callable[..., Result]
PASSWORD, SIGNATURE = "pa55w0rd", "5ignature"


@pytest.fixture(scope="module")
def images(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tar_tree(data_dir, tmp_path_factory.mktemp("tars"), keys=True)


class Private(http.server.SimpleHTTPRequestHandler):
    """Serves files only with the password and the signature."""

    def send_head(self) -> Any:
        expected = base64.b64encode(f"user:{PASSWORD}".encode()).decode()
        query = parse_qs(urlsplit(self.path).query)
        if self.headers.get("Authorization") != f"Basic {expected}":
            return self.send_error(401)
        if query.get("X-Amz-Signature") != [SIGNATURE]:
            return self.send_error(403)
        return super().send_head()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def host(images: Path) -> Iterator[str]:
    handler = partial(Private, directory=str(images))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield f"127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


@pytest.fixture
def public(host: str, images: Path) -> str:
    """The URL of the shards without its secrets."""
    last = {
        split: sorted(images.glob(f"{split}-*.tar"))[-1].stem[-6:] for split in ("train", "val")
    }
    names = ",".join(f"{split}-{{000000..{number}}}" for split, number in last.items())
    return f"http://{host}/{{{names}}}.tar"


@pytest.fixture
def private(public: str) -> str:
    return private_of(public)


def private_of(url: str) -> str:
    return f"{url.replace('//', f'//user:{PASSWORD}@')}?X-Amz-Signature={SIGNATURE}"


def with_data(flags: list[Any], url: str) -> list[Any]:
    at = flags.index("--data-dir") + 1
    flags = [*flags[:at], url, *flags[at + 1 :]]
    if "--shard-size" in flags:
        at = flags.index("--shard-size")
        del flags[at : at + 2]
    return flags


def require_no_secret(folder: Path, *results: Result) -> None:
    for path in folder.rglob("*"):
        texts = [str(path).encode(), path.read_bytes() if path.is_file() else b""]
        for secret in (PASSWORD, SIGNATURE, base64.b64encode(f"user:{PASSWORD}".encode()).decode()):
            assert not [text for text in texts if secret.encode() in text], path
    for result in results:
        assert PASSWORD not in result.stdout + result.stderr
        assert SIGNATURE not in result.stdout + result.stderr


def test_no_file_and_no_message_of_either_stage_has_a_secret(
    private: str,
    public: str,
    precompute_flags: list[Any],
    distill_flags: list[Any],
    tmp_path: Path,
    run_cli: Run,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cache = ["--cache-dir", tmp_path / "cache"]
    labels, run = tmp_path / "labels", tmp_path / "run"
    labelling = [*with_data(precompute_flags, private), "--output", labels, *cache]
    training = with_data(distill_flags, private)
    training = [*training, "--labels", labels, "--output", run, *cache, "--auto-resume"]
    results = [run_cli(*labelling), run_cli(*training, "--epochs", 1)]

    assert [result.code for result in results] == [0, 0], results
    assert json.loads((run / "config.json").read_text())["data_dir"] == public
    stored = Path(next((run / "checkpoints").iterdir()))
    assert public.encode() in stored.read_bytes()  # the checkpoint has the URL
    # to resume: with the URL again, from the environment, and refused without either
    (run / "report.json").unlink()
    for copy in (tmp_path / "cache").rglob("*.tar*"):
        copy.unlink()
    refused = run_cli("distill", "--resume", run, *cache)
    assert refused.code == 1
    assert "401 Unauthorized: the server denies access; check the password" in refused.stderr
    assert "MEALV2_URL_CREDENTIALS" in refused.stderr
    again = run_cli("distill", "--resume", run, "--data-dir", private, *cache)
    other = run_cli("distill", "--resume", run, "--data-dir", f"{private}&x=1".replace("{", "{0,"))
    assert (again.code, other.code) == (0, 2), again.stderr
    for copy in (tmp_path / "cache").rglob("*.tar*"):
        copy.unlink()
    monkeypatch.setenv("MEALV2_URL_CREDENTIALS", private_of(public.partition("{")[0]))
    results += [refused, again, other, run_cli("distill", "--resume", run, *cache)]
    assert results[-1].code == 0, results[-1].stderr
    results += [run_cli(*training, "--dry-run"), run_cli("labels", "info", labels)]
    require_no_secret(tmp_path, *results)


@pytest.mark.parametrize(
    "wrong",
    [
        ["--val-split", "nothing"],
        ["--train-split", "nothing"],
        ["--img-size", "0"],
        ["--shard-size", "7"],
        ["--dry-run"],
    ],
)
def test_no_error_has_a_secret(
    wrong: list[str], private: str, precompute_flags: list[Any], tmp_path: Path, run_cli: Run
) -> None:
    flags = [*with_data(precompute_flags, private), "--cache-dir", tmp_path / "c"]
    results = [
        run_cli(*flags, "--output", tmp_path / "out", *wrong),
        run_cli(*with_data(flags, private.replace(".tar", ".rat")), "--output", tmp_path / "b"),
        run_cli(*with_data(flags, private.replace("000000..", "000000..1")), "--output", tmp_path),
        run_cli(*with_data(flags, private.replace("//", "/")), "--output", tmp_path / "b"),
        run_cli(*flags, "--output", private),
        run_cli("labels", "info", private),
        run_cli("evaluate", "--data-dir", tmp_path, "--checkpoint", private),
        run_cli(*flags, "--output", tmp_path / "b", "--teacher", f"a.b={private}"),
    ]
    assert all(result.code in (1, 2, 3) for result in results[1:]), results
    assert all("Traceback" not in result.stderr for result in results)
    require_no_secret(tmp_path, *results)


def test_jobs_of_a_process_get_secrets_by_the_environment(
    private: str, precompute_flags: list[Any], tmp_path: Path, run_cli: Run
) -> None:
    flags = [*with_data(precompute_flags, private), "--cache-dir", tmp_path / "cache"]
    result = run_cli(*flags, "--output", tmp_path / "labels", "--num-procs", 2)
    assert result.code == 0, result.stderr
    require_no_secret(tmp_path, result)


def test_a_batch_script_has_no_secret(
    private: str,
    public: str,
    precompute_flags: list[Any],
    tmp_path: Path,
    run_cli: Run,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    flags = [*with_data(precompute_flags, private)[1:], "--output", tmp_path / "labels"]
    refused = run_cli("slurm", "precompute", "--print", *flags)
    assert refused.code == 2
    assert "--data-dir: a batch script does not keep the password" in refused.stderr
    monkeypatch.setenv("MEALV2_URL_CREDENTIALS", private)
    monkeypatch.setenv("MEALV2_CACHE", str(tmp_path / "cache"))
    printed = run_cli("slurm", "precompute", "--print", *with_data(flags, public))
    assert printed.code == 0, printed.stderr
    assert public in printed.stdout.replace("'", "")
    require_no_secret(tmp_path, refused, printed)


@pytest.mark.parametrize(
    ("url", "kept"),
    [
        ("https://u:p@h/a?X-Amz-Signature=s&X-Amz-Date=d", "https://h/a"),
        ("https://h/a?sv=1&sig=s", "https://h/a"),
        ("https://h/a?Expires=1&Signature=s&Key-Pair-Id=k", "https://h/a"),
        ("https://h/a?AWSAccessKeyId=k", "https://h/a"),
        ("https://h/a?access_token=k", "https://h/a"),
        ("https://h/a?download=true&versionId=3", "https://h/a?download=true&versionId=3"),
        ("s3://key:secret@bucket/a", "s3://bucket/a"),
        ("pipe:curl -s https://u:p@h/a?b=1 | cat", "pipe:curl -s https://h/a?b=1 | cat"),
        ("pipe:curl 'https://h/a?sig=1'", "pipe:curl 'https://h/a'"),
        (
            "pipe:curl https://$USER:${PW}@h/a?sig=$SIG",
            "pipe:curl https://$USER:${PW}@h/a?sig=$SIG",
        ),
        ("pipe:curl -u me:pw https://h/a", "pipe:curl -u … https://h/a"),
        ("pipe:curl -u $ME https://h/a", "pipe:curl -u $ME https://h/a"),
        (
            "pipe:curl -H 'Authorization: Bearer abc' https://h/a",
            "pipe:curl -H 'Authorization: Bearer …' https://h/a",
        ),
        (
            'pipe:curl -H "Authorization: Bearer $T" https://h/a',
            'pipe:curl -H "Authorization: Bearer $T" https://h/a',
        ),
    ],
)
def test_what_is_kept_of_a_url(url: str, kept: str, tmp_path: Path) -> None:
    assert without_secrets(url) == kept
    assert without_secrets(kept) == kept
    assert "secret" not in shown(url)
    cache = Cache(tmp_path, 1)
    assert cache.path_of(url) == cache.path_of(kept)


@pytest.mark.parametrize(
    ("url", "found"),
    [
        ("https://h/a/b.tar", "https://u:p@h/a/b.tar?sig=1"),
        ("https://h/a/b.tar?x=1", "https://u:p@h/a/b.tar?x=1"),
        ("https://h/ab.tar", "https://h/ab.tar?sig=0"),
        ("https://other/a/b.tar", "https://other/a/b.tar"),
        ("http://h/a/b.tar", "http://h/a/b.tar"),
        ("https://v:q@h/a/b.tar", "https://v:q@h/a/b.tar"),
        ("pipe:cat https://h/a/b", "pipe:cat https://h/a/b"),
    ],
)
def test_the_nearest_credentials_are_used(url: str, found: str) -> None:
    known = ["https://h/?sig=0", "https://u:p@h/a/?sig=1"]
    assert with_secrets(url, known) == found
