"""Encoded images to uint8 arrays, with a thread pool; every failure is one line that names the image."""

import dataclasses
import hashlib
import io
import math
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from lt_adv.data.dataset import SplitReader
from lt_adv.runtime import atomic_io

MAX_PIXELS = 1 << 26  # below Pillow's own limit: a small file that claims more is a decompression bomb
LARGEST = math.isqrt(MAX_PIXELS)  # side of a square that images are scaled to
CHUNK = 256
USUAL = ("JPEG", "PNG")
FORMATS = (*USUAL, "WEBP", "BMP", "DIB", "GIF", "TIFF", "PPM", "JPEG2000", "AVIF")  # decoded by Pillow itself
USUAL_SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png")
OTHER_SUFFIXES = (".webp", ".bmp", ".dib", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".avif")
SUFFIXES = (*USUAL_SUFFIXES, *OTHER_SUFFIXES)


class BadImage(ValueError):
    """An image that cannot be used."""


@dataclasses.dataclass(frozen=True)
class Encoded:
    """The images of a split as files: `names` for messages, `read(positions)` their bytes, from any thread.

    `identity` changes with their bytes, as far as that is seen without reading them.
    """

    names: Sequence[str]
    read: Callable[[Sequence[int]], list[bytes]]
    label: np.ndarray
    index: np.ndarray
    identity: str


class LazyImages:
    """Images that are decoded each time they are asked for: `images[rows]`, by a slice or by positions, is the array
    uint8 [k, h, w, c] that the decoded images would give. A bad image is a ValueError then, not before.
    """

    dtype, ndim = np.dtype(np.uint8), 4

    def __init__(self, encoded: Encoded, shape: tuple[int, int, int], size: int | None, rows: np.ndarray | None = None):
        self._encoded, self._size = encoded, size
        self._rows = np.arange(len(encoded.names)) if rows is None else rows
        self.shape = (len(self._rows), *shape)
        self.nbytes = math.prod(self.shape)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, rows: slice | np.ndarray) -> np.ndarray:
        positions = self._rows[rows]
        parts = [positions[i : i + CHUNK] for i in range(0, len(positions), CHUNK)]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            decoded = list(pool.map(self._decode, parts))
        return np.concatenate(decoded) if decoded else np.zeros((0, *self.shape[1:]), np.uint8)

    def __array__(self, dtype: object = None, copy: bool | None = None) -> np.ndarray:
        if dtype not in (None, self.dtype) or copy is False:
            raise ValueError(f"Images are decoded to new arrays of uint8, not {dtype}.")
        return self[:]

    def read(self, rows: np.ndarray) -> np.ndarray:
        """What `images[rows]` gives, in the caller's thread."""
        return self._decode(self._rows[rows])

    def at(self, rows: np.ndarray) -> "LazyImages":
        """The images at these positions, decoded no more than before."""
        return LazyImages(self._encoded, self.shape[1:], self._size, self._rows[rows])

    @property
    def digest(self) -> str:
        """Changes with the files and the choice of them: pixels would all have to be decoded."""
        said = f"{self._encoded.identity} {self.shape} {self._size} ".encode()
        return hashlib.sha256(said + self._rows.astype("<i8").tobytes()).hexdigest()

    def _decode(self, positions: Sequence[int]) -> np.ndarray:
        channels = self.shape[-1]
        decoded = _each(self._encoded, positions, lambda data, name: convert(_open(data, name), channels, self._size))
        for position, image in zip(positions, decoded, strict=True):
            if image.shape != self.shape[1:]:
                raise BadImage(f"{self._encoded.names[position]} is {image.shape}, the others are {self.shape[1:]}.")
        return np.stack(decoded)


def _open(data: bytes, name: str) -> Image.Image:
    if not data:
        raise BadImage(f"{name} is empty.")
    image = Image.open(io.BytesIO(data), formats=_formats(name))
    if image.width * image.height > MAX_PIXELS:
        raise BadImage(f"{name} claims {image.width} x {image.height} pixels, more than the {MAX_PIXELS} allowed.")
    return image


def _formats(name: str) -> tuple[str, ...]:
    """Those that an image may have: JPEG and PNG stand for each other, and what else is called so is a wrong file."""
    return USUAL if name.lower().endswith(USUAL_SUFFIXES) else FORMATS


def _reason(data: bytes, name: str, error: Exception) -> str:
    """Why this is not an image: what it is, where that can be seen, else what Pillow says."""
    if not isinstance(error, UnidentifiedImageError):
        return f" ({' '.join(str(error).split())})"
    try:  # Pillow's "cannot identify" names nothing but an address in memory
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            return f": it is a {image.format} image, and its name should end so"
    except Exception:  # as wherever Pillow reads what is not an image
        what = atomic_io.format_of(data)
        return f": it is {what}" if what else ""


