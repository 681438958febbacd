"""Checks of an attack's arguments, made before anything is computed.

Shapes and types are always checked; values only where they are concrete, outside jit and other transformations.
"""

import operator
from collections.abc import Sequence
from typing import SupportsIndex, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from lt_adv.attacks.signatures import Bounds, PyTree

Number = TypeVar("Number", bound=ArrayLike)
# For public functions: outside a trace they copy constants to the device, which jax.transfer_guard may forbid.
constants_allowed = jax.transfer_guard("allow")


def concrete_values(value: ArrayLike) -> np.ndarray | None:
    """Returns the values on the host, or None inside a trace and where other processes hold a part of them."""
    if isinstance(value, jax.core.Tracer) or not getattr(value, "is_fully_addressable", True):
        return None
    return np.asarray(jax.device_get(value))


def is_real(dtype: DTypeLike) -> bool:
    """Whether a dtype is bool, integer or floating, including bfloat16, which NumPy alone does not recognise."""
    return any(jnp.issubdtype(dtype, kind) for kind in (np.bool_, np.integer, np.floating))


def number(
    name: str, value: ArrayLike, low: float = -np.inf, high: float = np.inf, allow_infinite: bool = False
) -> float:
    """Returns a number of Python, NumPy or JAX as a float.

    Raises a ValueError unless it lies between `low` and `high`, and is finite or `allow_infinite` is set.
    """
    if isinstance(value, jax.core.Tracer):
        raise ValueError(f"{name} must be a constant when the attack is traced, got {value}.")
    array = concrete_values(value)
    if array is None or array.size != 1 or not is_real(array.dtype):
        raise ValueError(f"{name} must be a number, got {value!r}.")
    result = float(array.reshape(()))
    if not low <= result <= high or not (allow_infinite or np.isfinite(result)):
        raise ValueError(f"{name} must be a finite number from {low:g} to {high:g}, got {result:g}.")
    return result


def traceable_number(name: str, value: Number, low: float = -np.inf) -> Number | float:
    """Like `number`, but returns a traced value unchanged."""
    return value if isinstance(value, jax.core.Tracer) else number(name, value, low)


def count(name: str, value: SupportsIndex, minimum: int = 0) -> int:
    """Returns an integer of Python, NumPy or JAX as an int; ValueError if it is below `minimum`."""
    try:
        result = -1 if isinstance(value, jax.core.Tracer) else operator.index(value)
    except TypeError:
        result = -1
    if isinstance(value, (bool, np.bool_)) or result < minimum:
        raise ValueError(f"{name} must be a Python int, {minimum} or more, got {value!r}.")
    return result


def check_bounds(bounds: Sequence[ArrayLike]) -> Bounds:
    """Returns the bounds as two floats; ValueError unless low < high."""
    try:
        low, high = bounds
    except (TypeError, ValueError):
        raise ValueError(f"bounds must be two numbers (low, high), got {bounds!r}.") from None
    low, high = number("bounds[0]", low, allow_infinite=True), number("bounds[1]", high, allow_infinite=True)
    if not low < high:
        raise ValueError(f"bounds must be (low, high) with low < high, got {(low, high)}.")
    return low, high


def check_real(name: str, value: npt.ArrayLike | Array) -> None:
    """Raises a ValueError unless `value` is an array or a list of real numbers."""
    try:
        real = is_real(value.dtype if isinstance(value, jax.Array) else np.asarray(value).dtype)
    except jax.errors.TracerArrayConversionError:  # a list of tracers
        real = True
    except (TypeError, ValueError):
        real = False
    if not real:
        raise ValueError(f"{name} must be an array of numbers, got {type(value).__name__}.")


@constants_allowed
def as_array(name: str, value: ArrayLike) -> Array:
    """Returns `value` as a JAX array; ValueError unless it holds real numbers."""
    check_real(name, value)
    return jnp.asarray(value)


