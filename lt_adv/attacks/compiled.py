"""`attacks.compile`: the jitted form of an attack, with the network's variables as an argument."""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
from jax import Array


def compile(
    attack: Callable[..., Array], apply: Callable[[Any, Array], Array], **options: Any
) -> Callable[[Array, Any, Array, Array], Array]:
    """Jits an attack once for all variables of the same shapes.

    An attack called outside jit on a fresh closure over the variables is traced again at every call; here the variables
    are an argument.

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
    try:
        inspect.signature(attack).bind_partial(**options)
    except TypeError as error:
        raise ValueError(f"{getattr(attack, '__name__', attack)} cannot take these options: {error}.") from None

    @jax.jit
    def compiled(key: Array, variables: Any, x: Array, y: Array) -> Array:
        return attack(key, partial(apply, variables), x, y, **options)

    return compiled
