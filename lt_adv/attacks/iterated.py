"""What AutoAttack's attacks have in common: each is one rolled loop over examples that know nothing of each other.

An attack is a start, which looks at no network, and a step, which asks it once or twice. All that an example's next
step needs is in its row of the state, the number of steps it has taken too; so examples at different steps can share a
batch, and `slots` puts a new one wherever one is done.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from lt_adv.attacks import norms
from lt_adv.attacks.convolutions import canonical
from lt_adv.attacks.starts import example_keys

Bounds = tuple[float, float]
Network = Callable[[Array, Array], Array]  # (x [b, ...], one key per example [b]) -> logits [b, classes]


class State(Protocol):
    """A NamedTuple of arrays, one row per example."""

    steps_taken: Array  # int32 [b]
    broken: Array  # bool [b]: a point of the ball that is classified wrongly was found
    x_adv: Array  # [b, ...] that point; otherwise the strongest one, by the attack's own measure


class Iterated(NamedTuple):
    """An attack, up to its network, its images and its radius."""

    begin: Callable[..., Any]  # (keys [b], x, y, target [b], eps [b], round [b]) -> State
    step: Callable[[Network, Any], Any]  # (network, state) -> state
    num_steps: int  # steps of one round
    rounds: int  # restarts, or targets
    random: bool = False  # whether the network takes one key per example besides x
    forwards: int = 1  # forward passes of one step,
    gradients: int = 1  # as many of them with a backward pass
    carries: tuple[str, ...] = ()  # what, with a new start, makes up the state in the midst of a round; () if too much


def check(x: Array, y: Array, x_init: Array | None, bounds: Bounds, **counts: int) -> Bounds:
    """The bounds, as a tuple; ValueError for what cannot be meant. `counts` are numbers of steps and the like, >= 0."""
    low, high = bounds
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"x must be floating, inside bounds, got {x.dtype}: divide uint8 images by 255.")
    if jnp.finfo(x.dtype).bits < 32:  # whose rounding leaves the ball, by a tenth of the radius in bfloat16
        raise ValueError(f"x must be float32 or float64, got {x.dtype}: cast it; logits_fn may compute in {x.dtype}.")
    if y.shape[:1] != x.shape[:1]:
        raise ValueError(f"x and y must have the same batch size, got shapes {x.shape} and {y.shape}.")
    if x_init is not None and jnp.shape(x_init) != x.shape:
        raise ValueError(f"x_init must have the shape of x, {x.shape}, got {jnp.shape(x_init)}.")
    for name, count in counts.items():
        if isinstance(count, bool) or not isinstance(count, int) or count < 0:
            raise ValueError(f"{name} must be a Python int, 0 or more, got {count!r}.")
    if not low < high:
        raise ValueError(f"bounds must be (low, high) with low < high, got {(low, high)}.")
    return low, high


def logits_of(network: Network, x: Array, keys: Array) -> Array:
    """The network's logits, in the type of x; ValueError unless they are one array [batch, classes]."""
    logits = network(x, keys)
    if getattr(logits, "ndim", 0) != 2 or logits.shape[:1] != x.shape[:1]:
        shapes = jax.tree.map(jnp.shape, logits)
        raise ValueError(f"logits_fn must return one array [batch, classes], got {shapes}.")
    return logits.astype(x.dtype)


def num_classes(logits_fn: Callable[..., Array], x: Array, random: bool = False) -> int:
    """Classes of the network; traces it once and computes nothing."""
    keys = (example_keys(jax.random.key(0), x.shape[0]),) if random else ()
    return jax.eval_shape(logits_fn, x, *keys).shape[-1]


def value_and_gradient(value: Callable[[Array], tuple[Array, Array]], x: Array) -> tuple[Array, Array, Array]:
    """(values [b], logits, gradient of their sum [b, ...]) for value(x) -> (values, logits).

    Where the gradient is not a number it counts as zero: a step along it would leave the images.
    """

    def total(x: Array) -> tuple[Array, tuple[Array, Array]]:
        values, logits = value(x)
        if values.shape != x.shape[:1]:
            raise ValueError(f"objective must return [batch] = {x.shape[:1]}, got shape {values.shape}.")
        return jnp.sum(values), (values, logits)  # a sum: each example's gradient is its own

    (_, (values, logits)), gradient = canonical(jax.value_and_grad(total, has_aux=True))(x)
    return lax.stop_gradient((values, logits, jnp.where(jnp.isnan(gradient), 0, gradient)))


def wrong(logits: Array, y: Array) -> Array:
    """bool [b]: whether the prediction is not y."""
    return jnp.argmax(logits, axis=-1) != y


def rows(mask: Array, like: Array) -> Array:
    """A mask [b], shaped to broadcast against `like` [b, ...]."""
    return mask.reshape(mask.shape + (1,) * (like.ndim - mask.ndim))


def choose(mask: Array, new: Any, old: Any) -> Any:
    """The rows of `new` where `mask` [b] holds, those of `old` elsewhere, of whole trees."""

    def pick(new: Array, old: Array) -> Array:
        return jnp.where(rows(mask, new), new, old)

    return jax.tree.map(pick, new, old)


def on_boundary(keys: Array, x: Array, norm: norms.Norm) -> Array:
    """One random displacement per example, of length one."""
    noise = jax.vmap(lambda key: norm.sample(key, x.shape[1:], x.dtype))(keys)
    return noise / jnp.maximum(norm.length(noise), jnp.finfo(x.dtype).tiny)  # a draw can be zero


def whole(attack: Iterated, key: Array, logits_fn: Callable[..., Array], x: Array, y: Array, eps: ArrayLike) -> Array:
    """All rounds of an attack on one batch, as one traceable function: x_adv, where found, else the strongest point.

    An image that is wrong already is not attacked. Target r of an image is the class that is r-th likeliest after the
    likeliest one; round r of an example draws from fold_in(its key, r).
    """
    network = logits_fn if attack.random else lambda x, _: logits_fn(x)
    keys, eps = example_keys(key, x.shape[0]), norms.per_example("eps", eps, x)
    varies = jnp.zeros_like(x).reshape(len(x), -1).sum(axis=1)  # over every mesh axis that x varies over
    eps = eps.reshape(-1) + varies
    logits = logits_of(network, x, keys)
    ranking = jnp.argsort(-logits, axis=-1)

    def one_round(r: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        x_adv, broken = carry
        round_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, r)
        target = jnp.take(ranking, (r + 1) % logits.shape[-1], axis=-1)  # what is not targeted looks away
        target += varies.astype(target.dtype)
        state = attack.begin(round_keys, x, y, target, eps, jnp.full_like(y, r))
        state = lax.fori_loop(0, attack.num_steps, lambda _, state: attack.step(network, state), state)
        return choose(broken, x_adv, state.x_adv), broken | state.broken

    carry = lax.stop_gradient((x, wrong(logits, y)))
    return lax.fori_loop(0, attack.rounds, one_round, carry)[0]
