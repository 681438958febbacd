"""Randomised networks: expectation over transformation, EOT.

An attack computes its objective and gradient as means over draws of the network, and judges a point by the mean of the
class probabilities over these draws.
"""

import dataclasses
import inspect
from collections.abc import Callable
from functools import partial
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from lt_adv.attacks import checks, tracing
from lt_adv.attacks.initialization import example_keys, fold_in
from lt_adv.attacks.signatures import KeyedLogitsFn, LogitsFn, PyTree

T = TypeVar("T")
FIRST_DRAW = np.uint32(2**31)  # folded into the key of an example for draws; restarts fold in smaller numbers


@dataclasses.dataclass(frozen=True)
class Expectation:
    """A randomised network and the number of its draws that attacks average over; see `expectation`.

    Attributes:
      logits_fn: (x [batch, ...], keys [batch]) -> logits [batch, classes].
      num_samples: number of draws.
    """

    logits_fn: KeyedLogitsFn
    num_samples: int

    def __call__(self, x: Array, keys: Array | None = None) -> Array:
        """Returns the mean class probabilities [batch, classes] over the draws with the keys fold_in(key, s).

        `keys` are one per example [batch], or one of which example i uses fold_in(key, i).
        """
        if keys is None:
            raise ValueError(
                "This function does not support randomised networks. fgsm, pgd, mim, cw, fgsm_rs, n_fgsm, apgd, "
                'apgd_targeted, and autoattack with version="rand" do; expectation is the outermost wrapper.'
            )
        function, num_samples = split(self)
        each = example_keys(keys, len(x))
        return tracing.run_compiled(lambda: scores(function, num_samples, x, each), x, each)


def expectation(logits_fn: KeyedLogitsFn, num_samples: int) -> Expectation:
    """Returns a randomised network for attacks, which average over draws: max_x' E_k[L(f(x', k), y)] in the ball.

    Objective and gradient are means over `num_samples` draws, new ones in each step. Whether a point is classified
    wrongly is decided by the largest mean probability over these draws. `apgd`, `apgd_targeted` and `autoattack` judge
    the clean images in the same way, and `autoattack` judges each adversarial example again with new draws.

    Supported by `fgsm`, `pgd`, `mim`, `cw`, `fgsm_rs`, `n_fgsm`, `apgd`, `apgd_targeted`, and `autoattack` with the
    version "rand". In `attacks.jit`, logits_fn takes (variables, x, keys).

    Args:
      logits_fn: (x [batch, ...], keys [batch]) -> logits [batch, classes]. Image i must draw from keys[i] only.
      num_samples: number of draws; memory does not depend on it.

    Returns:
      The `logits_fn` of an attack. Called itself, with (x, keys), it returns the mean probabilities [batch, classes].

    Raises:
      ValueError: if logits_fn is not a function, or num_samples is not a positive integer.

    Examples:
      >>> def logits_fn(x, keys):  # noise on each image
      ...     x = x + 0.01 * jax.vmap(lambda key: jax.random.normal(key, x.shape[1:]))(keys)
      ...     return x @ jnp.array([[1.0, -1.0], [-1.0, 1.0]])
      >>> network = attacks.expectation(logits_fn, num_samples=10)
      >>> x, y = jnp.array([[0.5, 0.375]]), jnp.array([0])
      >>> attacks.pgd(jax.random.key(0), network, x, y, eps=0.125, step_size=0.0625, num_steps=5)
      Array([[0.375, 0.5  ]], dtype=float32)

    References:
      Athalye et al., "Obfuscated gradients give a false sense of security", ICML 2018, section 4.2.
      Differs from the released code of AutoAttack, which judges a point by a single draw.
    """
    if not callable(logits_fn):
        raise ValueError(f"logits_fn must be a function (x, keys) -> logits, got {type(logits_fn).__name__}.")
    if isinstance(logits_fn, Expectation):
        raise ValueError("logits_fn is an expectation already: give it the number of draws.")
    return Expectation(logits_fn, checks.count("num_samples", num_samples, minimum=1))


def split(logits_fn: Callable[..., Array] | Expectation, *variables: str) -> tuple[Callable[..., Array], int | None]:
    """Returns the function of one draw, and the number of draws; None for a network that is not randomised.

    Raises a ValueError unless the function takes `variables`, x and, if it is randomised, keys.
    """
    function: Callable[..., Array] = logits_fn
    num_samples, names, advice = None, (*variables, "x"), ""
    if isinstance(logits_fn, Expectation):
        function, num_samples, names = logits_fn.logits_fn, logits_fn.num_samples, (*names, "keys")
    else:
        advice = ": a randomised network is given as attacks.expectation(logits_fn, num_samples)"
    if not _takes(function, len(names)):
        raise ValueError(f"The network must be a function of ({', '.join(names)}){advice}.")
    return function, num_samples


def _takes(function: Callable[..., Array], number: int) -> bool:
    """Whether a function can be called with this number of arguments; true for one without a signature."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return True
    try:
        signature.bind(*[None] * number)
    except TypeError:
        return False
    return True


def with_variables(apply: Callable[..., Array], variables: PyTree) -> LogitsFn | Expectation:
    """Returns the network of a function apply(variables, x), or of an expectation of apply(variables, x, keys)."""
    if isinstance(apply, Expectation):
        return Expectation(partial(apply.logits_fn, variables), apply.num_samples)
    return partial(apply, variables)


def mean_over_draws(draw: Callable[[Array], T], num_samples: int, x: Array, keys: Array) -> T:
    """Returns the mean of draw(fold_in(keys, s)) over the draws s, a tree of floating arrays [batch, ...] like x."""
    zero = jnp.zeros_like(x).reshape(len(x), -1).sum(axis=1)  # varies over the same mesh axes as x

    def zeros(a: jax.ShapeDtypeStruct) -> Array:
        return jnp.zeros(a.shape, a.dtype) + zero.reshape(-1, *[1] * (len(a.shape) - 1)).astype(a.dtype)

    def add(s: Array, total: T) -> T:
        return jax.tree.map(jnp.add, total, draw(fold_in(keys, s)))

    total = jax.tree.map(zeros, jax.eval_shape(draw, keys))
    return jax.tree.map(lambda a: a / num_samples, lax.fori_loop(0, num_samples, add, total))


def scores(logits_fn: KeyedLogitsFn, num_samples: int | None, x: Array, keys: Array) -> Array:
    """Returns what decides the prediction [batch, classes]: logits, or mean probabilities over `num_samples` draws."""

    def logits(keys: Array) -> Array:
        return checks.check_logits(logits_fn(x, keys), x)

    if num_samples is None:
        return logits(keys)
    return mean_over_draws(lambda keys: jax.nn.softmax(logits(keys)), num_samples, x, keys)
