"""Functions of the training class counts. `class_counts` is an array or a sequence [classes], each at least one."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from lt_adv.losses import checks


@checks.constants_allowed
def counts(class_counts: ArrayLike, num_classes: int | None = None, dtype: DTypeLike = float) -> Array:
    """Returns `class_counts` as floats [classes]; ValueError for a wrong length or a concrete count below 1."""
    if class_counts is None:
        raise ValueError("class_counts is missing: give the training count of every class.")
    if not isinstance(class_counts, jax.core.Tracer) and getattr(class_counts, "is_fully_addressable", True):
        values = np.asarray(jax.device_get(class_counts))
        if not jnp.issubdtype(values.dtype, np.integer) and not jnp.issubdtype(values.dtype, np.floating):
            raise ValueError(f"class_counts must be numbers, got {class_counts}.")
        if not np.all((values >= 1) & (values < np.inf)):
            raise ValueError(f"class_counts must be at least 1 for every class, got {class_counts}.")
    result = jnp.asarray(class_counts, dtype)
    if result.ndim != 1 or num_classes not in (None, result.shape[0]):
        expected = "[classes]" if num_classes is None else (num_classes,)
        raise ValueError(f"class_counts must have shape {expected}, one count per class; got {result.shape}.")
    return result


@checks.constants_allowed
def log_prior(class_counts: ArrayLike, dtype: DTypeLike = float) -> Array:
    """Log frequency of each class, log pi_c = log(n_c / sum_k n_k).

    Args:
      class_counts: n, training counts [classes], each at least one.
      dtype: of the result.

    Returns:
      [classes].

    Raises:
      ValueError: for counts that do not fit.

    Examples:
      >>> jnp.exp(losses.log_prior([3, 1]))
      Array([0.75, 0.25], dtype=float32)
    """
    n = counts(class_counts, dtype=dtype)
    return jnp.log(n / n.sum())


@checks.constants_allowed
def ldam_margins(class_counts: ArrayLike, max_margin: float | Array = 0.5, dtype: DTypeLike = float) -> Array:
    """Label-distribution-aware margins, m_c = max_margin (n_min / n_c)^(1/4).

    Args:
      class_counts: n, training counts [classes], each at least one.
      max_margin: margin of the rarest class.
      dtype: of the result.

    Returns:
      [classes], in units of logits.

    Raises:
      ValueError: for counts that do not fit.

    Examples:
      >>> losses.ldam_margins([16, 1])
      Array([0.25, 0.5 ], dtype=float32)

    References:
      Cao et al., "Learning imbalanced datasets with label-distribution-aware margin loss", NeurIPS 2019.
    """
    n = counts(class_counts, dtype=dtype)
    return max_margin * (n.min() / n) ** 0.25


@checks.constants_allowed
def class_balanced_weights(class_counts: ArrayLike, beta: float = 0.9999, dtype: DTypeLike = float) -> Array:
    """Inverse effective numbers of samples, w_c proportional to (1 - beta) / (1 - beta^n_c), of mean one.

    beta = 0 weighs all classes equally; beta -> 1 weighs them by 1 / n_c.

    Args:
      class_counts: n, training counts [classes], each at least one.
      beta: from 0 to below 1, a constant.
      dtype: of the result.

    Returns:
      [classes].

    Raises:
      ValueError: for counts or beta that do not fit.

    Examples:
      >>> losses.class_balanced_weights([2, 1], beta=0.5)
      Array([0.8, 1.2], dtype=float32)

    References:
      Cui et al., "Class-balanced loss based on effective number of samples", CVPR 2019.
    """
    checks.check_constants(0, beta=beta)
    if not 0 <= beta < 1:
        raise ValueError(f"beta must be from 0 to below 1, got {beta}.")
    n = counts(class_counts, dtype=dtype)
    # 1 - beta^n without cancellation: in float32 no digit would remain for beta close to 1.
    weights = 1 / -jnp.expm1(n * math.log(beta)) if beta else jnp.ones_like(n)
    return weights / weights.mean()


@checks.constants_allowed
def rebalanced_weights(class_counts: ArrayLike, predicted_counts: ArrayLike, dtype: DTypeLike = float) -> Array:
    """REAT's class weights, w_c proportional to 1 / (E_c + 1e-5), of mean one.

      E_c = (1 - beta_c^m_c) / (1 - beta_c),    beta_c = (n_c - 1) / n_c,

    the effective number of the m_c training examples that are predicted as class c after the attacks of an epoch. A
    class without such examples has the largest weight, that of E_c = 0.

    Args:
      class_counts: n, training counts [classes], each at least one.
      predicted_counts: m, counts of the predicted classes [classes], each at least zero.
      dtype: of the result.

    Returns:
      [classes].

    Raises:
      ValueError: for counts that do not fit.

    Examples:
      >>> losses.rebalanced_weights([4, 4], [1, 2])
      Array([1.273, 0.727], dtype=float32)

    References:
      Li et al., "Alleviating the effect of data imbalance on adversarial training", 2023.
    """
    n = counts(class_counts, dtype=dtype)
    m = jnp.asarray(predicted_counts, dtype)
    if not isinstance(predicted_counts, jax.core.Tracer):
        values = np.asarray(jax.device_get(predicted_counts))
        if not np.all((values >= 0) & (values < np.inf)):
            raise ValueError(f"predicted_counts must be finite and not negative, got {predicted_counts}.")
    if m.shape != n.shape:
        raise ValueError(f"predicted_counts must have shape {n.shape}, one count per class; got {m.shape}.")
    # 1 - beta^m without cancellation for beta close to 1; 0^0 = 1 for a class of one image.
    effective = -n * jnp.expm1(jax.scipy.special.xlog1py(m, -1 / n))
    weights = 1 / (effective + 1e-5)
    return weights / weights.mean()
