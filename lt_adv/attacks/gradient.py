"""Gradient attacks in a ball: FGSM, PGD, MIM and CW.

Rules that hold for all of them:

- A random start and `x_init` are not clipped before the first step. After each step x_adv is projected to the ball and
  clipped to `bounds`.
- A gradient entry that is not finite counts as zero, so x_adv is always finite. No gradient flows through the result.
- The result for an example depends on its own key only, never on the batch size. Keys of other implementations than
  threefry2x32 are replaced by threefry keys derived from them.
- The objective is computed in at least the precision of x, whatever the type of the logits.
- Options, images, labels and logits are checked before anything is computed. Values are checked where they are
  concrete, outside a trace.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from lt_adv.attacks import checks, norms, tracing
from lt_adv.attacks.convolutions import with_fast_convolutions
from lt_adv.attacks.hoisting import hoist
from lt_adv.attacks.initialization import starting_point
from lt_adv.attacks.objectives import cross_entropy, cw_margin
from lt_adv.attacks.signatures import Bounds, LogitsFn, Objective


def fgsm(
    key: Array,
    logits_fn: LogitsFn,
    x: Array,
    y: Array,
    *,
    eps: ArrayLike,
    objective: Objective = cross_entropy,
    norm: str = "linf",
    start: str = "zero",
    x_init: Array | None = None,
    bounds: Bounds = (0.0, 1.0),
) -> Array:
    """Fast gradient sign method: x_adv = clip(x + eps sign(grad_x L(x, y))), one step of the whole radius.

    Args:
      key: one typed key, of which example i uses fold_in(key, i), or one key per example [batch]. Under pmap and
        shard_map give one key per example: each device would count i from zero.
      logits_fn: x [batch, ...] -> logits [batch, classes], any traceable function; it sets its own batch-norm mode.
      x: images [batch, ...], float32 or float64, inside `bounds`.
      y: labels [batch], or probabilities [batch, classes] for the objective `kl_divergence`.
      eps: radius of the ball, scalar or [batch], in the units of x.
      objective: (logits, y) -> [batch], maximised for each example by itself.
      norm: "linf" (steps along the sign of the gradient), "l2" (along the normalised gradient) or "l1" (along the sign
        of the 1 % of the entries with the largest gradient that the bounds do not block).
      start: "zero" (x), "uniform" (uniform in the ball), "one_sided" (x + eps U[0, 1)) or "gaussian"
        (x + 0.001 N(0, 1)).
      x_init: starting point, shaped like x; replaces `start`.
      bounds: (low, high), the range of valid pixels.

    Returns:
      x_adv, an array like x.

    Raises:
      ValueError: for images, labels, logits or options that do not fit.

    Examples:
      >>> logits_fn = lambda x: x @ jnp.array([[1.0, -1.0], [-1.0, 1.0]])
      >>> x, y = jnp.array([[0.5, 0.375]]), jnp.array([0])
      >>> attacks.fgsm(jax.random.key(0), logits_fn, x, y, eps=0.125)
      Array([[0.375, 0.5  ]], dtype=float32)

    References:
      Goodfellow et al., "Explaining and harnessing adversarial examples", ICLR 2015, section 4.
    """
    return _ascend(
        key, logits_fn, x, y, eps=eps, step_size=eps, num_steps=1, objective=objective, norm=norm, start=start,
        x_init=x_init, bounds=bounds,
    )  # fmt: skip


def pgd(
    key: Array,
    logits_fn: LogitsFn,
    x: Array,
    y: Array,
    *,
    eps: ArrayLike,
    step_size: ArrayLike,
    num_steps: int,
    objective: Objective = cross_entropy,
    norm: str = "linf",
    start: str = "uniform",
    x_init: Array | None = None,
    bounds: Bounds = (0.0, 1.0),
) -> Array:
    """Projected gradient descent on the negative objective: x_{t+1} = P(x_t + a sign(grad_x L(x_t, y))).

    P projects to the ball and clips to the bounds, a is the step size. For norm="l2" the normalised gradient takes the
    place of the sign.

    Args:
      key: one typed key, of which example i uses fold_in(key, i), or one key per example [batch]. Under pmap and
        shard_map give one key per example: each device would count i from zero.
      logits_fn: x [batch, ...] -> logits [batch, classes], any traceable function; it sets its own batch-norm mode.
      x: images [batch, ...], float32 or float64, inside `bounds`.
      y: labels [batch], or probabilities [batch, classes] for the objective `kl_divergence`.
      eps: radius of the ball, scalar or [batch], in the units of x.
      step_size: length of a step in the norm, scalar or [batch], in the units of x.
      num_steps: number of gradient steps; 0 returns the start, projected to the ball and the bounds.
      objective: (logits, y) -> [batch], maximised for each example by itself.
      norm: "linf" (steps along the sign of the gradient), "l2" (along the normalised gradient) or "l1" (along the sign
        of the 1 % of the entries with the largest gradient that the bounds do not block).
      start: "zero" (x), "uniform" (uniform in the ball), "one_sided" (x + eps U[0, 1)) or "gaussian"
        (x + 0.001 N(0, 1)).
      x_init: starting point, shaped like x; replaces `start`.
      bounds: (low, high), the range of valid pixels.

    Returns:
      x_adv, an array like x: the last point, not the best one.

    Raises:
      ValueError: for images, labels, logits or options that do not fit.

    Examples:
      >>> logits_fn = lambda x: x @ jnp.array([[1.0, -1.0], [-1.0, 1.0]])
      >>> x, y = jnp.array([[0.5, 0.375]]), jnp.array([0])
      >>> x_adv = attacks.pgd(jax.random.key(0), logits_fn, x, y, eps=0.125, step_size=0.0625, num_steps=5)
      >>> x_adv
      Array([[0.375, 0.5  ]], dtype=float32)

    References:
      Madry et al., "Towards deep learning models resistant to adversarial attacks", ICLR 2018, section 2.1.
    """
    return _ascend(
        key, logits_fn, x, y, eps=eps, step_size=step_size, num_steps=num_steps, objective=objective, norm=norm,
        start=start, x_init=x_init, bounds=bounds,
    )  # fmt: skip


def mim(
    key: Array,
    logits_fn: LogitsFn,
    x: Array,
    y: Array,
    *,
    eps: ArrayLike,
    step_size: ArrayLike,
    num_steps: int,
    decay: float = 1.0,
    objective: Objective = cross_entropy,
    norm: str = "linf",
    start: str = "uniform",
    x_init: Array | None = None,
    bounds: Bounds = (0.0, 1.0),
) -> Array:
    """Momentum iterative method: g_{t+1} = m g_t + grad / mean|grad|, x_{t+1} = P(x_t + a sign(g_{t+1})).

    Args:
      key: one typed key, of which example i uses fold_in(key, i), or one key per example [batch]. Under pmap and
        shard_map give one key per example: each device would count i from zero.
      logits_fn: x [batch, ...] -> logits [batch, classes], any traceable function; it sets its own batch-norm mode.
      x: images [batch, ...], float32 or float64, inside `bounds`.
      y: labels [batch], or probabilities [batch, classes] for the objective `kl_divergence`.
      eps: radius of the ball, scalar or [batch], in the units of x.
      step_size: length of a step in the norm, scalar or [batch], in the units of x.
      num_steps: number of gradient steps; 0 returns the start, projected to the ball and the bounds.
      decay: m, the factor of the previous momentum.
      objective: (logits, y) -> [batch], maximised for each example by itself.
      norm: "linf" (steps along the sign of the gradient), "l2" (along the normalised gradient) or "l1" (along the sign
        of the 1 % of the entries with the largest gradient that the bounds do not block).
      start: "zero" (x), "uniform" (uniform in the ball), "one_sided" (x + eps U[0, 1)) or "gaussian"
        (x + 0.001 N(0, 1)).
      x_init: starting point, shaped like x; replaces `start`.
      bounds: (low, high), the range of valid pixels.

    Returns:
      x_adv, an array like x: the last point.

    Raises:
      ValueError: for images, labels, logits or options that do not fit.

    Examples:
      >>> logits_fn = lambda x: x @ jnp.array([[1.0, -1.0], [-1.0, 1.0]])
      >>> x, y = jnp.array([[0.5, 0.375]]), jnp.array([0])
      >>> x_adv = attacks.mim(jax.random.key(0), logits_fn, x, y, eps=0.125, step_size=0.0625, num_steps=5)
      >>> x_adv
      Array([[0.375, 0.5  ]], dtype=float32)

    References:
      Dong et al., "Boosting adversarial attacks with momentum", CVPR 2018, eq. 6 and 7. The paper divides by the L1
      norm. The mean differs from it by the number of pixels, which changes neither the sign nor the direction.
      Differs from the released code: an image whose gradient is exactly zero adds nothing, instead of 0 / 0.
    """
    return _ascend(
        key, logits_fn, x, y, eps=eps, step_size=step_size, num_steps=num_steps, objective=objective, norm=norm,
        start=start, x_init=x_init, bounds=bounds, decay=checks.traceable_number("decay", decay),
    )  # fmt: skip


def cw(
    key: Array,
    logits_fn: LogitsFn,
    x: Array,
    y: Array,
    *,
    eps: ArrayLike,
    step_size: ArrayLike,
    num_steps: int,
    confidence: float = 50.0,
    norm: str = "linf",
    start: str = "uniform",
    x_init: Array | None = None,
    bounds: Bounds = (0.0, 1.0),
) -> Array:
    """PGD on the Carlini-Wagner margin, -max(z_y - max_{j != y} z_j + k, 0): "CW-inf" of the robustness literature.

    Args:
      key: one typed key, of which example i uses fold_in(key, i), or one key per example [batch]. Under pmap and
        shard_map give one key per example: each device would count i from zero.
      logits_fn: x [batch, ...] -> logits [batch, classes], any traceable function; it sets its own batch-norm mode.
      x: images [batch, ...], float32 or float64, inside `bounds`.
      y: labels, integers [batch].
      eps: radius of the ball, scalar or [batch], in the units of x.
      step_size: length of a step in the norm, scalar or [batch], in the units of x.
      num_steps: number of gradient steps; 0 returns the start, projected to the ball and the bounds.
      confidence: k, in units of logits.
      norm: "linf" (steps along the sign of the gradient), "l2" (along the normalised gradient) or "l1" (along the sign
        of the 1 % of the entries with the largest gradient that the bounds do not block).
      start: "zero" (x), "uniform" (uniform in the ball), "one_sided" (x + eps U[0, 1)) or "gaussian"
        (x + 0.001 N(0, 1)).
      x_init: starting point, shaped like x; replaces `start`.
      bounds: (low, high), the range of valid pixels.

    Returns:
      x_adv, an array like x: the last point.

    Raises:
      ValueError: for images, labels, logits or options that do not fit.

    Examples:
      >>> logits_fn = lambda x: x @ jnp.array([[1.0, -1.0], [-1.0, 1.0]])
      >>> x, y = jnp.array([[0.5, 0.375]]), jnp.array([0])
      >>> x_adv = attacks.cw(jax.random.key(0), logits_fn, x, y, eps=0.125, step_size=0.0625, num_steps=5)
      >>> x_adv
      Array([[0.375, 0.5  ]], dtype=float32)

    References:
      Carlini and Wagner, "Towards evaluating the robustness of neural networks", S&P 2017, for the margin.
    """
    return _ascend(
        key, logits_fn, x, y, eps=eps, step_size=step_size, num_steps=num_steps,
        objective=partial(cw_margin, confidence=checks.traceable_number("confidence", confidence)),
        norm=norm, start=start, x_init=x_init, bounds=bounds,
    )  # fmt: skip


def _ascend(
    key: Array,
    logits_fn: LogitsFn,
    x: Array,
    y: Array,
    *,
    eps: ArrayLike,
    step_size: ArrayLike,
    num_steps: int,
    objective: Objective,
    norm: str,
    start: str,
    x_init: Array | None,
    bounds: Bounds,
    decay: float | None = None,
) -> Array:
    """Runs any of the attacks above as one loop over (x_adv, momentum); `decay=None` means no momentum."""
    ball, x, y = norms.get(norm), checks.as_array("x", x), checks.as_array("y, the labels,", y)
    low, high = checks.check_bounds(bounds)
    checks.check_images(x, (low, high), x_init)
    checks.check_batch(y, x.shape[0])
    num_steps = checks.count("num_steps", num_steps)
    checks.check_objective(objective)
    for name, length in (("eps", eps), ("step_size", step_size)):  # before the network is traced
        norms.check_length(name, length, x.shape[0])

    def total(x_adv: Array) -> Array:
        values = checks.check_values(objective(checks.check_logits(logits_fn(x_adv), x), y), x)
        return jnp.sum(values)  # a sum, so that the gradient of an example does not depend on the batch size

    def ascend() -> Array:
        radius, step_length = norms.per_example(eps, x), norms.per_example(step_size, x)
        x_adv = starting_point(key, x, radius, start, ball)
        if x_init is not None:
            x_adv = jnp.asarray(x_init, x.dtype) + jnp.zeros_like(x)  # to vary over the same mesh axes as x

        def project(x_adv: Array) -> Array:
            return ball.project(x_adv, x, radius, low, high)

        gradient_fn = hoist(with_fast_convolutions(jax.grad(total)), x_adv)

        def step(_: int, carry: tuple[Array, Array | None]) -> tuple[Array, Array | None]:
            x_adv, momentum = carry
            gradient = norms.finite(gradient_fn(x_adv))
            if decay is not None and momentum is not None:
                gradient = momentum = decay * momentum + norms.unit_mean(gradient)
            if norm == "l1":
                blocked = jnp.where(gradient > 0, x_adv >= high, x_adv <= low)
                gradient = jnp.where(blocked, 0, gradient)
            # Stopped at each step, so that an outer gradient has no loop to differentiate.
            return lax.stop_gradient((project(x_adv + step_length * ball.direction(gradient)), momentum))

        momentum = None if decay is None else jnp.zeros_like(x_adv)
        x_adv = lax.stop_gradient(x_adv if num_steps else project(x_adv))
        x_adv, _ = lax.fori_loop(0, num_steps, step, (x_adv, momentum))
        # Inside a trace the values of eps, step_size and x_init are not checked: they may not be finite.
        return jnp.where(jnp.isfinite(x_adv), x_adv, lax.stop_gradient(x))

    return tracing.run_compiled(ascend, key, x, y, eps, step_size, decay, x_init)
