"""Square attack: random search over square windows. It uses predictions only and no gradients."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from lt_adv.attacks import _base, checks, norms
from lt_adv.attacks._base import IterativeAttack, where_rows
from lt_adv.attacks.objectives import logit_margin
from lt_adv.attacks.signatures import Bounds, KeyedLogitsFn, LogitsFn, Objective

# Proposals at which the share of the pixels in a window is halved.
HALVINGS = (11, 51, 201, 501, 1001, 2001, 4001, 6001, 8001)
TINY = 1e-12
L1_RADIUS = 1 - 1e-6  # in radii, for the rounding of the projection


class State(NamedTuple):
    """State of the attack, one row per example. It stops changing once the example is broken."""

    x: Array  # [b, ...]
    y: Array  # int32 [b]
    key: Array  # [b]
    eps: Array  # [b], or like x
    x_adv: Array  # [b, ...], the best point so far
    value: Array  # [b], its objective
    steps_taken: Array  # int32 [b], number of queries
    broken: Array  # bool [b]


def square(
    key: Array,
    logits_fn: LogitsFn,
    x: Array,
    y: Array,
    *,
    eps: ArrayLike,
    num_queries: int = 5000,
    p_init: float = 0.8,
    objective: Objective = logit_margin,
    norm: str = "linf",
    bounds: Bounds = (0.0, 1.0),
) -> Array:
    """Square attack: changes one random square window at a time and accepts changes that raise the objective.

    L-inf: the start is x + eps times a random sign for each column and channel; a proposal adds 2 eps times a random
    sign for each channel inside a window, clipped to the ball. L2 and L1: the start is a grid of bumps; a proposal
    moves the perturbation of one window to another, in the shape of a bump, with the same energy in L2 and `channels`
    times the length in L1, where it is projected to the intersection of the ball and the bounds.

    Args:
      key: one typed key, of which example i uses fold_in(key, i), or one key per example [batch].
      logits_fn: x [batch, ...] -> logits [batch, classes]; never differentiated.
      x: images [batch, height, width, channels] or [batch, height, width] inside `bounds`. For L-inf also vectors
        [batch, d], where an interval of the features takes the place of the window (ours: the paper has images only).
      y: labels, integers [batch]. An image that is classified wrongly is returned unchanged.
      eps: radius of the ball, scalar or [batch], in the units of x. In L-inf also one radius for each entry, an array
        with the dimensions of x that broadcasts to it: 0 where a feature must not change.
      num_queries: proposals; the start costs one more query.
      p_init: share of the pixels in the first windows.
      objective: (logits, y) -> [batch], maximised.
      norm: "linf", "l2" or "l1".
      bounds: (low, high), the range of valid pixels.

    Returns:
      x_adv, an array like x: the first point that is classified wrongly; if there is none, the point with the largest
      objective.

    Raises:
      ValueError: for images, labels, logits or options that do not fit; for L2 and L1, images smaller than 5 x 5.

    Examples:
      >>> logits_fn = lambda x: x @ jnp.array([[1.0, -1.0], [-1.0, 1.0]])
      >>> x, y = jnp.array([[0.5, 0.375]]), jnp.array([0])
      >>> x_adv = attacks.square(jax.random.key(0), logits_fn, x, y, eps=0.125, num_queries=20)
      >>> attacks.prediction(logits_fn(x_adv))
      Array([1], dtype=int32)

    References:
      Andriushchenko et al., "Square attack: a query-efficient black-box adversarial attack via random search",
      ECCV 2020, algorithms 1 to 3; L1 as in AutoAttack, whose windows never have fewer than 3 x 3 pixels. Windows
      shrink at fixed proposals, whatever num_queries, as in AutoAttack.
      Differs from the released code: every image draws its own windows and signs.
    """
    x, y = checks.as_array("x", x), checks.as_array("y, the labels,", y)
    bounds = _base.check(x, y, bounds)
    if reason := unsupported(norm, x.shape[1:]):
        raise ValueError(f"square needs {reason}.")
    num_queries, p_init = checks.count("num_queries", num_queries), checks.number("p_init", p_init, 0, 1)
    checks.check_objective(objective)

    def build(_: int) -> IterativeAttack[State]:
        return build_square(objective, norm, num_queries, p_init, bounds)

    return _base.attack_batch(build, key, logits_fn, x, y, eps, eps_per_entry=norm == "linf")


def unsupported(norm: str, shape: tuple[int, ...]) -> str:
    """Returns why `square` cannot attack examples of this shape; empty if it can."""
    if norm != "linf":
        fits = len(shape) in (2, 3) and min(shape[:2]) >= 5
        needs = f"images of at least 5 x 5 pixels for {norm.upper()}, [batch, height, width(, channels)]"
        return "" if fits else f"{needs}, got examples of shape {shape}"
    fits = len(shape) in (1, 2, 3) and min(shape) >= 1
    return "" if fits else f"images [batch, height, width(, channels)] or vectors [batch, d], got examples of {shape}"


def _as_image(example: Array) -> Array:
    """Reshapes one example to [height, width, channels]; a vector becomes one row of pixels."""
    return example.reshape(_image_shape(example.shape))


def _image_shape(shape: tuple[int, ...]) -> tuple[int, int, int]:
    return {1: (1, *shape, 1), 2: (*shape, 1), 3: shape}[len(shape)]  # type: ignore[return-value]


def build_square(
    objective: Objective, norm: str, num_queries: int, p_init: float, bounds: Bounds
) -> IterativeAttack[State]:
    """Returns `square` as an `IterativeAttack`."""
    low, high = bounds
    ball = norms.get(norm)
    start, propose = {
        "linf": (_stripes, _linf_proposal),
        "l2": (_l2_bumps, _l2_proposal),
        "l1": (_l1_bumps, _l1_proposal),
    }[norm]

    def add(x: Array, delta: Array, eps: Array) -> Array:
        if norm != "l1":
            return jnp.clip(x + delta, low, high)
        return ball.project((x + delta)[None], x[None], eps * L1_RADIUS, low, high)[0]

    def radius_of(eps: Array) -> Array:
        return _as_image(eps) if eps.ndim else eps

    def init(keys: Array, x: Array, y: Array, target: Array, eps: Array, _: Array) -> State:
        delta = jax.vmap(start)(keys, jax.vmap(_as_image)(x), jax.vmap(radius_of)(eps)).reshape(x.shape)
        point = jax.vmap(add)(x, delta, eps)
        zero = jnp.zeros_like(eps.reshape(len(eps), -1)[:, 0])  # [b]
        no_value = zero - jnp.finfo(eps.dtype).max
        return State(x, y, keys, eps, point, no_value, jnp.zeros_like(zero, jnp.int32), jnp.zeros_like(zero, bool))

    def proposal(key: Array, number: Array, x: Array, x_adv: Array, eps: Array) -> Array:
        level = jnp.sum(number >= jnp.asarray(HALVINGS, number.dtype))
        image = _as_image(x_adv - x)
        delta = propose(jax.random.fold_in(key, number), level, sides(x.shape), image, radius_of(eps))
        return add(x, delta.reshape(x.shape), eps)

    def sides(shape: tuple[int, ...]) -> np.ndarray:
        return _sides(p_init, _image_shape(shape), norm, vector=len(shape) == 1)

    def step(logits_fn: KeyedLogitsFn, state: State) -> State:
        first = state.steps_taken == 0
        point = jax.vmap(proposal)(state.key, state.steps_taken - 1, state.x, state.x_adv, state.eps)
        point = where_rows(first, state.x_adv, point)
        logits = _base.logits_of(logits_fn, point, state.key)
        value = _base.finite_values(checks.check_values(objective(logits, state.y), state.x), state.x)
        broken = _base.is_wrong(logits, state.y)
        x_adv, value = where_rows(first | broken | (value > state.value), (point, value), (state.x_adv, state.value))
        new = state._replace(x_adv=x_adv, value=value, steps_taken=state.steps_taken + 1, broken=broken)
        return where_rows(~state.broken & (state.steps_taken <= num_queries), new, state)

    return IterativeAttack(init, step, num_queries + 1, 1, gradients=0, saved_fields=("x_adv", "value", "steps_taken"))


def _sides(p_init: float, shape: tuple[int, ...], norm: str, vector: bool = False) -> np.ndarray:
    """Returns the side of the window in pixels after each number of halvings; odd and at least 3 for L2 and L1.

    For a vector it is the length of an interval with the share p of the features.
    """
    area = p_init / 2.0 ** np.arange(len(HALVINGS) + 1) * shape[0] * shape[1]
    sides = np.maximum(np.round(area if vector else np.sqrt(area)), 1 if norm == "linf" else 3).astype(np.int32)
    return sides if norm == "linf" else np.minimum(sides + (sides % 2 == 0), min(shape[:2]))


def _signs(key: Array, shape: tuple[int, ...], dtype: jnp.dtype) -> Array:
    return jnp.where(jax.random.bernoulli(key, shape=shape), 1, -1).astype(dtype)


def _corner(key: Array, size: Array, shape: tuple[int, ...]) -> tuple[Array, Array]:
    """Draws the first row and column of the window from [0, height - size) and [0, width - size), as released."""
    room = jnp.maximum(jnp.array(shape[:2], jnp.int32) - size, 1)
    return tuple(jax.random.randint(key, (2,), 0, room, jnp.int32))


def _window(corner: tuple[Array, Array], size: Array, shape: tuple[int, ...]) -> tuple[Array, Array, Array]:
    """Returns the mask of a window, bool [h, w, 1], and the row and column of each pixel relative to it."""
    rows, columns = (jnp.arange(length, dtype=jnp.int32) for length in shape[:2])
    row, column = rows[:, None] - corner[0], columns[None, :] - corner[1]
    inside = (row >= 0) & (row < size) & (column >= 0) & (column < size)
    return inside[..., None], row, column


def _stripes(key: Array, x: Array, eps: Array) -> Array:
    return jnp.broadcast_to(eps * _signs(key, (1, *x.shape[1:]), x.dtype), x.shape)


def _linf_proposal(key: Array, level: Array, sides: np.ndarray, delta: Array, eps: Array) -> Array:
    key_corner, key_sign = jax.random.split(key)
    size = jnp.asarray(sides)[level]
    inside, _, _ = _window(_corner(key_corner, size, delta.shape), size, delta.shape)
    sign = _signs(key_sign, (1, 1, delta.shape[-1]), delta.dtype)
    return jnp.clip(delta + jnp.where(inside, 2 * eps * sign, 0), -eps, eps)


def _l2_bumps(key: Array, x: Array, eps: Array) -> Array:
    return _scaled(_bumps(key, x, 2), eps)


def _l1_bumps(key: Array, x: Array, eps: Array) -> Array:
    return _bumps(key, x, 1)


def _bumps(key: Array, x: Array, order: int) -> Array:
    """Returns a grid of bumps, each a fifth of the height, with random signs and directions."""
    side = x.shape[0] // 5
    before = (x.shape[0] - 5 * side) // 2
    cells = tuple((length - before) // side for length in x.shape[:2])
    key_transpose, key_sign = jax.random.split(key)
    transpose = jax.random.bernoulli(key_transpose, shape=(*cells, 1, 1))
    bump = jnp.asarray(_bump(side, order), x.dtype)
    bumps = jnp.where(transpose, bump.T[None, None], bump[None, None])[..., None] * _signs(
        key_sign, (*cells, 1, 1, x.shape[2]), x.dtype
    )
    grid = bumps.transpose(0, 2, 1, 3, 4).reshape(cells[0] * side, cells[1] * side, x.shape[2])
    after = [length - before - cell * side for length, cell in zip(x.shape[:2], cells, strict=True)]
    return jnp.pad(grid, [(before, after[0]), (before, after[1]), (0, 0)])


def _l2_proposal(key: Array, level: Array, sides: np.ndarray, delta: Array, eps: Array) -> Array:
    """Clears the second window and adds a bump to the first, which receives the energy of both."""
    inside, other, bump = _draw_windows(key, level, sides, delta, 2)
    window = jnp.where(inside, delta, 0)
    new = bump + window / (TINY + _channel_norms(window))
    free = jnp.maximum(eps**2 - jnp.sum(delta**2), 0) / delta.shape[2]
    energy = free + jnp.sum(jnp.where(inside | other, delta, 0) ** 2, axis=(0, 1), keepdims=True)
    new = new / (TINY + _channel_norms(new)) * jnp.sqrt(energy)
    return _scaled(jnp.where(inside, new, jnp.where(other, 0, delta)), eps)


def _l1_proposal(key: Array, level: Array, sides: np.ndarray, delta: Array, eps: Array) -> Array:
    """Clears the second window and adds a bump to the first, which receives the length of both in each channel."""

    def lengths(image: Array) -> Array:
        return jnp.sum(jnp.abs(image), axis=(0, 1), keepdims=True)

    inside, other, bump = _draw_windows(key, level, sides, delta, 1)
    window = jnp.where(inside, delta, 0)
    new = bump + window / (TINY + lengths(window))
    channels = delta.shape[2]
    free = jnp.maximum(eps - jnp.sum(jnp.abs(delta)), 0) / channels
    length = (free + lengths(jnp.where(inside | other, delta, 0))) * channels
    return jnp.where(inside, new / (TINY + lengths(new)) * length, jnp.where(other, 0, delta))


def _draw_windows(key: Array, level: Array, sides: np.ndarray, delta: Array, order: int) -> tuple[Array, Array, Array]:
    """Returns two windows, bool [h, w, 1], and a bump of either sign and direction in the first, [h, w, c]."""
    key_corner, key_other, key_transpose, key_sign = jax.random.split(key, 4)
    size = jnp.asarray(sides)[level]
    inside, row, column = _window(_corner(key_corner, size, delta.shape), size, delta.shape)
    other, _, _ = _window(_corner(key_other, size, delta.shape), size, delta.shape)
    row, column = (jnp.clip(at, 0, sides[0] - 1) for at in (row, column))
    transpose = jax.random.bernoulli(key_transpose)
    row, column = jnp.where(transpose, column, row), jnp.where(transpose, row, column)
    bump = jnp.asarray(_bump_table(tuple(sides), order), delta.dtype)[level, row, column][..., None]
    sign = _signs(key_sign, (1, 1, delta.shape[2]), delta.dtype)
    return inside, other, jnp.where(inside, bump * sign, 0)


def _channel_norms(image: Array) -> Array:
    return jnp.sqrt(jnp.sum(image**2, axis=(0, 1), keepdims=True))


def _scaled(delta: Array, eps: Array) -> Array:
    return delta / (TINY + jnp.sqrt(jnp.sum(delta**2))) * eps


def _bump_table(sides: tuple[int, ...], order: int) -> np.ndarray:
    """Returns the bumps of all window sizes, padded to the largest (the first), [levels, side, side]."""
    return np.stack([np.pad(_bump(side, order), (0, sides[0] - side)) for side in sides])


def _bump(side: int, order: int) -> np.ndarray:
    """Returns [side, side] of L1 or L2 norm one: two halves of opposite sign, each a pyramid of nested rectangles."""
    bump = np.concatenate([_pyramid(side // 2, side, order), -_pyramid(side - side // 2, side, order)])
    return bump / np.linalg.norm(bump.ravel(), order)


def _pyramid(height: int, width: int, order: int) -> np.ndarray:
    """Returns [height, width] of L1 or L2 norm one.

    Square m, of side 2 m + 1 around the centre, adds 1 / (m + 1)^2 in L2 and 1 / (m + 1)^4 in L1.
    """
    row, column = np.arange(height) - height // 2, np.arange(width) - width // 2
    ring = np.maximum(np.abs(row)[:, None], np.abs(column)[None, :])
    rings = max(height // 2, width // 2) + 1
    pyramid = np.sum([(ring <= m) / (m + 1) ** (4 if order == 1 else 2) for m in range(rings)], axis=0)
    return pyramid / np.linalg.norm(pyramid.ravel(), order)
