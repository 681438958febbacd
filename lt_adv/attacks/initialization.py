"""Starting points of attacks, and one key per example, so that a start depends on its own key only."""

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from lt_adv.attacks.norms import Norm

IMPL = "threefry2x32"
STARTS = ("zero", "uniform", "one_sided", "gaussian")
_GAUSSIAN_SCALE = 0.001  # of the [0, 1] pixel range, the start of TRADES


def threefry(keys: Array) -> Array:
    """Derives one threefry key from each key; threefry keys are returned unchanged.

    Keys of rbg and unsafe_rbg do not work under vmap: all examples would draw from the first key, so that starts
    repeat and results depend on the batch.
    """
    if jax.random.key_impl(keys) == IMPL:
        return keys
    words = jax.random.key_data(keys)
    words = jnp.concatenate([words, jnp.zeros((*words.shape[:-1], 2), words.dtype)], axis=-1)

    def derive(words: Array) -> Array:
        key = jax.random.wrap_key_data(words[:2], impl=IMPL)
        for i in range(2, len(words) - 2):
            key = jax.random.fold_in(key, words[i])
        return key

    for _ in range(keys.ndim):
        derive = jax.vmap(derive)
    return derive(words)


def example_keys(key: Array, batch: int) -> Array:
    """Returns one threefry key per example: fold_in(key, i) of a single key, or the given keys [batch].

    Raises a ValueError for keys that are not typed or have another shape.
    """
    dtype = getattr(key, "dtype", None)
    if dtype is None or not jnp.issubdtype(dtype, jax.dtypes.prng_key):
        raise ValueError(f"key must be typed, from jax.random.key(seed); got {dtype or type(key).__name__}.")
    if key.shape not in ((), (batch,)):
        raise ValueError(f"key must be one key or one per example, shape () or ({batch},); got {key.shape}.")
    key = threefry(key)
    return key if key.ndim else jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(batch))


def fold_in(keys: Array, *numbers: ArrayLike) -> Array:
    """Folds numbers, each a scalar or one per key, into each key [batch], one after the other."""
    for number in numbers:
        keys = jax.vmap(jax.random.fold_in)(keys, jnp.broadcast_to(number, keys.shape))
    return keys


def starting_point(key: Array, x: Array, eps: Array, start: str, norm: Norm) -> Array:
    """Returns the point before the first step, clipped neither to the ball nor to the bounds.

    Args:
      key: one typed key, or one per example [batch].
      x: images, [batch, ...].
      eps: radius, broadcasting against x.
      start: "zero" (x itself), "uniform" (uniform in the ball), "one_sided" (x + eps U[0, 1), the start of RoBal's
        released code) or "gaussian" (x + 0.001 N(0, 1)).
      norm: the ball.

    Returns:
      An array like x.
    """
    if start not in STARTS:
        raise ValueError(f"Unknown start {start!r}. There are: {', '.join(STARTS)}.")
    shape, dtype = x.shape[1:], x.dtype

    def draw(example_key: Array) -> Array:
        if start == "uniform":
            return norm.sample(example_key, shape, dtype)
        if start == "one_sided":
            return jax.random.uniform(example_key, shape, dtype)
        return jax.random.normal(example_key, shape, dtype)

    keys = example_keys(key, x.shape[0])
    if start == "zero":
        return x
    return x + jax.vmap(draw)(keys) * (_GAUSSIAN_SCALE if start == "gaussian" else eps)
