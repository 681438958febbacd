"""`attacks.jit`: the jitted form of an attack, with the network's variables as an argument."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax import Array

from lt_adv.attacks import _expectation, checks
from lt_adv.attacks._autoattack import autoattack
from lt_adv.attacks._expectation import Expectation
from lt_adv.attacks.signatures import Attack, PyTree


def jit(
    attack: Attack, apply: Callable[[PyTree, Array], Array] | Expectation, **options: Any
) -> Callable[[Array, PyTree, Array, Array], Array]:
    """Returns a jitted attack that takes the variables of the network as an argument.

    It compiles once for all variables of the same shapes. An attack that is called outside jit on a new closure over
    the variables is traced again at every call.

    Args:
      attack: `fgsm`, `pgd`, `mim`, `cw`, or any function attack(key, logits_fn, x, y, **options) -> x_adv.
      apply: (variables, x [batch, ...]) -> logits [batch, classes]; for a randomised network
        `expectation(apply, num_samples)` of (variables, x, keys [batch]) -> logits.
      **options: keyword arguments of the attack.

    Returns:
      f(key, variables, x, y) -> x_adv. Its inputs may be sharded over devices; XLA chooses the sharding of x_adv, in
      general that of x. Outside a trace, every call checks the values of x and of the labels y, as the attack does.

    Raises:
      ValueError: for an option that the attack does not have. Values are checked when f is first called.

    Examples:
      >>> apply = lambda weight, x: x @ weight
      >>> attack = attacks.jit(attacks.pgd, apply, eps=0.125, step_size=0.0625, num_steps=5)
      >>> weight = jnp.array([[1.0, -1.0], [-1.0, 1.0]])
      >>> attack(jax.random.key(0), weight, jnp.array([[0.5, 0.375]]), jnp.array([0]))
      Array([[0.375, 0.5  ]], dtype=float32)
    """
    if attack is autoattack:
        raise ValueError("autoattack drives compiled attacks from the host and cannot be compiled: call it.")
    parameters = inspect.signature(attack).parameters
    try:
        inspect.signature(attack).bind_partial(**options)
    except TypeError as error:
        raise ValueError(f"{getattr(attack, '__name__', attack)} cannot take these options: {error}.") from None

    @jax.jit
    def compiled(key: Array, variables: PyTree, x: Array, y: Array) -> Array:
        return attack(key, _expectation.with_variables(apply, variables), x, y, **options)

    bounds = options.get("bounds", parameters["bounds"].default) if "bounds" in parameters else None

    classes: dict[tuple[int, ...], int | None] = {}  # by the shape of x

    def num_classes(variables: PyTree, x: Array) -> int | None:
        if np.shape(x) not in classes:
            function, num_samples = _expectation.split(apply)
            keys = () if num_samples is None else (jax.random.split(jax.random.key(0), len(x)),)
            logits = jax.eval_shape(function, variables, x, *keys)  # the attack checks that they are one array
            classes[np.shape(x)] = logits.shape[-1] if getattr(logits, "ndim", 0) == 2 else None
        return classes[np.shape(x)]

    @functools.wraps(compiled)
    def call(key: Array, variables: PyTree, x: Array, y: Array) -> Array:
        if bounds is not None:
            checks.check_images(x, checks.check_bounds(bounds))
            if np.ndim(y) == 1 and checks.concrete_values(y) is not None:  # `kl_divergence` takes probabilities
                checks.check_labels(y, len(x), num_classes(variables, x))
        return compiled(key, variables, x, y)

    call.lower, call.trace = compiled.lower, compiled.trace  # type: ignore[attr-defined]
    return call
