"""mealv2.images: what is an image of a split, and the same pixels as torchvision's, bit by bit."""

import io
import os
import shutil
import unicodedata
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torchvision import datasets
from torchvision.datasets.folder import pil_loader
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Resize
from torchvision.transforms import functional as tvf

from mealv2.errors import ConfigError, DataError
from mealv2.images import ImageFolder, centre_crop, cut, decode, fingerprint, open_source
from mealv2.views import View, view_of


def noise(width: int, height: int, channels: int = 3, dtype: type = np.uint8) -> np.ndarray:
    """Pixels with structure at every scale, so that no resampling is without effect."""
    shape = (height, width, channels) if channels > 1 else (height, width)
    high = np.iinfo(dtype).max
    return np.random.default_rng(width * 9973 + height).integers(0, high, shape, dtype)


def photo(width: int, height: int) -> Image.Image:
    return Image.fromarray(noise(width, height))


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def plant(root: Path, *names: str, data: bytes | None = None) -> Path:
    """Write an image under each name; the names' length sets their size."""
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(photo(len(name), 3), "PNG") if data is None else data)
    return root


# --- ImageFolder ----------------------------------------------------------------------------------

TREE = [
    "train/ant/b.jpg",
    "train/ant/a.JPEG",
    "train/ant/nested/deep/c.png",
    "train/ant-eater/x.webp",  # '-' sorts before '/': keys and classes sort differently
    "train/Zebra/1.tif",
    "train/Zebra/10.bmp",
    "train/Zebra/2.PPM",
    "train/猫/写真.png",
]


def test_keys_classes_and_labels_are_those_of_torchvision(tmp_path):
    plant(tmp_path, *TREE)
    plant(tmp_path, "train/ant/notes.txt", "train/stray.png", data=b"no image of a class")
    (tmp_path / "train/Zebra/linked").symlink_to(tmp_path / "train/ant/nested")
    ours = ImageFolder(tmp_path, "train")
    theirs = datasets.ImageFolder(tmp_path / "train")

    split = tmp_path / "train"
    expected = {Path(p).relative_to(split).as_posix(): label for p, label in theirs.samples}
    assert dict(zip(ours.keys, ours.labels, strict=True)) == expected
    assert len(ours) == len(ours.keys) == 9
    assert ours.classes == theirs.classes
    assert ours.keys == sorted(ours.keys)
    assert [ours.read(i) for i in range(len(ours))] == [(split / k).read_bytes() for k in ours.keys]
    assert ours.sizes == [len(ours.read(i)) for i in range(len(ours))]


def test_order_does_not_depend_on_the_order_of_creation(tmp_path):
    names = [*TREE, *(f"train/ant/{i * 7919 % 1000}.png" for i in range(100))]
    forward = ImageFolder(plant(tmp_path / "a", *names), "train")
    backward = ImageFolder(plant(tmp_path / "b", *reversed(names)), "train")
    assert forward.keys == backward.keys
    assert forward.labels == backward.labels
    assert fingerprint(forward) == fingerprint(backward)


def test_keys_are_unicode_normalised(tmp_path):
    decomposed = unicodedata.normalize("NFD", "größe.png")
    plant(tmp_path, f"train/a/{decomposed}")
    source = ImageFolder(tmp_path, "train")
    assert source.keys == ["a/größe.png"] != [f"a/{decomposed}"]
    assert source.read(0)


def test_classes_do_not_depend_on_how_unicode_spells_the_folder_names(tmp_path):
    names, data = ["éclair", "fudge", "zoo"], encoded(photo(5, 3), "PNG")
    trees = [
        ImageFolder(
            plant(tmp_path / form, *(f"train/{n}/1.png" for n in spelled), data=data), "train"
        )
        for form in ("NFC", "NFD")
        for spelled in [[unicodedata.normalize(form, name) for name in names]]
    ]
    assert trees[0].keys == trees[1].keys
    assert trees[0].labels == trees[1].labels
    assert trees[0].classes == trees[1].classes
    assert fingerprint(trees[0]) == fingerprint(trees[1])


def test_names_that_differ_only_in_unicode_spelling_are_refused(tmp_path):
    plant(tmp_path, *(f"train/a/{unicodedata.normalize(f, 'é.png')}" for f in ("NFC", "NFD")))
    with pytest.raises(ConfigError, match="differ only in how Unicode spells them"):
        ImageFolder(tmp_path, "train")


def test_class_folders_that_differ_only_in_unicode_spelling_are_refused(tmp_path):
    for number, form in enumerate(("NFC", "NFD")):
        plant(tmp_path, f"train/{unicodedata.normalize(form, 'é')}/{number}.png")
    with pytest.raises(ConfigError, match="differ only in how Unicode spells them"):
        ImageFolder(tmp_path, "train")


def test_a_name_that_is_not_utf8_is_refused(tmp_path):
    plant(tmp_path, "train/a/1.png")
    os.link(tmp_path / "train/a/1.png", os.fsencode(tmp_path / "train/a") + b"/\xff.png")
    with pytest.raises(ConfigError, match="not valid UTF-8"):
        ImageFolder(tmp_path, "train")


