"""Decodes images to uint8 arrays with a thread pool; errors are one line and name the image."""

import dataclasses
import hashlib
import io
import math
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import TypeVar

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from lt_adv.data.dataset import SplitReader
from lt_adv.runtime import atomic_io

T = TypeVar("T")
MAX_PIXELS = 1 << 26  # below Pillow's limit; a small file that declares more is a decompression bomb
LARGEST = math.isqrt(MAX_PIXELS)  # maximum of config.data.image_size
CHUNK = 256
COMMON_FORMATS = ("JPEG", "PNG")
FORMATS = (*COMMON_FORMATS, "WEBP", "BMP", "DIB", "GIF", "TIFF", "PPM", "JPEG2000", "AVIF")  # decoded by Pillow itself
COMMON_SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png")
OTHER_SUFFIXES = (".webp", ".bmp", ".dib", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".avif")
SUFFIXES = (*COMMON_SUFFIXES, *OTHER_SUFFIXES)


class BadImage(ValueError):
    """An image cannot be read or has another shape than the others."""


@dataclasses.dataclass(frozen=True)
class Encoded:
    """The encoded images of a split.

    Attributes:
      names: of the images, for error messages.
      read: function of positions that returns the files' bytes; thread-safe.
      label: [n].
      index: [n], positions in the original data.
      identity: a string that changes with the files; computed without reading them.
    """

    names: Sequence[str]
    read: Callable[[Sequence[int]], list[bytes]]
    label: np.ndarray
    index: np.ndarray
    identity: str


class LazyImages:
    """Images that are decoded at each access.

    `images[rows]`, with a slice or positions, returns the same array uint8 [k, h, w, c] as decoded images would. An
    image that cannot be read raises `BadImage` at its access.
    """

    dtype, ndim = np.dtype(np.uint8), 4

    def __init__(
        self, encoded: Encoded, shape: tuple[int, int, int], size: int | None, rows: np.ndarray | None = None
    ) -> None:
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
            raise ValueError(f"Images can only be decoded to new uint8 arrays, not {dtype}.")
        return self[:]

    def read(self, rows: np.ndarray) -> np.ndarray:
        """Returns `images[rows]`, decoded in the caller's thread."""
        return self._decode(self._rows[rows])

    def at(self, rows: np.ndarray) -> "LazyImages":
        """Returns the images at these positions without decoding them."""
        return LazyImages(self._encoded, self.shape[1:], self._size, self._rows[rows])

    @property
    def digest(self) -> str:
        """A hash of the files' identity and of the selected rows; hashing pixels would decode all images."""
        identity = f"{self._encoded.identity} {self.shape} {self._size} ".encode()
        return hashlib.sha256(identity + self._rows.astype("<i8").tobytes()).hexdigest()

    def _decode(self, positions: Sequence[int]) -> np.ndarray:
        channels = self.shape[-1]
        encoded, size = self._encoded, self._size
        decoded = _map_images(encoded, positions, lambda data, name: convert(_open(data, name), channels, size))
        for position, image in zip(positions, decoded, strict=True):
            if image.shape != self.shape[1:]:
                raise BadImage(f"{encoded.names[position]} is {image.shape}, the others are {self.shape[1:]}.")
        return np.stack(decoded)


def _open(data: bytes, name: str) -> Image.Image:
    if not data:
        raise BadImage(f"{name} is empty.")
    image = Image.open(io.BytesIO(data), formats=_formats(name))
    if image.width * image.height > MAX_PIXELS:
        raise BadImage(f"{name} declares {image.width} x {image.height} pixels, more than the maximum of {MAX_PIXELS}.")
    return image


def _formats(name: str) -> tuple[str, ...]:
    """Returns the formats that an image of this name may have; the suffixes of JPEG and PNG may be exchanged."""
    return COMMON_FORMATS if name.lower().endswith(COMMON_SUFFIXES) else FORMATS


def _reason(data: bytes, name: str, error: Exception) -> str:
    """Returns why an image cannot be read: its format if it is another one, else Pillow's message."""
    if not isinstance(error, UnidentifiedImageError):
        return f" ({' '.join(str(error).split())})"
    try:  # Pillow's "cannot identify" only names an address in memory
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            return f": it is a {image.format} image, rename it accordingly"
    except Exception:  # Pillow raises many types for other files
        file_format = atomic_io.format_of(data)
        return f": it is {file_format}" if file_format else ""


