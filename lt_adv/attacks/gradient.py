"""Gradient attacks: FGSM, PGD, MIM and CW in a ball, and FGSM-RS and N-FGSM for training.

Rules that hold for all of them:

- A random start and `x_init` are not clipped before the first step, except to `bounds` in FGSM-RS and N-FGSM. After
  each step x_adv is projected to the ball, except in N-FGSM, and clipped to `bounds`.
- A gradient entry that is not finite counts as zero, so x_adv is always finite. No gradient flows through the result.
- The result for an example depends on its own key only, never on the batch size. Keys of other implementations than
  threefry2x32 are replaced by threefry keys derived from them.
- The objective is computed in at least the precision of x, whatever the type of the logits.
- Options, images, labels and logits are checked before anything is computed. Values are checked where they are
  concrete, outside a trace.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from lt_adv.attacks import _base, _expectation, checks, norms, tracing
from lt_adv.attacks._base import where_rows
from lt_adv.attacks._expectation import FIRST_DRAW, Expectation
from lt_adv.attacks.convolutions import with_fast_convolutions
from lt_adv.attacks.hoisting import hoist
from lt_adv.attacks.initialization import example_keys, fold_in, starting_point
from lt_adv.attacks.objectives import cross_entropy, cw_margin, logit_margin, prediction
from lt_adv.attacks.signatures import Bounds, LogitsFn, Objective

T = TypeVar("T")


def fgsm(
    key: Array,
    logits_fn: LogitsFn | Expectation,
    x: Array,
    y: Array,
    *,
    eps: ArrayLike,
    objective: Objective = cross_entropy,
    norm: str = "linf",
    start: str = "zero",
    x_init: Array | None = None,
    targets: Array | None = None,
    bounds: Bounds = (0.0, 1.0),
) -> Array:
    """Fast gradient sign method: x_adv = clip(x + eps sign(grad_x L(x, y))), one step of the whole radius.

    Args:
      key: one typed key, of which example i uses fold_in(key, i), or one key per example [batch]. Under pmap and
        shard_map give one key per example: each device would count i from zero.
      logits_fn: x [batch, ...] -> logits [batch, classes], any traceable function; it sets its own batch-norm mode. A
        randomised network is given as `expectation(logits_fn, num_samples)`.
      x: images [batch, ...], float32 or float64, inside `bounds`.
      y: labels [batch], or probabilities [batch, classes] for the objective `kl_divergence`.
      eps: radius of the ball, scalar or [batch], in the units of x. In L-inf also one radius for each entry, an array
        with the dimensions of x that broadcasts to it: 0 where a feature must not change.
      objective: (logits, y) -> [batch], maximised for each example by itself.
      norm: "linf" (steps along the sign of the gradient), "l2" (along the normalised gradient) or "l1" (along the sign
        of the 1 % of the entries with the largest gradient that the bounds do not block).
      start: "zero" (x), "uniform" (uniform in the ball), "one_sided" (x + eps U[0, 1)) or "gaussian"
        (x + 0.001 N(0, 1)).
      x_init: starting point, shaped like x; replaces `start`.
      targets: None, or a class for each example, integers [batch]: the attack minimises the objective of this class
        instead of maximising that of y.
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
        x_init=x_init, targets=targets, bounds=bounds,
    )  # fmt: skip


