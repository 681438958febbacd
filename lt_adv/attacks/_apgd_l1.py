"""Auto-PGD in L1: steps along the largest entries of the gradient, as many as the best point has changed."""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from lt_adv.attacks import _base, norms
from lt_adv.attacks._base import AscentState, IterativeAttack, expand_mask, where_rows
from lt_adv.attacks.signatures import Bounds, KeyedLogitsFn

STAGES = ((3.0, 0.3), (2.0, 0.3), (1.0, 0.4))  # (radius in eps, share of the steps)
FIRST_SHARE = 0.2  # of the entries, for a start that is the clean image
REDUCTION = 1.5  # of the step size and of the share
SMALLEST_STEP = 0.1  # in radii
FEWER = 0.95  # share of the changed entries below which the search has become sparser


class State(NamedTuple):
    """State of the attack, one row per example."""

    x: Array  # [b, ...]
    y: Array  # int32 [b]
    target: Array  # int32 [b]
    key: Array  # [b]
    eps: Array  # [b]
    point: Array  # [b, ...], the next point to evaluate
    step_size: Array  # [b]
    share: Array  # [b], of the entries that a step changes
    num_changed: Array  # [b], entries in which the best point differed from x at the last checkpoint
    best_point: Array  # [b, ...], the point with the largest objective of this stage
    best_value: Array  # [b], that objective
    best_gradient: Array  # [b, ...], its gradient
    steps_taken: Array  # int32 [b]
    broken: Array  # bool [b], whether a point of the last stage is classified wrongly
    wrong_point: Array  # [b, ...], the last such point, or the start of the last stage

    @property
    def x_adv(self) -> Array:
        return where_rows(self.broken, self.wrong_point, self.best_point)


class Schedule(NamedTuple):
    """What each evaluation of the network is, [evaluations]. A stage of n steps evaluates n + 1 points."""

    radius: np.ndarray  # of the point that is evaluated, in eps
    is_first: np.ndarray  # bool, whether the point is the start of a stage
    is_checkpoint: np.ndarray  # bool
    next_radius: np.ndarray  # of the stage that begins with the next point; 0 if none begins
    in_last_stage: np.ndarray  # bool


def schedule(num_steps: int, stages: tuple[tuple[float, float], ...] = STAGES) -> Schedule:
    """Returns the schedule of `stages`, whose checkpoints come every 4 % of the steps of a stage."""
    rows, left = [], num_steps
    for i, (radius, share) in enumerate(stages):
        last = i + 1 == len(stages)
        steps = left if last else min(math.ceil(share * num_steps), left)
        left -= steps
        interval = max(int(0.04 * steps), 1)
        for step in range(steps + 1):
            next_radius = 0.0 if last or step < steps else stages[i + 1][0]
            rows.append((radius, step == 0, step > 0 and step % interval == 0, next_radius, last))
    return Schedule(*(np.asarray(column) for column in zip(*rows, strict=True)))


