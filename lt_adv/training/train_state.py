"""Everything that training carries from step to step: arrays only, so that a checkpoint is the whole truth."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct

from lt_adv.attacks.initialization import threefry


@struct.dataclass
class TrainState:
    """`step` counts within the stage; `average` is {} or {"params", "batch_stats"}; `window` sums the metrics since the
    last log step, so that a run stopped between two of them logs the same numbers when it goes on."""

    step: jax.Array
    params: Any
    batch_stats: Any
    opt_state: optax.OptState
    average: Any
    method_state: Any
    window: Any
    key: jax.Array

    @property
    def variables(self) -> dict[str, Any]:
        """The network as it is used: the averaged weights where an average is kept, the last ones otherwise."""
        return dict(self.average) if self.average else {"params": self.params, "batch_stats": self.batch_stats}

    @property
    def evaluated(self) -> dict[str, Any]:
        """What the evaluator uses: the network, and `method_state` for an adjustment that needs it."""
        return {**self.variables, "method_state": self.method_state}


def create(key, variables, tx, method_state, *, averaged: bool) -> TrainState:
    """The state before the first step of a stage; `window` is filled in by the step's `init_window`.

    Keys of other implementations are replaced by a key of threefry: see `attacks.initialization.threefry`.
    """
    params, batch_stats = variables["params"], variables.get("batch_stats", {})
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        batch_stats=batch_stats,
        opt_state=tx.init(params),
        # Copies: an array that stood in the state twice would be donated twice.
        average=jax.tree.map(jnp.copy, {"params": params, "batch_stats": batch_stats}) if averaged else {},
        method_state=method_state,
        window={},
        key=threefry(key),
    )


def average_weight(average: dict[str, Any], step, steps_per_epoch: int):
    """The share w of the new weights in a <- a + w (p - a) after step number `step` (from 0).

    "ema": 1 - min(decay, (1 + t) / (10 + t)), so that the first weights are soon forgotten. "swa": the plain mean of
    the weights at the ends of the epochs from `start_epoch` on (from 0), w = 1 / (epochs taken so far), 0 within an
    epoch; before the first of these the average is the weights themselves. Running statistics are averaged too (ours).
    """
    if average["name"] == "ema":
        return 1.0 - jnp.minimum(jnp.float32(average["decay"]), (1.0 + step) / (10.0 + step))
    taken = step // steps_per_epoch - average["start_epoch"] + 1  # the current epoch counted in
    ends = (step + 1) % steps_per_epoch == 0
    mean = jnp.where(ends, 1.0 / jnp.maximum(taken, 1), 0.0)
    return jnp.where((taken < 1) | ((taken == 1) & ~ends), 1.0, mean).astype(jnp.float32)