def pgd(
    key: Array,
    logits_fn: LogitsFn | Expectation,
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
    targets: Array | None = None,
    num_restarts: int = 1,
    return_best: bool = False,
    bounds: Bounds = (0.0, 1.0),
) -> Array:
    """Projected gradient descent on the negative objective: x_{t+1} = P(x_t + a sign(grad_x L(x_t, y))).

    P projects to the ball and clips to the bounds, a is the step size. For norm="l2" the normalised gradient takes the
    place of the sign.

    Args:
      key: one typed key, of which example i uses fold_in(key, i), or one key per example [batch]. Under pmap and
        shard_map give one key per example: each device would count i from zero.
      logits_fn: x [batch, ...] -> logits [batch, classes], any traceable function; it sets its own batch-norm mode. A
        randomised network is given as `expectation(logits_fn, num_samples)`.
      x: images [batch, ...], float32 or float64, inside `bounds`.
      y: labels [batch], or probabilities [batch, classes] for the objective `kl_divergence`.
      eps: radius of the ball, scalar or [batch], in the units of x. In L-inf also one radius for each entry, an array
        with the dimensions of x that broadcasts to it: 0 where a feature must not change.
      step_size: length of a step in the norm, in the shapes of eps and the units of x.
      num_steps: number of gradient steps; 0 returns the start, projected to the ball and the bounds.
      objective: (logits, y) -> [batch], maximised for each example by itself.
      norm: "linf" (steps along the sign of the gradient), "l2" (along the normalised gradient) or "l1" (along the sign
        of the 1 % of the entries with the largest gradient that the bounds do not block).
      start: "zero" (x), "uniform" (uniform in the ball), "one_sided" (x + eps U[0, 1)) or "gaussian"
        (x + 0.001 N(0, 1)).
      x_init: starting point, shaped like x; replaces `start` in the first restart.
      targets: None, or a class for each example, integers [batch]: the attack minimises the objective of this class
        instead of maximising that of y.
      num_restarts: random starts. The result is the worst one: a point that is classified wrongly (or, with `targets`,
        as the target) before any other, then the one with the largest objective. An example with such a point keeps it.
      return_best: returns the worst of all points visited instead of the last one of each restart; with either of these
        options a restart costs one more forward pass.
      bounds: (low, high), the range of valid pixels.

    Returns:
      x_adv, an array like x: the last point, unless `return_best` or `num_restarts` is set.

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
        start=start, x_init=x_init, targets=targets, num_restarts=num_restarts, return_best=return_best, bounds=bounds,
    )  # fmt: skip


def mim(
    key: Array,
    logits_fn: LogitsFn | Expectation,
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
    targets: Array | None = None,
    num_restarts: int = 1,
    return_best: bool = False,
    bounds: Bounds = (0.0, 1.0),
) -> Array:
    """Momentum iterative method: g_{t+1} = m g_t + grad / mean|grad|, x_{t+1} = P(x_t + a sign(g_{t+1})).

    Args:
      key: one typed key, of which example i uses fold_in(key, i), or one key per example [batch]. Under pmap and
        shard_map give one key per example: each device would count i from zero.
      logits_fn: x [batch, ...] -> logits [batch, classes], any traceable function; it sets its own batch-norm mode. A
        randomised network is given as `expectation(logits_fn, num_samples)`.
      x: images [batch, ...], float32 or float64, inside `bounds`.
      y: labels [batch], or probabilities [batch, classes] for the objective `kl_divergence`.
      eps: radius of the ball, scalar or [batch], in the units of x. In L-inf also one radius for each entry, an array
        with the dimensions of x that broadcasts to it: 0 where a feature must not change.
      step_size: length of a step in the norm, in the shapes of eps and the units of x.
      num_steps: number of gradient steps; 0 returns the start, projected to the ball and the bounds.
      decay: m, the factor of the previous momentum.
      objective: (logits, y) -> [batch], maximised for each example by itself.
      norm: "linf" (steps along the sign of the gradient), "l2" (along the normalised gradient) or "l1" (along the sign
        of the 1 % of the entries with the largest gradient that the bounds do not block).
      start: "zero" (x), "uniform" (uniform in the ball), "one_sided" (x + eps U[0, 1)) or "gaussian"
        (x + 0.001 N(0, 1)).
      x_init: starting point, shaped like x; replaces `start` in the first restart.
      targets: None, or a class for each example, integers [batch]: the attack minimises the objective of this class
        instead of maximising that of y.
      num_restarts: random starts. The result is the worst one: a point that is classified wrongly (or, with `targets`,
        as the target) before any other, then the one with the largest objective. An example with such a point keeps it.
      return_best: returns the worst of all points visited instead of the last one of each restart; with either of these
        options a restart costs one more forward pass.
      bounds: (low, high), the range of valid pixels.

    Returns:
      x_adv, an array like x: the last point, unless `return_best` or `num_restarts` is set.

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
        start=start, x_init=x_init, targets=targets, num_restarts=num_restarts, return_best=return_best, bounds=bounds,
        decay=checks.traceable_number("decay", decay),
    )  # fmt: skip


