"""The image operations of AutoAugment and RandAugment as Pillow computes them, on the device and in whole numbers.

Every operation is one row of numbers (`Operation`), so that a batch can have another one in each example without
branches: `apply` does the four kinds of work one after the other, and each is neutral but in the rows that use it.
"""

import math
from fractions import Fraction
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

SIGNED = ("shear_x", "shear_y", "translate_x", "translate_y", "rotate", "brightness", "color", "contrast", "sharpness")
UNSIGNED = ("identity", "posterize", "solarize", "invert", "autocontrast", "equalize")
_ENHANCED_FROM = ("brightness", "color", "contrast", "sharpness")  # from black, grey, mean grey, smoothed
_UNIT = 1 << 16  # Pillow's fixed point for nearest neighbours


class Operation(NamedTuple):
    """What `apply` does with an image: numbers, or arrays of them."""

    source: Any = (_UNIT, 0, _UNIT // 2, 0, _UNIT, _UNIT // 2)  # where pixel (x, y) comes from: a x + b y + c, d x ...
    enhanced_from: Any = 0  # the image that stands at 0 %, the image itself being at 100 %
    percent: Any = 100
    inverted_from: Any = 256  # the first value that is inverted
    kept_bits: Any = 255  # of each value, as a mask
    stretched: Any = False  # each channel's values to all of [0, 255]
    equalized: Any = False  # each channel's histogram


def operation(name: str, level: Fraction, height: int, width: int) -> Operation:
    """The operation `name` at `level` (0 to 1, or from -1 if it is one of SIGNED) of its range.

    Shear 0.3 and rotation 30 degrees counter-clockwise at level 1, translation 150/331 of the side in whole pixels,
    brightness, color, contrast and sharpness 1 +- 0.9, posterize 8 to 4 bits, solarize from 255 down to 0.
    """
    match name:
        case "identity":
            return Operation()
        case "shear_x":
            return _affine(1, 0.3 * level, 0, 0, 1, 0)
        case "shear_y":
            return _affine(1, 0, 0, 0.3 * level, 1, 0)
        case "translate_x":
            return _affine(1, 0, -int(Fraction(150, 331) * width * level), 0, 1, 0)
        case "translate_y":
            return _affine(1, 0, 0, 0, 1, -int(Fraction(150, 331) * height * level))
        case "rotate":
            angle = math.radians(30 * level)
            cos, sin, x, y = math.cos(angle), math.sin(angle), width / 2, height / 2
            return _affine(cos, -sin, x - cos * x + sin * y, sin, cos, y - sin * x - cos * y)
        case "posterize":
            return Operation(kept_bits=256 - (1 << 8 - round(8 - 4 * level)))
        case "solarize":
            return Operation(inverted_from=math.ceil(255 * (1 - level)))
        case "invert":
            return Operation(inverted_from=0)
        case "autocontrast":
            return Operation(stretched=True)
        case "equalize":
            return Operation(equalized=True)
    return Operation(enhanced_from=_ENHANCED_FROM.index(name), percent=round(100 + 90 * level))


def _affine(a: float, b: float, c: float, d: float, e: float, f: float) -> Operation:
    """Pixel (x, y) from (a x + b y + c, d x + e y + f), whole numbers being corners of pixels, to 1/65536."""
    of_centres = (a, b, c + a / 2 + b / 2, d, e, f + d / 2 + e / 2)
    return Operation(source=tuple(math.floor(v * _UNIT + 0.5) for v in of_centres))


def stack(operations: list[Operation]) -> Operation:
    """One operation after another as rows of arrays."""
    return Operation(*(np.asarray(column, np.int32) for column in zip(*operations, strict=True)))


def apply(image: jax.Array, operation: Operation) -> jax.Array:
    """uint8 [height, width, 1 or 3] -> the same, by an operation of scalars; what moves in from outside is black.

    Equal to Pillow but for one case: where a brightness, color, contrast, sharpness or autocontrast is a whole number
    before it is cut to one, Pillow's rounding error can make it 1 less, and nothing here does.
    """
    x = _enhanced(_moved(image, operation.source).astype(jnp.int32), operation)
    x = jnp.where(x < operation.inverted_from, x, 255 - x) & operation.kept_bits
    x = jnp.where(operation.stretched, _stretched(x), x)
    return jnp.where(operation.equalized, _equalized(x), x).astype(image.dtype)


def _moved(image: jax.Array, source: jax.Array) -> jax.Array:
    """The nearest neighbour of where each pixel comes from."""
    height, width, _ = image.shape
    x, y = jnp.arange(width, dtype=jnp.int32), jnp.arange(height, dtype=jnp.int32)[:, None]
    column = source[0] * x + source[1] * y + source[2] >> 16
    row = source[3] * x + source[4] * y + source[5] >> 16
    inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
    return jnp.where(inside[..., None], image.at[row, column].get(mode="clip"), 0)


def _enhanced(x: jax.Array, operation: Operation) -> jax.Array:
    """Inter- or extrapolated from another image to `x`, cut to whole numbers."""
    grey = x
    if x.shape[-1] == 3:  # luma of ITU-R 601
        grey = (x * jnp.array([19595, 38470, 7471])).sum(-1, keepdims=True) + (1 << 15) >> 16
    mean = (2 * grey.sum() + grey.size) // (2 * grey.size)
    rows = x[:-2] + x[1:-1] + x[2:]
    sums = rows[:, :-2] + rows[:, 1:-1] + rows[:, 2:] + 4 * x[1:-1, 1:-1]
    smooth = x.at[1:-1, 1:-1].set((2 * sums + 13) // 26)  # sums / 13, to the nearest; the border stays
    other = jnp.select([operation.enhanced_from == n for n in (1, 2, 3)], [grey, mean, smooth], 0)
    return jnp.clip((100 * other + operation.percent * (x - other)) // 100, 0, 255)


def _stretched(x: jax.Array) -> jax.Array:
    low, high = x.min((0, 1)), x.max((0, 1))
    return jnp.where(high > low, 255 * (x - low) // jnp.maximum(high - low, 1), x)


def _equalized(x: jax.Array) -> jax.Array:
    """Each value to the share of its channel's pixels below it, the greatest value's own left out."""
    values = x.reshape(-1, x.shape[-1])
    # A scatter: as a product of one-hot matrices it takes a hundred times as long on a CPU.
    counts = jnp.zeros((256, x.shape[-1]), jnp.int32).at[values, jnp.arange(x.shape[-1])].add(1)
    below = jnp.cumsum(counts, 0) - counts
    step = jnp.take_along_axis(below, values.max(0, keepdims=True), 0) // 255
    table = jnp.where(step > 0, (step // 2 + below) // jnp.maximum(step, 1), jnp.arange(256)[:, None])
    return jnp.take_along_axis(jnp.minimum(table, 255), values, 0).reshape(x.shape)
