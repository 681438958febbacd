"""Decoupled direction and norm (DDN) attack: gradient steps on a sphere whose radius shrinks and grows."""

import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from lt_adv.attacks import _minimum_norm, checks, tracing
from lt_adv.attacks._base import expand_mask
from lt_adv.attacks._minimum_norm import MinimumPerturbation
from lt_adv.attacks.objectives import stable_cross_entropy
from lt_adv.attacks.signatures import Bounds, LogitsFn


def ddn(
    key: Array,
    logits_fn: LogitsFn,
    x: Array,
    y: Array,
    *,
    num_steps: int = 100,
    gamma: float = 0.05,
    init_eps: float = 1.0,
    norm: str = "l2",
    targets: ArrayLike | None = None,
    bounds: Bounds = (0.0, 1.0),
) -> MinimumPerturbation:
    """Decoupled direction and norm: x_{k+1} = C(x + e_{k+1} d / |d|), d = x_k - x + a_k grad_x L(x_k, y) / |grad|.

    The radius is e_{k+1} = (1 - g) e_k if x_k is adversarial and (1 + g) e_k otherwise. L is the cross-entropy, C clips
    to the bounds, and the step size a_k falls from 1 to 0.01 on a cosine schedule.

    Args:
      key: one typed key, of which example i uses fold_in(key, i), or one key per example [batch]. It draws the
        direction of a step whose gradient is zero.
      logits_fn: x [batch, ...] -> logits [batch, classes], any traceable function.
      x: images [batch, ...], float32 or float64, inside `bounds`.
      y: labels, integers [batch].
      num_steps: gradient steps; one more forward pass evaluates the last point.
      gamma: g, the relative change of the radius.
      init_eps: e_0, the first radius, in the units of x.
      norm: "l2", the only norm that DDN is defined for.
      targets: None, or the class that each example shall be classified as, integers [batch].
      bounds: (low, high), the range of valid pixels.

    Returns:
      (x_adv, distance): the nearest adversarial point found, like x, and its distance [batch]. Where x is adversarial
      already (classified wrongly, or as its target), x itself and 0; where none was found, x and infinity.

    Raises:
      ValueError: for images, labels, logits or options that do not fit.

    Examples:
      >>> logits_fn = lambda x: x @ jnp.array([[1.0, -1.0], [-1.0, 1.0]])
      >>> x, y = jnp.array([[0.5, 0.375]]), jnp.array([0])
      >>> x_adv, distance = attacks.ddn(jax.random.key(0), logits_fn, x, y)
      >>> attacks.prediction(logits_fn(x_adv)), 0.088 < distance[0] < 0.09
      (Array([1], dtype=int32), Array(True, dtype=bool))

    References:
      Rony et al., "Decoupling direction and norm for efficient gradient-based L2 adversarial attacks and defenses",
      CVPR 2019, algorithm 1, without the quantisation of pixels.
      Differs from the released code: the random direction of a zero gradient is the same at each step.
    """
    given = _minimum_norm.problem(logits_fn, x, y, targets, norm, ("l2",), bounds)
    num_steps = checks.count("num_steps", num_steps, minimum=1)
    gamma, init_eps = checks.number("gamma", gamma, 0, 1), checks.number("init_eps", init_eps, 0)

    def search() -> MinimumPerturbation:
        x = given.x
        otherwise = _minimum_norm.random_directions(key, x)
        evaluate = given.evaluate(stable_cross_entropy)

        def step(k: Array, carry: tuple[Array, Array, MinimumPerturbation]) -> tuple[Array, Array, MinimumPerturbation]:
            point, eps, best = carry
            _, adversarial, gradient = evaluate(point)
            best = given.nearest(best, point, adversarial)
            eps = jnp.where(adversarial, 1 - gamma, 1 + gamma).astype(x.dtype) * eps
            step_size = _minimum_norm.cosine(1.0, 0.01, k, num_steps, x)
            d = point - x + step_size * _minimum_norm.unit_gradient(gradient, otherwise)
            point = jnp.clip(x + expand_mask(eps, x) * given.ball.direction(d), given.low, given.high)
            return lax.stop_gradient((point, eps, best))

        start = (x, given.per_example(init_eps), given.nothing_found())
        point, _, best = lax.fori_loop(0, num_steps, step, lax.stop_gradient(start))
        return given.nearest(best, point, given.is_adversarial(given.logits(point)))

    return lax.stop_gradient(tracing.run_compiled(search, key, x, y, targets))
