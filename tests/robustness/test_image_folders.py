"""Folders of images: damaged, of other kinds, too large, of other sizes; classes without images; links and pipes."""

import functools
import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tests.robustness.inputs import (
    ROOT,
    Case,
    Draw,
    attempt,
    choose,
    damaged,
    inputs,
)
from tests.robustness.sandbox import Sandbox

MODES = ("L", "RGB", "RGBA", "P", "1", "LA", "I;16", "CMYK")
OTHERS = ("GIF", "BMP", "TIFF", "WEBP", "PPM", "ICO")
NETWORK = "{'name':'wide_resnet','depth':10,'width':1,'dtype':'float32','head':{'name':'linear'}}"
ARGUMENTS = (
    f"--config.model={NETWORK}",
    "--config.data.imbalance=none",
    "--config.optim.batch_size=2",
    "--config.cpu_devices=1",  # of the eight devices of the tests; the batch size must be a multiple
)


def picture(mode: str = "RGB", side: tuple[int, int] = (8, 8), kind: str = "PNG") -> bytes:
    """Returns an encoded image of noise; CMYK is always a JPEG."""
    pixels = np.random.default_rng(0).integers(0, 256, (*side, 3)).astype(np.uint8)
    image = Image.fromarray(pixels).convert("L" if mode == "I;16" else mode)
    if mode == "I;16":
        image = Image.fromarray(np.asarray(image).astype(np.uint16) * 257)
    stream = io.BytesIO()
    image.save(stream, "JPEG" if mode == "CMYK" else kind)
    return stream.getvalue()


