"""Folders of images: damaged, of other kinds, too large, of other sizes; classes without images; links and pipes."""

import io
import os
import struct
import zlib
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from experiments.fuzz.box import Box
from experiments.fuzz.cases import Case, no_computation
from experiments.fuzz.draw import damaged, one
from experiments.fuzz.surfaces.arguments import ROOT

MODES = ("L", "RGB", "RGBA", "P", "1", "LA", "I;16", "CMYK")
OTHERS = ("GIF", "BMP", "TIFF", "WEBP", "PPM", "ICO")
NETWORK = "{'name':'wide_resnet','depth':10,'width':1,'dtype':'float32','head':{'name':'linear'}}"
ARGUMENTS = (f"--config.model={NETWORK}", "--config.data.imbalance=none", "--config.optim.batch_size=2")


def picture(rng: np.random.Generator, mode: str = "RGB", side: tuple[int, int] = (8, 8), kind: str = "PNG") -> bytes:
    """An encoded image of noise; CMYK is always a JPEG."""
    pixels = rng.integers(0, 256, (*side, 3)).astype(np.uint8)
    image = Image.fromarray(pixels).convert("L" if mode == "I;16" else mode)
    if mode == "I;16":
        image = Image.fromarray(np.asarray(image).astype(np.uint16) * 257)
    stream = io.BytesIO()
    image.save(stream, "JPEG" if mode == "CMYK" else kind)
    return stream.getvalue()


def chunk(name: bytes, content: bytes) -> bytes:
    """Of a PNG."""
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def bomb(width: int, height: int, more: bytes = b"") -> bytes:
    """A PNG of a few bytes that claims this size; `more` are chunks after its header."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + more + chunk(b"IDAT", zlib.compress(bytes(9))) + chunk(b"IEND", b"")


class ImageFolder:
    def __init__(self, shared: Path) -> None:
        del shared

    def running(self) -> AbstractContextManager[Any]:
        return no_computation()

    def case(self, rng: np.random.Generator, box: Box, valid: bool) -> Case:
        for split, number in (("train", 3), ("test", 2)):
            for name in ("cat", "dog"):
                for position in range(number):
                    path = box.given / split / name / f"{position}.png"
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_bytes(picture(rng))
        argv = [f"--config={ROOT}/configs/at.py:dataset=image_folder", *ARGUMENTS, f"--workdir={box.run}"]
        argv += [f"--config.data.path={box.given}", f"--config.data.data_dir={box.data}"]
        target = box.given / one(rng, ("train", "test")) / one(rng, ("cat", "dog")) / "1.png"
        if valid:
            return Case("valid", self._whole(rng, target, argv), argv, True)
        changes = (self._damaged, self._damaged, self._content, self._place, self._classes, self._size)
        return one(rng, changes)(rng, target, argv)

    def _whole(self, rng: np.random.Generator, target: Path, argv: list[str]) -> str:
        """One image of another mode, kind or name; in words."""
        mode, change = one(rng, MODES), one(rng, ("mode", "size", "name", "beside", "link"))
        if change == "mode":
            target.write_bytes(picture(rng, mode))
            return f"an image of mode {mode}"
        if change == "size":
            size = int(rng.integers(8, 20))
            target.write_bytes(picture(rng, mode, (int(rng.integers(1, 40)), int(rng.integers(1, 40)))))
            argv.append(f"--config.data.image_size={size}")
            return f"an image of another size, all made {size} x {size}"
        if change == "name":
            name = one(rng, ("ä.JPG", "a b.jpeg", "[x].Png", "-.png", "%s.png", "1.png.jpg"))
            (target.parent / name).write_bytes(picture(rng, kind="PNG"))
            return f"an image called {name}"
        if change == "link":
            (target.parent / "link.png").symlink_to(target)
            return "a link to an image"
        (target.parent / "notes.txt").write_bytes(rng.bytes(20))
        (target.parent / ".hidden.png").write_bytes(rng.bytes(20))
        (target.parents[1] / "list.csv").write_text("cat,dog")
        return "other files beside the images"

    def _damaged(self, rng: np.random.Generator, target: Path, argv: list[str]) -> Case:
        """The bytes of one image."""
        mode, kind = one(rng, MODES), one(rng, ("PNG", "JPEG"))
        mode = "RGB" if kind == "JPEG" and mode != "L" else mode
        what, content = damaged(rng, picture(rng, mode, kind=kind))
        target.write_bytes(content)
        expected = False if what in ("empty", "text", "random bytes") else None
        return Case("damaged image", f"{kind} {mode}: {what}", argv, expected, [str(target)])

    def _content(self, rng: np.random.Generator, target: Path, argv: list[str]) -> Case:
        """Another kind of image, or one that is far larger than its file."""
        large = int(rng.integers(1 << 14, 1 << 31))
        contents = {
            "another kind of image": lambda: picture(rng, kind=one(rng, OTHERS)),
            "claims many pixels": lambda: bomb(large, one(rng, (large, 8, 1 << 14))),
            "claims no pixels": lambda: bomb(0, 8),
            "much text": lambda: bomb(8, 8, chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(1 << 26)))),
            "a code": lambda: b"\x80\x04cposix\nsystem\n(S'touch canary'\ntR.",
        }
        what = one(rng, list(contents))
        target.write_bytes(contents[what]())
        return Case(what, f"{what}, {large}", argv, False, [str(target)])

    def _place(self, rng: np.random.Generator, target: Path, argv: list[str]) -> Case:
        """Something else where an image is expected."""
        target.unlink()
        what = one(rng, ("broken link", "link to itself", "folder", "pipe", "endless device", "link to a folder"))
        if what == "folder":
            target.mkdir()
        elif what == "pipe":
            os.mkfifo(target)
        else:
            to = {"broken link": "nowhere", "link to itself": target.name, "endless device": "/dev/zero"}
            target.symlink_to(to.get(what, ".."))
        return Case(what, f"{what} in the place of an image", argv, False, [str(target)])

    def _classes(self, rng: np.random.Generator, target: Path, argv: list[str]) -> Case:
        """Classes that are empty, in one split alone, or of names that are no text."""
        split, folder = target.parents[1], target.parent
        what = one(rng, ("no images", "in one split", "no split", "a file", "one class", "no text", "path"))
        named = [str(split.parent)]
        if what == "no images":
            (split / "empty").mkdir()
        elif what == "in one split":
            (split / "new").mkdir()
            (split / "new" / "1.png").write_bytes(picture(rng))
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
            argv[-2] = f"--config.data.path={one(rng, ('', split / 'nowhere', target, '/dev/null', 'nul' + chr(0)))}"
            named = ["path", *argv[-2].split("=")[1:], "nul"]
        return Case(f"classes: {what}", what, argv, False, [name for name in named if name])

    def _size(self, rng: np.random.Generator, target: Path, argv: list[str]) -> Case:
        """An image of another size than the others; or a size for all that cannot be."""
        if rng.integers(2):
            target.write_bytes(picture(rng, side=(8, int(rng.integers(9, 40)))))
            return Case("different sizes", "different sizes", argv, False, [str(target)])
        size = one(rng, (0, -1, 10**4, 10**5, 10**6, 10**9, "x", 0.5, "nan"))
        argv.append(f"--config.data.image_size={size}")
        return Case("impossible size", f"image_size {size}", argv, False, ["image_size"])
