"""Losses as pure functions: arrays in, one value per example out, never reduced. Needs jax and numpy only.

`loss(logits, labels, *, class_counts=..., ...) -> [batch]`, `kl_divergence(p_logits, q_logits) -> [batch]`, and the
functions of class counts that they use. The losses of `batchwise` need the whole batch at once, and TAET's loss is a
scalar.

Examples:
  >>> import jax.numpy as jnp
  >>> from lt_adv import losses
  >>> logits, labels = jnp.array([[2.0, 0.0], [0.0, 0.0]]), jnp.array([0, 1])
  >>> losses.balanced_softmax(logits, labels, class_counts=[3, 1]).mean()
  Array(0.715, dtype=float32)
"""

from lt_adv.losses.batchwise import hierarchical_equalisation, tail_alignment, tail_alignment_released
from lt_adv.losses.class_statistics import class_balanced_weights, ldam_margins, log_prior, rebalanced_weights
from lt_adv.losses.classification import (
    balanced_softmax,
    class_dependent_temperature,
    cross_entropy,
    focal,
    ldam,
    logit_adjustment,
    robal_margin,
)
from lt_adv.losses.consistency import (
    distillation,
    kl_divergence,
    mart,
    soft_cross_entropy,
    squared_probability_distance,
)
from lt_adv.losses.distributional import worst_distribution

__all__ = [
    "balanced_softmax",
    "class_balanced_weights",
    "class_dependent_temperature",
    "cross_entropy",
    "distillation",
    "focal",
    "hierarchical_equalisation",
    "kl_divergence",
    "ldam",
    "ldam_margins",
    "log_prior",
    "logit_adjustment",
    "mart",
    "rebalanced_weights",
    "robal_margin",
    "soft_cross_entropy",
    "squared_probability_distance",
    "tail_alignment",
    "tail_alignment_released",
    "worst_distribution",
]
