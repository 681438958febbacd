"""Attacks that follow the sign or direction of the input gradient: FGSM, PGD, MIM and CW in a ball.

Common arguments, of every attack here:
  key: one typed key (example i then uses fold_in(key, i)) or one key per example [batch]. A result depends on the
    example's own key alone, never on the batch size; keys of other implementations than threefry2x32 are replaced by
    such keys, derived from them. Under pmap and shard_map give one key per example: a single key
    would count i from zero on every device.
  logits_fn: x[batch, ...] -> logits[batch, classes], any traceable callable; it decides its own batch-norm mode.
  x: images [batch, ...], floating, inside `bounds`.
  y: what the objective compares with: labels [batch], or probabilities [batch, classes] for `kl_divergence`.
  eps: radius of the ball, scalar or [batch], in units of the [0, 1] pixel range (as step_size).
  step_size: length of a step in the norm, scalar or [batch].
  num_steps: number of gradients taken; 0 gives the start, brought into the ball and the box.
  objective: (logits, y) -> [batch], maximised for each example by itself.
  norm: "linf" (steps along the sign) or "l2" (steps along the normalised gradient).
  start: "zero", "uniform", "one_sided" or "gaussian", see `initialization.starting_point`.
  x_init: the starting point itself, shaped as x; replaces `start`.
  bounds: the box of valid pixels.
Neither a random start nor x_init is clipped before the first step. After each step x_adv is brought into the ball, then
into the box. No gradient flows through the result.
An entry of the gradient that is not finite counts as zero, so x_adv is always finite. The objective is given logits of
at least the precision of x, whatever the type of the network. ValueError, before anything is computed, for options,
images, labels and logits that do not fit; their values are checked where they are known, outside a trace.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from lt_adv.attacks import inputs, norms
from lt_adv.attacks.cpu_convolutions import with_fast_cpu_convolutions
from lt_adv.attacks.initialization import starting_point
from lt_adv.attacks.objectives import cross_entropy, cw_margin

LogitsFn = Callable[[Array], Array]
Objective = Callable[[Array, Array], Array]


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
    bounds: tuple[float, float] = (0.0, 1.0),
) -> Array:
    """Fast gradient sign method: x_adv = clip(x + eps sign(grad_x L(x, y))), one step of the whole radius.

    Arguments are described at the top of the module.

    Returns:
      x_adv, an array like x.

    Reference: Goodfellow et al., "Explaining and harnessing adversarial examples", ICLR 2015, section 4.
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
    bounds: tuple[float, float] = (0.0, 1.0),
) -> Array:
    """Projected gradient descent on the negative objective: x_{t+1} = P(x_t + a sign(grad_x L(x_t, y))).

    Arguments are described at the top of the module.

    Returns:
      x_adv, an array like x: the last point, not the best one.

    Reference: Madry et al., "Towards deep learning models resistant to adversarial attacks", ICLR 2018, section 2.1.
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
    bounds: tuple[float, float] = (0.0, 1.0),
) -> Array:
    """Momentum iterative method: g_{t+1} = m g_t + grad / mean|grad|, x_{t+1} = P(x_t + a sign(g_{t+1})).

    Arguments are described at the top of the module; `decay` is m.

    Returns:
      x_adv, an array like x: the last point.

    Reference: Dong et al., "Boosting adversarial attacks with momentum", CVPR 2018, eq. 6 and 7. The paper divides by
    the L1 norm; the mean differs from it by the number of pixels, which neither the sign nor the direction sees.
    Differs from the released code: an image whose gradient is exactly zero adds nothing, instead of 0 / 0.
    """
    return _ascend(
        key, logits_fn, x, y, eps=eps, step_size=step_size, num_steps=num_steps, objective=objective, norm=norm,
        start=start, x_init=x_init, bounds=bounds, decay=inputs.traceable_number("decay", decay),
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
    bounds: tuple[float, float] = (0.0, 1.0),
) -> Array:
    """PGD on the Carlini-Wagner margin, -max(z_y - max_{j != y} z_j + k, 0): "CW-inf" of the robustness literature.

    Arguments are described at the top of the module; `confidence` is k, in units of logits.

    Returns:
      x_adv, an array like x: the last point.

    Reference: Carlini and Wagner, "Towards evaluating the robustness of neural networks", S&P 2017, for the margin.
    """
    return _ascend(
        key, logits_fn, x, y, eps=eps, step_size=step_size, num_steps=num_steps,
        objective=partial(cw_margin, confidence=inputs.traceable_number("confidence", confidence)),
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
    bounds: tuple[float, float],
    decay: float | None = None,
) -> Array:
    """The attacks above as one loop over (x_adv, momentum); without `decay` there is no momentum to carry."""
    ball, x, y = norms.get(norm), inputs.as_array("x", x), inputs.as_array("y, the labels,", y)
    low, high = inputs.check_bounds(bounds)
    inputs.check_images(x, (low, high), x_init)
    inputs.check_batch(y, x.shape[0])
    num_steps = inputs.count("num_steps", num_steps)

    for name, length in (("eps", eps), ("step_size", step_size)):  # before the network is traced
        norms.check_length(name, length, x.shape[0])

    def total(x_adv: Array) -> Array:
        values = inputs.check_values(objective(inputs.check_logits(logits_fn(x_adv), x), y), x)
        return jnp.sum(values)  # a sum: each example's gradient is its own, whatever the batch size

    def ascend() -> Array:
        radius, step_length = norms.per_example(eps, x), norms.per_example(step_size, x)
        x_adv = starting_point(key, x, radius, start, ball)
        if x_init is not None:
            x_adv = jnp.asarray(x_init, x.dtype) + jnp.zeros_like(x)  # varies over every mesh axis that x varies over

        def project(x_adv: Array) -> Array:
            return jnp.clip(ball.project(x_adv, x, radius), low, high)

        def step(_: int, carry: tuple[Array, Any]) -> tuple[Array, Any]:
            x_adv, momentum = carry
            gradient = norms.finite(with_fast_cpu_convolutions(jax.grad(total))(x_adv))
            if decay is not None:
                gradient = momentum = decay * momentum + norms.unit_mean(gradient)
            # Stopped at each step, not at the end: an outer gradient then has no loop to differentiate.
            return lax.stop_gradient((project(x_adv + step_length * ball.direction(gradient)), momentum))

        momentum = () if decay is None else jnp.zeros_like(x_adv)
        x_adv = lax.stop_gradient(x_adv if num_steps else project(x_adv))
        x_adv, _ = lax.fori_loop(0, num_steps, step, (x_adv, momentum))
        # A length or a start that is known inside a trace alone may not be finite.
        return jnp.where(jnp.isfinite(x_adv), x_adv, lax.stop_gradient(x))

    return inputs.run(ascend, key, x, y, eps, step_size, decay, x_init)
