"""Post-hoc adjustments of logits, applied by the evaluator alone: the attacks that train never see them.

Each is `adjustment(variables, features, logits, class_counts, *, options...) -> logits`, differentiable in `features`
and `logits`, so an evaluation attack goes through it.
"""

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np

from lt_adv import lookup
from lt_adv.models.layers import Array

Adjustment = Callable[..., Array]


def none(variables: Any, features: Array, logits: Array, class_counts: Any) -> Array:
    """The logits as they are."""
    return logits


def boundary(
    variables: Any, features: Array, logits: Array, class_counts: Any, *, scale: float = 10.0, tau_p: float = 0.0
) -> Array:
    """z_c <- scale z_c - tau_p log pi_c, pi = class_counts / sum: RoBal's boundary adjustment (Wu et al. 2021).

    `logits` [batch, classes] are the cosine logits of a head at scale 1; `class_counts` [classes], concrete and
    positive, are those of the training set. tau_p > 0 favours the rare classes, tau_p = 0 only rescales. Raises
    ValueError for counts that are not positive or not one per class.
    """
    counts = np.asarray(class_counts, np.float64)
    if counts.shape != logits.shape[-1:] or not (counts > 0).all():
        raise ValueError(
            f"The boundary adjustment needs a positive count for each of {logits.shape[-1]} classes, "
            f"not {counts.tolist()}."
        )
    return scale * logits - tau_p * jnp.asarray(np.log(counts / counts.sum()), logits.dtype)


def adjusted(model: Any, adjustment: Mapping[str, Any], class_counts: Any) -> Callable[[Any, Array], Array]:
    """(variables, x) -> logits of `model` in evaluation mode with the adjustment in them: what is evaluated."""
    adjust = create(adjustment)

    def apply(variables: Any, x: Array) -> Array:
        logits, out = model.apply(variables, x, train=False)
        return adjust(variables, out["features"], logits, class_counts)

    return apply


ADJUSTMENTS: Mapping[str, Adjustment] = {"none": none, "boundary": boundary}


def create(config: Mapping[str, Any]) -> Adjustment:
    """`{"name": "boundary", "scale": 10, "tau_p": 0.1}` -> f(variables, features, logits, class_counts) -> logits.

    As in `models.create`, an option of another adjustment is left unused; one of none of them raises ValueError.
    """
    options = dict(config)
    name = options.pop("name", None)
    if name not in ADJUSTMENTS:
        raise lookup.unknown("adjustment", name, ADJUSTMENTS)
    takes = {choice: set(inspect.getfullargspec(function).kwonlyargs) for choice, function in ADJUSTMENTS.items()}
    known = set().union(*takes.values())
    for option in options:
        if option not in known:
            raise lookup.unknown(f"option of adjustment {name!r}:", option, known)
    return partial(ADJUSTMENTS[name], **{option: value for option, value in options.items() if option in takes[name]})
