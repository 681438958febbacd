"""`attacks.compile`: the jitted form of an attack, with the network's variables as an argument."""

import functools
import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
from jax import Array

from lt_adv.attacks import inputs


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
      general as x is. The values of x are looked at in the first call alone: images of another scale than `bounds` are
      refused there.

    Raises:
      ValueError: for an option that the attack does not have. Values are checked when f is first called.
    """
    parameters = inspect.signature(attack).parameters
    try:
        inspect.signature(attack).bind_partial(**options)
    except TypeError as error:
        raise ValueError(f"{getattr(attack, '__name__', attack)} cannot take these options: {error}.") from None

    @jax.jit
    def compiled(key: Array, variables: Any, x: Array, y: Array) -> Array:
        return attack(key, partial(apply, variables), x, y, **options)

    bounds = options.get("bounds", getattr(parameters.get("bounds"), "default", None))
    unchecked = [bounds] if "bounds" in parameters else []

    @functools.wraps(compiled)
    def call(key: Array, variables: Any, x: Array, y: Array) -> Array:
        if unchecked:
            inputs.check_images(x, inputs.check_bounds(unchecked[0]))
            unchecked.clear()
        return compiled(key, variables, x, y)

    call.lower = compiled.lower  # type: ignore[attr-defined]
    return call
