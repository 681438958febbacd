"""Augmentation inside the train step, as pure functions of per-example keys."""

import jax
import jax.numpy as jnp

from lt_adv.data import randaugment

POLICIES = {"randaugment": randaugment.randaugment, "autoaugment": randaugment.autoaugment}
AUGMENTS = ("crop_flip", "flip", *POLICIES, "none")


def augment(name: str, keys: jax.Array, image: jax.Array, *, pad: int) -> jax.Array:
    """Applies `name` of AUGMENTS to images uint8 [b, h, w, 1 or 3]; a policy is applied before crop and flip."""
    if name in POLICIES:
        policy_keys = jax.vmap(lambda key: jax.random.fold_in(key, 2))(keys)  # crop and flip use 0 and 1
        image = POLICIES[name](policy_keys, image)
    return image if name == "none" else pad_crop_flip(keys, image, pad=0 if name == "flip" else pad)


def pad_crop_flip(keys: jax.Array, image: jax.Array, *, pad: int = 4) -> jax.Array:
    """Zero-pads by `pad` pixels, crops to the original size at a uniform offset, and mirrors with probability 1/2.

    The result of an example depends on its key only, not on the rest of the batch or the number of devices.

    Args:
      keys: typed keys [b].
      image: [b, h, w, c] of any dtype.
      pad: pixels on each side.

    Returns:
      Images of the same shape and dtype.
    """

    def draw(key: jax.Array) -> tuple[jax.Array, jax.Array]:
        offset_key, flip_key = jax.random.split(key)
        return jax.random.randint(offset_key, (2,), 0, 2 * pad + 1), jax.random.bernoulli(flip_key)

    _, height, width, channels = image.shape
    offset, flip = jax.vmap(draw)(keys)
    row = offset[:, :1] - pad + jnp.arange(height)
    column = offset[:, 1:] - pad + jnp.where(flip[:, None], jnp.arange(width)[::-1], jnp.arange(width))
    # Rows are selected with pixels and channels in one axis: a TPU pads an axis of 3 channels to a whole register.
    flat = _select("bnh,bhx->bnx", row, image.reshape(-1, height, width * channels), axis=1)
    return _select("bnw,bhwc->bhnc", column, flat.reshape(image.shape), axis=2)


def _select(equation: str, index: jax.Array, image: jax.Array, axis: int) -> jax.Array:
    """Returns the entries of an axis of images at index [b, n]; zero where there is none.

    A product with a matrix of zeros and ones is exact, and fast on accelerators: a TPU gathers pixels one by one.
    """
    one_hot = jax.nn.one_hot(index, image.shape[axis], dtype=jnp.float32)
    # Matrix units round to 8 bits or more by default, which hold a uint8.
    precision = None if image.dtype == jnp.uint8 else jax.lax.Precision.HIGHEST
    return jnp.einsum(equation, one_hot, image, precision=precision).astype(image.dtype)
