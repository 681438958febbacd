"""Square attack: random search over square windows, by predictions alone; no gradient is asked for."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from lt_adv.attacks import _base, inputs, norms
from lt_adv.attacks._base import Bounds, Iterated, Network, where_rows
from lt_adv.attacks.objectives import logit_margin

# From which proposal on the share of a window's pixels is halved once more.
HALVINGS = (11, 51, 201, 501, 1001, 2001, 4001, 6001, 8001)
TINY = 1e-12


class State(NamedTuple):
    """One row per example; it stands still once the example is broken, so `steps_taken` counts its queries."""

    x: Array
    y: Array
    key: Array
    eps: Array
    x_adv: Array  # the best point so far
    value: Array  # the objective there
    steps_taken: Array
    broken: Array


def square(
    key: Array,
    logits_fn: Callable[..., Array],
    x: Array,
    y: Array,
    *,
    eps: ArrayLike,
    num_queries: int = 5000,
    p_init: float = 0.8,
    objective: Callable[[Array, Array], Array] = logit_margin,
    norm: str = "linf",
    bounds: Bounds = (0.0, 1.0),
) -> Array:
    """Square attack: a proposal changes one square window at random and is kept where it raises the objective.

    L-inf: the start is x + eps times a random sign for each column and channel; a proposal adds 2 eps times a random
    sign for each channel inside a window, within the ball. L2: the start is a grid of bumps; a proposal moves the
    energy of one window to another, shaped as a bump.

    Args:
      key: one typed key, or one per example [batch].
      logits_fn: x -> logits[batch, classes]; never differentiated.
      x, y: images [batch, height, width, channels] or [batch, height, width] inside `bounds`, and labels [batch]. An
        image that is wrong already is returned as it is. For L-inf also vectors [batch, d], where an interval of the
        features takes the place of the window (ours: the paper has images alone).
      eps: radius, scalar or [batch], in units of the [0, 1] pixel range.
      num_queries: proposals; the start costs one more query.
      p_init: share of the pixels in the first windows.
      objective: (logits, y) -> [batch], maximised.
      norm: "linf" or "l2".
      bounds: the box of valid pixels.

    Returns:
      x_adv, an array like x: the best point found, which is the first wrong one where there is one. ValueError for
      examples of other shapes and, for L2, images smaller than 5 x 5.

    Reference: Andriushchenko et al., "Square attack: a query-efficient black-box adversarial attack via random
    search", ECCV 2020, algorithms 1 to 3. Sizes shrink at fixed proposals, whatever num_queries, as in AutoAttack.
    Differs from the released code: every image draws windows and signs of its own.
    """
    x, y = inputs.as_array("x", x), inputs.as_array("y, the labels,", y)
    bounds = _base.check(x, y, bounds)
    if reason := unsupported(norm, x.shape[1:]):
        raise ValueError(f"square needs {reason}.")
    num_queries, p_init = inputs.count("num_queries", num_queries), inputs.number("p_init", p_init, 0, 1)

    def build(_: int) -> Iterated:
        return square_program(objective, norm, num_queries, p_init, bounds)

    return _base.attack_batch(build, key, logits_fn, x, y, eps)


def unsupported(norm: str, shape: tuple[int, ...]) -> str:
    """What `square` needs and an example of this shape does not have; empty where it can be attacked."""
    if norm == "l2":
        fits = len(shape) in (2, 3) and min(shape[:2]) >= 5
        seen = f"got examples of shape {shape}"
        return "" if fits else f"images of at least 5 x 5 pixels for L2, [batch, height, width(, channels)], {seen}"
    fits = len(shape) in (1, 2, 3) and min(shape) >= 1
    return "" if fits else f"images [batch, height, width(, channels)] or vectors [batch, d], got examples of {shape}"


def _as_image(example: Array) -> Array:
    """[height, width, channels] of one example: an image of one channel, or a vector as one row of pixels."""
    return example.reshape(_image_shape(example.shape))


def _image_shape(shape: tuple[int, ...]) -> tuple[int, int, int]:
    return {1: (1, *shape, 1), 2: (*shape, 1), 3: shape}[len(shape)]  # type: ignore[return-value]


def square_program(objective: Callable, norm: str, num_queries: int, p_init: float, bounds: Bounds) -> Iterated:
    """The attack `square`."""
    low, high = bounds
    start, propose = {"linf": (_stripes, _linf_proposal), "l2": (_bumps, _l2_proposal)}[norms.get(norm) and norm]

    def begin(keys: Array, x: Array, y: Array, target: Array, eps: Array, _: Array) -> State:
        delta = jax.vmap(start)(keys, jax.vmap(_as_image)(x), eps).reshape(x.shape)
        none, zero = jnp.full_like(eps, -jnp.finfo(eps.dtype).max), jnp.zeros_like(eps, jnp.int32)
        return State(x, y, keys, eps, jnp.clip(x + delta, low, high), none, zero, jnp.zeros_like(eps, bool))

    def proposal(key: Array, number: Array, x: Array, x_adv: Array, eps: Array) -> Array:
        level = jnp.sum(number >= jnp.asarray(HALVINGS, number.dtype))
        delta = propose(jax.random.fold_in(key, number), level, sides(x.shape), _as_image(x_adv - x), eps)
        return jnp.clip(x + delta.reshape(x.shape), low, high)

    def sides(shape: tuple[int, ...]) -> np.ndarray:
        return _sides(p_init, _image_shape(shape), norm, vector=len(shape) == 1)

    def step(network: Network, state: State) -> State:
        first = state.steps_taken == 0
        point = jax.vmap(proposal)(state.key, state.steps_taken - 1, state.x, state.x_adv, state.eps)
        point = where_rows(first, state.x_adv, point)
        logits = _base.logits_of(network, point, state.key)
        value = _base.comparable(inputs.check_values(objective(logits, state.y), state.x), state.x)
        broken = _base.is_wrong(logits, state.y)
        x_adv, value = where_rows(first | broken | (value > state.value), (point, value), (state.x_adv, state.value))
        new = state._replace(x_adv=x_adv, value=value, steps_taken=state.steps_taken + 1, broken=broken)
        return where_rows(~state.broken & (state.steps_taken <= num_queries), new, state)

    return Iterated(begin, step, num_queries + 1, 1, gradients=0, carries=("x_adv", "value", "steps_taken"))


def _sides(p_init: float, shape: tuple[int, ...], norm: str, vector: bool = False) -> np.ndarray:
    """Side of the window, in pixels, after each number of halvings; odd and at least 3 for L2.

    Of a vector the length of an interval, which holds the share p of the features as a square does of the pixels.
    """
    area = p_init / 2.0 ** np.arange(len(HALVINGS) + 1) * shape[0] * shape[1]
    sides = np.maximum(np.round(area if vector else np.sqrt(area)), 3 if norm == "l2" else 1).astype(np.int32)
    return np.minimum(sides + (sides % 2 == 0), min(shape[:2])) if norm == "l2" else sides


def _signs(key: Array, shape: tuple[int, ...], dtype: jnp.dtype) -> Array:
    return jnp.where(jax.random.bernoulli(key, shape=shape), 1, -1).astype(dtype)


def _corner(key: Array, size: Array, shape: tuple[int, ...]) -> tuple[Array, Array]:
    """The window's first row and column, uniform in [0, height - size) and [0, width - size), as released."""
    room = jnp.maximum(jnp.array(shape[:2], jnp.int32) - size, 1)
    return tuple(jax.random.randint(key, (2,), 0, room, jnp.int32))