def build(
    objective: Callable[[Array, AscentState], Array],
    num_steps: int,
    num_rounds: int,
    num_samples: int | None,
    bounds: Bounds,
    stages: tuple[tuple[float, float], ...] = STAGES,
    targeted: bool = False,
) -> IterativeAttack[State]:
    """Returns `apgd` or `apgd_targeted` in L1 as an `IterativeAttack`.

    x_{k+1} = P(x_k + a_k s / |s|_1), where s has the signs of the entries of the gradient whose magnitude is among the
    largest share q, and P is the projection to the intersection of the ball and the bounds. At checkpoints q becomes
    2/3 of the share of the entries in which the best point differs from x. Where these have become fewer, the search
    continues from the best point with a_k = the radius; elsewhere a_k is divided by 1.5.

    Args:
      objective: (logits, state) -> [batch].
      num_steps: points visited after the starts of the stages.
      num_rounds: restarts, or targets.
      num_samples: draws of a randomised network, or None.
      bounds: (low, high), the range of valid pixels.
      stages: (radius in eps, share of the steps). Each stage begins at the best point of the one before.
      targeted: whether only the target of an example breaks it.
    """
    plan, (low, high) = schedule(num_steps, stages), bounds
    ball = norms.get("l1")

    def project(point: Array, x: Array, radius: Array) -> Array:
        return ball.project(point, x, expand_mask(radius, x), low, high)

    def init(keys: Array, x: Array, y: Array, target: Array, eps: Array, _: Array) -> State:
        noise = jax.vmap(lambda key: jax.random.normal(key, x.shape[1:], x.dtype))(keys)
        return starting_state(keys, x, y, target, eps, project(x + noise, x, plan.radius[0] * eps), plan.radius[0])

    def step(logits_fn: KeyedLogitsFn, state: State) -> State:
        value, wrong, gradient = _base.evaluate_objective(objective, logits_fn, state, num_samples, targeted)
        return advance(state, value, wrong, gradient)

    def advance(state: State, value: Array, wrong: Array, gradient: Array) -> State:
        """Takes one step, given the objective, the prediction and the gradient at `state.point`."""
        x, dtype = state.x, value.dtype
        row = jnp.minimum(state.steps_taken, len(plan.radius) - 1)
        first, in_last_stage = jnp.asarray(plan.is_first)[row], jnp.asarray(plan.in_last_stage)[row]
        check, radius = jnp.asarray(plan.is_checkpoint)[row], jnp.asarray(plan.radius, dtype)[row] * state.eps
        next_radius = jnp.asarray(plan.next_radius, dtype)[row] * state.eps
        best_point, best_value, best_gradient = where_rows(
            first | (value > state.best_value),
            (state.point, value, gradient),
            (state.best_point, state.best_value, state.best_gradient),
        )
        num_changed = count_changed(best_point, x)
        fewer = (state.num_changed > 0) & (num_changed / jnp.maximum(state.num_changed, 1) < FEWER)
        step_size = jnp.where(fewer, radius, state.step_size / REDUCTION)
        step_size = jnp.where(check, jnp.clip(step_size, SMALLEST_STEP * radius, radius), state.step_size)
        share = jnp.where(check, share_of(num_changed, x), state.share)
        point, gradient = where_rows(check & fewer, (best_point, best_gradient), (state.point, gradient))
        moved = point + expand_mask(step_size, x) * sparse_direction(gradient, share)
        is_last = next_radius > 0  # point of its stage; the next one starts at the best point
        point = project(where_rows(is_last, best_point, moved), x, jnp.where(is_last, next_radius, radius))
        start_changed = count_changed(point, x)
        share, num_changed, step_size = where_rows(
            is_last,
            (share_of(start_changed, x), start_changed, next_radius),
            (share, jnp.where(check, num_changed, state.num_changed), step_size),
        )
        wrong &= in_last_stage
        new = state._replace(
            point=point, step_size=step_size, share=share, num_changed=num_changed, best_point=best_point,
            best_value=best_value, best_gradient=best_gradient, steps_taken=state.steps_taken + 1,
            broken=state.broken | wrong,
            wrong_point=where_rows(wrong | (first & in_last_stage), state.point, state.wrong_point),
        )  # fmt: skip
        return where_rows(state.steps_taken < len(plan.radius), new, state)

    evaluations = num_samples or 1
    return IterativeAttack(init, step, len(plan.radius), num_rounds, num_samples is not None, evaluations, evaluations)


def starting_state(
    keys: Array, x: Array, y: Array, target: Array, eps: Array, start: Array, radius: float, is_clean: bool = False
) -> State:
    """Returns the state before `start` is evaluated, a point of the ball of `radius` times eps.

    `is_clean` means a start at the clean image, whose first steps change a fifth of the entries.
    """
    zero = jnp.zeros_like(eps)  # [b]
    num_changed = count_changed(start, x)
    share = share_of(num_changed, x)
    if is_clean:
        num_changed, share = zero + x[0].size, zero + FIRST_SHARE
    return State(
        x=x, y=y, target=target, key=keys, eps=eps, point=start, step_size=radius * eps, share=share,
        num_changed=num_changed, best_point=start, best_value=zero, best_gradient=jnp.zeros_like(x),
        steps_taken=jnp.zeros_like(eps, jnp.int32), broken=jnp.zeros_like(eps, bool), wrong_point=start,
    )  # fmt: skip


def count_changed(point: Array, x: Array) -> Array:
    """Returns in how many entries each point differs from x, [b] in the type of x."""
    return jnp.sum((point != x).reshape(len(x), -1), axis=1, dtype=x.dtype)


def share_of(num_changed: Array, x: Array) -> Array:
    """Returns the share of the entries that the next steps change, [b]."""
    return num_changed / x[0].size / REDUCTION


def sparse_direction(gradient: Array, share: Array) -> Array:
    """Returns the signs of the entries among the largest `share` [b], divided by their number."""
    size = jnp.abs(gradient).reshape(len(gradient), -1)
    entries = size.shape[1]
    # Rounding of (1 - share) n decides between two neighbours: this is the released code's order of operations.
    index = jnp.clip(((1 - share) * entries).astype(jnp.int32), 0, entries - 1)
    smallest = jnp.take_along_axis(jnp.sort(size, axis=1), index[:, None], axis=1)
    sign = jnp.where(size >= smallest, jnp.sign(gradient.reshape(size.shape)), 0)
    sign = sign / (jnp.sum(jnp.abs(sign), axis=1, keepdims=True) + 1e-10)
    return sign.reshape(gradient.shape)
