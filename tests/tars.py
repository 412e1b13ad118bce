"""Writing tar files of images, as people and as webdataset do."""

import io
import itertools
import tarfile
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath

from mealv2.data.content_hash import content_hash
from mealv2.data.folder import ImageFolder
from mealv2.data.tar_index import TarIndex, create_index, index_bytes, index_path
from mealv2.data.tar_writer import sample, sample_names, tar_writer

Files = Iterable[tuple[str, bytes]]


def tar_of(files: Files, *, kind: int = tarfile.GNU_FORMAT, mtime: int = 0) -> bytes:
    """Return a tar file."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=kind) as tar:
        for name, data in files:
            member = tarfile.TarInfo(name)
            member.size, member.mtime = len(data), mtime
            tar.addfile(member, io.BytesIO(data))
    return stream.getvalue()


def write_tar(path: Path, files: Files, *, kind: int = tarfile.GNU_FORMAT) -> Path:
    """Write a tar file, and the folders it lies in."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(tar_of(files, kind=kind))
    return path


def write_with_webdataset(path: Path, files: Files) -> Path:
    """Write a tar file through webdataset's own writer."""
    import webdataset

    path.parent.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # it leaves its files open
        with path.open("wb") as stream:
            writer = webdataset.TarWriter(stream, encoder=False)
            for name, group in itertools.groupby(files, lambda file: file[0].rpartition(".")[0]):
                of_sample = {file.rpartition(".")[2]: data for file, data in group}
                writer.write({"__key__": name, **of_sample})
            writer.close()
    return path


def write_packed(
    path: Path, samples: Iterable[tuple[str, int, bytes]], *, extra: int = 0
) -> TarIndex:
    """Write a tar file of (key, class, image) and its index, as `mealv2 pack` does.

    The originals of the images had ``extra`` bytes more.
    """
    samples = list(samples)
    names = sample_names([key for key, _, _ in samples])
    with path.open("wb") as stream, tar_writer(stream) as writer:
        for name, (key, class_id, image) in zip(names, samples, strict=True):
            writer.write(sample(name, key, class_id, image))
    sizes = [len(image) + extra for _, _, image in samples]
    hashes = [(content_hash(image), content_hash(image) ^ extra) for _, _, image in samples]
    index = create_index(path, sizes, hashes)
    index_path(path).write_bytes(index_bytes(index))
    return index


def files_of(
    source: ImageFolder, positions: Sequence[int], *, keys: bool
) -> Iterator[list[tuple[str, bytes]]]:
    """Yield the members of each image's sample; with ``keys`` its own key as well."""
    for position in positions:
        path = PurePosixPath(source.keys[position])
        stem = path.with_suffix("").as_posix()
        yield [
            (f"{stem}.cls", str(source.labels[position]).encode()),
            (f"{stem}{path.suffix}", source.read(position)),
            *([(f"{stem}.key", source.keys[position].encode())] if keys else []),
        ]


def tar_tree(
    data_dir: Path,
    root: Path,
    *,
    keys: bool = False,
    beside: bool = True,
    per_shard: int = 10,
    by_webdataset: bool = False,
) -> Path:
    """Write the tree as ROOT/SPLIT-000000.tar, … or as ROOT/SPLIT/000000.tar, …, with classes.txt.

    Samples lie in the order of the tree's keys.
    """
    write = write_with_webdataset if by_webdataset else write_tar
    for split in ("train", "val"):
        source = ImageFolder(data_dir, split)
        for number, first in enumerate(range(0, len(source), per_shard)):
            part = range(len(source))[first : first + per_shard]
            name = f"{split}{'-' if beside else '/'}{number:06d}.tar"
            write(root / name, itertools.chain(*files_of(source, part, keys=keys)))
        (root / "classes.txt").write_text("".join(f"{name}\n" for name in source.classes))
    return root
