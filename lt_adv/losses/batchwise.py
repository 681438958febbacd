"""Losses that depend on a whole batch: on pairs of its examples or means of its classes.

They are not means over examples: on several devices, gather their arguments first (`net.gather`).
"""

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from lt_adv.losses import checks, class_statistics


@checks.constants_allowed
def tail_alignment(
    features: Array, labels: Array, *, class_counts: ArrayLike, tail: ArrayLike, margin: float = 1.0
) -> Array:
    """TAIL as REAT states it: attracts features of a tail class to their class and repels other classes (ours).

      l_i = mean_j w_ij (K_ij if y_j = y_i else max(margin - K_ij, 0)) for y_i in the tail, 0 otherwise,
      K_ij = KL(softmax(stop-gradient f_i) || softmax(f_j)),    w_ij = sqrt(N / n_{y_i}) + sqrt(N / n_{y_j}).

    N is the sum of the counts. The repulsion is bounded: a pair further apart than `margin` adds nothing and has no
    gradient, so that l_i >= 0.

    Args:
      features: f, [batch, d].
      labels: y, integers [batch].
      class_counts: n, training counts [classes], each at least one.
      tail: which classes are tail classes, bool [classes].
      margin: in nats, positive.

    Returns:
      [batch], in nats; divide the sum by the number of examples of tail classes.

    Raises:
      ValueError: for features, labels, counts, tail or margin that do not fit.

    Examples:
      >>> features, labels = jnp.array([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]]), jnp.array([1, 1, 0])
      >>> losses.tail_alignment(features, labels, class_counts=[3, 1], tail=[False, True])
      Array([1.551, 1.551, 0.   ], dtype=float32)

    References:
      Li et al., "Alleviating the effect of data imbalance on adversarial training", 2023, for the intent.
      Differs from the released code, which is `tail_alignment_released`.
    """
    checks.check_numbers(0, margin=margin)
    if not margin > 0:
        raise ValueError(f"margin must be positive, got {margin}.")
    features = _checked_features(features, labels, class_counts)
    log_p = jax.nn.log_softmax(features)
    log_p_anchor = jax.lax.stop_gradient(log_p)
    cross_term = jnp.matmul(jnp.exp(log_p_anchor), log_p.T, precision="highest")
    divergence = jnp.sum(jnp.exp(log_p_anchor) * log_p_anchor, axis=-1, keepdims=True) - cross_term
    same, weight = _pairs(labels, class_counts, features)
    values = jnp.where(same, divergence, jax.nn.relu(margin - divergence))
    return jnp.where(_in_tail(tail, class_counts, labels), jnp.mean(weight * values, axis=-1), 0)


@checks.constants_allowed
def tail_alignment_released(features: Array, labels: Array, *, class_counts: ArrayLike, tail: ArrayLike) -> Array:
    """TAIL as REAT's released code computes it.

      l_i = K_i mean_j w_ij (-1 if y_j = y_i else 1) for y_i in the tail, 0 otherwise,
      K_i = mean_{j, dimensions} of p_i (log p_i - log q_j), p_i = softmax(stop-gradient f_i), q_j = softmax(f_j),

    with w_ij as in `tail_alignment`. K_i is one divergence between anchor i and the whole batch. Where other classes
    prevail in the batch, minimising the loss attracts the anchor to the whole batch, the opposite of the stated intent.

    Args:
      features: f, [batch, d].
      labels: y, integers [batch].
      class_counts: n, training counts [classes], each at least one.
      tail: which classes are tail classes, bool [classes].

    Returns:
      [batch], in nats; divide the sum by the number of examples of tail classes.

    Raises:
      ValueError: for features, labels, counts or tail that do not fit.

    Examples:
      >>> features, labels = jnp.array([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]]), jnp.array([1, 1, 0])
      >>> values = losses.tail_alignment_released(features, labels, class_counts=[3, 1], tail=[False, True])
      >>> values
      Array([-0.154, -0.154,  0.   ], dtype=float32)

    References:
      Li et al., "Alleviating the effect of data imbalance on adversarial training", 2023, released code.
    """
    features = _checked_features(features, labels, class_counts)
    log_p = jax.nn.log_softmax(features)
    log_p_anchor = jax.lax.stop_gradient(log_p)
    divergence = jnp.mean(jnp.exp(log_p_anchor) * (log_p_anchor - jnp.mean(log_p, axis=0, keepdims=True)), axis=-1)
    same, weight = _pairs(labels, class_counts, features)
    values = divergence * jnp.mean(jnp.where(same, -weight, weight), axis=-1)
    return jnp.where(_in_tail(tail, class_counts, labels), values, 0)


