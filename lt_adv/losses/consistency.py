"""Losses between two predictions for the same examples."""

import jax
import jax.numpy as jnp
from jax import Array

from lt_adv.losses import checks


@checks.constants_allowed
def kl_divergence(p_logits: Array, q_logits: Array, *, epsilon: float = 0.0) -> Array:
    """KL(p || q) = sum_c p_c (log p_c - log(q_c + epsilon)), p and q the softmax of the logits.

    In TRADES and RoBal, p is the prediction for the clean image and q the one for the adversarial image, with gradients
    through both. epsilon is 0 in TRADES and all of its released codes, and 1e-12 in the regulariser of RoBal's code.

    Args:
      p_logits: [batch, classes].
      q_logits: [batch, classes].
      epsilon: added to q inside the logarithm, a constant; 0 is the exact divergence.

    Returns:
      [batch], in nats; zero where p = q (for epsilon = 0).

    Raises:
      ValueError: if the shapes differ or epsilon is negative or traced.

    Examples:
      >>> losses.kl_divergence(jnp.array([[2.0, 0.0]]), jnp.array([[0.0, 0.0]]))
      Array([0.328], dtype=float32)

    References:
      Zhang et al., "Theoretically principled trade-off between robustness and accuracy", ICML 2019.
      Differs from the released code of RoBal (Wu et al., CVPR 2021): epsilon defaults to 0 instead of 1e-12.
    """
    checks.check_constants(0, epsilon=epsilon)
    checks.check_same_shape(p_logits=p_logits, q_logits=q_logits)
    p_logits, q_logits = checks.floats(p_logits), checks.floats(q_logits)
    log_p = jax.nn.log_softmax(p_logits)
    log_q = jnp.log(jax.nn.softmax(q_logits) + epsilon) if epsilon else jax.nn.log_softmax(q_logits)
    return jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)


@checks.constants_allowed
def distillation(logits: Array, teacher_logits: Array, *, temperature: float = 1.0) -> Array:
    """Knowledge distillation, t^2 KL(softmax(z_T / t) || softmax(z / t)), without gradient through the teacher's z_T.

    t^2 preserves the size of the gradient as t grows: the limit is half the mean square of z - z_T, centred over the
    classes.

    Args:
      logits: z, [batch, classes].
      teacher_logits: z_T, [batch, classes].
      temperature: t, positive, a constant.

    Returns:
      [batch], in nats times t^2; zero where the two predictions are equal.

    Raises:
      ValueError: if the shapes differ or the temperature is not positive or traced.

    Examples:
      >>> losses.distillation(jnp.array([[0.0, 0.0]]), jnp.array([[2.0, 0.0]]), temperature=2.0)
      Array([0.444], dtype=float32)

    References:
      Hinton et al., "Distilling the knowledge in a neural network", 2015.
    """
    checks.check_constants(0, temperature=temperature)
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}.")
    checks.check_same_shape(logits=logits, teacher_logits=teacher_logits)
    logits, teacher_logits = checks.floats(logits), jax.lax.stop_gradient(checks.floats(teacher_logits))
    return temperature**2 * kl_divergence(teacher_logits / temperature, logits / temperature)


@checks.constants_allowed
def squared_probability_distance(p_logits: Array, q_logits: Array) -> Array:
    """||p - q||^2 = sum_c (p_c - q_c)^2, p and q the softmax of the logits: ALP sums it over a batch.

    Args:
      p_logits: [batch, classes].
      q_logits: [batch, classes].

    Returns:
      [batch], zero where p = q, at most 2.

    Raises:
      ValueError: if the shapes differ.

    Examples:
      >>> losses.squared_probability_distance(jnp.array([[0.0, 0.0]]), jnp.array([[100.0, 0.0]]))
      Array([0.5], dtype=float32)

    References:
      Kannan et al., "Adversarial logit pairing", 2018, for the pairing. Differs from it: probabilities instead of
      logits, as in the code of the robust long-tail study.
    """
    checks.check_same_shape(p_logits=p_logits, q_logits=q_logits)
    p_logits, q_logits = checks.floats(p_logits), checks.floats(q_logits)
    return jnp.sum(jnp.square(jax.nn.softmax(p_logits) - jax.nn.softmax(q_logits)), axis=-1)


@checks.constants_allowed
def soft_cross_entropy(logits: Array, probs: Array) -> Array:
    """Cross-entropy of soft labels, -sum_c p_c log softmax(z)_c.

    Args:
      logits: z, [batch, classes].
      probs: p, [batch, classes], rows summing to one; one-hot rows give the cross-entropy of labels.

    Returns:
      [batch], in nats.

    Raises:
      ValueError: if the shapes differ.

    Examples:
      >>> losses.soft_cross_entropy(jnp.array([[2.0, 0.0]]), jnp.array([[0.5, 0.5]]))
      Array([1.127], dtype=float32)
    """
    checks.check_same_shape(logits=logits, probs=probs)
    return -jnp.sum(checks.floats(probs) * jax.nn.log_softmax(checks.floats(logits)), axis=-1)


@checks.constants_allowed
def mart(clean_logits: Array, adversarial_logits: Array, labels: Array, *, beta: float = 5.0) -> Array:
    """MART's loss, -log q_y - log(1 - max_{k != y} q_k) + beta KL(p || q) (1 - p_y).

    p and q are the softmax of the clean and of the adversarial logits. The first two terms are the boosted
    cross-entropy. The gradient flows through all of p and q.

    Args:
      clean_logits: [batch, classes], at least two classes.
      adversarial_logits: [batch, classes].
      labels: y, integers [batch].
      beta: weight of the divergence, lambda in the paper.

    Returns:
      [batch], in nats. Values and gradients are finite for finite logits: 1 - q_k and 1 - p_y are computed as sums of
      the other probabilities, without a difference.

    Raises:
      ValueError: for logits, labels or options that do not fit.

    Examples:
      >>> losses.mart(jnp.array([[2.0, 0.0]]), jnp.array([[0.0, 0.0]]), jnp.array([0]))
      Array([1.582], dtype=float32)

    References:
      Wang et al., "Improving adversarial robustness requires revisiting misclassified examples", ICLR 2020.
      Differs from the released code, which adds constants inside the logarithms.
    """
    checks.check_numbers(beta=beta)
    checks.check_same_shape(clean_logits=clean_logits, adversarial_logits=adversarial_logits)
    clean_logits, adversarial_logits = checks.floats(clean_logits), checks.logits_of(adversarial_logits, labels)
    label = checks.one_hot(labels, clean_logits.shape[-1])
    lowest = jnp.finfo(adversarial_logits.dtype).min
    rival = checks.one_hot(jnp.argmax(jnp.where(label, lowest, adversarial_logits), axis=-1), label.shape[-1])
    log_p, log_q = jax.nn.log_softmax(clean_logits), jax.nn.log_softmax(adversarial_logits)
    log_not_rival = jax.nn.logsumexp(log_q, axis=-1, where=~rival)
    boosted = -jnp.sum(jnp.where(label, log_q, 0), axis=-1) - log_not_rival
    not_label = jnp.sum(jnp.where(label, 0, jnp.exp(log_p)), axis=-1)
    return boosted + beta * kl_divergence(clean_logits, adversarial_logits) * not_label
