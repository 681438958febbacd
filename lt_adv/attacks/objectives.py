"""Objectives that attacks maximise: functions (logits [batch, classes], y) -> [batch].

Options are bound with functools.partial. All of them compute in at least float32, whatever the type of the logits, and
raise a ValueError for labels that are not integers [batch] or, where their values are concrete, exceed the classes.
"""

import jax
import jax.numpy as jnp
from jax import Array, lax

from lt_adv.attacks import checks


@checks.constants_allowed
def cross_entropy(logits: Array, y: Array, *, logit_scale: float = 1.0) -> Array:
    """Cross-entropy of scaled logits, -log softmax(a z)_y.

    With `logit_scale` a = 10, PGD is the logit-scaling attack (LSA), which is effective on cosine and other small-scale
    heads, whose plain cross-entropy gradient is weak.

    Args:
      logits: z, [batch, classes].
      y: labels, integers [batch].
      logit_scale: a, > 0.

    Returns:
      [batch], in nats.

    Raises:
      ValueError: for logits or labels that do not fit.

    Examples:
      >>> attacks.cross_entropy(jnp.array([[2.0, 0.0]]), jnp.array([1]))
      Array([2.127], dtype=float32)
    """
    logits, logit_scale = _floats(logits, y), checks.traceable_number("logit_scale", logit_scale, 0)
    # The shift comes before the scale, so that the largest entry is exactly zero. In the other order, a compiler that
    # fuses the multiplication into the subtraction leaves the rounding error of the product there, and that residue
    # determines the gradient where the softmax is saturated.
    logits = logit_scale * (logits - lax.stop_gradient(logits.max(axis=-1, keepdims=True)))
    return jnp.log(jnp.exp(logits).sum(axis=-1)) - _at_label(logits, y)


@checks.constants_allowed
def stable_cross_entropy(logits: Array, y: Array) -> Array:
    """Cross-entropy as log(1 + sum_{j != y} exp(z_j - z_y)): equal to `cross_entropy`, without cancellation.

    Where the softmax is saturated, its gradient is exactly zero in every compiled program. The gradient of
    `cross_entropy` is the difference of two numbers close to one there, and its rounding depends on how the compiler
    fuses them. AutoAttack uses this form, so that its result does not depend on the compiler.

    Args:
      logits: z, [batch, classes], at least two classes.
      y: labels, integers [batch].

    Returns:
      [batch], in nats.

    Raises:
      ValueError: for logits or labels that do not fit.

    Examples:
      >>> attacks.stable_cross_entropy(jnp.array([[2.0, 0.0]]), jnp.array([1]))
      Array([2.127], dtype=float32)
    """
    logits = _floats(logits, y)
    lead = jnp.where(_is_label(logits, y), 0, logits - _at_label(logits, y)[:, None])  # of y itself: exp(0) = 1
    shift = lax.stop_gradient(lead.max(axis=-1, keepdims=True))  # 0 where y is the largest
    others = jnp.where(_is_label(logits, y), 0, jnp.exp(lead - shift)).sum(axis=-1)
    shift = shift[:, 0]
    return jnp.where(shift > 0, shift + jnp.log(others + jnp.exp(-shift)), jnp.log1p(others))


@checks.constants_allowed
def cw_margin(logits: Array, y: Array, *, confidence: float = 50.0) -> Array:
    """Carlini-Wagner margin, -max(z_y - max_{j != y} z_j + k, 0).

    Args:
      logits: z, [batch, classes], at least two classes.
      y: labels, integers [batch].
      confidence: k, in units of logits. Once another class leads by k, the value is constant and its gradient zero.

    Returns:
      [batch], never positive.

    Raises:
      ValueError: for logits or labels that do not fit.

    Examples:
      >>> attacks.cw_margin(jnp.array([[2.0, 0.0, 1.0]]), jnp.array([0]), confidence=5.0)
      Array([-6.], dtype=float32)

    References:
      Carlini and Wagner, "Towards evaluating the robustness of neural networks", S&P 2017, f_6. The attacks use it
      inside an L-inf or L2 ball instead of adding a distance term.
    """
    logits = _floats(logits, y)
    return -jax.nn.relu(_at_label(logits, y) - _largest_other(logits, y) + confidence)


@checks.constants_allowed
def logit_margin(logits: Array, y: Array) -> Array:
    """Logit margin, max_{j != y} z_j - z_y: the lead of the best other class; positive for a wrong prediction.

    Args:
      logits: z, [batch, classes], at least two classes.
      y: labels, integers [batch].

    Returns:
      [batch], in units of logits.

    Raises:
      ValueError: for logits or labels that do not fit.

    Examples:
      >>> attacks.logit_margin(jnp.array([[2.0, 0.0, 1.0]]), jnp.array([1]))
      Array([2.], dtype=float32)

    References:
      Andriushchenko et al., "Square attack", ECCV 2020, section 3, with the opposite sign.
    """
    logits = _floats(logits, y)
    return _largest_other(logits, y) - _at_label(logits, y)


@checks.constants_allowed
def dlr(logits: Array, y: Array) -> Array:
    """Difference of logits ratio, (max_{j != y} z_j - z_y) / (z_(1) - z_(3) + 1e-12), z_(k) the k-th largest logit.

    Scaling or shifting the logits does not change it, so a temperature cannot make its gradient vanish.

    Args:
      logits: z, [batch, classes], at least three classes.
      y: labels, integers [batch].

    Returns:
      [batch].

    Raises:
      ValueError: for logits or labels that do not fit, and for fewer than three classes.

    Examples:
      >>> attacks.dlr(jnp.array([[4.0, 0.0, 2.0]]), jnp.array([0]))
      Array([-0.5], dtype=float32)

    References:
      Croce and Hein, "Reliable evaluation of adversarial robustness", ICML 2020, eq. 6.
    """
    logits = _floats(logits, y)
    top = _largest(logits, 3, "dlr")
    others = jnp.where(_at_label(logits, y) == top[:, 0], top[:, 1], top[:, 0])
    return (others - _at_label(logits, y)) / (top[:, 0] - top[:, 2] + 1e-12)


