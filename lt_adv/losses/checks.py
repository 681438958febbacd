"""Checks of the arguments of losses: of shapes and types always, of values where they are concrete."""

import operator

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

# For public functions: outside a trace they copy constants to the device, which jax.transfer_guard may forbid.
constants_allowed = jax.transfer_guard("allow")


def floats(logits: ArrayLike) -> Array:
    """Returns logits or other values in at least float32, because a softmax in bfloat16 loses most of its digits."""
    try:
        real = not jnp.issubdtype(jnp.asarray(logits).dtype, jnp.complexfloating)
    except (TypeError, ValueError):  # None, a dict, ...
        real = False
    if not real:
        raise ValueError(f"logits and other values must be arrays of real numbers, got {type(logits).__name__}.")
    logits = jnp.asarray(logits)
    low = not jnp.issubdtype(logits.dtype, jnp.floating) or jnp.finfo(logits.dtype).bits < 32
    return logits.astype(jnp.float32) if low else logits


def logits_of(logits: ArrayLike, labels: ArrayLike) -> Array:
    """Returns logits [batch, classes] in at least float32; ValueError unless the labels fit them."""
    logits = floats(logits)
    if logits.ndim != 2:
        raise ValueError(f"logits must be [batch, classes], got shape {logits.shape}.")
    check_labels(labels, *logits.shape)
    return logits


def check_labels(labels: ArrayLike, batch: int, classes: int | None = None) -> None:
    """Raises a ValueError unless labels are integers [batch] and their concrete values lie in [0, classes)."""
    labels = labels if isinstance(labels, jax.Array) else np.asarray(labels)
    if labels.shape != (batch,) or not jnp.issubdtype(labels.dtype, jnp.integer):
        kind = f"{labels.dtype} {labels.shape}"
        raise ValueError(f"labels must be integers of shape [batch] = ({batch},), got {kind}.")
    if classes is None or isinstance(labels, jax.core.Tracer) or not getattr(labels, "is_fully_addressable", True):
        return
    values = np.asarray(jax.device_get(labels))
    if values.size and not 0 <= values.min() <= values.max() < classes:
        raise ValueError(f"labels must be of {classes} classes, got {values.min()} to {values.max()}.")


def check_numbers(minimum: float = -np.inf, **options: ArrayLike) -> None:
    """Raises a ValueError unless options, given by name, are finite and at least `minimum`; skips traced values."""
    for name, value in options.items():
        if isinstance(value, jax.core.Tracer):
            continue
        array = np.asarray(jax.device_get(value))
        if array.shape or not any(jnp.issubdtype(array.dtype, kind) for kind in (np.bool_, np.integer, np.floating)):
            raise ValueError(f"{name} must be a number, got {value!r}.")
        if not np.isfinite(array):
            raise ValueError(f"{name} must be finite, got {value}.")
        if not array >= minimum:
            rule = f"below {minimum:g}" if minimum else "negative"
            raise ValueError(f"{name} must not be {rule}, got {value}.")


def check_constants(minimum: float = -np.inf, **options: ArrayLike) -> None:
    """Like `check_numbers`, for options that must be constants when the loss is traced."""
    for name, value in options.items():
        if isinstance(value, jax.core.Tracer):
            raise ValueError(f"{name} must be a constant when the loss is traced, got {value}.")
    check_numbers(minimum, **options)


def check_count(name: str, value: ArrayLike) -> int:
    """Returns a positive integer of Python, NumPy or JAX as an int; ValueError for anything else."""
    try:
        result = 0 if isinstance(value, (bool, np.bool_, jax.core.Tracer)) else operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        result = 0
    if result < 1:
        raise ValueError(f"{name} must be a Python int, 1 or more, got {value!r}.")
    return result


def check_same_shape(**arrays: ArrayLike) -> None:
    """Raises a ValueError unless two arrays, given by name, are [batch, classes] of the same shape."""
    (name_a, a), (name_b, b) = ((name, floats(array)) for name, array in arrays.items())
    if jnp.ndim(a) != 2 or jnp.shape(a) != jnp.shape(b):
        raise ValueError(f"{name_a} and {name_b} must both be [batch, classes], got {jnp.shape(a)} and {jnp.shape(b)}.")


def one_hot(labels: ArrayLike, classes: int) -> Array:
    """Returns one-hot labels, bool [batch, classes]."""
    # A comparison instead of a gather: its gradient needs no scatter, and it shards on any mesh.
    return jnp.asarray(labels, jnp.int32)[:, None] == jnp.arange(classes, dtype=jnp.int32)[None, :]