def cw(
    key: Array,
    logits_fn: LogitsFn | Expectation,
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
    targets: Array | None = None,
    num_restarts: int = 1,
    return_best: bool = False,
    bounds: Bounds = (0.0, 1.0),
) -> Array:
    """PGD on the Carlini-Wagner margin, -max(z_y - max_{j != y} z_j + k, 0): "CW-inf" of the robustness literature.

    Args:
      key: one typed key, of which example i uses fold_in(key, i), or one key per example [batch]. Under pmap and
        shard_map give one key per example: each device would count i from zero.
      logits_fn: x [batch, ...] -> logits [batch, classes], any traceable function; it sets its own batch-norm mode. A
        randomised network is given as `expectation(logits_fn, num_samples)`.
      x: images [batch, ...], float32 or float64, inside `bounds`.
      y: labels, integers [batch].
      eps: radius of the ball, scalar or [batch], in the units of x. In L-inf also one radius for each entry, an array
        with the dimensions of x that broadcasts to it: 0 where a feature must not change.
      step_size: length of a step in the norm, in the shapes of eps and the units of x.
      num_steps: number of gradient steps; 0 returns the start, projected to the ball and the bounds.
      confidence: k, in units of logits.
      norm: "linf" (steps along the sign of the gradient), "l2" (along the normalised gradient) or "l1" (along the sign
        of the 1 % of the entries with the largest gradient that the bounds do not block).
      start: "zero" (x), "uniform" (uniform in the ball), "one_sided" (x + eps U[0, 1)) or "gaussian"
        (x + 0.001 N(0, 1)).
      x_init: starting point, shaped like x; replaces `start` in the first restart.
      targets: None, or a class for each example, integers [batch]: the attack minimises the objective of this class
        instead of maximising that of y.
      num_restarts: random starts. The result is the worst one: a point that is classified wrongly (or, with `targets`,
        as the target) before any other, then the one with the largest objective. An example with such a point keeps it.
      return_best: returns the worst of all points visited instead of the last one of each restart; with either of these
        options a restart costs one more forward pass.
      bounds: (low, high), the range of valid pixels.

    Returns:
      x_adv, an array like x: the last point, unless `return_best` or `num_restarts` is set.

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
      With `targets` the margin is -max(max_{j != t} z_j - z_t + k, 0).
    """
    confidence = checks.traceable_number("confidence", confidence)
    objective: Objective = partial(cw_margin, confidence=confidence)
    if targets is not None:  # `_ascend` maximises its negative
        objective = lambda logits, t: jnp.maximum(logit_margin(logits, t) + confidence, 0)  # noqa: E731
    return _ascend(
        key, logits_fn, x, y, eps=eps, step_size=step_size, num_steps=num_steps, objective=objective, norm=norm,
        start=start, x_init=x_init, targets=targets, num_restarts=num_restarts, return_best=return_best, bounds=bounds,
    )  # fmt: skip