def test_names_that_begin_with_a_dot_are_ignored(tmp_path):
    plant(tmp_path, "train/dog/1.png")
    plant(
        tmp_path,
        "train/dog/._1.png",
        "train/dog/.thumbnails/1.png",
        "train/.ipynb_checkpoints/1.png",
        "train/.DS_Store",
    )
    source = ImageFolder(tmp_path, "train")
    assert source.classes == ["dog"]
    assert source.keys == ["dog/1.png"]


def test_an_empty_class_is_refused_by_name(tmp_path):
    plant(tmp_path, "train/dog/1.png")
    plant(tmp_path, "train/cat/readme.txt", "train/cat/.hidden.png", data=b"x")
    with pytest.raises(ConfigError, match=r"train/cat holds no image .*\.jpg"):
        ImageFolder(tmp_path, "train")


def test_a_split_without_class_folders_is_refused(tmp_path):
    plant(tmp_path, "train/1.png")
    with pytest.raises(ConfigError, match="holds no class folders"):
        ImageFolder(tmp_path, "train")


def test_a_missing_split_is_refused_naming_what_is_there(tmp_path):
    plant(tmp_path, "training/dog/1.png", "validation/dog/1.png")
    with pytest.raises(ConfigError, match=r"no folder .*/val; .*training, validation\)"):
        ImageFolder(tmp_path, "val")
    with pytest.raises(ConfigError, match=r"no folder .*: nothing\)"):
        ImageFolder(tmp_path / "nowhere", "val")


def test_open_source_opens_an_image_folder_and_refuses_what_is_none(tmp_path):
    plant(tmp_path, *TREE)
    source = open_source(tmp_path, "train")
    assert source.keys == ImageFolder(tmp_path, "train").keys
    assert (source.split, len(source)) == ("train", 8)
    with pytest.raises(ConfigError, match=r"no folder .*/val"):
        open_source(tmp_path, "val")


def test_a_file_that_went_away_raises_os_error_when_read(tmp_path):
    plant(tmp_path, "train/dog/1.png")
    (tmp_path / "train/dog/0.png").symlink_to(tmp_path / "gone.png")
    source = ImageFolder(tmp_path, "train")
    assert source.sizes[0] == 0
    with pytest.raises(FileNotFoundError):
        source.read(0)


def rename_key(root: Path) -> None:
    (root / "train/ant/b.jpg").rename(root / "train/ant/bb.jpg")


def grow_file(root: Path) -> None:
    with (root / "train/ant/b.jpg").open("ab") as file:
        file.write(b"\0")


def rename_class(root: Path) -> None:
    (root / "train/Zebra").rename(root / "train/Zebras")


def drop_image(root: Path) -> None:
    (root / "train/Zebra/10.bmp").unlink()


@pytest.mark.parametrize(
    "change", [rename_key, grow_file, rename_class, drop_image], ids=lambda f: f.__name__
)
def test_fingerprint_changes_with(tmp_path, change):
    plant(tmp_path, *TREE)
    before = fingerprint(ImageFolder(tmp_path, "train"))
    change(tmp_path)
    assert fingerprint(ImageFolder(tmp_path, "train")) != before


def test_fingerprint_changes_with_nothing_but_a_label_or_a_class_name(tmp_path):
    source = ImageFolder(plant(tmp_path, *TREE), "train")
    seen = {fingerprint(source)}
    source.labels[0], kept = source.labels[0] + 1, source.labels[0]
    seen.add(fingerprint(source))
    source.labels[0] = kept
    source.classes[0] += "x"
    seen.add(fingerprint(source))
    assert len(seen) == 3


def test_fingerprint_does_not_change_with_mtime_or_place(tmp_path):
    plant(tmp_path / "here", *TREE)
    before = fingerprint(ImageFolder(tmp_path / "here", "train"))
    shutil.copytree(tmp_path / "here", tmp_path / "there")
    for path in (tmp_path / "there").rglob("*"):
        os.utime(path, (1, 1))
    assert fingerprint(ImageFolder(tmp_path / "there", "train")) == before


# --- decode ---------------------------------------------------------------------------------------


def exif_rotated() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: turn by 90 degrees
    return encoded(photo(31, 20), "JPEG", exif=exif)


def palette(transparency: int | bytes) -> bytes:
    image = photo(31, 20).quantize(16)
    return encoded(image, "PNG", transparency=transparency)


def animated(kind: str, **options: object) -> bytes:
    frames = [photo(31, 20), photo(31, 20).rotate(90), photo(31, 20).rotate(180)]
    return encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)


