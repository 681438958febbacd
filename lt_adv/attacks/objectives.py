"""What an attack maximises: functions (logits[batch, classes], y) -> [batch]. Bind options with functools.partial.

They compute in at least float32, whatever the type of the logits. ValueError for labels of another shape or type than
integers [batch] and, where their values are known, for labels of classes that the logits do not have.
"""

import jax
import jax.numpy as jnp
from jax import Array, lax

from lt_adv.attacks import inputs


@inputs.constants_allowed
def cross_entropy(logits: Array, y: Array, *, logit_scale: float = 1.0) -> Array:
    """Cross-entropy of scaled logits, -log softmax(a z)_y.

    `logit_scale` a = 10 makes PGD the logit-scaling attack (LSA), which reaches through cosine and other
    small-scale heads whose plain cross-entropy gradient is weak.

    Args:
      logits: [batch, classes].
      y: labels, integers [batch].
      logit_scale: a, > 0.

    Returns:
      [batch], in nats.
    """
    logits, logit_scale = _floats(logits, y), inputs.traceable_number("logit_scale", logit_scale, 0)
    # Shifted before scaled, so that the largest entry is exactly zero. In the other order a compiler that fuses the
    # multiplication into the subtraction leaves the product's rounding error there, and on a saturated softmax that
    # residue, not the network, would decide the gradient.
    logits = logit_scale * (logits - lax.stop_gradient(logits.max(axis=-1, keepdims=True)))
    return jnp.log(jnp.exp(logits).sum(axis=-1)) - _at_label(logits, y)


@inputs.constants_allowed
def stable_cross_entropy(logits: Array, y: Array) -> Array:
    """Cross-entropy as log(1 + sum_{j != y} exp(z_j - z_y)): the value of `cross_entropy`, without a cancellation.

    Where the softmax is saturated, its gradient is zero to the last bit, in every compiled program; that of
    `cross_entropy` is the difference of two numbers close to one, and what rounding leaves of it depends on how a
    compiler fuses them. AutoAttack, whose answer must not, takes this form.

    Args:
      logits: [batch, classes], at least two classes.
      y: labels, integers [batch].

    Returns:
      [batch], in nats.
    """
    logits = _floats(logits, y)
    lead = jnp.where(_is_label(logits, y), 0, logits - _at_label(logits, y)[:, None])  # of y itself: exp(0) = 1
    shift = lax.stop_gradient(lead.max(axis=-1, keepdims=True))  # 0 where y is the largest
    others = jnp.where(_is_label(logits, y), 0, jnp.exp(lead - shift)).sum(axis=-1)
    shift = shift[:, 0]
    return jnp.where(shift > 0, shift + jnp.log(others + jnp.exp(-shift)), jnp.log1p(others))


@inputs.constants_allowed
def cw_margin(logits: Array, y: Array, *, confidence: float = 50.0) -> Array:
    """The Carlini-Wagner margin, -max(z_y - max_{j != y} z_j + k, 0).

    Args:
      logits: [batch, classes], at least two classes.
      y: labels, integers [batch].
      confidence: k, in units of logits. The value is flat (gradient zero) once another class leads by k.

    Returns:
      [batch], never positive.

    Reference: Carlini and Wagner, "Towards evaluating the robustness of neural networks", S&P 2017, f_6, here
    inside an L-inf or L2 ball instead of beside a distance term.
    """
    logits = _floats(logits, y)
    return -jax.nn.relu(_at_label(logits, y) - _largest_other(logits, y) + confidence)


@inputs.constants_allowed
def logit_margin(logits: Array, y: Array) -> Array:
    """max_{j != y} z_j - z_y: how far another class leads, in units of logits; above zero for a wrong prediction.

    Args:
      logits: [batch, classes], at least two classes.
      y: labels, integers [batch].

    Returns:
      [batch].

    Reference: Andriushchenko et al., "Square attack", ECCV 2020, section 3, with the sign turned.
    """
    logits = _floats(logits, y)
    return _largest_other(logits, y) - _at_label(logits, y)


@inputs.constants_allowed
def dlr(logits: Array, y: Array) -> Array:
    """Difference of logits ratio, (max_{j != y} z_j - z_y) / (z_(1) - z_(3) + 1e-12), z_(k) the k-th largest logit.

    It does not change when the logits are scaled or shifted, so no temperature makes its gradient vanish.

    Args:
      logits: [batch, classes], at least three classes.
      y: labels, integers [batch].

    Returns:
      [batch]. ValueError for fewer than three classes.

    Reference: Croce and Hein, "Reliable evaluation of adversarial robustness", ICML 2020, eq. 6.
    """
    logits = _floats(logits, y)
    top = _largest(logits, 3, "dlr")
    others = jnp.where(_at_label(logits, y) == top[:, 0], top[:, 1], top[:, 0])
    return (others - _at_label(logits, y)) / (top[:, 0] - top[:, 2] + 1e-12)


