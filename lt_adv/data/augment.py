"""Augmentation inside the train step: pure functions of per-example keys."""

import jax
import jax.numpy as jnp

from lt_adv.data import randaugment

POLICIES = {"randaugment": randaugment.randaugment, "autoaugment": randaugment.autoaugment}
AUGMENTS = ("crop_flip", "flip", *POLICIES, "none")


def augment(name: str, keys: jax.Array, image: jax.Array, *, pad: int) -> jax.Array:
    """`name` of AUGMENTS on uint8 [b, h, w, 1 or 3]: a policy, where it is one, comes before crop and flip."""
    if name in POLICIES:
        own = jax.vmap(lambda key: jax.random.fold_in(key, 2))(keys)  # 0 and 1 are those of crop and flip
        image = POLICIES[name](own, image)
    return image if name == "none" else pad_crop_flip(keys, image, pad=0 if name == "flip" else pad)


def pad_crop_flip(keys: jax.Array, image: jax.Array, *, pad: int = 4) -> jax.Array:
    """Zero-pads by `pad` pixels, crops back to the original size at a uniform place, mirrors with probability 1/2.

    keys [b] typed keys, image [b, h, w, c] of any dtype -> image of the same shape and dtype. An example's result
    depends on its own key alone, not on the batch around it or the devices it is spread over.
    """

    def draw(key: jax.Array) -> tuple[jax.Array, jax.Array]:
        offset_key, flip_key = jax.random.split(key)
        return jax.random.randint(offset_key, (2,), 0, 2 * pad + 1), jax.random.bernoulli(flip_key)

    batch, height, width, _ = image.shape
    offset, flip = jax.vmap(draw)(keys)
    row = offset[:, :1] + jnp.arange(height)
    column = offset[:, 1:] + jnp.where(flip[:, None], jnp.arange(width)[::-1], jnp.arange(width))
    padded = jnp.pad(image, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    # One gather for crop and flip: on CPU it takes about 0.6 of the time of a vmapped dynamic_slice and a select.
    example = jnp.arange(batch)[:, None, None]
    return padded.at[example, row[:, :, None], column[:, None, :]].get(mode="promise_in_bounds")