IMAGES = {
    "rgb.jpg": lambda: encoded(photo(31, 20), "JPEG"),
    "progressive.jpg": lambda: encoded(photo(31, 20), "JPEG", progressive=True),
    "grey.jpg": lambda: encoded(photo(31, 20).convert("L"), "JPEG"),
    "cmyk.jpg": lambda: encoded(Image.fromarray(noise(31, 20, 4), "CMYK"), "JPEG"),
    "exif-rotated.jpg": exif_rotated,
    "palette.png": lambda: encoded(photo(31, 20).quantize(16), "PNG"),
    "palette-one-transparent.png": lambda: palette(3),
    "palette-alpha.png": lambda: palette(bytes(range(0, 256, 16))),
    "rgba.png": lambda: encoded(Image.fromarray(noise(31, 20, 4), "RGBA"), "PNG"),
    "grey-alpha.png": lambda: encoded(Image.fromarray(noise(31, 20, 2), "LA"), "PNG"),
    "one-bit.png": lambda: encoded(photo(31, 20).convert("1"), "PNG"),
    "16-bit.png": lambda: encoded(Image.fromarray(noise(31, 20, 1, np.uint16)), "PNG"),
    "16-bit.tif": lambda: encoded(Image.fromarray(noise(31, 20, 1, np.uint16)), "TIFF"),
    "cmyk.tif": lambda: encoded(Image.fromarray(noise(31, 20, 4), "CMYK"), "TIFF"),
    "multi-page.tif": lambda: animated("TIFF"),
    "animated.webp": lambda: animated("WEBP", lossless=True),
    "animated-gif.webp": lambda: animated("GIF"),
    "a.bmp": lambda: encoded(photo(31, 20), "BMP"),
    "a.ppm": lambda: encoded(photo(31, 20), "PPM"),
    "a.pgm": lambda: encoded(photo(31, 20).convert("L"), "PPM"),
    "1x1.png": lambda: encoded(photo(1, 1), "PNG"),
}


@pytest.mark.parametrize("name", IMAGES)
def test_decode_equals_torchvisions_loader_bit_by_bit(tmp_path, name):
    data = IMAGES[name]()
    (tmp_path / name).write_bytes(data)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what PIL says of a palette with alpha; decode() is silent
        expected = pil_loader(tmp_path / name)
    image = decode(data)
    assert image.mode == "RGB"
    assert np.array_equal(np.asarray(image), np.asarray(expected))


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"", id="zero-byte"),
        pytest.param(b"<html>404 not found</html>", id="text named .jpg"),
        pytest.param(b"\xff\xd8\xff\xe0", id="a JPEG's first four bytes"),
        pytest.param(b"\x89PNG\r\n\x1a\n", id="a PNG's signature"),
        *(
            pytest.param(IMAGES[name]()[: int(len(IMAGES[name]()) * part)], id=f"{part} of {name}")
            for name in ("rgb.jpg", "16-bit.png", "animated.webp", "multi-page.tif", "a.bmp")
            for part in (0.2, 0.6)
            if (name, part) != ("multi-page.tif", 0.6)  # its first page is whole there
        ),
    ],
)
def test_what_is_no_whole_image_raises_data_error_in_one_line(data):
    with pytest.raises(DataError) as caught:
        decode(data)
    assert "\n" not in str(caught.value)


def test_a_decompression_bomb_raises_data_error(monkeypatch):
    data = encoded(photo(31, 20), "PNG")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(DataError, match="DecompressionBombError"):
        decode(data)


# --- from a view to pixels ------------------------------------------------------------------------

DRAWN = [("a.jpg", i, 100, 75) for i in range(24)] + [
    ("b.jpg", 0, width, height) for width, height in ((1, 1), (1, 90), (90, 1))
]
VIEWS = [
    *((w, h, view_of(key, index, seed=0, width=w, height=h)) for key, index, w, h in DRAWN),
    (500, 375, View(top=374, left=499, height=1, width=1, flip=True)),
    (500, 375, View(top=0, left=0, height=375, width=500, flip=False)),
    (500, 375, View(top=5, left=7, height=32, width=32, flip=True)),
]
SHAPES = [(500, 375), (375, 500), (256, 256), (257, 256), (256, 259), (1, 1), (3, 40), (41, 3)]


@pytest.mark.parametrize("img_size", [1, 32, 57])
def test_cut_equals_torchvisions_resized_crop_and_flip_bit_by_bit(img_size):
    for width, height, view in VIEWS:
        image = photo(width, height)
        box = view.top, view.left, view.height, view.width
        expected = tvf.resized_crop(
            image, *box, [img_size, img_size], InterpolationMode.BILINEAR, antialias=True
        )
        expected = tvf.hflip(expected) if view.flip else expected
        pixels = cut(image, view, img_size)
        assert pixels.dtype == np.uint8
        assert pixels.shape == (img_size, img_size, 3)
        assert np.array_equal(pixels, np.asarray(expected)), (width, height, view)


@pytest.mark.parametrize("img_size", [1, 6, 7, 32, 224, 380])
@pytest.mark.parametrize(("width", "height"), [*SHAPES, (333, 499)])
def test_centre_crop_equals_torchvisions_resize_and_centre_crop_bit_by_bit(width, height, img_size):
    image = photo(width, height)
    official = Compose([Resize(int(256 / 224 * img_size)), CenterCrop(img_size)])
    pixels = centre_crop(image, img_size)
    assert pixels.dtype == np.uint8
    assert np.array_equal(pixels, np.asarray(official(image)))
