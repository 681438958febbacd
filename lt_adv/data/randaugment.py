"""RandAugment and AutoAugment inside the train step: each example's operations are drawn from its own key.

Operations and ranges are those of torchvision's `v2.RandAugment` and `v2.AutoAugment`, as AT-BSL's released code uses
them: on Pillow images, with nearest neighbours and black borders. Differs from it: magnitudes are exact fractions, not
float32, so that solarize at magnitude 8 inverts from 187 on, there from 188 on (see also `operations.apply`).
"""

from collections.abc import Iterable
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np

from lt_adv.data import image_ops
from lt_adv.data.image_ops import Operation

BINS = 31  # magnitudes of RandAugment are 0 .. 30
RANDAUGMENT = (*image_ops.SIGNED, *(name for name in image_ops.UNSIGNED if name != "invert"))

# The policy found on CIFAR-10 (Cubuk et al., CVPR 2019): 25 times two of (operation, probability, magnitude of 0 .. 9).
AUTOAUGMENT = (
    (("invert", 0.1, 0), ("contrast", 0.2, 6)),
    (("rotate", 0.7, 2), ("translate_x", 0.3, 9)),
    (("sharpness", 0.8, 1), ("sharpness", 0.9, 3)),
    (("shear_y", 0.5, 8), ("translate_y", 0.7, 9)),
    (("autocontrast", 0.5, 0), ("equalize", 0.9, 0)),
    (("shear_y", 0.2, 7), ("posterize", 0.3, 7)),
    (("color", 0.4, 3), ("brightness", 0.6, 7)),
    (("sharpness", 0.3, 9), ("brightness", 0.7, 9)),
    (("equalize", 0.6, 0), ("equalize", 0.5, 0)),
    (("contrast", 0.6, 7), ("sharpness", 0.6, 5)),
    (("color", 0.7, 7), ("translate_x", 0.5, 8)),
    (("equalize", 0.3, 0), ("autocontrast", 0.4, 0)),
    (("translate_y", 0.4, 3), ("sharpness", 0.2, 6)),
    (("brightness", 0.9, 6), ("color", 0.2, 8)),
    (("solarize", 0.5, 2), ("invert", 0.0, 0)),
    (("equalize", 0.2, 0), ("autocontrast", 0.6, 0)),
    (("equalize", 0.2, 0), ("equalize", 0.6, 0)),
    (("color", 0.9, 9), ("equalize", 0.6, 0)),
    (("autocontrast", 0.8, 0), ("solarize", 0.2, 8)),
    (("brightness", 0.1, 3), ("color", 0.7, 0)),
    (("solarize", 0.4, 5), ("autocontrast", 0.9, 0)),
    (("translate_y", 0.9, 9), ("translate_y", 0.7, 9)),
    (("autocontrast", 0.9, 0), ("solarize", 0.8, 3)),
    (("equalize", 0.8, 0), ("invert", 0.1, 0)),
    (("translate_y", 0.7, 9), ("autocontrast", 0.9, 0)),
)


def randaugment(keys: jax.Array, image: jax.Array, *, num_ops: int = 2, magnitude: int = 8) -> jax.Array:
    """`num_ops` operations one after the other, each any of the 14 with equal chance, at one magnitude of 0 .. 30.

    keys [b] typed keys, image uint8 [b, h, w, 1 or 3] -> the same shape. A sign, where an operation has one, is either
    with equal chance. AT-BSL uses two operations at magnitude 8.

    Reference: Cubuk et al., "RandAugment", NeurIPS 2020.
    """
    table = _both_signs(((name, Fraction(magnitude, BINS - 1)) for name in RANDAUGMENT), image)

    def draw(key: jax.Array) -> jax.Array:
        return jax.random.randint(key, (num_ops,), 0, 2 * len(RANDAUGMENT))

    return _applied(table, jax.vmap(draw)(keys), image)


def autoaugment(keys: jax.Array, image: jax.Array) -> jax.Array:
    """One of the 25 sub-policies with equal chance: its two operations one after the other, each with its probability.

    keys [b] typed keys, image uint8 [b, h, w, 1 or 3] -> the same shape. A sign is either with equal chance.

    Reference: Cubuk et al., "AutoAugment: Learning Augmentation Strategies from Data", CVPR 2019. There magnitudes of
    brightness, color, contrast and sharpness go from a factor 0.1 to 1.9, here as in torchvision from 1 to 1.9 or 0.1.
    A cutout after the policy, which that paper has, AT-BSL has not.
    """
    used = [(name, Fraction(magnitude, 9)) for pair in AUTOAUGMENT for name, _, magnitude in pair]
    table = _both_signs([*used, ("identity", Fraction(0))], image)
    probability = np.array([[p for _, p, _ in pair] for pair in AUTOAUGMENT], np.float32)

    def draw(key: jax.Array) -> jax.Array:
        pair_key, use_key, sign_key = jax.random.split(key, 3)
        pair = jax.random.randint(pair_key, (), 0, len(AUTOAUGMENT))
        use = jax.random.uniform(use_key, (2,), jnp.float32) < jnp.asarray(probability)[pair]
        number = jnp.where(use, 2 * pair + jnp.arange(2), len(used))
        return 2 * number + jax.random.randint(sign_key, (2,), 0, 2)

    return _applied(table, jax.vmap(draw)(keys), image)


def _both_signs(rows: Iterable[tuple[str, Fraction]], image: jax.Array) -> Operation:
    """Rows 2 n and 2 n + 1 are the n-th operation at its level, and at minus that if it is signed."""
    height, width = image.shape[1:3]
    signed = ((name, sign if name in image_ops.SIGNED else 1, level) for name, level in rows for sign in (1, -1))
    return image_ops.stack([image_ops.operation(name, sign * level, height, width) for name, sign, level in signed])


def _applied(table: Operation, rows: jax.Array, image: jax.Array) -> jax.Array:
    """rows [b, n] of the table, image [b, ...] -> the image after its n operations."""
    for row in rows.T:
        image = jax.vmap(image_ops.apply)(image, Operation(*(jnp.asarray(column)[row] for column in table)))
    return image
