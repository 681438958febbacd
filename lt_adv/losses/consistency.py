"""Losses between two predictions for the same examples."""

import jax
import jax.numpy as jnp
from jax import Array

from lt_adv.losses import checks


@checks.constants_allowed
def kl_divergence(p_logits: Array, q_logits: Array, *, epsilon: float = 0.0) -> Array:
    """KL(p || q) = sum_c p_c (log p_c - log(q_c + epsilon)), p and q the softmax of the logits.

    TRADES and RoBal: p on the clean image, q on the adversarial one, gradient through both. epsilon is 0 in TRADES and
    all of its released codes, and 1e-12 in the regulariser of RoBal's.

    Args:
      p_logits: [batch, classes].
      q_logits: [batch, classes].
      epsilon: added to q inside the logarithm, a Python number; 0 is the exact divergence.

    Returns:
      [batch], in nats, zero where p = q (for epsilon = 0).

    Reference: Zhang et al., "Theoretically principled trade-off between robustness and accuracy", ICML 2019.
    Differs from the released code of RoBal (Wu et al., CVPR 2021): epsilon is 0, not 1e-12, unless asked for.
    """
    checks.check_numbers(0, epsilon=epsilon)
    checks.check_same_shape(p_logits=p_logits, q_logits=q_logits)
    p_logits, q_logits = checks.floats(p_logits), checks.floats(q_logits)
    log_p = jax.nn.log_softmax(p_logits)
    log_q = jnp.log(jax.nn.softmax(q_logits) + epsilon) if epsilon else jax.nn.log_softmax(q_logits)
    return jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)


@checks.constants_allowed
def distillation(logits: Array, teacher_logits: Array, *, temperature: float = 1.0) -> Array:
    """Knowledge distillation, t^2 KL(softmax(z_T / t) || softmax(z / t)), the teacher's logits z_T held fixed.

    t^2 keeps the gradient's size as t grows: the limit is half the mean square of z - z_T, centred over the classes.

    Args:
      logits: z, [batch, classes].
      teacher_logits: z_T, [batch, classes].
      temperature: t, a Python number.

    Returns:
      [batch], in nats times t^2, zero where the two predictions are the same.

    Reference: Hinton et al., "Distilling the knowledge in a neural network", 2015.
    """
    checks.check_numbers(0, temperature=temperature)
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}.")
    checks.check_same_shape(logits=logits, teacher_logits=teacher_logits)
    logits, taught = checks.floats(logits), jax.lax.stop_gradient(checks.floats(teacher_logits))
    return temperature**2 * kl_divergence(taught / temperature, logits / temperature)


@checks.constants_allowed
def squared_probability_distance(p_logits: Array, q_logits: Array) -> Array:
    """||p - q||^2 = sum_c (p_c - q_c)^2, p and q the softmax of the logits: what ALP sums over a batch.

    Args:
      p_logits: [batch, classes].
      q_logits: [batch, classes].

    Returns:
      [batch], zero where p = q, at most 2.

    Reference: Kannan et al., "Adversarial logit pairing", 2018, for the pairing. Differs from it: probabilities and not
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
    """
    checks.check_same_shape(logits=logits, probs=probs)
    return -jnp.sum(checks.floats(probs) * jax.nn.log_softmax(checks.floats(logits)), axis=-1)


@checks.constants_allowed
def mart(clean_logits: Array, adversarial_logits: Array, labels: Array, *, beta: float = 5.0) -> Array:
    """MART's loss, with p = softmax of the clean logits and q = softmax of the adversarial ones:

      -log q_y - log(1 - max_{k != y} q_k) + beta KL(p || q) (1 - p_y).

    The first two terms are the boosted cross-entropy. The gradient flows through all of p and q.

    Args:
      clean_logits: [batch, classes], at least two classes.
      adversarial_logits: [batch, classes].
      labels: y, integers [batch].
      beta: weight of the divergence, the paper's lambda.

    Returns:
      [batch], in nats. Finite, with finite gradients, for finite logits: 1 - q_k and 1 - p_y are the sums of the other
      probabilities and never a difference.

    Reference: Wang et al., "Improving adversarial robustness requires revisiting misclassified examples", ICLR 2020.
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
