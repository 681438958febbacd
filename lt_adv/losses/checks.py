"""Checks of what a loss is given. Shapes and types are always checked; values where they are known, outside a trace."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

# For public functions: outside a trace their constants are copied to the device, which jax.transfer_guard may forbid.
constants_allowed = jax.transfer_guard("allow")


def floats(logits: ArrayLike) -> Array:
    """Logits, or other values, in at least float32: in bfloat16 and float16 a softmax loses most of its digits."""
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
    """Logits [batch, classes] as `floats`; ValueError unless labels are integers [batch] of these classes."""
    logits = floats(logits)
    if logits.ndim != 2:
        raise ValueError(f"logits must be [batch, classes], got shape {logits.shape}.")
    check_labels(labels, *logits.shape)
    return logits


def check_labels(labels: ArrayLike, batch: int, classes: int | None = None) -> None:
    """ValueError unless labels are integers [batch], from 0 to classes - 1 where values are known."""
    labels = labels if isinstance(labels, jax.Array) else np.asarray(labels)
    if labels.shape != (batch,) or not jnp.issubdtype(labels.dtype, jnp.integer):
        kind = f"{labels.dtype} {labels.shape}"
        raise ValueError(f"labels must be integers of shape [batch] = ({batch},), got {kind}.")
    if classes is None or isinstance(labels, jax.core.Tracer) or not getattr(labels, "is_fully_addressable", True):
        return
    values = np.asarray(jax.device_get(labels))
    if values.size and not 0 <= values.min() <= values.max() < classes:
        raise ValueError(f"labels must be of {classes} classes, got {values.min()} to {values.max()}.")


def check_numbers(least: float = -np.inf, **options: ArrayLike) -> None:
    """ValueError unless options, given by name, are finite numbers from `least` on; values of a trace are not known."""
    for name, value in options.items():
        if isinstance(value, jax.core.Tracer):
            continue
        array = np.asarray(jax.device_get(value))
        if array.shape or not any(jnp.issubdtype(array.dtype, kind) for kind in (np.bool_, np.integer, np.floating)):
            raise ValueError(f"{name} must be a number, got {value!r}.")
        if not np.isfinite(array):
            raise ValueError(f"{name} must be finite, got {value}.")
        if not array >= least:
            raise ValueError(f"{name} must not be {'negative' if least == 0 else f'below {least:g}'}, got {value}.")


def check_same_shape(**arrays: ArrayLike) -> None:
    """ValueError unless two arrays, given by name, are [batch, classes] of the same shape."""
    (one, a), (other, b) = ((name, floats(array)) for name, array in arrays.items())
    if jnp.ndim(a) != 2 or jnp.shape(a) != jnp.shape(b):
        raise ValueError(f"{one} and {other} must both be [batch, classes], got {jnp.shape(a)} and {jnp.shape(b)}.")


def one_hot(labels: ArrayLike, classes: int) -> Array:
    """bool [batch, classes]."""
    # A comparison instead of a gather: its gradient is no scatter, and it shards on any mesh.
    return jnp.asarray(labels, jnp.int32)[:, None] == jnp.arange(classes, dtype=jnp.int32)[None, :]