def check_images(x: Array | np.ndarray, bounds: Bounds, x_init: ArrayLike | None = None) -> None:
    """Raises a ValueError unless x is a float32 or float64 batch and its concrete values lie inside the bounds."""
    dtype, shape = jnp.result_type(x), np.shape(x)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"x must be floating, inside bounds, got {dtype}: divide uint8 images by 255.")
    if jnp.finfo(dtype).bits < 32:  # rounding in bfloat16 leaves the ball by a tenth of the radius
        raise ValueError(f"x must be float32 or float64, got {dtype}: cast it; logits_fn may compute in {dtype}.")
    if not shape:
        raise ValueError("x must be a batch [batch, ...], got a scalar.")
    _check_box("x", x, bounds)
    if x_init is not None:
        if np.shape(x_init) != shape:
            raise ValueError(f"x_init must have the shape of x, {shape}, got {np.shape(x_init)}.")
        _check_box("x_init", x_init, (-np.inf, np.inf))  # a start may lie outside


def _check_box(name: str, x: ArrayLike, bounds: Bounds) -> None:
    if (values := concrete_values(x)) is None or not values.size:
        return
    low, high = values.min(), values.max()
    if not (np.isfinite(low) and np.isfinite(high)):
        raise ValueError(f"{name} must be finite, got values from {low} to {high}.")
    if not bounds[0] <= low <= high <= bounds[1]:
        limits = f"{np.format_float_positional(low)} to {np.format_float_positional(high)}"
        raise ValueError(
            f"{name} must lie inside bounds {bounds}, got values from {limits}: scale or clip the images, or give "
            "bounds that contain them."
        )


def check_batch(y: npt.ArrayLike | Array, batch: int, name: str = "y") -> None:
    """Raises a ValueError unless y (labels or probabilities) has one row per image."""
    if np.shape(y)[:1] != (batch,):
        raise ValueError(f"x and {name} must have the same batch size, got {batch} images and labels {np.shape(y)}.")


def check_labels(y: npt.ArrayLike | Array, batch: int, classes: int | None = None, *, name: str = "y") -> None:
    """Raises a ValueError unless y is integers [batch] and its concrete values lie in [0, classes)."""
    y = y if isinstance(y, jax.Array) else np.asarray(y)
    check_batch(y, batch, name)
    if np.ndim(y) != 1 or not jnp.issubdtype(jnp.result_type(y), jnp.integer):
        kind = f"{jnp.result_type(y)} {np.shape(y)}"
        raise ValueError(f"{name} must be integer labels [batch] = ({batch},), got {kind}.")
    values = None if classes is None else concrete_values(y)
    if values is not None and values.size and not 0 <= values.min() <= values.max() < (classes or 0):
        raise ValueError(f"{name} must be labels of {classes} classes, got {values.min()} to {values.max()}.")


def check_logits(logits: PyTree, x: ArrayLike) -> Array:
    """Returns the logits in at least the precision of x, because objectives lose too many digits in bfloat16.

    Raises a ValueError unless they are one floating array [batch, classes].
    """
    if getattr(logits, "ndim", 0) != 2 or logits.shape[:1] != jnp.shape(x)[:1]:
        kind = f"{type(logits).__name__} of shapes " if isinstance(logits, (tuple, list, dict)) else "shape "
        shapes = jax.tree.map(jnp.shape, logits)
        raise ValueError(f"logits_fn must return one array [batch, classes], got {kind}{shapes}.")
    if not jnp.issubdtype(logits.dtype, jnp.floating):
        raise ValueError(f"logits_fn must return floating logits, got {logits.dtype}.")
    dtype = jnp.result_type(x)
    return logits.astype(dtype) if jnp.finfo(logits.dtype).bits < jnp.finfo(dtype).bits else logits


def check_objective(objective: object) -> None:
    """Raises a ValueError unless the objective is a function."""
    if not callable(objective):
        raise ValueError(
            f"objective must be a function (logits, y) -> [batch], such as attacks.cross_entropy, got {objective!r}."
        )


def check_values(values: Array, x: ArrayLike) -> Array:
    """Returns the values of an objective; ValueError unless their shape is [batch]."""
    if np.shape(values) != np.shape(x)[:1]:
        raise ValueError(f"objective must return [batch] = {np.shape(x)[:1]}, got shape {np.shape(values)}.")
    return values
