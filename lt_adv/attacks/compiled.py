"""`attacks.compile`: the jitted form of an attack, with the network's variables as an argument."""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np
from jax import Array
from jax.sharding import NamedSharding, PartitionSpec

from lt_adv.attacks import loop


def compile(
    attack: Callable[..., Array], apply: Callable[[Any, Array], Array], **options: Any
) -> Callable[[Array, Any, Array, Array], Array]:
    """Jits an attack once for all variables of the same shapes.

    An attack called outside jit on a fresh closure over the variables is traced again at every call; here the variables
    are an argument. On CPU an attack of more than 10 steps runs as a host loop over one jitted chunk of steps, with
    the same result bit for bit (why: see `loop`).

    Args:
      attack: `fgsm`, `pgd`, `mim`, `cw`, or any function attack(key, logits_fn, x, y, **options) -> x_adv.
      apply: (variables, x[batch, ...]) -> logits[batch, classes].
      **options: the attack's keyword arguments.

    Returns:
      f(key, variables, x, y) -> x_adv. The inputs may be sharded over devices; x_adv is sharded as XLA chooses, in
      general as x is.

    Raises:
      ValueError: for an option that the attack does not have. Values are checked when f is first called.
    """
    signature = inspect.signature(attack)
    try:
        bound = signature.bind_partial(**options)
    except TypeError as error:
        raise ValueError(f"{getattr(attack, '__name__', attack)} cannot take these options: {error}.") from None
    bound.apply_defaults()
    num_steps = bound.arguments.get("num_steps", 1)
    plan = getattr(attack, "plan", None)
    chunk = loop.chunk_length(num_steps) if plan and isinstance(num_steps, int) else num_steps

    @jax.jit
    def whole(key: Array, variables: Any, x: Array, y: Array) -> Array:
        return attack(key, partial(apply, variables), x, y, **options)

    if chunk == num_steps:
        return whole

    def planned(key: Array, variables: Any, x: Array, y: Array) -> loop.Iteration:
        assert plan is not None
        return plan(key, partial(apply, variables), x, y, **options)

    @jax.jit
    def advance(first: bool, carry: Any, key: Array, variables: Any, x: Array, y: Array) -> tuple[Any, Array]:
        iteration = planned(key, variables, x, y)
        # The start is computed in every chunk and used in the first: next to the chunk's gradients that is nothing, and
        # so one program does it all.
        carry = jax.tree.map(partial(jax.numpy.where, first), iteration.carry, carry)
        carry = loop.repeat(iteration.step, carry, chunk)
        return carry, iteration.finish(carry)

    def chunked(key: Array, variables: Any, x: Array, y: Array) -> Array:
        if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves((key, variables, x, y))):
            return whole(key, variables, x, y)  # inside somebody else's jit there is no host to loop on
        home = _home(x, variables)
        shapes = jax.eval_shape(lambda *args: planned(*args).carry, key, variables, x, y)
        carry = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
        for i in range(num_steps // chunk):
            # Every chunk finds its carry placed alike, or jit would compile again for the second one.
            carry = jax.tree.map(partial(_put, home, len(x)), carry)
            carry, x_adv = advance(i == 0, carry, key, variables, x, y)
        return x_adv

    return chunked


def _home(x: Array, variables: Any) -> jax.sharding.Sharding | None:
    """Where the carry belongs: with x, or with the variables on all their devices alike; None if jit may choose."""
    if getattr(x, "committed", False):
        return x.sharding
    for leaf in jax.tree.leaves(variables):
        if getattr(leaf, "committed", False):
            sharding = leaf.sharding
            return NamedSharding(sharding.mesh, PartitionSpec()) if isinstance(sharding, NamedSharding) else sharding
    return None


def _put(home: jax.sharding.Sharding | None, batch: int, leaf: Any) -> Array:
    """`leaf` on the devices of `home`, its batch dimension divided as that of `home`."""
    if isinstance(home, NamedSharding):
        per_example = leaf.ndim > 0 and leaf.shape[0] == batch
        home = NamedSharding(home.mesh, PartitionSpec(*home.spec[:1]) if per_example else PartitionSpec())
    return jax.device_put(leaf, home)
