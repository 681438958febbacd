"""Weights of distributionally robust optimization: the worst distribution in a ball around the uniform one."""

import math

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from lt_adv.losses import checks

_State = tuple[Array, Array, Array, Array, Array]  # number of steps, low, high, y, the last y
_MAX_STEPS = 200  # of Newton's method with bisection; about ten are needed


@checks.constants_allowed
def worst_distribution(values: ArrayLike, *, radius: float) -> Array:
    """The distribution of largest expected value among those close to the uniform one.

      p = argmax_p sum_c p_c v_c   subject to   sum_c p_c = 1,   p >= 0,   KL(u || p) <= r,   u_c = 1 / C.

    The stationary point is p_c = h / (l - v_c) with a multiplier l > max_c v_c, and h from the sum. That leaves one
    unknown, x = range(v) / (l - max_c v_c), in one equation:

      p_c proportional to 1 / (1 + x d_c),   d_c = (max_k v_k - v_c) / range(v),   KL(u || p) = r.

    The left side grows with x, from 0. It is solved for log x by Newton's method, with bisection where a step would
    leave the interval that contains the root.

    p depends on the differences of the values in proportion to their range only. It is uniform if all values are equal
    or r = 0, and as r grows it tends to the uniform distribution over the classes of the largest value. No p_c is zero
    unless it underflows.

    Args:
      values: v, [classes].
      radius: r, in nats, a constant.

    Returns:
      p, [classes], without a gradient.

    Raises:
      ValueError: for values that are not [classes], or a radius that is negative, not finite or traced.

    Examples:
      >>> losses.worst_distribution(jnp.array([0.0, 0.0, 1.0]), radius=0.1)
      Array([0.222, 0.222, 0.556], dtype=float32)

    References:
      Zhang et al., "Towards fairness-aware adversarial learning", CVPR 2024, for the problem, which its released code
      gives to a general convex solver.
    """
    checks.check_constants(0, radius=radius)
    values = lax.stop_gradient(checks.floats(values))
    if values.ndim != 1 or not values.size:
        raise ValueError(f"values must be [classes], got shape {values.shape}.")
    gaps = jnp.max(values) - values
    spread = jnp.max(gaps)
    if radius == 0:
        return jnp.full_like(values, 1 / values.size)
    is_largest = gaps <= 0
    log_gaps = jnp.log(jnp.where(is_largest, 1, gaps / jnp.where(spread > 0, spread, 1)))  # log d; d = 0 has no log

    def excess(y: Array) -> tuple[Array, Array]:
        """Returns (KL(u || p) - r, its derivative) at y = log x."""
        s = jnp.where(is_largest, 0, jax.nn.sigmoid(y + log_gaps))  # x d / (1 + x d)
        rest = jnp.where(is_largest, 1, jax.nn.sigmoid(-y - log_gaps))  # 1 / (1 + x d)
        mean = jnp.mean(s)
        log_mean = jnp.where(mean < 0.5, jnp.log1p(-jnp.minimum(mean, 0.5)), jnp.log(jnp.mean(rest)))  # neither cancels
        divergence = log_mean + jnp.mean(jnp.where(is_largest, 0, jax.nn.softplus(y + log_gaps)))
        return divergence - radius, mean - jnp.sum(rest * s) / jnp.sum(rest)

    # KL(u || p) <= log(1 + x) <= x, and KL(u || p) >= y / C - log C.
    low = jnp.full_like(spread, math.log(radius))
    high = jnp.full_like(spread, values.size * (radius + math.log(values.size)))
    tolerance = 4 * jnp.finfo(values.dtype).eps

    def unfinished(state: _State) -> Array:
        steps, low, high, y, last = state
        size = 1 + jnp.abs(y)
        return (steps < _MAX_STEPS) & (high - low > tolerance * size) & (jnp.abs(y - last) > tolerance * size)

    def step(state: _State) -> _State:
        steps, low, high, y, _ = state
        value, slope = excess(y)
        low, high = jnp.where(value <= 0, y, low), jnp.where(value <= 0, high, y)
        newton = y - value / jnp.where(slope > 0, slope, 1)
        inside = (slope > 0) & (low < newton) & (newton < high)
        return steps + 1, low, high, jnp.where(inside, newton, (low + high) / 2), y

    variance = jnp.var(jnp.where(is_largest, 0, jnp.exp(log_gaps)))  # KL(u || p) = x^2 variance / 2 + O(x^3)
    start = jnp.clip(jnp.log(2 * radius / jnp.where(spread > 0, variance, 1)) / 2, low, high)
    steps = jnp.zeros_like(spread, jnp.int32)
    y = lax.while_loop(unfinished, step, (steps, low, high, start, start + 1 + jnp.abs(start)))[3]
    p = jnp.where(is_largest, 1, jax.nn.sigmoid(-y - log_gaps))
    return jnp.where(spread > 0, p / jnp.sum(p), 1 / values.size)
