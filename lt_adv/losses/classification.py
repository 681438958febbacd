"""Losses of logits and labels: one value per example, in nats.

Losses that do not need `class_counts` accept it as well, so that all losses are interchangeable.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from lt_adv.losses import checks, class_statistics


@checks.constants_allowed
def cross_entropy(logits: Array, labels: Array, *, class_counts: ArrayLike | None = None) -> Array:
    """Cross-entropy, -log softmax(z)_y.

    Args:
      logits: z, [batch, classes]; computed in at least float32.
      labels: y, integers [batch].
      class_counts: not used; accepted so that the losses are interchangeable.

    Returns:
      [batch], in nats.

    Raises:
      ValueError: for logits, labels or options that do not fit.

    Examples:
      >>> logits, labels = jnp.array([[2.0, 0.0], [0.0, 0.0]]), jnp.array([0, 1])
      >>> losses.cross_entropy(logits, labels)
      Array([0.127, 0.693], dtype=float32)
    """
    logits = checks.logits_of(logits, labels)
    return -_at_label(jax.nn.log_softmax(logits), labels)


@checks.constants_allowed
def balanced_softmax(logits: Array, labels: Array, *, class_counts: ArrayLike) -> Array:
    """Balanced softmax, the cross-entropy of z + log n.

    Args:
      logits: z, [batch, classes]; computed in at least float32.
      labels: y, integers [batch].
      class_counts: n, training counts [classes], each at least one.

    Returns:
      [batch], in nats.

    Raises:
      ValueError: for logits, labels, counts or options that do not fit.

    Examples:
      >>> logits, labels = jnp.array([[2.0, 0.0], [0.0, 0.0]]), jnp.array([0, 1])
      >>> losses.balanced_softmax(logits, labels, class_counts=[3, 1])
      Array([0.044, 1.386], dtype=float32)

    References:
      Ren et al., "Balanced meta-softmax for long-tailed visual recognition", NeurIPS 2020.
    """
    logits = checks.logits_of(logits, labels)
    return cross_entropy(logits + jnp.log(_counts(class_counts, logits))[None, :], labels)


@checks.constants_allowed
def logit_adjustment(logits: Array, labels: Array, *, class_counts: ArrayLike, tau: float = 1.0) -> Array:
    """Logit-adjusted cross-entropy, the cross-entropy of z + tau log pi with pi_c = n_c / sum_k n_k.

    tau = 1 is the balanced softmax, tau = 0 the plain cross-entropy.

    Args:
      logits: z, [batch, classes]; computed in at least float32.
      labels: y, integers [batch].
      class_counts: n, training counts [classes], each at least one.
      tau: strength of the prior.

    Returns:
      [batch], in nats.

    Raises:
      ValueError: for logits, labels, counts or options that do not fit.

    Examples:
      >>> logits, labels = jnp.array([[2.0, 0.0], [0.0, 0.0]]), jnp.array([0, 1])
      >>> losses.logit_adjustment(logits, labels, class_counts=[3, 1], tau=2.0)
      Array([0.015, 2.303], dtype=float32)

    References:
      Menon et al., "Long-tail learning via logit adjustment", ICLR 2021, eq. 10.
    """
    checks.check_numbers(tau=tau)
    logits = checks.logits_of(logits, labels)
    return cross_entropy(logits + tau * _log_prior(class_counts, logits)[None, :], labels)


@checks.constants_allowed
def ldam(
    logits: Array, labels: Array, *, class_counts: ArrayLike, max_margin: float | Array = 0.5, scale: float = 1.0
) -> Array:
    """LDAM: the cross-entropy of s (z_j - m_j [j = y]), m_c = max_margin (n_min / n_c)^(1/4).

    Args:
      logits: z, [batch, classes]; computed in at least float32.
      labels: y, integers [batch].
      class_counts: n, training counts [classes], each at least one.
      max_margin: margin of the rarest class, in units of logits.
      scale: s.

    Returns:
      [batch], in nats.

    Raises:
      ValueError: for logits, labels, counts or options that do not fit.

    Examples:
      >>> logits, labels = jnp.array([[2.0, 0.0], [0.0, 0.0]]), jnp.array([0, 1])
      >>> losses.ldam(logits, labels, class_counts=[16, 1])
      Array([0.16 , 0.974], dtype=float32)

    References:
      Cao et al., "Learning imbalanced datasets with label-distribution-aware margin loss", NeurIPS 2019.
      Differs from its released code: s defaults to 1 (the robust long-tail study) instead of 30 (normalised features).
    """
    checks.check_numbers(max_margin=max_margin, scale=scale)
    logits = checks.logits_of(logits, labels)
    n = _counts(class_counts, logits)
    margins = class_statistics.ldam_margins(n, max_margin, n.dtype)
    return cross_entropy(scale * (logits - _of_label(margins, logits, labels)), labels)


@checks.constants_allowed
def robal_margin(
    logits: Array,
    labels: Array,
    *,
    class_counts: ArrayLike,
    margin: float = 0.1,
    scale: float = 10.0,
    tau_b: float = 1.2,
    tau_m: float = 0.0,
) -> Array:
    """RoBal's margin loss, the cross-entropy of u, for cosine logits z.

      u_y = s (z_y - m) - tau_m log(n_y / n_min) + tau_b log pi_y,    u_j = s z_j + tau_b log pi_j for j != y.

    pi_c = n_c / sum_k n_k. tau_b = tau_m = 0 gives a uniform margin on a cosine head.

    Args:
      logits: unscaled cosine logits, [batch, classes].
      labels: y, integers [batch].
      class_counts: n, training counts [classes], each at least one.
      margin: m, in units of cosine.
      scale: s.
      tau_b: strength of the class prior (rebalancing).
      tau_m: strength of the class-aware margin, in units of scaled logits.

    Returns:
      [batch], in nats.

    Raises:
      ValueError: for logits, labels, counts or options that do not fit.

    Examples:
      >>> logits, labels = jnp.array([[0.5, -0.5], [0.0, 0.0]]), jnp.array([0, 1])
      >>> losses.robal_margin(logits, labels, class_counts=[3, 1])
      Array([0.   , 2.412], dtype=float32)

    References:
      Wu et al., "Adversarial robustness under long-tailed distribution", CVPR 2021.
    """
    checks.check_numbers(margin=margin, scale=scale, tau_b=tau_b, tau_m=tau_m)
    logits = checks.logits_of(logits, labels)
    n = _counts(class_counts, logits)
    margins = scale * margin + tau_m * jnp.log(n / n.min())
    prior = tau_b * _log_prior(class_counts, logits)
    return cross_entropy(scale * logits - _of_label(margins, logits, labels) + prior[None, :], labels)


@checks.constants_allowed
def class_dependent_temperature(logits: Array, labels: Array, *, class_counts: ArrayLike, tau: float = 0.3) -> Array:
    """CDT: the cross-entropy of z_c / (n_max / n_c)^tau.

    The temperature is part of the loss only: attacks and evaluation use the logits z.

    Args:
      logits: z, [batch, classes]; computed in at least float32.
      labels: y, integers [batch].
      class_counts: n, training counts [classes], each at least one.
      tau: exponent of the temperature.

    Returns:
      [batch], in nats.

    Raises:
      ValueError: for logits, labels, counts or options that do not fit.

    Examples:
      >>> logits, labels = jnp.array([[2.0, 0.0], [0.0, 0.0]]), jnp.array([0, 1])
      >>> losses.class_dependent_temperature(logits, labels, class_counts=[3, 1])
      Array([0.127, 0.693], dtype=float32)

    References:
      Ye et al., "Identifying and compensating for feature deviation in imbalanced deep learning", 2020.
    """
    checks.check_numbers(tau=tau)
    logits = checks.logits_of(logits, labels)
    n = _counts(class_counts, logits)
    return cross_entropy(logits * ((n / n.max()) ** tau)[None, :], labels)


@checks.constants_allowed
def focal(
    logits: Array,
    labels: Array,
    *,
    class_counts: ArrayLike | None = None,
    gamma: float = 2.0,
    activation: Literal["softmax", "sigmoid"] = "softmax",
) -> Array:
    """Focal loss, -(1 - p)^gamma log p, of p = softmax(z)_y or summed over one sigmoid per class.

    For "sigmoid", p_c = sigmoid(z_c) for c = y and 1 - sigmoid(z_c) for the others. gamma = 0 gives the cross-entropy,
    or the sum of binary cross-entropies.

    Args:
      logits: z, [batch, classes]; computed in at least float32.
      labels: y, integers [batch].
      class_counts: not used; accepted so that the losses are interchangeable.
      gamma: focusing exponent, not negative.
      activation: "softmax" or "sigmoid".

    Returns:
      [batch], in nats.

    Raises:
      ValueError: for logits, labels or options that do not fit.

    Examples:
      >>> logits, labels = jnp.array([[2.0, 0.0], [0.0, 0.0]]), jnp.array([0, 1])
      >>> losses.focal(logits, labels, gamma=2.0)
      Array([0.002, 0.173], dtype=float32)

    References:
      Lin et al., "Focal loss for dense object detection", ICCV 2017, eq. 4 (sigmoid).
    """
    checks.check_numbers(0, gamma=gamma)
    logits = checks.logits_of(logits, labels)
    if activation == "softmax":
        return _focal_term(_at_label(jax.nn.log_softmax(logits), labels), gamma)
    if activation == "sigmoid":
        signed = jnp.where(checks.one_hot(labels, logits.shape[-1]), logits, -logits)
        return _focal_term(jax.nn.log_sigmoid(signed), gamma).sum(axis=-1)
    raise ValueError(f"Unknown activation {activation!r}. There are: softmax, sigmoid.")


def _focal_term(log_p: Array, gamma: float) -> Array:
    # 1 - p without cancellation; bounded away from zero, where a power below one has no finite derivative.
    one_minus_p = jnp.maximum(-jnp.expm1(log_p), jnp.finfo(log_p.dtype).tiny)
    return -(one_minus_p**gamma) * log_p


def _counts(class_counts: ArrayLike, logits: Array) -> Array:
    return class_statistics.counts(class_counts, logits.shape[-1], jnp.result_type(logits))


def _log_prior(class_counts: ArrayLike, logits: Array) -> Array:
    n = _counts(class_counts, logits)
    return class_statistics.log_prior(n, n.dtype)


def _of_label(per_class: Array, logits: Array, labels: Array) -> Array:
    """Returns [batch, classes]: the value of the label's class at the label, zero elsewhere."""
    return jnp.where(checks.one_hot(labels, logits.shape[-1]), per_class[None, :], 0)


def _at_label(values: Array, labels: Array) -> Array:
    return jnp.sum(jnp.where(checks.one_hot(labels, values.shape[-1]), values, 0), axis=-1)
