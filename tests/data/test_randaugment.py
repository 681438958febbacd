"""RandAugment and AutoAugment: frequencies of the operations, dependence on the keys."""

import functools
import itertools
from collections import Counter
from fractions import Fraction

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageEnhance, ImageOps

from lt_adv.data import augment
from lt_adv.data.randaugment import AUTOAUGMENT, RANDAUGMENT, autoaugment, randaugment
from lt_adv.methods.at import AT
from tests.data.test_image_ops import ROUNDED, SIGNED, ours, picture_of
from tests.training.helpers import run

IMAGE = np.random.default_rng(3).integers(20, 230, (18, 18, 3)).astype(np.uint8)
COPIES = 4000
policies = {name: jax.jit(policy) for name, policy in augment.POLICIES.items()}


def outcomes(policy):
    """Returns {result: fraction} of the policy on COPIES of IMAGE."""
    keys = jax.random.split(jax.random.key(0), COPIES)
    counts = Counter(x.tobytes() for x in np.asarray(policy(keys, np.stack([IMAGE] * COPIES))))
    return {result: count / COPIES for result, count in counts.items()}


def at_magnitude_8(picture):
    """Returns {operation: Pillow's results for each sign} of a picture 18 pixels wide, with torchvision's numbers."""

    def affine(*matrix):
        return picture.transform(picture.size, Image.Transform.AFFINE, matrix)

    return {
        "identity": [picture],
        "shear_x": [affine(1, m, 0, 0, 1, 0) for m in (0.08, -0.08)],
        "shear_y": [affine(1, 0, 0, m, 1, 0) for m in (0.08, -0.08)],
        "translate_x": [affine(1, 0, m, 0, 1, 0) for m in (2, -2)],  # 150 / 331 * 18 * 8 / 30 = 2.2
        "translate_y": [affine(1, 0, 0, 0, 1, m) for m in (2, -2)],
        "rotate": [picture.rotate(m) for m in (8, -8)],
        "brightness": [ImageEnhance.Brightness(picture).enhance(m) for m in (1.24, 0.76)],
        "color": [ImageEnhance.Color(picture).enhance(m) for m in (1.24, 0.76)],
        "contrast": [ImageEnhance.Contrast(picture).enhance(m) for m in (1.24, 0.76)],
        "sharpness": [ImageEnhance.Sharpness(picture).enhance(m) for m in (1.24, 0.76)],
        "posterize": [ImageOps.posterize(picture, 7)],
        "solarize": [ImageOps.solarize(picture, 187)],
        "autocontrast": [ImageOps.autocontrast(picture)],
        "equalize": [ImageOps.equalize(picture)],
    }


def test_randaugment_draws_14_operations_evenly_at_magnitude_8():
    remaining = {
        (name, n): (np.asarray(picture).astype(int), 1 / 14 / len(both))
        for name, both in at_magnitude_8(picture_of(IMAGE)).items()
        for n, picture in enumerate(both)
    }
    for result, share in outcomes(jax.jit(functools.partial(randaugment, num_ops=1))).items():
        x = np.frombuffer(result, np.uint8).reshape(IMAGE.shape)
        keys = [key for key, (by_pillow, _) in remaining.items() if np.abs(x - by_pillow).max() <= (key[0] in ROUNDED)]
        assert len(keys) == 1, keys
        assert share == pytest.approx(remaining.pop(keys[0])[1], abs=0.012), keys
    assert not remaining, "never drawn"


@pytest.mark.slow
def test_frequencies_of_autoaugment_match_its_probabilities():
    expected = Counter()
    for pair in AUTOAUGMENT:
        for used in itertools.product((True, False), repeat=2):
            share, starts = 1 / len(AUTOAUGMENT), {(): IMAGE}
            for use, (name, p, magnitude) in zip(used, pair, strict=True):
                share *= p if use else 1 - p
                if use:
                    signs = (1, -1) if name in SIGNED else (1,)
                    starts = {
                        (*s, sign): np.asarray(ours(name, x[None], sign * Fraction(magnitude, 9)))[0]
                        for s, x in starts.items()
                        for sign in signs
                    }
            for x in starts.values():
                expected[x.tobytes()] += share / len(starts)
    drawn = outcomes(autoaugment)
    assert sum(expected.values()) == pytest.approx(1)
    assert drawn.keys() <= {result for result, share in expected.items() if share > 0}
    for result, share in expected.items():
        assert drawn.get(result, 0) == pytest.approx(share, abs=0.012)


def test_two_operations_are_applied_in_sequence():
    """Every result of two operations is an operation applied to the result of one."""
    keys = jax.random.split(jax.random.key(1), 200)
    twice = np.asarray(policies["randaugment"](keys, np.stack([IMAGE] * len(keys))))
    rows = [(n, s * Fraction(8, 30)) for n in RANDAUGMENT for s in ((1, -1) if n in SIGNED else (1,))]
    once = np.concatenate([np.asarray(ours(name, IMAGE[None], level)) for name, level in rows])
    pairs = {x.tobytes() for name, level in rows for x in np.asarray(ours(name, once, level))}
    assert {x.tobytes() for x in twice} <= pairs
    assert len({x.tobytes() for x in twice}) > 100


@settings(max_examples=25, deadline=None)
@given(
    case=st.sampled_from([("randaugment", (8, 8, 1)), ("autoaugment", (20, 16, 3))]),
    seed=st.integers(0, 2**32 - 1),
    low=st.integers(0, 255),
    row=st.integers(0, 5),
)
def test_result_depends_on_the_example_key_only(case, seed, low, row):
    """The same key gives the same image alone, in a batch, and at another position of it."""
    name, shape = case
    images = np.random.default_rng(seed).integers(low, 256, (6, *shape)).astype(np.uint8)
    keys = jax.random.split(jax.random.key(seed), 6)
    result = np.asarray(policies[name](keys, images))
    assert result.shape == images.shape and result.dtype == np.uint8
    np.testing.assert_array_equal(policies[name](keys, images), result)
    np.testing.assert_array_equal(policies[name](keys[::-1], images[::-1])[::-1], result)
    np.testing.assert_array_equal(policies[name](keys[row : row + 1], images[row : row + 1])[0], result[row])


@pytest.mark.parametrize("name", ["crop_flip", "flip", "randaugment", "none"])
def test_policy_is_applied_before_crop_and_flip(name):
    """Crop and flip use the same random numbers with and without a policy, and the policy uses others."""
    keys = jax.random.split(jax.random.key(5), 6)
    images = np.stack([IMAGE] * 6)
    result = jax.jit(functools.partial(augment.augment, name, pad=2))(keys, images)
    if name in policies:
        images = policies[name](jax.vmap(jax.random.fold_in, (0, None))(keys, 2), images)
    expected = images if name == "none" else augment.pad_crop_flip(keys, images, pad=0 if name == "flip" else 2)
    np.testing.assert_array_equal(result, expected)


@pytest.mark.slow
def test_augmented_step_does_not_depend_on_the_number_of_devices():
    (_, plain), (_, one), (_, eight) = (
        run(AT(num_steps=0), devices, steps=1, augment=name)
        for devices, name in ((1, "crop_flip"), (1, "randaugment"), (8, "randaugment"))
    )
    assert one[0]["loss"] == pytest.approx(eight[0]["loss"], rel=1e-5)
    assert one[0]["loss"] != pytest.approx(plain[0]["loss"], rel=1e-3)
