"""Losses that see a whole batch: pairs of its examples, means of its classes.

They are no plain means over examples: on several devices gather their arguments first (`net.gather`).
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
    """TAIL as REAT states it: features of a tail class drawn to their own class and pushed from the others (ours).

      l_i = mean_j w_ij (K_ij if y_j = y_i else max(margin - K_ij, 0)) for y_i in the tail, 0 otherwise,
      K_ij = KL(softmax(stop-gradient f_i) || softmax(f_j)),    w_ij = sqrt(N / n_{y_i}) + sqrt(N / n_{y_j}).

    The repulsion is bounded: a pair further apart than `margin` adds nothing and has no gradient, so that l_i >= 0.

    Args:
      features: f, [batch, d].
      labels: y, integers [batch].
      class_counts: n, [classes]; N is their sum.
      tail: which classes are tail classes, bool [classes].
      margin: in nats.

    Returns:
      [batch], in nats; divide the sum by the number of examples of tail classes.

    Reference: Li et al., "Alleviating the effect of data imbalance on adversarial training", 2023, for the intent.
    Differs from the released code, which is `tail_alignment_released`.
    """
    checks.check_numbers(0, margin=margin)
    if not margin > 0:
        raise ValueError(f"margin must be positive, got {margin}.")
    features = _features(features, labels, class_counts)
    log_p = jax.nn.log_softmax(features)
    fixed = jax.lax.stop_gradient(log_p)
    crossed = jnp.matmul(jnp.exp(fixed), log_p.T, precision="highest")
    divergence = jnp.sum(jnp.exp(fixed) * fixed, axis=-1, keepdims=True) - crossed
    same, weight = _pairs(labels, class_counts, features)
    values = jnp.where(same, divergence, jax.nn.relu(margin - divergence))
    return jnp.where(_in_tail(tail, class_counts, labels), jnp.mean(weight * values, axis=-1), 0)


@checks.constants_allowed
def tail_alignment_released(features: Array, labels: Array, *, class_counts: ArrayLike, tail: ArrayLike) -> Array:
    """TAIL as REAT's released code computes it. Arguments and result: `tail_alignment`.

      l_i = K_i mean_j w_ij (-1 if y_j = y_i else 1) for y_i in the tail, 0 otherwise,
      K_i = mean_{j, dimensions} of p_i (log p_i - log q_j), p_i = softmax(stop-gradient f_i), q_j = softmax(f_j).

    One divergence for each anchor i, from all the batch at once: minimised, it draws an anchor and the whole batch
    together where other classes prevail, which is the opposite of the stated intent.
    """
    features = _features(features, labels, class_counts)
    log_p = jax.nn.log_softmax(features)
    fixed = jax.lax.stop_gradient(log_p)
    divergence = jnp.mean(jnp.exp(fixed) * (fixed - jnp.mean(log_p, axis=0, keepdims=True)), axis=-1)
    same, weight = _pairs(labels, class_counts, features)
    values = divergence * jnp.mean(jnp.where(same, -weight, weight), axis=-1)
    return jnp.where(_in_tail(tail, class_counts, labels), values, 0)


@checks.constants_allowed
def hierarchical_equalisation(
    values: Array, labels: Array, *, num_classes: int, a: float = 0.1, b: float = 0.1, g: float = 0.1
) -> Array:
    """TAET's loss of the class means L_c of per-example losses.

      a mean_c L_c + b mean_c (L_c - mean_k L_k)^2 + g sum_c (L_c / sum_k L_k)^2

    All means are over all classes; L_c is 0 for one that is absent from the batch. b asks for equal classes; so does g,
    whatever the scale: its sum is 1 / classes at the least. 1e-10 stands in both denominators, as in the released code.

    Args:
      values: losses, [batch], not negative.
      labels: integers [batch].
      num_classes: C.
      a: weight of the level.
      b: weight of the spread.
      g: weight of the concentration.

    Returns:
      a scalar: no mean over examples has this value.

    Reference: TAET, CVPR 2025.
    """
    checks.check_numbers(a=a, b=b, g=g)
    values = checks.floats(values)
    if values.ndim != 1:
        raise ValueError(f"values must be one loss per example, [batch], got shape {values.shape}.")
    checks.check_labels(labels, len(values), num_classes)
    member = checks.one_hot(labels, num_classes).astype(values.dtype)
    means = jnp.matmul(values, member, precision="highest") / (jnp.sum(member, axis=0) + 1e-10)
    share = means / (jnp.sum(means) + 1e-10)
    spread = jnp.mean(jnp.square(means - jnp.mean(means)))
    return a * jnp.mean(means) + b * spread + g * jnp.sum(jnp.square(share))


def _pairs(labels: Array, class_counts: ArrayLike, features: Array) -> tuple[Array, Array]:
    """(same label, weight) of every pair, [batch, batch]."""
    n, labels = class_statistics.counts(class_counts, dtype=jnp.result_type(features)), jnp.asarray(labels)
    root = jnp.sqrt(n.sum() / n)[labels]
    return labels[:, None] == labels[None, :], root[:, None] + root[None, :]


def _in_tail(tail: ArrayLike, class_counts: ArrayLike, labels: Array) -> Array:
    """bool [batch]: whether each label is of a tail class."""
    tail, classes = jnp.asarray(tail), class_statistics.counts(class_counts).shape
    if tail.shape != classes or tail.dtype != bool:
        raise ValueError(f"tail must be a mask of the tail classes, bool {classes}, got {tail.dtype} {tail.shape}.")
    return tail[jnp.asarray(labels)]


def _features(features: Array, labels: Array, class_counts: ArrayLike) -> Array:
    """Features in at least float32, once the labels are checked against them."""
    features = checks.floats(features)
    if features.ndim != 2:
        raise ValueError(f"features must be [batch, d], got shape {features.shape}.")
    checks.check_labels(labels, len(features), class_statistics.counts(class_counts).shape[0])
    return features
