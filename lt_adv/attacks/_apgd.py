"""Auto-PGD: projected gradient ascent with momentum that halves the step size of an image when its progress stalls.

An image whose clean point is classified wrongly is returned unchanged. A point whose logits are not finite counts as
classified wrongly, whatever the label.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from lt_adv.attacks import _apgd_l1, _base, _expectation, checks, norms
from lt_adv.attacks._base import AscentState, IterativeAttack, expand_mask, where_rows
from lt_adv.attacks._expectation import Expectation
from lt_adv.attacks.objectives import cross_entropy, targeted_dlr
from lt_adv.attacks.signatures import Bounds, KeyedLogitsFn, LogitsFn, Objective, TargetedObjective


class State(NamedTuple):
    """State of the attack, one row per example."""

    x: Array  # [b, ...]
    y: Array  # int32 [b]
    target: Array  # int32 [b]
    key: Array  # [b]
    eps: Array  # [b], or like x
    point: Array  # [b, ...], the next point to evaluate
    previous_point: Array  # [b, ...]
    step_size: Array  # like eps
    best_point: Array  # [b, ...], the point with the largest objective
    best_value: Array  # [b], that objective
    best_gradient: Array  # [b, ...], its gradient
    previous_value: Array  # [b], the objective at the previous point
    num_rises: Array  # int32 [b], steps since the last checkpoint that raised the objective
    checkpoint_value: Array  # [b], the largest objective at the last checkpoint
    checkpoint_halved: Array  # bool [b], whether the step size was halved there
    steps_taken: Array  # int32 [b]
    broken: Array  # bool [b]
    wrong_point: Array  # [b, ...], the last point that was classified wrongly, or the start

    @property
    def x_adv(self) -> Array:
        return where_rows(self.broken, self.wrong_point, self.best_point)


def apgd(
    key: Array,
    logits_fn: LogitsFn | Expectation,
    x: Array,
    y: Array,
    *,
    eps: ArrayLike,
    num_steps: int = 100,
    num_restarts: int = 1,
    objective: Objective = cross_entropy,
    norm: str = "linf",
    rho: float = 0.75,
    targets: Array | None = None,
    bounds: Bounds = (0.0, 1.0),
) -> Array:
    """Auto-PGD: z = P(x_k + a_k d(grad)), x_{k+1} = P(x_k + 0.75 (z - x_k) + 0.25 (x_k - x_{k-1})), a_0 = 2 eps.

    d is the sign or the direction of the gradient, P the projection to the ball and the bounds. At checkpoints the step
    size halves and the search continues from the best point if too few steps raised the objective, or if the best
    value has not grown since the last checkpoint.

    L1: x_{k+1} = P(x_k + a_k s / |s|_1), where s has the signs of the largest entries of the gradient, as many as two
    thirds of those that the best point changes, and P projects to the intersection of the ball and the bounds. The
    steps are divided into three stages with the radii 3 eps, 2 eps and eps, of which only the last one can break an
    image.

    Args:
      key: one typed key, of which example i uses fold_in(key, i), or one key per example [batch].
      logits_fn: x [batch, ...] -> logits [batch, classes], any traceable function. A randomised network is given as
        `expectation(logits_fn, num_samples)`.
      x: images [batch, ...], float32 or float64, inside `bounds`.
      y: labels, integers [batch].
      eps: radius of the ball, scalar or [batch], in the units of x. In L-inf also one radius for each entry, an array
        with the dimensions of x that broadcasts to it: 0 where a feature must not change.
      num_steps: points visited after the start, in L1 after the starts of the stages; each costs one gradient.
      num_restarts: random starts, each only for images that are not broken yet.
      objective: (logits, y) -> [batch], maximised: `cross_entropy`, `dlr` or any other function.
      norm: "linf", "l2" or "l1".
      rho: the step size halves where fewer than this share of the steps since the last checkpoint raised the objective;
        not used in L1.
      targets: None, or a class for each example, integers [batch]: the goal is the prediction of this class, and the
        objective of it is minimised.
      bounds: (low, high), the range of valid pixels.

    Returns:
      x_adv, an array like x: the last point that was classified wrongly (or as the target); if there was none, the
      point with the largest objective.

    Raises:
      ValueError: for images, labels, logits or options that do not fit.

    Examples:
      >>> logits_fn = lambda x: x @ jnp.array([[1.0, -1.0], [-1.0, 1.0]])
      >>> x, y = jnp.array([[0.5, 0.375]]), jnp.array([0])
      >>> x_adv = attacks.apgd(jax.random.key(0), logits_fn, x, y, eps=0.125, num_steps=10)
      >>> attacks.prediction(logits_fn(x_adv))
      Array([1], dtype=int32)

    References:
      Croce and Hein, "Reliable evaluation of adversarial robustness", ICML 2020, algorithm 1; "Mind the box: l1-APGD
      for sparse adversarial attacks on image classifiers", ICML 2021, for L1.
      Differs from the released code: an image that was not broken is returned as its strongest point, not unchanged;
      objectives of a randomised network are averaged over the draws, as gradients are; in L1 an entry that the
      projection sets back to its clean value counts as unchanged, whatever the rounding.
    """
    x, y = checks.as_array("x", x), checks.as_array("y, the labels,", y)
    bounds = _base.check(x, y, bounds)
    num_steps, num_restarts = checks.count("num_steps", num_steps), checks.count("num_restarts", num_restarts)
    rho, (function, num_samples) = checks.number("rho", rho, 0, 1), _expectation.split(logits_fn)
    checks.check_objective(objective)

    def build(_: int) -> IterativeAttack:
        return build_apgd(
            objective, norm, num_steps, num_restarts, rho, num_samples, bounds, targeted=targets is not None
        )

    return _base.attack_batch(
        build, key, function, x, y, eps, num_samples=num_samples, targets=targets, eps_per_entry=norm == "linf"
    )


def apgd_targeted(
    key: Array,
    logits_fn: LogitsFn | Expectation,
    x: Array,
    y: Array,
    *,
    eps: ArrayLike,
    num_steps: int = 100,
    num_targets: int = 9,
    objective: TargetedObjective = targeted_dlr,
    norm: str = "linf",
    rho: float = 0.75,
    targets: Array | None = None,
    bounds: Bounds = (0.0, 1.0),
) -> Array:
    """Targeted Auto-PGD: runs `apgd` towards one class after the other, the most likely wrong class first.

    Args:
      key: one typed key, of which example i uses fold_in(key, i), or one key per example [batch].
      logits_fn: x [batch, ...] -> logits [batch, classes], any traceable function. A randomised network is given as
        `expectation(logits_fn, num_samples)`.
      x: images [batch, ...], float32 or float64, inside `bounds`.
      y: labels, integers [batch].
      eps: radius of the ball, scalar or [batch], in the units of x. In L-inf also one radius for each entry, an array
        with the dimensions of x that broadcasts to it: 0 where a feature must not change.
      num_steps: points visited after the start of each target; each costs one gradient.
      num_targets: number of target classes, at most classes - 1.
      objective: (logits, y, target) -> [batch], maximised. `targeted_dlr` needs four classes; for fewer, use
        `targeted_logit_margin`.
      norm: "linf", "l2" or "l1".
      rho: the step size halves where fewer than this share of the steps since the last checkpoint raised the objective;
        not used in L1.
      targets: None, or the one class for each example, integers [batch], whose prediction is then the goal.
      bounds: (low, high), the range of valid pixels.

    Returns:
      x_adv, an array like x: the last wrongly classified point of the first target that gave one; if none did, the
      point with the largest objective towards the last target.

    Raises:
      ValueError: for images, labels, logits or options that do not fit.

    Examples:
      >>> logits_fn = lambda x: x @ jnp.array([[1.0, -1.0], [-1.0, 1.0]])
      >>> x, y = jnp.array([[0.5, 0.375]]), jnp.array([0])
      >>> x_adv = attacks.apgd_targeted(
      ...     jax.random.key(0), logits_fn, x, y, eps=0.125, num_steps=10, objective=attacks.targeted_logit_margin
      ... )
      >>> attacks.prediction(logits_fn(x_adv))
      Array([1], dtype=int32)

    References:
      Croce and Hein, "Reliable evaluation of adversarial robustness", ICML 2020, section 4.
    """
    x, y = checks.as_array("x", x), checks.as_array("y, the labels,", y)
    bounds = _base.check(x, y, bounds)
    num_steps, num_targets = checks.count("num_steps", num_steps), checks.count("num_targets", num_targets)
    rho, (function, num_samples) = checks.number("rho", rho, 0, 1), _expectation.split(logits_fn)
    checks.check_objective(objective)

    def build(classes: int) -> IterativeAttack:
        number, targeted = min(num_targets, classes - 1), targets is not None
        return build_apgd_targeted(
            objective, norm, num_steps, min(number, 1) if targeted else number, rho, num_samples, bounds, targeted
        )

    return _base.attack_batch(
        build, key, function, x, y, eps, num_samples=num_samples, targets=targets, eps_per_entry=norm == "linf"
    )


def build_apgd(
    objective: Objective,
    norm: str,
    num_steps: int,
    num_restarts: int,
    rho: float,
    num_samples: int | None,
    bounds: Bounds,
    targeted: bool = False,
) -> IterativeAttack:
    """Returns `apgd` as an `IterativeAttack`; `targeted` means towards the target of each example."""

    def goal(logits: Array, state: AscentState) -> Array:
        return -objective(logits, state.target) if targeted else objective(logits, state.y)

    return _attack(goal, norm, num_steps, num_restarts, rho, num_samples, bounds, targeted)


def build_apgd_targeted(
    objective: TargetedObjective,
    norm: str,
    num_steps: int,
    num_targets: int,
    rho: float,
    num_samples: int | None,
    bounds: Bounds,
    targeted: bool = False,
) -> IterativeAttack:
    """Returns `apgd_targeted` as an `IterativeAttack`; if `targeted`, only the target itself breaks an example."""

    def goal(logits: Array, state: AscentState) -> Array:
        return objective(logits, state.y, state.target)

    return _attack(goal, norm, num_steps, num_targets, rho, num_samples, bounds, targeted)


def checkpoints(num_steps: int) -> dict[int, int]:
    """Returns {step of a checkpoint: steps since the previous one}.

    The first comes after 22 % of the steps. Each interval is 3 % of the steps shorter than the one before, down to 6 %.
    """
    interval, shortest, decrease = (max(int(share * num_steps), 1) for share in (0.22, 0.06, 0.03))
    intervals, step = {}, interval
    while step <= num_steps:
        intervals[step] = interval
        interval = max(interval - decrease, shortest)
        step += interval
    return intervals


def _attack(
    objective: Callable[[Array, AscentState], Array],
    norm: str,
    num_steps: int,
    num_rounds: int,
    rho: float,
    num_samples: int | None,
    bounds: Bounds,
    targeted: bool,
) -> IterativeAttack:
    ball, (low, high) = norms.get(norm), bounds
    if norm == "l1":
        return _apgd_l1.build(objective, num_steps, num_rounds, num_samples, bounds, targeted=targeted)
    intervals = checkpoints(num_steps)
    steps_since_check = np.array([intervals.get(step, 0) for step in range(num_steps + 1)], np.int32)

    def project(point: Array, x: Array, eps: Array) -> Array:
        return ball.project(point, x, expand_mask(eps, x), low, high)

    def init(keys: Array, x: Array, y: Array, target: Array, eps: Array, _: Array) -> State:
        start = jnp.clip(x + expand_mask(eps, x) * _base.random_directions(keys, x, ball), low, high)
        return starting_state(keys, x, y, target, eps, start)

    def step(logits_fn: KeyedLogitsFn, state: State) -> State:
        value, wrong, gradient = _base.evaluate_objective(objective, logits_fn, state, num_samples, targeted)
        return advance(state, value, wrong, gradient)

    def advance(state: State, value: Array, wrong: Array, gradient: Array) -> State:
        """Takes one step, given the objective, the prediction and the gradient at `state.point`."""
        first = state.steps_taken == 0
        better = first | (value > state.best_value)
        best_point, best_value, best_gradient = where_rows(
            better, (state.point, value, gradient), (state.best_point, state.best_value, state.best_gradient)
        )
        # The value before the first step counts as zero and that of the start is ignored, as in the released code,
        # whose history begins after the first step and wraps around.
        num_rises = state.num_rises + (~first & (value > state.previous_value)).astype(jnp.int32)
        checkpoint_value = jnp.where(first, value, state.checkpoint_value)
        interval = jnp.asarray(steps_since_check)[jnp.minimum(state.steps_taken, num_steps)]
        check = interval > 0
        stalls = ~state.checkpoint_halved & (checkpoint_value >= best_value)
        halve = check & ((num_rises.astype(value.dtype) <= rho * interval.astype(value.dtype)) | stalls)
        step_size = where_rows(halve, state.step_size / 2, state.step_size)
        point, gradient = where_rows(halve, (best_point, best_gradient), (state.point, gradient))
        x, share = state.x, expand_mask(jnp.where(first, 1.0, 0.75).astype(point.dtype), point)
        # The released code adds 1e-12 as well. It matters where the softmax is saturated: a gradient of length 1e-12
        # gives half a step.
        if norm == "linf":
            direction = jnp.sign(gradient)
        else:
            gradient = norms.representable(gradient)
            direction = gradient / (ball.length(gradient) + 1e-12)
        z = project(point + expand_mask(step_size, point) * direction, x, state.eps)
        next_point = project(point + (z - point) * share + (point - state.previous_point) * (1 - share), x, state.eps)
        new = state._replace(
            point=next_point,
            previous_point=point,
            step_size=step_size,
            best_point=best_point,
            best_value=best_value,
            best_gradient=best_gradient,
            previous_value=jnp.where(first, state.previous_value, value),
            num_rises=jnp.where(check, 0, num_rises),
            checkpoint_value=jnp.where(check, best_value, checkpoint_value),
            checkpoint_halved=jnp.where(check, halve, state.checkpoint_halved),
            steps_taken=state.steps_taken + 1,
            broken=state.broken | wrong,
            wrong_point=where_rows(wrong | first, state.point, state.wrong_point),
        )
        return where_rows(state.steps_taken <= num_steps, new, state)

    evaluations = num_samples or 1
    return IterativeAttack(init, step, num_steps + 1, num_rounds, num_samples is not None, evaluations, evaluations)


def starting_state(keys: Array, x: Array, y: Array, target: Array, eps: Array, start: Array) -> State:
    """Returns the state before the start is evaluated."""
    zero = jnp.zeros_like(eps.reshape(len(eps), -1)[:, 0])  # [b]
    no_steps, false = jnp.zeros_like(zero, jnp.int32), jnp.zeros_like(zero, bool)
    return State(
        x=x, y=y, target=target, key=keys, eps=eps, point=start, previous_point=start, step_size=2 * eps,
        best_point=start, best_value=zero, best_gradient=jnp.zeros_like(x), previous_value=zero,
        num_rises=no_steps, checkpoint_value=zero, checkpoint_halved=~false, steps_taken=no_steps,
        broken=false, wrong_point=start,
    )  # fmt: skip