@checks.constants_allowed
def hierarchical_equalisation(
    values: Array, labels: Array, *, num_classes: int, a: float = 0.1, b: float = 0.1, g: float = 0.1
) -> Array:
    """TAET's loss of the class means L_c of per-example losses.

      a mean_c L_c + b mean_c (L_c - mean_k L_k)^2 + g sum_c (L_c / sum_k L_k)^2

    All means are over all classes; L_c is 0 for a class that is absent from the batch. Both b and g favour equal class
    means, g at any scale of the losses: its sum is at least 1 / classes. 1e-10 is added to both denominators, as in the
    released code.

    Args:
      values: losses, [batch], not negative.
      labels: integers [batch].
      num_classes: number of classes, a Python int.
      a: weight of the mean.
      b: weight of the variance.
      g: weight of the concentration.

    Returns:
      A scalar, not one value per example.

    Raises:
      ValueError: for values, labels, number of classes or weights that do not fit.

    Examples:
      >>> losses.hierarchical_equalisation(jnp.array([1.0, 1.0]), jnp.array([0, 1]), num_classes=2)
      Array(0.15, dtype=float32)

    References:
      TAET, CVPR 2025.
    """
    checks.check_numbers(a=a, b=b, g=g)
    num_classes = checks.check_count("num_classes", num_classes)
    values = checks.floats(values)
    if values.ndim != 1:
        raise ValueError(f"values must be one loss per example, [batch], got shape {values.shape}.")
    checks.check_labels(labels, len(values), num_classes)
    one_hot = checks.one_hot(labels, num_classes).astype(values.dtype)
    means = jnp.matmul(values, one_hot, precision="highest") / (jnp.sum(one_hot, axis=0) + 1e-10)
    share = means / (jnp.sum(means) + 1e-10)
    variance = jnp.mean(jnp.square(means - jnp.mean(means)))
    return a * jnp.mean(means) + b * variance + g * jnp.sum(jnp.square(share))


def _pairs(labels: Array, class_counts: ArrayLike, features: Array) -> tuple[Array, Array]:
    """Returns whether the labels of each pair are equal, and the weight of the pair, both [batch, batch]."""
    n, labels = class_statistics.counts(class_counts, dtype=jnp.result_type(features)), jnp.asarray(labels)
    example_weight = jnp.sqrt(n.sum() / n)[labels]
    return labels[:, None] == labels[None, :], example_weight[:, None] + example_weight[None, :]


def _in_tail(tail: ArrayLike, class_counts: ArrayLike, labels: Array) -> Array:
    """Returns whether each label is a tail class, bool [batch]."""
    tail, classes = jnp.asarray(tail), class_statistics.counts(class_counts).shape
    if tail.shape != classes or tail.dtype != bool:
        raise ValueError(f"tail must be a mask of the tail classes, bool {classes}, got {tail.dtype} {tail.shape}.")
    return tail[jnp.asarray(labels)]


def _checked_features(features: Array, labels: Array, class_counts: ArrayLike) -> Array:
    """Checks features and labels, and returns the features in at least float32."""
    features = checks.floats(features)
    if features.ndim != 2:
        raise ValueError(f"features must be [batch, d], got shape {features.shape}.")
    checks.check_labels(labels, len(features), class_statistics.counts(class_counts).shape[0])
    return features