def _grey(image: Image.Image) -> bool:
    return image.mode in ("1", "L", "LA") or image.mode.startswith("I")


def convert(image: Image.Image, channels: int, size: int | None) -> np.ndarray:
    """uint8 [h, w, channels]; `size` scales and centre-crops to a square (bilinear, antialiased); no transparency."""
    if image.mode.startswith("I"):  # 16 bits a pixel, which Pillow would clip at 255
        pixels = np.asarray(image)
        if pixels.size and not 0 <= pixels.min() <= pixels.max() < 1 << 16:
            raise ValueError(f"pixels from {pixels.min()} to {pixels.max()}, where 16 bits hold 0 to 65535")
        image = Image.fromarray((pixels >> 8).astype(np.uint8))
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers, whose range is not known")
    image = image.convert("L" if channels == 1 else "RGB")
    if size is not None and image.size != (size, size):
        image = ImageOps.fit(image, (size, size), method=Image.Resampling.BILINEAR)
    return np.asarray(image, np.uint8).reshape(image.height, image.width, channels)


def resize(image: np.ndarray, size: int | None) -> np.ndarray:
    """Images in memory, uint8 [n, h, w, c], scaled and centre-cropped to squares of `size` pixels (None: unchanged)."""
    if size is None or image.shape[1:3] == (size, size):
        return image
    channels = image.shape[-1]
    needed, there = len(image) * size * size * channels, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > there:
        raise ValueError(
            f"config.data.image_size {size} makes {needed >> 30} GiB of images, and this machine has {there >> 30} GiB "
            "of memory: make it smaller."
        )
    return np.stack([convert(Image.fromarray(x[..., 0] if channels == 1 else x), channels, size) for x in image])


def _each(encoded: Encoded, positions: Sequence[int], work: Callable[[bytes, str], object]) -> list:
    """`work` on the images at these positions, one after the other."""
    results = []
    for position, data in zip(positions, encoded.read(positions), strict=True):
        name = encoded.names[position]
        try:
            results.append(work(data, name))
        except BadImage:
            raise
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            kinds = "JPEG or PNG image" if _formats(name) == USUAL else "image"
            raise BadImage(f"{name} is not a readable {kinds}{_reason(data, name, error)}.") from error
    return results


def _chunks(encoded: Encoded, work: Callable[[bytes, str], object]) -> Iterator[list]:
    """`work` on every image, in order, a list per chunk; a few chunks ahead of the caller, never all of them."""
    names = encoded.names

    def run(start: int) -> list:
        return _each(encoded, range(start, min(start + CHUNK, len(names))), work)

    # No more threads than cores: on small images the rest would only wait for the interpreter lock.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        starts, pending = iter(range(0, len(names), CHUNK)), []
        try:
            while True:
                while len(pending) < 32 and (start := next(starts, None)) is not None:
                    pending.append(pool.submit(run, start))
                if not pending:
                    return
                yield pending.pop(0).result()
        finally:
            for future in pending:
                future.cancel()


def decodings(
    splits: dict[str, Encoded], size: int | None, shape: tuple[int, int, int] | None = None
) -> dict[str, SplitReader]:
    """The splits, about to be decoded to one (h, w, c): `shape`, or as all headers say; c is 1 if every image is grey.

    ValueError naming two images of different sizes, unless `size` makes them equal.
    """
    shape = shape or _common_shape(splits, size)
    return {
        k: SplitReader(
            shape=(len(e.names), *shape),
            label=e.label.astype(np.int32),
            index=e.index.astype(np.int64),
            blocks=partial(_decode, e, shape, size),
            image=LazyImages(e, shape, size),
        )
        for k, e in splits.items()
    }


def _common_shape(splits: dict[str, Encoded], size: int | None) -> tuple[int, int, int]:

    def header(data: bytes, name: str) -> tuple[tuple[int, int], bool]:
        image = _open(data, name)
        return image.size, _grey(image)

    first, first_name, grey = None, "", True
    for encoded in splits.values():
        headers = (h for chunk in _chunks(encoded, header) for h in chunk)
        for name, (wh, is_grey) in zip(encoded.names, headers, strict=True):
            if first is None:
                first, first_name = wh, name
            if size is None and wh != first:
                raise BadImage(
                    f"Images differ in size (width x height): {first_name} is {first[0]} x {first[1]}, {name} is "
                    f"{wh[0]} x {wh[1]}; --config.data.image_size=N makes them all N x N."
                )
            grey = grey and is_grey
    width, height = (size, size) if size is not None else first
    return height, width, 1 if grey else 3


def _decode(encoded: Encoded, shape: tuple[int, int, int], size: int | None) -> Iterator[np.ndarray]:
    for chunk in _chunks(encoded, lambda data, name: convert(_open(data, name), shape[2], size)):
        yield np.stack(chunk)
