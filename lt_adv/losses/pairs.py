"""Losses between two predictions for the same examples."""

import jax
import jax.numpy as jnp
from jax import Array


def kl_divergence(p_logits: Array, q_logits: Array, *, epsilon: float = 0.0) -> Array:
    """KL(p || q) = sum_c p_c (log p_c - log(q_c + epsilon)), p and q the softmax of the logits.

    TRADES and RoBal: p on the clean image, q on the adversarial one, gradient through both.

    Args:
      p_logits: [batch, classes].
      q_logits: [batch, classes].
      epsilon: added to q inside the logarithm, a Python number; 0 is the exact divergence.

    Returns:
      [batch], in nats, zero where p = q (for epsilon = 0).

    Reference: Zhang et al., "Theoretically principled trade-off between robustness and accuracy", ICML 2019.
    Differs from the released code: epsilon is 0, not 1e-12, unless asked for.
    """
    if epsilon < 0:
        raise ValueError(f"epsilon must not be negative, got {epsilon}.")
    log_p = jax.nn.log_softmax(p_logits)
    log_q = jnp.log(jax.nn.softmax(q_logits) + epsilon) if epsilon else jax.nn.log_softmax(q_logits)
    return jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)
