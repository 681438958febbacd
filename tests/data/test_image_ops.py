"""Comparison of each operation with Pillow: equal, or 1 more where Pillow's rounding error reduces an integer."""

import functools
from fractions import Fraction

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image, ImageEnhance, ImageOps

from lt_adv.data import image_ops
from lt_adv.data.image_ops import SIGNED, UNSIGNED

SHAPES = [(32, 32, 3), (64, 64, 3), (8, 8, 1), (17, 23, 3)]
LEVELS = sorted({Fraction(k, n) for n in (9, 30) for k in range(n + 1)})  # of AutoAugment and of RandAugment
ENHANCERS = {name: getattr(ImageEnhance, name.title()) for name in ("brightness", "color", "contrast", "sharpness")}
ROUNDED = (*ENHANCERS, "autocontrast")


def pictures(shape, seed=0):
    """Noise of several ranges, a constant image, a ramp and a mostly black image."""
    rng = np.random.default_rng(seed)
    ranges = [(0, 256), (0, 256), (90, 140), (250, 256), (7, 8), (254, 256)]
    noise = [rng.integers(*ends, shape) for ends in ranges]
    ramp = np.linspace(0, 255, np.prod(shape)).reshape(shape)
    dark = rng.integers(0, 256, shape) * (rng.random(shape) < 0.1)
    return np.stack([*noise, ramp, dark]).astype(np.uint8)


def picture_of(image):
    return Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)


def by_pillow(name, picture, level):
    width, height = picture.size
    side = {"translate_x": width, "translate_y": height}
    if name in ENHANCERS:
        return ENHANCERS[name](picture).enhance(1 + float(90 * level) / 100)
    if name == "rotate":
        return picture.rotate(float(30 * level))
    if name in side:
        shift = int(150.0 / 331.0 * side[name] * float(level))
        matrix = (1, 0, -shift, 0, 1, 0) if name == "translate_x" else (1, 0, 0, 0, 1, -shift)
        return picture.transform(picture.size, Image.Transform.AFFINE, matrix)
    if name in ("shear_x", "shear_y"):
        shear = 0.3 * float(level)
        matrix = (1, shear, 0, 0, 1, 0) if name == "shear_x" else (1, 0, 0, shear, 1, 0)
        return picture.transform(picture.size, Image.Transform.AFFINE, matrix)
    if name == "posterize":
        return ImageOps.posterize(picture, round(8 - 4 * float(level)))
    if name == "solarize":
        return ImageOps.solarize(picture, 255 * (level.denominator - level.numerator) / level.denominator)
    return {"identity": lambda p: p}.get(name, getattr(ImageOps, name, None))(picture)


def exact_value_is_integer(name, image, level):
    """Returns a mask of the pixels at which the exact value of a ROUNDED operation is an integer."""
    x = image.astype(int)
    if name == "autocontrast":
        low, high = x.min((0, 1)), x.max((0, 1))
        return 255 * (x - low) % np.maximum(high - low, 1) == 0
    other = np.asarray(ENHANCERS[name](picture_of(image)).degenerate).reshape(x.shape).astype(int)
    return (100 * other + round(100 + 90 * level) * (x - other)) % 100 == 0


@functools.cache
def compiled():
    return jax.jit(jax.vmap(image_ops.apply, (0, None)))


def ours(name, images, level):
    operation = image_ops.stack([image_ops.operation(name, level, *images.shape[1:3])])
    return compiled()(images, jax.tree.map(lambda column: column[0], operation))


def check(name, images, level):
    result = np.asarray(ours(name, images, level))
    assert result.dtype == np.uint8
    for image, got in zip(images, result, strict=True):
        expected = np.asarray(by_pillow(name, picture_of(image), level)).reshape(image.shape)
        difference = got.astype(int) - expected
        allowed = exact_value_is_integer(name, image, level) if name in ROUNDED else np.zeros(image.shape, bool)
        wrong = (difference != 0) & ~((difference == 1) & allowed)
        assert not wrong.any(), f"{name} {level} {image.shape}: {wrong.sum()} pixels, {difference[wrong][:9]}"


@pytest.mark.slow
@pytest.mark.parametrize("name", [*SIGNED, *UNSIGNED])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_pillow(name, shape):
    images = pictures(shape)
    levels = LEVELS[::6] if shape[0] == 64 else LEVELS  # Pillow is slow
    for level in levels if name in (*SIGNED, "posterize", "solarize") else [Fraction(0)]:
        check(name, images, level)
        if name in SIGNED:
            check(name, images, -level)


@settings(max_examples=150, deadline=None)
@given(
    image=st.sampled_from([(8, 8, 3), (20, 20, 1), (3, 5, 3)]).flatmap(lambda s: arrays.arrays(np.uint8, s)),
    name=st.sampled_from([*SIGNED, *UNSIGNED]),
    level=st.sampled_from(LEVELS),
    sign=st.sampled_from([1, -1]),
)
def test_equals_pillow_on_any_image(image, name, level, sign):
    check(name, image[None], sign * level if name in SIGNED else level)


@pytest.mark.parametrize("name", [*SIGNED, "posterize", "solarize"])
def test_level_zero_is_the_identity(name):
    """Dark images only, because solarize at level 0 inverts white. Level 1 changes the image."""
    images = pictures((32, 32, 3))[:2] // 2
    np.testing.assert_array_equal(ours(name, images, Fraction(0)), images)
    assert (np.asarray(ours(name, images, Fraction(1))) != images).any()


def test_no_uint8_overflow():
    """Results are the same in int32 and uint8."""
    images = pictures((32, 32, 3))
    for name in [*SIGNED, *UNSIGNED]:
        for level in (Fraction(1), Fraction(-1))[: 2 if name in SIGNED else 1]:
            np.testing.assert_array_equal(ours(name, images.astype(np.int32), level), ours(name, images, level))
