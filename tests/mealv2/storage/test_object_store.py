"""Putting files through clients that know no conditions: looked before, read after."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from mealv2.storage import object_store

URL = "careless://bucket/train-00000.h5"


class Careless(MemoryFileSystem):
    """A store whose client passes over what it does not know, as some do."""

    protocol = "careless"
    store: ClassVar[dict[str, Any]] = {}
    cachable = False
    others: bytes | None = None  # what another machine puts there just after a file was put

    def put_file(self, lpath: str, rpath: str, **kwargs: Any) -> None:
        self.pipe_file(rpath, Path(lpath).read_bytes())
        if self.others is not None:
            self.pipe_file(rpath, self.others)

    @classmethod
    def _strip_protocol(cls, path: Any) -> Any:
        return MemoryFileSystem._strip_protocol(str(path).replace("careless://", "memory://"))


class Strict(Careless):
    """One that refuses a mode."""

    def put_file(self, lpath: str, rpath: str, **kwargs: Any) -> None:
        if kwargs:
            raise TypeError("unexpected keyword argument 'mode'")
        super().put_file(lpath, rpath)


@pytest.fixture(params=[Careless, Strict])
def client(request: pytest.FixtureRequest) -> Iterator[type[Careless]]:
    fsspec.register_implementation("careless", request.param, clobber=True)
    Careless.store.clear()
    yield request.param
    Careless.others = None


@pytest.fixture
def ours(tmp_path: Path) -> Path:
    path = tmp_path / "ours"
    path.write_bytes(b"ours")
    return path


def test_the_first_one_stays_where_the_client_does_not_compare(
    client: type[Careless], ours: Path, tmp_path: Path
) -> None:
    (tmp_path / "second").write_bytes(b"second")

    assert object_store.upload(URL, ours)
    assert not object_store.upload(URL, tmp_path / "second")

    assert object_store.read(URL) == b"ours"


def test_who_was_written_over_hears_of_it(
    client: type[Careless], ours: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Careless, "others", b"theirs")

    assert not object_store.upload(URL, ours)


def test_a_damaged_file_gives_way_and_no_other(
    client: type[Careless], ours: Path, tmp_path: Path
) -> None:
    (tmp_path / "damaged").write_bytes(b"damaged")
    object_store.upload(URL, tmp_path / "damaged")
    damaged = object_store.info(URL)

    assert object_store.upload(URL, ours, damaged=damaged)
    assert not object_store.upload(URL, tmp_path / "damaged", damaged=damaged)

    assert object_store.read(URL) == b"ours"


class Answering(Careless):
    """An S3 client of a store that answers to a condition with a status."""

    protocol = ("careless", "s3")  # type: ignore[assignment]
    status = 0

    def put_file(self, lpath: str, rpath: str, **kwargs: Any) -> None:
        if kwargs.keys() & {"mode", "IfMatch"}:
            cause = Exception()
            cause.response = {"ResponseMetadata": {"HTTPStatusCode": self.status}}  # type: ignore[attr-defined]
            raise OSError("as s3fs has it") from cause
        super().put_file(lpath, rpath)


@pytest.mark.parametrize("is_there", [False, True])
@pytest.mark.parametrize("status", [412, 501])
def test_stores_answer_in_several_ways(
    status: int, is_there: bool, ours: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """412 without saying which condition failed, and 501 where none is known."""
    monkeypatch.setattr(Careless, "store", {})
    monkeypatch.setattr(Answering, "status", status)
    fsspec.register_implementation("careless", Answering, clobber=True)
    if is_there:
        Answering().pipe_file(URL, b"first")

    assert object_store.upload(URL, ours) == (status == 501 and not is_there)

    if status == 501:
        assert object_store.read(URL) == (b"first" if is_there else b"ours")
