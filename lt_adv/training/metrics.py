"""Training metrics: sums over all devices and over the steps since the last log step, and their averages."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.flatten_util import ravel_pytree

from lt_adv import attacks
from lt_adv.training.net import AXIS


def group_membership(groups: Mapping[str, np.ndarray] | None, num_classes: int) -> dict[str, np.ndarray]:
    """Returns for each group of classes a 0/1 vector, float32 [classes], that is 1 for its members."""
    return {name: np.isin(np.arange(num_classes), ids).astype(np.float32) for name, ids in (groups or {}).items()}


def is_correct(logits: jax.Array, label: jax.Array) -> jax.Array:
    """Returns 1 where the prediction is the label and 0 elsewhere, float32 [b]."""
    return (attacks.prediction(logits) == label).astype(jnp.float32)


def sum_over_devices(
    metrics: Mapping[str, Any], label: jax.Array, membership: Mapping[str, np.ndarray]
) -> dict[str, Any]:
    """Returns {metric: (sum, weight)} over the batch of all devices, with a single all-reduce.

    A per-example metric [b] has weight 1 per example and is also summed within each group of classes, as
    "<name>_<group>". A scalar metric is averaged over the devices and has weight 1.
    """
    sums = {}
    for name, value in lax.stop_gradient(dict(metrics)).items():
        if value.ndim == 0:
            share = 1 / lax.axis_size(AXIS)
            sums[name] = (value * share, jnp.full_like(value, share))
            continue
        sums[name] = (jnp.sum(value), jnp.sum(jnp.ones_like(value)))
        for group, member in membership.items():
            in_group = jnp.asarray(member, value.dtype)[label]
            sums[f"{name}_{group}"] = (jnp.sum(value * in_group), jnp.sum(in_group))
    flat, unflatten = ravel_pytree(sums)
    return unflatten(lax.psum(flat, AXIS))


def accumulate(sums: dict[str, Any], step_sums: dict[str, Any], restart: jax.Array) -> dict[str, Any]:
    """Returns `sums` plus those of one step; with `restart` (a traced bool) those of the step alone.

    Empty `sums` stand for a state whose metrics are not known yet (see `make_train_step`).
    """
    if not sums:
        return step_sums
    return jax.tree.map(lambda total, new: jnp.where(restart, 0, total) + new, sums, step_sums)


def averages(sums: Mapping[str, Any]) -> dict[str, jax.Array]:
    """Returns {metric: sum / weight}; NaN where the weight is zero (a group without an example)."""
    return {name: jnp.where(weight > 0, total / weight, jnp.nan) for name, (total, weight) in sums.items()}