@inputs.constants_allowed
def targeted_logit_margin(logits: Array, y: Array, target: Array) -> Array:
    """z_t - z_y, in units of logits, for labels y and targets t, integers [batch]; returns [batch]."""
    logits = _floats(logits, y, target)
    return _at_label(logits, target) - _at_label(logits, y)


@inputs.constants_allowed
def targeted_dlr(logits: Array, y: Array, target: Array) -> Array:
    """Targeted difference of logits ratio, (z_t - z_y) / (z_(1) - (z_(3) + z_(4)) / 2 + 1e-12).

    Args:
      logits: [batch, classes], at least four classes.
      y, target: labels and the classes t to be reached instead, integers [batch].

    Returns:
      [batch]. ValueError for fewer than four classes.

    Reference: Croce and Hein, "Reliable evaluation of adversarial robustness", ICML 2020, eq. 7.
    """
    logits = _floats(logits, y, target)
    top = _largest(logits, 4, "targeted_dlr")
    return targeted_logit_margin(logits, y, target) / (top[:, 0] - (top[:, 2] + top[:, 3]) / 2 + 1e-12)


@inputs.constants_allowed
def kl_divergence(logits: Array, probs: Array) -> Array:
    """KL(p || softmax(z)) = sum_j p_j (log p_j - log softmax(z)_j), the inner objective of TRADES.

    Args:
      logits: z, [batch, classes].
      probs: p, [batch, classes], rows summing to one: the attack's `y` holds probabilities here. Zeros are allowed.

    Returns:
      [batch], in nats. Its gradient is zero where softmax(z) = p, so an attack must not start on the clean image.

    Reference: Zhang et al., "Theoretically principled trade-off between robustness and accuracy", ICML 2019,
    algorithm 1.
    """
    logits, probs = _at_least_float32(logits), _at_least_float32(probs)
    if probs.shape != logits.shape:
        raise ValueError(f"probs must have the shape of the logits, {logits.shape}, got {probs.shape}.")
    return jnp.sum(jax.scipy.special.xlogy(probs, probs) - probs * jax.nn.log_softmax(logits), axis=-1)


@inputs.constants_allowed
def prediction(logits: Array) -> Array:
    """The class with the largest logit, int32 [batch]; -1, which is the label of no image, where a logit is not finite.

    NumPy and JAX have argmax name the first NaN, so that an image of that class would count as classified correctly.

    Args:
      logits: [batch, classes].
    """
    logits = jnp.asarray(logits)
    return jnp.where(jnp.isfinite(logits).all(axis=-1), jnp.argmax(logits, axis=-1).astype(jnp.int32), -1)


def _floats(logits: Array, *labels: Array) -> Array:
    """The logits in at least float32, once the labels are checked against them."""
    logits = _at_least_float32(logits)
    if logits.ndim != 2:
        raise ValueError(f"logits must be [batch, classes], got shape {logits.shape}.")
    for y in labels:
        inputs.check_labels(y, *logits.shape)
    return logits


def _at_least_float32(array: Array) -> Array:
    array = inputs.as_array("logits", array)
    low = not jnp.issubdtype(array.dtype, jnp.floating) or jnp.finfo(array.dtype).bits < 32
    return array.astype(jnp.float32) if low else array


def _is_label(logits: Array, y: Array) -> Array:
    # A comparison instead of a gather: its gradient is no scatter, and it shards on any mesh.
    return jnp.asarray(y, jnp.int32)[:, None] == jnp.arange(logits.shape[-1], dtype=jnp.int32)[None, :]


def _largest_other(logits: Array, y: Array) -> Array:
    """max_{j != y} z_j, [batch]."""
    return jnp.where(_is_label(logits, y), jnp.finfo(logits.dtype).min, logits).max(axis=-1)


def _largest(logits: Array, k: int, name: str) -> Array:
    """The k largest logits of each example, in descending order, [batch, k]."""
    if logits.shape[-1] < k:
        raise ValueError(f"{name} compares {k} classes and there are {logits.shape[-1]}; use a difference of logits.")
    return lax.top_k(logits, k)[0]


def _at_label(logits: Array, y: Array) -> Array:
    return jnp.sum(jnp.where(_is_label(logits, y), logits, 0), axis=-1)
