"""Image operations of AutoAugment and RandAugment on the device, in integer arithmetic, with Pillow's results.

Every operation is a row of numbers (`Operation`), so that each example of a batch can have a different operation
without branches. `apply` always performs the same transformations; those that an operation does not use are identities.
"""

import math
from fractions import Fraction
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

SIGNED = ("shear_x", "shear_y", "translate_x", "translate_y", "rotate", "brightness", "color", "contrast", "sharpness")
UNSIGNED = ("identity", "posterize", "solarize", "invert", "autocontrast", "equalize")
_BLENDS = ("brightness", "color", "contrast", "sharpness")  # with black, grey, mean grey, the smoothed image
_UNIT = 1 << 16  # 1 in Pillow's fixed-point coordinates


Number = int | np.ndarray | jax.Array  # of one operation, or [n] of a table of operations


class Operation(NamedTuple):
    """The parameters of `apply`; the defaults leave an image unchanged."""

    # (a, b, c, d, e, f), or int32 [n, 6]: pixel (x, y) is read at (a x + b y + c, d x + e y + f).
    source: tuple[int, ...] | np.ndarray | jax.Array = (_UNIT, 0, _UNIT // 2, 0, _UNIT, _UNIT // 2)
    blend: Number = 0  # index in _BLENDS of the image to blend with
    percent: Number = 100  # 0: that image, 100: the image itself
    solarize_threshold: Number = 256  # the smallest value that is inverted
    bit_mask: Number = 255  # applied to each value
    autocontrast: Number = False  # stretch each channel to [0, 255]
    equalize: Number = False  # equalise the histogram of each channel


def operation(name: str, level: Fraction, height: int, width: int) -> Operation:
    """Returns the operation `name` at `level` of its range: from 0 to 1, or from -1 to 1 for those in SIGNED.

    At level 1: shear 0.3; rotation by 30 degrees counter-clockwise; translation by 150/331 of the side, in whole
    pixels; brightness, color, contrast and sharpness by a factor 1.9 (0.1 at level -1); posterize to 4 bits (8 at level
    0); solarize from 0 on (255 at level 0).
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
            return Operation(bit_mask=256 - (1 << 8 - round(8 - 4 * level)))
        case "solarize":
            return Operation(solarize_threshold=math.ceil(255 * (1 - level)))
        case "invert":
            return Operation(solarize_threshold=0)
        case "autocontrast":
            return Operation(autocontrast=True)
        case "equalize":
            return Operation(equalize=True)
    return Operation(blend=_BLENDS.index(name), percent=round(100 + 90 * level))


def _affine(a: float, b: float, c: float, d: float, e: float, f: float) -> Operation:
    """Reads pixel (x, y) at (a x + b y + c, d x + e y + f), in coordinates whose integers are corners of pixels."""
    centred = (a, b, c + a / 2 + b / 2, d, e, f + d / 2 + e / 2)
    return Operation(source=tuple(math.floor(v * _UNIT + 0.5) for v in centred))


def stack(operations: list[Operation]) -> Operation:
    """Stacks operations as rows of arrays."""
    return Operation(*(np.asarray(column, np.int32) for column in zip(*operations, strict=True)))


def apply(image: jax.Array, operation: Operation) -> jax.Array:
    """Applies an operation of scalars to an image uint8 [height, width, 1 or 3]; pixels from outside are black.

    Equal to Pillow with one exception: where the exact value of brightness, color, contrast, sharpness or autocontrast
    is an integer, Pillow's rounding error can make it 1 less.
    """
    x = _blend(_transform(image, operation.source).astype(jnp.int32), operation)
    x = jnp.where(x < operation.solarize_threshold, x, 255 - x) & operation.bit_mask
    x = jnp.where(operation.autocontrast, _autocontrast(x), x)
    return jnp.where(operation.equalize, _equalize(x), x).astype(image.dtype)


def _transform(image: jax.Array, source: tuple[int, ...] | np.ndarray | jax.Array) -> jax.Array:
    """Returns the nearest neighbour of each pixel's source."""
    height, width, _ = image.shape
    x, y = jnp.arange(width, dtype=jnp.int32), jnp.arange(height, dtype=jnp.int32)[:, None]
    column = source[0] * x + source[1] * y + source[2] >> 16
    row = source[3] * x + source[4] * y + source[5] >> 16
    inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
    return jnp.where(inside[..., None], image.at[row, column].get(mode="clip"), 0)


def _blend(x: jax.Array, operation: Operation) -> jax.Array:
    """Inter- or extrapolates between another image and `x`, rounded down."""
    grey = x
    if x.shape[-1] == 3:  # luma of ITU-R 601
        grey = (x * jnp.array([19595, 38470, 7471])).sum(-1, keepdims=True) + (1 << 15) >> 16
    mean = (2 * grey.sum() + grey.size) // (2 * grey.size)
    rows = x[:-2] + x[1:-1] + x[2:]
    sums = rows[:, :-2] + rows[:, 1:-1] + rows[:, 2:] + 4 * x[1:-1, 1:-1]
    smooth = x.at[1:-1, 1:-1].set((2 * sums + 13) // 26)  # sums / 13, rounded; not at the border
    other = jnp.select([operation.blend == n for n in (1, 2, 3)], [grey, mean, smooth], 0)
    return jnp.clip((100 * other + operation.percent * (x - other)) // 100, 0, 255)


def _autocontrast(x: jax.Array) -> jax.Array:
    """Stretches each channel to [0, 255]."""
    low, high = x.min((0, 1)), x.max((0, 1))
    return jnp.where(high > low, 255 * (x - low) // jnp.maximum(high - low, 1), x)


def _equalize(x: jax.Array) -> jax.Array:
    """Maps each value to the fraction of its channel's pixels below it, without those of the largest value."""
    values = x.reshape(-1, x.shape[-1])
    # A scatter, because a product of one-hot matrices takes a hundred times as long on a CPU.
    counts = jnp.zeros((256, x.shape[-1]), jnp.int32).at[values, jnp.arange(x.shape[-1])].add(1)
    below = jnp.cumsum(counts, 0) - counts
    step = jnp.take_along_axis(below, values.max(0, keepdims=True), 0) // 255
    table = jnp.where(step > 0, (step // 2 + below) // jnp.maximum(step, 1), jnp.arange(256)[:, None])
    return jnp.take_along_axis(jnp.minimum(table, 255), values, 0).reshape(x.shape)
