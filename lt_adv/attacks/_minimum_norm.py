"""What the minimum-norm attacks share: their arguments and result, the nearest point so far, and FAB as one of them."""

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from lt_adv.attacks import _base, checks, norms, tracing
from lt_adv.attacks._fab import _level as level
from lt_adv.attacks.hoisting import hoist
from lt_adv.attacks.initialization import example_keys
from lt_adv.attacks.objectives import prediction
from lt_adv.attacks.signatures import Attack, Bounds, LogitsFn, Objective


class MinimumPerturbation(NamedTuple):
    """Result of a minimum-norm attack.

    Attributes:
      x_adv: like x: the nearest adversarial point that was found; x itself where none was found, and where x is
        adversarial already.
      distance: [batch], the norm of x_adv - x: 0 where x is adversarial already, infinity where no adversarial point
        was found.
    """

    x_adv: Array
    distance: Array


MinimumNormAttack = Callable[..., MinimumPerturbation]  # (key, logits_fn, x, y, *, norm, bounds) -> result


class Problem(NamedTuple):
    """The checked arguments of a minimum-norm attack."""

    logits_fn: LogitsFn
    x: Array  # [b, ...]
    y: Array  # int32 [b]
    targets: Array | None  # int32 [b]
    ball: norms.Norm
    low: float
    high: float

    def logits(self, point: Array) -> Array:
        """Returns the logits of a point, [b, classes]."""
        logits = checks.check_logits(self.logits_fn(point), self.x)
        classes = logits.shape[-1]
        if classes < 2:
            raise ValueError(f"logits_fn must return logits of at least two classes, got {classes}.")
        checks.check_labels(self.y, len(self.x), classes)
        if self.targets is not None:
            checks.check_labels(self.targets, len(self.x), classes, name="targets")
        return logits

    def is_adversarial(self, logits: Array) -> Array:
        """Whether the prediction is the target, or, without targets, differs from the label; bool [b]."""
        return _base.is_wrong(logits, self.y) if self.targets is None else prediction(logits) == self.targets

    def evaluate(self, loss: Objective) -> Callable[[Array], tuple[Array, Array, Array]]:
        """Returns point -> (objective [b], whether it is adversarial [b], gradient of the objective), for a loop.

        The objective is the loss of the label or, with targets, the negative loss of the target.
        """

        def objective(point: Array) -> tuple[Array, Array]:
            logits = self.logits(point)
            return (loss(logits, self.y) if self.targets is None else -loss(logits, self.targets)), logits

        def evaluate(point: Array) -> tuple[Array, Array, Array]:
            values, logits, gradient = _base.value_and_gradient(objective, point)
            return values, self.is_adversarial(logits), gradient

        return hoist(evaluate, self.x)

    def per_example(self, value: ArrayLike) -> Array:
        """Returns a number as an array [b] that varies over the same mesh axes as x."""
        return jnp.asarray(value, self.x.dtype) + jnp.zeros_like(self.x).reshape(len(self.x), -1).sum(axis=1)

    def distance(self, point: Array) -> Array:
        """Returns the norm of point - x, [b]."""
        return self.ball.length(point - self.x).reshape(-1)

    def farthest(self) -> Array:
        """Returns the distance of the farthest point inside the bounds [b], at most the largest float."""
        corner = jnp.maximum(self.high - self.x, self.x - self.low)
        return jnp.minimum(self.ball.length(corner).reshape(-1), jnp.finfo(self.x.dtype).max)

    def nothing_found(self) -> MinimumPerturbation:
        """Returns the result before the first evaluation."""
        return MinimumPerturbation(self.x, self.per_example(jnp.inf))

    def nearest(self, best: MinimumPerturbation, point: Array, adversarial: Array) -> MinimumPerturbation:
        """Returns `best`, replaced by `point` where that is adversarial and nearer to x."""
        new = MinimumPerturbation(point, self.distance(point))
        return _base.where_rows(adversarial & (new.distance < best.distance), new, best)


def problem(
    logits_fn: LogitsFn,
    x: Array,
    y: Array,
    targets: ArrayLike | None,
    norm: str,
    supported: tuple[str, ...],
    bounds: Bounds,
) -> Problem:
    """Checks the arguments that all minimum-norm attacks have in common; ValueError for those that do not fit."""
    if norm not in supported:
        raise ValueError(f"Unknown norm {norm!r}. There are: {', '.join(supported)}.")
    x, y = checks.as_array("x", x), checks.as_array("y, the labels,", y)
    low, high = _base.check(x, y, bounds)
    if targets is not None:
        targets = checks.as_array("targets", targets)
        checks.check_labels(targets, len(x), name="targets")
        targets = targets.astype(jnp.int32)
    x = lax.stop_gradient(x)  # the loops of projections cannot be differentiated
    return Problem(logits_fn, x, y.astype(jnp.int32), targets, norms.get(norm), low, high)


