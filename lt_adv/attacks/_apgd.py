"""Auto-PGD: projected gradient ascent with momentum whose step size halves where an image's progress stalls.

Arguments are those of `gradient`, and:
  num_steps: points visited after the start; each costs one gradient.
  rho: the step halves where fewer than this share of the steps since the last check point raised the objective.
  eot: None, or for a randomised network the draws over which a gradient is averaged (expectation over
    transformation); logits_fn is then called as logits_fn(x, keys), one key per example.
An image that is classified wrongly at its clean point is returned as it is. A point whose logits are not finite is
classified wrongly, whatever the label.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import ArrayLike

from lt_adv.attacks import _base, inputs, norms
from lt_adv.attacks._base import Bounds, Iterated, Network, expand_mask, where_rows
from lt_adv.attacks.objectives import cross_entropy, targeted_dlr

Objective = Callable[..., Array]


class State(NamedTuple):
    """One row per example."""

    x: Array
    y: Array
    target: Array
    key: Array
    eps: Array
    point: Array  # the next point to look at
    last: Array  # the point from which the step to it was taken
    step_size: Array  # [b]
    best: Array  # the point with the largest objective, what it is, and its gradient
    best_value: Array
    best_gradient: Array
    value: Array  # the objective at the previous point
    rises: Array  # steps since the last check point that raised it
    checked_value: Array  # the largest objective at the last check point, and whether the step was halved there
    halved: Array
    steps_taken: Array
    broken: Array
    wrong: Array  # the last point that was classified wrongly, the start before there is one

    @property
    def x_adv(self) -> Array:
        return where_rows(self.broken, self.wrong, self.best)


def apgd(
    key: Array,
    logits_fn: Callable[..., Array],
    x: Array,
    y: Array,
    *,
    eps: ArrayLike,
    num_steps: int = 100,
    num_restarts: int = 1,
    objective: Objective = cross_entropy,
    norm: str = "linf",
    rho: float = 0.75,
    eot: int | None = None,
    bounds: Bounds = (0.0, 1.0),
) -> Array:
    """Auto-PGD: z = P(x_k + a_k d(grad)), x_{k+1} = P(x_k + 0.75 (z - x_k) + 0.25 (x_k - x_{k-1})), a_0 = 2 eps.

    d is the sign or the direction of the gradient, P the projection to the ball and the box. At check points the step
    size halves, and the search goes on from the best point, if too few steps gained, or nothing since the last one.
    Arguments are described at the top of the module; `objective` is `cross_entropy`, `dlr`, or any
    (logits, y) -> [batch].

    Returns:
      x_adv, an array like x: the last point that was classified wrongly; if there was none, the one with the largest
      objective.

    Reference: Croce and Hein, "Reliable evaluation of adversarial robustness", ICML 2020, algorithm 1.
    Differs from the released code: an image that was not broken comes back as its strongest point, not as it was;
    with `eot`, objectives are averaged over the draws as gradients are.
    """
    x, y = inputs.as_array("x", x), inputs.as_array("y, the labels,", y)
    bounds = _base.check(x, y, bounds)
    num_steps, num_restarts = inputs.count("num_steps", num_steps), inputs.count("num_restarts", num_restarts)
    rho, eot = _options(rho, eot)

    def build(_: int) -> Iterated:
        return apgd_program(objective, norm, num_steps, num_restarts, rho, eot, bounds)

    return _base.attack_batch(build, key, logits_fn, x, y, eps, random=eot is not None)


def apgd_targeted(
    key: Array,
    logits_fn: Callable[..., Array],
    x: Array,
    y: Array,
    *,
    eps: ArrayLike,
    num_steps: int = 100,
    num_targets: int = 9,
    objective: Objective = targeted_dlr,
    norm: str = "linf",
    rho: float = 0.75,
    eot: int | None = None,
    bounds: Bounds = (0.0, 1.0),
) -> Array:
    """Auto-PGD towards one class after the other, from the likeliest wrong one on; at most classes - 1 of them count.

    Arguments are described at the top of the module; `objective` is (logits, y, target) -> [batch]. The targeted ratio
    needs four classes; for fewer take `targeted_logit_margin`.

    Returns:
      x_adv, an array like x: the last wrongly classified point of the first target that gave one; if none did, the
      point with the largest objective towards the last target.

    Reference: Croce and Hein, "Reliable evaluation of adversarial robustness", ICML 2020, section 4.
    """
    x, y = inputs.as_array("x", x), inputs.as_array("y, the labels,", y)
    bounds = _base.check(x, y, bounds)
    num_steps, num_targets = inputs.count("num_steps", num_steps), inputs.count("num_targets", num_targets)
    rho, eot = _options(rho, eot)

    def build(classes: int) -> Iterated:
        return apgd_targeted_program(objective, norm, num_steps, min(num_targets, classes - 1), rho, eot, bounds)

    return _base.attack_batch(build, key, logits_fn, x, y, eps, random=eot is not None)


def _options(rho: float, eot: int | None) -> tuple[float, int | None]:
    return inputs.number("rho", rho, 0, 1), None if eot is None else inputs.count("eot", eot, least=1)


def apgd_program(
    objective: Objective, norm: str, num_steps: int, num_restarts: int, rho: float, eot: int | None, bounds: Bounds
) -> Iterated:
    """The attack `apgd`."""
    return _attack(lambda logits, state: objective(logits, state.y), norm, num_steps, num_restarts, rho, eot, bounds)


def apgd_targeted_program(
    objective: Objective, norm: str, num_steps: int, num_targets: int, rho: float, eot: int | None, bounds: Bounds
) -> Iterated:
    """The attack `apgd_targeted`."""
    return _attack(
        lambda logits, state: objective(logits, state.y, state.target), norm, num_steps, num_targets, rho, eot, bounds
    )


def check_points(num_steps: int) -> dict[int, int]:
    """Step -> how many steps lie since the check before it: after 22 % of all, then ever 3 % sooner, down to 6 %."""
    every, least, less = (max(int(share * num_steps), 1) for share in (0.22, 0.06, 0.03))
    found, step = {}, every
    while step <= num_steps:
        found[step] = every
        every = max(every - less, least)
        step += every
    return found


def _attack(
    objective: Callable[[Array, "State"], Array],
    norm: str,
    num_steps: int,
    rounds: int,
    rho: float,
    eot: int | None,
    bounds: Bounds,
) -> Iterated:
    ball, (low, high) = norms.get(norm), bounds
    checks = check_points(num_steps)
    since = np.array([checks.get(step, 0) for step in range(num_steps + 1)], np.int32)

    def project(point: Array, x: Array, eps: Array) -> Array:
        return jnp.clip(ball.project(point, x, expand_mask(eps, x)), low, high)

    def begin(keys: Array, x: Array, y: Array, target: Array, eps: Array, _: Array) -> State:
        start = jnp.clip(x + expand_mask(eps, x) * _base.on_boundary(keys, x, ball), low, high)
        return starting_state(keys, x, y, target, eps, start)

    def step(network: Network, state: State) -> State:
        def draw(e: Array | int) -> tuple[Array, Array, Array]:
            keys = jax.vmap(lambda key, k: jax.random.fold_in(key, k * (eot or 1) + e))(state.key, state.steps_taken)

            def value(x: Array) -> tuple[Array, Array]:
                logits = _base.logits_of(network, x, keys)
                return objective(logits, state), logits

            return _base.value_and_gradient(value, state.point)

        value, logits, gradient = draw(0)
        if eot is not None and eot > 1:

            def add(e: Array, sums: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
                value, logits, gradient = draw(e)
                return sums[0] + value, logits, sums[2] + gradient

            value, logits, gradient = lax.fori_loop(1, eot, add, (value, logits, gradient))
            value, gradient = value / eot, norms.finite(gradient / eot)
        return _advance(state, _base.comparable(value, state.x), _base.is_wrong(logits, state.y), gradient)

    def _advance(state: State, value: Array, wrong: Array, gradient: Array) -> State:
        """What follows from the objective, the prediction and the gradient at `state.point`."""
        first = state.steps_taken == 0
        better = first | (value > state.best_value)
        best, best_value, best_gradient = where_rows(
            better, (state.point, value, gradient), (state.best, state.best_value, state.best_gradient)
        )
        # The value before the first step counts as zero and that of the start is not looked at, as in the released
        # code, whose history begins after the first step and wraps around.
        rises = state.rises + (~first & (value > state.value)).astype(jnp.int32)
        checked_value = jnp.where(first, value, state.checked_value)
        window = jnp.asarray(since)[jnp.minimum(state.steps_taken, num_steps)]
        check = window > 0
        stalls = ~state.halved & (checked_value >= best_value)
        halve = check & ((rises.astype(value.dtype) <= rho * window.astype(value.dtype)) | stalls)
        step_size = jnp.where(halve, state.step_size / 2, state.step_size)
        here, gradient = where_rows(halve, (best, best_gradient), (state.point, gradient))
        x, share = state.x, expand_mask(jnp.where(first, 1.0, 0.75).astype(here.dtype), here)
        # As released; it matters where the softmax is saturated, for a gradient of 1e-12 then makes half a step.
        if norm == "linf":
            direction = jnp.sign(gradient)
        else:
            gradient = norms.representable(gradient)
            direction = gradient / (ball.length(gradient) + 1e-12)
        z = project(here + expand_mask(step_size, here) * direction, x, state.eps)
        point = project(here + (z - here) * share + (here - state.last) * (1 - share), x, state.eps)
        new = state._replace(
            point=point,
            last=here,
            step_size=step_size,
            best=best,
            best_value=best_value,
            best_gradient=best_gradient,
            value=jnp.where(first, state.value, value),
            rises=jnp.where(check, 0, rises),
            checked_value=jnp.where(check, best_value, checked_value),
            halved=jnp.where(check, halve, state.halved),
            steps_taken=state.steps_taken + 1,
            broken=state.broken | wrong,
            wrong=where_rows(wrong | first, state.point, state.wrong),
        )
        return where_rows(state.steps_taken <= num_steps, new, state)

    evaluations = eot or 1
    return Iterated(begin, step, num_steps + 1, rounds, eot is not None, evaluations, evaluations)


def starting_state(keys: Array, x: Array, y: Array, target: Array, eps: Array, start: Array) -> State:
    zeros, batch = jnp.zeros_like(x), jnp.zeros_like(eps)
    never = jnp.zeros_like(eps, bool)
    return State(
        x=x, y=y, target=target, key=keys, eps=eps, point=start, last=start, step_size=2 * eps, best=start,
        best_value=batch, best_gradient=zeros, value=batch, rises=jnp.zeros_like(eps, jnp.int32), checked_value=batch,
        halved=~never, steps_taken=jnp.zeros_like(eps, jnp.int32), broken=never, wrong=start,
    )  # fmt: skip
