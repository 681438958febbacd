"""Post-hoc adjustments of logits, applied by the evaluator alone: the attacks that train never see them.

Each is `adjustment(variables, features, head, class_counts, *, options...) -> logits`, differentiable in `features`, so
an evaluation attack goes through it. `variables` are the network's {"params", "batch_stats"} and, for adjustments that
need what a method kept, its "method_state"; `features` are [batch, d]; `head(features) -> logits` is the trained head;
`class_counts` [classes], concrete and positive, are those of the training set.
"""

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np

from lt_adv.models.heads import length
from lt_adv.models.layers import Array
from lt_adv.runtime import registry

Adjustment = Callable[..., Array]
Head = Callable[[Array], Array]
LINEAR, COSINE = ("linear", "linear_no_bias"), ("cosine", "cosine_plus")
NETWORK = ("params", "batch_stats")


def none(variables: Any, features: Array, head: Head, class_counts: Any) -> Array:
    """The logits as they are."""
    return head(features)


def boundary(
    variables: Any, features: Array, head: Head, class_counts: Any, *, scale: float = 10.0, tau_p: float = 0.0
) -> Array:
    """z_c <- scale z_c - tau_p log pi_c, pi = class_counts / sum: RoBal's boundary adjustment (Wu et al. 2021).

    For a cosine head at scale 1. tau_p > 0 favours the rare classes, tau_p = 0 only rescales.
    """
    return logit_adjustment(variables, features, lambda f: scale * head(f), class_counts, tau=tau_p)


def logit_adjustment(variables: Any, features: Array, head: Head, class_counts: Any, *, tau: float = 1.0) -> Array:
    """z_c <- z_c - tau log pi_c, pi = class_counts / sum: post-hoc logit adjustment (Menon et al. 2021)."""
    logits = head(features)
    counts = _counts(class_counts, logits)
    return logits - tau * jnp.asarray(np.log(counts / counts.sum()), logits.dtype)


def cdt(variables: Any, features: Array, head: Head, class_counts: Any, *, tau: float = 0.3) -> Array:
    """z_c <- z_c / n_c^tau: the class-dependent temperature (Ye et al. 2020), after training instead of in it."""
    logits = head(features)
    return logits / jnp.asarray(_counts(class_counts, logits) ** tau, logits.dtype)


def tau_norm(variables: Any, features: Array, head: Head, class_counts: Any, *, tau: float = 1.0) -> Array:
    """z_c <- f . w_c / |w_c|^tau, without the bias: tau-normalisation of a linear head (Kang et al. 2020)."""
    kernel = variables["params"]["head"]["kernel"]
    return jnp.dot(features, kernel / length(kernel, axis=0) ** tau, precision="highest")


def tde(variables: Any, features: Array, head: Head, class_counts: Any, *, alpha: float = 0.1) -> Array:
    """z(f) <- z(f) - alpha (f . m / |f|) z(m): total direct effect (Tang et al. 2020), for a cosine head z.

    With the head s (f / |f|) . p_c that is s (f / |f| - alpha cos(f, m) m) . p_c, for z(m) |m| = s m . p_c. m [d] is
    the running mean of feature directions that method `tde` keeps, as it is, not normalised.
    """
    mean = variables["method_state"]["feature_mean"]
    along = jnp.dot(features / length(features, axis=-1), mean, precision="highest")
    return head(features) - alpha * along[:, None] * head(mean[None])


def _counts(class_counts: Any, logits: Array) -> np.ndarray:
    """float64 [classes]; ValueError for counts that are not positive or not one per class."""
    counts = np.asarray(class_counts, np.float64)
    if counts.shape != logits.shape[-1:] or not (counts > 0).all():
        raise ValueError(
            f"An adjustment by class needs a positive count for each of {logits.shape[-1]} classes, "
            f"not {counts.tolist()}."
        )
    return counts


def needed(adjustment: Mapping[str, Any], variables: Mapping[str, Any]) -> dict[str, Any]:
    """What `adjusted` reads of `variables`: the network's, and what the adjustment needs of "method_state".

    ValueError where that is not there.
    """
    names, kept = METHOD_STATE.get(adjustment["name"], ()), variables.get("method_state", {})
    if missing := [name for name in names if name not in kept]:
        raise ValueError(f"The adjustment {adjustment['name']!r} needs {missing[0]!r}, which was not kept in training.")
    network = {name: variables[name] for name in NETWORK if name in variables}
    return network | ({"method_state": {name: kept[name] for name in names}} if names else {})


def adjusted(model: Any, adjustment: Mapping[str, Any], class_counts: Any) -> Callable[[Any, Array], Array]:
    """(variables, x) -> logits of `model` in evaluation mode with the adjustment in them: what is evaluated."""
    adjust = create(adjustment)

    def apply(variables: Any, x: Array) -> Array:
        network = {name: variables[name] for name in NETWORK if name in variables}
        _, out = model.apply(network, x, train=False)  # these logits are not used, and so not computed under jit
        head = partial(model.apply, network, method=lambda classifier, features: classifier.head(features))
        return adjust(variables, out["features"], head, class_counts)

    return apply


ADJUSTMENTS: Mapping[str, Adjustment] = {
    "none": none,
    "boundary": boundary,
    "logit_adjustment": logit_adjustment,
    "cdt": cdt,
    "tau_norm": tau_norm,
    "tde": tde,
}
METHOD_STATE = {"tde": ("feature_mean",)}  # what an adjustment reads of what a method kept
HEADS = {"tau_norm": LINEAR, "tde": COSINE}  # which heads an adjustment is of, where it is not of any


def create(config: Mapping[str, Any], head: str | None = None) -> Adjustment:
    """`{"name": "boundary", "scale": 10, "tau_p": 0.1}` -> f(variables, features, head, class_counts) -> logits.

    As in `models.create`, an option of another adjustment is left unused; one of none of them raises ValueError, and so
    does an adjustment that is none of the head of that name.
    """
    takes = {choice: inspect.getfullargspec(function).kwonlydefaults or {} for choice, function in ADJUSTMENTS.items()}
    name, options = registry.select_options("adjustment", config, takes)
    if head and head not in HEADS.get(name, (head,)):
        raise ValueError(f"The adjustment {name!r} is for the heads {', '.join(HEADS[name])}, not for {head!r}.")
    return partial(ADJUSTMENTS[name], **options)
