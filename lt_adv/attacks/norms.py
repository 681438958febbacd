"""The L-inf, L2 and L1 balls of the attacks: steepest ascent, projection and uniform sampling."""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import ArrayLike

from lt_adv.attacks import checks

SPARSITY = 0.01  # share of the entries, at least one, that a step of length one in L1 changes
MOST_PASSES = 100  # of the search in the L1 projection; about ten are needed


class Norm(NamedTuple):
    """The functions of a norm that attacks use. Arrays are [batch, ...]; `eps` broadcasts against them."""

    direction: Callable[[Array], Array]  # gradient -> direction of steepest ascent, of length one or zero
    # x_adv, x, eps, low, high -> a point of the ball around x inside the bounds; the nearest one for L-inf and L1
    project: Callable[[Array, Array, Array, float, float], Array]
    sample: Callable[[Array, tuple[int, ...], jnp.dtype], Array]  # key, shape, dtype -> one uniform point, radius one
    length: Callable[[Array], Array]  # displacement [batch, ...] -> [batch, 1, ...]
    dual: Callable[[Array], Array]  # gradient -> its dual norm, [batch, 1, ...]


def get(name: str) -> Norm:
    """Returns the norm "linf", "l2" or "l1"; ValueError for any other name."""
    if not isinstance(name, str) or name not in _NORMS:
        raise ValueError(f"Unknown norm {name!r}. There are: {', '.join(_NORMS)}.")
    return _NORMS[name]


def check_length(
    name: str, value: ArrayLike, batch: int, allow_infinite: bool = False, image: tuple[int, ...] | None = None
) -> None:
    """Raises a ValueError unless `value` is a scalar or [batch] and its concrete values are finite and not negative.

    Args:
      name: of the argument, for the message.
      value: a length.
      batch: number of examples.
      allow_infinite: whether a scalar or [batch] may be infinite.
      image: None, or the shape of the examples, so that `value` may also be one length for each entry: an array with
        the dimensions of [batch, *image] that broadcasts to it.
    """
    shape = np.shape(value)
    full = (batch, *(image or ()))
    per_entry = image is not None and len(shape) == len(full) > 1
    if per_entry and any(size not in (1, length) for size, length in zip(shape, full, strict=True)):
        raise ValueError(f"{name} of shape {shape} does not broadcast to images {full}.")
    if not per_entry and shape not in ((), (batch,)):
        entries = "" if image is None else f", or have the dimensions of x, such as {(1, *full[1:])}"
        raise ValueError(f"{name} must be a scalar or [batch] = ({batch},){entries}, got shape {shape}.")
    values = checks.concrete_values(value)
    if values is not None and not checks.is_real(values.dtype):
        raise ValueError(f"{name} must be a number, got {value!r}.")
    if values is not None and not np.all(values >= 0):
        raise ValueError(f"{name} must not be negative or NaN, got {value}.")
    if values is not None and (per_entry or not allow_infinite) and np.any(np.isinf(values)):
        raise ValueError(f"{name} must be finite, got {value}.")


def per_example(value: ArrayLike, x: Array) -> Array:
    """Reshapes a length, scalar, [batch] or one for each entry, to broadcast against `x`."""
    value = jnp.asarray(value, x.dtype)
    return value.reshape(value.shape + (1,) * (x.ndim - 1)) if value.ndim == 1 else value


def l2(array: Array) -> Array:
    """Returns the Euclidean length of each example, [batch, ...] -> [batch, 1, ...]."""
    return jnp.sqrt(jnp.sum(array * array, axis=_trailing(array), keepdims=True))


def finite(gradient: Array) -> Array:
    """Sets the entries of a gradient that are NaN or infinite to zero."""
    return jnp.where(jnp.isfinite(gradient), gradient, 0)


def representable(gradient: Array) -> Array:
    """Scales examples down whose sum of squares would overflow; leaves the others bit-identical."""
    return gradient / representable_scale(gradient)


