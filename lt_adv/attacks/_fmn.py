"""Fast minimum-norm (FMN) attack: gradient steps in a ball whose radius closes in on the decision boundary."""

import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from lt_adv.attacks import _minimum_norm, checks, tracing
from lt_adv.attacks._base import expand_mask
from lt_adv.attacks._minimum_norm import MinimumPerturbation
from lt_adv.attacks.objectives import logit_margin
from lt_adv.attacks.signatures import Bounds, LogitsFn


def fmn(
    key: Array,
    logits_fn: LogitsFn,
    x: Array,
    y: Array,
    *,
    norm: str = "linf",
    num_steps: int = 100,
    step_size: float = 1.0,
    final_step_size: float | None = None,
    gamma: float = 0.05,
    final_gamma: float = 0.001,
    targets: ArrayLike | None = None,
    bounds: Bounds = (0.0, 1.0),
) -> MinimumPerturbation:
    """Fast minimum-norm attack: x_{k+1} = P(x_k + a_k grad m(x_k) / |grad m|_2), m = max_{j != y} z_j - z_y.

    P projects to the intersection of the ball of radius e_{k+1} around x and the bounds. From an adversarial point the
    radius shrinks to e_{k+1} = min((1 - g_k) e_k, nearest distance so far); otherwise it grows to (1 + g_k) e_k. As
    long as no adversarial point was found, the linear estimate of the distance of the boundary takes the place of e_k:
    |x_k - x|_p + |m(x_k)| / |grad m(x_k)|_q with the dual norm q. a_k and g_k fall on cosine schedules.

    Args:
      key: one typed key, of which example i uses fold_in(key, i), or one key per example [batch]. It draws the
        direction of a step whose gradient is zero.
      logits_fn: x [batch, ...] -> logits [batch, classes], any traceable function.
      x: images [batch, ...], float32 or float64, inside `bounds`.
      y: labels, integers [batch].
      norm: "linf", "l2" or "l1".
      num_steps: gradient steps; one more forward pass evaluates the last point.
      step_size: a_0, the Euclidean length of the first step, in the units of x.
      final_step_size: the last step size; by default a hundredth of the first.
      gamma: g_0, the first relative change of the radius.
      final_gamma: the last relative change of the radius.
      targets: None, or the class that each example shall be classified as, integers [batch]; then
        m = z_t - max_{j != t} z_j.
      bounds: (low, high), the range of valid pixels.

    Returns:
      (x_adv, distance): the nearest adversarial point found, like x, and its distance [batch]. Where x is adversarial
      already (classified wrongly, or as its target), x itself and 0; where none was found, x and infinity.

    Raises:
      ValueError: for images, labels, logits or options that do not fit.

    Examples:
      >>> logits_fn = lambda x: x @ jnp.array([[1.0, -1.0], [-1.0, 1.0]])
      >>> x, y = jnp.array([[0.5, 0.375]]), jnp.array([0])
      >>> x_adv, distance = attacks.fmn(jax.random.key(0), logits_fn, x, y)
      >>> attacks.prediction(logits_fn(x_adv)), 0.0625 < distance[0] < 0.063
      (Array([1], dtype=int32), Array(True, dtype=bool))

    References:
      Pintor et al., "Fast minimum-norm adversarial attacks through adaptive norm constraints", NeurIPS 2021,
      algorithm 1.
      Differs from the released code: P goes to the nearest point of the intersection, instead of the ball first and the
      bounds after it, which stays well inside the ball where many pixels are at their bounds; the linear estimate is
      lengthened by 1 + g_k, without which a search can end within rounding of the boundary, on the wrong side; a step
      whose gradient is zero goes in a random direction, the same at each step. There is no start from an adversarial
      point.
    """
    given = _minimum_norm.problem(logits_fn, x, y, targets, norm, ("linf", "l2", "l1"), bounds)
    num_steps = checks.count("num_steps", num_steps, minimum=1)
    step_size = checks.number("step_size", step_size, 0)
    last_step_size = (
        step_size / 100 if final_step_size is None else checks.number("final_step_size", final_step_size, 0)
    )
    gamma, final_gamma = checks.number("gamma", gamma, 0, 1), checks.number("final_gamma", final_gamma, 0, 1)

    def search() -> MinimumPerturbation:
        x, ball = given.x, given.ball
        otherwise, farthest = _minimum_norm.random_directions(key, x), given.farthest()
        evaluate = given.evaluate(logit_margin)

        def project(point: Array, eps: Array) -> Array:
            if norm == "l2":
                return _minimum_norm.l2_project(point, x, eps, given.low, given.high)
            return ball.project(point, x, expand_mask(eps, x), given.low, given.high)

        def step(k: Array, carry: tuple[Array, Array, MinimumPerturbation]) -> tuple[Array, Array, MinimumPerturbation]:
            point, eps, best = carry
            margin, adversarial, gradient = evaluate(point)
            best = given.nearest(best, point, adversarial)
            g = _minimum_norm.cosine(gamma, final_gamma, k, num_steps, x)
            to_boundary = _minimum_norm.distance_to_boundary(margin, gradient, ball)
            grown = (1 + g) * jnp.where(jnp.isfinite(best.distance), eps, given.distance(point) + to_boundary)
            eps = jnp.where(adversarial, jnp.minimum(eps * (1 - g), best.distance), grown)
            eps = jnp.minimum(eps, farthest)
            a = _minimum_norm.cosine(step_size, last_step_size, k, num_steps, x)
            point = point + a * _minimum_norm.unit_gradient(gradient, otherwise)
            point = project(point, eps)
            return lax.stop_gradient((point, eps, best))

        start = (x, farthest, given.nothing_found())
        point, _, best = lax.fori_loop(0, num_steps, step, lax.stop_gradient(start))
        return given.nearest(best, point, given.is_adversarial(given.logits(point)))

    return lax.stop_gradient(tracing.run_compiled(search, key, x, y, targets))
