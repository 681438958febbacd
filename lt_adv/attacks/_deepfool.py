"""DeepFool: steps to the nearest boundary of the linearised network."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from lt_adv.attacks import _minimum_norm, checks, norms, tracing
from lt_adv.attacks._base import expand_mask, where_rows
from lt_adv.attacks._minimum_norm import MinimumPerturbation, Problem
from lt_adv.attacks.convolutions import with_fast_convolutions
from lt_adv.attacks.hoisting import hoist
from lt_adv.attacks.initialization import example_keys
from lt_adv.attacks.objectives import logit_margin, targeted_logit_margin
from lt_adv.attacks.signatures import Bounds, LogitsFn

_MARGIN = 1e-4  # added to the length of each step, as in the released code: the plane itself may be on either side


def deepfool(
    key: Array,
    logits_fn: LogitsFn,
    x: Array,
    y: Array,
    *,
    norm: str = "linf",
    num_steps: int = 50,
    overshoot: float = 0.02,
    candidates: int = 10,
    targets: ArrayLike | None = None,
    bounds: Bounds = (0.0, 1.0),
) -> MinimumPerturbation:
    """DeepFool: r_{k+1} = r_k + argmin {|s|: m_j + <grad m_j, s> = 0}, m_j = z_j - z_y, x_k = C(x + (1 + o) r_k).

    j is the class whose linearised boundary is nearest to x_k, o the overshoot, and C clips to the bounds. An example
    is finished at its first adversarial point.

    Args:
      key: one typed key or one per example [batch]; not used, because DeepFool draws nothing.
      logits_fn: x [batch, ...] -> logits [batch, classes], any traceable function.
      x: images [batch, ...], float32 or float64, inside `bounds`.
      y: labels, integers [batch].
      norm: "linf" or "l2".
      num_steps: steps at most; each costs candidates - 1 gradients (one with `targets`) and one more forward pass. The
        loop ends as soon as all examples are finished.
      overshoot: o, the part by which each displacement is lengthened.
      candidates: number of the classes with the largest clean logits that are considered, including the label.
      targets: None, or the class that each example shall be classified as, integers [batch]; the only boundary is then
        m = z_t - max_{j != t} z_j, and `candidates` is ignored.
      bounds: (low, high), the range of valid pixels.

    Returns:
      (x_adv, distance): the adversarial point found, like x, and its distance [batch]. Where x is adversarial already
      (classified wrongly, or as its target), x itself and 0; where none was found, x and infinity.

    Raises:
      ValueError: for images, labels, logits or options that do not fit.

    Examples:
      >>> logits_fn = lambda x: x @ jnp.array([[1.0, -1.0], [-1.0, 1.0]])
      >>> x, y = jnp.array([[0.5, 0.375]]), jnp.array([0])
      >>> x_adv, distance = attacks.deepfool(jax.random.key(0), logits_fn, x, y)
      >>> attacks.prediction(logits_fn(x_adv)), distance
      (Array([1], dtype=int32), Array([0.064], dtype=float32))

    References:
      Moosavi-Dezfooli et al., "DeepFool: a simple and accurate method to fool deep neural networks", CVPR 2016,
      algorithm 2 and section 3.3.
      Differs from the released code: a point is clipped to the bounds.
    """
    given = _minimum_norm.problem(logits_fn, x, y, targets, norm, ("linf", "l2"), bounds)
    num_steps, candidates = checks.count("num_steps", num_steps), checks.count("candidates", candidates, minimum=2)
    overshoot = checks.number("overshoot", overshoot, 0)

    def search() -> MinimumPerturbation:
        example_keys(key, len(given.x))  # checks it
        x = given.x
        network = hoist(given.logits, x)
        clean = network(x)
        classes = jnp.argsort(-clean, axis=-1)[:, :candidates]

        def remains(carry: tuple[Array, Array, Array, Array]) -> Array:
            k, _, _, adversarial = carry
            return (k < num_steps) & ~adversarial.all()

        def step(carry: tuple[Array, Array, Array, Array]) -> tuple[Array, Array, Array, Array]:
            k, point, r, adversarial = carry
            logits, vjp_fn = jax.vjp(network, point)

            def boundary(value: Callable[[Array], Array]) -> tuple[Array, Array]:
                return _boundary(value, logits, vjp_fn, given.ball)

            if given.targets is None:
                distance, direction = _nearest_boundary(boundary, given, classes)
            else:
                targets = given.targets
                distance, direction = boundary(lambda logits: -logit_margin(logits, targets))
            length = jnp.where(jnp.isfinite(distance), distance + _MARGIN, 0)  # stays where all gradients are zero
            new_r = r + expand_mask(length, x) * direction
            new_point = jnp.clip(x + (1 + overshoot) * new_r, given.low, given.high)
            point, r = where_rows(adversarial, (point, r), (new_point, new_r))
            return lax.stop_gradient((k + 1, point, r, adversarial | given.is_adversarial(network(point))))

        start = (jnp.zeros((), jnp.int32), x, jnp.zeros_like(x), given.is_adversarial(clean))
        _, point, _, adversarial = lax.while_loop(remains, step, lax.stop_gradient(start))
        return given.nearest(given.nothing_found(), point, adversarial)

    return lax.stop_gradient(tracing.run_compiled(search, key, x, y, targets))


def _boundary(
    value: Callable[[Array], Array], logits: Array, vjp_fn: Callable[[Array], tuple[Array]], ball: norms.Norm
) -> tuple[Array, Array]:
    """Returns the distance [b] of the linearised boundary, where value(logits) is zero, and the direction to it.

    Where the gradient is zero, the distance is infinite and the direction zero.
    """
    values, to_logits = jax.vjp(value, logits)
    (cotangent,) = to_logits(jnp.ones_like(values))
    gradient = norms.finite(with_fast_convolutions(lambda: vjp_fn(cotangent)[0])())
    return _minimum_norm.distance_to_boundary(values, gradient, ball), ball.direction(gradient)


def _nearest_boundary(
    boundary: Callable[[Callable[[Array], Array]], tuple[Array, Array]], given: Problem, classes: Array
) -> tuple[Array, Array]:
    """Returns the distance and the direction of the nearest boundary z_j = z_y, over j = classes[:, 1:]."""

    def nearer(i: Array, nearest: tuple[Array, Array]) -> tuple[Array, Array]:
        other = jnp.take(classes, i, axis=1)
        new = boundary(lambda logits: targeted_logit_margin(logits, given.y, other))
        return where_rows(new[0] < nearest[0], new, nearest)

    start = (given.per_example(jnp.inf), jnp.zeros_like(given.x))
    return lax.fori_loop(1, classes.shape[1], nearer, lax.stop_gradient(start))
