"""Wrappers that turn a network of any library into a `logits_fn` on images in [0, 1].

A wrapper of a `jax.tree_util.Partial` is a `Partial` of the same arrays, so that `autoattack` reuses its programs for
other arrays of these shapes. A network may take keys, (x, keys [batch]) -> logits; the wrapper then takes them too.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.tree_util import Partial
from jax.typing import ArrayLike

from lt_adv.attacks import checks
from lt_adv.attacks.signatures import KeyedLogitsFn, LogitsFn, PyTree

Network = LogitsFn | KeyedLogitsFn
AVERAGES = ("logits", "probabilities")


def normalized(logits_fn: Network, mean: ArrayLike, std: ArrayLike) -> Callable[..., Array]:
    """Returns x -> logits_fn((x - mean) / std), which normalises inside: `eps` is a radius in pixels.

    Args:
      logits_fn: network of normalised images [batch, ..., channels], any function that an attack takes.
      mean: scalar or [channels], in the units of x.
      std: positive, scalar or [channels], in the units of x.

    Returns:
      The network of x [batch, ..., channels]; a `jax.tree_util.Partial` if `logits_fn` is one.

    Raises:
      ValueError: for a mean or std that is not finite, a std that is not positive, and shapes that do not fit.

    Examples:
      >>> logits_fn = lambda x: x @ jnp.array([[1.0, -1.0], [-1.0, 1.0]])
      >>> network = attacks.normalized(logits_fn, mean=[0.5, 0.25], std=0.25)
      >>> network(jnp.array([[0.5, 0.375]]))
      Array([[-0.5,  0.5]], dtype=float32)
    """
    _check_function("logits_fn", logits_fn)
    mean, std = checks.as_array("mean", mean), checks.as_array("std", std)
    for name, array in (("mean", mean), ("std", std)):
        if array.ndim > 1:
            raise ValueError(f"{name} must be a scalar or one value per channel, got shape {array.shape}.")
        values = checks.concrete_values(array)
        if values is not None and not np.isfinite(values).all():
            raise ValueError(f"{name} must be finite, got {values}.")
        if name == "std" and values is not None and not (values > 0).all():
            raise ValueError(f"std must be positive, got {values}.")
    return _wrap(_normalized, [logits_fn], mean, std)


def channels_first(logits_fn: Network) -> Callable[..., Array]:
    """Returns x -> logits_fn(x with the last axis moved to position 1): a network of NCHW, attacked on NHWC images.

    Attacks take images of any layout, so that NCHW images are attacked without this wrapper, except by `square`, and
    `autoattack` with it, which draw squares of the axes 1 and 2. `normalized` has its channels on the last axis:
    normalized(channels_first(logits_fn), mean, std).

    Args:
      logits_fn: network of [batch, channels, height, width], or of other spatial axes.

    Returns:
      The network of x [batch, height, width, channels]; a `jax.tree_util.Partial` if `logits_fn` is one.

    Raises:
      ValueError: if logits_fn is not a function, or for x without spatial axes.

    Examples:
      >>> logits_fn = lambda x: x.mean(axis=(2, 3))  # [batch, channels, height, width] -> [batch, channels]
      >>> attacks.channels_first(logits_fn)(jnp.zeros((2, 8, 8, 3)).at[0, ..., 1].set(1))
      Array([[0., 1., 0.],
             [0., 0., 0.]], dtype=float32)
    """
    _check_function("logits_fn", logits_fn)
    return _wrap(_channels_first, [logits_fn])


def select_output(logits_fn: Callable[..., PyTree], index: int | str) -> Callable[..., Array]:
    """Returns x -> logits_fn(x)[index], for a network that returns a tuple, a list or a dict.

    Args:
      logits_fn: network of several outputs, one of which are logits [batch, classes].
      index: position of the logits in the tuple, or their key in the dict.

    Returns:
      The network of one output; a `jax.tree_util.Partial` if `logits_fn` is one.

    Raises:
      ValueError: if logits_fn is not a function, has one output, or no output `index`.

    Examples:
      >>> features_and_logits = lambda x: (x, x @ jnp.array([[1.0, -1.0], [-1.0, 1.0]]))
      >>> attacks.select_output(features_and_logits, 1)(jnp.array([[0.5, 0.375]]))
      Array([[ 0.125, -0.125]], dtype=float32)
    """
    _check_function("logits_fn", logits_fn)
    return _wrap(_select_output, [logits_fn], options=(index,))


def ensemble(logits_fns: Sequence[Network], average: str = "logits") -> Callable[..., Array]:
    """Returns the average of K networks: z(x) = 1/K sum_k z_k(x), or log(1/K sum_k softmax z_k(x)).

    The mean of log-probabilities is not a third choice: it differs from the mean of logits by a number per image, on
    which no objective of `attacks` depends.

    Args:
      logits_fns: K networks of the same classes. Either all take keys or none; network k gets fold_in(key, k) for
        each key, so that their draws are independent.
      average: "logits", or "probabilities" for an ensemble that predicts by the mean of its probabilities.

    Returns:
      The network of the ensemble; a `jax.tree_util.Partial` if all networks are.

    Raises:
      ValueError: without networks, for an unknown average, or if their logits have different shapes.

    Examples:
      >>> first, second = lambda x: x, lambda x: 3 * x
      >>> attacks.ensemble([first, second])(jnp.array([[0.5, 0.25]]))
      Array([[1. , 0.5]], dtype=float32)

    References:
      Dong et al., "Boosting adversarial attacks with momentum", CVPR 2018, section 3.2, for the mean of logits.
      Liu et al., "Delving into transferable adversarial examples and black-box attacks", ICLR 2017, for that of
      probabilities.
    """
    if not isinstance(logits_fns, Sequence) or not logits_fns:
        given = "none" if isinstance(logits_fns, Sequence) else type(logits_fns).__name__
        raise ValueError(f"logits_fns must be a sequence of at least one network, got {given}.")
    for k, logits_fn in enumerate(logits_fns):
        _check_function(f"logits_fns[{k}]", logits_fn)
    if average not in AVERAGES:
        raise ValueError(f"Unknown average {average!r}. There are: {', '.join(AVERAGES)}.")
    return _wrap(_ensemble, logits_fns, options=(average,))


@dataclasses.dataclass(frozen=True)
class _Wrapped:
    """The function of a `Partial`. It is equal to others of the same functions, so that they share their programs."""

    wrapper: Callable[..., Array]  # (*options, networks, *arrays, x, *keys) -> logits
    functions: tuple[Callable[..., Any], ...]  # those of the networks, which are `Partial`s
    options: tuple[Any, ...]

    def __call__(self, *args: Any) -> Array:
        return self.wrapper(*self.options, *args)


def _wrap(
    wrapper: Callable[..., Array],
    networks: Sequence[Callable[..., Any]],
    *arrays: Array,
    options: tuple[Any, ...] = (),
) -> Callable[..., Array]:
    """Returns (x, *keys) -> wrapper(*options, networks, *arrays, x, *keys)."""
    if all(isinstance(network, Partial) for network in networks):
        functions = tuple(network.func for network in networks)  # type: ignore[attr-defined]
        return Partial(_Wrapped(wrapper, functions, options), list(networks), *arrays)
    return partial(wrapper, *options, networks, *arrays)


def _normalized(networks: Sequence[Callable[..., Array]], mean: Array, std: Array, x: Array, *keys: Array) -> Array:
    (logits_fn,) = networks
    if not jnp.issubdtype(jnp.result_type(x), jnp.floating):
        raise ValueError(f"x must be floating, got {jnp.result_type(x)}: divide uint8 images by 255.")

    def per_channel(name: str, array: Array) -> Array:
        if array.size not in (1, jnp.shape(x)[-1]):
            raise ValueError(
                f"{name} has {array.size} values, but the last axis of x {jnp.shape(x)} has {jnp.shape(x)[-1]}: give a "
                "scalar or one value per channel, and attack a network of NCHW by attacks.channels_first."
            )
        return array.astype(jnp.result_type(x)).reshape((1,) * (jnp.ndim(x) - 1) + (-1,))

    return logits_fn((x - per_channel("mean", mean)) / per_channel("std", std), *keys)


def _channels_first(networks: Sequence[Callable[..., Array]], x: Array, *keys: Array) -> Array:
    (logits_fn,) = networks
    if jnp.ndim(x) < 3:
        raise ValueError(f"x must be images [batch, height, width, channels], got shape {jnp.shape(x)}.")
    return logits_fn(jnp.moveaxis(x, -1, 1), *keys)


def _select_output(index: int | str, networks: Sequence[Callable[..., PyTree]], x: Array, *keys: Array) -> Array:
    (logits_fn,) = networks
    outputs = logits_fn(x, *keys)
    if isinstance(outputs, jax.Array):
        raise ValueError(f"logits_fn returns one array {outputs.shape}, not several outputs: leave select_output out.")
    try:
        selected: Array = outputs[index]
    except (KeyError, IndexError, TypeError):
        there = f"the keys {list(outputs)}" if hasattr(outputs, "keys") else f"a {type(outputs).__name__}"
        if isinstance(outputs, (tuple, list)):
            there += f" of {len(outputs)}"
        raise ValueError(f"logits_fn has no output {index!r}: it returns {there}.") from None
    return selected


def _ensemble(average: str, networks: Sequence[Callable[..., Array]], x: Array, *keys: Array) -> Array:
    every = []
    for k, logits_fn in enumerate(networks):
        own = [jax.vmap(jax.random.fold_in, (0, None))(key, k) for key in keys]
        every.append(checks.check_logits(logits_fn(x, *own), x))
    if len({logits.shape for logits in every}) > 1:
        raise ValueError(f"logits_fns must have the same classes, got {[logits.shape[-1] for logits in every]}.")
    stacked = jnp.stack(every)
    return jnp.mean(stacked, axis=0) if average == "logits" else _log_mean_probability(stacked)


@checks.constants_allowed
def _log_mean_probability(logits: Array) -> Array:
    """[k, batch, classes] -> [batch, classes], in the log domain: a probability that underflows keeps its gradient."""
    return jax.nn.logsumexp(jax.nn.log_softmax(logits), axis=0) - math.log(len(logits))


def _check_function(name: str, value: object) -> None:
    if not callable(value):
        raise ValueError(f"{name} must be a function x [batch, ...] -> logits, got {type(value).__name__}.")
