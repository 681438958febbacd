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

from lt_adv.attacks import inputs, norms
from lt_adv.attacks.cpu_convolutions import with_fast_cpu_convolutions
from lt_adv.attacks.initialization import example_keys
from lt_adv.attacks.inputs import Bounds
from lt_adv.attacks.objectives import prediction

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


def check(x: Array, y: Array, bounds: Any) -> Bounds:
    """The bounds, as floats; ValueError unless images and labels are what an attack can take."""
    bounds = inputs.check_bounds(bounds)
    inputs.check_images(x, bounds)
    inputs.check_labels(y, len(x))
    return bounds


def logits_of(network: Network, x: Array, keys: Array) -> Array:
    """The network's logits, see `inputs.check_logits`."""
    return inputs.check_logits(network(x, keys), x)


def _with_keys(logits_fn: Callable[..., Array], random: bool) -> Network:
    return logits_fn if random else lambda x, _: logits_fn(x)


def value_and_gradient(value: Callable[[Array], tuple[Array, Array]], x: Array) -> tuple[Array, Array, Array]:
    """(values [b], logits, gradient of their sum [b, ...]) for value(x) -> (values, logits).

    An entry of the gradient that is not finite counts as zero.
    """

    def total(x: Array) -> tuple[Array, tuple[Array, Array]]:
        values, logits = value(x)
        inputs.check_values(values, x)
        return jnp.sum(values), (values, logits)  # a sum: each example's gradient is its own

    (_, (values, logits)), gradient = with_fast_cpu_convolutions(jax.value_and_grad(total, has_aux=True))(x)
    return lax.stop_gradient((values, logits, norms.finite(gradient)))


def comparable(values: Array, x: Array) -> Array:
    """Values of an objective in the type of x and finite, NaN the smallest, so that the larger one can be chosen."""
    limit = float(jnp.finfo(x.dtype).max)
    return jnp.nan_to_num(values.astype(x.dtype), nan=-limit, posinf=limit, neginf=-limit)


def is_wrong(logits: Array, y: Array) -> Array:
    """bool [b]: whether the prediction is not y, which it never is where logits are not finite."""
    return prediction(logits) != y


def expand_mask(mask: Array, like: Array) -> Array:
    """A mask [b], shaped to broadcast against `like` [b, ...]."""
    return mask.reshape(mask.shape + (1,) * (like.ndim - mask.ndim))


def where_rows(mask: Array, new: Any, old: Any) -> Any:
    """The rows of `new` where `mask` [b] holds, those of `old` elsewhere, of whole trees."""

    def pick(new: Array, old: Array) -> Array:
        return jnp.where(expand_mask(mask, new), new, old)

    return jax.tree.map(pick, new, old)


def on_boundary(keys: Array, x: Array, norm: norms.Norm) -> Array:
    """One random displacement per example, of length one."""
    noise = jax.vmap(lambda key: norm.sample(key, x.shape[1:], x.dtype))(keys)
    return noise / jnp.maximum(norm.length(noise), jnp.finfo(x.dtype).tiny)  # a draw can be zero


def attack_batch(
    build: Callable[[int], Iterated],
    key: Array,
    logits_fn: Callable[..., Array],
    x: Array,
    y: Array,
    eps: ArrayLike,
    *,
    random: bool = False,
    infinite: bool = False,
) -> Array:
    """All rounds of an attack on one batch, traceable: x_adv, or the strongest point of an image that is not broken.

    `build` makes the attack for a number of classes. An image that is wrong already is not attacked. Target r of an
    image is the class that is r-th likeliest after the likeliest one; round r of an example draws from
    fold_in(its key, r). `random`: see `Iterated`. `infinite`: whether eps may be.
    """
    network, y = _with_keys(logits_fn, random), y.astype(jnp.int32)
    norms.check_length("eps", eps, x.shape[0], infinite)

    def batch() -> Array:
        keys = example_keys(key, x.shape[0])
        varies = jnp.zeros_like(x).reshape(len(x), -1).sum(axis=1)  # over every mesh axis that x varies over
        radius = norms.per_example(eps, x).reshape(-1) + varies
        logits = logits_of(network, x, keys)
        classes = logits.shape[-1]
        if classes < 2:
            raise ValueError(f"logits_fn must tell two classes or more apart, got logits of {classes}.")
        inputs.check_labels(y, len(x), classes)
        ranking, attack = jnp.argsort(-logits, axis=-1), build(classes)

        def one_round(r: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
            x_adv, broken = carry
            round_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, r)
            target = jnp.take(ranking, (r + 1) % classes, axis=-1)  # what is not targeted looks away
            target += varies.astype(target.dtype)
            state = attack.begin(round_keys, x, y, target, radius, jnp.full_like(y, r))
            state = lax.fori_loop(0, attack.num_steps, lambda _, state: attack.step(network, state), state)
            return where_rows(broken, x_adv, state.x_adv), broken | state.broken

        carry = lax.stop_gradient((x, is_wrong(logits, y)))
        return lax.fori_loop(0, attack.rounds, one_round, carry)[0]

    return inputs.run(batch, key, x, y, eps)
