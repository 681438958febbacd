"""RandAugment and AutoAugment inside the train step, with operations drawn from per-example keys.

Operations and ranges are those of torchvision's `v2.RandAugment` and `v2.AutoAugment` on Pillow images with nearest
neighbours and black borders, as in AT-BSL's released code. Differs from it: magnitudes are exact fractions instead of
float32, so solarize at magnitude 8 inverts from 187 on instead of 188 (see also `image_ops.apply`).
"""

from collections.abc import Iterable
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np

from lt_adv.data import image_ops
from lt_adv.data.image_ops import Operation

BINS = 31  # RandAugment's magnitudes are 0 to 30
RANDAUGMENT = (*image_ops.SIGNED, *(name for name in image_ops.UNSIGNED if name != "invert"))

# The CIFAR-10 policy (Cubuk et al., CVPR 2019): 25 pairs of (operation, probability, magnitude from 0 to 9).
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
    """Applies `num_ops` operations in sequence, each drawn uniformly from 14, with a uniform sign if it is signed.

    Args:
      keys: typed keys [b].
      image: uint8 [b, h, w, 1 or 3].
      num_ops: number of operations; AT-BSL uses 2.
      magnitude: from 0 to 30; AT-BSL uses 8.

    Returns:
      Images of the same shape.

    References:
      Cubuk et al., "RandAugment", NeurIPS 2020.
    """
    table = _with_both_signs(((name, Fraction(magnitude, BINS - 1)) for name in RANDAUGMENT), image)

    def draw(key: jax.Array) -> jax.Array:
        return jax.random.randint(key, (num_ops,), 0, 2 * len(RANDAUGMENT))

    return _apply_rows(table, jax.vmap(draw)(keys), image)


def autoaugment(keys: jax.Array, image: jax.Array) -> jax.Array:
    """Applies one of 25 sub-policies, drawn uniformly: two operations, each with its probability and a uniform sign.

    Differs from the paper: factors of brightness, color, contrast and sharpness range from 1 to 1.9 or 0.1, as in
    torchvision, instead of from 0.1 to 1.9; there is no cutout after the policy, as in AT-BSL.

    Args:
      keys: typed keys [b].
      image: uint8 [b, h, w, 1 or 3].

    Returns:
      Images of the same shape.

    References:
      Cubuk et al., "AutoAugment: Learning Augmentation Strategies from Data", CVPR 2019.
    """
    operations = [(name, Fraction(magnitude, 9)) for pair in AUTOAUGMENT for name, _, magnitude in pair]
    table = _with_both_signs([*operations, ("identity", Fraction(0))], image)
    probability = np.array([[p for _, p, _ in pair] for pair in AUTOAUGMENT], np.float32)

    def draw(key: jax.Array) -> jax.Array:
        pair_key, use_key, sign_key = jax.random.split(key, 3)
        pair = jax.random.randint(pair_key, (), 0, len(AUTOAUGMENT))
        use = jax.random.uniform(use_key, (2,), jnp.float32) < jnp.asarray(probability)[pair]
        number = jnp.where(use, 2 * pair + jnp.arange(2), len(operations))
        return 2 * number + jax.random.randint(sign_key, (2,), 0, 2)

    return _apply_rows(table, jax.vmap(draw)(keys), image)


def _with_both_signs(rows: Iterable[tuple[str, Fraction]], image: jax.Array) -> Operation:
    """Returns a table whose rows 2 n and 2 n + 1 are operation n at its level and, if it is signed, at minus it."""
    height, width = image.shape[1:3]
    signed = ((name, sign if name in image_ops.SIGNED else 1, level) for name, level in rows for sign in (1, -1))
    return image_ops.stack([image_ops.operation(name, sign * level, height, width) for name, sign, level in signed])


def _apply_rows(table: Operation, rows: jax.Array, image: jax.Array) -> jax.Array:
    """Applies the operations in `rows` [b, n] of the table to the images [b, ...], in order."""
    for row in rows.T:
        image = jax.vmap(image_ops.apply)(image, Operation(*(jnp.asarray(column)[row] for column in table)))
    return image
