"""The L-inf and L2 balls of the attacks: steepest ascent, projection and uniform sampling."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from lt_adv.attacks import checks


class Norm(NamedTuple):
    """The functions of a norm that attacks use. Arrays are [batch, ...]; `eps` broadcasts against them."""

    direction: Callable[[Array], Array]  # gradient -> direction of steepest ascent, of length one or zero
    project: Callable[[Array, Array, Array], Array]  # x_adv, x, eps -> nearest point of the ball around x
    sample: Callable[[Array, tuple[int, ...], jnp.dtype], Array]  # key, shape, dtype -> one uniform point, radius one
    length: Callable[[Array], Array]  # displacement [batch, ...] -> [batch, 1, ...]
    dual: Callable[[Array], Array]  # gradient -> its dual norm, [batch, 1, ...]


def get(name: str) -> Norm:
    """Returns the norm "linf" or "l2"; ValueError for any other name."""
    if not isinstance(name, str) or name not in _NORMS:
        raise ValueError(f"Unknown norm {name!r}. There are: {', '.join(_NORMS)}.")
    return _NORMS[name]


def check_length(name: str, value: ArrayLike, batch: int, allow_infinite: bool = False) -> None:
    """Raises a ValueError unless `value` is a scalar or [batch] and its concrete values are finite and not negative.

    `allow_infinite` allows infinite lengths.
    """
    if np.shape(value) not in ((), (batch,)):
        raise ValueError(f"{name} must be a scalar or [batch] = ({batch},), got shape {np.shape(value)}.")
    values = checks.concrete_values(value)
    if values is not None and not checks.is_real(values.dtype):
        raise ValueError(f"{name} must be a number, got {value!r}.")
    if values is not None and not np.all(values >= 0):
        raise ValueError(f"{name} must not be negative or NaN, got {value}.")
    if values is not None and not allow_infinite and np.any(np.isinf(values)):
        raise ValueError(f"{name} must be finite, got {value}.")


def per_example(value: ArrayLike, x: Array) -> Array:
    """Reshapes a length, scalar or [batch], to broadcast against `x`."""
    value = jnp.asarray(value, x.dtype)
    return value.reshape(value.shape + (1,) * (x.ndim - 1)) if value.ndim else value


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


def _linf_project(x_adv: Array, x: Array, eps: Array) -> Array:
    return jnp.clip(x_adv, x - eps, x + eps)


def _linf_sample(key: Array, shape: tuple[int, ...], dtype: jnp.dtype) -> Array:
    return jax.random.uniform(key, shape, dtype, minval=-1, maxval=1)


def _l2_direction(gradient: Array) -> Array:
    # Scaled to magnitude one first: the squares of a small float32 gradient (below 1e-23) would underflow to zero.
    gradient = _divide(gradient, _linf_length(gradient))
    return _divide(gradient, l2(gradient))


def _l2_project(x_adv: Array, x: Array, eps: Array) -> Array:
    delta = x_adv - x
    length = l2(delta)
    return x + delta * jnp.where(length > eps, _divide(eps, length), 1)


def _l2_sample(key: Array, shape: tuple[int, ...], dtype: jnp.dtype) -> Array:
    key_direction, key_radius = jax.random.split(key)
    direction = _l2_direction(jax.random.normal(key_direction, (1, *shape), dtype))[0]
    size = max(direction.size, 1)
    return direction * jax.random.uniform(key_radius, (), dtype) ** (1 / size)  # volume grows as radius ** size


_NORMS = {
    "linf": Norm(jnp.sign, _linf_project, _linf_sample, _linf_length, _l1),
    "l2": Norm(_l2_direction, _l2_project, _l2_sample, l2, l2),
}
