"""`attacks.jit`: the jitted form of an attack, with the network's variables as an argument."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from lt_adv.attacks import _expectation, checks, norms
from lt_adv.attacks._autoattack import autoattack
from lt_adv.attacks._expectation import Expectation
from lt_adv.attacks.signatures import Attack, PyTree

ARRAY_OPTIONS = ("eps", "step_size", "x_init", "targets")  # of attacks, which a compiled one takes in each call


def jit(attack: Attack, apply: Callable[[PyTree, Array], Array] | Expectation, **options: Any) -> Callable[..., Array]:
    """Returns a jitted attack that takes the variables of the network as an argument.

    It compiles once for all variables of the same shapes. An attack that is called outside jit on a new closure over
    the variables is traced again at every call.

    Args:
      attack: `fgsm`, `pgd`, `mim`, `cw`, or any function attack(key, logits_fn, x, y, **options) -> x_adv.
      apply: (variables, x [batch, ...]) -> logits [batch, classes]; for a randomised network
        `expectation(apply, num_samples)` of (variables, x, keys [batch]) -> logits.
      **options: keyword arguments of the attack.

    Returns:
      f(key, variables, x, y, **arrays) -> x_adv, where `arrays` are options of the attack that change from call to call
      without compiling again: eps, step_size, x_init, targets. The inputs may be sharded over devices; XLA chooses the
      sharding of x_adv, in general that of x. Outside a trace, every call checks the values of x, of the labels y and
      of targets, as the attack does.

    Raises:
      ValueError: for an option that the attack does not have. Other options are checked when f is first called.

    Examples:
      >>> apply = lambda weight, x: x @ weight
      >>> attack = attacks.jit(attacks.pgd, apply, eps=0.125, step_size=0.0625, num_steps=5)
      >>> weight = jnp.array([[1.0, -1.0], [-1.0, 1.0]])
      >>> attack(jax.random.key(0), weight, jnp.array([[0.5, 0.375]]), jnp.array([0]))
      Array([[0.375, 0.5  ]], dtype=float32)
      >>> attack(jax.random.key(0), weight, jnp.array([[0.5, 0.375]]), jnp.array([0]), eps=0.25, step_size=0.125)
      Array([[0.25 , 0.625]], dtype=float32)
    """
    if attack is autoattack:
        raise ValueError("autoattack drives compiled attacks from the host and cannot be compiled: call it.")
    parameters = inspect.signature(attack).parameters
    try:
        inspect.signature(attack).bind_partial(**options)
    except TypeError as error:
        raise ValueError(f"{getattr(attack, '__name__', attack)} cannot take these options: {error}.") from None

    @jax.jit
    def compiled(key: Array, variables: PyTree, x: Array, y: Array, **arrays: ArrayLike) -> Array:
        return attack(key, _expectation.with_variables(apply, variables), x, y, **(options | arrays))

    array_options = [name for name in ARRAY_OPTIONS if name in parameters]

    bounds = options.get("bounds", parameters["bounds"].default) if "bounds" in parameters else None

    classes: dict[tuple[int, ...], int | None] = {}  # by the shape of x

    def num_classes(variables: PyTree, x: Array) -> int | None:
        if np.shape(x) not in classes:
            function, num_samples = _expectation.split(apply, "variables")
            keys = () if num_samples is None else (jax.random.split(jax.random.key(0), len(x)),)
            logits = jax.eval_shape(function, variables, x, *keys)  # the attack checks that they are one array
            classes[np.shape(x)] = logits.shape[-1] if getattr(logits, "ndim", 0) == 2 else None
        return classes[np.shape(x)]

    @functools.wraps(compiled)
    def call(key: Array, variables: PyTree, x: Array, y: Array, **arrays: ArrayLike) -> Array:
        if unknown := sorted(set(arrays) - set(array_options)):
            raise ValueError(
                f"{', '.join(unknown)} cannot be given in a call; give it to attacks.jit. What can be is: "
                f"{', '.join(array_options) or 'nothing'}."
            )
        for name in {"eps", "step_size"} & set(arrays):  # inside the compiled function their values are not known
            norms.check_length(name, arrays[name], len(x), image=x.shape[1:])
        if bounds is not None:
            checks.check_images(x, checks.check_bounds(bounds), arrays.get("x_init"))
            if np.ndim(y) == 1 and checks.concrete_values(y) is not None:  # `kl_divergence` takes probabilities
                checks.check_labels(y, len(x), num_classes(variables, x))
            if arrays.get("targets") is not None:
                checks.check_labels(arrays["targets"], len(x), num_classes(variables, x), name="targets")
        return compiled(key, variables, x, y, **arrays)

    call.lower, call.trace = compiled.lower, compiled.trace  # type: ignore[attr-defined]
    return call