def fgsm_rs(
    key: Array,
    logits_fn: LogitsFn | Expectation,
    x: Array,
    y: Array,
    *,
    eps: ArrayLike,
    step_size: ArrayLike | None = None,
    objective: Objective = cross_entropy,
    bounds: Bounds = (0.0, 1.0),
) -> Array:
    """FGSM with a random start, for training: x_adv = P(x_0 + a sign(grad_x L(x_0, y))), x_0 = clip(x + U(-eps, eps)).

    P projects to the L-inf ball and clips to the bounds, a is the step size.

    Args:
      key: one typed key, of which example i uses fold_in(key, i), or one key per example [batch]. Under pmap and
        shard_map give one key per example: each device would count i from zero.
      logits_fn: x [batch, ...] -> logits [batch, classes], any traceable function; it sets its own batch-norm mode. A
        randomised network is given as `expectation(logits_fn, num_samples)`.
      x: images [batch, ...], float32 or float64, inside `bounds`.
      y: labels [batch], or probabilities [batch, classes] for the objective `kl_divergence`.
      eps: radius of the ball, scalar or [batch], in the units of x, or one radius for each entry, an array with the
        dimensions of x that broadcasts to it.
      step_size: length of the step, in the shapes of eps and the units of x; None is 1.25 eps.
      objective: (logits, y) -> [batch], maximised for each example by itself.
      bounds: (low, high), the range of valid pixels.

    Returns:
      x_adv, an array like x, in the ball and the bounds.

    Raises:
      ValueError: for images, labels, logits or options that do not fit.

    Examples:
      >>> logits_fn = lambda x: x @ jnp.array([[1.0, -1.0], [-1.0, 1.0]])
      >>> x, y = jnp.array([[0.5, 0.375]]), jnp.array([0])
      >>> attacks.fgsm_rs(jax.random.key(0), logits_fn, x, y, eps=0.125, step_size=0.25)
      Array([[0.375, 0.5  ]], dtype=float32)

    References:
      Wong et al., "Fast is better than free: revisiting adversarial training", ICLR 2020, algorithm 3.
      x_0 is clipped to the bounds as in the released code; the algorithm has no bounds.
      Differs from the released code: the code normalises its images by channel, and draws the noise of every channel
      from (-eps / std of the channel, eps / std of the first one). Its network is in training mode.
    """
    return _noisy_step(
        key, logits_fn, x, y, eps=eps, noise=1.0, step_size=step_size, relative_step_size=1.25, in_ball=True,
        objective=objective, bounds=bounds,
    )  # fmt: skip


def n_fgsm(
    key: Array,
    logits_fn: LogitsFn | Expectation,
    x: Array,
    y: Array,
    *,
    eps: ArrayLike,
    noise: float = 2.0,
    step_size: ArrayLike | None = None,
    objective: Objective = cross_entropy,
    bounds: Bounds = (0.0, 1.0),
) -> Array:
    """Noise-FGSM, for training: x_adv = clip(x_0 + a sign(grad_x L(x_0, y))), x_0 = clip(x + U(-k eps, k eps)).

    x_adv is not projected to the ball: it lies up to k eps + a away from x. It is an example to train on at the radius
    eps, which prevents the catastrophic overfitting of single-step training; an accuracy on it is not the robust
    accuracy at eps.

    Args:
      key: one typed key, of which example i uses fold_in(key, i), or one key per example [batch]. Under pmap and
        shard_map give one key per example: each device would count i from zero.
      logits_fn: x [batch, ...] -> logits [batch, classes], any traceable function; it sets its own batch-norm mode. A
        randomised network is given as `expectation(logits_fn, num_samples)`.
      x: images [batch, ...], float32 or float64, inside `bounds`.
      y: labels [batch], or probabilities [batch, classes] for the objective `kl_divergence`.
      eps: radius, scalar or [batch], in the units of x, or one radius for each entry, an array with the dimensions of x
        that broadcasts to it.
      noise: k, the half-width of the noise in units of eps.
      step_size: a, the length of the step, in the shapes of eps and the units of x; None is eps.
      objective: (logits, y) -> [batch], maximised for each example by itself.
      bounds: (low, high), the range of valid pixels.

    Returns:
      x_adv, an array like x, in the bounds; not in the ball of radius eps.

    Raises:
      ValueError: for images, labels, logits or options that do not fit.

    Examples:
      >>> logits_fn = lambda x: x @ jnp.array([[1.0, -1.0], [-1.0, 1.0]])
      >>> x, y = jnp.array([[0.5, 0.375]]), jnp.array([0])
      >>> attacks.n_fgsm(jax.random.key(0), logits_fn, x, y, eps=0.125, noise=0.0)  # FGSM
      Array([[0.375, 0.5  ]], dtype=float32)

    References:
      De Jorge et al., "Make some noise: reliable and efficient single-step adversarial training", NeurIPS 2022,
      section 4. Both x_0 and x_adv are clipped to the bounds, as in the released code.
      Differs from the released code: its network is in training mode.
    """
    noise = checks.traceable_number("noise", noise, low=0.0)
    return _noisy_step(
        key, logits_fn, x, y, eps=eps, noise=noise, step_size=step_size, relative_step_size=1.0, in_ball=False,
        objective=objective, bounds=bounds,
    )  # fmt: skip


