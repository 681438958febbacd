"""Image folders with many formats and nested folders; warnings about other files; class names of an .npz."""

import logging
import os

import numpy as np
import pytest
from PIL import Image, features

from lt_adv.data import images, load
from tests.data.test_sources import picture, save

KINDS = {
    "a.png": {},
    "b.PNG": {},
    "c.webp": {"format": "WEBP", "lossless": True},
    "d.BMP": {"format": "BMP"},
    "e.tiff": {"format": "TIFF"},
    "f.tif": {"format": "TIFF", "compression": "tiff_lzw"},
    "g.ppm": {"format": "PPM"},
    "h.jp2": {"format": "JPEG2000", "irreversible": False},
}
LOSSY = {"i.jfif": "JPEG", "j.JPEG": "JPEG", "k.jpe": "JPEG", "l.gif": "GIF", "m.avif": "AVIF"}


@pytest.fixture
def folder(tmp_path):
    """Classes a and b with one PNG each, in both splits."""
    for split in ("train", "test"):
        for c in "ab":
            save(tmp_path / "images" / split / c / "0.png", picture(ord(c)))
    return tmp_path / "images"


@pytest.fixture
def read(folder, tmp_path):
    return lambda: load({"name": "image_folder", "path": str(folder), "data_dir": str(tmp_path)})


def test_lossless_formats(folder, read):
    for i, (name, options) in enumerate(KINDS.items()):
        save(folder / "train" / "a" / name, picture(i), **options)
    data = read()
    names = sorted(["0.png", *KINDS])
    for position, name in enumerate(names[1:], 1):
        np.testing.assert_array_equal(data.train.image[position], picture(list(KINDS).index(name)), err_msg=name)


@pytest.mark.parametrize("name", LOSSY)
def test_lossy_formats(folder, read, name):
    if name == "m.avif" and not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    save(folder / "train" / "a" / name, np.full((6, 6, 3), 120, np.uint8), format=LOSSY[name])
    assert np.abs(read().train.image[1].astype(int) - 120).max() < 4


def test_nested_folders_belong_to_their_class(folder, read):
    before = read()
    for i, name in enumerate(("z/2.png", "z/deep/1.png", "-/3.png")):
        save(folder / "train" / "a" / name, picture(i))
    data = read()
    assert data.train.label.tolist() == [0, 0, 0, 0, 1] and data.digest != before.digest
    for position, expected in enumerate((picture(2), picture(ord("a")), picture(0), picture(1))):
        np.testing.assert_array_equal(data.train.image[position], expected)


def test_order_does_not_depend_on_the_file_system(folder, read, monkeypatch):
    for i in range(5):
        save(folder / "train" / "a" / f"sub{i}" / "x.png", picture(i))
    first, scandir = read().digest, os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: reversed(sorted(scandir(path), key=lambda e: e.name)))
    assert read().digest == first


def test_warning_counts_other_files(folder, read, caplog):
    for name in ("train/a/x.txt", "train/a/sub/y.TXT", "test/b/scan.heic", "train/b/README", "train/list.csv"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"x")
    for name in ("train/a/.hidden.png", "train/a/._0.png", "train/.git/0.png", "test/__MACOSX/0.png", ".DS_Store"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"x")
    save(folder / "train" / "loose.png", picture(0))
    os.symlink("..", folder / "train" / "a" / "sub" / "up")
    with caplog.at_level(logging.WARNING):
        data = read()
    assert len(data.train) == 2 and len(caplog.records) == 1
    counted = "2 .txt, 1 .csv, 1 .heic, 1 images outside class folders, 1 links to a folder above, 1 without suffix."
    assert caplog.messages == [f"{folder}: 7 files are not read: {counted}"]


def test_no_warning_without_other_files(folder, read, caplog):
    with caplog.at_level(logging.WARNING):
        read()
    assert not caplog.records


def test_class_folder_without_images_is_refused(folder, read):
    for split in ("train", "test"):
        (folder / split / "c").mkdir()
        (folder / split / "c" / "0.heic").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"train/c has no images, but 1 other files: 1 \.heic\."):
        read()


BAD = [
    (
        "0.png",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 1\n",
        "JPEG or PNG image: it is a Git LFS",
    ),
    ("0.png", b"<!DOCTYPE html><html>", "JPEG or PNG image: it is an HTML page"),
    ("1.webp", b"<html>", "not a readable image: it is an HTML page"),
    ("1.bmp", b"\x00\x01\x02", r"1\.bmp is not a readable image\."),
]


@pytest.mark.parametrize(("name", "content", "message"), BAD)
def test_files_that_are_not_images_are_named(folder, read, name, content, message):
    (folder / "train" / "a" / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        read()
    assert "\n" not in str(caught.value)


def test_webp_image_with_the_suffix_png_is_refused(folder, read):
    save(folder / "train" / "a" / "0.png", picture(0), format="WEBP")
    with pytest.raises(ValueError, match=r"not a readable JPEG or PNG image: it is a WEBP image, rename it"):
        read()


@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        (np.zeros((6, 6), np.float32), "floating-point numbers of unknown range"),
        (np.full((6, 6), 1 << 20, np.int32), "pixels from 1048576 to 1048576 are outside 0 to 65535"),
    ],
)
def test_pixels_of_unknown_range_are_refused(folder, read, pixels, message):
    """Pillow would clip them at 255."""
    save(folder / "train" / "a" / "0.tiff", pixels)
    with pytest.raises(ValueError, match=f"0.tiff is not a readable image .*{message}"):
        read()


def test_16_bit_images():
    deep = np.arange(36, dtype=np.uint16).reshape(6, 6) * 1800
    for image in (Image.fromarray(deep), Image.fromarray(deep.astype(np.int32))):
        np.testing.assert_array_equal(images.convert(image, 1, None)[..., 0], deep >> 8)


NAMES = [
    (np.array([b"cat", b"d\xc3\xb6g"]), ("cat", "dög")),
    (np.array(["cat", "dog"]), ("cat", "dog")),
    (np.array([7, 8]), ("7", "8")),
    (np.array(["cat", "cat"]), ("cat (0)", "cat (1)")),
    (np.array(["", "dog"]), ("(0)", "dog")),
]


@pytest.mark.parametrize(("names", "expected"), NAMES)
def test_class_names_of_an_npz(tmp_path, names, expected):
    arrays = {f"{s}_image": picture(0, (2, 4, 4, 3)) for s in ("train", "test")}
    arrays |= {f"{s}_label": np.array([0, 1]) for s in ("train", "test")}
    np.savez(tmp_path / "a.npz", **arrays, class_names=names)
    assert load({"name": "npz", "path": str(tmp_path / "a.npz"), "data_dir": str(tmp_path)}).class_names == expected


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (np.array([b"\xff", b"a"]), r"class_names has b'\\xff', which is not UTF-8"),
        (np.array([["a"], ["b"]]), r"\(2, 1\)"),
    ],
)
def test_invalid_class_names_are_refused(tmp_path, names, message):
    arrays = {f"{s}_image": picture(0, (2, 4, 4, 3)) for s in ("train", "test")}
    arrays |= {f"{s}_label": np.array([0, 1]) for s in ("train", "test")}
    np.savez(tmp_path / "a.npz", **arrays, class_names=names)
    with pytest.raises(ValueError, match=message):
        load({"name": "npz", "path": str(tmp_path / "a.npz"), "data_dir": str(tmp_path)})
