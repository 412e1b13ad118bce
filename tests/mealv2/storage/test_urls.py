"""Paths and URLs: told apart, named without what is secret in them."""

from pathlib import Path

import pytest

from mealv2.errors import ConfigError
from mealv2.storage.urls import beside, located, shown, within


@pytest.mark.parametrize("text", ["s3://b/x", "https://h/x", "pipe:cat x", "hf://datasets/x"])
def test_urls_stay_as_they_are(text: str) -> None:
    assert located(text) == text
    assert isinstance(located(text), str)


@pytest.mark.parametrize("text", ["a/b", "/a", "C:x", "./s3:/b", "a:b", "pipe"])
def test_anything_else_is_a_path(text: str) -> None:
    assert located(text) == Path(text)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("s3:/b/x", "the URL needs two slashes after s3: write s3://b/x"),
        ("s3:b/x", "s3://b/x"),
        (
            "https:/user:secret@h/x.tar?secret",
            "the URL needs two slashes after https: write https://h/x.tar",
        ),
        ("s3://", "the URL has no bucket; write s3://BUCKET/…"),
        ("s3:///x", "the URL has no bucket; write s3://BUCKET/…"),
        ("https://user:secret@/", "the URL has no host; write https://HOST/…"),
        ("pipe: ", "pipe: has no command; write pipe:COMMAND"),
    ],
)
def test_half_a_url_is_refused(text: str, named: str) -> None:
    with pytest.raises(ConfigError) as told:
        located(text)
    assert str(told.value).endswith(named)
    assert "secret" not in str(told.value)


@pytest.mark.parametrize("url", ["file:///a/b c", "file:///a/b%20c", "file://localhost/a/b%20c"])
def test_a_file_url_is_a_path(url: str) -> None:
    assert located(url) == Path("/a/b c")


@pytest.mark.parametrize(
    ("url", "named"),
    [
        ("https://user:pw@host/a/b.tar?X-Amz-Signature=s#f", "https://host/a/b.tar"),
        ("s3://key:secret@bucket/a", "s3://bucket/a"),
        ("pipe:cat x?y", "pipe:cat x?y"),
        (
            "pipe:curl -s 'https://u:pw@h/a.tar?b=1&c=2' | tee x?",
            "pipe:curl -s 'https://h/a.tar' | tee x?",
        ),
    ],
)
def test_messages_have_no_secrets(url: str, named: str) -> None:
    assert shown(url) == named


def test_neighbours_keep_the_signature() -> None:
    assert beside("https://h/a/b.tar?s=1", "c") == "https://h/a/c?s=1"
    assert within("s3://b/a/", "c") == "s3://b/a/c"
