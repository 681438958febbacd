"""Fast adaptive boundary (FAB) attack: the smallest displacement that changes the prediction, by linearised boundaries.

An image whose clean point is classified wrongly is returned unchanged. Where a network computes in bfloat16 or float16,
the rounding of its logits hides the decision boundary, and FAB is weaker than in float32.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from lt_adv.attacks import _base, checks, norms
from lt_adv.attacks._base import IterativeAttack, expand_mask, where_rows
from lt_adv.attacks.convolutions import with_fast_convolutions
from lt_adv.attacks.objectives import logit_margin, targeted_logit_margin
from lt_adv.attacks.signatures import Bounds, KeyedLogitsFn, LogitsFn


class State(NamedTuple):
    """State of the attack, one row per example."""

    x: Array  # [b, ...]
    y: Array  # int32 [b]
    target: Array  # int32 [b]
    key: Array  # [b]
    eps: Array  # [b], or like x
    point: Array  # [b, ...]
    nearest: Array  # [b, ...], the wrong point nearest to x
    distance: Array  # [b], of `nearest` from x; the largest float while there is none
    steps_taken: Array  # int32 [b]

    @property
    def broken(self) -> Array:
        radius = self.eps if self.eps.ndim == 1 else _largest(self.eps).reshape(-1)
        return (self.distance < jnp.finfo(self.distance.dtype).max) & (self.distance <= radius)

    @property
    def x_adv(self) -> Array:
        return where_rows(self.broken, self.nearest, self.x)


def fab(
    key: Array,
    logits_fn: LogitsFn,
    x: Array,
    y: Array,
    *,
    eps: ArrayLike,
    num_steps: int = 100,
    num_restarts: int = 1,
    norm: str = "linf",
    alpha_max: float = 0.1,
    eta: float = 1.05,
    beta: float = 0.9,
    targets: Array | None = None,
    bounds: Bounds = (0.0, 1.0),
) -> Array:
    """Fast adaptive boundary attack towards the class whose linearised boundary is nearest at each step.

    x_{k+1} = C((1 - a)(x_k + eta d_k) + a (x + eta d)), with d_k and d the shortest displacements from x_k and from x
    to the hyperplane where the linearised z_s - z_y is zero, inside the bounds;
    a = min(|d_k| / (|d_k| + |d|), alpha_max); C clips to the bounds. From a wrong point the search steps back, to
    x + beta (x_{k+1} - x).

    Args:
      key: one typed key, of which example i uses fold_in(key, i), or one key per example [batch].
      logits_fn: x [batch, ...] -> logits [batch, classes], any traceable function.
      x: images [batch, ...], float32 or float64, inside `bounds`.
      y: labels, integers [batch].
      eps: radius, scalar or [batch], in the units of x. An image whose nearest wrong point lies farther away is
        returned unchanged; infinity returns all nearest wrong points. Random starts lie within eps. In L-inf also one
        radius for each entry, an array with the dimensions of x that broadcasts to it: 0 where a feature must not
        change. The distance is then max_i |d_i| / eps_i.
      num_steps: iterations of a restart; each costs one gradient per class and one more forward pass.
      num_restarts: restarts; the first begins at x, the others at random points.
      norm: "linf", "l2" or "l1".
      alpha_max: the largest weight of the way towards the clean image.
      eta: overshooting beyond the linearised boundary.
      beta: step back from a wrong point towards the clean image.
      targets: None, or a class t for each example, integers [batch]: searches the nearest point that is classified as
        t, towards the hyperplane where the linearised z_t - max_{s != t} z_s is zero.
      bounds: (low, high), the range of valid pixels.

    Returns:
      x_adv, an array like x.

    Raises:
      ValueError: for images, labels, logits or options that do not fit.

    Examples:
      >>> logits_fn = lambda x: x @ jnp.array([[1.0, -1.0], [-1.0, 1.0]])
      >>> x, y = jnp.array([[0.5, 0.375]]), jnp.array([0])
      >>> x_adv = attacks.fab(jax.random.key(0), logits_fn, x, y, eps=0.125, num_steps=10)
      >>> attacks.prediction(logits_fn(x_adv)), float(abs(x_adv - x).max()) < 0.075
      (Array([1], dtype=int32), True)

    References:
      Croce and Hein, "Minimally distorted adversarial examples with a fast adaptive boundary attack", ICML 2020,
      algorithm 1.
    """
    x, y = checks.as_array("x", x), checks.as_array("y, the labels,", y)
    bounds = _base.check(x, y, bounds)
    num_steps, num_restarts = checks.count("num_steps", num_steps), checks.count("num_restarts", num_restarts)
    options = _options(alpha_max, eta, beta)

    def build(classes: int) -> IterativeAttack[State]:
        return build_fab(classes, norm, num_steps, num_restarts, *options, bounds, targeted=targets is not None)

    return _base.attack_batch(
        build, key, logits_fn, x, y, eps, allow_infinite=True, targets=targets, eps_per_entry=norm == "linf"
    )


def fab_targeted(
    key: Array,
    logits_fn: LogitsFn,
    x: Array,
    y: Array,
    *,
    eps: ArrayLike,
    num_steps: int = 100,
    num_targets: int = 9,
    norm: str = "linf",
    alpha_max: float = 0.1,
    eta: float = 1.05,
    beta: float = 0.9,
    bounds: Bounds = (0.0, 1.0),
) -> Array:
    """Targeted FAB: searches the boundary to one class after the other, the most likely wrong class first.

    Like `fab`, with the hyperplane of one target class t, where the linearised z_t - z_y is zero. An image that has a
    wrong point within eps is not attacked any further.

    Args:
      key: one typed key, of which example i uses fold_in(key, i), or one key per example [batch].
      logits_fn: x [batch, ...] -> logits [batch, classes], any traceable function.
      x: images [batch, ...], float32 or float64, inside `bounds`.
      y: labels, integers [batch].
      eps: radius, scalar or [batch], in the units of x. An image whose nearest wrong point lies farther away is
        returned unchanged. With infinity an image ends at the first target that has a wrong point, and a later target
        may have a nearer one: for smallest perturbations use `minimum_norm(fab)`. In L-inf also one radius for each
        entry, an array with the dimensions of x that broadcasts to it: 0 where a feature must not change. The distance
        is then max_i |d_i| / eps_i.
      num_steps: iterations for each target; each costs one gradient and one more forward pass.
      num_targets: number of target classes, at most classes - 1.
      norm: "linf", "l2" or "l1".
      alpha_max: the largest weight of the way towards the clean image.
      eta: overshooting beyond the linearised boundary.
      beta: step back from a wrong point towards the clean image.
      bounds: (low, high), the range of valid pixels.

    Returns:
      x_adv, an array like x.

    Raises:
      ValueError: for images, labels, logits or options that do not fit.

    Examples:
      >>> logits_fn = lambda x: x @ jnp.array([[1.0, -1.0], [-1.0, 1.0]])
      >>> x, y = jnp.array([[0.5, 0.375]]), jnp.array([0])
      >>> x_adv = attacks.fab_targeted(jax.random.key(0), logits_fn, x, y, eps=0.125, num_steps=10)
      >>> attacks.prediction(logits_fn(x_adv)), float(abs(x_adv - x).max()) < 0.075
      (Array([1], dtype=int32), True)

    References:
      Croce and Hein, "Minimally distorted adversarial examples with a fast adaptive boundary attack", ICML 2020.
      Targets as in "Reliable evaluation of adversarial robustness", ICML 2020, section 5.
    """
    x, y = checks.as_array("x", x), checks.as_array("y, the labels,", y)
    bounds = _base.check(x, y, bounds)
    num_steps, num_targets = checks.count("num_steps", num_steps), checks.count("num_targets", num_targets)
    options = _options(alpha_max, eta, beta)

    def build(classes: int) -> IterativeAttack[State]:
        return build_fab_targeted(norm, num_steps, min(num_targets, classes - 1), *options, bounds)

    return _base.attack_batch(build, key, logits_fn, x, y, eps, allow_infinite=True, eps_per_entry=norm == "linf")


def _options(alpha_max: float, eta: float, beta: float) -> tuple[float, float, float]:
    return checks.number("alpha_max", alpha_max, 0, 1), checks.number("eta", eta, 0), checks.number("beta", beta, 0, 1)


def build_fab(
    classes: int,
    norm: str,
    num_steps: int,
    num_restarts: int,
    alpha_max: float,
    eta: float,
    beta: float,
    bounds: Bounds,
    targeted: bool = False,
) -> IterativeAttack[State]:
    """Returns `fab` as an `IterativeAttack`; `targeted` means towards the target of each example."""
    ball = norms.get(norm)
    plane = _plane_of_goal if targeted else lambda logits_fn, state: _nearest_plane(logits_fn, state, classes, ball)
    return _attack(
        plane, norm, num_steps, num_restarts, alpha_max, eta, beta, bounds, gradients=1 if targeted else classes,
        random_starts=True, targeted=targeted,
    )  # fmt: skip


def build_fab_targeted(
    norm: str, num_steps: int, num_targets: int, alpha_max: float, eta: float, beta: float, bounds: Bounds
) -> IterativeAttack[State]:
    """Returns `fab_targeted` as an `IterativeAttack`."""
    return _attack(
        _plane_of_target, norm, num_steps, num_targets, alpha_max, eta, beta, bounds,
        gradients=1, random_starts=False,
    )  # fmt: skip


def _plane_of_target(logits_fn: KeyedLogitsFn, state: State) -> tuple[Array, Array]:
    """Returns z_t - z_y at the point [b] and its gradient [b, ...], both possibly divided by the same number."""
    return _plane(logits_fn, state, lambda logits: targeted_logit_margin(logits, state.y, state.target))


def _plane_of_goal(logits_fn: KeyedLogitsFn, state: State) -> tuple[Array, Array]:
    """Like `_plane_of_target`, for z_t - max_{s != t} z_s."""
    return _plane(logits_fn, state, lambda logits: -logit_margin(logits, state.target))


def _plane(logits_fn: KeyedLogitsFn, state: State, margin_of: Callable[[Array], Array]) -> tuple[Array, Array]:
    def value(x: Array) -> tuple[Array, Array]:
        logits = _base.logits_of(logits_fn, x, state.key)
        return margin_of(logits), logits

    margin, _, gradient = _base.value_and_gradient(value, state.point)
    return _representable(margin, gradient)


def _representable(value: Array, gradient: Array) -> tuple[Array, Array]:
    """Scales a plane so that squares and sums do not overflow; zeros where the value is not finite."""
    usable = jnp.isfinite(value)
    gradient = jnp.where(expand_mask(usable, gradient), norms.finite(gradient), 0)
    scale = norms.representable_scale(gradient)
    return jnp.where(usable, value, 0).astype(gradient.dtype) / scale.reshape(-1), gradient / scale


def _nearest_plane(logits_fn: KeyedLogitsFn, state: State, classes: int, ball: norms.Norm) -> tuple[Array, Array]:
    """Like `_plane_of_target`, for the class s != y whose plane is nearest to the point."""
    logits, vjp_fn = jax.vjp(lambda x: _base.logits_of(logits_fn, x, state.key), state.point)
    at_y = jax.nn.one_hot(state.y, classes, dtype=logits.dtype)

    def nearer(s: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        difference = jax.nn.one_hot(s, classes, dtype=logits.dtype)[None, :] - at_y
        value = jnp.sum(difference * logits, axis=-1)
        value, gradient = _representable(value, with_fast_convolutions(lambda: vjp_fn(difference)[0])())
        weighted = gradient if state.eps.ndim == 1 else gradient * _scale(state)
        distance = jnp.abs(value) / (1e-12 + ball.dual(weighted).reshape(-1))
        return where_rows((distance < carry[0]) & (state.y != s), (distance, value, gradient), carry)

    zero = jnp.zeros_like(state.distance)
    no_plane = (zero + jnp.inf, zero, jnp.zeros_like(state.x))
    return lax.stop_gradient(lax.fori_loop(0, classes, nearer, no_plane)[1:])


def _attack(
    plane: Callable[[KeyedLogitsFn, State], tuple[Array, Array]],
    norm: str,
    num_steps: int,
    num_rounds: int,
    alpha_max: float,
    eta: float,
    beta: float,
    bounds: Bounds,
    *,
    gradients: int,
    random_starts: bool,
    targeted: bool = False,
) -> IterativeAttack[State]:
    ball, (low, high) = norms.get(norm), bounds

    def length(d: Array, state: State) -> Array:
        return ball.length(d if state.eps.ndim == 1 else _divided(d, _scale(state)))

    def init(keys: Array, x: Array, y: Array, target: Array, eps: Array, r: Array) -> State:
        start = x
        if random_starts:
            width = jnp.asarray(min(high - low, jnp.finfo(x.dtype).max), x.dtype)  # eps may be infinite
            noise = jnp.clip(
                x + expand_mask(jnp.minimum(eps, width) / 2, x) * _base.random_directions(keys, x, ball), low, high
            )
            start = where_rows(r == 0, x, noise)
        zero = jnp.zeros_like(eps.reshape(len(eps), -1)[:, 0])  # [b]
        no_distance = zero + jnp.finfo(eps.dtype).max
        return State(x, y, target, keys, eps, start, x, no_distance, jnp.zeros_like(zero, jnp.int32))

    def step(logits_fn: KeyedLogitsFn, state: State) -> State:
        value, w = plane(logits_fn, state)
        x, point = state.x, state.point
        # The plane is <w, p> = <w, point> - value, for any p.
        gap = value + jnp.sum((x - point) * w, axis=tuple(range(1, x.ndim)))
        scale = None if state.eps.ndim == 1 else _scale(state)
        d_point = to_plane(norm, point, w, value, low, high, scale)
        d_clean = to_plane(norm, x, w, gap, low, high, scale)
        point_length, clean_length = (jnp.maximum(length(d, state), 1e-8) for d in (d_point, d_clean))
        alpha = jnp.minimum(point_length / (point_length + clean_length), alpha_max)
        point = jnp.clip((point + eta * d_point) * (1 - alpha) + (x + eta * d_clean) * alpha, low, high)
        if scale is not None:
            point = jnp.where(scale > 0, point, x)  # the mean of two equal numbers is rounded
        logits = _base.logits_of(logits_fn, point, state.key)
        wrong = _base.reaches_goal(logits, state.y, state.target, targeted)
        distance = length(point - x, state).reshape(-1)
        nearest, distance = where_rows(
            wrong & (distance < state.distance), (point, distance), (state.nearest, state.distance)
        )
        point = where_rows(wrong, x + (point - x) * beta, point)
        new = state._replace(point=point, nearest=nearest, distance=distance, steps_taken=state.steps_taken + 1)
        return where_rows(state.steps_taken < num_steps, new, state)

    return IterativeAttack(init, step, num_steps, num_rounds, forwards=2, gradients=gradients)


def _scale(state: State) -> Array:
    """Returns eps of each entry divided by the largest of its example, [b, ...] in [0, 1]."""
    largest = _largest(state.eps)
    return jnp.where(largest > 0, state.eps / jnp.where(largest > 0, largest, 1), 0)


def _largest(eps: Array) -> Array:
    return jnp.max(eps, axis=tuple(range(1, eps.ndim)), keepdims=True)


def _divided(d: Array, scale: Array) -> Array:
    return jnp.where(scale > 0, d / jnp.where(scale > 0, scale, 1), 0)  # an entry that must not change has d = 0


def to_plane(
    norm: str, point: Array, w: Array, value: Array, low: float, high: float, scale: Array | None = None
) -> Array:
    """Returns the shortest displacement d from each point to its plane: minimise |d| subject to <w, d> = -value.

    The bounds limit each entry to room_i: |d_i| = min(t, room_i) in L-inf and |d_i| = min(t |w_i|, room_i) in L2, where
    one t per example satisfies the constraint. In L1 the entries with the largest |w_i| go to the bounds one after the
    other, as far as the plane. Where no point of the plane lies inside the bounds, d leads to the corner of the box
    that is nearest to the plane.

    Args:
      norm: "linf", "l2" or "l1".
      point: points inside the bounds, [batch, ...].
      w: normals of the planes, [batch, ...].
      value: <w, point> minus the offset of the plane, [batch].
      low: lower bound of a pixel.
      high: upper bound of a pixel.
      scale: None, or for L-inf the length of each entry: the norm is max_i |d_i| / scale_i, and d_i = 0 where it is 0.

    Returns:
      d, an array like `point`.
    """
    flat, w = point.reshape(len(point), -1), w.reshape(len(point), -1)
    side = jnp.where(value >= 0, 1, -1).astype(w.dtype)[:, None]
    sign = -jnp.sign(w) * side
    room = jnp.where(sign > 0, high - flat, flat - low)
    size = jnp.abs(w)
    if scale is not None:
        scale = scale.reshape(flat.shape)
        reach = _divided(room, scale)
        d = jnp.where(scale > 0, scale * jnp.minimum(_level(size * scale, reach, jnp.abs(value)), reach), 0)
    elif norm == "linf":
        d = jnp.minimum(_level(size, room, jnp.abs(value)), room)
    elif norm == "l1":
        size = jnp.where(size < 1e-8, 0, size)
        d = _largest_first(size, jnp.where(size > 0, room, 0), jnp.abs(value))
    else:
        size = jnp.where(size < 1e-8, 0, size)
        reach = room / jnp.where(size > 0, size, 1)
        d = size * jnp.minimum(_level(size * size, reach, jnp.abs(value)), reach)
    return (sign * jnp.where(size > 0, d, 0)).reshape(point.shape)


def _largest_first(weight: Array, cap: Array, total: Array) -> Array:
    """Returns d >= 0 with sum_i weight_i d_i = total, d_i <= cap_i and the smallest sum: largest weights first."""
    order = jnp.argsort(-weight, axis=-1)
    weight, cap = (jnp.take_along_axis(array, order, axis=-1) for array in (weight, cap))
    reached = jnp.cumsum(weight * cap, axis=-1)
    before = jnp.concatenate([jnp.zeros_like(reached[:, :1]), reached[:, :-1]], axis=-1)
    d = jnp.clip((total[:, None] - before) / jnp.where(weight > 0, weight, 1), 0, cap)
    return jnp.put_along_axis(jnp.zeros_like(d), order, d, axis=-1, inplace=False)


def _level(weight: Array, cap: Array, total: Array) -> Array:
    """Returns t >= 0, [batch, 1], with sum_i weight_i min(t, cap_i) = total; infinity where the sum stays below it.

    Newton's method from t = 0: the sum is concave and piecewise linear in t, so t only grows, and it is exact as soon
    as no further cap is reached. That takes about ten passes over the pixels; the closed form would sort them.
    """

    def newton(capped: Array) -> Array:
        left = total[:, None] - jnp.sum(jnp.where(capped, weight * cap, 0), axis=-1, keepdims=True)
        free = jnp.sum(jnp.where(capped, 0, weight), axis=-1, keepdims=True)
        return jnp.where(free > 0, left / jnp.where(free > 0, free, 1), jnp.inf)

    def grow(carry: tuple[Array, Array]) -> tuple[Array, Array]:
        capped, _ = carry
        new = capped | (cap <= newton(capped))
        return new, jnp.any(new != capped)

    no_cap = jnp.zeros_like(cap, bool)
    capped, _ = lax.while_loop(lambda carry: carry[1], grow, (no_cap, jnp.any(weight >= 0)))
    return newton(capped)