def _noisy_step(
    key: Array,
    logits_fn: LogitsFn | Expectation,
    x: Array,
    y: Array,
    *,
    eps: ArrayLike,
    noise: float,
    step_size: ArrayLike | None,
    relative_step_size: float,
    in_ball: bool,
    objective: Objective,
    bounds: Bounds,
) -> Array:
    """Adds uniform noise of half-width noise * eps, then a step of `step_size`, or else relative_step_size * eps."""
    x, y = checks.as_array("x", x), checks.as_array("y, the labels,", y)
    low, high = checks.check_bounds(bounds)
    checks.check_images(x, (low, high))
    checks.check_batch(y, x.shape[0])
    checks.check_objective(objective)
    norms.check_length("eps", eps, x.shape[0], image=x.shape[1:])
    if step_size is not None:
        norms.check_length("step_size", step_size, x.shape[0], image=x.shape[1:])

    one_draw, num_samples = _expectation.split(logits_fn)

    def total(x_0: Array, *keys: Array) -> tuple[Array, tuple[()]]:
        logits = checks.check_logits(one_draw(x_0, *keys), x)
        return jnp.sum(checks.check_values(objective(logits, y), x)), ()

    def noisy_step() -> Array:
        radius = norms.per_example(eps, x)
        step_length = relative_step_size * radius if step_size is None else norms.per_example(step_size, x)
        ball = norms.get("linf")
        keys = example_keys(key, x.shape[0])
        x_0 = starting_point(keys, x, jnp.asarray(noise, x.dtype) * radius, "uniform", ball)
        x_0 = lax.stop_gradient(jnp.clip(x_0, low, high))
        gradient, _ = _gradient(total, num_samples, x_0, keys)(x_0, fold_in(keys, FIRST_DRAW))
        x_adv = x_0 + step_length * ball.direction(norms.finite(gradient))
        x_adv = ball.project(x_adv, x, radius, low, high) if in_ball else jnp.clip(x_adv, low, high)
        # Inside a trace the values of eps, step_size and noise are not checked: they may not be finite.
        return lax.stop_gradient(jnp.where(jnp.isfinite(x_adv), x_adv, x))

    return tracing.run_compiled(noisy_step, key, x, y, eps, step_size, noise)


def _gradient(
    objective: Callable[..., tuple[Array, T]], num_samples: int | None, x: Array, keys: Array
) -> Callable[[Array, Array], tuple[Array, T]]:
    """Returns (x, keys) -> (gradient, auxiliary output) of objective(x) -> (scalar, auxiliary output) for a loop.

    With `num_samples`, these are means over draws of objective(x, keys); see `_averaged`.
    """
    gradient_fn = with_fast_convolutions(jax.grad(objective, has_aux=True))

    def finite_gradient(x: Array, keys: Array) -> tuple[Array, T]:
        gradient, auxiliary = gradient_fn(x, keys)
        return norms.finite(gradient), auxiliary

    return _averaged(gradient_fn if num_samples is None else finite_gradient, num_samples, x, keys)