def _window(corner: tuple[Array, Array], size: Array, shape: tuple[int, ...]) -> tuple[Array, Array, Array]:
    """(bool [h, w, 1] of a window, and each pixel's row and column in it)."""
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


def _bumps(key: Array, x: Array, eps: Array) -> Array:
    """A grid of bumps, a fifth of the height each, with random signs and directions."""
    side = x.shape[0] // 5
    first = (x.shape[0] - 5 * side) // 2
    cells = tuple((length - first) // side for length in x.shape[:2])
    key_turn, key_sign = jax.random.split(key)
    turn = jax.random.bernoulli(key_turn, shape=(*cells, 1, 1))
    bump = jnp.asarray(_bump(side), x.dtype)
    bumps = jnp.where(turn, bump.T[None, None], bump[None, None])[..., None] * _signs(
        key_sign, (*cells, 1, 1, x.shape[2]), x.dtype
    )
    grid = bumps.transpose(0, 2, 1, 3, 4).reshape(cells[0] * side, cells[1] * side, x.shape[2])
    after = [length - first - cell * side for length, cell in zip(x.shape[:2], cells, strict=True)]
    return _scaled(jnp.pad(grid, [(first, after[0]), (first, after[1]), (0, 0)]), eps)


def _l2_proposal(key: Array, level: Array, sides: np.ndarray, delta: Array, eps: Array) -> Array:
    """Clears the second window and fills the first with its own shape plus a bump, and with the energy of both."""
    key_corner, key_other, key_turn, key_sign = jax.random.split(key, 4)
    size = jnp.asarray(sides)[level]
    inside, row, column = _window(_corner(key_corner, size, delta.shape), size, delta.shape)
    other, _, _ = _window(_corner(key_other, size, delta.shape), size, delta.shape)
    row, column = (jnp.clip(at, 0, sides[0] - 1) for at in (row, column))
    turn = jax.random.bernoulli(key_turn)
    row, column = jnp.where(turn, column, row), jnp.where(turn, row, column)
    bump = jnp.asarray(_bump_table(tuple(sides)), delta.dtype)[level, row, column][..., None]
    sign = _signs(key_sign, (1, 1, delta.shape[2]), delta.dtype)

    own = jnp.where(inside, delta, 0)
    new = jnp.where(inside, bump * sign, 0) + own / (TINY + _per_channel(own))
    free = jnp.maximum(eps**2 - jnp.sum(delta**2), 0) / delta.shape[2]
    energy = free + jnp.sum(jnp.where(inside | other, delta, 0) ** 2)
    new = new / (TINY + _per_channel(new)) * jnp.sqrt(energy)
    return _scaled(jnp.where(inside, new, jnp.where(other, 0, delta)), eps)


def _per_channel(image: Array) -> Array:
    return jnp.sqrt(jnp.sum(image**2, axis=(0, 1), keepdims=True))


def _scaled(delta: Array, eps: Array) -> Array:
    return delta / (TINY + jnp.sqrt(jnp.sum(delta**2))) * eps


def _bump_table(sides: tuple[int, ...]) -> np.ndarray:
    """[levels, side, side] of the bumps of all window sizes, padded to the largest, which is the first."""
    return np.stack([np.pad(_bump(side), (0, sides[0] - side)) for side in sides])


def _bump(side: int) -> np.ndarray:
    """[side, side], of L2 length one: two half-planes of opposite sign, each a pyramid of nested rectangles."""
    bump = np.concatenate([_pyramid(side // 2, side), -_pyramid(side - side // 2, side)])
    return bump / np.sqrt((bump**2).sum())


def _pyramid(height: int, width: int) -> np.ndarray:
    """[height, width], of L2 length one: square m, of side 2 m + 1 around the centre, adds 1 / (m + 1)^2."""
    row, column = np.arange(height) - height // 2, np.arange(width) - width // 2
    ring = np.maximum(np.abs(row)[:, None], np.abs(column)[None, :])
    rings = max(height // 2, width // 2) + 1
    pyramid = np.sum([(ring <= m) / (m + 1) ** 2 for m in range(rings)], axis=0)
    return pyramid / np.sqrt((pyramid**2).sum())