def chunk(name: bytes, content: bytes) -> bytes:
    """Returns a chunk of a PNG."""
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def bomb(width: int, height: int, more: bytes = b"") -> bytes:
    """Returns a PNG of a few bytes whose header has this size; `more` are chunks after the header."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + more + chunk(b"IDAT", zlib.compress(bytes(9))) + chunk(b"IEND", b"")


def case(draw: Draw, box: Sandbox, valid: bool) -> Case:
    for split, number in (("train", 3), ("test", 2)):
        for name in ("cat", "dog"):
            for position in range(number):
                path = box.input / split / name / f"{position}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(picture())
    argv = [f"--config={ROOT}/configs/at.py:dataset=image_folder", *ARGUMENTS, f"--workdir={box.run}"]
    argv += [f"--config.data.path={box.input}", f"--config.data.data_dir={box.data}"]
    target = box.input / choose(draw, ("train", "test")) / choose(draw, ("cat", "dog")) / "1.png"
    if valid:
        return Case("valid", _valid_change(draw, target, argv), argv, True)
    changes = (_damaged, _damaged, _content, _place, _classes, _size)
    return choose(draw, changes)(draw, target, argv)


def _valid_change(draw: Draw, target: Path, argv: list[str]) -> str:
    """Changes mode, size or name of an image; returns a description."""
    mode, change = choose(draw, MODES), choose(draw, ("mode", "size", "name", "other files", "link"))
    if change == "mode":
        target.write_bytes(picture(mode))
        return f"an image of mode {mode}"
    if change == "size":
        size = draw(st.integers(8, 19))
        target.write_bytes(picture(mode, draw(st.tuples(st.integers(1, 39), st.integers(1, 39)))))
        argv.append(f"--config.data.image_size={size}")
        return f"an image of another size, all made {size} x {size}"
    if change == "name":
        name = choose(draw, ("ä.JPG", "a b.jpeg", "[x].Png", "-.png", "%s.png", "1.png.jpg"))
        (target.parent / name).write_bytes(picture(kind="PNG"))
        return f"an image called {name}"
    if change == "link":
        (target.parent / "link.png").symlink_to(target)
        return "a link to an image"
    (target.parent / "notes.txt").write_bytes(draw(st.binary(min_size=20, max_size=20)))
    (target.parent / ".hidden.png").write_bytes(draw(st.binary(min_size=20, max_size=20)))
    (target.parents[1] / "list.csv").write_text("cat,dog")
    return "other files in the folder of the images"


def _damaged(draw: Draw, target: Path, argv: list[str]) -> Case:
    """Damages the bytes of an image."""
    mode, kind = choose(draw, MODES), choose(draw, ("PNG", "JPEG"))
    mode = "RGB" if kind == "JPEG" and mode != "L" else mode
    what, content = damaged(draw, picture(mode, kind=kind))
    target.write_bytes(content)
    expected = False if what in ("empty", "text", "random bytes") else None
    return Case("damaged image", f"{kind} {mode}: {what}", argv, expected, [str(target)])


def _content(draw: Draw, target: Path, argv: list[str]) -> Case:
    """Writes another kind of image, or one that is far larger than its file."""
    large = draw(st.integers(1 << 14, (1 << 31) - 1))
    contents = {
        "another kind of image": lambda: picture(kind=choose(draw, OTHERS)),
        "claims many pixels": lambda: bomb(large, choose(draw, (large, 8, 1 << 14))),
        "claims no pixels": lambda: bomb(0, 8),
        "much text": lambda: bomb(8, 8, chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(1 << 26)))),
        "a code": lambda: b"\x80\x04cposix\nsystem\n(S'touch canary'\ntR.",
    }
    what = choose(draw, list(contents))
    target.write_bytes(contents[what]())
    return Case(what, f"{what}, {large}", argv, False, [str(target)])


def _place(draw: Draw, target: Path, argv: list[str]) -> Case:
    """Puts something else in the place of an image."""
    target.unlink()
    what = choose(draw, ("broken link", "link to itself", "folder", "pipe", "endless device", "link to a folder"))
    if what == "folder":
        target.mkdir()
    elif what == "pipe":
        os.mkfifo(target)
    else:
        to = {"broken link": "nowhere", "link to itself": target.name, "endless device": "/dev/zero"}
        target.symlink_to(to.get(what, ".."))
    return Case(what, f"{what} instead of an image", argv, False, [str(target)])


def _classes(draw: Draw, target: Path, argv: list[str]) -> Case:
    """Changes classes: empty, in one split only, or with a name that is not text."""
    split, folder = target.parents[1], target.parent
    what = choose(draw, ("no images", "in one split", "no split", "a file", "one class", "no text", "path"))
    named = [str(split.parent)]
    if what == "no images":
        (split / "empty").mkdir()
    elif what == "in one split":
        (split / "new").mkdir()
        (split / "new" / "1.png").write_bytes(picture())
    elif what == "no split":
        split.rename(split.parent / "other")
    elif what == "a file":
        split.rename(split.parent / "other")
        split.write_bytes(b"")
    elif what == "one class":
        for part in ("train", "test"):
            (split.parent / part / folder.name).rename(split.parent / part / ".hidden")
        named = ["class"]
    elif what == "no text":
        named = ["class name"]
        for part in ("train", "test"):
            folder = split.parent / part / folder.name
            folder.rename(os.fsdecode(os.fsencode(folder) + b"\xff"))
    else:
        argv[-2] = f"--config.data.path={choose(draw, ('', split / 'nowhere', target, '/dev/null', 'nul' + chr(0)))}"
        named = ["path", *argv[-2].split("=")[1:], "nul"]
    return Case(f"classes: {what}", what, argv, False, [name for name in named if name])


def _size(draw: Draw, target: Path, argv: list[str]) -> Case:
    """Writes an image of another size, or sets an impossible size for all images."""
    if draw(st.booleans()):
        target.write_bytes(picture(side=(8, draw(st.integers(9, 39)))))
        return Case("different sizes", "different sizes", argv, False, [str(target)])
    size = choose(draw, (0, -1, 10**4, 10**5, 10**6, 10**9, "x", 0.5, "nan"))
    argv.append(f"--config.data.image_size={size}")
    return Case("impossible size", f"image_size {size}", argv, False, ["image_size"])


@inputs(4)
@given(st.data())
def test_valid_image_folders_are_accepted(tmp_path, data):
    attempt(functools.partial(case, valid=True), data.draw, tmp_path)


@inputs(14)
@given(st.data())
def test_bad_image_folders_are_refused_in_one_line(tmp_path, data):
    attempt(functools.partial(case, valid=False), data.draw, tmp_path)
