"""Comparison of `pad_crop_flip` with a loop over examples in numpy."""

import jax
import numpy as np
import pytest

from lt_adv.data.augment import pad_crop_flip

augment = jax.jit(pad_crop_flip, static_argnames="pad")


def reference(keys, image, pad):
    @jax.jit
    @jax.vmap
    def draw(key):
        offset_key, flip_key = jax.random.split(key)
        return jax.random.randint(offset_key, (2,), 0, 2 * pad + 1), jax.random.bernoulli(flip_key)

    result = np.empty_like(image)
    for i, (x, (top, left), flip) in enumerate(zip(image, *map(np.asarray, draw(keys)), strict=True)):
        padded = np.pad(x, ((pad, pad), (pad, pad), (0, 0)))
        crop = padded[top : top + x.shape[0], left : left + x.shape[1]]
        result[i] = crop[:, ::-1] if flip else crop
    return result


@pytest.mark.parametrize(("shape", "dtype", "pad"), [((6, 5, 3), np.uint8, 2), ((4, 4, 1), np.float32, 4)])
def test_matches_a_loop_in_numpy(shape, dtype, pad):
    keys = jax.random.split(jax.random.key(0), 16)
    image = np.random.RandomState(0).randint(1, 256, (16, *shape)).astype(dtype)
    augmented = augment(keys, image, pad=pad)
    assert augmented.dtype == dtype
    np.testing.assert_array_equal(augmented, reference(keys, image, pad))
    # Whether an example is alone or in a batch does not matter.
    np.testing.assert_array_equal(augment(keys[3:4], image[3:4], pad=pad)[0], augmented[3])


def test_every_offset_and_both_mirrors_occur_equally():
    image = np.zeros((3000, 3, 3, 1), np.uint8)
    image[:, 1, 0] = 1
    keys = jax.random.split(jax.random.key(1), len(image))
    flat = np.asarray(augment(keys, image, pad=1)).reshape(len(image), 9)
    # The pixel moves to row 0, 1 or 2 or outside, and likewise to a column or its mirror image.
    rows = flat.reshape(-1, 3, 3).sum(2).mean(0)
    columns = flat.reshape(-1, 3, 3).sum(1).mean(0)
    np.testing.assert_allclose(rows, 2 / 9, atol=0.03)
    np.testing.assert_allclose(columns, [1 / 6, 1 / 3, 1 / 6], atol=0.03)


def test_without_padding_only_flips():
    image = np.arange(2 * 2 * 4, dtype=np.uint8).reshape(2, 2, 4, 1)
    augmented = np.asarray(augment(jax.random.split(jax.random.key(0), 2), image, pad=0))
    for x, y in zip(image, augmented, strict=True):
        assert (x == y).all() or (x[:, ::-1] == y).all()