@checks.constants_allowed
def targeted_logit_margin(logits: Array, y: Array, target: Array) -> Array:
    """Targeted logit margin, z_t - z_y: the lead of the target class t over the label y.

    Args:
      logits: z, [batch, classes].
      y: labels, integers [batch].
      target: t, integers [batch].

    Returns:
      [batch], in units of logits.

    Raises:
      ValueError: for logits or labels that do not fit.

    Examples:
      >>> attacks.targeted_logit_margin(jnp.array([[4.0, 0.0, 2.0]]), jnp.array([0]), jnp.array([2]))
      Array([-2.], dtype=float32)
    """
    logits = _floats(logits, y, target)
    return _at_label(logits, target) - _at_label(logits, y)


@checks.constants_allowed
def targeted_dlr(logits: Array, y: Array, target: Array) -> Array:
    """Targeted difference of logits ratio, (z_t - z_y) / (z_(1) - (z_(3) + z_(4)) / 2 + 1e-12).

    Args:
      logits: z, [batch, classes], at least four classes.
      y: labels, integers [batch].
      target: t, the class to reach, integers [batch].

    Returns:
      [batch].

    Raises:
      ValueError: for logits or labels that do not fit, and for fewer than four classes.

    Examples:
      >>> attacks.targeted_dlr(jnp.array([[4.0, 0.0, 2.0, 0.0]]), jnp.array([0]), jnp.array([2]))
      Array([-0.5], dtype=float32)

    References:
      Croce and Hein, "Reliable evaluation of adversarial robustness", ICML 2020, eq. 7.
    """
    logits = _floats(logits, y, target)
    top = _largest(logits, 4, "targeted_dlr")
    return targeted_logit_margin(logits, y, target) / (top[:, 0] - (top[:, 2] + top[:, 3]) / 2 + 1e-12)


@checks.constants_allowed
def kl_divergence(logits: Array, probs: Array) -> Array:
    """KL(p || softmax(z)) = sum_j p_j (log p_j - log softmax(z)_j), the inner objective of TRADES.

    Its gradient is zero where softmax(z) = p, so an attack must not start at the clean image.

    Args:
      logits: z, [batch, classes].
      probs: p, [batch, classes], rows summing to one; zeros are allowed. An attack receives them as its `y`.

    Returns:
      [batch], in nats.

    Raises:
      ValueError: if the two shapes differ.

    Examples:
      >>> attacks.kl_divergence(jnp.array([[0.0, 0.0]]), jnp.array([[1.0, 0.0]]))
      Array([0.693], dtype=float32)

    References:
      Zhang et al., "Theoretically principled trade-off between robustness and accuracy", ICML 2019, algorithm 1.
    """
    logits, probs = _at_least_float32(logits), _at_least_float32(probs)
    if probs.shape != logits.shape:
        raise ValueError(f"probs must have the shape of the logits, {logits.shape}, got {probs.shape}.")
    return jnp.sum(jax.scipy.special.xlogy(probs, probs) - probs * jax.nn.log_softmax(logits), axis=-1)


@checks.constants_allowed
def prediction(logits: Array) -> Array:
    """Returns the class with the largest logit, or -1 where a logit is not finite.

    -1 is the label of no image. argmax of NumPy and JAX returns the index of the first NaN, so that an image of that
    class would count as classified correctly.

    Args:
      logits: [batch, classes].

    Returns:
      int32 [batch].

    Examples:
      >>> attacks.prediction(jnp.array([[0.0, 1.0], [jnp.nan, 1.0]]))
      Array([ 1, -1], dtype=int32)
    """
    logits = jnp.asarray(logits)
    return jnp.where(jnp.isfinite(logits).all(axis=-1), jnp.argmax(logits, axis=-1).astype(jnp.int32), -1)


def _floats(logits: Array, *labels: Array) -> Array:
    """Checks logits and labels, and returns the logits in at least float32."""
    logits = _at_least_float32(logits)
    if logits.ndim != 2:
        raise ValueError(f"logits must be [batch, classes], got shape {logits.shape}.")
    for y in labels:
        checks.check_labels(y, *logits.shape)
    return logits


def _at_least_float32(array: Array) -> Array:
    array = checks.as_array("logits", array)
    low = not jnp.issubdtype(array.dtype, jnp.floating) or jnp.finfo(array.dtype).bits < 32
    return array.astype(jnp.float32) if low else array


def _is_label(logits: Array, y: Array) -> Array:
    # A comparison instead of a gather: its gradient needs no scatter, and it shards on any mesh.
    return jnp.asarray(y, jnp.int32)[:, None] == jnp.arange(logits.shape[-1], dtype=jnp.int32)[None, :]


def _largest_other(logits: Array, y: Array) -> Array:
    """Returns max_{j != y} z_j, [batch]."""
    return jnp.where(_is_label(logits, y), jnp.finfo(logits.dtype).min, logits).max(axis=-1)


def _largest(logits: Array, k: int, name: str) -> Array:
    """Returns the k largest logits of each example in descending order, [batch, k]."""
    if logits.shape[-1] < k:
        raise ValueError(f"{name} compares {k} classes and there are {logits.shape[-1]}; use a logit margin.")
    return lax.top_k(logits, k)[0]


def _at_label(logits: Array, y: Array) -> Array:
    return jnp.sum(jnp.where(_is_label(logits, y), logits, 0), axis=-1)
