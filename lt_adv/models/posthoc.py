"""Post-hoc adjustments of logits, applied in evaluation only; the training attacks use the unadjusted logits.

An adjustment is a function `adjustment(variables, features, head, class_counts, *, options...) -> logits`. It is
differentiable in `features`, so that evaluation attacks differentiate through it.

  variables: {"params", "batch_stats"} of the network, and "method_state" for adjustments that read it.
  features: [batch, d].
  head: the trained head, features -> logits.
  class_counts: [classes] concrete positive numbers, images per class of the training set.
"""

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Concatenate, cast

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from flax.typing import VariableDict
from numpy.typing import ArrayLike

from lt_adv.models.heads import safe_norm
from lt_adv.models.layers import Array
from lt_adv.runtime import registry

Head = Callable[[Array], Array]  # features [batch, d] -> logits [batch, classes]
Adjustment = Callable[Concatenate[VariableDict, Array, Head, ArrayLike, ...], Array]
LINEAR, COSINE = ("linear", "linear_no_bias"), ("cosine", "cosine_plus")
NETWORK = ("params", "batch_stats")


def none(variables: VariableDict, features: Array, head: Head, class_counts: ArrayLike) -> Array:
    """Returns the logits unchanged."""
    return head(features)


def boundary(
    variables: VariableDict,
    features: Array,
    head: Head,
    class_counts: ArrayLike,
    *,
    scale: float = 10.0,
    tau_p: float = 0.0,
) -> Array:
    """z_c <- scale z_c - tau_p log pi_c, pi = class_counts / sum: RoBal's boundary adjustment (Wu et al. 2021).

    For a cosine head of scale 1. tau_p > 0 favours the rare classes; tau_p = 0 only rescales.
    """
    return logit_adjustment(variables, features, lambda f: scale * head(f), class_counts, tau=tau_p)


def logit_adjustment(
    variables: VariableDict, features: Array, head: Head, class_counts: ArrayLike, *, tau: float = 1.0
) -> Array:
    """z_c <- z_c - tau log pi_c, pi = class_counts / sum: post-hoc logit adjustment (Menon et al. 2021)."""
    logits = head(features)
    counts = _counts(class_counts, logits)
    return logits - tau * jnp.asarray(np.log(counts / counts.sum()), logits.dtype)


def cdt(variables: VariableDict, features: Array, head: Head, class_counts: ArrayLike, *, tau: float = 0.3) -> Array:
    """z_c <- z_c / n_c^tau: class-dependent temperature (Ye et al. 2020), applied after training."""
    logits = head(features)
    return logits / jnp.asarray(_counts(class_counts, logits) ** tau, logits.dtype)


def tau_norm(
    variables: VariableDict, features: Array, head: Head, class_counts: ArrayLike, *, tau: float = 1.0
) -> Array:
    """z_c <- f . w_c / |w_c|^tau, without the bias: tau-normalisation of a linear head (Kang et al. 2020)."""
    kernel = variables["params"]["head"]["kernel"]
    return jnp.dot(features, kernel / safe_norm(kernel, axis=0) ** tau, precision="highest")


def tde(variables: VariableDict, features: Array, head: Head, class_counts: ArrayLike, *, alpha: float = 0.1) -> Array:
    """z(f) <- z(f) - alpha (f . m / |f|) z(m): total direct effect (Tang et al. 2020), for a cosine head z.

    With the head s (f / |f|) . p_c this is s (f / |f| - alpha cos(f, m) m) . p_c, because z(m) |m| = s m . p_c. m [d]
    is the running mean of feature directions of the method `tde`, not normalised.
    """
    mean = variables["method_state"]["feature_mean"]
    projection = jnp.dot(features / safe_norm(features, axis=-1), mean, precision="highest")
    return head(features) - alpha * projection[:, None] * head(mean[None])


def _counts(class_counts: ArrayLike, logits: Array) -> np.ndarray:
    """Returns the counts as float64 [classes]; raises ValueError if they are not positive or not one per class."""
    counts = np.asarray(class_counts, np.float64)
    if counts.shape != logits.shape[-1:] or not (counts > 0).all():
        raise ValueError(
            f"class_counts must be a positive count for each of {logits.shape[-1]} classes, not {counts.tolist()}."
        )
    return counts


def select_variables(adjustment: registry.Config, variables: VariableDict) -> VariableDict:
    """Returns the variables of the network and the entries of "method_state" that the adjustment reads.

    Raises:
      ValueError: if such an entry is missing.
    """
    names, method_state = METHOD_STATE.get(adjustment["name"], ()), variables.get("method_state", {})
    if missing := [name for name in names if name not in method_state]:
        raise ValueError(
            f"The adjustment {adjustment['name']!r} needs {missing[0]!r}, which training has not saved: train with "
            f"the method that saves it."
        )
    network = {name: variables[name] for name in NETWORK if name in variables}
    return network | ({"method_state": {name: method_state[name] for name in names}} if names else {})


def adjusted_logits_fn(
    model: nn.Module, adjustment: registry.Config, class_counts: ArrayLike
) -> Callable[[VariableDict, Array], Array]:
    """Returns the evaluated function (variables, x) -> adjusted logits of `model` in evaluation mode."""
    adjust = create(adjustment)

    def apply(variables: VariableDict, x: Array) -> Array:
        network = {name: variables[name] for name in NETWORK if name in variables}
        _, out = model.apply(network, x, train=False)  # jit removes the unused logits
        head = partial(model.apply, network, method=lambda classifier, features: classifier.head(features))
        return adjust(variables, out["features"], cast(Head, head), class_counts)

    return apply


ADJUSTMENTS: Mapping[str, Adjustment] = {
    "none": none,
    "boundary": boundary,
    "logit_adjustment": logit_adjustment,
    "cdt": cdt,
    "tau_norm": tau_norm,
    "tde": tde,
}
METHOD_STATE = {"tde": ("feature_mean",)}  # adjustment -> entries of "method_state" that it reads
HEADS = {"tau_norm": LINEAR, "tde": COSINE}  # adjustment -> heads it can be used with; all others take any head


def create(config: registry.Config, head: str | None = None) -> Adjustment:
    """Returns the adjustment f(variables, features, head, class_counts) -> logits that a config describes.

    As in `models.create`, options of another adjustment are ignored.

    Args:
      config: name and options, such as `{"name": "boundary", "scale": 10, "tau_p": 0.1}`.
      head: name of the network's head, to check that the adjustment can be used with it.

    Raises:
      ValueError: for a name or an option that does not exist, or a head that the adjustment cannot be used with.
    """
    defaults = {
        choice: inspect.getfullargspec(function).kwonlydefaults or {} for choice, function in ADJUSTMENTS.items()
    }
    name, options = registry.select_options("adjustment", config, defaults)
    if head and head not in HEADS.get(name, (head,)):
        raise ValueError(f"The adjustment {name!r} is for the heads {', '.join(HEADS[name])}, not for {head!r}.")
    return partial(ADJUSTMENTS[name], **options)