def _averaged(
    function: Callable[..., T], num_samples: int | None, x: Array, keys: Array
) -> Callable[[Array, Array], T]:
    """Returns (x, keys) -> function(x) for a loop or, with `num_samples`, the mean of function(x, keys) over draws.

    Args:
      function: of the types of `x` and `keys`, to a tree of arrays [batch, ...].
    """
    if num_samples is None:
        hoisted = hoist(function, x)
        return lambda x, _: hoisted(x)
    hoisted_draw = hoist(function, x, keys)
    return lambda x, keys: _expectation.mean_over_draws(partial(hoisted_draw, x), num_samples, x, keys)


class _Worst(NamedTuple):
    """The worst point of each example so far."""

    point: Array  # [b, ...]
    value: Array  # [b], its objective
    broken: Array  # bool [b], whether it reaches the goal: another class than y, or the target


def _ascend(
    key: Array,
    logits_fn: LogitsFn | Expectation,
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
    targets: Array | None,
    bounds: Bounds,
    num_restarts: int = 1,
    return_best: bool = False,
    decay: float | None = None,
) -> Array:
    """Runs any of the attacks above as one loop over (x_adv, momentum); `decay=None` means no momentum."""
    ball, x, y = norms.get(norm), checks.as_array("x", x), checks.as_array("y, the labels,", y)
    low, high = checks.check_bounds(bounds)
    checks.check_images(x, (low, high), x_init)
    checks.check_batch(y, x.shape[0])
    if targets is not None:
        targets = checks.as_array("targets", targets)
        checks.check_labels(targets, x.shape[0], name="targets")
    num_steps, num_restarts = (
        checks.count("num_steps", num_steps),
        checks.count("num_restarts", num_restarts, minimum=1),
    )
    checks.check_objective(objective)
    if num_restarts > 1 and start == "zero":
        raise ValueError('num_restarts needs a random start, such as start="uniform", got start="zero".')
    for name, length in (("eps", eps), ("step_size", step_size)):  # before the network is traced
        norms.check_length(name, length, x.shape[0], image=x.shape[1:] if norm == "linf" else None)

    one_draw, num_samples = _expectation.split(logits_fn)

    def evaluate(x_adv: Array, *keys: Array) -> tuple[Array, tuple[Array, Array]]:
        """Returns (sum of the objective, (objective [batch], logits or, of one draw of several, probabilities))."""
        logits = checks.check_logits(one_draw(x_adv, *keys), x)
        values = objective(logits, y) if targets is None else -objective(logits, targets)
        checks.check_values(values, x)
        scores = logits if num_samples is None else jax.nn.softmax(logits)
        return jnp.sum(values), (values, scores)  # a sum, so that the gradient of an example depends on no other

    def worse(worst: _Worst, x_adv: Array, values: Array, scores: Array) -> _Worst:
        predicted = prediction(scores)
        if targets is not None:
            broken = predicted == targets
        else:
            broken = predicted != y if y.ndim == 1 else jnp.zeros_like(worst.broken)  # no labels: the objective alone
        value = _base.finite_values(values, x)
        replace = (broken & ~worst.broken) | ((broken == worst.broken) & (value > worst.value))
        return where_rows(replace, _Worst(x_adv, value, broken), worst)

    def ascend() -> Array:
        radius, step_length = norms.per_example(eps, x), norms.per_example(step_size, x)
        keys = example_keys(key, x.shape[0])
        x_adv = starting_point(keys, x, radius, start, ball)
        if x_init is not None:
            x_adv = jnp.asarray(x_init, x.dtype) + jnp.zeros_like(x)  # to vary over the same mesh axes as x

        def project(x_adv: Array) -> Array:
            return ball.project(x_adv, x, radius, low, high)

        def draw_keys(restart: ArrayLike, step: ArrayLike) -> Array:
            return keys if num_samples is None else fold_in(keys, FIRST_DRAW, restart, step)

        def move(x_adv: Array, gradient: Array, momentum: Array | None) -> tuple[Array, Array | None]:
            gradient = norms.finite(gradient)
            if decay is not None and momentum is not None:
                gradient = momentum = decay * momentum + norms.unit_mean(gradient)
            if norm == "l1":
                blocked = jnp.where(gradient > 0, x_adv >= high, x_adv <= low)
                gradient = jnp.where(blocked, 0, gradient)
            # Stopped at each step, so that an outer gradient has no loop to differentiate.
            return lax.stop_gradient((project(x_adv + step_length * ball.direction(gradient)), momentum))

        def finite(x_adv: Array) -> Array:
            # Inside a trace the values of eps, step_size and x_init are not checked: they may not be finite.
            return jnp.where(jnp.isfinite(x_adv), x_adv, lax.stop_gradient(x))

        no_momentum = None if decay is None else jnp.zeros_like(x_adv)
        if num_restarts == 1 and not return_best:
            last_point_fn = _gradient(lambda *point: (evaluate(*point)[0], ()), num_samples, x_adv, keys)

            def step(k: Array, carry: tuple[Array, Array | None]) -> tuple[Array, Array | None]:
                return move(carry[0], last_point_fn(carry[0], draw_keys(0, k))[0], carry[1])

            x_adv = lax.stop_gradient(x_adv if num_steps else project(x_adv))
            return finite(lax.fori_loop(0, num_steps, step, (x_adv, no_momentum))[0])

        gradient_fn = _gradient(evaluate, num_samples, x_adv, keys)
        evaluate_fn = _averaged(lambda *point: evaluate(*point)[1], num_samples, x_adv, keys)

        def restart(r: Array, worst: _Worst) -> _Worst:
            keys_r = jax.vmap(jax.random.fold_in, (0, None))(keys, r)
            x_start = jnp.where(r == 0, x_adv, starting_point(keys_r, x, radius, start, ball))

            def step(k: Array, carry: tuple[Array, Array | None, _Worst]) -> tuple[Array, Array | None, _Worst]:
                x_adv, momentum, best = carry
                gradient, judged = gradient_fn(x_adv, draw_keys(r, k))
                if return_best:  # of points inside the ball and the bounds, which the start need not be
                    inside = _base.rows_equal(project(x_adv), x_adv)
                    best = where_rows(inside, worse(best, x_adv, *judged), best)
                return lax.stop_gradient((*move(x_adv, gradient, momentum), best))

            x_start = lax.stop_gradient(x_start if num_steps else project(x_start))
            x_last, _, best = lax.fori_loop(0, num_steps, step, (x_start, no_momentum, worst))
            best = worse(best, finite(x_last), *evaluate_fn(finite(x_last), draw_keys(r, num_steps)))
            return lax.stop_gradient(where_rows(worst.broken, worst, best))

        none = jnp.zeros_like(x).reshape(len(x), -1).sum(axis=1)  # varies over the same mesh axes as x
        first = _Worst(jnp.zeros_like(x) + x, none - jnp.finfo(x.dtype).max, none > 0)

        def remains(carry: tuple[Array, _Worst]) -> Array:
            return (carry[0] < num_restarts) & ~jnp.all(carry[1].broken)

        # Not a `cond` in each round: it cannot be vmapped inside shard_map if a branch uses replicated arrays.
        restarts = lax.while_loop(remains, lambda c: (c[0] + 1, restart(*c)), (jnp.zeros((), jnp.int32), first))
        return lax.stop_gradient(restarts[1].point)

    return tracing.run_compiled(ascend, key, x, y, eps, step_size, decay, x_init, targets)
