"""Checks of an attack's arguments, made before anything is computed, and tracing of calls outside a trace.

Shapes and types are always checked; values where they are known, that is outside jit and other transformations.
"""

import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.extend import core

Bounds = tuple[float, float]
# For public functions: outside a trace they copy constants to the device, which jax.transfer_guard may forbid.
constants_allowed = jax.transfer_guard("allow")


def known(value: Any) -> np.ndarray | None:
    """Returns the values on the host, or None inside a trace and where other processes hold a part of them."""
    if isinstance(value, jax.core.Tracer) or not getattr(value, "is_fully_addressable", True):
        return None
    return np.asarray(jax.device_get(value))


def is_real(dtype: Any) -> bool:
    """Whether a dtype is bool, integer or floating, including bfloat16, which NumPy alone does not recognise."""
    return any(jnp.issubdtype(dtype, kind) for kind in (np.bool_, np.integer, np.floating))


def number(name: str, value: Any, low: float = -np.inf, high: float = np.inf, infinite: bool = False) -> float:
    """Returns a number of Python, NumPy or JAX as a float.

    Raises a ValueError unless it lies between `low` and `high`, and is finite or `infinite` is set.
    """
    if isinstance(value, jax.core.Tracer):
        raise ValueError(f"{name} must be a constant when the attack is traced, got {value}.")
    array = known(value)
    if array is None or array.size != 1 or not is_real(array.dtype):
        raise ValueError(f"{name} must be a number, got {value!r}.")
    result = float(array.reshape(()))
    if not low <= result <= high or not (infinite or np.isfinite(result)):
        raise ValueError(f"{name} must be a finite number from {low:g} to {high:g}, got {result:g}.")
    return result


def traceable_number(name: str, value: Any, low: float = -np.inf) -> Any:
    """Like `number`, but returns a traced value unchanged."""
    return value if isinstance(value, jax.core.Tracer) else number(name, value, low)


def count(name: str, value: Any, least: int = 0) -> int:
    """Returns an integer of Python, NumPy or JAX as an int; ValueError if it is below `least`."""
    try:
        result = -1 if isinstance(value, jax.core.Tracer) else operator.index(value)
    except TypeError:
        result = -1
    if isinstance(value, (bool, np.bool_)) or result < least:
        raise ValueError(f"{name} must be a Python int, {least} or more, got {value!r}.")
    return result


def check_bounds(bounds: Any) -> Bounds:
    """Returns the bounds as two floats; ValueError unless low < high."""
    try:
        low, high = bounds
    except (TypeError, ValueError):
        raise ValueError(f"bounds must be two numbers (low, high), got {bounds!r}.") from None
    low, high = number("bounds[0]", low, infinite=True), number("bounds[1]", high, infinite=True)
    if not low < high:
        raise ValueError(f"bounds must be (low, high) with low < high, got {(low, high)}.")
    return low, high


def check_real(name: str, value: Any) -> None:
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
def as_array(name: str, value: Any) -> Array:
    """Returns `value` as a JAX array; ValueError unless it holds real numbers."""
    check_real(name, value)
    return jnp.asarray(value)


def check_images(x: Any, bounds: Bounds, x_init: Any = None) -> None:
    """Raises a ValueError unless x is a float32 or float64 batch and its known values lie inside the bounds."""
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


def _check_box(name: str, x: Any, bounds: Bounds) -> None:
    if (values := known(x)) is None or not values.size:
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


def check_batch(y: Any, batch: int) -> None:
    """Raises a ValueError unless y (labels or probabilities) has one row per image."""
    if np.shape(y)[:1] != (batch,):
        raise ValueError(f"x and y must have the same batch size, got {batch} images and labels {np.shape(y)}.")


def check_labels(y: Any, batch: int, classes: int | None = None) -> None:
    """Raises a ValueError unless y is integers [batch] and its known values lie in [0, classes)."""
    y = y if isinstance(y, jax.Array) else np.asarray(y)
    check_batch(y, batch)
    if np.ndim(y) != 1 or not jnp.issubdtype(jnp.result_type(y), jnp.integer):
        kind = f"{jnp.result_type(y)} {np.shape(y)}"
        raise ValueError(f"y must be integer labels [batch] = ({batch},), got {kind}.")
    values = None if classes is None else known(y)
    if values is not None and values.size and not 0 <= values.min() <= values.max() < (classes or 0):
        raise ValueError(f"y must be labels of {classes} classes, got {values.min()} to {values.max()}.")


def check_logits(logits: Any, x: Any) -> Array:
    """Returns the logits in at least the precision of x, because objectives lose too many digits in bfloat16.

    Raises a ValueError unless they are one floating array [batch, classes].
    """
    if getattr(logits, "ndim", 0) != 2 or logits.shape[:1] != jnp.shape(x)[:1]:
        kind = f"{type(logits).__name__} of shapes " if isinstance(logits, (tuple, list, dict)) else "shape "
        shapes = jax.tree.map(jnp.shape, logits)
        raise ValueError(f"logits_fn must return one array [batch, classes], got {kind}{shapes}.")
    if not jnp.issubdtype(logits.dtype, jnp.floating):
        raise ValueError(f"logits_fn must return floating logits, got {logits.dtype}.")
    least = jnp.result_type(x)
    return logits.astype(least) if jnp.finfo(logits.dtype).bits < jnp.finfo(least).bits else logits


def check_objective(objective: Any) -> None:
    """Raises a ValueError unless the objective is a function."""
    if not callable(objective):
        raise ValueError(
            f"objective must be a function (logits, y) -> [batch], such as attacks.cross_entropy, got {objective!r}."
        )


def check_values(values: Any, x: Any) -> Array:
    """Returns the values of an objective; ValueError unless their shape is [batch]."""
    if np.shape(values) != np.shape(x)[:1]:
        raise ValueError(f"objective must return [batch] = {np.shape(x)[:1]}, got shape {np.shape(values)}.")
    return values


class Traced:
    """A traced function. Two of them are equal only if they are the same object, as for ordinary functions."""

    def __init__(self, jaxpr: core.Jaxpr, tree: Any) -> None:
        self.jaxpr, self.tree = jaxpr, tree

    def __call__(self, consts: list[Any], *args: Array) -> Any:
        return jax.tree.unflatten(self.tree, core.jaxpr_as_fun(core.ClosedJaxpr(self.jaxpr, consts))(*args))


def trace(fun: Callable[..., Any], *args: Any) -> tuple[Traced, list[Any]]:
    """Returns `fun` as a function of the arrays that it closes over, and these arrays."""
    closed, shape = jax.make_jaxpr(fun, return_shape=True)(*args)
    return Traced(closed.jaxpr, jax.tree.structure(shape)), closed.consts


def run(fun: Callable[[], Any], *arrays: Any) -> Any:
    """Returns fun(); outside a trace it is compiled as one program, which is freed after the call.

    Executed operation by operation, each loop would stay in JAX's compilation cache together with the arrays that it
    closes over. Transfers are allowed, because `fun` transfers constants only. A tracer among `arrays`, the inputs of
    `fun`, means that the call is inside a trace.
    """
    if any(isinstance(array, jax.core.Tracer) for array in jax.tree.leaves(arrays)):
        return fun()
    with jax.transfer_guard("allow"):
        traced, consts = trace(fun)
        if any(isinstance(const, jax.core.Tracer) for const in consts):  # logits_fn closes over them
            return fun()
        return jax.jit(traced)(consts)