def random_directions(key: Array, x: Array) -> Array:
    """Returns one random direction of Euclidean length one per example, for `unit_gradient`."""
    return _base.random_directions(example_keys(key, len(x)), x, norms.get("l2"))


def unit_gradient(gradient: Array, otherwise: Array) -> Array:
    """Returns the gradient scaled to Euclidean length one; `otherwise` where it is zero."""
    direction = norms.get("l2").direction(gradient)
    return jnp.where(norms.l2(direction) > 0, direction, otherwise)


def distance_to_boundary(value: Array, gradient: Array, ball: norms.Norm) -> Array:
    """Returns the distance of each point from its linearised boundary, |value| / |gradient|_q (q dual), [b].

    It is infinite where the gradient is zero.
    """
    scale = norms.representable_scale(gradient)
    slope = ball.dual(gradient / scale).reshape(-1)
    distance = jnp.abs(_base.finite_values(value, gradient)) / scale.reshape(-1) / jnp.where(slope > 0, slope, 1)
    return jnp.where(slope > 0, distance, jnp.inf)


def l2_project(point: Array, x: Array, eps: Array, low: float, high: float) -> Array:
    """Returns the nearest point to `point` in the L2 ball of radius eps [b] around x and inside the bounds.

    It is x + clip(s d) with d = point - x and the largest s <= 1 for which its length is at most eps.
    """
    d = point - x
    room = jnp.where(d > 0, high - x, x - low).reshape(len(x), -1)
    size = jnp.abs(d).reshape(len(x), -1)
    reach = room / jnp.where(size > 0, size, 1)  # s up to which an entry is not clipped
    s = jnp.minimum(jnp.sqrt(level(size * size, reach * reach, eps * eps)), 1)
    return jnp.clip(x + s.reshape(-1, *(1,) * (x.ndim - 1)) * d, low, high)


def cosine(first: float, last: float, k: Array, num_steps: int, x: Array) -> Array:
    """Returns the value at step k, in the type of x, of a cosine schedule from `first` (k = 0) to `last`."""
    return last + (first - last) / 2 * (1 + jnp.cos(jnp.asarray(k, x.dtype) * (jnp.pi / num_steps)))


def minimum_norm(attack: Attack) -> MinimumNormAttack:
    """Returns FAB in the form of a minimum-norm attack: without a radius, and with the distance of each point.

    Args:
      attack: `fab`, or another attack that returns the nearest adversarial points for eps = inf, and x itself without
        success. `fab_targeted` stops at the first target class that it reaches, which need not be the nearest one.

    Returns:
      f(key, logits_fn, x, y, **options) -> (x_adv, distance), with the options of `attack` except for eps. `distance`
      [batch] is the norm of x_adv - x: 0 where x is classified wrongly (with `targets`, as its target), infinity where
      the attack has no success.

    Raises:
      ValueError: if the attack has no argument `eps` or no argument `norm`.

    Examples:
      >>> logits_fn = lambda x: x @ jnp.array([[1.0, -1.0], [-1.0, 1.0]])
      >>> x, y = jnp.array([[0.5, 0.375]]), jnp.array([0])
      >>> fab = attacks.minimum_norm(attacks.fab)
      >>> fab(jax.random.key(0), logits_fn, x, y, norm="l2").distance
      Array([0.089], dtype=float32)
    """
    if missing := [name for name in ("eps", "norm") if name not in inspect.signature(attack).parameters]:
        raise ValueError(f"attack must have an argument {missing[0]}, such as attacks.fab_targeted has, got {attack}.")

    @functools.wraps(attack)
    def find(
        key: Array,
        logits_fn: LogitsFn,
        x: Array,
        y: Array,
        *,
        norm: str = "linf",
        bounds: Bounds = (0.0, 1.0),
        **options: Any,
    ) -> MinimumPerturbation:
        x_adv = attack(key, logits_fn, x, y, eps=jnp.inf, norm=norm, bounds=bounds, **options)
        given = problem(logits_fn, x, y, options.get("targets"), norm, (norm,), bounds)

        def measure() -> MinimumPerturbation:
            distance = given.distance(x_adv)
            unchanged = jnp.where(given.is_adversarial(given.logits(given.x)), 0, given.per_example(jnp.inf))
            return MinimumPerturbation(x_adv, jnp.where(distance > 0, distance, unchanged))

        return tracing.run_compiled(measure, x_adv, x, y, given.targets)

    return find
