"""A network as a function of its arrays, from any function from images to logits."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from lt_adv.attacks import jaxprs, tracing
from lt_adv.attacks.signatures import LogitsFn
from lt_adv.evaluation.attack_specs import Apply, Variables


class Network(NamedTuple):
    """A network in the form that `evaluate` takes."""

    apply: Apply
    variables: Variables
    reusable: bool  # whether another network can have the same `apply`, and share its compiled programs


def from_function(logits_fn: LogitsFn, x: jax.ShapeDtypeStruct) -> Network:
    """Returns (apply, variables) with apply(variables, x) equal to logits_fn(x), for batches of any size.

    The variables are the arrays of a `jax.tree_util.Partial`, or those that any other function closes over: they are
    arguments of the programs that attack the network, and their digest identifies it.

    Args:
      logits_fn: x [b, ...] -> logits [b, C].
      x: shape of a batch of images.
    """
    if isinstance(logits_fn, jax.tree_util.Partial):
        variables = (logits_fn.args, logits_fn.keywords)
        if all(isinstance(leaf, (jax.Array, np.ndarray)) for leaf in jax.tree.leaves(variables)):
            if len(logits_fn.args) == 1 and not logits_fn.keywords:
                return Network(logits_fn.func, logits_fn.args[0], True)
            return Network(_partial(logits_fn.func), variables, True)
    _, closed_over = _trace(logits_fn, x)
    position = {id(array): i for i, array in enumerate(closed_over)}

    def apply(variables: list[jax.Array], x: jax.Array) -> jax.Array:
        if not isinstance(x, jax.core.Tracer):
            return logits_fn(x)
        traced, arrays = _trace(logits_fn, x)
        # An array that the function makes anew in each trace stays a constant.
        return traced([variables[position[id(a)]] if id(a) in position else a for a in arrays], x)

    return Network(apply, closed_over, False)


@functools.lru_cache(maxsize=8)
def _partial(function: Callable[..., jax.Array]) -> Apply:
    def apply(variables: Any, x: jax.Array) -> jax.Array:
        args, keywords = variables
        return function(*args, x, **keywords)

    return apply


def _trace(logits_fn: LogitsFn, x: jax.Array | jax.ShapeDtypeStruct) -> tuple[tracing.Traced, list[jax.Array]]:
    """Returns a function as `tracing.trace` does, with the arrays of the jitted functions that it calls."""
    closed, shape = jax.make_jaxpr(logits_fn, return_shape=True)(x)

    def without_calls(x: jax.Array) -> Any:
        results = jaxprs.walk(closed.jaxpr, closed.consts, [x], jaxprs.evaluate)
        return jax.tree.unflatten(jax.tree.structure(shape), results)

    return tracing.trace(without_calls, x)