def representable_scale(gradient: Array) -> Array:
    """Returns the divisor of `representable`, [batch, 1, ...]: 1 unless the largest magnitude is extreme."""
    limit = jnp.asarray(2.0 ** (jnp.finfo(gradient.dtype).maxexp // 4), gradient.dtype)
    largest = _linf_length(gradient)
    return jnp.where(largest > limit, largest / limit, jnp.ones_like(largest))


def unit_mean(array: Array) -> Array:
    """Divides each example by its mean magnitude; an example of zeros stays zero."""
    array = representable(array)
    return _divide(array, jnp.mean(jnp.abs(array), axis=_trailing(array), keepdims=True))


def _trailing(array: Array) -> tuple[int, ...]:
    return tuple(range(1, array.ndim))


def _divide(array: Array, length: Array) -> Array:
    return array / jnp.where(length > 0, length, 1)


def _linf_length(array: Array) -> Array:
    return jnp.max(jnp.abs(array), axis=_trailing(array), keepdims=True)


def _l1(array: Array) -> Array:
    return jnp.sum(jnp.abs(array), axis=_trailing(array), keepdims=True)


def _linf_project(x_adv: Array, x: Array, eps: Array, low: float, high: float) -> Array:
    return jnp.clip(jnp.clip(x_adv, x - eps, x + eps), low, high)


def _linf_sample(key: Array, shape: tuple[int, ...], dtype: jnp.dtype) -> Array:
    return jax.random.uniform(key, shape, dtype, minval=-1, maxval=1)


def _l2_direction(gradient: Array) -> Array:
    # Scaled to magnitude one first: the squares of a small float32 gradient (below 1e-23) would underflow to zero.
    gradient = _divide(gradient, _linf_length(gradient))
    return _divide(gradient, l2(gradient))


def _l2_project(x_adv: Array, x: Array, eps: Array, low: float, high: float) -> Array:
    delta = x_adv - x
    length = l2(delta)
    return jnp.clip(x + delta * jnp.where(length > eps, _divide(eps, length), 1), low, high)


def _l2_sample(key: Array, shape: tuple[int, ...], dtype: jnp.dtype) -> Array:
    key_direction, key_radius = jax.random.split(key)
    direction = _l2_direction(jax.random.normal(key_direction, (1, *shape), dtype))[0]
    size = max(direction.size, 1)
    return direction * jax.random.uniform(key_radius, (), dtype) ** (1 / size)  # volume grows as radius ** size


def _l1_direction(gradient: Array) -> Array:
    # The entry with the largest gradient alone is the steepest direction; Tramer and Boneh (2019) take the largest 1 %.
    size = jnp.abs(gradient).reshape(len(gradient), -1)
    if not size.size:
        return gradient
    number = max(math.ceil(SPARSITY * size.shape[1]), 1)
    smallest = lax.top_k(size, number)[0][:, -1:]
    chosen = (size >= smallest) & (size > 0)
    count = jnp.sum(chosen, axis=1, keepdims=True, dtype=gradient.dtype)
    return jnp.sign(gradient) * _divide(chosen.astype(gradient.dtype), count).reshape(gradient.shape)


def _l1_project(x_adv: Array, x: Array, eps: Array, low: float, high: float) -> Array:
    delta = x_adv - x
    room = jnp.where(delta > 0, high - x, x - low)
    kept = jnp.clip(jnp.abs(delta) - _l1_threshold(jnp.abs(delta), room, eps), 0, room)
    length = _l1(kept)
    kept = kept * jnp.where(length > eps, _divide(eps, length), 1)  # the threshold is rounded
    return jnp.clip(x + jnp.sign(delta) * kept, low, high)


_Search = tuple[Array, Array, Array, Array, Array, Array, Array, Array]


def _l1_threshold(size: Array, room: Array, eps: Array) -> Array:
    """Returns the smallest t >= 0 with sum_i clip(size_i - t, 0, room_i) <= eps, [batch, 1, ...].

    Newton's method on this piecewise linear function of t, with a bracket that it may not leave, is exact as soon as
    its step finds the same free and the same full entries as the step before. The closed form would sort all entries.
    """
    shape = (len(size),) + (1,) * (size.ndim - 1)
    eps = jnp.broadcast_to(jnp.asarray(eps, size.dtype), shape).reshape(-1, 1)
    size, room = size.reshape(len(size), -1), room.reshape(len(size), -1)
    if not size.size:
        return jnp.zeros(shape, size.dtype)

    def total(array: Array) -> Array:
        return jnp.sum(array, axis=1, keepdims=True)

    def search(carry: _Search) -> _Search:
        t, lowest, highest, done, solved, free, full, passes = carry
        new_full = size - t >= room
        new_free = (size > t) & ~new_full
        same = jnp.all((new_free == free) & (new_full == full), axis=1, keepdims=True)
        rest = total(jnp.where(new_full, room, 0)) - eps
        excess = total(jnp.where(new_free, size - t, 0)) + rest
        lowest, highest = jnp.where(excess >= 0, t, lowest), jnp.where(excess <= 0, t, highest)
        number = jnp.sum(new_free, axis=1, keepdims=True, dtype=size.dtype)
        newton = jnp.where(number > 0, (total(jnp.where(new_free, size, 0)) + rest) / jnp.maximum(number, 1), jnp.inf)
        usable = (number > 0) & (newton > lowest) & (newton < highest)  # at an end it could go in circles
        next_t = jnp.where(usable, newton, lowest + (highest - lowest) / 2)
        done = done | (solved & same) | (excess == 0) | (newton == t)
        return jnp.where(done, t, next_t), lowest, highest, done, usable, new_free, new_full, passes + 1

    def searching(carry: _Search) -> Array:
        return ~jnp.all(carry[3]) & (carry[-1] < MOST_PASSES)

    zero, none = jnp.zeros_like(size[:, :1]) * eps, size != size  # vary over the same mesh axes as the arguments
    inside = total(jnp.minimum(size, room)) <= eps
    largest = jnp.max(size, axis=1, keepdims=True) + zero
    carry = (zero, zero, largest, inside, inside, none, none, jnp.zeros((), jnp.int32))
    return lax.while_loop(searching, search, carry)[0].reshape(shape)


def _l1_sample(key: Array, shape: tuple[int, ...], dtype: jnp.dtype) -> Array:
    key_size, key_sign = jax.random.split(key)
    size = math.prod(shape)
    parts = jax.random.exponential(key_size, (size + 1,), dtype)  # one more than entries: the distance to the sphere
    sign = jnp.where(jax.random.bernoulli(key_sign, shape=(size,)), 1, -1).astype(dtype)
    return (sign * parts[:size] / jnp.sum(parts)).reshape(shape)


_NORMS = {
    "linf": Norm(jnp.sign, _linf_project, _linf_sample, _linf_length, _l1),
    "l2": Norm(_l2_direction, _l2_project, _l2_sample, l2, l2),
    "l1": Norm(_l1_direction, _l1_project, _l1_sample, _l1, _linf_length),
}