def _is_grey(image: Image.Image) -> bool:
    return image.mode in ("1", "L", "LA") or image.mode.startswith("I")


def convert(image: Image.Image, channels: int, size: int | None) -> np.ndarray:
    """Converts an image to uint8 [h, w, channels] without transparency.

    `size` scales and centre-crops it to a square of that side (bilinear, antialiased).
    """
    if image.mode.startswith("I"):  # 16 bits per pixel, which Pillow would clip at 255
        pixels = np.asarray(image)
        if pixels.size and not 0 <= pixels.min() <= pixels.max() < 1 << 16:
            raise ValueError(f"pixels from {pixels.min()} to {pixels.max()} are outside 0 to 65535")
        image = Image.fromarray((pixels >> 8).astype(np.uint8))
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers of unknown range")
    image = image.convert("L" if channels == 1 else "RGB")
    if size is not None and image.size != (size, size):
        image = ImageOps.fit(image, (size, size), method=Image.Resampling.BILINEAR)
    return np.asarray(image, np.uint8).reshape(image.height, image.width, channels)


def resize(image: np.ndarray, size: int | None) -> np.ndarray:
    """Scales and centre-crops images uint8 [n, h, w, c] to squares of side `size` (None: unchanged)."""
    if size is None or image.shape[1:3] == (size, size):
        return image
    channels = image.shape[-1]
    required, memory = len(image) * size * size * channels, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if required > memory:
        raise ValueError(
            f"config.data.image_size {size} needs {required >> 30} GiB for the images, but this machine has "
            f"{memory >> 30} GiB of memory: reduce it."
        )
    return np.stack([convert(Image.fromarray(x[..., 0] if channels == 1 else x), channels, size) for x in image])


def _map_images(encoded: Encoded, positions: Sequence[int], function: Callable[[bytes, str], T]) -> list[T]:
    """Returns `function(bytes, name)` of the images at these positions."""
    results = []
    for position, data in zip(positions, encoded.read(positions), strict=True):
        name = encoded.names[position]
        try:
            results.append(function(data, name))
        except BadImage:
            raise
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            kinds = "JPEG or PNG image" if _formats(name) == COMMON_FORMATS else "image"
            raise BadImage(f"{name} is not a readable {kinds}{_reason(data, name, error)}.") from error
    return results


def _map_chunks(encoded: Encoded, function: Callable[[bytes, str], T]) -> Iterator[list[T]]:
    """Yields `_map_images` of all images in order, one list per chunk, at most 32 chunks ahead of the caller."""
    names = encoded.names

    def run(start: int) -> list[T]:
        return _map_images(encoded, range(start, min(start + CHUNK, len(names))), function)

    # No more threads than cores: with small images, more would only wait for the interpreter lock.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        starts = iter(range(0, len(names), CHUNK))
        pending: deque[Future[list[T]]] = deque()
        try:
            while True:
                while len(pending) < 32 and (start := next(starts, None)) is not None:
                    pending.append(pool.submit(run, start))
                if not pending:
                    return
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()


def split_readers(
    splits: dict[str, Encoded], size: int | None, shape: tuple[int, int, int] | None = None
) -> dict[str, SplitReader]:
    """Returns readers that decode all splits to one shape.

    Args:
      splits: the encoded images.
      size: side of the square that images are scaled and cropped to; None leaves them unchanged.
      shape: (h, w, c); if None, it is read from the headers of all images, and c is 1 if all images are grey.

    Raises:
      ValueError: if images differ in size and `size` is None; the message names two of them.
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
        return image.size, _is_grey(image)

    first, first_name, all_grey = (0, 0), "", True
    for encoded in splits.values():
        headers = (h for chunk in _map_chunks(encoded, header) for h in chunk)
        for name, (wh, is_grey) in zip(encoded.names, headers, strict=True):
            if not first_name:
                first, first_name = wh, name
            if size is None and wh != first:
                raise BadImage(
                    f"Images differ in size (width x height): {first_name} is {first[0]} x {first[1]}, {name} is "
                    f"{wh[0]} x {wh[1]}; --config.data.image_size=N makes them all N x N."
                )
            all_grey = all_grey and is_grey
    width, height = (size, size) if size is not None else first
    return height, width, 1 if all_grey else 3


def _decode(encoded: Encoded, shape: tuple[int, int, int], size: int | None) -> Iterator[np.ndarray]:
    for chunk in _map_chunks(encoded, lambda data, name: convert(_open(data, name), shape[2], size)):
        yield np.stack(chunk)
