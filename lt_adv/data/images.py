"""JPEG and PNG bytes to uint8 arrays, with a thread pool; every failure is one line that names the image."""

import io
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from PIL import Image, ImageOps

MAX_PIXELS = 1 << 26  # below Pillow's own limit: a small file that claims more is a decompression bomb
CHUNK = 256
Read = Callable[[Sequence[int]], list[bytes]]
"""Encoded images by position, a chunk at a time; called from several threads."""


class BadImage(ValueError):
    """An image that cannot be used."""


def _open(data: bytes, name: str) -> Image.Image:
    if not data:
        raise BadImage(f"{name} is empty.")
    image = Image.open(io.BytesIO(data), formats=("JPEG", "PNG"))
    if image.width * image.height > MAX_PIXELS:
        raise BadImage(f"{name} claims {image.width} x {image.height} pixels, more than the {MAX_PIXELS} allowed.")
    return image


def _grey(image: Image.Image) -> bool:
    return image.mode in ("1", "L", "LA", "I", "I;16")


def convert(image: Image.Image, channels: int, size: int | None) -> np.ndarray:
    """uint8 [h, w, channels]; `size` scales and centre-crops to a square (bilinear, antialiased); no transparency."""
    if image.mode.startswith("I"):  # 16 bits a pixel, which Pillow would clip at 255
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    image = image.convert("L" if channels == 1 else "RGB")
    if size is not None and image.size != (size, size):
        image = ImageOps.fit(image, (size, size), method=Image.Resampling.BILINEAR)
    return np.asarray(image, np.uint8).reshape(image.height, image.width, channels)


def resize(image: np.ndarray, size: int | None) -> np.ndarray:
    """Images in memory, uint8 [n, h, w, c], scaled and centre-cropped to squares of `size` pixels (None: unchanged)."""
    if size is None or image.shape[1:3] == (size, size):
        return image
    channels = image.shape[-1]
    return np.stack([convert(Image.fromarray(x[..., 0] if channels == 1 else x), channels, size) for x in image])


def _chunks(read: Read, names: Sequence[str], work: Callable[[bytes, str], object]) -> Iterator[list]:
    """`work` on every image, in order, a list per chunk; a few chunks ahead of the caller, never all of them."""

    def run(start: int) -> list:
        positions = range(start, min(start + CHUNK, len(names)))
        results = []
        for position, data in zip(positions, read(positions), strict=True):
            try:
                results.append(work(data, names[position]))
            except BadImage:
                raise
            except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
                reason = " ".join(str(error).split())
                raise BadImage(f"{names[position]} is not a readable JPEG or PNG image ({reason}).") from error
        return results

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


def common_shape(read: Read, names: Sequence[str], size: int | None) -> tuple[int, int, int]:
    """The (h, w, c) that all images are decoded to, from their headers alone: c is 1 if every one is grey, else 3.

    ValueError naming two images of different sizes, unless `size` makes them equal.
    """

    def header(data: bytes, name: str) -> tuple[tuple[int, int], bool]:
        image = _open(data, name)
        return image.size, _grey(image)

    first, grey, position = None, True, 0
    for chunk in _chunks(read, names, header):
        for wh, is_grey in chunk:
            first, grey = first or wh, grey and is_grey
            if size is None and wh != first:
                raise BadImage(
                    f"Images differ in size (width x height): {names[0]} is {first[0]} x {first[1]}, {names[position]} "
                    f"is {wh[0]} x {wh[1]}; --config.data.image_size=N makes them all N x N."
                )
            position += 1
    if first is None:
        raise BadImage("There are no images.")
    width, height = (size, size) if size is not None else first
    return height, width, 1 if grey else 3


def decode(read: Read, names: Sequence[str], shape: tuple[int, int, int], size: int | None) -> Iterator[np.ndarray]:
    """All images, in order, as uint8 blocks [k, h, w, c] of the given `shape`."""
    for chunk in _chunks(read, names, lambda data, name: convert(_open(data, name), shape[2], size)):
        yield np.stack(chunk)
